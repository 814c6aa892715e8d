"""What llama.cpp is told of a recipe, and what it says that it would make of it."""

import ctypes
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

from pockettune.common.errors import UserError, list_faults
from pockettune.gguf.files import Tensor
from pockettune.gguf.recipes import REMEDY

# Types that store next to nothing without an importance matrix, or end the process
# (tensor_requires_imatrix in src/llama-quant.cpp, which looks at neither embedding nor head).
NEED_IMPORTANCE = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS")

# What llama.cpp says of a tensor in a dry run; a tensor that stays as it is has no arrow.
PLANNED = re.compile(r"^\[ *\d+/ *\d+\] +(\S+) .*\nsize = .* -> .*\((\w+)\)$", re.MULTILINE)
FELL_BACK = re.compile(r"^warning: (\S+) +- ncols +(\d+) not divisible by +(\d+) \(required for type +(\w+)\)", re.MULTILINE)  # fmt: skip


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
    if chosen:
        parameters.tt_overrides = terminated(chosen)
    if means:  # one without entries would change the mixes too
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
    planned = [replace(tensor, kind=kinds.get(tensor.name, tensor.kind)) for tensor in tensors]
    if kept := [t.name for t in planned if overrides.get(t.name, t.kind_name) != t.kind_name]:
        raise UserError(f"quantize: tensors: llama.cpp gives {list_faults(kept)} no other type")
    return planned


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
