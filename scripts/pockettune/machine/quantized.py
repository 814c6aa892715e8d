"""How many bytes a recipe of llama.cpp makes of a model's shape, without the weights.

A short form of llama.cpp at 0c1e570, src/llama-quant.cpp (llama_tensor_get_type_impl,
tensor_type_fallback): one expert, no importance matrix, not Falcon. quantize_model.py itself asks
llama.cpp, which needs the F16 file.
"""

from collections.abc import Mapping
from typing import Any

from pockettune.machine.shape import Shape, Tensor

# The type that a recipe gives a matrix, where that is not the recipe's own name.
BASE = {"Q3_K_S": "Q3_K", "Q3_K_M": "Q3_K", "Q3_K_L": "Q3_K", "Q4_K_S": "Q4_K", "Q4_K_M": "Q4_K",
        "Q5_K_S": "Q5_K", "Q5_K_M": "Q5_K", "IQ3_M": "IQ3_S"}  # fmt: skip

# What takes the place of a type of 256-blocks in rows that are no multiple of 256.
FALLBACK = {"IQ3_S": "IQ4_NL", "IQ4_XS": "IQ4_NL", "Q2_K": "Q4_0", "Q3_K": "Q4_0", "TQ1_0": "Q4_0", "TQ2_0": "Q4_0",
            "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}  # fmt: skip

# Recipe -> matrix -> (a larger type, the layers that get it). "grouped": all, where four or more
# heads share a key; "more": the first and last eighth and a third of the rest; "first": an eighth.
MIX = {
    "Q2_K": {"v_proj": [("Q3_K", "all"), ("Q4_K", "grouped")], "down_proj": [("Q3_K", "all")], "o_proj": [("Q3_K", "all")]},
    "Q3_K_M": {"v_proj": [("Q4_K", "all")], "down_proj": [("Q4_K", "all")], "o_proj": [("Q4_K", "all")]},
    "Q3_K_L": {"v_proj": [("Q5_K", "all")], "down_proj": [("Q5_K", "all")], "o_proj": [("Q5_K", "all")]},
    "Q4_K_S": {"v_proj": [("Q5_K", "first")], "down_proj": [("Q5_K", "first")]},
    "Q4_K_M": {"v_proj": [("Q6_K", "more")], "down_proj": [("Q6_K", "more")]},
    "Q5_K_M": {"v_proj": [("Q6_K", "more")], "down_proj": [("Q6_K", "more")]},
    "IQ3_S": {"v_proj": [("Q4_K", "grouped")]},
    "IQ3_M": {"v_proj": [("Q4_K", "all")], "down_proj": [("Q4_K", "first")], "o_proj": [("Q4_K", "all")]},
    "IQ4_NL": {"v_proj": [("Q5_K", "grouped")], "down_proj": [("Q5_K", "first")]},
    "IQ4_XS": {"v_proj": [("Q5_K", "grouped")], "down_proj": [("Q5_K", "first")]},
}  # fmt: skip


def stored_type(recipe: Mapping[str, Any], tensor: Tensor, shape: Shape) -> str:
    """Return the name of the type that a recipe stores a weight in."""
    if len(tensor.shape) < 2:
        return "F32"
    name = recipe["type"]
    kind = BASE.get(name, name)
    tied = shape.find("lm_head") is None
    if not recipe.get("pure"):
        if tensor.name == "lm_head" or (tied and tensor.name == "embed_tokens"):
            kind = "Q8_0" if kind == "Q8_0" or tensor.shape[-1] % block(kind)[0] else "Q6_K"
        elif tensor.name == "embed_tokens":
            kind = "Q4_K" if name in ("TQ1_0", "TQ2_0") else kind
        for larger, which in MIX.get(name, {}).get(tensor.name, []):
            if is_chosen(which, tensor, shape):
                kind = larger
    if tensor.shape[-1] % block(kind)[0]:
        kind = FALLBACK.get(kind, kind)
    return "F16" if tensor.shape[-1] % block(kind)[0] else kind


def is_chosen(which: str, tensor: Tensor, shape: Shape) -> bool:
    """Whether a tensor's layer is one of those that a mix gives a larger type."""
    eighth, layer = shape.layers // 8, tensor.layer
    if which == "grouped":
        queries = shape.find("q_proj")
        return queries is not None and queries.shape[0] >= 4 * tensor.shape[0]
    if which == "more":
        return layer < eighth or layer >= 7 * shape.layers // 8 or (layer - eighth) % 3 == 2
    return which == "all" or layer < eighth


def block(kind: str) -> tuple[int, int]:
    """Return a type's weights a block and bytes a block."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    weights, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return int(weights), int(size)


def tensor_bytes(shape: Shape, recipe: Mapping[str, Any] | None) -> int:
    """Return the bytes of all tensors in a file of a recipe; None is F16."""
    total = 0
    for tensor in shape.tensors:
        kind = (
            stored_type(recipe, tensor, shape)
            if recipe
            else "F16"
            if len(tensor.shape) > 1
            else "F32"
        )
        weights, size = block(kind)
        total += tensor.elements // weights * size
    return total
