"""How sure a model was of each token of an answer that it generated."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from pockettune.evaluation.statistics import normalise
from pockettune.runtimes.answers import Tokens
from pockettune.runtimes.generation import logits_at
from pockettune.runtimes.greedy import as_text
from pockettune.runtimes.llama import LlamaModel


def watch_answers(
    llama: LlamaModel, prompts: Sequence[Tokens], answers: Sequence[Tokens], most: int
) -> Iterator[dict[str, Any]]:
    """Yield how an answer was told, token by token, its end too where it has one.

    "ended": whether it is not cut off; "ends": characters of the answer up to the end of each token;
    "log_probabilities", and "margins": by how much a token was likelier than the next likely, in nats.
    """
    ends = sorted(llama.end_tokens())
    sequences = [[*prompt, *ids] for prompt, ids in zip(prompts, answers, strict=True)]
    ended = [len(ids) <= most for ids in answers]
    places = [
        range(len(prompt) - 1, len(prompt) + len(ids) - (not whole))
        for prompt, ids, whole in zip(prompts, answers, ended, strict=True)
    ]
    computed = logits_at(llama, sequences, places)
    for ids, whole, logits in zip(answers, ended, computed, strict=True):
        targets = [[token] for token in ids] + [ends] * whole
        scores = normalise(logits)
        told = [
            (row[target].max(), np.delete(row, target).max())
            for row, target in zip(scores, targets, strict=True)
        ]
        yield {
            "ended": whole,
            "ends": [len(as_text(llama, ids[: n + 1]).rstrip("\ufffd")) for n in range(len(ids))],
            "log_probabilities": [round(float(own), 4) for own, _ in told],
            "margins": [round(float(own - other), 4) for own, other in told],
        }
