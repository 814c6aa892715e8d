"""Scores entities by type and place, as conlleval and seqeval do."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from pockettune.tasks.shared import ratio

# An entity: its type, name, first character and the one behind its last; -1 and -1 for a name that does
# not stand in the text, which a phone does not show either.
Entity = Sequence[Any]
Entities = Sequence[Entity]

KINDS = (
    "type",  # the right place, another type
    "boundary",  # overlaps one that was to find
    "missing",  # was to find, and no prediction overlaps it
    "made_up",  # overlaps none that was to find
    "not_in_text",  # its name does not stand there, so that it counts for nothing
)


def _spans(entities: Entities | None) -> set[tuple[str, int, int]]:
    """Return type, start and end of those that stand in the text."""
    return {(kind, start, end) for kind, _, start, end in entities or [] if start >= 0}


def count_right(reference: Entities, prediction: Entities | None) -> tuple[float, ...]:
    """Return how many entities are right, were predicted, and were to find."""
    wanted, found = _spans(reference), _spans(prediction)
    return float(len(wanted & found)), float(len(found)), float(len(wanted))


def score_entities(
    references: Sequence[Entities], predictions: Sequence[Entities | None], types: Sequence[str]
) -> dict[str, Any]:
    """Return micro and macro F1, each type's scores, and the errors by kind.

    An entity is right where type, start and end are. Macro F1 is the mean over the types that occur in
    `references` or `predictions`. Equal to seqeval 1.2.2 (its default mode) on the same entities, but
    for 1 instead of 0 where there was nothing to find and nothing was found.
    """
    right: Counter[str] = Counter()
    predicted: Counter[str] = Counter()
    wanted: Counter[str] = Counter()
    for reference, prediction in zip(references, predictions, strict=True):
        gold, found = _spans(reference), _spans(prediction)
        for counter, spans in ((right, gold & found), (predicted, found), (wanted, gold)):
            counter.update(kind for kind, *_ in spans)
    total = _scores(right.total(), predicted.total(), wanted.total())
    present = [kind for kind in dict.fromkeys(types) if predicted[kind] or wanted[kind]]
    per_type = {kind: _scores(right[kind], predicted[kind], wanted[kind]) for kind in present}
    errors: Counter[str] = Counter()
    for reference, prediction in zip(references, predictions, strict=True):
        errors.update(kinds_of_error(reference, prediction))
    return {
        "micro_f1": total["f1"] if present else 1.0,
        "macro_f1": sum(s["f1"] for s in per_type.values()) / len(present) if present else 1.0,
        "precision": total["precision"],
        "recall": total["recall"],
        "per_type": per_type,
        "errors": {kind: errors[kind] for kind in KINDS},
    }


def _scores(right: int, predicted: int, wanted: int) -> dict[str, Any]:
    return {
        "precision": ratio(right, predicted),
        "recall": ratio(right, wanted),
        "f1": ratio(2 * right, predicted + wanted),
        "n": wanted,
    }


def kinds_of_error(reference: Entities, prediction: Entities | None) -> Counter[str]:
    """Count a row's errors by kind, see KINDS."""
    gold, found = _spans(reference), _spans(prediction)
    places = {(start, end) for _, start, end in gold}
    kinds: Counter[str] = Counter()
    for span in found - gold:
        if span[1:] in places:
            kinds["type"] += 1
        else:
            kinds["boundary" if any(_overlap(span, other) for other in gold) else "made_up"] += 1
    kinds["not_in_text"] = sum(start < 0 for *_, start, _ in prediction or [])
    kinds["missing"] = sum(not any(_overlap(span, other) for other in found) for span in gold)
    return kinds


def _overlap(a: tuple[str, int, int], b: tuple[str, int, int]) -> bool:
    return a[1] < b[2] and b[1] < a[2]
