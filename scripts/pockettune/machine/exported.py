"""How many bytes an exporter makes of a model's shape, without the weights."""

from collections.abc import Mapping
from typing import Any

from pockettune.common.formats import BITS, GGUF, LITERT, ONNX
from pockettune.machine.quantized import tensor_bytes
from pockettune.machine.shape import Shape

SCALE = 32  # bits, of each block
MORE = (
    "v_proj",
    "k_proj",
    "q_proj",
    "down_proj",
)  # what k_quant_mixed gives 8 bits in half of the layers


def file_bytes(shape: Shape, recipe: Mapping[str, Any]) -> int | None:
    """Return the bytes of a recipe's weights; None where that is not known before it is made."""
    kind = recipe.get("format", GGUF)
    if kind == GGUF:
        return tensor_bytes(shape, recipe)
    if kind == ONNX:
        return onnx_bytes(shape, recipe)
    return litert_bytes(shape, recipe) if kind == LITERT else None


def onnx_bytes(shape: Shape, recipe: Mapping[str, Any]) -> int:
    """Return the bytes of onnxruntime-genai's builder (0.18.0): a table of tokens that is not the head is in fp32."""
    bits = BITS[recipe["type"]] + SCALE / recipe["block"]
    mixed = recipe.get("algorithm") == "k_quant_mixed"
    tied = shape.find("lm_head") is None
    total = 0.0
    for tensor in shape.tensors:
        if len(tensor.shape) < 2 or (tensor.name == "embed_tokens" and not tied):
            total += 32 * tensor.elements
        else:
            more = 4 if mixed and tensor.name in ("lm_head", "embed_tokens") else 0
            more += 2 if mixed and tensor.name in MORE else 0  # 4 in every second layer
            total += (bits + more) * tensor.elements
    return round(total / 8)


def litert_bytes(shape: Shape, recipe: Mapping[str, Any]) -> int:
    """Return the bytes of a .tflite file's weights (ai-edge-quantizer 0.10.0): int8 in rows, int4 in blocks of 32."""
    total = 0.0
    for tensor in shape.tensors:
        if len(tensor.shape) < 2:
            total += 32 * tensor.elements
        elif recipe["type"] == "dynamic_wi4b32_afp32" and tensor.name not in (
            "embed_tokens",
            "lm_head",
        ):
            total += (4 + 16 / 32) * tensor.elements
        else:
            total += 8 * tensor.elements + SCALE * tensor.shape[0]
    return round(total / 8)


def float_bytes(shape: Shape) -> int:
    """Return the bytes of a format's float rung."""
    return 4 * shape.parameters
