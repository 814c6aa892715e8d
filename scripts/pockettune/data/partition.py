"""Which texts are the same, and which split a row of one file falls into."""

import hashlib
import unicodedata
from collections.abc import Mapping, Sequence
from functools import partial

SPLITS = ("test", "validation", "train")


def normalise_text(text: str) -> str:
    """Return what two texts have alike that differ in case, width or white space alone."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def digest(seed: int, text: str) -> bytes:
    return hashlib.sha256(f"{seed} {text}".encode(errors="surrogatepass")).digest()


def cut_rows(
    texts: Sequence[str], labels: Sequence[str], shares: Mapping[str, float], seed: int
) -> dict[str, list[int]]:
    """Return the rows of each split, in their order: of each label's texts the share of each.

    Of each label, the texts are taken in the order of a hash: rows of the same text fall together,
    and a new row leaves all others where they are, but for one beside each cut. A text of several
    labels counts for the first of them. `shares` has those of test and validation.
    """
    label_of: dict[str, str] = {}
    keys = [normalise_text(text) for text in texts]
    for key, label in zip(keys, labels, strict=True):
        label_of[key] = min(label, label_of.get(key, label))
    groups: dict[str, list[str]] = {}
    for key in sorted(label_of, key=partial(digest, seed)):
        groups.setdefault(label_of[key], []).append(key)
    split_of = {}
    for label, group in groups.items():
        # Rounded up for some labels and down for others: many labels of few texts get their share.
        part = int.from_bytes(digest(seed, label)[:4]) / 2**32
        first = int(len(group) * shares["test"] + part)
        second = int(len(group) * (shares["test"] + shares["validation"]) + part)
        for place, key in enumerate(group):
            split_of[key] = SPLITS[(place >= first) + (place >= second)]
    rows: dict[str, list[int]] = {split: [] for split in SPLITS}
    for row, key in enumerate(keys):
        rows[split_of[key]].append(row)
    return rows
