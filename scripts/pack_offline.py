"""Pack what a config needs from outside into one file, for a machine without a network.

Input   the model's folder as it was fetched, the dataset's repository, archives of packages; with
        --wheels all, what pip finds for requirements.txt under constraints.txt, and for the lists of other
        formats; with --devices all, what make app and make phone take from npm and pip
Output  a tar, for scripts/unpack_offline.py: manifest.json with each file's SHA-256 and what it was
        made for, then the files by name. The same input makes the same bytes. Not compressed:
        weights and wheels do not get smaller
"""

import argparse
import contextlib
import io
import json
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import fetch_wllama
from build_phone import zig_package
from pockettune.common import disk, program
from pockettune.common.checksums import sha256
from pockettune.common.errors import UserError, list_faults
from pockettune.sources import hub
from pockettune.sources.bundle import FORMAT, MANIFEST, offline_folder
from pockettune.sources.packages import download_npm_package, download_package

# What builds llama-cpp-python, which comes as source and is made for the processor it is built on;
# pip, because `make setup` asks for the newest.
BUILD_REQUIREMENTS = ("scikit-build-core[pyproject]", "cmake", "ninja", "setuptools", "pip")
BUILT_THERE = "llama_cpp_python-"


def pack_offline(
    settings: Mapping[str, Any], model: Path | None, packages: Sequence[str],
    requirements: tuple[Path, Path] | None, downloads: Path, output: Path, devices: bool = False,
    extras: Sequence[Path] = (),
) -> None:  # fmt: skip
    """Gather the files, write down their checksums, and pack them.

    Without `requirements` (requirements.txt and constraints.txt) no wheels are packed, without
    `devices` nothing for the app and the programs of a phone; `extras` are the formats' own lists, each
    complete by itself.
    """
    with contextlib.ExitStack() as stack:
        packages = [*packages, *(download_for_devices(downloads) if devices else [])]
        files = dict(package_files(packages, downloads))
        holds: dict[str, Any] = {"packages": sorted(packages), "model": None, "dataset": None}
        if model is not None:
            files |= model_files(settings["model"], model)
            holds["model"] = "{name}@{revision}".format(**settings["model"])
        if not settings["dataset"]["files"]:
            name, revision = settings["dataset"]["name"], settings["dataset"]["revision"]
            folder = stack.enter_context(
                hub.repository("dataset", name, revision, downloads, keep=True)
            )
            files |= files_below(folder, f"hub/{hub.folder_name('dataset', name, revision)}")
            holds["dataset"] = f"{name}@{revision}"
        holds["wheels"] = None
        if requirements:
            output.parent.mkdir(parents=True, exist_ok=True)
            wheels = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=output.parent)))
            with disk.tell_full_disk(output, wheels):
                gather_wheels(*requirements, wheels)
                for extra in extras:
                    run_pip("download", "--no-deps", "--dest", wheels, "--requirement", extra)
            files |= files_below(wheels, "wheels")
            holds["wheels"] = describe_python()
        write_bundle(files, holds, output)
    size = output.stat().st_size / 1e6
    program.logger.info("%s: %d files, %.1f MB. On the other machine, in a checkout of the same"
                        " version: python3 scripts/unpack_offline.py %s", output, len(files), size,
                        output.name)  # fmt: skip


def model_files(model: Mapping[str, Any], folder: Path) -> dict[str, Path]:
    """Return the model's files as fetch_model.py left them, by their names in the bundle."""
    known = program.read_json(folder / "source.json")["sha256"]
    if changed := [name for name, digest in known.items() if sha256(folder / name) != digest]:
        raise UserError(f"model {folder}: {list_faults(changed)} changed since it was fetched;"
                        " remove the folder and run again")  # fmt: skip
    place = f"hub/{hub.folder_name('model', model['name'], model['revision'])}"
    files = files_below(folder, place)
    return {name: path for name, path in files.items() if name != f"{place}/source.json"}


def download_for_devices(downloads: Path) -> list[str]:
    """Have the archives of build_phone.py, for this kind of machine, and of fetch_wllama.py; their names."""
    archives = [
        download_package(zig_package(), downloads),
        download_npm_package(fetch_wllama.PACKAGE, downloads),
    ]
    return [archive.name for archive in archives]


def package_files(packages: Sequence[str], downloads: Path) -> Iterator[tuple[str, Path]]:
    """Yield the archives, which the rules that take something out of them leave in `downloads`."""
    missing = []
    for name in packages:
        places = [downloads / name, offline_folder(downloads) / "packages" / name]
        if found := [path for path in places if path.is_file()]:
            yield f"packages/{name}", found[0]
        else:
            missing.append(name)
    if missing:
        raise UserError(
            f"{list_faults(missing)} is not in {downloads} any more; fetch it again with"
            " snakemake --forcerun and the rule that fetches it (fetch_converter, fetch_demo_base, fetch_demo_data)"
        )


def files_below(folder: Path, place: str) -> dict[str, Path]:
    """Return every file of a folder by its name in the bundle; what begins with a dot is left out."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {
        f"{place}/{path.relative_to(folder).as_posix()}": path
        for path in paths
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }


def gather_wheels(requirements: Path, constraints: Path, folder: Path) -> None:
    """Fill `folder` with all that pip needs to install the requirements without an index."""
    program.logger.info("asking pip for what %s names: gigabytes, where torch is for CUDA", requirements)  # fmt: skip
    run_pip(
        "download", "--dest", folder, "--requirement", requirements, "--constraint", constraints
    )
    run_pip("download", "--dest", folder, "--constraint", constraints, *BUILD_REQUIREMENTS)
    for source in sorted([*folder.glob("*.tar.gz"), *folder.glob("*.zip")]):
        if not source.name.startswith(BUILT_THERE):
            run_pip("wheel", "--no-deps", "--wheel-dir", folder, source)
            source.unlink()


def run_pip(*arguments: str | Path) -> None:
    """Run this Python's pip; its settings, PIP_INDEX_URL for example, apply."""
    command = [sys.executable, "-m", "pip", *map(str, arguments), "--quiet", "--disable-pip-version-check"]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
        reason = " ".join((errors or result.stderr.splitlines()[-1:] or ["pip said nothing"])[-2:])
        raise UserError(f"pip {arguments[0]} failed: {reason}; another index: PIP_INDEX_URL")


def describe_python() -> dict[str, str]:
    """Return what wheels are made for, as unpack_offline.py reads it of its own Python."""
    version = "{}.{}".format(*sys.version_info)
    return {"python": version, "platform": sysconfig.get_platform()}


def write_bundle(files: Mapping[str, Path], holds: Mapping[str, Any], output: Path) -> None:
    """Write manifest and files as a tar without times and owners."""
    entries: dict[str, dict[str, Any]] = {
        name: {"size": files[name].stat().st_size, "sha256": sha256(files[name])}
        for name in sorted(files)
    }
    manifest = {"format": FORMAT, "holds": holds, "files": entries}
    text = json.dumps(manifest, indent=2, sort_keys=True, ensure_ascii=False).encode() + b"\n"
    needed = sum(entry["size"] + 1024 for entry in entries.values()) + len(text) + 20_480
    with program.staged(output, needed) as partial, tarfile.open(partial, "w") as tar:
        tar.addfile(member(MANIFEST, len(text)), io.BytesIO(text))
        for name, entry in entries.items():
            with files[name].open("rb") as file:
                tar.addfile(member(name, entry["size"]), file)


def member(name: str, size: int) -> tarfile.TarInfo:
    """Return the head of a file in the tar, the same whoever packs and when."""
    info = tarfile.TarInfo(name)
    info.size = size
    return info


def main() -> None:
    parser = program.argument_parser(__doc__)
    parser.add_argument(
        "--settings", type=json.loads, required=True, help="sections model, dataset"
    )
    parser.add_argument("--model", type=Path, nargs="*", default=[], help="folder, if of a hub")
    parser.add_argument("--packages", nargs="*", default=[], help="names of archives")
    parser.add_argument("--downloads", type=Path, required=True, help="folder of what was fetched")
    parser.add_argument("--wheels", choices=["none", "all"], required=True)
    parser.add_argument("--devices", choices=["none", "all"], required=True)
    parser.add_argument("--requirements", type=Path, required=True)
    parser.add_argument("--extras", type=Path, nargs="*", default=[], help="lists of other formats")
    parser.add_argument("--constraints", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True, help="tar to write")

    def work(arguments: argparse.Namespace) -> None:
        lists = (arguments.requirements, arguments.constraints)
        pack_offline(
            arguments.settings,
            next(iter(arguments.model), None),
            arguments.packages,
            lists if arguments.wheels == "all" else None,
            arguments.downloads,
            arguments.output,
            arguments.devices == "all",
            arguments.extras,
        )

    program.run(parser, work)


if __name__ == "__main__":
    main()
