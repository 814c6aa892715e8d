"""Put the metrics of all stages side by side.

Input   metrics JSON and predictions parquet of every stage, in the same order
Output  metrics.json: {"stages": {stage: {n, accuracy, macro_f1, unseen, size_bytes, …}}}, with
        flips_against_f16: rows whose prediction is not that of the F16 file
        metrics.csv: a row a stage, the numbers that fit one
"""

import argparse
from pathlib import Path
from typing import Any

import pandas as pd

from pockettune import program

REFERENCE = "f16"


def compare_stages(metrics: list[Path], predictions: list[Path]) -> dict[str, Any]:
    """Return the stages' metrics under their names, with their flips against F16."""
    loaded = [program.read_json(path) for path in metrics]
    answers = {
        entry["stage"]: pd.read_parquet(path).set_index("id")["prediction"]
        for entry, path in zip(loaded, predictions, strict=True)
    }
    stages = {}
    for entry in loaded:
        name = entry.pop("stage")
        flips = int((answers[name] != answers[REFERENCE]).sum()) if REFERENCE in answers else None
        stages[name] = {**entry, "flips_against_f16": flips}
    return {"stages": stages}


def as_table(compared: dict[str, Any]) -> pd.DataFrame:
    """Return the numbers of one stage a row, those of the unseen rows beside those of all."""
    rows = []
    for name, entry in compared["stages"].items():
        plain = {key: value for key, value in entry.items() if isinstance(value, int | float)}
        unseen = {
            f"unseen_{key}": value
            for key, value in entry["unseen"].items()
            if isinstance(value, int | float)
        }
        rows.append({"stage": name, **plain, **unseen})
    return pd.DataFrame(rows)


def main() -> None:
    parser = program.argument_parser(__doc__)
    parser.add_argument("--metrics", type=Path, nargs="+", required=True)
    parser.add_argument("--predictions", type=Path, nargs="+", required=True)
    parser.add_argument("--json", type=Path, required=True, help="metrics.json to write")
    parser.add_argument("--csv", type=Path, required=True, help="metrics.csv to write")

    def work(arguments: argparse.Namespace) -> None:
        compared = compare_stages(arguments.metrics, arguments.predictions)
        with program.staged(arguments.csv) as partial:
            as_table(compared).to_csv(partial, index=False)
        program.write_json(arguments.json, compared)
        program.logger.info("metrics of %d stages in %s", len(compared["stages"]), arguments.json)

    program.run(parser, work)


if __name__ == "__main__":
    main()
