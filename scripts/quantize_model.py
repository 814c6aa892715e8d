"""Quantize a GGUF file with llama.cpp's library call.

Input   f16.gguf; importance.gguf, where the recipe asks for it
Output  <variant>.gguf

A type is a recipe over tensors, not the type of each: rows whose length is no multiple of 256 fall
back to a larger type (llama.cpp commit 0c1e570, src/llama-quant.cpp, tensor_type_fallback). What
is stored is read back and logged.
"""

import argparse
import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import llama_cpp
from tqdm import tqdm

from pockettune.common import program
from pockettune.common.errors import UserError
from pockettune.gguf.files import describe_file, read_gguf
from pockettune.gguf.importance import check_importance, read_importance
from pockettune.gguf.recipes import choose_types
from pockettune.runtimes.llama import start_backend
from pockettune.runtimes.quantizing import (
    make_parameters,
    plan_tensors,
    refuse_without_importance,
)


def quantize_model(
    recipe: Mapping[str, Any],
    source: Path,
    threads: int,
    output: Path,
    importance: Path | None = None,
) -> None:
    """Write `source` quantized by `recipe` to `output`."""
    tensors = read_gguf(source)[1]
    overrides = choose_types(recipe.get("tensors", {}), tensors)
    weights = read_importance(importance) if importance else {}
    check_importance(weights, tensors)
    start_backend()
    parameters = make_parameters(recipe, overrides, weights, threads)
    planned = plan_tensors(source, parameters, recipe, tensors, overrides)
    refuse_without_importance(planned, weights)
    # The metadata are the source's.
    needed = min((t.start for t in tensors), default=0) + sum(t.size for t in planned)
    with program.staged(output, needed) as partial:
        with TensorProgress(recipe["type"]) as bar:
            code = llama_cpp.llama_model_quantize(
                os.fsencode(source), os.fsencode(partial), parameters
            )
        # The library may fail after the file is complete in size but not in content.
        if code != 0:
            raise UserError(
                f"llama.cpp could not quantize {source} to {recipe['type']}: {bar.failure or 'see the log'}"
            ) from OSError(bar.failure)  # a full disk too is only told as a stream's error
        stored = describe_file(partial)
    program.logger.info(
        "%s: %.1f MB, %.2f bits a weight, %s",
        output, output.stat().st_size / 1e6, stored["bits_per_weight"],
        ", ".join(f"{count} {name}" for name, count in stored["tensor_types"].items()),
    )  # fmt: skip


class TensorProgress(logging.Handler):
    """Shows a bar, read off llama.cpp's lines `[  12/ 290] blk.0.…`, while its block runs.

    `failure` is what llama.cpp gave as its reason, if it failed.
    """

    def __init__(self, description: str) -> None:
        super().__init__()
        self.bar: tqdm[Any] = program.progress(
            None, description=description, unit="tensors", total=0
        )
        self.failure = ""

    def emit(self, record: logging.LogRecord) -> None:
        if "failed to quantize: " in record.getMessage():
            self.failure = record.getMessage().split("failed to quantize: ")[1]
        if match := re.match(r"\[\s*(\d+)/\s*(\d+)\]", record.getMessage()):
            self.bar.total = int(match[2])
            self.bar.update(int(match[1]) - self.bar.n)

    def __enter__(self) -> "TensorProgress":
        logging.getLogger("llama.cpp").addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("llama.cpp").removeHandler(self)
        self.bar.close()


def main() -> None:
    parser = program.argument_parser(__doc__)
    parser.add_argument(
        "--settings",
        type=json.loads,
        required=True,
        help='{"type", "pure", "importance", "tensors"}',
    )
    parser.add_argument("--source", type=Path, required=True, help="F16 GGUF file")
    # nargs="?": a rule that has no such file names the option alone.
    parser.add_argument(
        "--importance", type=Path, nargs="?", help="what measure_importance.py wrote"
    )
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True, help="GGUF file to write")

    def work(a: argparse.Namespace) -> None:
        quantize_model(a.settings, a.source, a.threads, a.output, a.importance)

    program.run(parser, work)


if __name__ == "__main__":
    main()
