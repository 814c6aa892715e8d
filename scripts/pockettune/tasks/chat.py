"""Chat: conversations, of which every turn of the assistant is learned."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pockettune.tasks.conversations import read_instruction, read_turns
from pockettune.tasks.shared import Defuse, as_plain, is_missing, ratio, read_text

if TYPE_CHECKING:
    import pandas as pd

Record = dict[str, Any]


class Chat:
    """The model answers in a conversation; its right answers are read, not compared with its own."""

    text_field = "text"
    metric = "token_accuracy"
    forced = True

    def __init__(self, settings: Mapping[str, Any], columns: Mapping[str, Any]) -> None:
        self.system = settings["system"]
        self.template_options: Mapping[str, Any] = settings["template_options"]
        self.max_answer_tokens: int = settings["max_answer_tokens"]
        self.text_column = columns["text_column"]
        self.label_column = columns["label_column"]
        self.columns: Sequence[str] = [
            name for name in (self.text_column, self.label_column) if name
        ]
        self.optional_columns: Sequence[str] = ["input", "system"]

    def settle(self, tables: Sequence["pd.DataFrame"]) -> None:
        """Each row says by itself how its conversation is written."""

    def read(self, row: Mapping[str, Any]) -> Record:
        """Return {"text", "messages"}: the user's first message, and all of them.

        The text column holds turns, or an instruction whose output is in the label column and which the
        column input may go on. A column system, or else task.system, is put before a conversation that
        has no system message.
        """
        opening = as_plain(row[self.text_column])
        extra, system = (
            "" if is_missing(row.get(name)) else str(row[name]) for name in self.optional_columns
        )
        if isinstance(opening, list):
            messages = read_turns(opening)
        elif self.label_column:
            opening = read_text(row, self.text_column)
            messages = read_instruction(opening, extra, read_text(row, self.label_column))
        else:
            told = "empty" if is_missing(opening) else f"{opening!r}, not a list of turns"
            raise ValueError(f"{self.text_column} is {told}")
        system = system.strip() or self.system
        if system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
        first = next(message for message in messages if message["role"] == "user")
        return {"text": first["content"], "messages": messages}

    def trial(self) -> Record:
        return {"id": "(a trial)", "text": "{text}", "messages": self._frame()}

    def _frame(self) -> list[dict[str, str]]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": "{text}"}]

    def clean(self, record: Record, defuse: Defuse) -> Record:
        messages = [{**m, "content": defuse(m["content"])} for m in record["messages"]]
        return {**record, "text": defuse(record["text"]), "messages": messages}

    def shorten(self, record: Record, excess: int, cut: Callable[[str, int], str]) -> Record | None:
        """Return the question without its oldest exchange; of the only one, the user's message is cut."""
        messages = record["messages"]
        start = 1 if messages[0]["role"] == "system" else 0
        if len(messages) > start + 2:
            return {**record, "messages": [*messages[:start], *messages[start + 2 :]]}
        asked = messages[start]
        if not asked["content"]:
            return None
        asked = {**asked, "content": cut(asked["content"], excess)}
        return {**record, "messages": [*messages[:start], asked, *messages[start + 1 :]]}

    def prompt(self, record: Mapping[str, Any]) -> list[dict[str, str]]:
        """Return the messages before the last answer."""
        messages = record["messages"]
        return messages[:-1] if messages[-1]["role"] == "assistant" else messages

    def questions(
        self, record: Record, count_tokens: Callable[[Record], int], room: int
    ) -> list[Record]:
        """Return the conversation up to each turn of the assistant."""
        messages = record["messages"]
        return [
            {**record, "messages": messages[: place + 1]}
            for place, message in enumerate(messages)
            if message["role"] == "assistant"
        ]

    def answer(self, record: Mapping[str, Any]) -> str:
        """Return the last answer of a conversation."""
        return record["messages"][-1]["content"]

    def constrain(self) -> list[str]:
        return []

    def reference(self, record: Mapping[str, Any]) -> list[str]:
        """Return the assistant's turns."""
        return [m["content"] for m in record["messages"] if m["role"] == "assistant"]

    def parse(self, text: str, record: Mapping[str, Any] | None = None) -> str | None:
        return text.strip() or None

    def salvage(self, text: str) -> str:
        return text

    def combine(
        self, predictions: Sequence[Sequence[float]], log_probabilities: Sequence[float]
    ) -> list[float]:
        """Return the likeliest tokens that were right, and all tokens, of a conversation's answers."""
        return [sum(column) for column in zip(*predictions, strict=True)]

    def counts(self, reference: Sequence[str], prediction: Sequence[float]) -> tuple[float, ...]:
        """Return the tokens that were the likeliest, and all tokens of the right answers."""
        right, tokens = prediction
        return float(right), float(tokens)

    def measure(self, sums: Sequence[float]) -> float:
        """Return the share of the tokens that were the likeliest, of summed counts."""
        return ratio(sums[0], sums[1]) if sums[1] else 1.0

    def score(
        self, references: Sequence[Sequence[str]], predictions: Sequence[Sequence[float]]
    ) -> dict[str, Any]:
        rows = [self.counts(r, p) for r, p in zip(references, predictions, strict=True)]
        sums = [sum(column) for column in zip(*rows, strict=True)]
        return {"token_accuracy": self.measure(sums), "tokens": int(sums[1])}

    def grammar(self) -> None:
        """Any text may be an answer."""
