"""How many bytes a recipe of llama.cpp makes of a model's shape, without the weights.

A short form of llama.cpp at 0c1e570, src/llama-quant.cpp (llama_tensor_get_type,
llama_tensor_get_type_impl, tensor_type_fallback): one expert, separate projections, not Falcon. A test
holds it to llama.cpp's own dry run. quantize_model.py itself asks llama.cpp, which needs the F16 file.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from pockettune.gguf.recipes import type_by_pattern
from pockettune.machine.shape import GGUF_NAMES, Shape, Tensor

# The type that a recipe gives a matrix, where that is not the recipe's own name.
BASE = {"Q2_K_S": "Q2_K", "Q3_K_S": "Q3_K", "Q3_K_M": "Q3_K", "Q3_K_L": "Q3_K", "Q4_K_S": "Q4_K", "Q4_K_M": "Q4_K",
        "Q5_K_S": "Q5_K", "Q5_K_M": "Q5_K", "IQ2_S": "IQ2_XS", "IQ2_M": "IQ2_S", "IQ3_XS": "IQ3_S", "IQ3_M": "IQ3_S"}  # fmt: skip

# What takes the place of a type of 256-blocks in rows that are no multiple of 256.
FALLBACK = {"IQ1_S": "IQ4_NL", "IQ1_M": "IQ4_NL", "IQ2_XXS": "IQ4_NL", "IQ2_XS": "IQ4_NL", "IQ2_S": "IQ4_NL",
            "IQ3_XXS": "IQ4_NL", "IQ3_S": "IQ4_NL", "IQ4_XS": "IQ4_NL", "Q2_K": "Q4_0", "Q3_K": "Q4_0", "TQ1_0": "Q4_0",
            "TQ2_0": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}  # fmt: skip

# The embedding that is no head, where it does not get the recipe's own type.
EMBEDDING = {"IQ1_S": "Q2_K", "IQ1_M": "Q2_K", "IQ2_XXS": "Q2_K", "IQ2_XS": "Q2_K", "IQ2_S": "IQ3_S", "IQ2_M": "IQ3_S",
             "IQ3_XXS": "IQ3_S", "TQ1_0": "Q4_K", "TQ2_0": "Q4_K"}  # fmt: skip

# Recipes whose head is a Q5_K; the others' is a Q6_K.
SMALL_HEAD = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS")

# Recipe -> matrix -> (another type, the layers that get it), of which the last that holds counts; see
# is_chosen. "weighed": with an importance matrix only, "plain": without.
Choices = list[tuple[str, str]]
TO_2_BITS: dict[str, Choices] = {
    "v_proj": [("Q2_K", "all"), ("Q4_K", "grouped")],
    "down_proj": [("Q2_K", "eighth")],
}
TO_1_BIT = TO_2_BITS | {"o_proj": [("IQ2_XXS", "all")]}
ABOVE_2_BITS: dict[str, Choices] = {
    "v_proj": [("IQ3_S", "all"), ("Q4_K", "grouped")],
    "down_proj": [("IQ3_S", "eighth")],
    "o_proj": [("IQ3_S", "all")],
}
OF_IQ4: dict[str, Choices] = {
    "v_proj": [("Q5_K", "grouped")],
    "down_proj": [("Q5_K", "eighth plain")],
}
MIX: dict[str, dict[str, Choices]] = {
    "Q2_K": {"v_proj": [("Q3_K", "all"), ("Q4_K", "grouped")], "down_proj": [("Q3_K", "all")], "o_proj": [("Q3_K", "all")]},
    "Q2_K_S": {"v_proj": [("Q4_K", "grouped")], "down_proj": [("Q4_K", "eighth")]},
    "Q3_K_M": {"v_proj": [("Q4_K", "all"), ("Q5_K", "two")], "down_proj": [("Q4_K", "all"), ("Q5_K", "sixteenth")], "o_proj": [("Q4_K", "all")]},
    "Q3_K_L": {"v_proj": [("Q5_K", "all")], "down_proj": [("Q5_K", "all")], "o_proj": [("Q5_K", "all")]},
    "Q4_0": {"down_proj": [("Q4_1", "eighth weighed")]},
    "Q5_0": {"down_proj": [("Q5_1", "eighth weighed")]},
    "Q4_K_S": {"v_proj": [("Q5_K", "four")], "down_proj": [("Q5_K", "eighth")]},
    "Q4_K_M": {"v_proj": [("Q6_K", "more")], "down_proj": [("Q6_K", "more")]},
    "Q5_K_M": {"v_proj": [("Q6_K", "more")], "down_proj": [("Q6_K", "more")]},
    "IQ1_S": TO_1_BIT,
    "IQ1_M": TO_1_BIT,
    "IQ2_XXS": TO_2_BITS,
    "IQ2_XS": TO_2_BITS,
    "IQ2_S": ABOVE_2_BITS,
    "IQ2_M": ABOVE_2_BITS,
    "IQ3_XXS": {"v_proj": [("Q4_K", "grouped")], "q_proj": [("IQ2_S", "all")], "k_proj": [("IQ2_S", "all")], "o_proj": [("IQ3_S", "all")]},
    "IQ3_XS": {"v_proj": [("Q4_K", "grouped")], "q_proj": [("IQ3_XXS", "all")], "k_proj": [("IQ3_XXS", "all")],
               "gate_proj": [("IQ3_XXS", "middle")], "up_proj": [("IQ3_XXS", "middle")]},
    "IQ3_S": {"v_proj": [("Q4_K", "grouped")]},
    "IQ3_M": {"v_proj": [("Q4_K", "all")], "down_proj": [("Q4_K", "eighth")], "o_proj": [("Q4_K", "all")]},
    "IQ4_NL": OF_IQ4,
    "IQ4_XS": OF_IQ4,
}  # fmt: skip

PLAIN_NAMES = {name: plain for plain, name in GGUF_NAMES.items()}


def tensor_bytes(shape: Shape, recipe: Mapping[str, Any] | None) -> int:
    """Return the bytes of all tensors in a file of a recipe; None is F16."""
    total = 0
    # llama.cpp counts layers as its mix sees them: those that a pattern has typed are not among them.
    mixed: Counter[str] = Counter()
    for tensor in sorted(shape.tensors, key=lambda tensor: tensor.layer):
        if len(tensor.shape) < 2:
            kind = "F32"
        elif not recipe:
            kind = "F16"
        else:
            kind = type_by_pattern(recipe.get("tensors", {}), name_in_file(tensor)) or ""
            if not kind:
                kind = mixed_type(recipe, tensor, shape, mixed[tensor.name])
                mixed[tensor.name] += 1
            kind = fitting_type(kind, tensor.shape[-1])
        weights, size = block(kind)
        total += tensor.elements // weights * size
    return total


def misfits(shape: Shape, recipe: Mapping[str, Any]) -> list[str]:
    """Return the types that a recipe forces on rows that cannot hold them: quantizing refuses it."""
    found = set()
    own = BASE.get(recipe["type"], recipe["type"]) if recipe.get("pure") else None
    for tensor in shape.tensors:
        kind = type_by_pattern(recipe.get("tensors", {}), name_in_file(tensor)) or own
        if len(tensor.shape) > 1 and kind and tensor.shape[-1] % block(kind)[0]:
            found.add(f"{kind} in rows of {tensor.shape[-1]}")
    return sorted(found)


def name_in_file(tensor: Tensor) -> str:
    """Return the name that a matrix has in a GGUF file."""
    plain = PLAIN_NAMES.get(tensor.name, tensor.name)
    whole = tensor.name in ("embed_tokens", "lm_head")
    return f"{plain}.weight" if whole else f"blk.{tensor.layer}.{plain}.weight"


def mixed_type(recipe: Mapping[str, Any], tensor: Tensor, shape: Shape, place: int) -> str:
    """Return the type that a recipe means for the matrix, the place-th of its name; see `fitting_type`."""
    name = recipe["type"]
    kind = BASE.get(name, name)
    if recipe.get("pure"):
        return kind
    tied = shape.find("lm_head") is None
    if tensor.name == "lm_head" or (tied and tensor.name == "embed_tokens"):
        if kind == "Q8_0" or tensor.shape[-1] % block(kind)[0]:
            return "Q8_0"
        return "Q5_K" if name in SMALL_HEAD else "Q6_K"
    if tensor.name == "embed_tokens":
        return EMBEDDING.get(name, kind)
    for other, which in MIX.get(name, {}).get(tensor.name, []):
        layers, _, condition = which.partition(" ")
        if condition and (condition == "weighed") != recipe.get("importance", False):
            continue
        if is_grouped(shape) if layers == "grouped" else is_chosen(layers, place, shape.layers):
            kind = other
    return kind


def is_chosen(which: str, place: int, layers: int) -> bool:
    """Whether a layer is one of those that a mix gives another type."""
    eighth = layers // 8
    if which == "more":
        return place < eighth or place >= 7 * layers // 8 or (place - eighth) % 3 == 2
    if which == "middle":
        return eighth <= place < 7 * layers // 8
    first = {"all": layers, "eighth": eighth, "sixteenth": layers // 16, "four": 4, "two": 2}
    return place < first[which]


def is_grouped(shape: Shape) -> bool:
    """Whether four or more heads share a key."""
    queries, values = shape.find("q_proj"), shape.find("v_proj")
    return bool(queries and values and queries.shape[0] >= 4 * values.shape[0])


def fitting_type(kind: str, columns: int) -> str:
    """Return the type that takes another's place in rows of so many columns."""
    if columns % block(kind)[0]:
        kind = FALLBACK.get(kind, kind)
    return "F16" if columns % block(kind)[0] else kind


def block(kind: str) -> tuple[int, int]:
    """Return a type's weights a block and bytes a block."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    weights, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return int(weights), int(size)
