"""What of parity shows only when the models compute: logits, the merge, where answers stop.

Differences are measured in spreads: the standard deviation of a prompt's logits over the
vocabulary, so that a bound fits models whose logits are of another size.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pockettune.parity.reference import logits_of_torch
from pockettune.parity.results import Result
from pockettune.parity.stored import make_result
from pockettune.runtimes.exact import load_exact
from pockettune.runtimes.llama import LlamaModel

Tokens = Sequence[int]

# llama.cpp rounds keys, values and activations to FP16, PyTorch here computes in fp32. Measured over
# the whole vocabulary: at most 0.0019 spreads (models of 2, 3 and 6 layers); two layers' matrices
# swapped: 0.14 to 11.5. Real weights of 30 layers (SmolLM2-135M): 0.0053. The rest is left to deeper
# models. Biases and norms: stored.check_tensors.
CONVERSION_BOUND = 0.05
# Merged weights are rounded to FP16 once. Measured on the same models: at most 0.0007, on the real
# one 0.0051; the adapter left out or added twice: 0.6 to 11.4.
MERGE_BOUND = 0.02


def logits_of_llama(model: LlamaModel, prompts: Sequence[Tokens]) -> np.ndarray:
    """Return the logits behind each prompt in llama.cpp: (prompts, vocabulary)."""
    return np.stack(list(model.next_token_logits(prompts)))


def logits_of_adapter(
    base: Path, adapter: Path, prompts: Sequence[Tokens], kept: Sequence[int] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the logits of the base model, and of the base with the adapter beside it.

    Of a trimmed vocabulary `kept` are the base's ids: it is asked the same tokens, and gives their logits.
    """
    from peft import PeftModel  # here, so that what it says at import goes into the log

    if kept is not None:
        prompts = [[kept[token] for token in prompt] for prompt in prompts]
    shown = slice(None) if kept is None else list(kept)
    model = load_exact(base)
    plain = logits_of_torch(model, prompts)[:, shown]
    adapted = PeftModel.from_pretrained(model, adapter).eval()
    return plain, logits_of_torch(adapted, prompts)[:, shown]


def compare_logits(
    found: np.ndarray, expected: np.ndarray, answers: Sequence[int], bound: float
) -> tuple[list[str], dict[str, Any]]:
    """Return faults and numbers; `answers` are the tokens whose logits may differ by `bound`.

    The likeliest token must be the same, but where two are closer than the bound it is a tie.
    """
    width = min(found.shape[1], expected.shape[1])  # of a padded vocabulary, what both have
    found, expected = found[:, :width], expected[:, :width]
    spread = expected.std(axis=1)
    difference = np.abs(found - expected)
    worst = difference[:, list(answers)].max(axis=1) / spread
    second, first = np.partition(expected, -2, axis=1)[:, -2:].T
    ties = first - second < bound * spread
    equal = found.argmax(axis=1) == expected.argmax(axis=1)
    faults = []
    if not (worst <= bound).all():  # so that NaN fails too
        at = int(np.nanargmax(np.where(np.isnan(worst), np.inf, worst)))
        faults.append(
            f"an answer's logit differs by {worst[at]:.2g} of the logits' spread (prompt {at + 1}"
            f" of {len(worst)}), allowed is {bound}"
        )
    if wrong := int((~equal & ~ties).sum()):
        faults.append(f"the likeliest token differs on {wrong} of {len(worst)} prompts")
    return faults, {
        "prompts": len(worst),
        "likeliest_equal": int(equal.sum()),
        "ties": int(ties.sum()),
        "max_difference": float(difference.max()),
        "mean_difference": float(difference.mean()),
        "max_answer_difference_in_spreads": float(worst.max()),
        "bound_in_spreads": bound,
        "mean_spread": float(spread.mean()),
    }


def check_logits(llama: np.ndarray, merged: np.ndarray, answers: Sequence[int]) -> Result:
    """Compare what the file computes in llama.cpp with what the merged model does in PyTorch."""
    faults, numbers = compare_logits(llama, merged, answers, CONVERSION_BOUND)
    return make_result("logits", faults, describe(numbers), **numbers)


def check_merge(
    merged: np.ndarray, adapted: np.ndarray, plain: np.ndarray, answers: Sequence[int]
) -> Result:
    """Compare the merged model with the base and the adapter beside it, both in PyTorch."""
    faults, numbers = compare_logits(merged, adapted, answers, MERGE_BOUND)
    # What a merge left out, or done twice, would change.
    effect = float((np.abs(adapted - plain) / adapted.std(axis=1, keepdims=True))[:, list(answers)].max())  # fmt: skip
    detail = f"{describe(numbers)}; the adapter itself moves them by {effect:.2g}"
    if effect <= MERGE_BOUND:
        detail += ", too little to tell whether it was added"
    return make_result("merge", faults, detail, adapter_effect_in_spreads=effect, **numbers)


def describe(numbers: dict[str, Any]) -> str:
    """Tell in a line how close two models are."""
    return (
        f"{numbers['likeliest_equal']} of {numbers['prompts']} likeliest tokens equal, answers'"
        f" logits within {numbers['max_answer_difference_in_spreads']:.2g} of the logits' spread"
        f" (allowed {numbers['bound_in_spreads']})"
    )


def check_stops(
    llama: Sequence[list[int]], merged: Sequence[list[int]], stops: Sequence[bool], ends: set[int]
) -> Result:
    """Compare greedy answers; `stops` says which of llama.cpp's came to an end.

    One must where PyTorch's does. A model that does not know its task may ramble in both.
    """
    expected = [not ends.isdisjoint(tokens) for tokens in merged]
    missed = [i for i, (a, b) in enumerate(zip(stops, expected, strict=True)) if b and not a]
    faults = [f"{len(missed)} of {len(llama)} answers end in PyTorch and go on in llama.cpp (it wrote {llama[missed[0]][:8]}, PyTorch {merged[missed[0]][:8]})"] if missed else []  # fmt: skip
    agree = sum(a == b for a, b in zip(llama, merged, strict=True))
    neither = sum(not a and not b for a, b in zip(stops, expected, strict=True))
    detail = f"{sum(stops)} of {len(llama)} greedy answers stop, {agree} are those of PyTorch"
    if neither:
        detail += f"; neither stops on {neither}"
    return make_result("stops", faults, detail, answers=len(llama), stop_in_llama_cpp=sum(stops),
                       stop_in_torch=sum(expected), neither_stops=neither, equal=agree)  # fmt: skip
