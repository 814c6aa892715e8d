"""Reads GGUF files back: what was really stored.

The format is read here and not by the gguf package's GGUFReader, which takes 7.0 s on a file with
Qwen2's vocabulary (300,000 strings, each made an array) where this takes 0.2 s; converting and
quantizing such a file takes 6 s each. Tests compare the two. Format: version 3 of
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md as in llama.cpp at 0c1e570, ggml/src/gguf.cpp.
"""

import math
import mmap
import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pockettune.common.errors import UserError, list_faults

EMBEDDING = "token_embd.weight"
# Divisors of the rotations (Llama 3's, Phi 3's), which the converter works out of config.json: no weights.
ROPE_FREQUENCIES = "rope_freqs.weight"
ROPE = (ROPE_FREQUENCIES, "rope_factors_long.weight", "rope_factors_short.weight")

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # fmt: skip
STRING, ARRAY = 8, 9

REMEDY = "remove it and run again, so that it is made anew"


@dataclass(frozen=True)
class Tensor:
    """A tensor of a GGUF file."""

    name: str
    shape: tuple[int, ...]  # row length first
    kind: int  # gguf.GGMLQuantizationType
    start: int  # of its data, in bytes from the start of the file

    @property
    def kind_name(self) -> str:
        from gguf import GGMLQuantizationType

        return GGMLQuantizationType(self.kind).name

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Bytes of its data."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(self.kind)]
        return self.elements // block * block_bytes


class _Cursor:
    """Reads little-endian values one after another."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.place = data, 0

    def take(self, layout: str) -> Any:
        values = struct.unpack_from(f"<{layout}", self.data, self.place)
        self.place += struct.calcsize(f"<{layout}")
        return values[0] if len(values) == 1 else values

    def text(self) -> str:
        length = self.take("Q")
        self.place += length
        return self.data[self.place - length : self.place].decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            return self.take(SCALARS[kind])
        inner, count = self.take("IQ")
        if inner in SCALARS and count:
            values = self.take(f"{count}{SCALARS[inner]}")
            return list(values) if count > 1 else [values]
        if inner == STRING:
            return self.texts(count)
        return [self.value(inner) for _ in range(count)]

    def texts(self, count: int) -> list[str]:
        """Read strings in a tight loop: a vocabulary has hundreds of thousands."""
        data, place, read_length = self.data, self.place, struct.Struct("<Q").unpack_from
        texts = []
        for _ in range(count):
            begin = place + 8
            place = begin + read_length(data, place)[0]
            texts.append(data[begin:place].decode("utf-8", "replace"))
        self.place = place
        return texts


def read_gguf(path: Path, remedy: str = REMEDY) -> tuple[dict[str, Any], list[Tensor]]:
    """Return a GGUF file's metadata and its tensors.

    Raises UserError where the file is no GGUF of version 2 or 3, or its end is missing; `remedy` is
    what to do about that. It costs no time; a GGUF file has no checksum, so a changed weight is not
    noticed.
    """
    size = path.stat().st_size
    if size == 0:
        raise UserError(f"{path} is empty; {remedy}")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        cursor = _Cursor(data)
        try:
            magic, version, tensor_count, key_count = cursor.take("4sIQQ")
            if magic != b"GGUF" or version not in (2, 3):
                raise UserError(f"{path} is not a GGUF file of version 2 or 3")
            metadata = {}
            for _ in range(key_count):
                key = cursor.text()
                metadata[key] = cursor.value(cursor.take("I"))
            entries = []
            for _ in range(tensor_count):
                name, axes = cursor.text(), cursor.take("I")
                shape = tuple(cursor.take("Q") for _ in range(axes))
                entries.append((name, shape, *cursor.take("IQ")))
            alignment = metadata.get("general.alignment", 32)
            begin = -(-cursor.place // alignment) * alignment
            tensors = [Tensor(name, shape, kind, begin + offset) for name, shape, kind, offset in entries]  # fmt: skip
            end = max((tensor.start + tensor.size for tensor in tensors), default=0)
        # A byte of the header may have become any type, length or alignment.
        except (struct.error, KeyError, ValueError, TypeError, ArithmeticError) as error:
            raise UserError(
                f"{path} is truncated or damaged: its header cannot be read; {remedy}"
            ) from error
    if size < end:
        raise UserError(f"{path} is truncated: {size:,} of {end:,} bytes; {remedy}")
    return metadata, tensors


def check_tensors(path: Path, names: Iterable[str]) -> None:
    """Raise UserError naming the tensors that a GGUF file has lost of a model's, or invented."""
    if faults := tensor_faults(path, names):
        raise UserError(f"{path.name}: {list_faults(faults)}; see the conversion's log")


def tensor_faults(path: Path, names: Iterable[str]) -> list[str]:
    """Compare a GGUF file's tensors with a model folder's, by the names the converter gives them.

    Names that only an architecture's own converter knows are counted: as many on either side.
    """
    metadata, _ = read_gguf(path)
    stored, known = set(list_tensors(path)), _name_map(metadata)
    mapped = {name: known.get_name(name, (".weight", ".bias")) for name in names}
    lost = [name for name, new in mapped.items() if new and new not in stored]
    unmapped = [name for name, new in mapped.items() if not new]
    invented = sorted(stored - set(mapped.values()))
    faults = [f"the model's {list_faults(lost, 3)} is not in the file"] if lost else []
    if "output.weight" in invented:
        faults.append("the file has an output.weight of its own: the embedding is untied")
    elif len(invented) > len(unmapped):
        faults.append(f"the file has {list_faults(invented, 3)}, the model has not")
    elif len(invented) < len(unmapped):
        faults.append(f"the file has nothing for some of the model's {list_faults(unmapped, 3)}")
    return faults


def _name_map(metadata: Mapping[str, Any]) -> Any:
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    architecture = metadata["general.architecture"]
    kind = next(kind for kind, name in MODEL_ARCH_NAMES.items() if name == architecture)
    return get_tensor_name_map(kind, metadata[f"{architecture}.block_count"])


def describe_file(path: Path) -> dict[str, Any]:
    """Return what a GGUF file really stores.

    tensors: count; tensor_types: type -> count of tensors, most first; bits_per_weight: of all
    tensors together; embedding_type; embedding_share: of the tensors' bytes; fallback_share: of the
    weights, those in rows that are no multiple of 256, which the recipe's K- or I-type cannot hold
    (llama.cpp at 0c1e570, src/llama-quant.cpp, tensor_type_fallback); metadata: general.* and the
    task's.
    """
    metadata, tensors = read_gguf(path)
    types = Counter(tensor.kind_name for tensor in tensors)
    weights, size = sum(t.elements for t in tensors), sum(t.size for t in tensors)
    embedding = next((tensor for tensor in tensors if tensor.name == EMBEDDING), None)
    odd = sum(t.elements for t in tensors if len(t.shape) > 1 and t.shape[0] % 256)
    told = {k: v for k, v in metadata.items() if k.startswith(("general.", "pockettune."))}
    return {
        "tensors": len(tensors),
        "tensor_types": dict(types.most_common()),
        "bits_per_weight": round(8 * size / weights, 3),
        "embedding_type": embedding.kind_name if embedding else None,
        "embedding_share": round(embedding.size / size, 4) if embedding else None,
        "fallback_share": round(odd / weights, 4) if needs_blocks_of_256(metadata) else 0.0,
        "metadata": told,
    }


def needs_blocks_of_256(metadata: Mapping[str, Any]) -> bool:
    """Whether the file's recipe is of a type that works in blocks of 256 weights."""
    from gguf import LlamaFileType

    recipe = LlamaFileType(metadata["general.file_type"]).name
    return "_K" in recipe or "_TQ" in recipe or ("_IQ" in recipe and "IQ4_NL" not in recipe)


def list_tensors(path: Path) -> dict[str, tuple[str, int]]:
    """Return type and number of dimensions of each weight of a GGUF file, by its name."""
    return {
        tensor.name: (tensor.kind_name, len(tensor.shape))
        for tensor in read_gguf(path)[1]
        if tensor.name not in ROPE
    }


def read_vectors(path: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Return a GGUF file's vectors (biases, norms) by the names they have in the model folder."""
    from gguf import GGMLQuantizationType

    metadata, tensors = read_gguf(path)
    known = _name_map(metadata)
    stored = {
        t.name: t for t in tensors if t.kind == GGMLQuantizationType.F32 and len(t.shape) == 1
    }
    vectors = {}
    with path.open("rb") as file:
        for name in names:
            if tensor := stored.get(known.get_name(name, (".weight", ".bias")) or ""):
                file.seek(tensor.start)
                vectors[name] = np.fromfile(file, "<f4", tensor.elements)
    return vectors
