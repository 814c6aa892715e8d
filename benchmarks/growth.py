"""Show that cost grows with the rows and memory does not: tokenize, and a fixed number of updates.

    python benchmarks/growth.py [--rows 1000 10000 100000]

On the demo's base model (run `make demo` first), generated reviews, 40 updates of 16 rows each.
Writes benchmarks/growth.md.
"""

import argparse
import json
import os
from pathlib import Path

from common import (
    ROOT,
    WORK,
    data_steps,
    default_settings,
    machine,
    make_data,
    measure,
    step,
    write_page,
)

UPDATES, BATCH = 40, 16
BASE = ROOT / "resources/demo/base"


def measure_rows(rows: int) -> str:
    """Return a table's row for a dataset of this many rows."""
    make_data(rows)
    settings = default_settings()
    settings["train"].update(
        batch_size=BATCH, epochs=UPDATES * BATCH / rows, eval_every=None, learning_rate=2e-3
    )
    text = json.dumps(settings, ensure_ascii=False)
    steps = data_steps(BASE, text)
    measure(steps["fetch_dataset"])
    tokenized = measure(steps["tokenize"])
    trained = measure(
        step("train_adapter", "--settings", text, "--base", BASE, "--tokens", WORK / "tokens", "--threads",
             os.cpu_count(), "--scratch", WORK / "scratch", "--output", WORK / "adapter")
    )  # fmt: skip
    size = sum(path.stat().st_size for path in (WORK / "tokens").iterdir())
    return (
        f"| {rows:,} | {tokenized.seconds:.1f} | {tokenized.peak_bytes / 1e6:.0f} | {size / 1e6:.1f}"
        f" | {trained.seconds:.1f} | {trained.peak_bytes / 1e6:.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    arguments = parser.parse_args()
    if not Path(BASE, "model.safetensors").exists():
        raise SystemExit("error: resources/demo/base is not there; run `make demo` first")
    lines = [measure_rows(rows) for rows in arguments.rows]
    write_page("growth", [
        "# Rows, time and memory", "",
        f"Made by `python benchmarks/growth.py` on {machine()}: the demo's base model, generated reviews;"
        f" rows to train on, half as many in test; {UPDATES} updates of {BATCH} rows.", "",
        "| rows | tokenize, s | tokenize, peak MB | tokens/, MB | train, s | train, peak MB |",
        "|---|---|---|---|---|---|", *lines,
    ])  # fmt: skip


if __name__ == "__main__":
    main()
