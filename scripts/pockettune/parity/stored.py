"""What of parity a GGUF file tells by itself: token ids, special tokens, chat template, tensors.

Every check returns a result: {"name", "passed", "detail", and the numbers it is made of}.
"""

import json
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import TemplateError
from safetensors import safe_open

from pockettune.common.errors import list_faults
from pockettune.data.chat import control_tokens, render_chat
from pockettune.data.prompts import Example, encode, render_prompt, starts_pattern, take_evenly
from pockettune.data.task_template import with_text
from pockettune.data.trial_texts import HARD_TEXTS
from pockettune.gguf.files import list_tensors, read_vectors, tensor_faults
from pockettune.models.folder import embedding_rows, read_header, tensor_shapes, weight_files
from pockettune.parity.results import Result
from pockettune.runtimes.llama import LlamaModel
from pockettune.tasks import Message, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


POSITIONS = "position_embd.weight"  # learned (GPT-2), which the converter stores as F32
TOKENS_OF_VOCABULARY, TOKENS_A_TEXT = 512, 16
# Of control tokens, each of which a template looks for in each text: Gemma 3 of a GGUF file has 6,249.
MOST_TEXTS = 128

CAUSES = {
    "token_ids": "cause: the pre-tokenizer or the vocabulary differs; remedy: tokenizer.json must be"
    " the base's, and convert_model.PRE_TOKENIZERS must name its pattern as llama.cpp does; rerun convert",
    "vocabulary": "cause: the vocabulary was padded or resized; remedy: train and merge without new"
    " tokens, on the embedding as the base has it; rerun merge and convert",
    "special_tokens": "cause: the file's tokenizer.ggml metadata are not those of"
    " tokenizer_config.json; remedy: take the base's tokenizer files unchanged and rerun convert",
    "chat_template": "cause: the file stores another chat template than the merged folder; remedy:"
    " take the base's tokenizer files unchanged and rerun convert",
    "task_template": "cause: the file stores another chat template than the task's, or the base's does more"
    " to a text than the task's can; remedy: rerun convert, or set card.template: base",
    "logits": "cause: weights differ; remedy: rerun convert with the pinned converter, from the"
    " merged folder given here",
    "merge": "cause: the merged folder is not base + adapter (added twice, not at all, or another"
    " one); remedy: rerun merge on the 16-bit base",
    "tensors": "cause: the merge or the conversion added, lost, untied, quantized or mixed up tensors; remedy:"
    " rerun merge, then convert with --outtype f16",
    "stops": "cause: the token that ends an answer is not known as its end, or weights differ;"
    " remedy: see special_tokens and logits, rerun convert",
}


def make_result(
    name: str, faults: Sequence[str], detail: str, cause: str | None = None, **numbers: Any
) -> Result:
    """Return a check's result, told by its faults with cause and remedy where there are any."""
    if faults:
        detail = f"{list_faults(list(faults))}; {CAUSES[cause or name]}"
    return {"name": name, "passed": not faults, "detail": detail, **numbers}


def check_token_ids(
    llama: LlamaModel, tokenizer: "PreTrainedTokenizerBase", examples: Sequence[Example]
) -> Result:
    """Compare llama.cpp's token ids with tokenizer.json's, on prompts and on hard texts.

    What differs in a prompt of this run is a fault. What differs in made-up texts alone is counted and
    told: no row that is scored holds it, a user's text may.
    """
    faults, not_nfc = [], 0
    for example in examples:
        # Prompts were encoded by the base's tokenizer; the merged folder must hold the same.
        text, ids = example.prompt, example.prompt_ids
        if (merged := encode(tokenizer, text)) != ids:
            faults.append(
                describe_difference(tokenizer, "the merged model", merged, "tokens/", ids)
            )
        elif fault := differs_in_llama(llama, tokenizer, text, ids):
            faults.append(fault)
        elif not unicodedata.is_normalized("NFC", text):
            not_nfc += llama.tokenize(text) != ids
    texts, apart = compare_made_up(llama, tokenizer)
    detail = f"{len(examples)} prompts give the same ids"
    if apart:
        detail += (
            f"; {len(apart)} of {texts} made-up texts, in none of these prompts, do not: {apart[0]}"
        )
    else:
        detail += f", and {texts} hard texts"
    if not_nfc:
        detail += f"; {not_nfc} prompts only after normalization to NFC, which llama.cpp leaves out"
    return make_result("token_ids", first_of(faults, len(examples), "prompts"), detail, texts=texts,
                       texts_differing=len(apart), prompts=len(examples), prompts_not_nfc=not_nfc)  # fmt: skip


def check_made_up(llama: LlamaModel, tokenizer: "PreTrainedTokenizerBase") -> Result:
    """Compare the ids of made-up texts, of which none may differ: for a tokenizer that was made here."""
    texts, apart = compare_made_up(llama, tokenizer)
    detail = f"{texts} texts give the same ids"
    return make_result("token_ids", first_of(apart, texts, "texts"), detail, texts=texts)


def compare_made_up(
    llama: LlamaModel, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[int, list[str]]:
    """Return how many hard texts and texts of the vocabulary there are, and how some differ."""
    texts = [*hard_texts(tokenizer), *vocabulary_texts(tokenizer)]
    told = [differs_in_llama(llama, tokenizer, text, encode(tokenizer, text)) for text in texts]
    return len(texts), [fault for fault in told if fault]


def first_of(faults: list[str], of: int, what: str) -> list[str]:
    """Return the first fault, and how many of the `of` texts have one where it is not alone."""
    return [*faults[:1], *([f"{len(faults)} of {of} {what} differ"] if len(faults) > 1 else [])]


def differs_in_llama(
    llama: LlamaModel, tokenizer: "PreTrainedTokenizerBase", text: str, ids: list[int]
) -> str | None:
    """Tell how llama.cpp's ids of a text differ; None where they are the same, or are once it is NFC.

    llama.cpp leaves normalization to who calls it; no conversion can mend that.
    """
    found = llama.tokenize(text)
    if found == ids or llama.tokenize(unicodedata.normalize("NFC", text)) == ids:
        return None
    return describe_difference(tokenizer, "llama.cpp", found, "Hugging Face", ids)


def hard_texts(tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """Return the fixed hard texts, and some in which the model's own control tokens are written."""
    control = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    written = [f"前{token}\n后 {token} a" for token in control]
    step = -(-len(written) // MOST_TEXTS) or 1
    groups = ["".join(written[first : first + step]) for first in range(0, len(written), step)]
    return [*HARD_TEXTS, *groups, "".join(control)]


def vocabulary_texts(tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """Return texts that tokens from all over the vocabulary make.

    Whether a text is split in the right places shows only where tokens of several characters meet.
    """
    special = set(tokenizer.added_tokens_decoder)
    ids = sorted(set(tokenizer.get_vocab().values()) - special)
    words = [str(tokenizer.decode([token])) for token in take_evenly(ids, TOKENS_OF_VOCABULARY)]
    step = TOKENS_A_TEXT
    return ["".join(words[begin : begin + step]) for begin in range(0, len(words), step)]


def describe_difference(
    tokenizer: "PreTrainedTokenizerBase", who: str, found: list[int], whom: str, expected: list[int]
) -> str:
    """Name the text and the ids around the first place where two lists of ids part."""
    pairs = enumerate(zip(found, expected, strict=False))
    first = next((i for i, (a, b) in pairs if a != b), min(len(found), len(expected)))
    near = str(tokenizer.decode(expected[max(first - 4, 0) : first + 6]))
    cut = slice(first, first + 6)
    return f"at {show(near)} (token {first}) {who} has {found[cut]}, {whom} has {expected[cut]}"


def show(text: str, limit: int = 48) -> str:
    """Return a text in quotes, cut short; a mark stands for a space, so that runs of them survive."""
    shown = text if len(text) <= limit else f"{text[:limit]}…"
    return json.dumps(shown, ensure_ascii=False).replace(" ", "␣")


def check_vocabulary(
    llama: LlamaModel, base: Path, model: Path, kept: Sequence[int] | None = None
) -> Result:
    """Compare the file's tokens with the rows of the embeddings of the merged and the base model.

    Of a trimmed vocabulary `kept` are the base's rows that were kept.
    """
    rows = {"merged": embedding_rows(model), "base": embedding_rows(base)}
    left_out = 0 if kept is None else rows["base"] - len(kept)
    size = llama.vocabulary_size
    faults = [
        f"the GGUF has {size} tokens, the {name} model's embedding {count} rows ({size - count:+d})"
        for name, count in (("merged", rows["merged"]), ("base", rows["base"] - left_out))
        if count != size
    ]
    detail = f"{size} tokens in the GGUF, merged and base model"
    if kept is not None:
        detail = f"{size} tokens in the GGUF and the trimmed model, of the base's {rows['base']}"
    return make_result("vocabulary", faults, detail,
                       tokens=size, merged_rows=rows["merged"], base_rows=rows["base"])  # fmt: skip


def check_special_tokens(
    llama: LlamaModel,
    tokenizer: "PreTrainedTokenizerBase",
    ends: Iterable[int],
    prompt: Sequence[int] = (),
) -> Result:
    """Compare BOS, EOS and pad with the tokenizer's, and ask whether llama.cpp stops at `ends`."""
    found = {name: llama.special_token(name) for name in ("bos", "eos", "eot", "pad")}
    expected = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    # Without an entry in the file llama.cpp takes a default, which nobody chose.
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        if not llama.stores(f"tokenizer.ggml.{key}_token_id"):
            found[name] = None
    adds_bos = expected["bos"] in tokenizer("a")["input_ids"][:1]
    faults = [
        f"{name.upper()} is {found[name]} in the file, {expected[name]} in tokenizer_config.json"
        for name in ("bos", "eos", "pad")
        if found[name] != expected[name]
        and (name == "eos" or None not in (found[name], expected[name]))
    ]
    if llama.adds_bos() != adds_bos:
        faults.append(f"llama.cpp {'adds a' if llama.adds_bos() else 'adds no'} BOS to a prompt,"
                      f" tokenizer.json {'adds one' if adds_bos else 'adds none'}")  # fmt: skip
    faults += [
        f"llama.cpp does not stop at {token} ({tokenizer.convert_ids_to_tokens(token)}), with which"
        " every answer ends"
        for token in sorted(set(ends))
        if not llama.stops_at(token)
    ]
    detail = f"EOS {found['eos']}, at which llama.cpp stops; BOS {'' if adds_bos else 'not '}added"
    # Trained and scored without a BOS, with which chat programs then serve the file.
    lacks_bos = bool(adds_bos and prompt and prompt[0] != expected["bos"])
    if lacks_bos:
        detail += "; WARNING: the prompts of this run do not begin with it"
    return make_result("special_tokens", faults, detail, gguf=found, tokenizer=expected,
                       adds_bos=adds_bos, prompts_lack_bos=lacks_bos)  # fmt: skip


def check_chat_template(llama: LlamaModel, tokenizer: "PreTrainedTokenizerBase") -> Result:
    """Render conversations with the template in the file and with the merged folder's own."""
    stored = llama.chat_template()
    if stored is None:
        return make_result("chat_template", ["the file stores no chat template"], "")
    talks = conversations(tokenizer)
    faults = []
    for talk in talks:
        found, expected = render(tokenizer, talk, stored), render(tokenizer, talk, None)
        if found != expected:
            faults.append(describe_rendering(talk, found, expected))
    return make_result("chat_template", faults[:1], f"{len(talks)} conversations render alike",
                       conversations=len(talks), differing=len(faults))  # fmt: skip


def check_task_template(
    llama: LlamaModel,
    tokenizer: "PreTrainedTokenizerBase",
    task: Task,
    examples: Sequence[Example],
    texts: Mapping[str, str],
) -> Result:
    """Render each example's bare text with the template in the file, which must give its prompt.

    `texts` are the examples' by id. Hard texts are rendered in conversations of several shapes, with a
    system message, a history, in parts, and must give what the base's template makes of them. Texts that
    were cut to tokenize.max_length have another prompt, which no template can know.
    """
    stored = llama.chat_template()
    if stored is None:
        return make_result("chat_template", ["the file stores no chat template"], "")
    whole = [example for example in examples if not example.cut]
    asked: list[tuple[Sequence[Any], str]] = [
        ([{"role": "user", "content": texts[example.id]}], example.prompt) for example in whole
    ]
    defuse = starts_pattern(control_tokens(tokenizer))
    for text in hard_texts(tokenizer):
        record = {"id": "(a hard text)", task.text_field: defuse.sub(r"\g<0> ", text)}
        prompt = render_prompt(tokenizer, task, record)
        asked += [(talk, prompt) for talk in with_text(text)]
    faults = [
        describe_rendering(talk, found, prompt)
        for talk, prompt in asked
        if (found := render(tokenizer, talk, stored)) != prompt
    ]
    detail = (
        f"{len(whole)} texts and {len(asked) - len(whole)} conversations give the trained prompt"
    )
    return make_result("chat_template", faults[:1], detail, "task_template",
                       texts=len(whole), conversations=len(asked) - len(whole), differing=len(faults))  # fmt: skip


def describe_rendering(talk: Sequence[Mapping[str, Any]], found: str, expected: str) -> str:
    """Name the first place where two renderings of a conversation part."""
    roles = "+".join(message["role"] for message in talk)
    at = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b),
              min(len(found), len(expected)))  # fmt: skip
    return (
        f"a conversation of {roles} differs from character {at} on:"
        f" {show(found[at:])}, not {show(expected[at:])}"
    )


def conversations(tokenizer: "PreTrainedTokenizerBase") -> list[list[dict[str, str]]]:
    """Return conversations of several shapes about each hard text."""
    talks = []
    for text in hard_texts(tokenizer):
        user = {"role": "user", "content": text}
        talks += [
            [{"role": "system", "content": f"你是助手。{text}"}, user],
            [user],
            [user, {"role": "assistant", "content": f"好。{text}"}, user],
        ]
    return talks


def render(
    tokenizer: "PreTrainedTokenizerBase", talk: Sequence[Message], template: str | None
) -> str:
    """Render in transformers' sandbox; what a template refuses is part of what it does."""
    try:
        return render_chat(tokenizer, talk, {}, template=template)
    except TemplateError as error:
        return f"refused: {error}"


def check_tensors(gguf: Path, model: Path) -> Result:
    """Compare tensors by name; a tied embedding stays tied; every matrix is stored as F16."""
    stored, shapes = list_tensors(gguf), tensor_shapes(model)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    tied = bool(config.get("tie_word_embeddings"))
    # A tied head that is stored all the same is the embedding again.
    names = [name for name in shapes if not (tied and name == "lm_head.weight")]
    faults = tensor_faults(gguf, names)
    other = [
        f"{n} is {kind}"
        for n, (kind, axes) in stored.items()
        if axes == 2 and kind != "F16" and n != POSITIONS
    ]
    if other:
        faults.append(f"{list_faults(other, 3)}, not F16")
    misplaced, compared = misplaced_vectors(gguf, model)
    if misplaced:
        faults.append(list_faults(misplaced, 3))
    detail = f"{len(stored)} tensors, embedding {'tied' if tied else 'untied'}, all matrices F16, {compared} vectors in their place"  # fmt: skip
    return make_result("tensors", faults, detail, tensors=len(stored), tied=tied, vectors=compared)


def misplaced_vectors(gguf: Path, model: Path) -> tuple[list[str], int]:
    """Name biases and norms that hold the values of another, and count those that hold their own.

    Swapped matrices move the logits far; swapped biases of two layers can move them by as little
    as 0.005 spreads, below any bound on logits. Values are compared sorted, because the converter
    reorders some; where it shifts them (Gemma's norms) they are nobody's, and not counted.
    """
    own: dict[str, np.ndarray] = {}
    for path in weight_files(model):
        names = [name for name, entry in read_header(path).items() if len(entry["shape"]) == 1]
        with safe_open(path, "pt") as file:
            own |= {name: np.sort(file.get_tensor(name).float().numpy()) for name in names}
    faults, kept = [], 0
    for name, values in read_vectors(gguf, own).items():
        stored = np.sort(values)
        if np.array_equal(stored, own[name]):
            kept += 1
        elif other := next((n for n, v in own.items() if np.array_equal(stored, v)), None):
            faults.append(f"{name} holds the values of {other}")
    return faults, kept
