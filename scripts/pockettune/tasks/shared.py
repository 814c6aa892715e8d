"""What the tasks that answer with text have in common."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Defuse = Callable[[str], str]  # puts spaces into a text where it holds control tokens


def ask(system: str | None, question: str) -> list[dict[str, str]]:
    """Return the messages that ask a question."""
    asked = {"role": "user", "content": question}
    return [{"role": "system", "content": system}, asked] if system else [asked]


def fill(template: str, texts: Mapping[str, str]) -> str:
    """Put texts into a template's {names}, in one pass: what stands in a text is no place."""
    filled, rest = [], template
    while places := [(rest.find(f"{{{name}}}"), name) for name in texts if f"{{{name}}}" in rest]:
        start, name = min(places)
        filled += [rest[:start], texts[name]]
        rest = rest[start + len(name) + 2 :]
    return "".join([*filled, rest])


def read_text(row: Mapping[str, Any], column: str) -> str:
    """Return the text of a cell; ValueError where there is none."""
    value = row[column]
    if is_missing(value) or (isinstance(value, str) and not value.strip()):
        raise ValueError(f"{column} is empty")
    if not isinstance(value, str):
        raise ValueError(f"{column} is {value!r}, not text")
    return value


def is_missing(value: Any) -> bool:
    """Whether a cell is empty, as a table's reader marks it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def as_plain(value: Any) -> Any:
    """Return nested values as lists and dicts: a parquet file's come as arrays."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [as_plain(part) for part in value]
    if isinstance(value, Mapping):
        return {str(key): as_plain(part) for key, part in value.items()}
    return value


def move_places(text: str, changed: str, places: Sequence[int]) -> list[int]:
    """Return where places of a text are in `changed`, which has spaces more and nothing else."""
    moved, at = [], 0
    for character in text:
        while changed[at] != character:
            at += 1
        moved.append(at)
        at += 1
    moved.append(len(changed))
    # A place is also an end, which stands behind the character before it.
    return [moved[place - 1] + 1 if place else 0 for place in places]


def ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def quote_gbnf(text: str) -> str:
    """Write a text as a literal of llama.cpp's grammars."""
    escapes = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"}
    return '"' + "".join(escapes.get(character, character) for character in text) + '"'
