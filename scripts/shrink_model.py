"""Make a base model of some of another's layers, before anything is trained.

The adapter then learns to do without the others. Cutting the last layers is what keeps most (Gromov et
al., arXiv 2403.17887); other choices are a list.

Input   a model folder
Output  a model folder of fewer layers: weights unchanged, source.json with the layers that are kept
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pockettune.common import program
from pockettune.common.checksums import sha256
from pockettune.common.errors import UserError
from pockettune.models.folder import check_unchanged, copy_tokenizer, weight_files
from pockettune.models.layers import cut_layers, depth, of_layers, rename_layer
from pockettune.models.shards import list_stored, write_shards


def shrink_model(base: Path, keep: int | Sequence[int], output: Path) -> None:
    """Write the folder `output`: `keep` layers from the first on, or those of a list."""
    check_unchanged(base)
    whole, told = read_configs(base)
    layers = depth(whole)
    kept = choose_layers(keep, layers)
    tensors = {
        name: stored for stored in list_stored(base) if (name := rename_layer(stored.name, kept))
    }
    needed = sum(2 * stored.elements for stored in tensors.values())
    with program.staged(output, needed) as partial:
        write_shards(tensors, lambda _, stored: stored.load(), partial)
        program.write_json(partial / "config.json", cut_layers(told, layers, kept))
        copy_tokenizer(base, partial)
        write_source(base, layers, kept, partial)
    program.logger.info("%d of %d layers in %s: %s", len(kept), layers, output, kept)


def read_configs(base: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the configuration as transformers completes it, and as the base tells it: with an entry
    for each layer also where the base leaves to a rule which layer is of which kind."""
    from transformers import AutoConfig

    whole = AutoConfig.from_pretrained(base, trust_remote_code=False).to_dict()
    return whole, of_layers(whole, depth(whole)) | program.read_json(base / "config.json")


def choose_layers(keep: int | Sequence[int], layers: int) -> list[int]:
    """Return the layers to keep, ascending; UserError where there are no such layers."""
    kept = list(range(keep)) if isinstance(keep, int) else list(keep)
    if not layers:
        raise UserError(
            "model.keep_layers: the model's config.json does not say how many layers it has"
        )
    if kept[-1] >= layers or kept != sorted(set(kept)):
        raise UserError(
            f"model.keep_layers {keep}: the model has {layers} layers; give a number up to {layers}, or a"
            f" list of layers from 0 to {layers - 1}, each once, ascending"
        )
    return kept


def write_source(base: Path, layers: int, kept: Sequence[int], output: Path) -> None:
    """Write source.json: the base's, with the layers that are kept and the new files' checksums."""
    source = program.read_json(base / "source.json")
    checksums = {path.name: sha256(path) for path in weight_files(output)}
    told = {**source, "sha256": checksums, "layers": layers, "kept_layers": list(kept)}
    program.write_json(output / "source.json", told)


def main() -> None:
    parser = program.argument_parser(__doc__)
    parser.add_argument("--base", type=Path, required=True, help="base model's folder")
    parser.add_argument(
        "--keep", type=json.loads, required=True, help="how many layers, or a list of them"
    )
    parser.add_argument("--output", type=Path, required=True, help="model folder to make")

    def work(arguments: argparse.Namespace) -> None:
        shrink_model(arguments.base, arguments.keep, arguments.output)

    program.run(parser, work)


if __name__ == "__main__":
    main()
