"""Take an adapter that was trained elsewhere, after checking that it fits the base model.

Input   a PEFT folder with a LoRA adapter (as Unsloth, LLaMA-Factory, ms-swift and TRL write it);
        the base model
Output  an adapter folder as train_adapter.py makes it, with training.json
"""

import argparse
import math
import shutil
from pathlib import Path

from pockettune.common import program
from pockettune.models.adapters import WEIGHTS, check_adapter
from pockettune.models.folder import read_header


def import_adapter(adapter: Path, base: Path, output: Path) -> None:
    """Check the adapter and copy what merging needs."""
    config = check_adapter(adapter, base)
    parameters = sum(math.prod(e["shape"]) for e in read_header(adapter / WEIGHTS).values())
    with program.staged(output) as partial:
        partial.mkdir()
        for name in ("adapter_config.json", WEIGHTS):
            shutil.copyfile(adapter / name, partial / name)
        told = config.get("base_model_name_or_path")
        summary = {"imported_from": str(adapter), "base": told, "trainable_parameters": parameters}
        program.write_json(partial / "training.json", summary)
    program.logger.info("adapter of %s parameters from %s", f"{parameters:,}", adapter)


def main() -> None:
    parser = program.argument_parser(__doc__)
    parser.add_argument("--adapter", type=Path, required=True, help="PEFT folder to take")
    parser.add_argument("--base", type=Path, required=True, help="base model's folder")
    parser.add_argument("--output", type=Path, required=True, help="adapter folder to make")

    def work(a: argparse.Namespace) -> None:
        import_adapter(a.adapter, a.base, a.output)

    program.run(parser, work)


if __name__ == "__main__":
    main()
