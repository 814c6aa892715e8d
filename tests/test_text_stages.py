"""Scoring of stages whose answers are text, on a runtime of which it is known what it writes."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from pockettune.data.prompts import Example
from pockettune.evaluation.text_stages import TextRuntime, generate_answers, measure_noise
from pockettune.runtimes.answers import Generation
from pockettune.tasks import TextTask, as_text_task, load_task


@pytest.fixture
def task() -> TextTask:
    settings: dict[str, Any] = {
        "type": "answer",
        "system": "",
        "prompt": "{text} {question}",
        "template_options": {},
        "no_answer": None,
        "count": "words",
        "stride": 8,
        "max_answer_tokens": 4,
    }
    columns = {"text_column": "text", "label_column": "answers", "question_column": "question"}
    text = as_text_task(load_task(settings, columns))
    assert text
    return text


@pytest.mark.parametrize(("records", "alone"), [(7, 1), (20, 2), (300, 16)])
def test_noise_takes_a_tenth_of_the_answers(task: TextTask, records: int, alone: int) -> None:
    """An untrained base writes each answer to the limit, and one at a time that is most of a stage."""
    asked: list[int] = []

    def generate(prompts: Sequence[Sequence[int]], max_tokens: int) -> Iterator[Generation]:
        asked.append(len(prompts))
        # Alone it writes otherwise than together.
        return (Generation([len(prompts)], True, 0.0) for _ in prompts)

    examples = [
        Example(str(n), "", [n], [0], "[]", seen=False, cut=False, defused=False, record=str(n))
        for n in range(records)
    ]
    groups = [[example] for example in examples]
    questions = {e.id: {"id": e.id, "text": "a b", "question": "?"} for e in examples}
    places = {e.id: place for place, e in enumerate(examples)}
    prompts = [example.prompt_ids for example in examples]
    runtime = TextRuntime(prompts, lambda *_: iter(()), generate, lambda _: "a")
    together = generate_answers(task, runtime, groups, questions, places)
    noise = measure_noise(task, runtime, groups, together, questions, places)
    assert asked == [records] + [1] * alone
    assert noise == {"rows": alone, "changed": alone}
