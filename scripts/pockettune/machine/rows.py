"""How many rows a run's dataset has and how long they are, as far as that is here already."""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pockettune.common.errors import UserError
from pockettune.machine.run import Run

SPLITS = ("train", "validation", "test")
# Of a prompt's text in UTF-8: Qwen2's tokenizer makes 0.67 tokens of a Chinese character (3 bytes)
# and one of four English letters.
TOKENS_A_BYTE = 0.24
TEMPLATE_TOKENS = 13  # of Qwen2's chat template: 8 before the prompt, 5 behind it
SAMPLE = 2000  # rows that are looked at of each split


@dataclass(frozen=True)
class Rows:
    """The rows of each split, and the tokens of some, evenly taken."""

    counts: Mapping[str, int]
    tokens: Mapping[str, Sequence[int]]
    shared: int  # tokens that all rows start with; a pass has them once
    text_bytes: float  # mean of a row's text
    exact: bool  # the tokens were counted by the model's own tokenizer

    def scored(self, evaluate: Mapping[str, Any]) -> int:
        """Return the rows that every stage is scored on."""
        count = self.counts[evaluate["split"]]
        return min(count, evaluate["limit"] or count)

    def longest_pass(self, rows: int, most: float) -> int:
        """Return the tokens of the longest of an epoch's passes of `rows` random rows, at most `most`."""
        lengths = [tokens - self.shared for tokens in self.tokens["train"]]
        chance = random.Random(0)
        passes = max(self.counts["train"] // rows, 1)
        drawn = (sum(chance.choices(lengths, k=rows)) for _ in range(min(passes, 3000)))
        return int(min(self.shared + max(drawn), most))


def find_rows(run: Run) -> Rows | None:
    """Return what is known of the rows: from records of an earlier run, or the config's files."""
    try:
        records = [run.results / f"dataset/{split}.jsonl" for split in SPLITS]
        if all(path.is_file() for path in records):
            texts = {split: read_texts(path) for split, path in zip(SPLITS, records, strict=True)}
        elif files := run.settings["dataset"]["files"]:
            if not all(run.path(path).is_file() for path in files.values()):
                return None
            texts = read_files(run, files)
        else:
            return None
        return measure(run, texts)
    except (UserError, OSError, ValueError, KeyError):
        return None  # fetch_dataset says what is wrong with them


def read_texts(path: Path) -> list[str]:
    """Return the texts of records that fetch_dataset wrote."""
    with path.open(encoding="utf-8") as lines:
        return [str(json.loads(line)["text"]) for line in lines]


def read_files(run: Run, files: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the texts of the config's own files, one file cut by its shares."""
    from pockettune.data.records import read_table

    dataset = run.settings["dataset"]
    columns = [dataset[key] for key in ("text_column", "label_column") if dataset[key]]
    tables = {
        split: [str(t) for t in read_table(run.path(path), columns)[columns[0]]]
        for split, path in files.items()
    }
    if "all" not in tables:
        return tables
    texts, share = tables["all"], dataset["split"]
    first, second = round(len(texts) * share["test"]), round(len(texts) * share["validation"])
    return {
        "test": texts[:first],
        "validation": texts[first : first + second],
        "train": texts[first + second :],
    }


def measure(run: Run, texts: Mapping[str, Sequence[str]]) -> Rows:
    """Count rows and tokens: by the base model's tokenizer if it is here, else by their bytes."""
    task, longest = run.settings["task"], run.settings["tokenize"]["max_length"]
    tokenizer = load_tokenizer(run)
    before, _, behind = task["prompt"].partition("{text}")

    def count(text: str) -> int:
        if tokenizer is not None:
            return len(tokenizer.encode(text, add_special_tokens=False).ids)
        return round(TOKENS_A_BYTE * len(text.encode()))

    shared = count(task["system"] + before) + 8
    frame = shared + count(behind) + TEMPLATE_TOKENS - 8
    samples = {split: rows[:: max(len(rows) // SAMPLE, 1)] for split, rows in texts.items()}
    size = sum(len(t.encode()) for t in samples["train"]) / max(len(samples["train"]), 1)
    return Rows(
        {split: len(rows) for split, rows in texts.items()},
        {
            split: [min(frame + count(text), longest) for text in rows] or [longest]
            for split, rows in samples.items()
        },
        min(shared, longest),
        size,
        tokenizer is not None,
    )


def load_tokenizer(run: Run) -> Any:
    """Return the base model's tokenizer; None where the model is not here."""
    for folder in (run.base, run.own_model):
        if folder is not None and (folder / "tokenizer.json").is_file():
            from tokenizers import Tokenizer

            try:
                return Tokenizer.from_file(str(folder / "tokenizer.json"))
            except Exception:  # of the library's own kind; models.check_model tells it
                return None
    return None
