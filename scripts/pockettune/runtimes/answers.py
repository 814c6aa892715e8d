"""Answers of free text, as every runtime generates or scores them, by two functions:

generate    the likeliest token after the likeliest, up to an end or to a number of tokens
logits_at   the logits at every position of given answers (teacher forcing)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pockettune.common.errors import UserError, list_faults

Tokens = Sequence[int]

# Bytes of logits that are held at once, beside those of one answer.
LOGITS_HELD = 2**26


@dataclass(frozen=True)
class Generation:
    """What was generated behind one prompt."""

    ids: list[int]  # without the token that ended it
    ended: bool  # False where there was no room for more tokens
    # Of all generated tokens together, the end too, of the whole vocabulary: a grammar changes which
    # token is taken, not how likely it was.
    log_probability: float


def find_room(prompts: Sequence[Tokens], max_tokens: int, context: int | None) -> list[int]:
    """Return how many tokens may follow each prompt: `max_tokens`, or what its model's context leaves.

    Raises UserError naming the prompts that leave none, or that are empty.
    """
    longest = max_tokens + max(map(len, prompts)) if context is None else context
    check_lengths([len(prompt) + 1 for prompt in prompts], longest)
    if empty := [str(i) for i, prompt in enumerate(prompts) if not prompt]:
        raise UserError(f"prompts without a token: {list_faults(empty)}")
    return [min(max_tokens, longest - len(prompt)) for prompt in prompts]


def check_lengths(lengths: Sequence[int], context: int) -> None:
    """Raise UserError naming the prompts that with their answers are longer than the context."""
    faults = [f"prompt {i} with its answer {n:,}" for i, n in enumerate(lengths) if n > context]
    if faults:
        raise UserError(
            f"too long for the {context:,} tokens that the model takes: {list_faults(faults)};"
            " lower tokenize.max_length"
        )


def log_probability(logits: np.ndarray, token: int) -> float:
    """Return the log probability of a token, of logits (vocabulary,) in float32.

    The exponentials in float32, as long as one in double takes; their sum is good to six digits.
    """
    peak = logits.max()
    total = np.exp(logits - peak).sum(dtype=np.float64)
    return float(logits[token] - peak) - float(np.log(total))
