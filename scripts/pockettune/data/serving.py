"""What servers are told so that they ask as was trained: Ollama's Modelfile, a grammar, a preset."""

from collections.abc import Mapping, Sequence
from typing import Any

from pockettune.data.task_template import ESCAPES, Frame, asked_texts, quote
from pockettune.data.turns import Turns
from pockettune.tasks import Task, TextTask

# Whole blocks, with room for texts twice as long as the longest that were trained.
CONTEXT_BLOCK = 256

# Of Ollama's template, within a loop over the messages.
CONTENT, IS_LAST = "{{ $message.Content }}", "eq (len (slice $.Messages $i)) 1"

# Of a text task's settings, what a program must know that shows its answers or cuts its texts.
TOLD = ("types", "no_answer", "stride")


def context_tokens(max_length: int) -> int:
    """Return how many tokens a server is to make room for."""
    return -(-2 * max_length // CONTEXT_BLOCK) * CONTEXT_BLOCK


def write_modelfile(
    model: str,
    asked: Frame | Turns,
    bos: str,
    stop: str,
    max_tokens: int,
    context: int,
    system: str = "",
) -> str:
    """Return Ollama's Modelfile, whose template writes the trained prompt.

    Around the last message, or of a whole conversation, to which `system` is given where it has none.
    `bos` is left out of the prompt where the file has it added. Ollama's template language can neither
    strip a message nor break control tokens in it. Syntax: parser/parser.go of Ollama at 00dc3af;
    the template's text stands in Go strings, in which nothing ends the triple quotes.
    """
    if isinstance(asked, Frame):
        told, template = "around what the last message says", frame_in_go(asked, bos)
    else:
        told, template = "of a whole conversation", turns_in_go(asked, bos)
    return (
        f"FROM ./{model}\n"
        f"# The trained prompt, its system message too, {told}.\n"
        f'TEMPLATE """{{{{ range $i, $message := .Messages }}}}{template}{{{{ end }}}}"""\n'
        + (f'SYSTEM """{system}"""\n' if system else "")
        + "PARAMETER temperature 0\n"
        "PARAMETER top_k 1\n"
        "PARAMETER repeat_penalty 1\n"
        f"PARAMETER stop {stop}\n"
        f"PARAMETER num_predict {max_tokens}\n"
        f"PARAMETER num_ctx {context}\n"
    )


def frame_in_go(frame: Frame, bos: str) -> str:
    """Return what Ollama writes of a message: nothing of any but the last."""
    before = frame.head.removeprefix(bos) + frame.parts[0]
    after = [*frame.parts[1:-1], frame.parts[-1] + frame.tail]
    prompt = write_in_go(before) + "".join(f"{CONTENT}{write_in_go(part)}" for part in after)
    return f"{{{{ if {IS_LAST} }}}}{prompt}{{{{ end }}}}"


def turns_in_go(turns: Turns, bos: str) -> str:
    """Return what Ollama writes of a message, by its role and place."""
    before, behind = turns.system or ("", "")
    return (
        f'{{{{ if eq $message.Role "system" }}}}{write_in_go(before.removeprefix(bos))}{CONTENT}'
        f'{write_in_go(behind)}{{{{ else if eq $message.Role "assistant" }}}}{CONTENT}'
        f"{write_in_go(turns.following)}{{{{ else }}}}{{{{ if eq $i 0 }}}}"
        f"{write_in_go(turns.start.removeprefix(bos))}{{{{ end }}}}{CONTENT}"
        f"{{{{ if {IS_LAST} }}}}{write_in_go(turns.tail)}{{{{ else }}}}{write_in_go(turns.between)}"
        "{{ end }}{{ end }}"
    )


def write_in_go(text: str) -> str:
    return f"{{{{ {go_string(text)} }}}}"


def go_string(text: str) -> str:
    """Return a text as a string of Go; what Ollama's parser would drop as unprintable is escaped."""
    return '"' + "".join(ESCAPES.get(c) or escape(c) for c in text) + '"'


def escape(character: str) -> str:
    if character.isprintable():
        return character
    code = ord(character)
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def write_grammar(words: Sequence[str]) -> str:
    """Return a grammar in llama.cpp's GBNF by which nothing but an allowed answer can be said.

    Its escapes are Jinja's (grammars/README.md at 0c1e570).
    """
    return "root ::= " + " | ".join(map(quote, words)) + "\n"


def write_preset(model: str, max_tokens: int, context: int) -> str:
    """Return a preset for llama-server --models-preset, started in the bundle's folder."""
    return (
        "version = 1\n\n"
        f"[{model.removesuffix('.gguf')}]\n"
        f"model = {model}\n"
        "jinja = true\n"
        "temp = 0\n"
        "top-k = 1\n"
        "repeat-penalty = 1.0\n"
        f"n-predict = {max_tokens}\n"
        f"ctx-size = {context}\n"
        "parallel = 1\n"
    )


def describe_task(
    settings: Mapping[str, Any],
    answers: Mapping[str, Any],
    asked: Frame | Turns,
    bos: str,
    stop: str,
    max_tokens: int,
) -> dict[str, Any]:
    """Return what a program must know that asks the file by itself."""
    task = settings["task"]
    return {
        "type": task["type"],
        "template": settings["card"]["template"],
        "system": task["system"] or "",
        "prompt": task["prompt"] or "",
        **answers,
        **(describe_frame(asked) if isinstance(asked, Frame) else describe_turns(asked)),
        "control": list(
            asked.control
        ),  # a text's control tokens get a space behind the first character
        "bos": bos,  # with which a prompt begins, where the file has it added by itself
        "stop": stop,
        "max_tokens": max_tokens,
        "sampling": {"temperature": 0, "top_k": 1, "repeat_penalty": 1.0},
    }


def describe_labels(labels: Mapping[str, str]) -> dict[str, Any]:
    """Return the words that are answered, and the value in the data for each."""
    words = sorted(labels.items())
    return {
        "labels": [word for _, word in words],
        "values": {word: value for value, word in words},
    }


def describe_text(settings: Mapping[str, Any], task: Task, text: TextTask) -> dict[str, Any]:
    """Return the texts that are asked about, and how answers of text are written."""
    told = {key: settings[key] for key in TOLD if settings.get(key) is not None}
    return {"texts": asked_texts(task), "grammar": text.grammar(), **told}


def describe_frame(frame: Frame) -> dict[str, Any]:
    """Return the prompt: head, the parts with the text between each two, stripped as said, and tail."""
    return {
        "head": frame.head,
        "parts": list(frame.parts),
        "tail": frame.tail,
        "strip": frame.strip.strip(".()"),
    }


def describe_turns(turns: Turns) -> dict[str, Any]:
    """Return what stands between the messages of a conversation (see Turns)."""
    strips = {role: strip.strip(".()") for role, strip in turns.strips.items()}
    parts = ("start", "system", "between", "following", "tail")
    return {"turns": {**{part: getattr(turns, part) for part in parts}, "strips": strips}}
