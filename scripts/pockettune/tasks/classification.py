"""Classification: one label for one text."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pockettune.common.errors import UserError

if TYPE_CHECKING:
    import pandas as pd


class Classification:
    """The model answers with one of the labels of config.yaml's `task.labels`."""

    text_field = "text"
    metric = "accuracy"
    optional_columns: Sequence[str] = ()

    def __init__(self, settings: Mapping[str, Any], columns: Mapping[str, str]) -> None:
        self.system = settings["system"]
        self.template = settings["prompt"]
        self.template_options: Mapping[str, Any] = settings["template_options"]
        self.labels: dict[str, str] = dict(sorted(settings["labels"].items()))
        self.text_column = columns["text_column"]
        self.label_column = columns["label_column"]
        self.columns: Sequence[str] = [self.text_column, self.label_column]
        self._read_as: dict[str, str] = {}  # by `settle`

    def settle(self, tables: Sequence["pd.DataFrame"]) -> None:
        """Decide once for the whole dataset whether its labels are values or words of task.labels.

        Cell by cell it would go unseen that 1 to 5 stars are read as the values 0 to 4. Raises
        UserError where the column holds both, or where both readings are possible and differ.
        """
        keys = index_labels(self.labels, self.labels.values())
        words = index_labels(self.labels.values(), self.labels.values())
        columns = (table[self.label_column].map(as_key).unique() for table in tables)
        found = sorted({cell for column in columns for cell in column} & {*keys, *words})
        only_keys = [cell for cell in found if cell not in words]
        only_words = [cell for cell in found if cell not in keys]
        if only_keys and only_words:
            raise UserError(
                f"dataset: column {self.label_column} holds values of task.labels"
                f" ({', '.join(only_keys)}) and words of it ({', '.join(only_words)}); write all its"
                " cells in one way"
            )
        if not only_keys and not only_words and any(keys[cell] != words[cell] for cell in found):
            raise UserError(
                f"dataset: column {self.label_column} holds {', '.join(found)}, each a value of"
                " task.labels and the word of another; where they are the words, write"
                f" each as its own value ({found[0]!r}: {words[found[0]]!r}), else take other words"
            )
        self._read_as = words if only_words else keys

    def read(self, row: Mapping[str, object]) -> dict[str, Any]:
        """Return {"text", "label"}, the label as answered."""
        text, value = row[self.text_column], row[self.label_column]
        if isinstance(text, str) and text.strip():
            label = as_key(value)
            if label in self._read_as:
                return {"text": text, "label": self._read_as[label]}
            known = ", ".join(f"{key} ({name})" for key, name in self.labels.items())
            raise ValueError(f"label {label!r} is not one of {known}")
        if isinstance(text, str) or as_key(text) == "":
            raise ValueError(f"{self.text_column} is empty")
        raise ValueError(f"{self.text_column} is {text!r}, not text")

    def trial(self) -> dict[str, Any]:
        return {"id": "(a trial)", "text": "{text}"}

    def prompt(self, record: Mapping[str, Any]) -> list[dict[str, str]]:
        question = {"role": "user", "content": self.template.replace("{text}", record["text"])}
        return [{"role": "system", "content": self.system}, question] if self.system else [question]

    def answer(self, record: Mapping[str, Any]) -> str:
        return record["label"]

    def clean(self, record: dict[str, Any], defuse: Callable[[str], str]) -> dict[str, Any]:
        return {**record, "text": defuse(record["text"])}

    def shorten(
        self, record: dict[str, Any], excess: int, cut: Callable[[str, int], str]
    ) -> dict[str, Any] | None:
        text = record["text"]
        return {**record, "text": cut(text, excess)} if text else None

    def constrain(self) -> list[str]:
        return list(self.labels.values())

    def parse(self, text: str, record: Mapping[str, Any] | None = None) -> str | None:
        return text.strip() if text.strip() in self.labels.values() else None

    def score(self, references: Sequence[str], predictions: Sequence[str]) -> dict[str, Any]:
        """Return accuracy, macro F1, each class's scores and the confusion matrix.

        The matrix has a row for each true label and a column for each predicted one, in the
        order of `labels`. Macro F1 is the mean over the labels that occur in `references` or
        `predictions`, as scikit-learn counts it.
        """
        # Imported here because it takes seconds, and only the evaluation scores.
        from sklearn.metrics import (
            accuracy_score,
            confusion_matrix,
            precision_recall_fscore_support,
        )

        labels = self.constrain()
        present = [name for name in labels if name in {*references, *predictions}]
        precision, recall, f1, support = precision_recall_fscore_support(
            references, predictions, labels=labels, zero_division=0
        )
        return {
            "accuracy": accuracy_score(references, predictions),
            "macro_f1": float(sum(f1[labels.index(name)] for name in present) / len(present)),
            "labels": labels,
            "per_class": {
                name: {
                    "precision": float(precision[i]),
                    "recall": float(recall[i]),
                    "f1": float(f1[i]),
                    "n": int(support[i]),
                }
                for i, name in enumerate(labels)
            },
            "confusion_matrix": confusion_matrix(references, predictions, labels=labels).tolist(),
        }


def index_labels(written: Iterable[str], words: Iterable[str]) -> dict[str, str]:
    """Return the word of each spelling, as `as_key` has it; UserError where two are one."""
    pairs = list(zip(written, words, strict=True))
    counts = Counter(as_key(spelling) for spelling, _ in pairs)
    if same := [spelling for spelling, _ in pairs if counts[as_key(spelling)] > 1]:
        raise UserError(f"task.labels: {' and '.join(same)} are read as one; keep one of them")
    return {as_key(spelling): word for spelling, word in pairs}


def as_key(value: object) -> str:
    """Write a label as config.yaml writes its key: "" for a missing one, "1" for 1.0 and "1.0"."""
    written = str(value).strip()
    if value is None or (not isinstance(value, str) and written in ("nan", "<NA>", "NaT")):
        return ""
    return re.sub(r"^(-?\d+)\.0+$", r"\1", written)
