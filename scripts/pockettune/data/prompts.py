"""Renders prompts, cuts texts that are too long, and keeps what was made in tokens/.

The prompt is rendered once, by the base model's own chat template, and stored as text beside its
token ids: PyTorch is given the ids, llama.cpp the text, so that both are asked the same question
and a difference between the two tokenizers shows.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pockettune.common.errors import UserError, list_faults
from pockettune.data.chat import (
    added_bos,
    check_options,
    control_tokens,
    end_of_answer,
    refuses_system,
    render_chat,
)
from pockettune.tasks import Record, Task, as_text_task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Item = TypeVar("Item")

REMEDIES = {
    "system": 'set task.system: "" and say in task.prompt what it said',
    "user": "take another model, or mend chat_template in its folder",
}

ROWS_A_BATCH = 1000  # rendered, encoded and written together


@dataclass(frozen=True)
class Example:
    """One question with its answer; ids are of the base model's vocabulary."""

    id: str
    prompt: str
    prompt_ids: list[int]
    # Ends with the end-of-turn token, unless it was cut; empty where no answer is known.
    answer_ids: list[int]
    reference: str  # the right answer; of a task of text what is compared with, as JSON
    seen: bool  # whether the text stands in train
    cut: bool  # whether the text was shortened
    defused: bool  # whether the text held control tokens such as <|im_end|>
    record: str = (
        ""  # id of the record that it asks about: a task of text may ask several questions
    )
    # Begin and end of each earlier answer of a conversation within prompt_ids, one behind the other.
    earlier: list[int] = field(default_factory=list)

    def ids(self) -> list[int]:
        """Return prompt and answer."""
        return [*self.prompt_ids, *self.answer_ids]

    def learned(self) -> list[int]:
        """Return the places in `ids` of all tokens that are learned: those of every answer."""
        spans = [*self.earlier, len(self.prompt_ids), len(self.prompt_ids) + len(self.answer_ids)]
        return [
            p for begin, end in zip(spans[::2], spans[1::2], strict=True) for p in range(begin, end)
        ]


def render_prompt(tokenizer: "PreTrainedTokenizerBase", task: Task, record: Record) -> str:
    """Return the prompt as the chat template renders it, up to where the answer begins.

    The template is a program of the model's maker; transformers runs it in Jinja's sandbox. Raises
    UserError where it fails, refuses these messages, leaves one out or tries to leave the sandbox.
    """
    messages, options = task.prompt(record), task.template_options
    try:
        rendered = render_chat(tokenizer, messages, options)
    except Exception as error:
        if refuses_system(tokenizer, messages, options):
            told = f"refuses a system message: {error}; {REMEDIES['system']}"
        else:
            told = f"cannot render record {record['id']}: {error}; {REMEDIES['user']}"
        raise UserError(f"the model's chat template {told}") from error
    for message in messages:
        if message["role"] == "assistant":  # of which templates leave out what was thought
            continue
        # Templates strip what stands around a message, and some no more than that.
        if message["content"].strip() not in rendered:
            raise UserError(
                f"the model's chat template does not write the {message['role']} message of record"
                f" {record['id']} as it is; {REMEDIES[message['role']]}"
            )
    return rendered


def encode(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Return the ids of a text whose special tokens are written in it, but for the first BOS.

    Where the tokenizer adds a BOS and the text has none, it gets one: so do llama.cpp's chat programs,
    whatever the template writes (add_bos in common/chat.cpp at 0c1e570).
    """
    return begin_with(added_bos(tokenizer), encode_plain(tokenizer, text))


def encode_plain(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Return the ids of a text as it stands within a prompt or behind one."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def begin_with(start: list[int], ids: list[int]) -> list[int]:
    """Return ids with `start` before them, unless they begin with it."""
    return ids if ids[: len(start)] == start else [*start, *ids]


def refuse_equal_answers(answer_ids: Mapping[str, list[int]]) -> None:
    """Raise UserError naming the words that the tokenizer writes with the same ids."""
    words: dict[tuple[int, ...], list[str]] = {}
    for word, ids in answer_ids.items():
        words.setdefault(tuple(ids), []).append(word)
    if equal := [" and ".join(map(repr, same)) for same in words.values() if len(same) > 1]:
        raise UserError(
            f"task.labels: {list_faults(equal)} are the same tokens to this model, which so cannot"
            " tell them apart; choose other words"
        )


class ExampleMaker:
    """Turns a task's records into examples of at most `max_length` tokens."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", task: Task, max_length: int) -> None:
        self.tokenizer, self.task, self.max_length = tokenizer, task, max_length
        check_options(tokenizer, task.template_options)
        self.text = as_text_task(task)
        self.end = end_of_answer(tokenizer)  # asked once: it reads the whole vocabulary
        self.answer_ids = {word: self._encode_answer(word) for word in task.constrain()}
        refuse_equal_answers(self.answer_ids)
        # The longest answer counts, not the record's own: a cut must not give the answer away.
        lengths = map(len, self.answer_ids.values())
        self.longest = self.text.max_answer_tokens + 1 if self.text else max(lengths)
        # Where generation must stop: a base model may write either.
        self.ends = sorted({self.end, tokenizer.eos_token_id})
        self.bos = added_bos(tokenizer)
        self.control_pattern = starts_pattern(control_tokens(tokenizer))

    def make(self, records: Iterable[Record], labelled: bool = True) -> Iterator[Example]:
        """Yield an example for each question about a record, what is too long cut at a character.

        Records that are not `labelled` become examples without an answer.
        """
        stream = iter(records)
        # The tokenizer works on many prompts at once, on all cores.
        while batch := list(islice(stream, ROWS_A_BATCH)):
            safe = [self.task.clean(record, self.defuse) for record in batch]
            asked = [
                (record, clean != record, question)
                for record, clean in zip(batch, safe, strict=True)
                for question in self._ask(clean)
            ]
            prompts = [render_prompt(self.tokenizer, self.task, question) for *_, question in asked]
            encoded = self.tokenizer(prompts, add_special_tokens=False)["input_ids"]
            examples = (
                self._example(*of, prompt, begin_with(self.bos, plain), labelled)
                for of, prompt, plain in zip(asked, prompts, encoded, strict=True)
            )
            for _, of_record in groupby(examples, key=lambda example: example.record):
                yield from number(join_turns(of_record))

    def _encode_answer(self, answer: str) -> list[int]:
        """Return the ids of an answer as a model writes it after the prompt, ending its turn.

        Encoded apart from the prompt, because that is how it is generated: token after token behind
        a prompt whose ids are fixed.
        """
        return [*encode_plain(self.tokenizer, answer), self.end]

    def _ask(self, record: Record) -> list[Record]:
        """Return the questions about a record."""
        if self.text is None:
            return [record]
        return self.text.questions(record, self._count_tokens, self.max_length - self.longest)

    def _count_tokens(self, question: Record) -> int:
        return len(encode(self.tokenizer, render_prompt(self.tokenizer, self.task, question)))

    def _example(
        self,
        record: Record,
        defused: bool,
        question: Record,
        prompt: str,
        ids: list[int],
        labelled: bool,
    ) -> Example:
        fitted = question
        if len(ids) > self.max_length - self.longest:
            fitted, prompt, ids = self._fit(question, self.max_length - self.longest)
        # What a cut took away is not answered, so that nothing is taught which cannot be seen.
        answer = self.task.answer(fitted) if labelled else ""
        if self.text:
            told = json.dumps(self.text.reference(record), ensure_ascii=False) if labelled else ""
            answer_ids = self._encode_answer(answer)[: self.longest] if labelled else []
        else:
            told, answer_ids = answer, self.answer_ids[answer] if labelled else []
        return Example(
            id=record["id"],
            prompt=prompt,
            prompt_ids=ids,
            answer_ids=answer_ids,
            reference=told,
            seen=record.get("seen", False),
            cut=fitted is not question,
            defused=defused,
            record=record["id"],
        )

    def defuse(self, text: str) -> str:
        """Put a space into the control tokens in a text, so that it cannot end the turn it is in."""
        return self.control_pattern.sub(r"\g<0> ", text)

    def _fit(self, question: Record, room: int) -> tuple[Record, str, list[int]]:
        """Return question, prompt and prompt ids of at most `room` ids, the question shortened."""
        while True:
            prompt = render_prompt(self.tokenizer, self.task, question)
            ids = encode(self.tokenizer, prompt)
            excess = len(ids) - room
            if excess <= 0:
                return question, prompt, ids
            shorter = self.task.shorten(question, excess, self._drop_tokens)
            if shorter is None:
                raise UserError(
                    f"tokenize.max_length {self.max_length} leaves no room for a text: the prompt "
                    f"alone takes {len(ids)} tokens; raise it or shorten task.prompt"
                )
            question = shorter

    def _drop_tokens(self, text: str, excess: int) -> str:
        """Return the text without its last `excess` tokens, ending before a whole character."""
        offsets = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)[
            "offset_mapping"
        ]
        kept = max(len(offsets) - excess, 0)
        end = offsets[kept][0] if kept < len(offsets) else len(text) - 1
        return text[: min(end, len(text) - 1)]


def join_turns(examples: Iterable[Example]) -> list[Example]:
    """Join the questions of a conversation that go on from one another into one example each.

    Where a template leaves out or adds something in earlier turns, as Qwen3's does what was thought, the
    tokens are others than those that were asked, and the questions stay apart: so each answer is
    learned behind exactly the prompt that a runtime will give.
    """
    joined: list[Example] = []
    for example in examples:
        before = joined[-1] if joined else None
        if before and example.prompt_ids[: len(before.ids())] == before.ids():
            begin, end = len(before.prompt_ids), len(before.ids())
            joined[-1] = replace(
                example,
                earlier=[*before.earlier, begin, end],
                cut=before.cut or example.cut,
            )
        else:
            joined.append(example)
    return joined


def number(examples: Sequence[Example]) -> Iterator[Example]:
    """Yield the examples of one record under ids of their own."""
    for place, example in enumerate(examples, start=1):
        yield example if place == 1 else replace(example, id=f"{example.record}#{place}")


def starts_pattern(tokens: Sequence[str]) -> re.Pattern[str]:
    """Return a pattern of the character with which one of the tokens begins; none matches nothing.

    What follows is only looked at, so that a token which begins within another is found too. Grouped
    by the character, because a model may have thousands of tokens and few ways to begin one.
    """
    rests: dict[str, list[str]] = {}
    for token in tokens:
        rests.setdefault(token[0], []).append(re.escape(token[1:]))
    starts = [f"{re.escape(first)}(?={'|'.join(rest)})" for first, rest in sorted(rests.items())]
    return re.compile("|".join(starts) or "(?!)")


SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("prompt", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("answer_ids", pa.list_(pa.int32())),
        ("reference", pa.string()),
        ("seen", pa.bool_()),
        ("cut", pa.bool_()),
        ("defused", pa.bool_()),
        ("record", pa.string()),
        ("earlier", pa.list_(pa.int32())),
    ]
)


def write_examples(path: Path, examples: Iterable[Example]) -> None:
    """Write examples as an Arrow file (pandas.read_feather reads it), as they come."""
    stream = iter(examples)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, SCHEMA) as writer:
        while batch := list(islice(stream, ROWS_A_BATCH)):
            rows = [vars(example) for example in batch]
            writer.write_batch(pa.RecordBatch.from_pylist(rows, SCHEMA))


class Examples(Sequence[Example]):
    """The examples of files that `write_examples` wrote, read from the disk when asked for.

    The files are mapped into memory, so that a large dataset takes no more of it than a small one.
    """

    def __init__(self, *paths: Path) -> None:
        tables = [pa.ipc.open_file(pa.memory_map(str(path))).read_all() for path in paths]
        self._table = pa.concat_tables(tables)

    def __len__(self) -> int:
        return int(self._table.num_rows)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        return Example(**self._table.slice(index, 1).to_pylist()[0])

    def ids(self) -> list[str]:
        """Return the examples' ids, in order."""
        return self._table["id"].to_pylist()

    def count_tokens(self) -> np.ndarray:
        """Return the tokens of each example, prompt and answer together."""
        columns = (self._table[name] for name in ("prompt_ids", "answer_ids"))
        lengths = [pc.list_value_length(column).to_numpy() for column in columns]
        return lengths[0] + lengths[1]

    def count_answer_tokens(self) -> np.ndarray:
        """Return the tokens of each example's answers."""
        last = pc.list_value_length(self._table["answer_ids"]).to_numpy()
        ends = pc.list_flatten(self._table["earlier"]).to_numpy()
        rows = pc.list_parent_indices(self._table["earlier"]).to_numpy()
        # Begins and ends take turns.
        return last + np.bincount(rows[::2], ends[1::2] - ends[::2], len(last)).astype(int)

    def count_references(self) -> dict[str, int]:
        """Return how many examples have each right answer, in the order of the answers."""
        counted = pc.value_counts(self._table["reference"]).to_pylist()
        return {
            entry["values"]: entry["counts"] for entry in sorted(counted, key=lambda e: e["values"])
        }


def take_evenly(items: Sequence[Item], limit: int | None) -> list[Item]:
    """Return `limit` items evenly spread over the sequence, all of them where None or more."""
    if limit is None or limit >= len(items):
        return list(items)
    return [items[index * len(items) // limit] for index in range(limit)]
