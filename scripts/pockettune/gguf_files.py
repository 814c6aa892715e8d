"""Reads GGUF files back: what was really stored, by the gguf package's reader.

gguf is imported where it is used: the converter brings a version of its own, which
convert_model.py must be able to load first.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pockettune.errors import UserError

EMBEDDING = "token_embd.weight"


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


def describe_file(path: Path) -> dict[str, Any]:
    """Return what a GGUF file really stores.

    tensors: count; tensor_types: type -> count of tensors, most first; bits_per_weight: of all
    tensors together; embedding_type; embedding_share: of the tensors' bytes; fallback_share: of the
    weights, those in rows that are no multiple of 256, which the recipe's K- or I-type cannot hold
    (llama.cpp at 0c1e570, src/llama-quant.cpp, tensor_type_fallback); metadata: general.* and the
    task's.
    """
    from gguf import GGUFReader

    reader = GGUFReader(path)
    tensors = reader.tensors
    types = Counter(tensor.tensor_type.name for tensor in tensors)
    weights = sum(int(tensor.n_elements) for tensor in tensors)
    size = sum(int(tensor.n_bytes) for tensor in tensors)
    embedding = next((t for t in tensors if t.name == EMBEDDING), None)
    metadata = {
        name: field.contents()
        for name, field in reader.fields.items()
        if name.startswith(("general.", "pockettune."))
    }
    odd = sum(int(t.n_elements) for t in tensors if len(t.shape) > 1 and t.shape[0] % 256)
    return {
        "tensors": len(tensors),
        "tensor_types": dict(types.most_common()),
        "bits_per_weight": round(8 * size / weights, 3),
        "embedding_type": embedding.tensor_type.name if embedding else None,
        "embedding_share": round(int(embedding.n_bytes) / size, 4) if embedding else None,
        "fallback_share": round(odd / weights, 4) if needs_blocks_of_256(metadata) else 0.0,
        "metadata": metadata,
    }


def needs_blocks_of_256(metadata: Mapping[str, Any]) -> bool:
    """Whether the file's recipe is of a type that works in blocks of 256 weights."""
    from gguf import LlamaFileType

    recipe = LlamaFileType(metadata["general.file_type"]).name
    return "_K" in recipe or "_TQ" in recipe or ("_IQ" in recipe and "IQ4_NL" not in recipe)


def list_tensors(path: Path) -> dict[str, tuple[str, int]]:
    """Return type and number of dimensions of each tensor of a GGUF file, by its name."""
    from gguf import GGUFReader

    return {t.name: (t.tensor_type.name, len(t.shape)) for t in GGUFReader(path).tensors}


def read_vectors(path: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Return a GGUF file's vectors (biases, norms) by the names they have in the model folder."""
    from gguf import MODEL_ARCH_NAMES, GGUFReader, get_tensor_name_map

    reader = GGUFReader(path)
    architecture = reader.fields["general.architecture"].contents()
    blocks = reader.fields[f"{architecture}.block_count"].contents()
    kind = next(kind for kind, name in MODEL_ARCH_NAMES.items() if name == architecture)
    known = get_tensor_name_map(kind, blocks)
    vectors = {t.name: t.data for t in reader.tensors if len(t.shape) == 1}
    pairs = ((name, known.get_name(name, (".weight", ".bias"))) for name in names)
    return {name: np.array(vectors[stored]) for name, stored in pairs if stored in vectors}
