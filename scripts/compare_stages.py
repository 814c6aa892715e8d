"""Put the metrics of all stages side by side, and pair their answers row by row.

Input   metrics JSON and predictions parquet of every stage, in the order of the DAG; the adapter's
        training.json, for the temperature that was fitted on validation
Output  metrics.json: {"stages": {stage: {n, accuracy, macro_f1, unseen, size_bytes, …}}}, with
        interval: of the accuracy; calibration_error; against_before, against_f16, against_tfidf:
        rows lost and gained, McNemar's p, difference of accuracy and its interval, on the rows that
        both were scored on, all and unseen; verdict: whether it is as good as F16; kl_labels: from
        F16, over the allowed answers; at_temperature: of a file, calibration error and coverage
        flips.json: the rows whose answer a file changed against F16
        samples.json: where answers are text, some records with what every stage answered
        metrics.csv: a row a stage, the numbers that fit one
"""

import argparse
import json
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pockettune.common import program
from pockettune.common.errors import UserError
from pockettune.common.formats import FOREIGN, GGUF, float_rung
from pockettune.data.prompts import take_evenly
from pockettune.data.records import read_records
from pockettune.evaluation.bootstrap import compare_counts, metric_interval
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
from pockettune.tasks import Record, Task, TextTask, as_text_task, load_task

BASELINE, REFERENCE = "tfidf", "f16"
SAMPLES = 12
RUNGS = [float_rung(kind) for kind in FOREIGN]
REMEDY = "remove predictions/ and run again, so that all are scored anew"


def compare_stages(
    metrics: dict[str, dict[str, Any]],
    predictions: dict[str, pd.DataFrame],
    margin: float,
    training: dict[str, Any],
    task: TextTask | None = None,
) -> dict[str, Any]:
    """Return the stages' metrics under their names, each paired with the stages it stems from.

    `task` is given where its answers are text.
    """
    stages = {}
    names = list(predictions)
    for place, name in enumerate(names):
        after_reference = REFERENCE in names and place > names.index(REFERENCE)
        before = stage_before(name, names, metrics[name].get("format", GGUF))
        table, entry = predictions[name], {**metrics[name]}
        entry["score"] = entry[entry["metric"]]
        entry |= describe_text(task, table) if task else describe_labels(table)
        if greedy := entry.get("greedy"):
            interval = wilson_interval(greedy["right"], greedy["rows"])
            entry["greedy"] = {
                **greedy, "accuracy": greedy["right"] / greedy["rows"], "interval": interval,
            }  # fmt: skip
        if before not in (name, BASELINE):
            entry["against_before"] = {"stage": before, **pair(predictions[before], table, task)}
        for key, other in (("against_f16", REFERENCE), ("against_tfidf", BASELINE)):
            if other in predictions and other != name:
                entry[key] = pair(predictions[other], table, task)
        if paired := entry.get("against_f16"):
            entry["verdict"] = judge(paired, margin)
        if task and REFERENCE in predictions and name != REFERENCE:
            entry["parting"] = find_partings(*common_rows(predictions[REFERENCE], table))
        elif REFERENCE in predictions and name not in (REFERENCE, BASELINE):
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


def describe_labels(table: pd.DataFrame) -> dict[str, Any]:
    """Return the interval of the accuracy, and the calibration error."""
    sure = confidence(label_scores(table), 1.0)
    return {
        "interval": wilson_interval(int(is_right(table).sum()), len(table)),
        "calibration_error": calibration_error(sure, is_right(table)),
    }


def describe_text(task: TextTask, table: pd.DataFrame) -> dict[str, Any]:
    """Return the interval of the task's metric."""
    return {"interval": metric_interval(count_rows(table), task.measure)}


def find_partings(f16: pd.DataFrame, table: pd.DataFrame) -> dict[str, Any]:
    """Return how many of the answers that both generated are F16's to the end, token by token.

    "first_token": where the others part, the median of the places, from 1.
    """
    pairs = [
        (json.loads(before), json.loads(after))
        for before, after in zip(f16["answer_ids"], table["answer_ids"], strict=True)
        if isinstance(before, str) and isinstance(after, str)
    ]
    places = [place for before, after in pairs if (place := parting_place(before, after))]
    return {
        "rows": len(pairs),
        "equal": len(pairs) - len(places),
        "first_token": float(np.median(places)) if places else None,
    }


def parting_place(before: list[list[int]], after: list[list[int]]) -> int | None:
    """Return the place of the first token, from 1, in which a record's answers differ; None where in none."""
    for first, second in zip(before, after, strict=True):
        for place, (a, b) in enumerate(zip_longest(first, second), start=1):
            if a != b:
                return place
    return None


def count_rows(table: pd.DataFrame) -> np.ndarray:
    """Return what the task counts of each row: (rows, numbers)."""
    return table[[column for column in table if str(column).startswith("count_")]].to_numpy()


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


def right_answer(task: Task, record: Record) -> str:
    """Return a record's right answer as it stands in the predictions."""
    if text := as_text_task(task):
        return json.dumps(text.reference(record), ensure_ascii=False)
    return task.answer(record)


def pair(before: pd.DataFrame, after: pd.DataFrame, task: TextTask | None = None) -> dict[str, Any]:
    """Compare two stages' answers to the same rows, and to those that do not stand in train."""
    before, after = common_rows(before, after)
    unseen = ~after["seen"].to_numpy()

    def compare(rows: np.ndarray) -> dict[str, Any]:
        if task:
            return compare_counts(count_rows(before)[rows], count_rows(after)[rows], task.measure)
        return compare_paired(is_right(before)[rows], is_right(after)[rows])

    return {
        "n": len(after),
        "flips": int((before["prediction"] != after["prediction"]).sum()),
        **compare(np.full(len(after), True)),
        "unseen": compare(unseen) if unseen.any() else None,
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
    predictions: dict[str, pd.DataFrame], shown: dict[str, dict[str, str]]
) -> dict[str, list[dict[str, Any]]]:
    """Return each file's rows whose answer is not F16's: id, text, right answer, before, after.

    `shown` is what show_record returns of each record, by id.
    """
    if REFERENCE not in predictions:
        return {}
    flips = {}
    f16 = predictions[REFERENCE]
    for name, table in list(predictions.items())[list(predictions).index(REFERENCE) + 1 :]:
        if name in RUNGS:
            continue
        assert len(table) == len(f16), "files are all scored on the same rows"
        # Of text what was generated is shown; a row that was only read has none.
        said = "answer" if "answer" in table else "prediction"
        changed = np.flatnonzero((f16[said] != table[said]) & table[said].notna())
        flips[name] = [
            {
                "id": table["id"][row],
                **shown[table["id"][row]],
                "f16": f16[said][row],
                "now": table[said][row],
            }
            for row in changed
        ]
    return flips


def show_record(task: Task, record: Record) -> dict[str, str]:
    """Return what a record asks, "text", and its right answer, "reference", as they are read.

    Of text the last message is shown, which may hold a question beside the text, and the right answers
    of all questions, a line each, as the answers of a stage are.
    """
    if text := as_text_task(task):
        whole = text.questions(record, lambda _: 0, 0)  # of no tokens: in no windows
        answers = "\n".join(map(task.answer, whole))
        return {"text": task.prompt(record)[-1]["content"], "reference": answers}
    return {"text": record[task.text_field], "reference": task.answer(record)}


def list_samples(
    predictions: dict[str, pd.DataFrame], shown: dict[str, dict[str, str]]
) -> list[dict[str, Any]]:
    """Return some records that every stage answered, evenly spread: id, text, right answer, "answers"."""
    answered = {
        name: dict(zip(table["id"], table["answer"], strict=True))
        for name, table in ((n, t[t["answer"].notna()]) for n, t in predictions.items())
    }
    common = [row for row in shown if all(row in answers for answers in answered.values())]
    return [
        {
            "id": row,
            **shown[row],
            "answers": {name: answers[row] for name, answers in answered.items()},
        }
        for row in take_evenly(common, SAMPLES)
    ]


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
    parser.add_argument("--samples", type=Path, nargs="?", help="samples.json to write, of text")

    def work(arguments: argparse.Namespace) -> None:
        loaded = [program.read_json(path) for path in arguments.metrics]
        metrics = {entry.pop("stage"): entry for entry in loaded}
        tables = map(pd.read_parquet, arguments.predictions)
        predictions = dict(zip(metrics, tables, strict=True))
        task = load_task(arguments.settings["task"], arguments.settings["dataset"])
        records = {record["id"]: record for record in read_records(arguments.records)}
        text = as_text_task(task)
        check_rows(predictions, {row: right_answer(task, r) for row, r in records.items()})
        training = program.read_json(arguments.adapter / "training.json")
        margin = arguments.settings["evaluate"]["margin"]
        compared = compare_stages(metrics, predictions, margin, training, text)
        with program.staged(arguments.csv) as partial:
            as_table(compared).to_csv(partial, index=False)
        shown = {row: show_record(task, record) for row, record in records.items()}
        program.write_json(arguments.flips, list_flips(predictions, shown))
        if text:
            program.write_json(arguments.samples, list_samples(predictions, shown))
        program.write_json(arguments.json, compared)
        for name, entry in compared["stages"].items():
            if "verdict" in entry:
                program.logger.info("%s against %s: %s", name, REFERENCE, say(entry["verdict"]))
        program.logger.info("metrics of %d stages in %s", len(compared["stages"]), arguments.json)

    program.run(parser, work)


if __name__ == "__main__":
    main()
