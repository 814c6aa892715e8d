"""Python, its packages, the compiler and conda. Needs the standard library alone."""

import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from pockettune.common.extras import install_command, missing_extras, tell_missing
from pockettune.common.formats import FOREIGN, variants_of
from pockettune.machine.findings import Finding, judge
from pockettune.machine.run import Run

OLDEST = (3, 11)
COMPILERS = ("c++", "g++", "clang++", "cl")
# What snakemake itself needs; the rest comes with the rules' environments where conda makes them.
OUTSIDE_CONDA = ("snakemake", "snakemake-executor-plugin-slurm")
OLDEST_CONDA = (24, 7, 1)  # snakemake 9 refuses an older one


class Pin(NamedTuple):
    """A line of requirements.txt."""

    name: str
    version: str
    needed_to_run: bool  # and not only to change the project


def read_pins(requirements: Path) -> Iterator[Pin]:
    """Yield the pins of requirements.txt."""
    needed = True
    for line in requirements.read_text(encoding="utf-8").splitlines():
        if line.startswith("# To change the project"):
            needed = False
        if match := re.match(r"([\w.-]+)(?:\[.*\])?==([\w.+-]+)", line):
            yield Pin(match[1], match[2], needed)


def installed_version(name: str) -> str | None:
    """Return an installed package's version, without what comes behind a + (torch's build)."""
    try:
        return metadata.version(name).partition("+")[0]
    except metadata.PackageNotFoundError:
        return None


def check_python(run: Run) -> list[Finding]:
    """Python's version."""
    fault = None if sys.version_info >= OLDEST else f"{platform.python_version()} is too old"
    return [judge("python", fault, f"{platform.python_version()}, {platform.system()} {platform.machine()}",
                  "install Python 3.11 or newer and run `make PYTHON=python3.12 setup`")]  # fmt: skip


def check_packages(run: Run) -> list[Finding]:
    """Each package against its pin."""
    pins = list(read_pins(run.root / "requirements.txt"))
    found = {pin.name: installed_version(pin.name) for pin in pins}
    needed = [
        p for p in pins if p.needed_to_run and (p.name in OUTSIDE_CONDA or not run.uses_conda)
    ]
    missing = [pin.name for pin in needed if found[pin.name] is None]
    other = [
        f"{p.name} {found[p.name]} (pinned {p.version})"
        for p in needed
        if found[p.name] not in (None, p.version)
    ]
    remedy = '`make setup`, or the commands under "Without make" in README.md'
    findings = []
    if missing:
        findings.append(Finding("packages", "problem", f"missing: {', '.join(missing)}", remedy))
    if other:
        findings.append(
            Finding("packages", "warning", f"not the tested version: {', '.join(other)}", remedy)
        )
    absent = [pin.name for pin in pins if not pin.needed_to_run and found[pin.name] is None]
    told = (
        f"; not here, and needed only to change the project: {', '.join(absent)}" if absent else ""
    )
    whose = "of snakemake's own" if run.uses_conda else "of requirements.txt"
    return findings or [
        Finding("packages", "ok", f"the {len(needed)} {whose} are at their pins{told}")
    ]


def check_extra_packages(run: Run) -> list[Finding]:
    """The packages that other formats of the recipes need."""
    kinds = [kind for kind in FOREIGN if variants_of(run.settings["quantize"], kind)]
    if run.uses_conda or not kinds:
        return [Finding("formats", "ok", "no packages needed beside those")]
    if missing := missing_extras(kinds, run.root):
        return [Finding("formats", "problem", tell_missing(missing), install_command(missing))]
    return [Finding("formats", "ok", f"packages of {', '.join(kinds)} are here")]


def check_compiler(run: Run) -> list[Finding]:
    """A C++ compiler, where llama.cpp is yet to be built."""
    if run.uses_conda:
        return [Finding("compiler", "ok", "not needed: conda brings llama.cpp compiled")]
    if installed_version("llama-cpp-python"):
        return [Finding("compiler", "ok", "not needed: llama-cpp-python is installed")]
    found = [name for name in COMPILERS if shutil.which(name)]
    return [
        judge(
            "compiler",
            None
            if found
            else f"none of {', '.join(COMPILERS)} is on the path, and"
            " llama-cpp-python is built from source",
            f"{', '.join(found)}, to build llama-cpp-python (cmake comes with it)",
            "install one (Debian: g++; macOS: xcode-select --install; Windows: Visual Studio build tools)",
        )
    ]


def check_conda(run: Run) -> list[Finding]:
    """Conda, where the profile has it make the rules' environments."""
    if not run.uses_conda:
        return [Finding("conda", "ok", "not asked for: all rules run in this Python's environment")]
    own = "install conda (Miniforge), or take software-deployment-method out of the profile and share one `make setup`"
    if shutil.which("conda") is None:
        return [
            Finding(
                "conda",
                "problem",
                "the profile says software-deployment-method: conda, but conda is not on the path",
                own,
            )
        ]
    said = _say("conda", "--version")
    version = tuple(map(int, re.findall(r"\d+", said)[:3]))
    if version < OLDEST_CONDA:
        return [
            Finding(
                "conda",
                "problem",
                f"{said or 'conda does not answer'}; snakemake needs {'.'.join(map(str, OLDEST_CONDA))}",
                "update conda",
            )
        ]
    priority = _say("conda", "config", "--show", "channel_priority").rpartition(" ")[2]
    fault = (
        None if priority == "strict" else f"{said}, channel_priority is {priority or 'not told'}"
    )
    return [
        judge(
            "conda",
            fault,
            f"{said}, channel_priority strict",
            "conda config --set channel_priority strict",
            "warning",
        )
    ]


def _say(*command: str) -> str:
    """Return what a command prints; "" where it fails."""
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=8, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return answer.stdout.strip()
