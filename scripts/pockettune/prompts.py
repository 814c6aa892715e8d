"""Renders prompts, cuts texts that are too long, and keeps what was made in tokens/.

The prompt is rendered once, by the base model's own chat template, and stored as text beside its
token ids: PyTorch is given the ids, llama.cpp the text, so that both are asked the same question
and a difference between the two tokenizers shows.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pandas as pd

from pockettune.errors import UserError
from pockettune.tasks import Record, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Item = TypeVar("Item")


@dataclass(frozen=True)
class Example:
    """One question with its answer; ids are of the base model's vocabulary."""

    id: str
    prompt: str
    prompt_ids: list[int]
    answer_ids: list[int]  # ends with the end-of-turn token
    reference: str
    seen: bool  # whether the text stands in train
    cut: bool  # whether the text was shortened
    defused: bool  # whether the text held control tokens such as <|im_end|>


def render_prompt(tokenizer: "PreTrainedTokenizerBase", task: Task, record: Record) -> str:
    """Return the prompt as the chat template renders it, up to where the answer begins."""
    rendered = tokenizer.apply_chat_template(
        task.prompt(record), tokenize=False, add_generation_prompt=True
    )
    assert isinstance(rendered, str)
    return rendered


def encode(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Return the ids of a text whose special tokens, if any, are already written in it."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def encode_answer(tokenizer: "PreTrainedTokenizerBase", answer: str) -> list[int]:
    """Return the ids of an answer as a model writes it after the prompt, ending its turn.

    Encoded apart from the prompt, because that is how it is generated: token after token behind
    a prompt whose ids are fixed.
    """
    return [*encode(tokenizer, answer), tokenizer.eos_token_id]


class ExampleMaker:
    """Turns a task's records into examples of at most `max_length` tokens."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", task: Task, max_length: int) -> None:
        self.tokenizer, self.task, self.max_length = tokenizer, task, max_length
        self.control_tokens = [str(token) for token in tokenizer.added_tokens_decoder.values()]
        self.answer_ids = {word: encode_answer(tokenizer, word) for word in task.constrain()}

    def make(self, record: Record) -> Example:
        """Return the record as an example, its text cut at a character if it is too long."""
        field = self.task.text_field
        text = self.defuse(record[field])
        answer_ids = self.answer_ids[self.task.answer(record)]
        # The longest answer counts, not this record's: the cut must not give the answer away.
        room = self.max_length - max(map(len, self.answer_ids.values()))
        shortened, prompt, prompt_ids = self._fit({**record, field: text}, room)
        return Example(
            id=record["id"],
            prompt=prompt,
            prompt_ids=prompt_ids,
            answer_ids=answer_ids,
            reference=self.task.answer(record),
            seen=record.get("seen", False),
            cut=len(shortened) < len(text),
            defused=text != record[field],
        )

    def defuse(self, text: str) -> str:
        """Break control tokens that stand in a text, so that it cannot end the turn it is in."""
        for token in self.control_tokens:
            text = text.replace(token, f"{token[0]} {token[1:]}")
        return text

    def _fit(self, record: Record, room: int) -> tuple[str, str, list[int]]:
        """Return text, prompt and prompt ids of at most `room` ids, the text cut from its end."""
        field = self.task.text_field
        text = record[field]
        while True:
            prompt = render_prompt(self.tokenizer, self.task, {**record, field: text})
            ids = encode(self.tokenizer, prompt)
            excess = len(ids) - room
            if excess <= 0:
                return text, prompt, ids
            if not text:
                raise UserError(
                    f"tokenize.max_length {self.max_length} leaves no room for a text: the prompt "
                    f"alone takes {len(ids)} tokens; raise it or shorten task.prompt"
                )
            text = self._drop_tokens(text, excess)

    def _drop_tokens(self, text: str, excess: int) -> str:
        """Return the text without its last `excess` tokens, ending before a whole character."""
        offsets = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)[
            "offset_mapping"
        ]
        kept = max(len(offsets) - excess, 0)
        end = offsets[kept][0] if kept < len(offsets) else len(text) - 1
        return text[: min(end, len(text) - 1)]


def write_examples(path: Path, examples: Iterable[Example]) -> None:
    """Write examples as parquet, a column a field."""
    pd.DataFrame([vars(example) for example in examples]).to_parquet(path, index=False)


def read_examples(path: Path) -> list[Example]:
    """Read what `write_examples` wrote."""
    rows: list[dict[str, Any]] = pd.read_parquet(path).to_dict("records")  # type: ignore[assignment]
    for row in rows:
        row["prompt_ids"] = row["prompt_ids"].tolist()
        row["answer_ids"] = row["answer_ids"].tolist()
    return [Example(**row) for row in rows]


def take_evenly(examples: list[Item], limit: int | None) -> list[Item]:
    """Return `limit` examples evenly spread over the list, all of them where None or more."""
    if limit is None or limit >= len(examples):
        return examples
    return [examples[index * len(examples) // limit] for index in range(limit)]
