"""Reads the entities of a row, labelled in one of three ways.

BIO      labels: [O, B-PER, I-PER, …], one a token; S- is an entity of one token, E- ends one and
         M- is within one, as BIOES and BMES have them
spans    labels: [[0, 2, PER], …] or [{start: 0, end: 2, type: PER}, …], from the first character
         to the one behind the last
CLUENER  labels: {PER: {name: [[0, 1], …]}}, from the first character to the last (the format of
         CLUEbenchmark/CLUENER2020)
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from pockettune.common.errors import list_faults


class Span(NamedTuple):
    """An entity's type and its characters, `end` behind the last."""

    type: str
    start: int
    end: int


# Scripts that are written without spaces between words, and their punctuation.
UNSPACED = re.compile(r"[\u2e80-\u9fff\uf900-\ufaff\ufe30-\ufe4f\uff00-\uffef]")
BIO_LABEL = re.compile(r"([BIMES])-(.+)")


def read_entities(text: Any, labels: Any) -> tuple[str, list[Span]]:
    """Return a row's text and its entities, in the order of the text.

    White space at the ends of an entity is left out of it. Raises ValueError naming every fault.
    """
    faults: list[str] = []
    if isinstance(labels, list) and all(isinstance(label, str) for label in labels) and labels:
        tokens = list(text) if isinstance(text, str) else text
        text, spans = _read_tags(tokens, labels, faults)
    else:
        text = join_tokens(text)[0] if isinstance(text, list) else text
        if isinstance(labels, Mapping):
            spans = list(_read_names(text, labels, faults))
        elif isinstance(labels, list):
            spans = list(_read_spans(text, labels, faults))
        else:
            raise ValueError(f"labels are {labels!r}, not BIO labels, spans or names by type")
    spans = sorted((trim(text, span) for span in spans), key=lambda span: span[1:])
    faults += _find_clashes(text, spans)
    if faults:
        raise ValueError(list_faults(faults))
    return text, spans


def join_tokens(tokens: Sequence[str]) -> tuple[str, list[int]]:
    """Return the text of tokens and where each begins.

    Tokens of one character are its characters; words have a space between them, unless one of the two
    is of a script that is written without.
    """
    if not tokens or not all(isinstance(token, str) and token for token in tokens):
        raise ValueError("a token is empty or no text")
    characters = all(len(token) == 1 for token in tokens)
    text, starts = "", []
    for token in tokens:
        if not (characters or not text or UNSPACED.match(text[-1]) or UNSPACED.match(token)):
            text += " "
        starts.append(len(text))
        text += token
    return text, starts


def _read_tags(
    tokens: Sequence[str], labels: Sequence[str], faults: list[str]
) -> tuple[str, list[Span]]:
    if len(tokens) != len(labels):
        raise ValueError(f"it has {len(tokens)} tokens and {len(labels)} labels")
    text, starts = join_tokens(tokens)
    spans: list[Span] = []
    within = None  # the type of the entity that may go on
    for number, (token, start, label) in enumerate(zip(tokens, starts, labels, strict=True), 1):
        match = BIO_LABEL.fullmatch(label)
        if not match:
            if label != "O":
                faults.append(f"label {number} is {label!r}, not O, B-type or I-type")
            within = None
            continue
        place, kind = match.groups()
        end = start + len(token)
        if kind == within and place not in "BS":
            spans[-1] = spans[-1]._replace(end=end)
        else:
            spans.append(Span(kind, start, end))
            if place not in "BS":
                where = f"within {within}" if within else "and begins an entity"
                faults.append(f"label {number} is {label} {where}; write B-{kind}")
        within = None if place in "SE" else kind
    return text, spans


def _read_spans(text: str, labels: Sequence[Any], faults: list[str]) -> Iterator[Span]:
    for label in labels:
        if isinstance(label, Mapping):
            label = [label.get("start"), label.get("end"), label.get("type", label.get("label"))]
        if not (
            isinstance(label, list)
            and [type(part) for part in label] == [int, int, str]
            and 0 <= label[0] < label[1]
        ):
            faults.append(f"{label!r} is not a start, an end behind it and a type")
        elif label[1] > len(text):
            faults.append(f"{label!r} ends behind the text of {len(text)} characters")
        else:
            yield Span(label[2], label[0], label[1])


def _read_names(text: str, labels: Mapping[str, Any], faults: list[str]) -> Iterator[Span]:
    for kind, names in labels.items():
        for name, places in (names or {}).items():
            for place in places or []:  # a parquet file has every name in every row
                if not isinstance(place, list) or [type(part) for part in place] != [int, int]:
                    faults.append(f"{kind} {name!r}: {place!r} is not its first and last character")
                elif (found := text[place[0] : place[1] + 1]) != name or place[0] < 0:
                    faults.append(f"{kind} {name!r} is not at {place}, where {found!r} stands")
                else:
                    yield Span(kind, place[0], place[1] + 1)


def trim(text: str, span: Span) -> Span:
    """Return a span without the white space at its ends, as it is where there is nothing else."""
    name = text[span.start : span.end]
    start = span.start + len(name) - len(name.lstrip())
    return span._replace(start=start, end=start + len(name.strip())) if name.strip() else span


def _find_clashes(text: str, spans: Sequence[Span]) -> Iterator[str]:
    """Yield what no answer can say: entities that overlap, and empty names."""
    for before, span in pairwise(spans):
        if span.start < before.end:
            pair = " and ".join(f"{s.type} {text[s.start : s.end]!r}" for s in (before, span))
            yield f"{pair} overlap; keep one of them"
    for span in spans:
        name = text[span.start : span.end]
        if not name.strip():
            yield f"{span.type} {name!r} is empty"
