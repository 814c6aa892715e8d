"""Quantize a GGUF file with llama.cpp's library call.

Input   f16.gguf; importance.gguf, where the recipe asks for it
Output  <variant>.gguf

A type is a recipe over tensors, not the type of each: rows whose length is no multiple of 256 fall
back to a larger type (llama.cpp commit 0c1e570, src/llama-quant.cpp, tensor_type_fallback). What
is stored is read back and logged.
"""

import argparse
import ctypes
import json
import logging
import logging.handlers
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from gguf import GGMLQuantizationType
from tqdm import tqdm

from pockettune.common import program
from pockettune.common.errors import UserError, list_faults
from pockettune.gguf.files import Tensor, describe_file, read_gguf
from pockettune.gguf.importance import check_importance, read_importance
from pockettune.gguf.recipes import type_by_pattern
from pockettune.runtimes.llama import start_backend

# Types that store next to nothing without an importance matrix, or end the process
# (tensor_requires_imatrix in src/llama-quant.cpp, which looks at neither embedding nor head).
NEED_IMPORTANCE = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS")
REMEDY = "take one of blocks of 32 (Q4_0, IQ4_NL, Q4_1, Q5_0, Q5_1, Q8_0), or leave the choice to the recipe"

# What llama.cpp says of a tensor in a dry run; a tensor that stays as it is has no arrow.
PLANNED = re.compile(r"^\[ *\d+/ *\d+\] +(\S+) .*\nsize = .* -> .*\((\w+)\)$", re.MULTILINE)
FELL_BACK = re.compile(r"^warning: (\S+) +- ncols +(\d+) not divisible by +(\d+) \(required for type +(\w+)\)", re.MULTILINE)  # fmt: skip


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


def choose_types(patterns: Mapping[str, str], tensors: Sequence[Tensor]) -> dict[str, str]:
    """Return the type of each matrix whose name holds one of the patterns, by its name.

    Raises UserError naming the patterns that no matrix's name holds.
    """
    matrices = [tensor.name for tensor in tensors if len(tensor.shape) > 1]
    chosen = {name: type_by_pattern(patterns, name) for name in matrices}
    if idle := [p for p in patterns if not any(re.search(p, name) for name in matrices)]:
        known = sorted({re.sub(r"blk\.\d+\.", "", name) for name in matrices})
        raise UserError(
            f"quantize: tensors: no matrix's name holds {list_faults(idle)}; names are"
            f" {', '.join(known)}, with blk.<layer>. before those of a layer"
        )
    return {name: kind for name, kind in chosen.items() if kind}


def make_parameters(
    recipe: Mapping[str, Any],
    overrides: Mapping[str, str],
    importance: Mapping[str, np.ndarray],
    threads: int,
) -> Any:
    """Return llama.cpp's parameters; they point into `importance`, which must outlive them."""
    file_type = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{recipe['type']}", None)
    if file_type is None:
        raise UserError(f"quantize: llama.cpp has no type {recipe['type']!r}")
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = file_type, threads
    parameters.pure = recipe.get("pure", False)
    # Patterns to llama.cpp, names to us: what a pattern means is Python's to say.
    chosen = [
        llama_cpp.llama_model_tensor_override(
            f"^{re.escape(name)}$".encode(), GGMLQuantizationType[kind].value
        )
        for name, kind in overrides.items()
    ]
    means = [
        llama_cpp.llama_model_imatrix_data(
            name.encode(), values.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), len(values)
        )
        for name, values in importance.items()
    ]
    # A list that is there, though empty, changes what the mixes do.
    if chosen:
        parameters.tt_overrides = terminated(chosen)
    if means:
        parameters.imatrix = terminated(means)
    return parameters


def terminated(entries: Sequence[Any]) -> Any:
    """Return structures as an array that ends with one without a name."""
    return (type(entries[0]) * (len(entries) + 1))(*entries)


def plan_tensors(
    source: Path,
    parameters: Any,
    recipe: Mapping[str, Any],
    tensors: Sequence[Tensor],
    overrides: Mapping[str, str],
) -> list[Tensor]:
    """Return the tensors with the types that llama.cpp would give them, told by a dry run.

    Raises UserError where one would not get the type that the recipe has it have.
    """
    heard = logging.handlers.BufferingHandler(capacity=sys.maxsize)
    native = logging.getLogger("llama.cpp")
    native.addHandler(heard)
    parameters.dry_run, native.propagate = True, False  # the log need not have its lines twice
    llama_cpp.llama_model_quantize(os.fsencode(source), b"", parameters)
    parameters.dry_run, native.propagate = False, True
    native.removeHandler(heard)
    lines = "\n".join(record.getMessage() for record in heard.buffer)
    forced = [
        fall for fall in FELL_BACK.findall(lines) if recipe.get("pure") or fall[0] in overrides
    ]
    if forced:
        raise UserError(f"quantize: {list_misfits(forced)}; {REMEDY}")
    kinds = {name: GGMLQuantizationType[kind.upper()] for name, kind in PLANNED.findall(lines)}
    return [replace(tensor, kind=kinds.get(tensor.name, tensor.kind)) for tensor in tensors]


def list_misfits(fallen: Sequence[tuple[str, str, str, str]]) -> str:
    """Name the tensors that a type does not fit, of (name, row length, block, type)."""
    by_cause: dict[tuple[str, ...], list[str]] = {}
    for name, *cause in fallen:
        by_cause.setdefault(tuple(cause), []).append(name)
    return list_faults(
        [
            f"{kind.upper()} has blocks of {block}, rows of {columns} are no multiple of it"
            f" ({names[0]}{f' and {len(names) - 1} more' if names[1:] else ''})"
            for (columns, block, kind), names in by_cause.items()
        ]
    )


def refuse_without_importance(
    planned: Sequence[Tensor], importance: Mapping[str, np.ndarray]
) -> None:
    """Raise UserError naming the tensors whose type needs an importance that was not measured."""
    missing = [
        f"{tensor.name} ({tensor.kind_name})"
        for tensor in planned
        if tensor.kind_name in NEED_IMPORTANCE and tensor.name not in importance
    ]
    if missing:
        raise UserError(
            f"quantize: no importance was measured of {list_faults(missing, 3)}, whose type needs it;"
            " set importance: true, or for an embedding that is no head a type of 4 bits in tensors"
        )


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
