"""Compares what two runs made: byte for byte, but for what was measured of the run itself."""

import json
from pathlib import Path
from typing import Any

import pandas as pd

MEASURED = {"seconds", "peak_memory_bytes", "resumed"}
# Made of measurements, or showing them.
OF_THE_RUN = {"benchmarks", "logs", "speed", "scratch", "report.html", "best.json"}


def differing_files(first: Path, second: Path) -> list[str]:
    """Return the names of the files that differ, or that only one of two results folders has."""
    names = {name for folder in (first, second) for name in result_files(folder)}
    return sorted(name for name in names if content(first / name) != content(second / name))


def result_files(folder: Path) -> set[str]:
    """Return the files of a results folder that do not hold measurements alone."""
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {
        str(file)
        for file in files
        if file.parts[0] not in OF_THE_RUN
        and file.name != ".snakemake_timestamp"
        and "__pycache__" not in file.parts  # Python's own, where it may write it down
    }


def content(path: Path) -> Any:
    """Return a file's bytes, of a table or JSON what was not measured; None where it is absent."""
    if not path.exists():
        return None
    if path.suffix == ".json":
        return unmeasured(json.loads(path.read_text()))
    if path.suffix == ".sha256":  # of what was measured, too
        return [line for line in path.read_text().splitlines() if not line.endswith(".json")]
    if path.name == "metrics.csv":
        return pd.read_csv(path).drop(columns="seconds").to_csv()
    return path.read_bytes()


def unmeasured(value: Any) -> Any:
    """Return a JSON value without the keys in MEASURED."""
    if isinstance(value, dict):
        return {key: unmeasured(item) for key, item in value.items() if key not in MEASURED}
    return [unmeasured(item) for item in value] if isinstance(value, list) else value
