"""Quantizes a float .tflite file by ai-edge-quantizer's recipes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pockettune.common.extras import use_extra
from pockettune.common.native import run_library

# The output of the head in the exporter's decode signature.
HEAD = "logits"


def quantize(source: Path, kind: str, output: Path) -> None:
    """Write `source` quantized by a recipe of `make_recipe`.

    In a process of its own: it writes into a map of the file, where a full disk ends the process (SIGBUS).
    """
    use_extra("litert")
    run_library("ai-edge-quantizer", str(source), output, _quantize, source, kind, output)


def _quantize(source: Path, kind: str, output: Path) -> None:
    use_extra("litert")
    from ai_edge_quantizer.quantizer import Quantizer

    quantizer = Quantizer(str(source))
    quantizer.load_quantization_recipe(make_recipe(kind))
    quantizer.quantize().export_model(str(output), overwrite=True)


def make_recipe(kind: str) -> Sequence[Any]:
    """Return the recipe of a type of the config's.

    dynamic_wi8_afp32: every matrix in int8, a scale for each row.
    dynamic_wi4b32_afp32: the layers in int4, a scale for every 32 weights; the table of tokens and the head,
    often one matrix, in int8 both, so that it is stored once.
    """
    from ai_edge_quantizer import recipe
    from ai_edge_quantizer.qtyping import TFLOperationName as Name

    if kind == "dynamic_wi8_afp32":
        return recipe.dynamic_wi8_afp32()
    return (
        recipe.dynamic_wi4b32_afp32(operation_name=Name.FULLY_CONNECTED)
        + recipe.dynamic_wi8c_afp32(operation_name=Name.EMBEDDING_LOOKUP)
        + recipe.dynamic_wi8c_afp32(operation_name=Name.FULLY_CONNECTED, regex=HEAD)
    )
