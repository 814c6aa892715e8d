"""Simulate how often the verdict against F16 is right, for true losses of 0 to 2 points.

    python benchmarks/verdict.py [--samples 20000]

A sample is what n rows show of two stages: rows lost with the chance changes / 2 + loss, gained with
changes / 2. Writes benchmarks/verdict.md.
"""

import argparse
from collections import Counter
from typing import Any

import numpy as np
import yaml

from common import ROOT, write_page
from pockettune.evaluation.intervals import compare_changes
from pockettune.evaluation.verdict import judge

ROWS = (300, 1200, 10_000)
LOSSES = (0.0, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02)  # of accuracy
CHANGES = (0.0, 0.005, 0.02, 0.05)  # share of rows that change either way by chance alike
CLAIMS = ("as good", "undecided", "worse")


def simulate(n: int, loss: float, changes: float, margin: float, samples: int) -> Counter[str]:
    """Return how many samples got which claim."""
    shares = [changes / 2 + loss, changes / 2]
    drawn = np.random.default_rng(0).multinomial(n, [*shares, 1 - sum(shares)], size=samples)
    pairs, counts = np.unique(drawn[:, :2], axis=0, return_counts=True)
    claims: Counter[str] = Counter()
    for (lost, gained), count in zip(pairs.tolist(), counts.tolist(), strict=True):
        claims[judge(compare_changes(lost, gained, n), margin)["claim"]] += count
    return claims


def describe(n: int, margin: float, samples: int) -> tuple[list[str], dict[str, float]]:
    """Return a table's rows of one number of rows, and its largest shares of false claims."""
    lines = []
    false = {"as good": 0.0, "worse": 0.0}
    for loss in LOSSES:
        cells = []
        for changes in CHANGES:
            claims = simulate(n, loss, changes, margin, samples)
            good, undecided, worse = (100 * claims[claim] / samples for claim in CLAIMS)
            cells.append(f"{good:.1f} / {undecided:.1f} / {worse:.1f}")
            if loss >= margin:
                false["as good"] = max(false["as good"], good)
            if loss == 0:
                false["worse"] = max(false["worse"], worse)
        lines.append(f"| {n:,} | {100 * loss:.2f} | {' | '.join(cells)} |")
    return lines, false


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--samples", type=int, default=20_000)
    samples = parser.parse_args().samples
    config: dict[str, Any] = yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))
    margin = config["evaluate"]["margin"]
    told = {n: describe(n, margin, samples) for n in ROWS}
    write_page("verdict", [
        "# What the verdict against F16 says", "",
        f"Made by `python benchmarks/verdict.py`: {samples:,} samples a cell, evaluate.margin {margin}. Each cell:"
        " how many per cent of them are proved as good / not decided / proved worse.", "",
        f"| rows | true loss, points | {' | '.join(f'{100 * c:g} % change by chance' for c in CHANGES)} |",
        "|---|---|" + "---|" * len(CHANGES),
        *[line for lines, _ in told.values() for line in lines], "",
        "False claims, at most, in per cent; each is promised to stay below 5:", "",
        "| rows | as good, at a loss of the margin or more | worse, at no loss |",
        "|---|---|---|",
        *[f"| {n:,} | {false['as good']:.1f} | {false['worse']:.1f} |" for n, (_, false) in told.items()],
    ])  # fmt: skip


if __name__ == "__main__":
    main()
