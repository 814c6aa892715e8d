"""The files of all formats of a run in one table, and the exporters at Qwen2.5-0.5B's true shape.

    python benchmarks/formats.py runs      # makes the runs below, each with benchmarks/formats/files.yaml
    python benchmarks/formats.py shape     # exports Qwen2.5-0.5B's shape once each, random weights
    python benchmarks/formats.py page      # writes benchmarks/formats.md of what is there

Needs the formats' packages (make onnx, make litert), the demo's files (make demo), and what
benchmarks/tasks.py says of benchmarks/scratch/.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from common import (
    ROOT,
    WORK,
    data_steps,
    default_settings,
    machine,
    make_data,
    make_model,
    measure,
    program,
    step,
    write_page,
)
from pockettune.common.disk import used_bytes
from pockettune.common.formats import FOREIGN, GGUF, LITERT, file_name, float_rung
from pockettune.evaluation.verdict import say

RECIPES = ROOT / "benchmarks/formats/files.yaml"
FILES = WORK / "formats"  # exports of Qwen2.5-0.5B's shape
SHAPE = FILES / "shape.json"
RUNS = {
    "demo": ("SmolLM2 135M, the demo's 500 rows", "runs/demo.yaml"),
    "demo-small": (
        "SmolLM2 135M with 24 of 30 layers and the tokens of its task, the same rows",
        "runs/demo.yaml", "benchmarks/formats/small.yaml",
    ),
    "demo-gemma": ("Gemma 3 270M, 200 of the same rows", "runs/demo.yaml", "benchmarks/formats/gemma.yaml"),
    "chnsenticorp": ("A base of 12.6 M parameters, 1,200 rows of ChnSentiCorp", "benchmarks/chnsenticorp.yaml"),
}  # fmt: skip
FROM = "merged"  # the first stage of a table


def describe_ladder(results: Path) -> list[str]:
    """Return a table with a row a stage from the merged model on, each paired with F16."""
    stages: dict[str, Any] = program.read_json(results / "metrics.json")["stages"]
    lines = [
        "| stage | MB | rows | accuracy | changed against F16 | verdict | KL to F16 | prompt tokens/s | written | memory, MB | made in, peak MB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in list(stages)[list(stages).index(FROM) :]:
        stage = stages[name]
        paired, verdict = stage.get("against_f16"), stage.get("verdict")
        divergence = stage.get("kl_vocabulary")
        cells = [
            f"{stage['size_bytes'] / 1e6:,.1f}", str(stage["n"]), f"{100 * stage['accuracy']:.2f} %",
            str(paired["flips"]) if paired else "–", say(verdict) if verdict else "–",
            f"{divergence['mean']:.2g}" if divergence else "–", *speed_of(results, name), made_in(results, name),
        ]  # fmt: skip
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def speed_of(results: Path, name: str) -> list[str]:
    """Return a file's rates and memory; of a rung they are measured only when asked for."""
    path = results / f"speed/{name}.json"
    if not path.is_file():
        return ["–"] * 3
    told = program.read_json(path)
    memory = told["resident_bytes"]
    return [
        f"{told['prompt']['mean']:,.0f}",
        f"{told['generation']['mean']:,.0f}",
        f"{memory / 1e6:,.0f}" if memory else "–",
    ]


def made_in(results: Path, name: str) -> str:
    """Return the time and the peak memory of the job that made a file."""
    for job in (f"export_{name}", f"quantize_{name}"):
        path = results / f"benchmarks/{job}.tsv"
        if path.is_file():
            row = pd.read_csv(path, sep="\t", na_values="-").iloc[0]
            peak = f"{row['max_rss']:,.0f}" if pd.notna(row["max_rss"]) else "–"
            return f"{row['s']:.0f} s, {peak}"
    return "–"


def run_all() -> None:
    """Make every run, one after another; what is here already is not made again."""
    for name, (_, *files) in RUNS.items():
        command = f"-m snakemake --cores all results/{name}/metrics.json results/{name}/report.html --configfile"
        subprocess.run([sys.executable, *command.split(), *files, RECIPES], cwd=ROOT, check=True)


def export_steps(model: Path) -> dict[str, tuple[list[object], Path]]:
    """Return the command of each file of a model folder, and the file, by its name."""
    settings = {key: default_settings()[key] for key in ("task", "dataset", "tokenize", "card")}
    listed: dict[str, dict[str, Any]] = yaml.safe_load(RECIPES.read_text())["quantize"]
    floats = {float_rung(kind): {"format": kind, "type": "fp32"} for kind in FOREIGN}
    source = FILES / file_name(float_rung(LITERT), LITERT)
    steps = {}
    for name, recipe in (floats | listed).items():
        kind = recipe.get("format", GGUF)
        if kind == GGUF:
            continue
        told = {**settings, "recipe": {"block": 32, "accuracy_level": 4, **recipe}}
        output = FILES / file_name(name, kind)
        given = [
            "--settings",
            json.dumps(told, ensure_ascii=False),
            "--model",
            model,
            "--output",
            output,
        ]
        if kind == LITERT and name in listed:
            bundle = output.with_suffix(".litertlm")
            steps[name] = step("quantize_litert", *given, "--source", source, "--tokens", WORK / "tokens", "--bundle", bundle), output  # fmt: skip
        else:
            steps[name] = step(f"export_{kind}", *given, "--threads", os.cpu_count()), output
    return steps


def export_shape() -> None:
    """Export random weights of Qwen2.5-0.5B's shape once each, and keep what it took."""
    model = WORK / "model"
    make_model(model)
    make_data(16)
    for command in data_steps(model, json.dumps(default_settings(), ensure_ascii=False)).values():
        measure(command)
    FILES.mkdir(parents=True, exist_ok=True)
    measured = program.read_json(SHAPE) if SHAPE.is_file() else {}
    for name, (command, output) in export_steps(model).items():
        if name in measured:
            continue
        took = measure(command)
        measured[name] = took.seconds, took.peak_bytes, used_bytes(output)
        program.write_json(SHAPE, measured)
        print(name, *measured[name], flush=True)


def describe_shape() -> list[str]:
    """Return a table with a row for each export of the shape."""
    lines = ["| export | time | peak memory | bytes |", "|---|---|---|---|"]
    for name, (seconds, peak, size) in program.read_json(SHAPE).items():
        lines.append(f"| {name} | {seconds:.0f} s | {peak / 1e9:.2f} GB | {size:,} |")
    return lines


def write_formats_page() -> None:
    """Write benchmarks/formats.md: what was found, by hand, and the tables that it was found in."""
    lines = [
        "# GGUF, ONNX and LiteRT on the same rows", "",
        f"Made by `python benchmarks/formats.py`, which also makes the runs, on {machine()}.", "",
        (ROOT / "benchmarks/formats/found.md").read_text(encoding="utf-8").rstrip(),
    ]  # fmt: skip
    for name, (title, *_) in RUNS.items():
        if (ROOT / f"results/{name}/metrics.json").is_file():
            lines += ["", f"## {title}", "", *describe_ladder(ROOT / f"results/{name}")]
    if SHAPE.is_file():
        lines += ["", "## Exports of Qwen2.5-0.5B's shape, random weights", "", *describe_shape()]
    write_page("formats", lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("what", choices=["runs", "shape", "page"])
    what = parser.parse_args().what
    {"runs": run_all, "shape": export_shape, "page": write_formats_page}[what]()


if __name__ == "__main__":
    main()
