"""Classification: one label for one text."""

import math
from collections.abc import Mapping, Sequence
from typing import Any


class Classification:
    """The model answers with one of the labels of config.yaml's `task.labels`."""

    text_field = "text"

    def __init__(self, settings: Mapping[str, Any], columns: Mapping[str, str]) -> None:
        self.system = settings["system"]
        self.template = settings["prompt"]
        self.template_options: Mapping[str, Any] = settings["template_options"]
        self.labels: dict[str, str] = dict(sorted(settings["labels"].items()))
        self.text_column = columns["text_column"]
        self.label_column = columns["label_column"]

    def read(self, row: Mapping[str, object]) -> dict[str, Any]:
        """Return {"text", "label"}; the label may be written as in the data or as answered."""
        text, value = row[self.text_column], row[self.label_column]
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{self.text_column} is empty")
        label = as_key(value)
        if label in self.labels:
            return {"text": text, "label": self.labels[label]}
        if label in self.labels.values():
            return {"text": text, "label": label}
        known = ", ".join(f"{key} ({name})" for key, name in self.labels.items())
        raise ValueError(f"label {label!r} is not one of {known}")

    def prompt(self, record: Mapping[str, Any]) -> list[dict[str, str]]:
        question = {"role": "user", "content": self.template.replace("{text}", record["text"])}
        return [{"role": "system", "content": self.system}, question] if self.system else [question]

    def answer(self, record: Mapping[str, Any]) -> str:
        return record["label"]

    def constrain(self) -> list[str]:
        return list(self.labels.values())

    def parse(self, text: str) -> str | None:
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


def as_key(value: object) -> str:
    """Write a label cell as config.yaml writes its key: a whole number read as 1.0 is "1"."""
    if isinstance(value, float) and not math.isnan(value) and value.is_integer():
        return str(int(value))
    return "" if value is None or value != value else str(value).strip()
