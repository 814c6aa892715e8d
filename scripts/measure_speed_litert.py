"""Measure what a .tflite file costs to run: speed of prompts and of generation, and memory.

As measure_speed.py does of a GGUF file: a warm-up, then repetitions; a prompt as long as the file was
exported for, at most 512 tokens, then 32 tokens one after another.

Input   a .tflite file
Output  JSON as measure_speed.py's
"""

import argparse
import time
from pathlib import Path
from typing import Any

from measure_speed import GENERATED_TOKENS, PROMPT_TOKENS, REPETITIONS, describe
from pockettune.common import program
from pockettune.evaluation.metrics import provenance, resident_bytes
from pockettune.runtimes.litert import LitertModel


def measure_speed(path: Path, threads: int) -> dict[str, Any]:
    """Return the file's rates in tokens a second, and the memory it takes."""
    before = resident_bytes()
    model = LitertModel(path, threads)
    room = model.capacity - GENERATED_TOKENS
    tokens = min(PROMPT_TOKENS, room - room % model.chunk)
    rates = [time_once(model, tokens) for _ in range(1 + REPETITIONS)][1:]
    after = resident_bytes()
    prompt, generation = zip(*rates, strict=True)
    return {
        "prompt": describe(tokens, prompt),
        "generation": describe(GENERATED_TOKENS, generation),
        "resident_bytes": after - before if before and after else None,
        "threads": threads,
        "provenance": provenance("ai-edge-litert"),
    }


def time_once(model: LitertModel, tokens: int) -> tuple[float, float]:
    """Return the rates of a prompt and of what is generated behind it."""
    started = time.perf_counter()
    cache = model.fill(model.empty, 0, [token % 100 for token in range(tokens)])
    middle = time.perf_counter()
    for number in range(GENERATED_TOKENS):
        _, cache = model.step(cache, tokens + number, number)
    end = time.perf_counter()
    return tokens / (middle - started), GENERATED_TOKENS / (end - middle)


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
