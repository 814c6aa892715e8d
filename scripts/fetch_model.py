"""Fetch the base model and check that it can be used.

Input   a model on the hub, or a local folder
Output  a folder with config.json, *.safetensors, the tokenizer's files and source.json, which says
        where they came from
"""

import argparse
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pockettune.common import disk, program
from pockettune.common.checksums import sha256
from pockettune.common.errors import UserError, list_faults
from pockettune.models.folder import check_model_folder, weight_files
from pockettune.sources import hub


def fetch_model(model: Mapping[str, Any], downloads: Path, output: Path) -> None:
    """Copy or download the model's safe files to `output` and check them."""
    if model["path"]:
        source = Path(model["path"])
        check_links(source)
        check_model_folder(source)
        needed = sum(map(disk.used_bytes, safe_files(source)))
        place_model(
            source, output, origin=model["path"], name=None, place=shutil.copyfile, needed=needed
        )
        return
    name, revision = model["name"], model["revision"]
    with hub.repository("model", name, revision, downloads, pins=read_pins(), keep=False) as source:
        check_model_folder(source)
        place_model(source, output, origin=f"{name}@{revision}", name=name, place=link_or_copy)


def read_pins() -> dict[str, str]:
    """Return the SHA-256 that each weights file must have; none where nothing is pinned.

    Of the environment, where rules/common.smk puts it: a parameter of the rule would fetch anew.
    """
    return dict(json.loads(os.environ.get("POCKETTUNE_MODEL_SHA256", "{}")))


def place_model(
    source: Path, output: Path, *, origin: str, name: str | None,
    place: Callable[[Path, Path], object], needed: int | None = None,
) -> None:  # fmt: skip
    """Give the model's safe files their place in `output`, with source.json; `name` is the hub's."""
    with program.staged(output, needed) as partial:
        partial.mkdir()
        for path in safe_files(source):
            place(path, partial / path.name)
        checksums = {path.name: sha256(path) for path in weight_files(partial)}
        told = {"origin": origin, "name": name, "sha256": checksums}
        program.write_json(partial / "source.json", told)
    program.logger.info("model of %s in %s", origin, output)


def safe_files(folder: Path) -> list[Path]:
    """Return the files at the top of a model folder that cannot run code."""
    return sorted(path for path in folder.glob("*") if hub.is_safe(path.name) and path.is_file())


def link_or_copy(source: Path, target: Path) -> None:
    """Give a downloaded file a second name; copy it, in as many bytes, where that cannot be."""
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)


def check_links(folder: Path) -> None:
    """Raise UserError where a file that would be copied is a link out of the model's folder.

    A folder from elsewhere could so have the user's own files copied beside the model, to be
    published with it. Links within the folder are followed, and those of a snapshot in Hugging
    Face's cache, whose files are links to ../../blobs. A link that leads nowhere counts as missing.
    """
    home = folder.resolve()
    allowed = [home, *([home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [])]
    faults = [
        f"{path.name} leads to {path.resolve()}"
        for path in safe_files(folder)
        if not any(path.resolve().is_relative_to(place) for place in allowed)
    ]
    if faults:
        raise UserError(
            f"model {folder}: links out of the folder are not followed: {list_faults(faults)};"
            " put the files themselves there"
        )


def main() -> None:
    parser = program.argument_parser(__doc__)
    parser.add_argument("--settings", type=json.loads, required=True, help="section model")
    parser.add_argument(
        "--downloads", type=Path, required=True, help="folder for what the hub sends"
    )
    parser.add_argument("--output", type=Path, required=True, help="model folder to make")

    def work(arguments: argparse.Namespace) -> None:
        fetch_model(arguments.settings["model"], arguments.downloads, arguments.output)

    program.run(parser, work)


if __name__ == "__main__":
    main()
