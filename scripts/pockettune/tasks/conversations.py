"""Reads conversations as the files of three traditions have them.

messages   [{"role": "user", "content": …}, {"role": "assistant", "content": …}]
sharegpt   [{"from": "human", "value": …}, {"from": "gpt", "value": …}]
alpaca     a column each: instruction, input (may be empty), output
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from pockettune.common.errors import list_faults

Message = dict[str, str]

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}


def read_turns(turns: Any) -> list[Message]:
    """Return a list of turns as messages; ValueError names all that is wrong with them."""
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{turns!r} is not a list of turns")
    faults: list[str] = []
    messages = [
        message
        for number, turn in enumerate(turns, start=1)
        if (message := _read_turn(turn, number, faults))
    ]
    # Of turns that cannot be read it is not known who speaks.
    faults += [] if faults else find_faults(messages)
    if faults:
        raise ValueError(list_faults(faults))
    return messages


def read_instruction(instruction: str, extra: str, output: Any) -> list[Message]:
    """Return an instruction, with the input that it is about below it, and its output as messages."""
    question = f"{instruction}\n{extra}" if extra.strip() else instruction
    return read_turns(
        [{"role": "user", "content": question}, {"role": "assistant", "content": output}]
    )


def _read_turn(turn: Any, number: int, faults: list[str]) -> Message | None:
    if not isinstance(turn, Mapping):
        faults.append(f"turn {number} is {turn!r}, not role and content")
        return None
    keys = ("role", "content") if turn.get("role") is not None else ("from", "value")
    role, content = (turn.get(key) for key in keys)
    if role not in ROLES:
        known = ", ".join(ROLES)
        faults.append(f"turn {number}: role {role!r} is not one of {known}")
    elif not isinstance(content, str):
        faults.append(f"turn {number} ({role}) is {content!r}, not text")
    else:
        return {"role": ROLES[role], "content": content}
    return None


def find_faults(messages: Sequence[Message]) -> Iterator[str]:
    """Yield what is wrong with the order of a conversation, and its empty turns."""
    roles = [message["role"] for message in messages]
    for number, message in enumerate(messages, start=1):
        if not message["content"].strip():
            yield f"turn {number} ({message['role']}) is empty"
    if late := [
        number for number, role in enumerate(roles, start=1) if number > 1 and role == "system"
    ]:
        yield f"turn {late[0]} is the system's, which must be the first"
    start = 1 if roles[0] == "system" else 0
    talk = [(n, role) for n, role in enumerate(roles[start:], start + 1) if role != "system"]
    if not talk:
        yield "it has no turn but the system's"
        return
    if talk[0][1] == "assistant":
        yield "it begins with the assistant"
    for (_, before), (number, role) in pairwise(talk):
        if role == before:
            yield f"turn {number}: {role} follows {before}; join the two"
    if talk[-1][1] == "user":
        yield "it ends with the user; take the last turn away"
