"""Measure what a .tflite file costs to run: speed of prompts and of generation, and memory.

As measure_speed.py does of a GGUF file; the prompt is shorter where the file was exported for less.

Input   a .tflite file
Output  JSON as measure_speed.py's
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pockettune.common import program
from pockettune.evaluation.metrics import provenance, resident_bytes
from pockettune.evaluation.speed import GENERATED_TOKENS, PROMPT_TOKENS, measure_rates
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
    after = resident_bytes()
    return {
        **rates,
        "resident_bytes": after - before if before and after else None,
        "threads": threads,
        "provenance": provenance("ai-edge-litert"),
    }


def main() -> None:
    parser = program.argument_parser(__doc__)
    parser.add_argument("--model", type=Path, required=True, help=".tflite file")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True, help="JSON to write")

    def work(a: argparse.Namespace) -> None:
        result = measure_speed(a.model, a.threads)
        program.write_json(a.output, result)
        program.logger.info(
            "%s: %s prompt and %s generated tokens a second",
            a.model, result["prompt"]["mean"], result["generation"]["mean"],
        )  # fmt: skip

    program.run(parser, work)


if __name__ == "__main__":
    main()
