"""Write a finished run's tables to benchmarks/<name>.md: what each stage kept, what each job cost.

python benchmarks/describe_run.py results/demo
"""

import argparse
from pathlib import Path
from typing import Any

import pandas as pd

from common import machine, write_page
from pockettune.common import program
from pockettune.evaluation.plots import say_metric


def describe_stages(stages: dict[str, dict[str, Any]]) -> list[str]:
    """Return a table with a row a stage."""
    metric = stages["f16"]["metric"]
    lines = [
        f"| stage | size, MB | rows | {say_metric(metric)}, % | 95 % interval | not in train, % | answers changed against F16 |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, entry in stages.items():
        size = f"{entry['size_bytes'] / 1e6:.1f}" if entry["size_bytes"] else "–"
        unseen = 100 * entry["unseen"].get(metric, float("nan"))
        low, high = (100 * bound for bound in entry["interval"])
        flips = count_changed(entry) if "against_f16" in entry else "–"
        lines.append(
            f"| {name} | {size} | {entry['n']:,} | {100 * entry['score']:.1f} | {low:.1f} to {high:.1f} |"
            f" {unseen:.1f} | {flips} |"
        )
    return lines


def count_changed(entry: dict[str, Any]) -> int:
    """Return how many of a stage's answers are not F16's; of text, not to the end."""
    if parting := entry.get("parting"):
        return int(parting["rows"] - parting["equal"])
    return int(entry["against_f16"]["flips"])


def describe_jobs(folder: Path) -> list[str]:
    """Return a table with a row a job, from Snakemake's benchmark files."""
    lines = ["| job | time, s | peak memory, MB |", "|---|---|---|"]
    total = 0.0
    for path in sorted(folder.glob("*.tsv")):
        row = pd.read_csv(path, sep="\t", na_values="-").iloc[0]
        total += float(row["s"])
        # Snakemake looks twice a second: of a shorter job it knows no memory.
        memory = f"{row['max_rss']:,.0f}" if row["s"] > 1 else "–"
        lines.append(f"| {path.stem} | {row['s']:.1f} | {memory} |")
    return [*lines, f"| all programs | {total:.1f} | |"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="folder of a finished run")
    results = parser.parse_args().results
    stages = program.read_json(results / "metrics.json")["stages"]
    write_page(results.name, [
        f"# The run in {results}", "",
        f"Made by `python benchmarks/describe_run.py {results}` on {machine()}.", "",
        *describe_stages(stages), "", *describe_jobs(results / "benchmarks"),
    ])  # fmt: skip


if __name__ == "__main__":
    main()
