"""What a check says, and how checks are run side by side within a time limit."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

State = Literal["ok", "warning", "problem"]
Value = TypeVar("Value")


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, how it is, and what to do where it is not well."""

    name: str
    state: State
    detail: str
    remedy: str = ""
    items: Mapping[str, int | None] = field(default_factory=dict)  # bytes each; None is not known


def judge(
    name: str, fault: str | None, detail: str, remedy: str = "", state: State = "problem"
) -> Finding:
    """Return `ok` with `detail`, or, where there is a fault, `state` with fault and remedy."""
    return Finding(name, state, fault, remedy) if fault else Finding(name, "ok", detail)


def in_words(count: float) -> str:
    """Return bytes in words."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.0f} MB"


class Once(Generic[Value]):
    """What several checks need and the first that asks computes; the others wait for it."""

    def __init__(self, compute: Callable[[], Value]) -> None:
        self._compute, self._lock = compute, threading.Lock()
        self._value: list[Value] = []

    def __call__(self) -> Value:
        with self._lock:
            if not self._value:
                self._value.append(self._compute())
        return self._value[0]


class TooLateError(Exception):
    """A call has not ended in its time."""


def side_by_side(calls: Mapping[str, Callable[[], Any]], end: float) -> Iterator[tuple[str, Any]]:
    """Run all calls at once; yield (name, result or exception), in order.

    `end` is of time.monotonic(). What has not ended by then is left behind with a TooLateError: the threads
    are daemons, so that a name server that never answers does not hold the process.
    """
    results: dict[str, Any] = {}

    def work(name: str, call: Callable[[], Any]) -> None:
        try:
            results[name] = call()
        except Exception as error:
            results[name] = error

    threads = {
        name: threading.Thread(target=work, args=(name, call), daemon=True)
        for name, call in calls.items()
    }
    for thread in threads.values():
        thread.start()
    for name, thread in threads.items():
        thread.join(max(end - time.monotonic(), 0))
        yield name, results.get(name, TooLateError())
