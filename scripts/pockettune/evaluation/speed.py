"""What a file costs to run, measured alike in every runtime.

As llama-bench does: a warm-up, then repetitions; a prompt of 512 tokens in one batch, then 32 tokens
one after another.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pockettune.common import program
from pockettune.evaluation.metrics import provenance, resident_bytes

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


def describe_cost(
    rates: Mapping[str, Any], before: int | None, threads: int, package: str
) -> dict[str, Any]:
    """Return the rates with what this process, which held `before` bytes, took more to get them.

    To be called while the model is loaded.
    """
    after = resident_bytes()
    return {
        **rates,
        "resident_bytes": after - before if before and after else None,
        "threads": threads,
        "provenance": provenance(package),
    }


def run(docstring: str | None, model: str, measure: Callable[[Path, int], dict[str, Any]]) -> None:
    """Run a program that measures a `model`, as its help calls it, with a number of threads."""
    parser = program.argument_parser(docstring)
    parser.add_argument("--model", type=Path, required=True, help=model)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True, help="JSON to write")

    def work(a: argparse.Namespace) -> None:
        result = measure(a.model, a.threads)
        program.write_json(a.output, result)
        program.logger.info(
            "%s: %s prompt and %s generated tokens a second",
            a.model, result["prompt"]["mean"], result["generation"]["mean"],
        )  # fmt: skip

    program.run(parser, work)
