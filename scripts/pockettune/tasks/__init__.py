"""Tasks: what is asked of the model, what it may answer, and how the answers are scored.

Everything that differs between classifying reviews, finding entities and answering questions
is in one object with the methods of `Task`; the programs know no task by name. A new task is a
module in this folder and a line in `TASKS`.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from pockettune.common.errors import UserError
from pockettune.tasks.classification import Classification

if TYPE_CHECKING:
    import pandas as pd

Record = dict[str, Any]  # "id", and the fields that the task's `read` returns
Message = dict[str, str]  # "role" and "content", as chat templates take them


class Task(Protocol):
    """What the programs need to know of a task."""

    text_field: str
    """The record's field that is compared for duplicates and cut when a prompt is too long."""

    template_options: Mapping[str, Any]
    """Variables that the chat template is given, such as enable_thinking."""

    def settle(self, tables: Sequence["pd.DataFrame"]) -> None:
        """Decide from the rows of all splits how `read` reads them; UserError where it is unclear."""

    def read(self, row: Mapping[str, object]) -> Record:
        """Turn a row of the dataset into a record's fields; ValueError says what is wrong with it."""

    def prompt(self, record: Record) -> list[Message]:
        """Return the messages that ask the question."""

    def answer(self, record: Record) -> str:
        """Return the text that the model is trained to answer."""

    def constrain(self) -> list[str]:
        """Return every answer that is allowed, in a fixed order."""

    def parse(self, text: str) -> str | None:
        """Return the prediction that an answer stands for; None where it is not understood."""

    def score(self, references: Sequence[str], predictions: Sequence[str]) -> dict[str, Any]:
        """Return the metrics of `predictions` against `references`."""


TASKS = {"classification": Classification}


def load_task(settings: Mapping[str, Any], columns: Mapping[str, str]) -> Task:
    """Return the task described by config.yaml's `task:`, reading the columns of `dataset:`."""
    if settings["type"] not in TASKS:
        raise UserError(f"task.type {settings['type']!r} is not one of {', '.join(TASKS)}")
    return TASKS[settings["type"]](settings, columns)
