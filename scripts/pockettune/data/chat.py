"""Chat templates: renders conversations alike on every day, and says how a runtime renders them so.

A template is a program of the model's maker; transformers runs it in Jinja's sandbox. Some write the
day into the prompt, some behave by options. Both are fixed here, so that the same settings give the
same prompts, and what a phone's runtime must be told for the same prompt is kept beside them.
"""

import re
from collections.abc import Mapping, Sequence
from datetime import date
from typing import TYPE_CHECKING, Any

from pockettune.common.errors import UserError
from pockettune.tasks import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Options = Mapping[str, Any]  # task.template_options: variables of the template, scalars

DAY = date(2024, 7, 26)  # what Llama 3's template falls back on where it cannot ask for the day
ANOTHER_DAY = date(1999, 12, 31)

PROBE = "Qq7"  # stands for a text or an answer; no template writes it

# Variables that are not the user's to set.
GIVEN = {"messages", "tools", "documents", "add_generation_prompt", "strftime_now"}


def day_options(day: date) -> dict[str, str]:
    """Return the variables in which llama.cpp's chat programs tell every template the day.

    Source: common_chat_extra_context in common/chat.cpp of llama.cpp at 0c1e570.
    """
    return {"date_string": day.strftime("%d %b %Y"), "datetime": day.strftime("%b %d %Y")}


def render_chat(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[Message],
    options: Options,
    *,
    template: str | None = None,
    generation: bool = True,
    day: date = DAY,
) -> str:
    """Return a conversation as the chat template, or `template`, renders it.

    With `generation` it ends where an answer begins. Raises what the template raises.
    """
    from transformers.utils.chat_template_utils import _compile_jinja_template

    source = tokenizer.get_chat_template(template)
    # transformers compiles a template once and keeps it, so this is the one that renders below.
    _compile_jinja_template(source).globals["strftime_now"] = lambda form: day.strftime(form)
    rendered = tokenizer.apply_chat_template(
        list(messages),
        chat_template=source,
        tokenize=False,
        add_generation_prompt=generation,
        **{**day_options(day), **options},
    )
    assert isinstance(rendered, str)
    return rendered


def control_tokens(tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """Return the special tokens and the added tokens that the template writes, longest first.

    Not every added token: Gemma's hold line breaks, runs of spaces and <table>, plain text to it.
    """
    found = tokenizer._get_control_tokens(tokenizer.get_chat_template())
    return sorted(found, key=lambda token: (-len(token), token))


def end_of_answer(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Return the token that the template puts behind an assistant's message, else eos_token.

    Gemma's <end_of_turn> and Phi's <|end|> are not their tokenizers' eos_token.
    """
    talk = [{"role": "user", "content": PROBE}, {"role": "assistant", "content": PROBE}]
    try:
        rendered = render_chat(tokenizer, talk, {}, generation=False)
    except Exception:  # a template for questions alone
        return int(tokenizer.eos_token_id)
    behind = rendered[rendered.rfind(PROBE) :]
    tokens = "|".join(map(re.escape, control_tokens(tokenizer)))
    if tokens and rendered.count(PROBE) == 2 and (found := re.search(tokens, behind)):
        return tokenizer.get_vocab()[found[0]]
    return int(tokenizer.eos_token_id)


def check_options(tokenizer: "PreTrainedTokenizerBase", options: Options) -> None:
    """Raise UserError naming the options that the template does not read, which would do nothing."""
    from transformers.utils.chat_template_utils import _get_template_variables

    taken = {*GIVEN, *tokenizer.special_tokens_map}
    known = sorted(_get_template_variables(tokenizer.get_chat_template()) - taken)
    if unknown := sorted(set(options) - set(known)):
        raise UserError(
            f"task.template_options names {', '.join(unknown)}, which the model's chat template does"
            f" not read; it reads {', '.join(known) or 'no options'}"
        )


def refuses_system(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], options: Options
) -> bool:
    """Whether messages that cannot be rendered can be without their system message."""
    if messages[0]["role"] != "system":
        return False
    try:
        render_chat(tokenizer, messages[1:], options)
    except Exception:
        return False
    return True


def thinking_hint(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], options: Options
) -> str | None:
    """Return a warning where the model is asked at a place where it would begin to think."""
    prompt = render_chat(tokenizer, messages, options)
    if "enable_thinking" not in options:
        quiet = render_chat(tokenizer, messages, {**options, "enable_thinking": False})
        if quiet != prompt:
            return (
                "the model's chat template knows enable_thinking, and thinking is on where it is not"
                " set: the base model is asked for a label where it would begin to think; set"
                " task.template_options: {enable_thinking: false}"
            )
    answered = [*messages, {"role": "assistant", "content": PROBE}]
    try:
        told = render_chat(tokenizer, answered, options, generation=False).rpartition(PROBE)[0]
    except Exception:
        return None
    question = messages[-1]["content"].strip()
    asked, written = (text.rpartition(question)[2] for text in (prompt, told))
    if asked.split() == written.split():
        return None
    return (
        f"behind a question the model's chat template ends the prompt with {asked!r}, but puts"
        f" {written!r} before an answer that is there: the base model may expect to think first, and"
        " score low"
    )


def describe_serving(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], options: Options
) -> dict[str, Any]:
    """Return what a runtime needs to know to ask as was asked here.

    "prompt": the messages as rendered, without the BOS that the runtime adds; "end": the token that
    ends an answer; "options": the template's variables to set, also those that llama.cpp's chat programs
    would else set otherwise; "day": the day that was told; "reads_clock": whether the template asks for
    the day by itself, which no option changes.
    """
    prompt = render_chat(tokenizer, messages, options)
    clock = render_chat(tokenizer, messages, {**day_options(DAY), **options}, day=ANOTHER_DAY)
    ours = {**day_options(DAY), "enable_thinking": False}
    theirs = {**day_options(ANOTHER_DAY), "enable_thinking": True}  # a runtime's, of its day
    told = {
        key: value
        for key, value in ours.items()
        if key not in options
        and render_chat(tokenizer, messages, {**options, key: theirs[key]}) != prompt
    }
    return {
        "prompt": prompt.removeprefix(str(tokenizer.bos_token)) if added_bos(tokenizer) else prompt,
        "end": tokenizer.convert_ids_to_tokens(end_of_answer(tokenizer)),
        "options": {**options, **told},
        "day": day_options(DAY)["date_string"],
        "reads_clock": clock != prompt,
    }


def added_bos(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the BOS that the tokenizer puts before a text by itself, or nothing."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("")["input_ids"][:1] == [bos] else []
