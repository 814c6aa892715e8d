"""Turns scores into predictions and metrics, and says what computed them."""

import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pockettune.data.prompts import Example
from pockettune.tasks import Task


def predict(examples: Sequence[Example], words: Sequence[str], scores: np.ndarray) -> pd.DataFrame:
    """Return a row an example: id, reference, prediction, seen and each answer's log probability.

    `scores` is (examples, answers); an exact tie goes to the first answer.
    """
    table = pd.DataFrame(
        {
            "id": [example.id for example in examples],
            "reference": [example.reference for example in examples],
            "prediction": [words[best] for best in scores.argmax(axis=1)],
            "seen": [example.seen for example in examples],
        }
    )
    for column, word in enumerate(words):
        table[f"log_probability_{word}"] = scores[:, column]
    return table


def score_predictions(task: Task, predictions: pd.DataFrame) -> dict[str, Any]:
    """Return n and the task's metrics on all rows, and "unseen": the same on rows not in train."""
    unseen = predictions[~predictions["seen"]]
    metrics = {"n": len(predictions), **_score(task, predictions)}
    metrics["unseen"] = {"n": len(unseen), **(_score(task, unseen) if len(unseen) else {})}
    return metrics


def _score(task: Task, predictions: pd.DataFrame) -> dict[str, Any]:
    return task.score(predictions["reference"].tolist(), predictions["prediction"].tolist())


def provenance(*packages: str) -> dict[str, str]:
    """Return the machine and the versions of the packages that computed a result."""
    return {
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {processor_name()}",
        **{name: version(name) for name in packages},
    }


def resident_bytes() -> int | None:
    """Return what this process holds in memory now; None where the system does not tell."""
    status = Path("/proc/self/statm")
    if not status.exists():
        return None
    return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def processor_name() -> str:
    """Return the processor's name as the system tells it, or "unknown processor"."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown processor"
