"""Measure what a GGUF file costs to run: speed of prompts and of generation, and memory.

In a process of its own, so that memory is the file's and not another's.

Input   a GGUF file
Output  JSON: {"prompt": {"tokens", "mean", "deviation"}, "generation": {…}} in tokens a second,
        "resident_bytes": what loading and running it added, "threads"
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pockettune.common import program
from pockettune.evaluation.metrics import provenance, resident_bytes
from pockettune.evaluation.speed import GENERATED_TOKENS, PROMPT_TOKENS, measure_rates
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
        after = resident_bytes()
    return {
        **rates,
        "resident_bytes": after - before if before and after else None,
        "threads": threads,
        "provenance": provenance("llama-cpp-python"),
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
