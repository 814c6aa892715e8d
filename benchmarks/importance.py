"""Show what an importance matrix does to recipes: divergence from F16 and answers that change.

    python benchmarks/importance.py runs/demo.yaml [another run file …] [--recipes Q4_0 Q4_K_M]

For each run, which must be finished: its importance is measured, and each recipe is made and scored with it
and without. Writes benchmarks/importance.md.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from common import ROOT, WORK, machine, measure, program, step, write_page
from pockettune.evaluation.statistics import kl_divergence
from pockettune.machine.run import load_config

FOLDER = WORK / "importance"


def measure_run(run_file: Path, recipes: list[str], threads: int) -> list[str]:
    """Return a row for each recipe of a run, without importance and with it."""
    config = load_config(ROOT, [run_file])
    results = ROOT / config["pathvars"]["results"]
    FOLDER.mkdir(parents=True, exist_ok=True)
    importance = FOLDER / "importance.gguf"
    measure(step("measure_importance", "--model", results / "merged", "--tokens", results / "tokens", "--threads", threads, "--output", importance))  # fmt: skip
    reference = pd.read_parquet(results / "predictions/f16.parquet")
    rows = []
    for recipe in recipes:
        cells = []
        for weighed in (False, True):
            file = FOLDER / "file.gguf"
            settings = json.dumps({"type": recipe, "importance": weighed})
            options = ["--importance", importance] if weighed else []
            measure(step("quantize_model", "--settings", settings, "--source", results / "f16.gguf", *options, "--threads", threads, "--output", file))  # fmt: skip
            cells.append(compare(score(config, results, file, threads), reference, file))
        rows.append(f"| {config['report']['title']} | {recipe} | {' | '.join(cells)} |")
        print(rows[-1], flush=True)
    return rows


def score(config: dict[str, Any], results: Path, file: Path, threads: int) -> pd.DataFrame:
    """Return a file's predictions on the run's evaluation rows."""
    keys = ("task", "dataset", "evaluate")
    settings = json.dumps({key: config[key] for key in keys}, ensure_ascii=False)
    predictions = FOLDER / "predictions.parquet"
    measure(step("evaluate_gguf", "--settings", settings, "--model", file, "--tokens", results / "tokens", "--threads", threads, "--metrics", FOLDER / "metrics.json", "--predictions", predictions))  # fmt: skip
    return pd.read_parquet(predictions)


def compare(found: pd.DataFrame, reference: pd.DataFrame, file: Path) -> str:
    """Return a file's cell: mean divergence from F16 over the labels in nats, its standard error,
    answers changed, accuracy, size."""
    assert found["id"].equals(reference["id"])
    labels = [c for c in map(str, reference.columns) if c.startswith("log_probability_")]
    divergence = kl_divergence(reference[labels].to_numpy(), found[labels].to_numpy())
    error = divergence.std(ddof=1) / np.sqrt(len(divergence))
    changed = int((found["prediction"] != reference["prediction"]).sum())
    right = (found["prediction"] == found["reference"]).mean()
    return (
        f"{divergence.mean():.3f} ± {error:.3f}, {changed} of {len(found)}, {100 * right:.1f} %,"
        f" {file.stat().st_size / 1e6:.1f} MB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("runs", type=Path, nargs="+", help="run files of finished runs")
    parser.add_argument("--recipes", nargs="+", default=["Q4_0", "Q4_K_M", "IQ4_NL"])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    rows = [
        row
        for run in arguments.runs
        for row in measure_run(run, arguments.recipes, arguments.threads)
    ]
    write_page("importance", [
        "# What an importance matrix does", "",
        f"Made by `python benchmarks/importance.py` on {machine()}. A cell: mean KL divergence from F16 over the labels in"
        " nats and its standard error, answers changed against F16, accuracy, size.", "",
        "| run | recipe | without | with importance |", "|---|---|---|---|", *rows,
    ])  # fmt: skip
    program.remove(FOLDER)


if __name__ == "__main__":
    main()
