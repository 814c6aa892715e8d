"""The files of all formats of a run in one table, and the exporters at Qwen2.5-0.5B's true shape.

    python -m snakemake --cores 2 --configfile runs/demo.yaml benchmarks/formats/files.yaml
    python benchmarks/formats.py results/demo                      # more runs: more tables
    python benchmarks/formats.py --shape onnx_float onnx_int4      # each exported once, of random weights

Both need the formats' packages: make onnx, make litert. Prints the tables; `--page` writes them to
benchmarks/formats.md.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from common import (
    ROOT,
    WORK,
    default_settings,
    machine,
    make_model,
    measure,
    program,
    step,
    write_page,
)
from pockettune.common.disk import used_bytes
from pockettune.common.formats import FOREIGN, GGUF, ONNX, file_name, float_rung
from pockettune.evaluation.verdict import say

RECIPES = ROOT / "benchmarks/formats/files.yaml"
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


def recipes() -> dict[str, dict[str, Any]]:
    """Return what one program exports of a model folder: float rungs, and ONNX's recipes."""
    listed: dict[str, dict[str, Any]] = yaml.safe_load(RECIPES.read_text())["quantize"]
    foreign = {name: r for name, r in listed.items() if r.get("format", GGUF) == ONNX}
    return {float_rung(kind): {"format": kind, "type": "fp32"} for kind in FOREIGN} | foreign


def export_shape(names: list[str], threads: int) -> list[str]:
    """Return a table with a row for each export of random weights of Qwen2.5-0.5B's shape."""
    model = WORK / "model"
    make_model(model)
    settings = {key: default_settings()[key] for key in ("task", "dataset", "tokenize", "card")}
    lines = ["| export | time | peak memory | bytes |", "|---|---|---|---|"]
    for name in names:
        recipe = {"block": 32, "accuracy_level": 4, **recipes()[name]}
        told = json.dumps({**settings, "recipe": recipe}, ensure_ascii=False)
        output = WORK / "formats" / file_name(name, recipe["format"])
        result = measure(
            step(f"export_{recipe['format']}", "--settings", told, "--model", model,
                 "--threads", threads, "--output", output)
        )  # fmt: skip
        lines.append(
            f"| {name} | {result.seconds:.0f} s | {result.peak_bytes / 1e9:.2f} GB | {used_bytes(output):,} |"
        )
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("results", type=Path, nargs="*", help="folders of finished runs")
    parser.add_argument("--shape", nargs="+", default=[], choices=list(recipes()))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--page", action="store_true", help="write benchmarks/formats.md")
    arguments = parser.parse_args()
    lines = [
        "# GGUF, ONNX and LiteRT on the same rows",
        "",
        f"Made by `python benchmarks/formats.py` on {machine()}.",
    ]
    for results in arguments.results:
        lines += ["", f"## {results.name}", "", *describe_ladder(results)]
    if arguments.shape:
        lines += [
            "",
            "## Exporting Qwen2.5-0.5B's shape, random weights",
            "",
            *export_shape(arguments.shape, arguments.threads),
        ]
    if arguments.page:
        write_page("formats", lines)
    else:
        print("\n".join(lines))


if __name__ == "__main__":
    main()
