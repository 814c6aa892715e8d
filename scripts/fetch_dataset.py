"""Fetch a labelled dataset and write it as train, validation and test records, with an audit.

Input   a dataset on the hub, or local files of a format of pockettune.data.records
Output  {train,validation,test}.jsonl: id, the task's fields, and whether the text stands in train
        audit.json: rows, labels, lengths, duplicates, test rows that stand in train, contradictions
"""

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pockettune.common import program
from pockettune.common.errors import UserError, list_faults
from pockettune.data.partition import cut_rows, normalise_text
from pockettune.data.records import read_table, write_records
from pockettune.sources.splits import SPLITS, read_repository
from pockettune.tasks import Record, Task, load_task
from pockettune.tasks.classification import as_key

COMMONEST = 10  # answers of text that the audit shows


def fetch_dataset(
    dataset: Mapping[str, Any], task_settings: Mapping[str, Any], downloads: Path, output: Path
) -> None:
    """Read the splits, check every row, mark what was seen in train, and write records and audit.

    Raises UserError, and writes nothing, where a local file changed meanwhile: the splits may then
    be of two states, and Snakemake would take the newer for the one that was read.
    """
    task = load_task(task_settings, dataset)
    words = task.constrain()
    before = file_states(dataset["files"])
    if dataset["files"]:
        labels = [*task_settings["labels"], *words] if words else []
        tables = read_files(dataset["files"], dataset["split"], task, labels)
    else:
        tables = read_repository(dataset, task.columns, downloads)
    if words:
        tables = drop_unlabelled(tables, dataset, task_settings["labels"])
    task.settle(list(tables.values()))
    records, faults = {}, {}
    for split, table in tables.items():
        records[split], faults[split] = read_rows(table, split, task)
    check_rows(records, faults, dataset["bad_rows"])
    check_answers(records["train"], task)
    keys = {
        split: [normalise_text(record[task.text_field]) for record in rows]
        for split, rows in records.items()
    }
    mark_seen(records, keys)
    audit = audit_splits(records, keys, task)
    for split, found in faults.items():
        audit["splits"][split]["bad_rows"] = {"count": len(found), "first": found[:10]}
    after = file_states(dataset["files"])
    if changed := [path for path, state in before.items() if state != after[path]]:
        raise UserError(
            f"{list_faults(changed)} changed while it was read; run again when nothing writes to it"
        )
    for split, rows in records.items():
        write_records(output / f"{split}.jsonl", rows)
    program.write_json(output / "audit.json", audit)
    for split, facts in audit["splits"].items():
        seen = f", {facts['seen_in_train']} of them stand in train" if split != "train" else ""
        program.logger.info("%s: %d rows%s", split, facts["rows"], seen)
        if broken := facts["texts_with_line_breaks"]:
            program.logger.warning(
                "%s: %d texts hold line breaks; in a csv, see that no quote is left open",
                split,
                broken,
            )
        if (
            words and len(facts["answers"]) == 1
        ):  # as the first rows of a dataset that is sorted by label
            answer = next(iter(facts["answers"]))
            program.logger.warning("%s: every row is answered %s; take other rows", split, answer)


def file_states(files: Mapping[str, str] | None) -> dict[str, tuple[int, ...]]:
    """Return what tells one state of a file from the next: its size, time in ns and inode."""
    states: dict[str, tuple[int, ...]] = {}
    for name in (files or {}).values():
        if Path(name).exists():  # else reading it says so
            state = Path(name).stat()
            states[name] = (state.st_size, state.st_mtime_ns, state.st_ino)
    return states


def read_files(
    files: Mapping[str, str], split: Mapping[str, Any], task: Task, labels: list[str]
) -> dict[str, pd.DataFrame]:
    """Read a file a split, or cut one file into three by its texts."""

    def read(name: str) -> pd.DataFrame:
        return read_table(Path(files[name]), task.columns, labels, task.optional_columns)

    if "all" not in files:
        return {name: read(name) for name in SPLITS}
    table = read("all")
    texts = list(map(str, table[task.columns[0]]))
    # Of each label its share; texts that are answered with text have none.
    groups = list(map(as_key, table[task.columns[1]])) if labels else [""] * len(texts)
    parts = cut_rows(texts, groups, split, split["seed"])
    if min(map(len, parts.values())) == 0:
        raise UserError(
            f"{files['all']}: {len(table)} rows are too few for the shares of dataset.split"
        )
    return {name: table.iloc[parts[name]] for name in SPLITS}


def drop_unlabelled(
    tables: Mapping[str, pd.DataFrame], dataset: Mapping[str, Any], labels: Mapping[str, str]
) -> dict[str, pd.DataFrame]:
    """Leave out the rows that have no label, and say how many; a split must keep some.

    Public test sets hide their labels: the cell is empty, or -1 where no label is called so. Raises
    UserError where dataset.unlabelled is refuse, unless every row has one.
    """
    missing = {"", "-1"} - {as_key(label) for label in (*labels, *labels.values())}
    kept, counts = {}, []
    for split, table in tables.items():
        unlabelled = table[dataset["label_column"]].map(as_key).isin(missing)
        kept[split] = table[~unlabelled]
        if count := int(unlabelled.sum()):
            first = table.index[unlabelled][0] + 1
            counts.append(f"{split} {count:,} of {len(table):,}, the first is row {first}")
    if counts and dataset["unlabelled"] == "refuse":
        raise UserError(
            f"dataset: rows without a label (an empty cell, or -1): {list_faults(counts)};"
            " dataset.unlabelled: drop leaves them out"
        )
    if empty := [split for split, table in kept.items() if table.empty]:
        raise UserError(
            f"dataset: no row of {', '.join(empty)} has a label; take other rows for it, for example"
            ' dataset.splits: {train: "train[10%:]", validation: "train[:10%]", test: validation}'
        )
    if counts:
        program.logger.warning("rows without a label are left out: %s", "; ".join(counts))
    return kept


def read_rows(table: pd.DataFrame, split: str, task: Task) -> tuple[list[Record], list[str]]:
    """Turn the rows into records with stable ids; return the faults of the others beside them."""
    records, faults = [], []
    names = list(map(str, table.columns))
    for position, *cells in table.itertuples(name=None):
        number = int(position) + 1  # as a reader counts the rows below the header
        try:
            row = dict(zip(names, cells, strict=True))
            records.append({"id": f"{split}-{number}", **task.read(row)})
        except ValueError as error:
            faults.append(f"row {number}: {error}")
    return records, faults


def check_rows(
    records: Mapping[str, list[Record]], faults: Mapping[str, list[str]], bad_rows: str
) -> None:
    """Raise UserError naming the bad rows of all splits, unless they are to be left out."""
    named = [f"{split}, {fault}" for split, found in faults.items() for fault in found]
    if named and bad_rows == "refuse":
        raise UserError(
            f"dataset: {list_faults(named)}; mend them, or dataset.bad_rows: drop leaves them out"
        )
    if empty := [split for split, rows in records.items() if not rows]:
        raise UserError(f"dataset: no good row is left of {', '.join(empty)}: {list_faults(named)}")
    for split, found in faults.items():
        if found:
            program.logger.warning(
                "%s: %d bad rows are left out: %s", split, len(found), list_faults(found)
            )


def check_answers(rows: list[Record], task: Task) -> None:
    """Raise UserError where all of train has one answer: neither stage nor baseline learns from it."""
    answers = {task.answer(record) for record in rows}
    if len(answers) == 1:
        raise UserError(
            f"dataset, train: every row is answered {answers.pop()}, so that there is nothing to learn;"
            " take other rows: those of a sorted dataset come one label after the other"
        )


def mark_seen(records: dict[str, list[Record]], keys: Mapping[str, list[str]]) -> None:
    """Add "seen" to the rows of validation and test: whether their text stands in train.

    `keys` are the texts as they are compared: they may differ in case, width or white space.
    """
    known = set(keys["train"])
    for split in ("validation", "test"):
        for record, key in zip(records[split], keys[split], strict=True):
            record["seen"] = key in known


def audit_splits(
    records: dict[str, list[Record]], keys: Mapping[str, list[str]], task: Task
) -> dict[str, Any]:
    """Describe each split, and what a score on it does not tell."""
    answers = defaultdict(set)
    for record, key in zip(records["train"], keys["train"], strict=True):
        answers[key].add(task.answer(record))
    in_validation = set(keys["validation"])
    splits = {}
    for split, rows in records.items():
        texts = [record[task.text_field] for record in rows]
        lengths = np.array([len(text) for text in texts])
        facts: dict[str, Any] = {
            "rows": len(rows),
            "answers": count_answers(rows, task),
            "characters": {
                "mean": round(float(lengths.mean()), 1),
                "median": int(np.median(lengths)),
                "p95": int(np.percentile(lengths, 95)),
                "max": int(lengths.max()),
            },
            "texts_with_line_breaks": sum("\n" in text for text in texts),
            "duplicates": len(texts) - len(set(keys[split])),
        }
        if split != "train":
            facts["seen_in_train"] = sum(record["seen"] for record in rows)
            facts["contradicts_train"] = sum(
                record["seen"] and task.answer(record) not in answers[key]
                for record, key in zip(rows, keys[split], strict=True)
            )
        if split == "test":
            facts["seen_in_validation"] = sum(key in in_validation for key in keys[split])
        splits[split] = facts
    contradictory = sum(len(found) > 1 for found in answers.values())
    return {"splits": splits, "train_texts_with_several_answers": contradictory}


def count_answers(rows: list[Record], task: Task) -> dict[str, int]:
    """Return how many rows have each answer; of text the commonest."""
    counts = Counter(map(task.answer, rows))
    shown = counts.items() if task.constrain() else counts.most_common(COMMONEST)
    return dict(sorted(shown))


def main() -> None:
    parser = program.argument_parser(__doc__)
    parser.add_argument("--settings", type=json.loads, required=True, help="sections dataset, task")
    parser.add_argument(
        "--downloads", type=Path, required=True, help="folder for what the hub sends"
    )
    parser.add_argument(
        "--audit", type=Path, required=True, help="JSON to write, the splits beside it"
    )

    def work(arguments: argparse.Namespace) -> None:
        settings = arguments.settings
        fetch_dataset(
            settings["dataset"], settings["task"], arguments.downloads, arguments.audit.parent
        )

    program.run(parser, work)


if __name__ == "__main__":
    main()
