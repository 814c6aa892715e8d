"""Print a finished run as Markdown tables: what each stage kept, and what each job cost.

python benchmarks/describe_run.py results/demo
"""

import argparse
import os
import sys
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

from pockettune import program  # noqa: E402
from pockettune.metrics import processor_name  # noqa: E402


def describe_run(results: Path) -> str:
    """Return the tables of the run in the folder `results`."""
    stages = program.read_json(results / "metrics.json")["stages"]
    lines = [
        f"On {os.cpu_count()} cores of {processor_name()}.",
        "",
        "| stage | size, MB | accuracy, % | not in train, % | answers changed against F16 |",
        "|---|---|---|---|---|",
    ]
    for name, entry in stages.items():
        flips = entry["against_f16"]["flips"] if "against_f16" in entry else "–"
        size = f"{entry['size_bytes'] / 1e6:.1f}" if entry["size_bytes"] else "–"
        unseen = 100 * entry["unseen"].get("accuracy", float("nan"))
        lines.append(
            f"| {name} | {size} | {100 * entry['accuracy']:.1f} | {unseen:.1f} | {flips} |"
        )
    lines += ["", "| job | time, s | peak memory, MB |", "|---|---|---|"]
    total = 0.0
    for path in sorted((results / "benchmarks").glob("*.tsv")):
        row = pd.read_csv(path, sep="\t", na_values="-").iloc[0]
        total += float(row["s"])
        lines.append(f"| {path.stem} | {row['s']:.1f} | {row['max_rss']:,.0f} |")
    lines.append(f"| all programs | {total:.1f} | |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="folder of a finished run")
    print(describe_run(parser.parse_args().results), end="")


if __name__ == "__main__":
    main()
