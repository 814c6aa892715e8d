"""Answer: a question about a text is answered with words of it, or with a word for no answer."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pockettune.common.errors import UserError, list_faults
from pockettune.tasks.answer_scores import score_answer
from pockettune.tasks.shared import (
    Defuse,
    as_plain,
    ask,
    fill,
    is_missing,
    move_places,
    ratio,
    read_text,
)

if TYPE_CHECKING:
    import pandas as pd

Record = dict[str, Any]


class Answer:
    """The model reads a text and a question and writes the answer as it stands in the text."""

    text_field = "text"
    metric = "f1"
    forced = False

    def __init__(self, settings: Mapping[str, Any], columns: Mapping[str, Any]) -> None:
        self.system = settings["system"]
        self.template = settings["prompt"]
        self.template_options: Mapping[str, Any] = settings["template_options"]
        self.no_answer: str | None = settings["no_answer"]
        self.count: str = settings["count"]
        self.stride: int = settings["stride"]
        self.max_answer_tokens: int = settings["max_answer_tokens"]
        self.text_column = columns["text_column"]
        self.question_column = columns["question_column"]
        self.label_column = columns["label_column"]
        self.columns: Sequence[str] = [self.text_column, self.question_column, self.label_column]
        self.optional_columns: Sequence[str] = ()

    def settle(self, tables: Sequence["pd.DataFrame"]) -> None:
        """Each row says by itself how its answers are written."""

    def read(self, row: Mapping[str, object]) -> Record:
        """Return {"text", "question", "answers"}, each answer with its place in the text, or -1.

        Of several right answers some may be in other words; one must stand in the text. The answers are
        a text, a list, or SQuAD's {text, answer_start}, one by one or all together.
        """
        faults, texts = [], []
        for column in (self.text_column, self.question_column):
            try:
                texts.append(read_text(row, column))
            except ValueError as error:
                faults.append(str(error))
        if faults:
            raise ValueError(list_faults(faults))
        text, question = texts
        answers: list[Any] = [
            [answer, find_nearest(text, answer, start)]
            for answer, start in read_answers(as_plain(row[self.label_column]))
        ]
        if answers and all(place < 0 for _, place in answers):
            told = list_faults([repr(answer) for answer, _ in answers])
            raise ValueError(f"answer {told} does not stand in its {self.text_column}")
        if not answers and self.no_answer is None:
            raise ValueError("it has no answer; set task.no_answer to the word that says so")
        if self.no_answer is not None and self.no_answer in (answer for answer, _ in answers):
            raise ValueError(
                f"answer {self.no_answer!r} is task.no_answer; take another word there"
            )
        return {"text": text, "question": question, "answers": answers}

    def trial(self) -> Record:
        return {"id": "(a trial)", "text": "{text}", "question": "{question}"}

    def clean(self, record: Record, defuse: Defuse) -> Record:
        text, changed = record["text"], defuse(record["text"])
        answers = []
        for answer, place in record.get("answers", []):
            if place >= 0:
                place, end = move_places(text, changed, [place, place + len(answer)])
                answer = changed[place:end]
            answers.append([answer, place])
        question = defuse(record["question"])
        return {**record, "text": changed, "question": question, "answers": answers}

    def shorten(self, record: Record, excess: int, cut: Callable[[str, int], str]) -> Record | None:
        text = record["text"]
        return self._window(record, 0, len(cut(text, excess))) if text else None

    def _window(self, record: Record, begin: int, end: int) -> Record:
        """Return the record with a part of its text, and the places of the answers within."""
        answers = [
            [answer, place - begin if begin <= place and place + len(answer) <= end else -1]
            for answer, place in record.get("answers", [])
        ]
        return {**record, "text": record["text"][begin:end], "answers": answers}

    def prompt(self, record: Mapping[str, Any]) -> list[dict[str, str]]:
        texts = {"text": record["text"], "question": record["question"]}
        return ask(self.system, fill(self.template, texts))

    def questions(
        self, record: Record, count_tokens: Callable[[Record], int], room: int
    ) -> list[Record]:
        """Return the record, or windows of a text that is too long, of which two overlap.

        By about task.stride tokens: an answer of no more stands whole in one of the windows. Those where
        it does not are answered with task.no_answer.
        """
        text, tokens = record["text"], count_tokens(record)
        if tokens <= room:
            return [record]
        if self.no_answer is None:
            raise UserError(
                f"record {record['id']}: its prompt of {tokens} tokens is asked in windows of {room}, and"
                " windows without the answer need task.no_answer, the word that says so; or raise"
                " tokenize.max_length"
            )
        frame = count_tokens({**record, "text": ""})
        a_token = len(text) / max(tokens - frame, 1)  # characters
        overlap, width = int(self.stride * a_token), int((room - frame) * a_token)
        while width > overlap:
            begins = range(0, len(text) - overlap, width - overlap)
            windows = [self._window(record, begin, begin + width) for begin in begins]
            if all(count_tokens(window) <= room for window in windows):
                return windows
            width = min(width - 1, int(width * 0.95))  # some parts have more tokens than others
        raise UserError(
            f"record {record['id']}: tokenize.max_length leaves {max(room - frame, 0)} tokens for its text,"
            f" too few for windows that overlap by task.stride {self.stride}; raise the one or lower the"
            " other"
        )

    def answer(self, record: Mapping[str, Any]) -> str:
        """Return the first right answer that stands in the text, else the word for none."""
        within = (answer for answer, place in record["answers"] if place >= 0)
        return next(within, self.no_answer or "")

    def constrain(self) -> list[str]:
        return []

    def reference(self, record: Mapping[str, Any]) -> list[str]:
        """Return the right answers; none where the question has no answer."""
        return [answer for answer, _ in record["answers"]]

    def parse(self, text: str, record: Mapping[str, Any] | None = None) -> str | None:
        """Return what was answered, "" for no answer; None where nothing was said."""
        said = text.strip()
        return "" if said and said == self.no_answer else said or None

    def salvage(self, text: str) -> str:
        return text

    def combine(
        self, predictions: Sequence[str | None], log_probabilities: Sequence[float]
    ) -> str | None:
        """Return the likeliest answer of those that are one, else that there is none."""
        pairs = zip(log_probabilities, predictions, strict=True)
        if answers := [(likely, said) for likely, said in pairs if said]:
            return max(answers, key=lambda pair: pair[0])[1]
        return "" if "" in predictions else None

    def counts(self, reference: Sequence[str], prediction: str | None) -> tuple[float, ...]:
        """Return exact match, F1 and one row."""
        return (*score_answer(reference, prediction, self.count), 1.0)

    def measure(self, sums: Sequence[float]) -> float:
        """Return the mean F1 of summed counts."""
        return ratio(sums[1], sums[2])

    def score(
        self, references: Sequence[Sequence[str]], predictions: Sequence[str | None]
    ) -> dict[str, Any]:
        """Return the means of F1 and exact match, of all rows and of those with and without an answer."""
        rows = [self.counts(r, p) for r, p in zip(references, predictions, strict=True)]
        kinds = {"answerable": True, "unanswerable": False}
        parts = {
            kind: _means(
                [row for row, gold in zip(rows, references, strict=True) if bool(gold) == has]
            )
            for kind, has in kinds.items()
        }
        return {**_means(rows), **{kind: means for kind, means in parts.items() if means["n"]}}

    def grammar(self) -> None:
        """Any text may be an answer."""


def _means(rows: Sequence[tuple[float, ...]]) -> dict[str, Any]:
    em, f1 = (ratio(sum(row[place] for row in rows), len(rows)) for place in (0, 1))
    return {"f1": f1, "exact_match": em, "n": len(rows)}


def read_answers(cell: Any) -> list[tuple[str, int]]:
    """Return the right answers of a cell and where they are said to begin, -1 where it is not said.

    ValueError where the cell is none of the shapes that `Answer.read` names.
    """
    if is_missing(cell):
        return []
    if isinstance(cell, dict) and isinstance(cell.get("text"), list):  # as the hub's SQuAD has it
        starts = cell.get("answer_start") or [None] * len(cell["text"])
        cell = [
            {"text": text, "answer_start": start}
            for text, start in zip(cell["text"], starts, strict=False)
        ]
    answers = []
    for entry in cell if isinstance(cell, list) else [cell]:
        entry = entry if isinstance(entry, dict) else {"text": entry}
        text, start = entry.get("text"), entry.get("answer_start")
        if not isinstance(text, str):
            raise ValueError(f"answer {entry!r} is not text, nor {{text, answer_start}}")
        spaces = len(text) - len(text.lstrip())
        answers.append((text.strip(), start + spaces if isinstance(start, int) else -1))
    return [(text, start) for text, start in answers if text]


def find_nearest(text: str, answer: str, start: int) -> int:
    """Return the place of an answer that is nearest to `start`, the first for -1; -1 for none.

    Files of questions have starts that are off by some characters.
    """
    places = []
    place = text.find(answer)
    while place >= 0:
        places.append(place)
        place = text.find(answer, place + 1)
    return min(places, key=lambda place: abs(place - start) if start >= 0 else place, default=-1)
