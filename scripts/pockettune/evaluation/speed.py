"""What a file costs to run, measured alike in every runtime.

As llama-bench does: a warm-up, then repetitions; a prompt of 512 tokens in one batch, then 32 tokens
one after another.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

PROMPT_TOKENS, GENERATED_TOKENS, REPETITIONS = 512, 32, 3


def measure_rates(
    read: Callable[[Sequence[int]], object],
    write: Callable[[int, int], object],
    prompt_tokens: int = PROMPT_TOKENS,
) -> dict[str, Any]:
    """Return {"prompt", "generation"}: {"tokens", "mean", "deviation"} in tokens a second.

    `read` takes a prompt into an empty context, `write` the token at a position behind it.
    """
    given = [token % 100 for token in range(prompt_tokens)]
    rates = [time_once(read, write, given) for _ in range(1 + REPETITIONS)][1:]
    prompt, generation = zip(*rates, strict=True)
    return {
        "prompt": describe(prompt_tokens, prompt),
        "generation": describe(GENERATED_TOKENS, generation),
    }


def time_once(
    read: Callable[[Sequence[int]], object],
    write: Callable[[int, int], object],
    prompt: Sequence[int],
) -> tuple[float, float]:
    """Return the rates of a prompt and of what is generated behind it."""
    started = time.perf_counter()
    read(prompt)
    middle = time.perf_counter()
    for number in range(GENERATED_TOKENS):
        write(number, len(prompt) + number)
    end = time.perf_counter()
    return len(prompt) / (middle - started), GENERATED_TOKENS / (end - middle)


def describe(tokens: int, rates: tuple[float, ...]) -> dict[str, float]:
    return {
        "tokens": tokens,
        "mean": round(statistics.mean(rates), 1),
        "deviation": round(statistics.stdev(rates), 1),
    }
