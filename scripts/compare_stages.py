"""Put the metrics of all stages side by side, and pair their answers row by row.

Input   metrics JSON and predictions parquet of every stage, in the order of the DAG; the adapter's
        training.json, for the temperature that was fitted on validation
Output  metrics.json: {"stages": {stage: {n, accuracy, macro_f1, unseen, size_bytes, …}}}, with
        interval: of the accuracy; calibration_error; against_before, against_f16, against_tfidf:
        rows lost and gained, McNemar's p, difference of accuracy and its interval, on the rows that
        both were scored on, all and unseen; verdict: whether it is as good as F16; kl_labels: from
        F16, over the allowed answers; at_temperature: of a file, calibration error and coverage
        flips.json: the rows whose answer a file changed against F16
        metrics.csv: a row a stage, the numbers that fit one
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pockettune.common import program
from pockettune.common.errors import UserError
from pockettune.common.formats import FOREIGN, GGUF, float_rung
from pockettune.data.records import read_records
from pockettune.evaluation.calibration import confidence
from pockettune.evaluation.intervals import compare_paired, wilson_interval
from pockettune.evaluation.observers import describe_divergence
from pockettune.evaluation.statistics import (
    accuracy_by_coverage,
    calibration_error,
    kl_divergence,
    normalise,
)
from pockettune.evaluation.verdict import judge, say
from pockettune.tasks import load_task

BASELINE, REFERENCE = "tfidf", "f16"
RUNGS = [float_rung(kind) for kind in FOREIGN]
REMEDY = "remove predictions/ and run again, so that all are scored anew"


def compare_stages(
    metrics: dict[str, dict[str, Any]],
    predictions: dict[str, pd.DataFrame],
    margin: float,
    training: dict[str, Any],
) -> dict[str, Any]:
    """Return the stages' metrics under their names, each paired with the stages it stems from."""
    stages = {}
    names = list(predictions)
    for place, name in enumerate(names):
        after_reference = REFERENCE in names and place > names.index(REFERENCE)
        before = stage_before(name, names, metrics[name].get("format", GGUF))
        table, entry = predictions[name], {**metrics[name]}
        entry["interval"] = wilson_interval(int(is_right(table).sum()), len(table))
        entry["calibration_error"] = calibration_error(
            confidence(label_scores(table), 1.0), is_right(table)
        )
        if greedy := entry.get("greedy"):
            interval = wilson_interval(greedy["right"], greedy["rows"])
            entry["greedy"] = {
                **greedy, "accuracy": greedy["right"] / greedy["rows"], "interval": interval,
            }  # fmt: skip
        if before not in (name, BASELINE):
            entry["against_before"] = {"stage": before, **pair(predictions[before], table)}
        for key, other in (("against_f16", REFERENCE), ("against_tfidf", BASELINE)):
            if other in predictions and other != name:
                entry[key] = pair(predictions[other], table)
        if paired := entry.get("against_f16"):
            entry["verdict"] = judge(paired["lost"], paired["gained"], paired["n"], margin)
        if REFERENCE in predictions and name not in (REFERENCE, BASELINE):
            reference, scored = common_rows(predictions[REFERENCE], table)
            divergence = kl_divergence(label_probabilities(reference), label_probabilities(scored))
            entry["kl_labels"] = describe_divergence(divergence)
        is_file = name == REFERENCE or (after_reference and name not in RUNGS)
        if training.get("temperature") and is_file:
            entry["at_temperature"] = calibrate(table, training)
        stages[name] = entry
    return {"stages": stages}


def stage_before(name: str, names: Sequence[str], kind: str) -> str:
    """Return the stage that one was made of; the first of all of itself.

    A GGUF file is made of F16, a file of another format of that format's float rung, a rung of what F16
    is made of, and any other stage of the one before it.
    """
    place = names.index(name)
    if REFERENCE not in names or place <= names.index(REFERENCE):
        return names[max(place - 1, 0)]
    if name in RUNGS:
        return names[names.index(REFERENCE) - 1]
    return REFERENCE if kind == GGUF else float_rung(kind)


def calibrate(table: pd.DataFrame, training: dict[str, Any]) -> dict[str, Any]:
    """Return what the temperature fitted on validation, and its thresholds, make of the scored rows."""
    temperature = training["temperature"]["value"]
    sure = confidence(label_scores(table), temperature)
    thresholds = [entry["threshold"] for entry in training["coverage"]]
    return {
        "temperature": temperature,
        "calibration_error": calibration_error(sure, is_right(table)),
        "coverage": accuracy_by_coverage(sure, is_right(table), thresholds),
    }


def check_rows(predictions: dict[str, pd.DataFrame], answers: dict[str, str]) -> None:
    """Raise UserError where a stage's rows are not the records', whose right `answers` go by id."""
    for stage, table in predictions.items():
        told = zip(table["id"], table["reference"], strict=True)
        if foreign := [row for row, answer in told if answers.get(row) != answer]:
            raise UserError(
                f"the predictions of {stage} are of other records: {len(foreign)} of {len(table)}"
                f" rows differ, the first is {foreign[0]}; {REMEDY}"
            )


def pair(before: pd.DataFrame, after: pd.DataFrame) -> dict[str, Any]:
    """Compare two stages' answers to the same rows, and to those that do not stand in train."""
    before, after = common_rows(before, after)
    unseen = ~after["seen"].to_numpy()
    return {
        "n": len(after),
        "flips": int((before["prediction"] != after["prediction"]).sum()),
        **compare_paired(is_right(before), is_right(after)),
        "unseen": compare_paired(is_right(before)[unseen], is_right(after)[unseen])
        if unseen.any()
        else None,
    }


def common_rows(first: pd.DataFrame, second: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the rows of both that have the same ids, in order.

    Raises UserError where neither stage's rows hold the other's: then one is of another scoring.
    """
    fewer, more = sorted((set(first["id"]), set(second["id"])), key=len)
    if not fewer or not fewer <= more:
        raise UserError(f"two stages were scored on different rows; {REMEDY}")
    common = [t[t["id"].isin(fewer)].reset_index(drop=True) for t in (first, second)]
    if common[0]["id"].tolist() != common[1]["id"].tolist():
        raise UserError(f"two stages were scored in different orders; {REMEDY}")
    return common[0], common[1]


def is_right(table: pd.DataFrame) -> np.ndarray:
    return (table["prediction"] == table["reference"]).to_numpy()


def label_scores(table: pd.DataFrame) -> np.ndarray:
    """Return the allowed answers' log probabilities (rows, answers), as they were scored."""
    columns = [column for column in table if str(column).startswith("log_probability_")]
    return table[columns].to_numpy()


def label_probabilities(table: pd.DataFrame) -> np.ndarray:
    """Return log probabilities (rows, answers) among the allowed answers alone."""
    return normalise(label_scores(table))


def list_flips(
    predictions: dict[str, pd.DataFrame], texts: dict[str, str]
) -> dict[str, list[dict[str, Any]]]:
    """Return each file's rows whose answer is not F16's: id, text, right answer, before, after."""
    if REFERENCE not in predictions:
        return {}
    flips = {}
    f16 = predictions[REFERENCE]
    for name, table in list(predictions.items())[list(predictions).index(REFERENCE) + 1 :]:
        if name in RUNGS:
            continue
        assert len(table) == len(f16), "files are all scored on the same rows"
        changed = np.flatnonzero(f16["prediction"] != table["prediction"])
        flips[name] = [
            {
                "id": table["id"][row],
                "text": texts[table["id"][row]],
                "reference": table["reference"][row],
                "f16": f16["prediction"][row],
                "now": table["prediction"][row],
            }
            for row in changed
        ]
    return flips


def as_table(compared: dict[str, Any]) -> pd.DataFrame:
    """Return the numbers of one stage a row, those of sections under the section's name."""
    rows = []
    for name, entry in compared["stages"].items():
        row: dict[str, Any] = {"stage": name}
        for key, value in entry.items():
            inner = value.items() if isinstance(value, dict) else [("", value)]
            for part, number in inner:
                if isinstance(number, int | float):
                    row[f"{key}_{part}" if part else key] = number
        rows.append(row)
    return pd.DataFrame(rows)


def main() -> None:
    parser = program.argument_parser(__doc__)
    parser.add_argument("--metrics", type=Path, nargs="+", required=True)
    parser.add_argument("--predictions", type=Path, nargs="+", required=True)
    parser.add_argument("--adapter", type=Path, required=True, help="folder of train_adapter.py")
    parser.add_argument(
        "--settings", type=json.loads, required=True, help="sections task, dataset, evaluate"
    )
    parser.add_argument("--records", type=Path, required=True, help="records of the scored split")
    parser.add_argument("--json", type=Path, required=True, help="metrics.json to write")
    parser.add_argument("--csv", type=Path, required=True, help="metrics.csv to write")
    parser.add_argument("--flips", type=Path, required=True, help="flips.json to write")

    def work(arguments: argparse.Namespace) -> None:
        loaded = [program.read_json(path) for path in arguments.metrics]
        metrics = {entry.pop("stage"): entry for entry in loaded}
        tables = map(pd.read_parquet, arguments.predictions)
        predictions = dict(zip(metrics, tables, strict=True))
        task = load_task(arguments.settings["task"], arguments.settings["dataset"])
        records = list(read_records(arguments.records))
        check_rows(predictions, {record["id"]: task.answer(record) for record in records})
        training = program.read_json(arguments.adapter / "training.json")
        margin = arguments.settings["evaluate"]["margin"]
        compared = compare_stages(metrics, predictions, margin, training)
        with program.staged(arguments.csv) as partial:
            as_table(compared).to_csv(partial, index=False)
        texts = {record["id"]: record[task.text_field] for record in records}
        program.write_json(arguments.flips, list_flips(predictions, texts))
        program.write_json(arguments.json, compared)
        for name, entry in compared["stages"].items():
            if "verdict" in entry:
                program.logger.info("%s against %s: %s", name, REFERENCE, say(entry["verdict"]))
        program.logger.info("metrics of %d stages in %s", len(compared["stages"]), arguments.json)

    program.run(parser, work)


if __name__ == "__main__":
    main()
