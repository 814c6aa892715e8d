"""Scores a stage whose answers are text: what it generates, and what it makes of the reference answers.

Generated is greedily, as a phone is told to; a record's questions are answered one by one and their
predictions combined by the task. The reference answers are read token by token (reading.py), beside
F16 where that is given.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import pandas as pd

from pockettune.data.prompts import Example, take_evenly
from pockettune.evaluation.observers import describe_divergence
from pockettune.evaluation.reading import (
    LogitsAt,
    Reading,
    describe_reading,
    places_of,
    read_answers,
)
from pockettune.runtimes.answers import Generation
from pockettune.tasks import Record, TextTask

Tokens = Sequence[int]

NOISE_ROWS = 16  # at most


# Takes prompts and max_tokens, and where the runtime has one a grammar (GBNF); generates greedily.
Generate = Callable[..., Iterable[Generation]]


@dataclass
class TextRuntime:
    """A loaded model that answers with text."""

    prompts: Sequence[Tokens]  # the examples' prompts, in this runtime's own token ids
    logits_at: LogitsAt
    generate: Generate
    decode: Callable[[Tokens], Any]  # to text
    takes_grammar: bool = False


@dataclass
class Answer:
    """What was generated for one record."""

    texts: list[str]  # of each question
    ids: list[list[int]]
    ended: bool
    prediction: Any


def group_records(examples: Iterable[Example]) -> list[list[Example]]:
    """Return the examples of each record together, in order."""
    return [list(group) for _, group in groupby(examples, key=lambda example: example.record)]


def generate_answers(
    task: TextTask,
    runtime: TextRuntime,
    records: Sequence[Sequence[Example]],
    questions: Mapping[str, Record],
    places: Mapping[str, int],
    grammar: str | None = None,
) -> list[Answer]:
    """Return an answer a record; `questions` are the records by id, `places` the examples' by id."""
    examples = [example for group in records for example in group]
    prompts = [runtime.prompts[places[example.id]] for example in examples]
    options: dict[str, Any] = {"grammar": grammar} if grammar else {}
    generated = iter(runtime.generate(prompts, max_tokens=task.max_answer_tokens + 1, **options))
    answers = []
    for group in records:
        found = [next(generated) for _ in group]
        texts = [runtime.decode(one.ids) for one in found]
        record = questions[group[0].record]
        parsed = [
            task.parse(text if one.ended else task.salvage(text), record)
            for text, one in zip(texts, found, strict=True)
        ]
        # What is scored by the reference answers shows a sample alone, its last turns.
        prediction = (
            parsed[-1]
            if task.forced
            else task.combine(parsed, [one.log_probability for one in found])
        )
        ended = all(one.ended for one in found)
        answers.append(Answer(texts, [one.ids for one in found], ended, prediction))
    return answers


def score_text(
    task: TextTask,
    runtime: TextRuntime,
    examples: Sequence[Example],
    questions: Mapping[str, Record],
    free_rows: int | None,
    description: str,
    reference: LogitsAt | None = None,
    kept: Sequence[int] | None = None,
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Return a table with a row a record, and facts worth telling beside the metrics.

    Of a task that is scored by the reference answers, `free_rows` records are generated as a sample; of the
    others all, and as many again under the grammar.
    """
    records = group_records(examples)
    places = {example.id: place for place, example in enumerate(examples)}
    read = list(read_answers(runtime.logits_at, examples, description, reference, kept))
    readings = {example.id: reading for example, reading in zip(examples, read, strict=True)}
    chosen = take_evenly(records, free_rows or 0) if task.forced else records
    answers = generate_answers(task, runtime, chosen, questions, places)
    by_record = {group[0].record: answer for group, answer in zip(chosen, answers, strict=True)}
    facts: dict[str, Any] = {
        "reading": describe_all(read),
        "generated": count_answers(answers),
    }
    if answers:
        facts["noise"] = measure_noise(task, runtime, chosen, answers, questions, places)
    grammar = task.grammar()
    if grammar and runtime.takes_grammar and free_rows:
        few = take_evenly(records, free_rows)
        held = generate_answers(task, runtime, few, questions, places, grammar)
        facts["constrained"] = describe_constrained(task, few, held)
    # What is compared is F16's own ids; -1: a token that it has not.
    if (own := places_of(kept)) is not None:
        for answer in answers:
            answer.ids = [[own.get(token, -1) for token in ids] for ids in answer.ids]
    return make_table(task, records, readings, by_record), facts


def make_table(
    task: TextTask,
    records: Sequence[Sequence[Example]],
    readings: Mapping[str, Reading],
    answers: Mapping[str, Answer],
) -> pd.DataFrame:
    """Return a row a record; what JSON can hold is written as JSON, count_0 … are task.counts'."""
    rows = []
    for group in records:
        record = group[0].record
        read = [readings[example.id] for example in group]
        answer = answers.get(record)
        reference = json.loads(group[0].reference)
        tokens, right = sum(r.tokens for r in read), sum(r.right for r in read)
        prediction = [right, tokens] if task.forced else answer.prediction if answer else None
        counts = task.counts(reference, prediction)
        rows.append(
            {
                "id": record,
                "seen": group[0].seen,
                "reference": group[0].reference,
                "prediction": json.dumps(prediction, ensure_ascii=False),
                "answer": "\n".join(answer.texts) if answer else None,
                "answer_ids": json.dumps(answer.ids) if answer else None,
                "tokens": tokens,
                "log_probability": sum(r.log_probability for r in read),
                **{f"count_{place}": float(count) for place, count in enumerate(counts)},
            }
        )
    return pd.DataFrame(rows)


def describe_all(read: Sequence[Reading]) -> dict[str, Any]:
    """Return tokens, token_accuracy, loss and perplexity, and how far F16 is, at every answer's token."""
    told = {"tokens": sum(r.tokens for r in read), **describe_reading(read)}
    told["perplexity"] = float(np.exp(told["loss"]))
    compared = [r for r in read if r.divergence is not None]
    if compared:
        divergence = np.concatenate([r.divergence for r in compared if r.divergence is not None])
        equal = np.concatenate(
            [r.likeliest_equal for r in compared if r.likeliest_equal is not None]
        )
        told["kl_vocabulary"] = describe_divergence(divergence)
        told["likeliest_equal"] = float(equal.mean())
        told["compared_tokens"] = len(equal)
    return told


def measure_noise(
    task: TextTask,
    runtime: TextRuntime,
    records: Sequence[Sequence[Example]],
    answers: Sequence[Answer],
    questions: Mapping[str, Record],
    places: Mapping[str, int],
) -> dict[str, Any]:
    """Return how many answers change when they are generated one at a time instead of together.

    The shape of a batch chooses the order of summation, so a difference between two stages below this
    says nothing. Of a tenth of the records, since one at a time is several times slower and an untrained
    base writes to the limit.
    """
    rows = take_evenly(range(len(records)), min(NOISE_ROWS, -(-len(records) // 10)))
    alone = [generate_answers(task, runtime, [records[row]], questions, places)[0] for row in rows]
    changed = sum(one.ids != answers[row].ids for one, row in zip(alone, rows, strict=True))
    return {"rows": len(rows), "changed": changed}


def describe_constrained(
    task: TextTask, records: Sequence[Sequence[Example]], answers: Sequence[Answer]
) -> dict[str, Any]:
    """Return how many answers under the grammar are understood, and the task's metric of them."""
    counts = [
        task.counts(json.loads(group[0].reference), answer.prediction)
        for group, answer in zip(records, answers, strict=True)
    ]
    return {
        **count_answers(answers),
        task.metric: task.measure(np.sum(counts, axis=0).tolist()),
    }


def count_answers(answers: Sequence[Answer]) -> dict[str, int]:
    """Return how many answers there are, ended, and are understood."""
    return {
        "rows": len(answers),
        "ended": sum(answer.ended for answer in answers),
        "understood": sum(answer.prediction is not None for answer in answers),
    }


def score_table(task: TextTask, table: pd.DataFrame) -> dict[str, Any]:
    """Return n and the task's metrics on all rows, and "unseen": the same on rows not in train."""

    def score(rows: pd.DataFrame) -> dict[str, Any]:
        references, predictions = (
            list(map(json.loads, rows[column])) for column in ("reference", "prediction")
        )
        return task.score(references, predictions)

    unseen = table[~table["seen"]]
    told = {"n": len(table), **score(table)}
    told["unseen"] = {"n": len(unseen), **(score(unseen) if len(unseen) else {})}
    return told
