"""Packages that one format alone needs, in a folder of their own: `make onnx`, `make litert`.

The folder holds what requirements.txt does not, and is searched before it. Where conda makes the
rules' environments, the packages are importable as they are.
"""

import importlib.util
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from pockettune.common.errors import UserError

ROOT = Path(__file__).parents[3]
# What tells whether a format's packages are there.
MODULES = {"onnx": "onnxruntime_genai", "litert": "litert_torch"}
INSTALLED = "installed"  # written when all are there


def extra_folder(name: str, root: Path = ROOT) -> Path:
    """Return the folder that `make <name>` fills."""
    return root / ".packages" / name


def use_extra(name: str) -> None:
    """Let this process import a format's packages; UserError where they are nowhere."""
    check_extras([name])
    folder = extra_folder(name)
    if (folder / INSTALLED).exists() and str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
        importlib.invalidate_caches()


def missing_extras(names: Iterable[str], root: Path = ROOT) -> list[str]:
    """Return the formats whose packages are nowhere."""
    return [
        name
        for name in names
        if not (extra_folder(name, root) / INSTALLED).exists()
        and importlib.util.find_spec(MODULES[name]) is None
    ]


def tell_missing(names: Iterable[str]) -> str:
    """Return what is said of formats whose packages are nowhere."""
    return f"format {' and '.join(names)}: the packages that make and run such files are not here"


def install_command(names: Iterable[str]) -> str:
    """Return what installs the packages of formats."""
    return " && ".join(f"make {name}" for name in names)


def check_extras(names: Iterable[str], root: Path = ROOT) -> None:
    """Raise UserError naming the formats whose packages are nowhere, and the commands that install them."""
    if missing := missing_extras(names, root):
        raise UserError(
            f"{tell_missing(missing)}; install them: {install_command(missing)} (docs/formats.md)"
        )


def as_numbers(version: str) -> tuple[int, ...]:
    """Return a version as numbers, which compare as versions do."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])
