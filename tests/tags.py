"""A task of text as a user adds it: several tags for a text. A test copies it among the tasks."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Record = dict[str, Any]
NONE = "无"


class Tags:
    """The model answers with every tag that fits, each a character."""

    text_field = "text"
    metric = "micro_f1"
    forced = False

    def __init__(self, settings: Mapping[str, Any], columns: Mapping[str, str]) -> None:
        self.system, self.template = settings["system"], settings["prompt"]
        self.template_options: Mapping[str, Any] = settings["template_options"]
        self.max_answer_tokens = settings.get("max_answer_tokens", 16)
        self.text_column, self.label_column = columns["text_column"], columns["label_column"]
        self.columns, self.optional_columns = [self.text_column, self.label_column], ()

    def settle(self, tables: Sequence[Any]) -> None:
        pass

    def read(self, row: Mapping[str, object]) -> Record:
        return {"text": row[self.text_column], "tags": str(row[self.label_column]).split()}

    def trial(self) -> Record:
        return {"id": "(a trial)", "text": "{text}"}

    def prompt(self, record: Record) -> list[dict[str, str]]:
        return [{"role": "user", "content": self.template.replace("{text}", record["text"])}]

    def answer(self, record: Record) -> str:
        return "".join(record["tags"]) or NONE

    def clean(self, record: Record, defuse: Callable[[str], str]) -> Record:
        return {**record, "text": defuse(record["text"])}

    def shorten(self, record: Record, excess: int, cut: Callable[[str, int], str]) -> Record | None:
        return {**record, "text": cut(record["text"], excess)} if record["text"] else None

    def constrain(self) -> list[str]:
        return []

    def questions(self, record: Record, count: Callable[[Record], int], room: int) -> list[Record]:
        return [record]

    def reference(self, record: Record) -> list[str]:
        return sorted(record["tags"])

    def parse(self, text: str, record: Record | None = None) -> list[str] | None:
        return sorted(set(text) - {NONE})

    def salvage(self, text: str) -> str:
        return text

    def combine(self, predictions: Sequence[Any], log_probabilities: Sequence[float]) -> Any:
        return predictions[0]

    def counts(self, reference: Any, prediction: Any) -> tuple[float, ...]:
        found = set(prediction or [])
        return len(found & set(reference)), len(found), len(reference)

    def measure(self, sums: Sequence[float]) -> float:
        right, predicted, true = sums
        return 2 * right / (predicted + true) if predicted + true else 1.0

    def score(self, references: Sequence[Any], predictions: Sequence[Any]) -> dict[str, Any]:
        pairs = zip(references, predictions, strict=True)
        sums = [
            sum(numbers) for numbers in zip(*(self.counts(*pair) for pair in pairs), strict=True)
        ]
        return {"micro_f1": self.measure(sums)}

    def grammar(self) -> str | None:
        return 'root ::= "无" | [甲乙] [甲乙]?'
