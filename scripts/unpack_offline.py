"""Check an offline bundle and put it into resources/offline, where every fetch looks first.

Input   the tar that scripts/pack_offline.py made elsewhere
Output  resources/offline/, in one step, when every byte of the bundle is right; nothing before

Needs nothing installed: it is the first thing to run on a machine without a network.
"""

from __future__ import annotations  # so that an older Python gets as far as a message

import argparse
import contextlib
import hashlib
import json
import secrets
import shutil
import sys
import sysconfig
import tarfile
from collections.abc import Generator
from pathlib import Path, PureWindowsPath
from typing import IO, Any

FORMAT = 1
MANIFEST = "manifest.json"
LARGEST_MANIFEST = 50_000_000  # bytes
ROOMS = ("hub", "packages", "wheels")  # folders that a file may lie in
CHUNK = 1 << 20  # bytes
CHECKOUT = Path(__file__).resolve().parent.parent


class BundleError(Exception):
    """Why a bundle cannot be used, in one line."""


def unpack_offline(bundle: Path, checkout: Path, wheels: bool = True) -> dict[str, Any]:
    """Check everything, then place it; return what the bundle holds.

    Raises BundleError, tarfile.TarError for a tar that ends early, or OSError, and leaves
    resources/offline as it was.
    """
    manifest = read_manifest(bundle)
    if wheels:
        check_python(bundle, manifest["holds"]["wheels"])
    else:
        files = manifest["files"].items()
        manifest["files"] = {name: e for name, e in files if not name.startswith("wheels/")}
        manifest["holds"]["wheels"] = None
    read_files(bundle, manifest["files"], None)
    resources = checkout / "resources"
    resources.mkdir(exist_ok=True)
    for left in resources.glob(".offline.*"):  # by a killed run
        shutil.rmtree(left)
    needed = sum(entry["size"] for entry in manifest["files"].values())
    if (free := shutil.disk_usage(resources).free) < needed:
        raise BundleError(f"{resources} needs {needed:,} bytes, only {free:,} are free; make room")
    partial = resources / f".offline.{secrets.token_hex(4)}"
    try:
        read_files(bundle, manifest["files"], partial)
        text = json.dumps(manifest, ensure_ascii=False, indent=2)
        (partial / MANIFEST).write_text(text, encoding="utf-8")
        replace_folder(partial, resources / "offline")
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest["holds"]


def members(bundle: Path) -> Generator[tuple[str, IO[bytes]]]:
    """Yield the files of the tar in its order."""
    with tarfile.open(bundle, "r:") as tar:
        for member in tar:
            content = tar.extractfile(member) if member.isreg() else None
            if content is None:
                raise BundleError(f"{bundle} holds {member.name!r}, which is not a file; do not use it")  # fmt: skip
            yield member.name, content


def read_manifest(bundle: Path) -> dict[str, Any]:
    """Return the manifest, which comes first, with names that stay in their folder."""
    files = members(bundle)
    name, content = next(files, ("", None))
    try:
        if content is None or name != MANIFEST:
            raise ValueError(f"its first file is not {MANIFEST}")
        manifest = json.loads(content.read(LARGEST_MANIFEST))
        if manifest["format"] != FORMAT:
            raise ValueError(f"its format is {manifest['format']}, this program reads {FORMAT}")
        entries = {str(name): {"size": int(entry["size"]), "sha256": str(entry["sha256"])}
                 for name, entry in manifest["files"].items()}  # fmt: skip
        files.close()
        holds = {key: manifest["holds"][key] for key in ("model", "dataset", "packages", "wheels")}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BundleError(f"{bundle} is not an offline bundle: {error}") from error
    if unsafe := [name for name in entries if not is_safe(name)]:
        raise BundleError(f"{bundle} names files outside its folder: {unsafe[0]!r}; do not use it")
    return {"format": FORMAT, "holds": holds, "files": entries}


def is_safe(name: str) -> bool:
    """Whether a file's name stays in its folder, also as Windows reads it."""
    path = PureWindowsPath(name)
    return (
        len(path.parts) > 1
        and path.parts[0] in ROOMS
        and not path.anchor
        and ".." not in path.parts
        and path.as_posix() == name
        and name.isprintable()
        and ":" not in name
    )


def check_python(bundle: Path, made_for: dict[str, str] | None) -> None:
    """Raise BundleError where the wheels are for another Python or another kind of machine."""
    here = {"python": "{}.{}".format(*sys.version_info), "platform": sysconfig.get_platform()}
    if made_for not in (None, here):
        theirs, ours = ("Python {python} on {platform}".format(**side) for side in (made_for, here))
        raise BundleError(
            f"the wheels of {bundle} are for {theirs}, this is {ours}; start it with that Python,"
            " make the bundle on such a machine, or leave them out: --without-wheels"
        )


def read_files(bundle: Path, expected: dict[str, dict[str, Any]], target: Path | None) -> None:
    """Read every file, compare its checksum, and write it below `target` if there is one."""
    seen = {MANIFEST}
    for name, content in members(bundle):
        entry = expected.get(name)
        if name.startswith("wheels/") and entry is None:
            continue  # left out
        if name == MANIFEST and len(seen) == 1:
            continue
        if entry is None or name in seen:
            raise BundleError(f"{bundle} holds {name!r}, which its manifest does not name; do not use it")  # fmt: skip
        seen.add(name)
        if copy(content, target / name if target else None) != entry:
            raise BundleError(
                f"{bundle}: {name} is damaged, its checksum is another; copy it again"
            )
    if missing := expected.keys() - seen:
        raise BundleError(f"{bundle} ends before {min(missing)}; copy it again")


def copy(content: IO[bytes], target: Path | None) -> dict[str, Any]:
    """Read a file, write it to `target` if there is one, and return its size and SHA-256."""
    digest, size = hashlib.sha256(), 0
    if target:
        target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("xb") if target else contextlib.nullcontext() as file:
        while chunk := content.read(CHUNK):
            digest.update(chunk)
            size += len(chunk)
            if file:
                file.write(chunk)
    return {"size": size, "sha256": digest.hexdigest()}


def replace_folder(new: Path, target: Path) -> None:
    """Give `new` the name of `target`, whose former content is removed."""
    former = new.with_name(f"{new.name}.former")
    if target.exists():
        target.rename(former)
    new.rename(target)
    shutil.rmtree(former, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path, help="the tar")
    parser.add_argument("--without-wheels", action="store_true", help="leave out what make setup installs")  # fmt: skip
    parser.add_argument("--checkout", type=Path, default=CHECKOUT, help="folder of the Snakefile")
    arguments = parser.parse_args()
    if sys.version_info < (3, 11):  # noqa: UP036  # started before make setup could say so
        sys.exit(fail(f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}"))
    try:
        holds = unpack_offline(arguments.bundle, arguments.checkout, not arguments.without_wheels)
    except BundleError as error:
        sys.exit(fail(str(error)))
    except (tarfile.TarError, EOFError) as error:
        sys.exit(fail(f"{arguments.bundle} is not a whole offline bundle ({error}); copy it again"))
    except OSError as error:
        sys.exit(fail(f"{error.filename or arguments.bundle}: {error.strerror or error}"))
    print(f"resources/offline holds model {holds['model'] or 'none'}, dataset {holds['dataset'] or 'none'},"
          f" packages {', '.join(holds['packages']) or 'none'}")  # fmt: skip
    print("Now: make setup, without a network" if holds["wheels"]
          else "Now: snakemake with the same run file; nothing of it is fetched any more")  # fmt: skip


def fail(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
