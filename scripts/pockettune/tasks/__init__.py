"""Tasks: what is asked of the model, what it may answer, and how the answers are scored.

Everything that differs between classifying reviews, finding entities and answering questions
is in one object with the methods of `Task`; the programs know no task by name. A new task is a
module in this folder and a line in `TASKS`. There are two kinds: the answer is one of a few (`constrain`
names them, and they are scored by their probabilities), or it is text (`TextTask`), which is generated.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from pockettune.common.errors import UserError
from pockettune.tasks.answer import Answer
from pockettune.tasks.chat import Chat
from pockettune.tasks.classification import Classification
from pockettune.tasks.entities import Entities

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

    metric: str
    """The number of `score` that verdict, choice and report go by; between 0 and 1."""

    @property
    def columns(self) -> Sequence[str]:
        """Columns of the dataset that `read` takes, the text's first."""

    @property
    def optional_columns(self) -> Sequence[str]:
        """Others that it takes where they are there."""

    def settle(self, tables: Sequence["pd.DataFrame"]) -> None:
        """Decide from the rows of all splits how `read` reads them; UserError where it is unclear."""

    def read(self, row: Mapping[str, object]) -> Record:
        """Turn a row of the dataset into a record's fields; ValueError says what is wrong with it."""

    def trial(self) -> Record:
        """Return a record whose texts are their names in braces: its prompt is what all have alike."""

    def prompt(self, record: Record) -> list[Message]:
        """Return the messages that ask the question."""

    def answer(self, record: Record) -> str:
        """Return the text that the model is trained to answer."""

    def clean(self, record: Record, defuse: Callable[[str], str]) -> Record:
        """Return the record with `defuse` applied to every text in it that comes from the data."""

    def shorten(self, record: Record, excess: int, cut: Callable[[str, int], str]) -> Record | None:
        """Return the record about `excess` tokens shorter; None where nothing is left of it.

        `cut` drops the last tokens of a text, at least one character.
        """

    def constrain(self) -> list[str]:
        """Return every answer that is allowed, in a fixed order; none where any text is."""

    def parse(self, text: str, record: Record | None = None) -> Any | None:
        """Return the prediction that an answer stands for; None where it is not understood."""

    def score(self, references: Sequence[Any], predictions: Sequence[Any]) -> dict[str, Any]:
        """Return the metrics of `predictions` against `references`."""


class TextTask(Task, Protocol):
    """A task whose answer is text. References and predictions are what JSON can hold."""

    max_answer_tokens: int

    forced: bool
    """Whether it is scored by the reference answers, read token by token, and not by what is
    generated: a prediction is then [tokens that were the likeliest, tokens]."""

    def questions(
        self, record: Record, count_tokens: Callable[[Record], int], room: int
    ) -> list[Record]:
        """Return what is asked about a record, each a record that `prompt` and `answer` take.

        `count_tokens` tells the tokens of a question's prompt, which should fit into `room`.
        """

    def reference(self, record: Record) -> Any:
        """Return what is compared with the prediction of a whole record."""

    def salvage(self, text: str) -> str:
        """Return what of an answer can be used that did not end within max_answer_tokens."""

    def combine(self, predictions: Sequence[Any], log_probabilities: Sequence[float]) -> Any:
        """Return the prediction of a record out of those of its questions."""

    def counts(self, reference: Any, prediction: Any) -> tuple[float, ...]:
        """Return numbers that are summed over the records for `measure`."""

    def measure(self, sums: Sequence[float]) -> float:
        """Return the metric of summed `counts`."""

    def grammar(self) -> str | None:
        """Return every allowed answer as a GBNF grammar of llama.cpp; None where any text is."""


TASKS: dict[str, Callable[..., Any]] = {
    "classification": Classification,
    "entities": Entities,
    "answer": Answer,
    "chat": Chat,
}


def as_text_task(task: Task) -> TextTask | None:
    """Return the task where its answers are text, else None."""
    return None if task.constrain() else task  # type: ignore[return-value]


def load_task(settings: Mapping[str, Any], columns: Mapping[str, str]) -> Task:
    """Return the task described by config.yaml's `task:`, reading the columns of `dataset:`."""
    if settings["type"] not in TASKS:
        raise UserError(f"task.type {settings['type']!r} is not one of {', '.join(TASKS)}")
    return TASKS[settings["type"]](settings, columns)
