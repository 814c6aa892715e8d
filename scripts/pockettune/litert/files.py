"""Reads a .tflite file: which weights it stores, in which types, for which runtime.

The format is TensorFlow Lite's flatbuffer (schema.fbs, as ai-edge-litert 2.3.0 ships it). Weights are
looked at where they lie in the mapped file, so that a large one takes no memory.
"""

import hashlib
import mmap
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pockettune.common.errors import UserError
from pockettune.common.extras import use_extra

# Bits that a weight of a type takes, beside its scale.
BITS = {"FLOAT32": 32, "FLOAT16": 16, "INT8": 8, "INT4": 4, "INT2": 2}
NAMES = {"FLOAT32": "F32", "FLOAT16": "F16"}
SMALLEST = np.float16(2**-24)  # above 0
# The exporter names a tensor after the modules that made it: …Qwen2DecoderLayer_3/…Linear_q_proj;
LAYER = re.compile(r"DecoderLayer_(\d+)/")


@dataclass(frozen=True)
class Weight:
    """A matrix that a file stores."""

    names: tuple[str, ...]  # in each of the file's signatures
    kind: str  # F32, INT8, INT4
    shape: tuple[int, ...]
    block: int | None  # weights that share a scale; None: a row does, or there is none
    scales: int  # bytes
    data: np.ndarray  # bytes as they are stored
    operators: frozenset[str]  # that read it

    @property
    def elements(self) -> int:
        return int(np.prod(self.shape))

    @property
    def size(self) -> int:
        return len(self.data) + self.scales

    @property
    def layer(self) -> int | None:
        """The layer that its names tell."""
        found = [match for name in self.names if (match := LAYER.search(name))]
        return int(found[0][1]) if found else None


def open_flatbuffer(path: Path, write: bool = False) -> Any:
    """Return the root of a .tflite file; UserError where it is none. To `write` is to change the file."""
    use_extra("litert")
    from ai_edge_litert import schema_py_generated as schema

    with path.open("r+b" if write else "rb") as file:
        try:
            access = mmap.ACCESS_WRITE if write else mmap.ACCESS_READ
            content = mmap.mmap(file.fileno(), 0, access=access)
        except ValueError:  # an empty file cannot be mapped
            content = None
    if content is None or content[4:8] != b"TFL3":
        raise UserError(f"{path} is not a .tflite file; remove it and run again")
    return schema.Model.GetRootAs(content, 0)


def stored_bytes(model: Any, number: int) -> np.ndarray:
    """Return a buffer's bytes, which stand in the flatbuffer or, as quantizing writes them, behind it."""
    buffer = model.Buffers(number)
    if buffer.Offset() > 1:
        return np.frombuffer(model._tab.Bytes, np.uint8, buffer.Size(), buffer.Offset())
    return buffer.DataAsNumpy() if buffer.DataLength() else np.zeros(0, np.uint8)


def read_weights(path: Path) -> list[Weight]:
    """Return the matrices of a .tflite file, each once, in their order in the file."""
    model = open_flatbuffer(path)
    kinds = _names_of("TensorType")
    found: dict[int, dict[str, Any]] = {}
    for graph in (model.Subgraphs(i) for i in range(model.SubgraphsLength())):
        readers = _readers(model, graph)
        for number in range(graph.TensorsLength()):
            tensor = graph.Tensors(number)
            if tensor.ShapeLength() != 2 or number not in readers:
                continue
            if not len(stored_bytes(model, tensor.Buffer())):  # computed
                continue
            entry = found.setdefault(tensor.Buffer(), {"names": [], "operators": set(), "tensor": tensor, "graph": graph})  # fmt: skip
            entry["names"].append(tensor.Name().decode())
            entry["operators"] |= readers[number]
    weights = []
    for number, entry in found.items():
        tensor = entry["tensor"]
        kind = kinds[tensor.Type()]
        if kind not in BITS:  # positions and the like
            continue
        block, scales = _scales(model, entry["graph"], tensor)
        weights.append(
            Weight(tuple(entry["names"]), NAMES.get(kind, kind), tuple(map(int, tensor.ShapeAsNumpy())),
                   block, scales, stored_bytes(model, number), frozenset(entry["operators"]))
        )  # fmt: skip
    return weights


def _readers(model: Any, graph: Any) -> dict[int, set[str]]:
    """Return by each tensor of a graph which operators read it."""
    operators = _names_of("BuiltinOperator")
    readers: dict[int, set[str]] = {}
    for i in range(graph.OperatorsLength()):
        operator = graph.Operators(i)
        code = model.OperatorCodes(operator.OpcodeIndex())
        name = operators[max(code.BuiltinCode(), code.DeprecatedBuiltinCode())]
        for place in range(operator.InputsLength()):
            readers.setdefault(operator.Inputs(place), set()).add(name)
    return readers


def _scales(model: Any, graph: Any, tensor: Any) -> tuple[int | None, int]:
    """Return the block length of a tensor's scales, and the bytes that these take."""
    if found := _block_scales(model, graph, tensor):
        block, buffer = found
        return block, len(stored_bytes(model, buffer))
    told = tensor.Quantization()
    return None, 4 * told.ScaleLength() if told else 0


def _block_scales(model: Any, graph: Any, tensor: Any) -> tuple[int, int] | None:
    """Return block length and the buffer of scales (float16) of a tensor that is quantized in blocks."""
    from ai_edge_litert import schema_py_generated as schema

    told = tensor.Quantization()
    if told is None or told.DetailsType() != schema.QuantizationDetails.BlockwiseQuantization:
        return None
    details = schema.BlockwiseQuantization()
    details.Init(told.Details().Bytes, told.Details().Pos)
    return details.BlockSize(), graph.Tensors(details.Scales()).Buffer()


def lift_zero_scales(path: Path) -> int:
    """Give blocks of nothing but zeros the smallest scale there is, in place; return how many there were.

    A block whose weights are all below 4e-7 gets a scale that is 0 in float16, with which XNNPACK refuses
    the whole file ("unsupported scale value (0.000000)"). Its weights are then at most 4e-7 still.
    """
    lifted = 0
    for scales in block_scales(open_flatbuffer(path, write=True)):
        zero = scales == 0
        lifted += int(zero.sum())
        scales[zero] = SMALLEST
    return lifted


def block_scales(model: Any) -> list[np.ndarray]:
    """Return the scales of every tensor that is quantized in blocks, float16, where they lie in the file."""
    buffers = set()
    for graph in (model.Subgraphs(i) for i in range(model.SubgraphsLength())):
        for number in range(graph.TensorsLength()):
            if found := _block_scales(model, graph, graph.Tensors(number)):
                buffers.add(found[1])
    return [stored_bytes(model, buffer).view(np.float16) for buffer in sorted(buffers)]


def _names_of(enumeration: str) -> dict[int, str]:
    from ai_edge_litert import schema_py_generated as schema

    return {
        value: name
        for name, value in vars(getattr(schema, enumeration)).items()
        if not name.startswith("_")
    }


def describe_file(path: Path) -> dict[str, Any]:
    """Return what a .tflite file really stores, as gguf.files.describe_file does of a GGUF file.

    Counted are the matrices; norms and biases, a thousandth, are not.
    """
    weights = read_weights(path)
    elements, size = sum(w.elements for w in weights), sum(w.size for w in weights)
    tables = [w for w in weights if "EMBEDDING_LOOKUP" in w.operators]
    return {
        "tensors": len(weights),
        "tensor_types": dict(Counter(map(told_kind, weights)).most_common()),
        "bits_per_weight": round(8 * size / elements, 3),
        "embedding_type": told_kind(tables[0]) if tables else None,
        "embedding_share": round(sum(w.size for w in tables) / size, 4) if tables else None,
        "fallback_share": 0.0,
    }


def told_kind(weight: Weight) -> str:
    """Return a weight's type, and the block that shares a scale if there is one."""
    return f"{weight.kind} (blocks of {weight.block})" if weight.block else weight.kind


def digest(data: np.ndarray) -> bytes:
    """Return what tells matrices apart by their bytes."""
    return hashlib.blake2b(np.ascontiguousarray(data).view(np.uint8).data, digest_size=16).digest()
