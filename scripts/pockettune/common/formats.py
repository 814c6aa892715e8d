"""The formats that files come in, and what stages and files of each are called."""

from collections.abc import Mapping
from typing import Any

GGUF, ONNX, LITERT = "gguf", "onnx", "litert"

# What a file's name ends in; an ONNX one is a folder.
SUFFIX = {GGUF: ".gguf", ONNX: ".onnx", LITERT: ".tflite"}
# Of the second file of a LiteRT variant, the first with what an app needs.
BUNDLE = ".litertlm"
# Bytes of a .tflite file: the offsets in it are of 32 bits. Its float rung is the largest.
LARGEST_TFLITE = 2**31 - 1
# Of a weight, at least, by the recipe's type.
BITS = {"fp32": 32, "int8": 8, "int4": 4, "dynamic_wi8_afp32": 8, "dynamic_wi4b32_afp32": 4}
# Those that another exporter makes of the merged model, and another runtime computes.
FOREIGN = (ONNX, LITERT)


def variants_of(quantize: Mapping[str, Mapping[str, Any]], kind: str) -> list[str]:
    """Return the names of the recipes of a format, sorted."""
    return sorted(name for name, recipe in quantize.items() if recipe.get("format", GGUF) == kind)


def float_rung(kind: str) -> str:
    """Return the stage of a format's unquantized export, which tells its error from quantization's."""
    return f"{kind}_float"


def file_name(stage: str, kind: str) -> str:
    """Return the name of a stage's file or folder."""
    return stage + SUFFIX[kind]
