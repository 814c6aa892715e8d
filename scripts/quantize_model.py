"""Quantize a GGUF file with llama.cpp's library call.

Input   f16.gguf
Output  <variant>.gguf

A type is a recipe over tensors, not the type of each: rows whose length is no multiple of 256 fall
back to a larger type (llama.cpp commit 0c1e570, src/llama-quant.cpp, tensor_type_fallback). What
is stored is read back and logged.
"""

import argparse
import json
import logging
import logging.handlers
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import llama_cpp
from tqdm import tqdm

from pockettune.common import program
from pockettune.common.errors import UserError
from pockettune.gguf.files import describe_file, read_gguf
from pockettune.runtimes.llama import start_backend


def quantize_model(recipe: Mapping[str, Any], source: Path, threads: int, output: Path) -> None:
    """Write `source` quantized by `recipe` to `output`."""
    file_type = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{recipe['type']}", None)
    if file_type is None:
        raise UserError(f"quantize: llama.cpp has no type {recipe['type']!r}")
    tensors_begin = min((tensor.start for tensor in read_gguf(source)[1]), default=0)
    start_backend()
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = file_type
    parameters.nthread = threads
    parameters.pure = recipe.get("pure", False)
    size = tensors_size(source, parameters)
    needed = size and tensors_begin + size  # the metadata are the source's
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


def tensors_size(source: Path, parameters: Any) -> int | None:
    """Return the bytes of the quantized tensors, 10 kB too few at most; None where they cannot be made.

    A dry run tells them: `quant size  =   374.56 MiB`.
    """
    heard = logging.handlers.BufferingHandler(capacity=sys.maxsize)
    native = logging.getLogger("llama.cpp")
    native.addHandler(heard)
    parameters.dry_run, native.propagate = True, False  # the log need not have its lines twice
    llama_cpp.llama_model_quantize(os.fsencode(source), b"", parameters)
    parameters.dry_run, native.propagate = False, True
    native.removeHandler(heard)
    lines = "\n".join(record.getMessage() for record in heard.buffer)
    told = re.search(r"quant size\s*=\s*([\d.]+) MiB", lines)
    return int((float(told[1]) - 0.005) * 2**20) if told else None  # it is rounded


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
    parser.add_argument("--settings", type=json.loads, required=True, help='{"type", "pure"}')
    parser.add_argument("--source", type=Path, required=True, help="F16 GGUF file")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True, help="GGUF file to write")

    def work(a: argparse.Namespace) -> None:
        quantize_model(a.settings, a.source, a.threads, a.output)

    program.run(parser, work)


if __name__ == "__main__":
    main()
