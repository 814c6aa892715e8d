"""Try the base model's whole way before hours are spent on it.

Packed sequences must give the numbers of each alone in the model's own attention. Then a short model of
the same configuration, with random weights and the base's own tokenizer, goes with a random adapter
through merge, converter and gate: what cannot be converted, and whether llama.cpp reads this
run's prompts as Hugging Face does, shows in seconds.

Input   the base model; the folder tokens/; the folder that fetch_converter.py made
Output  base_check.json: {"packing": {"difference", "spread"}, "layers": of the short model,
        "checks": [{"name", "passed", "detail", its numbers}]}
"""

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from check_parity import run_checks
from convert_model import convert_model
from merge_adapter import merge_adapter
from pockettune.common import program
from pockettune.common.errors import UserError
from pockettune.data.prompts import Example, Examples, take_evenly
from pockettune.models.short import make_short
from pockettune.runtimes.packing_check import check_packing

PROMPTS_A_SPLIT = 2_000  # compared as token ids; all of them where there are no more
PROMPTS_PACKED = 64
SHORT = ".base_check."
# What an adapter from elsewhere may be, and what a file that nobody keeps says of itself.
ANY_ADAPTER = {"variant": "lora", "rank": 8, "alpha": 16, "dropout": 0.0, "target_modules": "all-linear"}  # fmt: skip

LINEAGE = {
    "model": {"name": None, "revision": None, "path": "short"},
    "dataset": {"name": None, "revision": None, "text_column": "text", "label_column": "label"},
    "task": {"type": "classification", "system": "", "prompt": "{text}",
             "labels": {"0": "0", "1": "1"}, "template_options": {}},
    "card": {"license": "other", "languages": ["en"], "template": "base"},
}  # fmt: skip


def check_base(
    settings: Mapping[str, Any],
    base: Path,
    tokens: Path,
    converter: Path,
    threads: int,
    output: Path,
) -> None:
    """Write `output` where all passes; UserError names the model and what it fails at."""
    torch.set_num_threads(threads)
    examples = read_prompts(tokens)
    packed = check_packing(base, [e.prompt_ids for e in take_evenly(examples, PROMPTS_PACKED)])
    program.logger.info(
        "packed sequences: within %(difference).2g of a spread of %(spread).2g", packed
    )
    for left in output.parent.glob(f"{SHORT}*"):  # by a run that was killed
        program.remove(left)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=SHORT) as name:
        folder = Path(name)
        train = settings["train"]
        layers = make_short(base, ANY_ADAPTER if train["adapter"] else train, folder)
        short, adapter, merged, gguf = (
            folder / n for n in ("base", "adapter", "merged", "f16.gguf")
        )
        try:
            merge_adapter(short, adapter, merged)
            convert_model(merged, converter, LINEAGE, gguf)
            checks = run_checks(short, adapter, merged, gguf, examples, tokens, threads)
        except UserError as error:
            told = str(error).replace(f"{folder}/", "")
            raise UserError(
                f"model {base.name} cannot be taken to the end: of a short model of its configuration"
                f" ({layers} layers, random weights), {told}"
            ) from error
    program.write_json(output, {"packing": packed, "layers": layers, "checks": checks})


def read_prompts(tokens: Path) -> list[Example]:
    """Return the examples whose prompts are compared, of every split."""
    splits = (Examples(tokens / f"{name}.arrow") for name in ("test", "validation", "train"))
    return [example for split in splits for example in take_evenly(split, PROMPTS_A_SPLIT)]


def main() -> None:
    parser = program.argument_parser(__doc__)
    parser.add_argument(
        "--settings",
        type=json.loads,
        required=True,
        help="section train: the adapter's shape",
    )
    parser.add_argument("--base", type=Path, required=True, help="base model's folder")
    parser.add_argument("--tokens", type=Path, required=True, help="folder of tokenize_dataset.py")
    parser.add_argument("--converter", type=Path, required=True, help="folder of the converter")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")

    def work(a: argparse.Namespace) -> None:
        check_base(a.settings, a.base, a.tokens, a.converter, a.threads, a.output)

    program.run(parser, work)


if __name__ == "__main__":
    main()
