"""How entities are written as an answer, read back from one, and found in the text.

Entities come in the order of the text, so that the model writes them as it reads and that a name which
stands in the text several times is meant left to right.
"""

import json
from collections.abc import Callable, Sequence
from typing import NamedTuple

from pockettune.tasks.shared import quote_gbnf

Named = tuple[str, str]  # an entity's type, as answered, and its name
LONGEST_NAME, MOST_ENTITIES = 64, 64  # which a grammar allows: a model that repeats itself must end


class AnswerFormat(NamedTuple):
    """A way to write entities; `read` returns None for what is not written in it."""

    write: Callable[[Sequence[Named]], str]
    read: Callable[[str], list[Named] | None]
    grammar: Callable[[Sequence[str]], str]  # of the rule `entities`, at least one of given types


def _write_lines(entities: Sequence[Named]) -> str:
    return "\n".join(f"{kind}: {name}" for kind, name in entities)


def _read_lines(text: str) -> list[Named] | None:
    parts = [line.partition(": ") for line in text.split("\n")]
    return [(kind, name.strip()) for kind, _, name in parts] if all(p[2] for p in parts) else None


def _line_grammar(types: Sequence[str]) -> str:
    return (
        f'entities ::= entity ("\\n" entity){{0,{MOST_ENTITIES - 1}}}\n'
        'entity ::= type ": " name\n'
        f"name ::= [^ \\t\\r\\n] [^\\r\\n]{{0,{LONGEST_NAME - 1}}}\n"
        f"type ::= {' | '.join(map(quote_gbnf, types))}\n"
    )


def _write_json(entities: Sequence[Named]) -> str:
    return json.dumps(entities, ensure_ascii=False, separators=(",", ":"))


def _read_json(text: str) -> list[Named] | None:
    try:
        return [(str(kind), str(name)) for kind, name in json.loads(text)]
    except (ValueError, TypeError):
        return None


def _json_grammar(types: Sequence[str]) -> str:
    words = " | ".join(quote_gbnf(_write_json([kind])[1:-1]) for kind in types)  # type: ignore[list-item]
    return (
        f'entities ::= "[" entity ("," entity){{0,{MOST_ENTITIES - 1}}} "]"\n'
        'entity ::= "[" type "," "\\"" character'
        f'{{1,{LONGEST_NAME}}} "\\"" "]"\n'
        'character ::= [^"\\\\\\x00-\\x1f] | "\\\\" ["\\\\]\n'
        f"type ::= {words}\n"
    )


LINES = AnswerFormat(_write_lines, _read_lines, _line_grammar)
JSON = AnswerFormat(_write_json, _read_json, _json_grammar)
FORMAT = LINES  # until the two are measured; then the other goes


def place_names(entities: Sequence[Named], text: str) -> list[tuple[str, str, int, int]]:
    """Return each entity's type, name, first character and the one behind its last.

    Each takes the next place of its name that no other has, behind the entity before it, or else before
    it; -1 and -1 where there is none left, as for a name that does not stand in the text.
    """
    placed: list[tuple[str, str, int, int]] = []
    behind = 0
    for kind, name in entities:
        start = _free_place(name, text, behind, placed)
        if start < 0:
            start = _free_place(name, text, 0, placed)
        if start < 0:
            placed.append((kind, name, -1, -1))
            continue
        behind = start + len(name)
        placed.append((kind, name, start, behind))
    return placed


def _free_place(
    name: str, text: str, behind: int, placed: Sequence[tuple[str, str, int, int]]
) -> int:
    start = text.find(name, behind)
    while start >= 0 and any(
        start < end and first < start + len(name) for *_, first, end in placed
    ):
        start = text.find(name, start + 1)
    return start
