"""Entities: the names in a text and the type of each."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pockettune.common.errors import list_faults
from pockettune.tasks.entity_answers import (
    place_names,
    read_answer,
    salvage_answer,
    write_answer,
    write_grammar,
)
from pockettune.tasks.entity_rows import read_entities
from pockettune.tasks.entity_scores import count_right, score_entities
from pockettune.tasks.shared import (
    Defuse,
    as_plain,
    ask,
    fill,
    is_missing,
    move_places,
    ratio,
)

if TYPE_CHECKING:
    import pandas as pd


class Entities:
    """The model answers with a JSON list of [type, name], in the order of the text."""

    text_field = "text"
    metric = "micro_f1"
    forced = False

    def __init__(self, settings: Mapping[str, Any], columns: Mapping[str, Any]) -> None:
        self.system = settings["system"]
        self.template = settings["prompt"]
        self.template_options: Mapping[str, Any] = settings["template_options"]
        self.types: dict[str, str] = dict(settings["types"])
        self.max_answer_tokens: int = settings["max_answer_tokens"]
        self.text_column = columns["text_column"]
        self.label_column = columns["label_column"]
        self.columns: Sequence[str] = [self.text_column, self.label_column]
        self.optional_columns: Sequence[str] = ()

    def settle(self, tables: Sequence["pd.DataFrame"]) -> None:
        """Each row says by itself how it is labelled."""

    def read(self, row: Mapping[str, object]) -> dict[str, Any]:
        """Return {"text", "entities"}, each entity [type as answered, start, end].

        The text is a text, its characters or its words; see entity_rows for the labels.
        """
        text, labels = (as_plain(row[column]) for column in self.columns)
        if is_missing(text) or not (text.strip() if isinstance(text, str) else text):
            raise ValueError(f"{self.text_column} is empty")
        if not isinstance(text, (str, list)):
            raise ValueError(f"{self.text_column} is {text!r}, not text")
        text, spans = read_entities(text, labels)
        if unknown := dict.fromkeys(span.type for span in spans if span.type not in self.types):
            known = ", ".join(self.types)
            raise ValueError(f"type {list_faults(list(unknown))} is not one of task.types: {known}")
        return {"text": text, "entities": [[self.types[s.type], s.start, s.end] for s in spans]}

    def trial(self) -> dict[str, Any]:
        return {"id": "(a trial)", "text": "{text}", "entities": []}

    def shorten(
        self, record: dict[str, Any], excess: int, cut: Callable[[str, int], str]
    ) -> dict[str, Any] | None:
        text = record["text"]
        return {**record, "text": cut(text, excess)} if text else None

    def clean(self, record: Mapping[str, Any], defuse: Defuse) -> dict[str, Any]:
        text, changed = record["text"], defuse(record["text"])
        entities = [
            [kind, *move_places(text, changed, places)]
            for kind, *places in record.get("entities", [])
        ]
        return {**record, "text": changed, "entities": entities}

    def prompt(self, record: Mapping[str, Any]) -> list[dict[str, str]]:
        return ask(self.system, fill(self.template, {"text": record["text"]}))

    def questions(
        self, record: dict[str, Any], count_tokens: Callable[[dict[str, Any]], int], room: int
    ) -> list[dict[str, Any]]:
        return [record]

    def answer(self, record: Mapping[str, Any]) -> str:
        """Return the entities of a record; of a text that was cut, those that it still holds."""
        return write_answer([(kind, name) for kind, name, *_ in self.reference(record)])

    def constrain(self) -> list[str]:
        return []

    def reference(self, record: Mapping[str, Any]) -> list[list[Any]]:
        """Return each entity's type, name, start and end."""
        text = record["text"]
        return [
            [kind, text[start:end], start, end]
            for kind, start, end in record["entities"]
            if end <= len(text)
        ]

    def parse(self, text: str, record: Mapping[str, Any] | None = None) -> list[list[Any]] | None:
        """Return each entity's type, name, start and end in the record's text.

        -1 and -1 for a name that does not stand there, or not as often as it was answered, and without
        a record. None where the answer is not of the format, or names a type that there is not.
        """
        entities = read_answer(text)
        if entities is None or any(kind not in self.types.values() for kind, _ in entities):
            return None
        return [list(entity) for entity in place_names(entities, record["text"] if record else "")]

    def salvage(self, text: str) -> str:
        return salvage_answer(text)

    def combine(self, predictions: Sequence[Any], log_probabilities: Sequence[float]) -> Any:
        return predictions[0]

    def counts(
        self, reference: Sequence[Sequence[Any]], prediction: Sequence[Sequence[Any]] | None
    ) -> tuple[float, ...]:
        """Return how many entities are right, were predicted (of those in the text), and were to find."""
        return count_right(reference, prediction)

    def measure(self, sums: Sequence[float]) -> float:
        """Return F1 over all entities, by type and place alike, of summed counts."""
        right, predicted, wanted = sums
        return ratio(2 * right, predicted + wanted) if predicted + wanted else 1.0

    def score(
        self,
        references: Sequence[Sequence[Sequence[Any]]],
        predictions: Sequence[Sequence[Sequence[Any]] | None],
    ) -> dict[str, Any]:
        return score_entities(references, predictions, list(self.types.values()))

    def grammar(self) -> str:
        return write_grammar(list(dict.fromkeys(self.types.values())))
