"""Quantize a float .tflite file, and bundle what comes of it for apps.

Input   litert_float.tflite; the model folder it was exported of, and its tokens/
Output  <variant>.tflite; <variant>.litertlm, the same with tokenizer, chat template and stop tokens, as
        LiteRT-LM and the apps built on it take it
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pockettune.common import program
from pockettune.common.formats import BITS
from pockettune.litert.bundles import make_serving, write_bundle
from pockettune.litert.files import describe_file, lift_zero_scales
from pockettune.litert.quantizing import quantize
from pockettune.models.folder import count_parameters


def quantize_litert(
    settings: Mapping[str, Any], source: Path, model: Path, tokens: Path, output: Path, bundle: Path
) -> None:
    """Write `source` quantized by settings["recipe"] to `output`, and with what an app needs to `bundle`."""
    ends = program.read_json(tokens / "answers.json")["ends"]
    # The bundle is a copy of it.
    needed = 2 * count_parameters(model) * BITS[settings["recipe"]["type"]] // 8
    with program.staged(output, needed) as partial:
        quantize(source, settings["recipe"]["type"], partial)
        partial.chmod(0o644)  # the library marks it as a program
        if lifted := lift_zero_scales(partial):
            program.logger.info("%d blocks of zeros got a scale", lifted)
        stored = describe_file(partial)
    write_bundle(output, model / "tokenizer.json", make_serving(settings, model, ends), bundle)
    program.logger.info(
        "%s: %.1f MB, %.2f bits a weight, %s",
        output, output.stat().st_size / 1e6, stored["bits_per_weight"],
        ", ".join(f"{count} {name}" for name, count in stored["tensor_types"].items()),
    )  # fmt: skip


def main() -> None:
    parser = program.argument_parser(__doc__)
    parser.add_argument(
        "--settings", type=json.loads, required=True,
        help="the recipe under recipe; sections task, dataset, tokenize, card",
    )  # fmt: skip
    parser.add_argument("--source", type=Path, required=True, help="float .tflite file")
    parser.add_argument("--model", type=Path, required=True, help="folder it was exported of")
    parser.add_argument("--tokens", type=Path, required=True, help="folder of tokenize_dataset.py")
    parser.add_argument("--bundle", type=Path, required=True, help=".litertlm file to write")
    parser.add_argument("--output", type=Path, required=True, help=".tflite file to write")

    def work(a: argparse.Namespace) -> None:
        quantize_litert(a.settings, a.source, a.model, a.tokens, a.output, a.bundle)

    program.run(parser, work)


if __name__ == "__main__":
    main()
