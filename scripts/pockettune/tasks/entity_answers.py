"""How entities are written as an answer, read back from one, and found in the text.

An answer is a JSON list of pairs, `[["type","name"],...]`, in the order of the text, so that the model
writes them as it reads and that a name which stands in the text several times is meant left to right.
Two bases learned it better than a line an entity, `type: name`: benchmarks/tasks.md.
"""

import json
from collections.abc import Sequence

from pockettune.tasks.shared import quote_gbnf

Named = tuple[str, str]  # an entity's type, as answered, and its name
LONGEST_NAME, MOST_ENTITIES = 64, 64  # which a grammar allows: a model that repeats itself must end


def write_answer(entities: Sequence[Named]) -> str:
    return _as_json([list(entity) for entity in entities])


def read_answer(answer: str) -> list[Named] | None:
    """Return the entities of an answer; None for what is no list of pairs of texts."""
    try:
        found = json.loads(answer)
        _as_json(found).encode()  # half a character, such as \ud83d, can be written nowhere
    except (ValueError, RecursionError):  # the latter for a model that writes brackets to its limit
        return None
    if not isinstance(found, list) or not all(map(_is_pair, found)):
        return None
    return [(kind, name) for kind, name in found]


def salvage_answer(answer: str) -> str:
    """Return an answer that was cut at its limit without the entity that it was cut in."""
    end = answer.rfind("]")
    while end >= 0 and read_answer(whole := answer[:end] + "]]") is None:
        end = answer.rfind("]", 0, end)  # that one stood in a name
    return whole if end >= 0 else ""


def write_grammar(types: Sequence[str]) -> str:
    """Return GBNF of an answer with entities of given types, or none."""
    return (
        f'root ::= "[" (entity ("," entity){{0,{MOST_ENTITIES - 1}}})? "]"\n'
        f'entity ::= "[" type "," "\\"" character{{1,{LONGEST_NAME}}} "\\"" "]"\n'
        'character ::= [^"\\\\\\x00-\\x1f] | "\\\\" ["\\\\bfnrt]\n'
        f"type ::= {' | '.join(quote_gbnf(_as_json(kind)) for kind in types)}\n"
    )


def _as_json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _is_pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(v, str) for v in value)


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
    start = text.find(name, behind) if name else -1
    while start >= 0 and any(
        start < end and first < start + len(name) for *_, first, end in placed
    ):
        start = text.find(name, start + 1)
    return start
