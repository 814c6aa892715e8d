"""What servers are told so that they ask as was trained: Ollama's Modelfile, a grammar, a preset."""

from collections.abc import Sequence
from typing import Any

from pockettune.data.task_template import ESCAPES, Frame, quote

# Whole blocks, with room for texts twice as long as the longest that were trained.
CONTEXT_BLOCK = 256


def context_tokens(max_length: int) -> int:
    """Return how many tokens a server is to make room for."""
    return -(-2 * max_length // CONTEXT_BLOCK) * CONTEXT_BLOCK


def write_modelfile(model: str, frame: Frame, bos: str, stop: str, max_tokens: int, context: int) -> str:  # fmt: skip
    """Return Ollama's Modelfile, whose template writes the trained prompt around the last message.

    `bos` is left out of the prompt where the file has it added. Ollama's template language can neither
    strip a message nor break control tokens in it. Syntax: parser/parser.go of Ollama at 00dc3af;
    the template's text stands in Go strings, in which nothing ends the triple quotes.
    """
    before = frame.head.removeprefix(bos) + frame.parts[0]
    after = [*frame.parts[1:-1], frame.parts[-1] + frame.tail]
    prompt = f"{{{{ {go_string(before)} }}}}" + "".join(
        f"{{{{ $message.Content }}}}{{{{ {go_string(part)} }}}}" for part in after
    )
    return (
        f"FROM ./{model}\n"
        "# The trained prompt, its system message too, around what the last message says.\n"
        'TEMPLATE """{{ range $i, $message := .Messages }}{{ if eq (len (slice $.Messages $i)) 1 }}'
        f'{prompt}{{{{ end }}}}{{{{ end }}}}"""\n'
        "PARAMETER temperature 0\n"
        "PARAMETER top_k 1\n"
        "PARAMETER repeat_penalty 1\n"
        f"PARAMETER stop {stop}\n"
        f"PARAMETER num_predict {max_tokens}\n"
        f"PARAMETER num_ctx {context}\n"
    )


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
    settings: dict[str, Any], frame: Frame, bos: str, stop: str, max_tokens: int
) -> dict[str, Any]:
    """Return what a program must know that asks the file by itself."""
    task = settings["task"]
    words = sorted(task["labels"].items())
    return {
        "type": task["type"],
        "template": settings["card"]["template"],
        "system": task["system"],
        "prompt": task["prompt"],
        "labels": [word for _, word in words],
        "values": {word: value for value, word in words},
        # The prompt: head, the parts with the text between each two, stripped as said, and tail.
        "head": frame.head,
        "parts": list(frame.parts),
        "tail": frame.tail,
        "strip": frame.strip.strip(".()"),
        "control": list(
            frame.control
        ),  # a text's control tokens get a space behind the first character
        "bos": bos,  # with which head begins, where the file has it added by itself
        "stop": stop,
        "max_tokens": max_tokens,
        "sampling": {"temperature": 0, "top_k": 1, "repeat_penalty": 1.0},
    }
