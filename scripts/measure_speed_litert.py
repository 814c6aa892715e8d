"""Measure what a .tflite file costs to run: speed of prompts and of generation, and memory.

As measure_speed.py does of a GGUF file; the prompt is shorter where the file was exported for less.

Input   a .tflite file
Output  JSON as measure_speed.py's
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pockettune.evaluation.metrics import resident_bytes
from pockettune.evaluation.speed import (
    GENERATED_TOKENS,
    PROMPT_TOKENS,
    describe_cost,
    measure_rates,
    run,
)
from pockettune.runtimes.litert import LitertModel


def measure_speed(path: Path, threads: int) -> dict[str, Any]:
    """Return the file's rates in tokens a second, and the memory it takes."""
    before = resident_bytes()
    model = LitertModel(path, threads)
    cache = model.empty

    def read(prompt: Sequence[int]) -> None:
        nonlocal cache
        cache = model.fill(model.empty, 0, prompt)

    def write(token: int, position: int) -> None:
        nonlocal cache
        _, cache = model.step(cache, position, token)

    # Whole pieces, as many as there is room for.
    room = model.capacity - GENERATED_TOKENS
    rates = measure_rates(read, write, min(PROMPT_TOKENS, room - room % model.chunk))
    return describe_cost(rates, before, threads, "ai-edge-litert")


if __name__ == "__main__":
    run(__doc__, ".tflite file", measure_speed)
