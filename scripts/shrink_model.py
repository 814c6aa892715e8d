"""Make a base model of some of another's layers, before anything is trained.

The adapter then learns to do without the others. Cutting the last layers is what keeps most (Gromov et
al., arXiv 2403.17887); other choices are a list, or what measure_layers.py chose.

Input   a model folder; layers.json of measure_layers.py where that chooses
Output  a model folder of fewer layers: weights unchanged, source.json with the layers that are kept and,
        where they were chosen, by which measurement
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pockettune.common import program
from pockettune.common.checksums import sha256
from pockettune.models.folder import check_unchanged, copy_tokenizer, weight_files
from pockettune.models.layers import (
    choose_layers,
    cut_layers,
    depth,
    read_configs,
    rename_layer,
)
from pockettune.models.shards import list_stored, write_shards


def shrink_model(
    base: Path, keep: int | Sequence[int], output: Path, choice: Mapping[str, Any] | None = None
) -> None:
    """Write the folder `output`: `keep` layers from the first on, or those of a list.

    `choice` is what layers.json says, where the list comes from there.
    """
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
        facts = {"layers": layers, "kept_layers": kept} | describe_choice(choice)
        write_source(base, facts, partial)
    program.logger.info("%d of %d layers in %s: %s", len(kept), layers, output, kept)


def describe_choice(choice: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the entry of source.json that says how the layers were chosen; none where a user named them."""
    if choice is None:
        return {}
    label_kl = {way: choice[way]["label_kl"] for way in ("tail", "greedy")}
    rows = choice["rows"]["compared_on"]
    return {"layers_choice": {"chosen": choice["chosen"], "rows": rows, "label_kl": label_kl}}


def write_source(base: Path, facts: Mapping[str, Any], output: Path) -> None:
    """Write source.json: the base's, with the new files' checksums and what is told of the layers."""
    source = program.read_json(base / "source.json")
    checksums = {path.name: sha256(path) for path in weight_files(output)}
    program.write_json(output / "source.json", {**source, "sha256": checksums, **facts})


def main() -> None:
    parser = program.argument_parser(__doc__)
    parser.add_argument("--base", type=Path, required=True, help="base model's folder")
    parser.add_argument(
        "--keep",
        type=json.loads,
        required=True,
        help="model.keep_layers: how many, a list, or how to choose",
    )
    # nargs="?": the rule names the option alone where there is no such file.
    parser.add_argument("--layers", type=Path, nargs="?", help="layers.json, where that chooses")
    parser.add_argument("--output", type=Path, required=True, help="model folder to make")

    def work(a: argparse.Namespace) -> None:
        choice = program.read_json(a.layers) if a.layers else None
        keep = choice[choice["chosen"]]["kept"] if choice else a.keep
        shrink_model(a.base, keep, a.output, choice)

    program.run(parser, work)


if __name__ == "__main__":
    main()
