"""Measure what a GGUF file costs to run: speed of prompts and of generation, and memory.

In a process of its own, so that memory is the file's and not another's.

Input   a GGUF file
Output  JSON: {"prompt": {"tokens", "mean", "deviation"}, "generation": {…}} in tokens a second,
        "resident_bytes": what loading and running it added, "threads"
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
from pockettune.runtimes.llama import LlamaModel


def measure_speed(gguf: Path, threads: int) -> dict[str, Any]:
    """Return the file's rates in tokens a second, and the memory it takes."""
    before = resident_bytes()
    with LlamaModel(gguf, threads) as model:
        with model.open_context(PROMPT_TOKENS + GENERATED_TOKENS, PROMPT_TOKENS) as context:

            def read(prompt: Sequence[int]) -> None:
                context.clear()
                context.decode([(0, 0, prompt)])

            rates = measure_rates(read, lambda token, place: context.decode([(0, place, [token])]))
        return describe_cost(rates, before, threads, "llama-cpp-python")


if __name__ == "__main__":
    run(__doc__, "GGUF file", measure_speed)
