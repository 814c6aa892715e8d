"""Measure what an ONNX folder costs to run: speed of prompts and of generation, and memory.

In a process of its own, so that memory is the file's and not another's.

Input   a folder of export_onnx.py
Output  JSON: {"prompt": {"tokens", "mean", "deviation"}, "generation": {…}} in tokens a second,
        "resident_bytes": what loading and running it added, "threads"
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pockettune.common import program
from pockettune.evaluation.metrics import resident_bytes
from pockettune.evaluation.speed import (
    GENERATED_TOKENS,
    PROMPT_TOKENS,
    describe_cost,
    measure_rates,
    run,
)
from pockettune.runtimes.onnx import OnnxModel


def measure_speed(folder: Path, threads: int) -> dict[str, Any]:
    """Return the folder's rates in tokens a second, and the memory it takes."""
    before = resident_bytes()
    model = OnnxModel(folder, threads)
    past = model.nothing()

    def read(prompt: Sequence[int]) -> None:
        nonlocal past
        past = model.decode(prompt, model.nothing())[1]

    def write(token: int, _: int) -> None:
        nonlocal past
        past = model.decode([token], past)[1]

    # As far as its tables of rotations reach.
    context = program.read_json(folder / "genai_config.json")["model"]["context_length"]
    rates = measure_rates(read, write, min(PROMPT_TOKENS, context - GENERATED_TOKENS))
    return describe_cost(rates, before, threads, "onnxruntime")


if __name__ == "__main__":
    run(__doc__, "folder of export_onnx.py", measure_speed)
