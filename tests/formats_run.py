"""The small run with files of the other formats beside GGUF: of those whose packages are here."""

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import ROOT
from pockettune.common.extras import INSTALLED, MODULES, extra_folder
from pockettune.common.formats import FOREIGN

RECIPES: dict[str, dict[str, Any]] = {
    "onnx": {"small_int4": {"format": "onnx", "type": "int4"}},
    "litert": {
        "small_wi8": {"format": "litert", "type": "dynamic_wi8_afp32"},
        "small_wi4": {"format": "litert", "type": "dynamic_wi4b32_afp32"},
    },
}


def packages_here(kind: str) -> bool:
    """Whether a format's files can be made here: by `make <kind>`, or as conda brings it."""
    installed = (extra_folder(kind, ROOT) / INSTALLED).exists()
    return installed or importlib.util.find_spec(MODULES[kind]) is not None


HERE = [kind for kind in FOREIGN if packages_here(kind)]
NEEDS = {
    kind: pytest.mark.skipif(
        kind not in HERE, reason=f"the packages of format {kind} are not here: make {kind}"
    )
    for kind in FOREIGN
}


def ask_for_formats(folder: Path) -> None:
    """Lead a checkout to this one's packages, and have its small run make files of their formats too."""
    (folder / ".packages").mkdir(exist_ok=True)
    for kind in HERE:
        if (place := extra_folder(kind, ROOT)).exists():
            extra_folder(kind, folder).symlink_to(place)
    path = folder / "runs/small.yaml"
    run = yaml.safe_load(path.read_text())
    # With one of its two GGUF files, to be quick.
    wanted = {name: recipe for kind in HERE for name, recipe in RECIPES[kind].items()}
    run["quantize"] = {"q4_k_m": None, **wanted}
    path.write_text(yaml.safe_dump(run, allow_unicode=True, sort_keys=False))


def copy_run(finished_run: Path, folder: Path) -> Path:
    """Copy the finished run, its formats' files still to be made."""
    shutil.copytree(finished_run, folder, ignore=shutil.ignore_patterns("downloads"))
    ask_for_formats(folder)
    return folder
