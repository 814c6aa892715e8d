"""What of parity concerns a file of another format than GGUF, whatever runtime opens it.

Its float export is compared with the merged model, before anything is quantized: what a variant loses
besides is quantization's. The results are those of stored.make_result.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import TemplateError

from pockettune.common.errors import list_faults
from pockettune.data.chat import render_chat
from pockettune.data.prompts import Example
from pockettune.evaluation.statistics import normalise
from pockettune.models.folder import tensor_shapes
from pockettune.parity.results import Result
from pockettune.tasks import Message, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tokens = Sequence[int]

# Both compute in fp32, so only the order of summation differs. Seen: at most 4.6e-5 in log probabilities
# (SmolLM2-135M, 300 rows).
FLOAT_BOUND = 1e-3
# A runtime's own tokenizer may part from Hugging Face's in texts that nothing here can mend, such as two
# spaces before a digit (1 of 500 prompts); a wrong tokenizer, or a BOS too many, differs in nearly all.
TOLERATED = 0.02

CAUSES = {
    "token_ids": "cause: another tokenizer than the merged model's, or a BOS too many; remedy: remove the"
    " export and run again",
    "chat_template": "cause: another chat template than the one that was trained; remedy: remove the export"
    " and run again",
    "stop_tokens": "cause: the export's configuration does not name the token that ends an answer; remedy:"
    " remove the export and run again",
    "logits": "cause: weights differ, such as a layer left out, doubled or swapped, or an operator that"
    " computes otherwise; remedy: remove the export and run again; if it stays so, take format gguf",
    "vectors": "cause: weights stand in another layer's place; remedy: remove the export and run again",
    "tensors": "cause: the export is of another model folder, or mixed up its matrices; remedy: remove the export"
    " and run again",
    "answers": "cause: the app's own runtime asks or stops otherwise; remedy: see token_ids, stop_tokens and"
    " logits",
}


def make_result(name: str, faults: Sequence[str], detail: str, **numbers: Any) -> Result:
    """Return a check's result, told by its faults with cause and remedy where there are any."""
    if faults:
        detail = f"{list_faults(list(faults), 3)}; {CAUSES[name]}"
    return {"name": name, "passed": not faults, "detail": detail, **numbers}


def check_token_ids(
    who: str, tokenize: Callable[[str], list[int]], examples: Sequence[Example]
) -> Result:
    """Compare the ids that the format's own tokenizer gives the prompts with those they were trained as."""
    apart = [example for example in examples if tokenize(example.prompt) != example.prompt_ids]
    told = ""
    if apart:
        first = apart[0]
        found = tokenize(first.prompt)
        pairs = enumerate(zip(found, first.prompt_ids, strict=False))
        place = next((i for i, (a, b) in pairs if a != b), min(len(found), len(first.prompt_ids)))
        cut = slice(place, place + 4)
        told = (
            f"{who} reads {len(apart)} of {len(examples)} prompts as other tokens, {first.id} from token"
            f" {place} on: {found[cut]}, not {first.prompt_ids[cut]}"
        )
    faults = [told] if len(apart) > TOLERATED * len(examples) else []
    detail = told or f"{len(examples)} prompts give the same ids in {who}"
    return make_result(
        "token_ids", faults, detail, prompts=len(examples), prompts_differing=len(apart)
    )


def check_chat_template(
    tokenizer: "PreTrainedTokenizerBase",
    template: str,
    render: Callable[[Sequence[Message]], str],
    asked: Sequence[tuple[Sequence[Message], str]],
) -> Result:
    """Have each conversation of `asked` give its prompt by the stored template and by the app's own engine.

    `render` is that engine's; Hugging Face's renders `template`.
    """

    def reference(talk: Sequence[Message]) -> str:
        try:
            return render_chat(tokenizer, talk, {}, template=template)
        except TemplateError as error:
            return f"refused: {error}"

    faults = []
    for talk, prompt in asked:
        for engine, found in (("the stored template", reference), ("the app's engine", render)):
            if (text := found(talk)) != prompt:
                faults.append(f"{engine} writes {text[-120:]!r}, not {prompt[-120:]!r}")
    return make_result("chat_template", faults[:1], f"{len(asked)} texts give the trained prompt",
                       texts=len(asked), differing=len(faults))  # fmt: skip


def conversations(
    settings: Mapping[str, Any],
    task: Task,
    examples: Sequence[Example],
    records: Mapping[str, Mapping[str, Any]],
) -> list[tuple[Sequence[Message], str]]:
    """Return what a program sends for each example, and the prompt that it must become.

    Left out are texts that were cut, which no template does, and, with the base's own template, those in
    which control tokens were broken, which it does not; and all where it takes options, which an app
    need not be able to give.
    """
    of_task = settings["card"]["template"] == "task"
    if not of_task and task.template_options:
        return []
    asked: list[tuple[Sequence[dict[str, str]], str]] = []
    for example in examples:
        record = dict(records[example.id])
        if example.cut or (example.defused and not of_task):
            continue
        text = {"role": "user", "content": record[task.text_field]}
        asked.append(([text] if of_task else task.prompt(record), example.prompt))
    return asked


def check_stop_tokens(stops: Iterable[int], ends: Iterable[int]) -> Result:
    """Compare the tokens at which a runtime stops with those that end an answer."""
    missing = sorted(set(ends) - set(stops))
    faults = [f"it does not stop at {missing}, with which answers end"] if missing else []
    return make_result("stop_tokens", faults, f"stops at {sorted(stops)}", stops=sorted(stops))


def check_logits(found: np.ndarray, merged: np.ndarray, answers: Sequence[int]) -> Result:
    """Compare the answers' log probabilities (prompts, vocabulary) with the merged model's."""
    ours, theirs = normalise(found), normalise(merged)
    width = min(ours.shape[1], theirs.shape[1])  # of a padded vocabulary, what both have
    difference = np.abs(ours[:, list(answers)] - theirs[:, list(answers)])
    worst = float(difference.max())
    equal = int((ours[:, :width].argmax(axis=1) == theirs[:, :width].argmax(axis=1)).sum())
    faults = []
    if not worst <= FLOAT_BOUND:  # so that NaN fails too
        faults.append(
            f"an answer's log probability differs by {worst:.2g}, allowed is {FLOAT_BOUND}"
        )
    detail = (
        f"answers' log probabilities within {worst:.2g} (allowed {FLOAT_BOUND}), {equal} of"
        f" {len(found)} likeliest tokens equal"
    )
    return make_result("logits", faults, detail, prompts=len(found), largest_difference=worst,
                       likeliest_equal=equal)  # fmt: skip


def check_answers(found: Sequence[Any], expected: Sequence[Any]) -> Result:
    """Compare the answers that the app's own runtime writes greedily with PyTorch's, as ids or as texts."""
    apart = [i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b]
    faults = (
        [
            f"{len(apart)} of {len(found)} answers differ: {found[apart[0]]!r}, not {expected[apart[0]]!r}"
        ]
        if apart
        else []
    )
    return make_result(
        "answers", faults, f"{len(found)} greedy answers are PyTorch's", answers=len(found)
    )


def misplaced_vectors(stored: dict[str, np.ndarray], model: Path) -> Result:
    """Compare the norms that an export stores by the model's names with the model's own values.

    Two layers whose norms were swapped move logits by little. An exporter may add a constant (Gemma's
    norms are stored less one).
    """
    own = read_vectors(model, stored)
    faults = []
    for name, values in own.items():
        found = stored[name]
        if not is_shifted(found, values):
            other = next(
                (n for n, v in own.items() if is_shifted(found, v)), "no norm of the model"
            )
            faults.append(f"{name} holds the values of {other}")
    return make_result(
        "vectors", faults, f"{len(own)} norms hold their own values", vectors=len(own)
    )


def is_shifted(found: np.ndarray, values: np.ndarray) -> bool:
    """Whether two vectors are the same, but for a constant of 0 or 1."""
    return any(np.allclose(found - shift, values, rtol=0, atol=1e-6) for shift in (0, 1))


def read_vectors(model: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Return a model folder's vectors of these names, as far as it has them."""
    from safetensors import safe_open

    from pockettune.models.folder import weight_files

    wanted = {name for name in names if len(tensor_shapes(model).get(name, [])) == 1}
    found: dict[str, Any] = {}
    for path in weight_files(model):
        with safe_open(path, "pt") as file:
            found |= {
                name: file.get_tensor(name).float().numpy() for name in set(file.keys()) & wanted
            }
    return found
