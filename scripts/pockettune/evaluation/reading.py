"""Reads a text's reference answers with a model, token by token, whatever runtime computes it.

Nothing is generated: behind the question and what of the answer has been read stands how likely the
model finds the next token ("teacher forcing"). So every model is asked about the same tokens.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pockettune.common.program import progress
from pockettune.data.prompts import Example
from pockettune.evaluation.statistics import kl_divergence, normalise

Tokens = Sequence[int]

# Takes sequences of token ids and places in each, yields the logits behind those places:
# (places, vocabulary), float32.
LogitsAt = Callable[[Sequence[Tokens], Sequence[Sequence[int]]], Iterable[np.ndarray]]


@dataclass(frozen=True)
class Reading:
    """What a model makes of an example's answers."""

    tokens: int
    log_probability: float  # of all tokens together, in nats
    right: int  # tokens that are the likeliest
    # KL(F16 || this model) at each token, in nats, and where its likeliest token is F16's; None: not compared.
    divergence: np.ndarray | None = None
    likeliest_equal: np.ndarray | None = None


def read_answers(
    logits_at: LogitsAt,
    examples: Sequence[Example],
    description: str,
    reference: LogitsAt | None = None,
    kept: Sequence[int] | None = None,
) -> Iterator[Reading]:
    """Yield a reading an example, compared with what F16, the `reference`, computes beside it.

    Both are computed as they are compared: kept on the disk, the logits of a thousand answers over a
    large vocabulary would take gigabytes. Where F16's vocabulary was trimmed, `kept` are its tokens' ids
    here, and the reference is asked for the same tokens under its own ids; what holds others, as a text
    that train had not, is read and not compared.
    """
    sequences = [example.ids()[:-1] for example in examples]
    places = [[place - 1 for place in example.learned()] for example in examples]
    own = logits_at(sequences, places)
    own_places = places_of(kept)
    numbered = [renumber(sequence, own_places) for sequence in sequences]
    others: Iterator[np.ndarray] = iter(())
    if reference:
        shared = [(s, p) for s, p in zip(numbered, places, strict=True) if s is not None]
        others = iter(reference([s for s, _ in shared], [p for _, p in shared]))
    rows = progress(own, description=description, unit="rows", total=len(examples))
    for example, logits, shared_ids in zip(examples, rows, numbered, strict=True):
        ids = example.ids()
        targets = [ids[place] for place in example.learned()]
        other = next(others) if reference and shared_ids is not None else None
        yield read(logits, targets, other, kept)


def read(
    logits: np.ndarray, targets: Tokens, other: np.ndarray | None, kept: Sequence[int] | None
) -> Reading:
    """Return the reading of logits (tokens, vocabulary) and of the reference's."""
    scores = normalise(logits)
    likeliest = logits.argmax(axis=1)
    divergence = equal = None
    if other is not None:
        shown = logits if kept is None else logits[:, list(kept)]
        width = min(shown.shape[1], other.shape[1])  # of a padded vocabulary, what both have
        # Of the whole vocabulary that is done already.
        whole = kept is None and width == logits.shape[1]
        own = scores if whole else normalise(shown[:, :width])
        expected = normalise(other[:, :width])
        divergence = kl_divergence(expected, own)
        equal = expected.argmax(axis=1) == own.argmax(axis=1)
    return Reading(
        tokens=len(targets),
        log_probability=float(scores[np.arange(len(targets)), targets].sum()),
        right=int((likeliest == targets).sum()),
        divergence=divergence,
        likeliest_equal=equal,
    )


def places_of(kept: Sequence[int] | None) -> dict[int, int] | None:
    """Return by each token's id that in a trimmed vocabulary, which `kept` lists; None without one."""
    return None if kept is None else {token: place for place, token in enumerate(kept)}


def renumber(sequence: Tokens, places: Mapping[int, int] | None) -> list[int] | None:
    """Return a sequence in the ids of a trimmed vocabulary, its `places` by token; None where it lacks one."""
    if places is None:
        return list(sequence)
    found = [places.get(token) for token in sequence]
    return None if None in found else [place for place in found if place is not None]


def describe_reading(readings: Sequence[Reading]) -> dict[str, Any]:
    """Return token_accuracy and loss, minus the mean log probability of a token."""
    tokens = sum(reading.tokens for reading in readings)
    return {
        "token_accuracy": sum(reading.right for reading in readings) / tokens,
        "loss": -sum(reading.log_probability for reading in readings) / tokens,
    }
