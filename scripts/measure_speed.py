"""Measure what a GGUF file costs to run: speed of prompts and of generation, and memory.

As llama-bench does: a warm-up, then repetitions; a prompt of 512 tokens in one batch, then 32 tokens
one after another. In a process of its own, so that memory is the file's and not another's.

Input   a GGUF file
Output  JSON: {"prompt": {"tokens", "mean", "deviation"}, "generation": {…}} in tokens a second,
        "resident_bytes": what loading and running it added, "threads"
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

from pockettune.common import program
from pockettune.evaluation.metrics import provenance, resident_bytes
from pockettune.runtimes.llama import LlamaModel

PROMPT_TOKENS, GENERATED_TOKENS, REPETITIONS = 512, 32, 3


def measure_speed(gguf: Path, threads: int) -> dict[str, Any]:
    """Return the file's rates in tokens a second, and the memory it takes."""
    before = resident_bytes()
    with LlamaModel(gguf, threads) as model:
        with model.open_context(PROMPT_TOKENS + GENERATED_TOKENS, PROMPT_TOKENS) as context:
            rates = [time_once(context) for _ in range(1 + REPETITIONS)][1:]
        after = resident_bytes()
    prompt, generation = zip(*rates, strict=True)
    return {
        "prompt": describe(PROMPT_TOKENS, prompt),
        "generation": describe(GENERATED_TOKENS, generation),
        "resident_bytes": after - before if before and after else None,
        "threads": threads,
        "provenance": provenance("llama-cpp-python"),
    }


def time_once(context: Any) -> tuple[float, float]:
    """Return the rates of a prompt and of what is generated behind it."""
    context.clear()
    started = time.perf_counter()
    context.decode([(0, 0, [token % 100 for token in range(PROMPT_TOKENS)])])
    middle = time.perf_counter()
    for number in range(GENERATED_TOKENS):
        context.decode([(0, PROMPT_TOKENS + number, [number])])
    end = time.perf_counter()
    return PROMPT_TOKENS / (middle - started), GENERATED_TOKENS / (end - middle)


def describe(tokens: int, rates: tuple[float, ...]) -> dict[str, float]:
    return {
        "tokens": tokens,
        "mean": round(statistics.mean(rates), 1),
        "deviation": round(statistics.stdev(rates), 1),
    }


def main() -> None:
    parser = program.argument_parser(__doc__)
    parser.add_argument("--model", type=Path, required=True, help="GGUF file")
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
