"""Reads GGUF files back: what was really stored, by the gguf package's reader.

gguf is imported where it is used: the converter brings a version of its own, which
convert_model.py must be able to load first.
"""

from collections import Counter
from pathlib import Path
from typing import Any

from pockettune.errors import UserError


def check_tensors(path: Path, expected: int) -> None:
    """Raise UserError where a GGUF file has not `expected` tensors.

    One more is mostly output.weight: the embedding was untied and is stored twice.
    """
    from gguf import GGUFReader

    found = [tensor.name for tensor in GGUFReader(path).tensors]
    if len(found) != expected:
        untied = " (it has an output.weight of its own)" if "output.weight" in found else ""
        raise UserError(
            f"{path.name} has {len(found)} tensors{untied}, the model has {expected}: the conversion"
            " lost or added some; see the log"
        )


def describe_tensors(path: Path) -> dict[str, Any]:
    """Return what a GGUF file stores.

    tensors: count; tensor_types: type -> count of tensors, most first; bits_per_weight: of all
    tensors together; embedding_type.
    """
    from gguf import GGUFReader

    tensors = GGUFReader(path).tensors
    types = Counter(tensor.tensor_type.name for tensor in tensors)
    weights = sum(int(tensor.n_elements) for tensor in tensors)
    embedding = [t.tensor_type.name for t in tensors if t.name == "token_embd.weight"]
    return {
        "tensors": len(tensors),
        "tensor_types": dict(types.most_common()),
        "bits_per_weight": round(8 * sum(int(t.n_bytes) for t in tensors) / weights, 3),
        "embedding_type": embedding[0] if embedding else None,
    }
