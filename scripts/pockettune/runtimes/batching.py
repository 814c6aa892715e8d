"""Cuts work into batches of a bounded number of tokens, and finds what prompts have in common."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def common_prefix(sequences: Sequence[Sequence[int]]) -> list[int]:
    """Return what all sequences start with, leaving each at least one token of its own."""
    # In dictionary order the first and the last differ first.
    ordered = sorted(map(list, sequences))
    first, last = ordered[0], ordered[-1]
    length = 0
    while length < min(map(len, sequences)) - 1 and first[length] == last[length]:
        length += 1
    return first[:length]


def group_by_tokens(
    items: Iterable[Item],
    limit: float,
    count_tokens: Callable[[Item], int],
    most_items: int | None = None,
) -> Iterator[list[Item]]:
    """Cut items, in order, into groups of at most `limit` tokens and `most_items`, or of one item."""
    group: list[Item] = []
    tokens = 0
    for item in items:
        if group and (len(group) == most_items or tokens + count_tokens(item) > limit):
            yield group
            group, tokens = [], 0
        group.append(item)
        tokens += count_tokens(item)
    if group:
        yield group
