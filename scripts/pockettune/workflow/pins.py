"""A model's folder, revision and checksums: whose they are, and whether what was fetched has them."""

import hashlib
import json
from pathlib import Path
from typing import Any

from pockettune.common.errors import UserError, list_faults

Config = dict[str, Any]


def unpin_others(config: Config, own: Config, given: Config) -> str | None:
    """Let the pins of config.yaml, `own`, count for its own model and dataset alone.

    Another name takes revision main and no checksum, unless `given`, what is laid over config.yaml,
    has them. Returns a warning that names what is not pinned. Leaves a malformed section as it is.
    """
    missing, moving = [], []
    for section, local, pins in (
        ("model", "path", {"revision": "main", "sha256": None}),
        ("dataset", "files", {"revision": "main"}),
    ):
        chosen, over = config.get(section), given.get(section)
        if not isinstance(chosen, dict) or not isinstance(over, dict):
            continue
        if chosen.get(local) or chosen.get("name") == own[section]["name"]:
            continue
        if loose := {key: value for key, value in pins.items() if key not in over}:
            chosen.update(loose)
            missing += [f"{section}.{key}" for key in loose]
            moving.append(f"{chosen['revision']} of {chosen['name']}")
    if not missing:
        return None
    return (
        f"not pinned: {', '.join(missing)}; the run takes what {', '.join(moving)} is on the day,"
        " set them to keep it"
    )


def model_folder(model: Config) -> str:
    """Return the folder of the base model, by its revision or a digest of its path.

    A hub's lies in a folder of its owner: others publish models of the same name.
    """
    path, template = model["path"], model["chat_template"]
    named = Path(path or model["name"])
    if path:
        version = hashlib.sha256(f"{path}{template or ''}".encode()).hexdigest()
        label = named.stem if named.suffix.lower() == ".gguf" else named.name
        owner = ""
    else:
        version, label, owner = model["revision"], named.name, named.parent.name
    return str(Path("resources/models", owner, f"{label}@{version[:12]}"))


def pinned_files(checksums: str | dict[str, str] | None) -> dict[str, str]:
    """Return the SHA-256 that each weights file must have, of model.sha256; none where nothing is pinned."""
    if isinstance(checksums, str):
        return {"model.safetensors": checksums}
    return dict(checksums or {})


def check_fetched(folder: Path, pins: dict[str, str]) -> None:
    """Raise UserError where a fetched model has other weights than the pinned.

    Looked up in its source.json, so that a checksum which is pinned afterwards fetches nothing anew.
    """
    source = folder / "source.json"
    if not pins or not source.is_file():
        return
    fetched = json.loads(source.read_text(encoding="utf-8"))["sha256"]
    faults = [
        f"{name} has {fetched.get(name, 'no such file')}, pinned is {pins.get(name, 'none')}"
        for name in sorted({*fetched, *pins})
        if fetched.get(name) != pins.get(name)
    ]
    if faults:
        raise UserError(
            f"config: model.sha256 does not fit {folder}: {list_faults(faults)}; correct it, or remove"
            " the folder to fetch the model anew"
        )
