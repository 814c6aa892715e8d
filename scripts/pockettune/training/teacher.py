"""Learning from another model's answers: how likely it finds each label, and not the right one alone.

Hinton et al., Distilling the knowledge in a neural network (arXiv 1503.02531), over the labels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch.nn.functional import kl_div, log_softmax

from pockettune.common.errors import UserError
from pockettune.data.prompts import Example, Examples
from pockettune.evaluation.scoring import Tokens, decisive_prefixes

# What score_teacher.py writes: scores of train's rows, and texts without a label with theirs.
TRAIN, UNLABELLED, UNLABELLED_EXAMPLES = "train.parquet", "unlabelled.parquet", "unlabelled.arrow"


@dataclass(frozen=True)
class Teacher:
    """What a teacher says of each example, and how much that counts beside the right answer."""

    scores: Mapping[str, Sequence[float]]  # by the example's id: each label's log probability
    label_tokens: Sequence[int]  # that begin the labels' answers, in the same order
    temperature: float
    weight: float

    def divergence(self, logits: torch.Tensor, examples: Sequence[Example]) -> torch.Tensor:
        """Return T² · KL(teacher ‖ student) over the labels at temperature T, mean over the examples.

        `logits` (examples, vocabulary) are those behind the prompts. T² keeps the gradient's size:
        softened probabilities differ by 1/T, and so do their logarithms.
        """
        said = torch.tensor([self.scores[e.id] for e in examples], device=logits.device)
        teacher = log_softmax(said / self.temperature, dim=1)
        student = log_softmax(logits[:, list(self.label_tokens)] / self.temperature, dim=1)
        mean = kl_div(student, teacher, reduction="batchmean", log_target=True)
        return self.temperature**2 * mean


def label_tokens(words: Sequence[str], answers: Sequence[Tokens]) -> list[int]:
    """Return the token by which each answer is told from the others, its first.

    Raises UserError naming the labels that begin alike: their probabilities take several passes.
    """
    decisive = decisive_prefixes(answers)
    if alike := [word for word, prefix in zip(words, decisive, strict=True) if len(prefix) > 1]:
        raise UserError(
            f"train.teacher: the labels {', '.join(alike)} begin with the same token of this model; a"
            " teacher needs labels that differ in their first: choose other words for task.labels"
        )
    return [prefix[0] for prefix in decisive]


def load_teacher(
    folder: Path, settings: Mapping[str, Any], examples: Examples, answers: Mapping[str, Any]
) -> Teacher:
    """Return what score_teacher.py wrote of these examples; UserError where it is of others."""
    files = [path for name in (TRAIN, UNLABELLED) if (path := folder / name).exists()]
    table = pd.concat([pd.read_parquet(path) for path in files])
    if table["id"].tolist() != examples.ids():
        raise UserError(
            f"{folder} scores other rows than those trained on: run score_teacher again"
        )
    scores = table[[f"log_probability_{word}" for word in answers["words"]]]
    return Teacher(
        scores=dict(zip(table["id"], scores.to_numpy().tolist(), strict=True)),
        label_tokens=label_tokens(answers["words"], answers["ids"]),
        temperature=settings["temperature"],
        weight=settings["weight"],
    )


def teacher_files(folder: Path | None) -> list[Path]:
    """Return the files of score_teacher.py that decide what is learned; none without a teacher."""
    names = (TRAIN, UNLABELLED, UNLABELLED_EXAMPLES)
    return [path for name in names if folder and (path := folder / name).exists()]
