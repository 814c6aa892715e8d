"""What shows that a float LiteRT export is the merged model: in its file, in LiteRT, and in LiteRT-LM.

Every check returns a result as parity.stored's do: {"name", "passed", "detail", its numbers}.
"""

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import safe_open

from pockettune.common.errors import list_faults
from pockettune.data.prompts import Example
from pockettune.evaluation.statistics import normalise
from pockettune.litert.bundles import Bundle
from pockettune.litert.files import digest, read_weights
from pockettune.models.folder import read_header, weight_files
from pockettune.parity.stored import describe_difference, describe_rendering

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Result = dict[str, Any]
Tokens = Sequence[int]

# Of an answer's log probability, in nats. Both compute in fp32: measured at most 1e-4 (see benchmarks/formats.md),
# and 0.1 and more with two layers' matrices swapped.
BOUND = 1e-3

CAUSES = {
    "tensors": "cause: the export is of another model, or mixed up tensors; remedy: remove litert_float.tflite"
    " and run again, so that it is exported of the folder given here",
    "token_ids": "cause: LiteRT-LM reads tokenizer.json otherwise; remedy: take the formats gguf and onnx, or"
    " another base model",
    "chat_template": "cause: LiteRT-LM's Jinja does another thing than transformers' with this template;"
    " remedy: set card.template: task",
    "stops": "cause: the bundle does not name the token that ends an answer; remedy: rerun tokenize and the"
    " export",
    "logits": "cause: weights differ, or LiteRT computes the architecture otherwise; remedy: see tensors; where"
    " these pass, take the formats gguf and onnx",
    "answers": "cause: LiteRT-LM asks or ends otherwise than was trained; remedy: see token_ids, chat_template,"
    " stops and logits",
}  # fmt: skip


def result(name: str, faults: Sequence[str], detail: str, **numbers: Any) -> Result:
    """Return a check's result, told by its faults with cause and remedy where there are any."""
    if faults:
        detail = f"{list_faults(list(faults), 3)}; {CAUSES[name]}"
    return {"name": name, "passed": not faults, "detail": detail, **numbers}


def check_tensors(tflite: Path, model: Path) -> Result:
    """Find every matrix of the model folder in the file, the same numbers in the same layer."""
    stored: dict[bytes, set[int | None]] = {}
    for weight in read_weights(tflite):
        stored.setdefault(digest(weight.data), set()).add(weight.layer)
    faults, count = [], 0
    for name, layer, matrix in matrices(model):
        count += 1
        places = stored.get(digest(matrix))
        if places is None:
            faults.append(f"{name} is not in the file")
        elif layer is not None and places.isdisjoint({layer, None}):
            faults.append(f"{name} stands in layer {min(p for p in places if p is not None)}")
    return result(
        "tensors", faults, f"{count} matrices in their place, as they are", matrices=count
    )


def matrices(model: Path) -> Iterator[tuple[str, int | None, np.ndarray]]:
    """Yield name, layer and values in fp32 of each matrix of a model folder, each set of values once.

    A head that is tied to the embedding is stored as that.
    """
    for path in weight_files(model):
        names = [name for name, entry in read_header(path).items() if len(entry["shape"]) == 2]
        with safe_open(path, "pt") as file:
            for name in names:
                parts = name.split(".")
                layer = int(parts[parts.index("layers") + 1]) if "layers" in parts else None
                yield name, layer, file.get_tensor(name).float().numpy()


def check_token_ids(
    bundle: Bundle, tokenizer: "PreTrainedTokenizerBase", examples: Sequence[Example]
) -> Result:
    """Compare LiteRT-LM's token ids of the prompts with those that were trained."""
    faults = []
    for example in examples:
        found = bundle.tokenize(example.prompt)
        if found == example.prompt_ids:
            continue
        if bundle.tokenize(unicodedata.normalize("NFC", example.prompt)) != example.prompt_ids:
            faults.append(describe_difference(tokenizer, "LiteRT-LM", found, "tokens/", example.prompt_ids))  # fmt: skip
    if len(faults) > 1:
        faults = [faults[0], f"{len(faults)} of {len(examples)} prompts differ"]
    return result("token_ids", faults, f"{len(examples)} prompts give the same ids", prompts=len(examples))  # fmt: skip


def check_template(
    bundle: Bundle, asked: Sequence[tuple[Sequence[Mapping[str, str]], str]]
) -> Result:
    """Render conversations in LiteRT-LM; each must give its prompt."""
    faults = [
        describe_rendering(talk, found, prompt)
        for talk, prompt in asked
        if (found := bundle.render(talk)) != prompt
    ]
    if len(faults) > 1:
        faults = [faults[0], f"{len(faults)} of {len(asked)} differ"]
    return result("chat_template", faults, f"{len(asked)} texts give the trained prompt", texts=len(asked))  # fmt: skip


def check_stops(bundle: Bundle, ends: set[int]) -> Result:
    """Compare the tokens at which LiteRT-LM stops with those that end an answer."""
    missing = ends - bundle.ends()
    faults = [f"LiteRT-LM does not stop at {token}" for token in sorted(missing)]
    return result("stops", faults, f"LiteRT-LM stops at {sorted(bundle.ends())}", ends=sorted(bundle.ends()))  # fmt: skip


def check_logits(found: np.ndarray, expected: np.ndarray, answers: Sequence[int]) -> Result:
    """Compare log probabilities behind prompts (prompts, vocabulary): of answers, and which is likeliest."""
    ours, theirs = normalise(found), normalise(expected)
    worst = np.abs(ours - theirs)[:, list(answers)].max(axis=1)
    second, first = np.partition(theirs, -2, axis=1)[:, -2:].T
    other = (ours.argmax(axis=1) != theirs.argmax(axis=1)) & (first - second >= BOUND)
    faults = []
    if not (worst <= BOUND).all():  # so that NaN fails too
        at = int(np.nanargmax(np.where(np.isnan(worst), np.inf, worst)))
        faults.append(
            f"an answer's log probability differs by {worst[at]:.2g} (prompt {at + 1} of {len(worst)}), allowed"
            f" is {BOUND}"
        )
    if other.any():
        faults.append(f"the likeliest token differs on {int(other.sum())} of {len(worst)} prompts")
    detail = f"answers' log probabilities within {worst.max():.2g} of PyTorch's on {len(worst)} prompts (allowed {BOUND})"  # fmt: skip
    return result("logits", faults, detail, prompts=len(worst), bound=BOUND,
                  max_difference=float(worst.max()), mean_difference=float(worst.mean()))  # fmt: skip


def check_answers(said: Sequence[str], expected: Sequence[str | None]) -> Result:
    """Compare what LiteRT-LM answers with PyTorch's likeliest text; None: PyTorch's did not end."""
    faults = [
        f"LiteRT-LM answers {ours[:40]!r}, PyTorch {theirs[:40]!r}"
        for ours, theirs in zip(said, expected, strict=True)
        if theirs is not None and ours.strip() != theirs.strip()
    ]
    ended = sum(text is not None for text in expected)
    detail = f"{ended} of {len(said)} greedy answers end in PyTorch, and are LiteRT-LM's"
    return result("answers", faults, detail, answers=len(said), ended=ended)
