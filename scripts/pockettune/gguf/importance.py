"""Importance matrices: how large the inputs of each weight's columns are, in llama.cpp's GGUF format.

A file (imatrix) holds for each weight, by the name that it has in the model's GGUF file:

    <name>.in_sum2   F32 (1, columns)   sum over tokens of the column's input, squared
    <name>.counts    F32 (1, 1)         those tokens

and imatrix.datasets, imatrix.chunk_count, imatrix.chunk_size. Format: llama.cpp at 0c1e570,
tools/imatrix/imatrix.cpp and common/imatrix-loader.cpp.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pockettune.common.errors import UserError, list_faults
from pockettune.gguf.files import EMBEDDING, REMEDY, Tensor, read_gguf

SUMS, COUNTS = ".in_sum2", ".counts"
OUTPUT = "output.weight"


@dataclass(frozen=True)
class Inputs:
    """What a weight's columns were multiplied with: sums of squares (columns,), and of how many tokens."""

    sums: np.ndarray
    count: int


def name_in_file(modules: Iterable[str], model_type: str, tied: bool) -> dict[str, str]:
    """Return the names that the weights of a model's modules have in its GGUF file.

    Without those that gguf knows no name for. A tied head is the file's embedding. An architecture
    that gguf does not know by its `model_type` is named as Llama, as the converter does with most.
    """
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

    plain = {re.sub(r"\W|_", "", name): kind for kind, name in MODEL_ARCH_NAMES.items()}
    kind = plain.get(re.sub(r"\W|_", "", model_type.removesuffix("_text")), MODEL_ARCH.LLAMA)
    modules = list(modules)
    numbers = [int(number) for name in modules for number in re.findall(r"\.(\d+)\.", name)]
    known = get_tensor_name_map(kind, 1 + max(numbers, default=0))
    named = {
        name: found for name in modules if (found := known.get_name(f"{name}.weight", (".weight",)))
    }
    if tied:
        named = {name: EMBEDDING if found == OUTPUT else found for name, found in named.items()}
    return named


def write_importance(path: Path, inputs: Mapping[str, Inputs], prompts: Sequence[Any]) -> None:
    """Write the importance of weights, by their names in the file, that was measured on `prompts`."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "imatrix")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["prompts of train"])
    writer.add_uint32("imatrix.chunk_count", len(prompts))
    writer.add_uint32("imatrix.chunk_size", sum(map(len, prompts)) // len(prompts))
    for name, found in sorted(inputs.items()):
        writer.add_tensor(name + SUMS, found.sums[None].astype(np.float32))
        writer.add_tensor(name + COUNTS, np.array([[found.count]], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_importance(path: Path) -> dict[str, np.ndarray]:
    """Return the mean square of each column's input, (columns,) in float32, by weight."""
    values = {}
    with path.open("rb") as file:
        for tensor in read_gguf(path)[1]:
            file.seek(tensor.start)
            values[tensor.name] = np.fromfile(file, "<f4", tensor.elements)
    return {
        name.removesuffix(SUMS): sums / values[name.removesuffix(SUMS) + COUNTS]
        for name, sums in values.items()
        if name.endswith(SUMS)
    }


def check_importance(importance: Mapping[str, np.ndarray], tensors: Iterable[Tensor]) -> None:
    """Raise UserError where an importance is not of the weights of this file: llama.cpp would pass it over."""
    columns = {tensor.name: tensor.shape[0] for tensor in tensors}
    faults = [
        f"{name} has {len(values)} columns there, {columns.get(name, 'none')} here"
        for name, values in importance.items()
        if columns.get(name) != len(values)
    ]
    if faults:
        raise UserError(
            f"the importance matrix is of another model: {list_faults(faults, 3)}; {REMEDY}"
        )
