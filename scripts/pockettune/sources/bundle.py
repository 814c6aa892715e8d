"""The folder of an offline bundle, resources/offline, which is looked into before any hub is asked.

    manifest.json   what it was made for, and each file's size and SHA-256
    hub/            repositories, a folder each: models--owner--name@revision, datasets--…
    packages/       archives of Python packages that something is taken out of
    wheels/         what `make setup` installs, where it was asked for

scripts/pack_offline.py makes the bundle, scripts/unpack_offline.py checks and places it.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pockettune.common.checksums import sha256
from pockettune.common.errors import UserError, list_faults
from pockettune.common.program import read_json

MANIFEST = "manifest.json"
FORMAT = 1  # of the manifest; unpack_offline.py knows it too


def offline_folder(downloads: Path) -> Path:
    """Return where the bundle lies for programs that download to `downloads`."""
    return downloads.with_name("offline")


def bundled_repository(downloads: Path, repository: str) -> dict[Path, dict[str, Any]]:
    """Return the files of a repository's folder in the bundle with size and sha256; none without one.

    Raises UserError where a file has changed since it was unpacked.
    """
    offline = offline_folder(downloads)
    found = {
        path: entry for path, entry in _files(offline) if path.parts[:2] == ("hub", repository)
    }
    damaged = [str(path) for path, entry in found.items() if not _is_whole(offline / path, entry)]
    if damaged:
        raise UserError(
            f"{offline}: {list_faults(damaged)} changed since it was unpacked; unpack the bundle again"
        )
    return {path.relative_to("hub", repository): entry for path, entry in found.items()}


def bundled_names(downloads: Path) -> str:
    """Return what the bundle holds of hubs, in words; nothing where there is no bundle."""
    paths = [path for path, _ in _files(offline_folder(downloads))]
    names = sorted({path.parts[1] for path in paths if path.parts[0] == "hub"})
    return ", ".join(names or ["no repository"]) if paths else ""


def _files(offline: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    manifest = offline / MANIFEST
    if manifest.exists():
        for name, entry in read_json(manifest)["files"].items():
            yield Path(name), entry


def _is_whole(path: Path, entry: dict[str, Any]) -> bool:
    return path.is_file() and path.stat().st_size == entry["size"] and sha256(path) == entry["sha256"]  # fmt: skip
