"""The task's own chat template: whatever conversation it is given, it writes the prompt that was trained.

Chat programs send a system message of their own, a history, or neither. This template takes the last
user message as the text, puts it into the prompt as the base model's template rendered it, and
leaves the rest out. It is written in what all engines read alike: strings with the escapes below,
loops, `is string`, and methods of strings (jinja2 3.1; common/jinja of llama.cpp at 0c1e570;
@huggingface/jinja 0.5).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pockettune.common.errors import UserError
from pockettune.data.chat import PROBE, control_tokens, render_chat
from pockettune.tasks import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Raw line breaks would become \n, and a carriage return is one to an engine.
ESCAPES = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"}

# Every message's content is looked at: llama.cpp would put a system message that a template never
# looks at before the user's (supports_system_role in common/jinja/caps.cpp).
HEAD = """\
{#- Written by PocketTune: the last user message is the text, asked about as the model was trained. -#}
{%- set found = namespace(text="") -%}
{%- for message in messages -%}
{%- set content = message["content"] -%}
{%- if message["role"] == "user" -%}
{%- if content is string -%}
{%- set found.text = content -%}
{%- else -%}
{%- set found.text = "" -%}
{%- for part in content -%}
{%- if part["type"] == "text" -%}
{%- set found.text = found.text + part["text"] -%}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endif -%}
{%- endfor -%}
"""

# Between control tokens, of which the first two are taken that none of them holds.
MARKS = "\n\t;~^`"

# How a base's template may take spaces off a message, as methods of strings in Python and in Jinja.
STRIPS = ("", ".lstrip()", ".rstrip()", ".strip()")


@dataclass(frozen=True)
class Frame:
    """A rendered prompt without the text, which stands between each two parts of the user's message."""

    head: str
    parts: tuple[str, ...]
    tail: str
    strip: str  # of STRIPS: what the base's template does to the message
    control: tuple[str, ...]  # tokens that are broken in a text, longest first

    def render(self, text: str) -> str:
        """Return the prompt of a text, as the template writes it."""
        for token in self.control:
            text = text.replace(token, broken(token))
        return self.head + stripped(text.join(self.parts), self.strip) + self.tail

    def message(self, prompt: str) -> str:
        """Return a user's message of which the base's template makes this prompt."""
        return prompt.removeprefix(self.head).removesuffix(self.tail)


def asked_texts(task: Task) -> list[str]:
    """Return the names of the texts that a question of the task consists of."""
    return [name for name, value in task.trial().items() if value == f"{{{name}}}"]


def holds_conversation(task: Task) -> bool:
    """Whether what is asked is a conversation, and not a prompt with texts in it."""
    return "messages" in task.trial()


def check_template(task: Task, template: str) -> None:
    """Raise UserError where the task's own template is wanted, and a message alone is no question."""
    if template == "task" and (holds_conversation(task) or len(asked_texts(task)) > 1):
        raise UserError(
            "card.template is task, whose questions are one text, the last user's message; a question of this"
            " task.type is more: set card.template: base"
        )


def stripped(text: str, strip: str) -> str:
    """Return a text after one of STRIPS."""
    return getattr(text, strip.strip(".()"))() if strip else text


def find_frame(tokenizer: "PreTrainedTokenizerBase", task: Task) -> Frame:
    """Return what the prompts of all texts share, by a trial; UserError where they do not."""
    *before, asked = task.prompt({**task.trial(), task.text_field: PROBE})

    def rendered(content: str) -> str:
        messages = [*before, {"role": "user", "content": content}]
        return render_chat(tokenizer, messages, task.template_options)

    head, _, tail = rendered(PROBE).partition(PROBE)
    parts, control = tuple(asked["content"].split(PROBE)), tuple(control_tokens(tokenizer))
    spaced = f" \n{PROBE}\n{PROBE}\n "
    for strip in STRIPS:
        if rendered(spaced) == head + stripped(spaced, strip) + tail:
            return Frame(head, parts, tail, strip, control)
    raise UserError(
        "card.template task: the base's chat template changes a message by more than the spaces around"
        " it, which the task's template does not; set card.template: base"
    )


def write_template(frame: Frame, has_replace: bool = True) -> str:
    """Return the chat template that renders as the frame does.

    The control tokens stand in one string: Gemma 3 of a GGUF file has 6,249, of which a chain of calls nests too
    deep for jinja2, and a list takes onnxruntime-genai's parser minutes, which searches what is left of the
    template for each kind of word.
    onnxruntime-genai's engine (0.18.0) has no `replace`: what splits and joins does the same.
    """
    breaking = ""
    if frame.control:
        row, column = [m for m in MARKS if not any(m in token for token in frame.control)][:2]
        table = row.join(f"{token}{column}{broken(token)}" for token in frame.control)
        call = "replace(pair[0], pair[1])" if has_replace else "split(pair[0]) | join(pair[1])"
        breaking = (
            f"{{%- for row in {quote(table)}.split({quote(row)}) -%}}\n"
            f"{{%- set pair = row.split({quote(column)}) -%}}\n"
            f"{{%- set found.text = found.text.{call} -%}}\n"
            "{%- endfor -%}\n"
        )
    message = " + found.text + ".join(quote(part) for part in frame.parts)
    return (
        f"{HEAD}{breaking}{{%- set asked = {message} -%}}\n"
        f"{{{{- {quote(frame.head)} + asked{frame.strip} + {quote(frame.tail)} -}}}}"
    )


def broken(token: str) -> str:
    """Return a control token with a space in it, as ExampleMaker.defuse writes it."""
    return f"{token[0]} {token[1:]}"


def quote(text: str) -> str:
    """Return a text as a string of Jinja."""
    return '"' + "".join(ESCAPES.get(character, character) for character in text) + '"'


def with_text(text: str) -> list[list[dict[str, object]]]:
    """Return conversations of several shapes in which this is what the user says last."""
    user: dict[str, object] = {"role": "user", "content": text}
    system: dict[str, object] = {"role": "system", "content": f"You are a helpful {PROBE}."}
    past: list[dict[str, object]] = [
        {"role": "user", "content": f"{PROBE}？"},
        {"role": "assistant", "content": f"{PROBE}。"},
    ]
    in_parts: dict[str, object] = {"role": "user", "content": [{"type": "text", "text": text}]}
    return [[user], [system, user], [system, *past, user], [user, system], [in_parts]]
