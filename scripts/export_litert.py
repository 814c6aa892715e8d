"""Export a model folder to LiteRT (TensorFlow Lite): a float .tflite file, of which the others are made.

litert-torch traces the model twice, for pieces of a prompt and for a token after another, and gives both
the same weights.

Input   a model folder
Output  litert_float.tflite
"""

import argparse
import json
from pathlib import Path

from pockettune.common import program
from pockettune.common.errors import UserError
from pockettune.common.formats import LARGEST_TFLITE
from pockettune.litert.bundles import capacity
from pockettune.litert.exporting import export_float
from pockettune.models.folder import count_parameters


def check_size(model: Path) -> int:
    """Return the bytes of the weights in fp32; UserError where they are more than the format can hold."""
    needed = 4 * count_parameters(model)
    if needed > LARGEST_TFLITE:
        raise UserError(
            f"model {model}: in fp32, which LiteRT's exporter writes first, it takes {needed / 1e9:.2f} GB, and"
            f" a .tflite file holds {LARGEST_TFLITE / 1e9:.2f}; set vocabulary.keep: task or model.keep_layers, or"
            " take the formats gguf and onnx"
        )
    return needed


def main() -> None:
    parser = program.argument_parser(__doc__)
    parser.add_argument("--settings", type=json.loads, required=True, help="section tokenize")
    parser.add_argument("--model", type=Path, required=True, help="model folder")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True, help=".tflite file to write")

    def work(a: argparse.Namespace) -> None:
        needed = check_size(a.model)
        program.logger.info(
            "exporting %s, which takes minutes; what litert-torch says is in the log", a.model
        )
        export_float(a.model, capacity(a.settings), a.threads, needed, a.output)
        program.logger.info("%s: %.1f MB", a.output, a.output.stat().st_size / 1e6)

    program.run(parser, work)


if __name__ == "__main__":
    main()
