"""The bundle of a task of text: what stands in it is what the file writes, and it is asked as it was."""

import re
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest

from make_bundle import MOST_WINDOWS, choose_groups
from pockettune.common.errors import UserError
from pockettune.data.chat import render_chat
from pockettune.data.prompts import Example, ExampleMaker
from pockettune.data.task_template import check_template
from pockettune.evaluation.conformance import messages_of, unfold
from pockettune.gguf.files import read_gguf
from pockettune.models.folder import load_tokenizer
from pockettune.runtimes.greedy import as_text
from pockettune.runtimes.llama import LlamaModel
from pockettune.tasks import load_task
from pockettune.tasks.answer import Answer
from small_run import make_base
from stand_in import serve_file
from test_bundle import parse_modelfile, read_go_string, read_rows, read_task
from test_conform import conform
from text_bundles import LONG, ROWS, SYSTEM, TASKS, make_text_bundle, settings_of


@pytest.fixture(scope="module", params=list(TASKS))
def text_bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of each task of text, of the small run's base."""
    return make_text_bundle(make_base(), tmp_path_factory.mktemp("text"), request.param)


def test_rows_are_what_the_file_writes(text_bundle: Path) -> None:
    rows, task = read_rows(text_bundle), read_task(text_bundle)
    # Of conversations a sample is answered, `evaluate.greedy_rows` of them.
    assert len(rows) == (12 if task["type"] == "chat" else ROWS)
    assert sum("windows" in row for row in rows) == (len(LONG) if task["type"] == "answer" else 0)
    asked = unfold(rows)
    with LlamaModel(text_bundle / "model.gguf", threads=1) as model:
        for row in [*asked[:6], *asked[-3:]]:
            assert model.tokenize(row["prompt"]) == row["prompt_ids"]
            said = row["answer_ids"]
            continued = [[*row["prompt_ids"], *said[:n]] for n in range(len(said) + row["ended"])]
            logits = list(model.next_token_logits(continued))
            likeliest = [int(values.argmax()) for values in logits]
            assert likeliest[: len(said)] == said
            assert model.stops_at(likeliest[-1]) == row["ended"]
            assert row["ended"] == (len(said) < task["max_tokens"])
            assert as_text(model, said) == row["answer"]
            assert row["ends"] == sorted(row["ends"]) and row["ends"][-1:] in ([], [len(row["answer"])])  # fmt: skip
            for values, score, margin in zip(logits, row["log_probabilities"], row["margins"], strict=True):  # fmt: skip
                second, best = np.sort(values)[-2:]
                assert abs(best - np.log(np.exp(values.astype(float)).sum()) - score) < 0.05
                assert margin >= best - second - 0.05


def test_rows_are_asked_as_the_file_renders_them(text_bundle: Path) -> None:
    task = read_task(text_bundle)
    template = read_gguf(text_bundle / "model.gguf")[0]["tokenizer.chat_template"]
    tokenizer = load_tokenizer(make_base())
    for row in unfold(read_rows(text_bundle)):
        assert render_chat(tokenizer, messages_of(task, row), {}, template=template) == row["prompt"]  # fmt: skip
    if task["type"] == "chat":
        roles = [message["role"] for message in row["messages"]]
        assert roles == ["system", "user", "assistant", "user"], "up to the last turn"


@pytest.mark.parametrize("text_bundle", ["answer"], indirect=True)
def test_row_of_windows_is_what_was_scored(text_bundle: Path) -> None:
    settings = settings_of("answer")
    task = Answer(settings["task"], settings["dataset"])
    maker = ExampleMaker(load_tokenizer(make_base()), task, settings["tokenize"]["max_length"])
    for row in read_rows(text_bundle)[-len(LONG) :]:
        windows = row["windows"]
        examples = list(maker.make([{"id": row["id"], **row["texts"], "answers": []}]))
        asked = [(example.id, example.prompt) for example in examples]
        assert asked == [(window["id"], window["prompt"]) for window in windows] and len(asked) > 1
        likely = [sum(window["log_probabilities"]) for window in windows]
        said = [task.parse(window["answer"]) for window in windows]
        assert row["answer"] == task.combine(said, likely)


def groups_of(sizes: Sequence[int], **settings: Any) -> list[int]:
    """Return how many windows the chosen rows have, of records that have so many."""
    examples = [
        Example(str(place), "", [1], [2], "", False, False, False, f"test-{number}")
        for number, size in enumerate(sizes)
        for place in range(size)
    ]
    scored = {f"test-{number}": {"answer_ids": "[[1]]"} for number in range(len(sizes))}
    told = settings_of("answer")
    told = {key: {**told[key], **settings.get(key, {})} for key in ("task", "card", "dataset")}
    task: Any = Answer(told["task"], told["dataset"])
    return list(map(len, choose_groups(Namespace(settings=told), task, examples, scored)))


def test_few_long_texts_become_rows() -> None:
    assert groups_of([1] * 99 + [3, MOST_WINDOWS + 1, 2, 3, 3]) == [1] * (50 - 8) + [3, 2, 3]
    assert groups_of([2]) == [2]
    assert groups_of([1, 2], card={"template": "task"}) == [1], "their texts are not known"
    assert groups_of([1, 2], task={"stride": None}) == [1], "a program could not make them"
    with pytest.raises(UserError, match=r"raise tokenize\.max_length"):
        groups_of([MOST_WINDOWS + 1])


def test_file_says_how_its_answers_are_written(text_bundle: Path) -> None:
    metadata, task = read_gguf(text_bundle / "model.gguf")[0], read_task(text_bundle)
    told = {k.removeprefix("pockettune.task."): v for k, v in metadata.items() if "pockettune.task" in k}  # fmt: skip
    assert told["type"] == task["type"] and told["max_answer_tokens"] == task["max_tokens"] - 1
    assert "labels" not in told and "values" not in told and "labels" not in task
    assert told.get("grammar") == task["grammar"] and told.get("prompt", "") == task["prompt"]
    files = {path.name for path in text_bundle.iterdir()}
    assert "labels.gbnf" not in files
    assert ("answer.gbnf" in files) == (task["type"] == "entities")
    if task["grammar"]:
        grammar = (text_bundle / "answer.gbnf").read_text(encoding="utf-8")
        assert grammar == task["grammar"]
        llama_cpp.LlamaGrammar.from_string(grammar, verbose=False)
    page = (text_bundle / "README.md").read_text(encoding="utf-8")
    assert "labels" not in page
    assert ("Send the whole conversation" in page) == (task["type"] == "chat")


def fill_turns(template: str, messages: list[dict[str, Any]]) -> str:
    """Return what Go's text/template makes of a conversation, by the shape that serving.py gives it."""
    text = r'\{\{ ("(?:[^"\\]|\\.)*") \}\}'
    content = r"\{\{ \$message\.Content \}\}"
    shape = re.fullmatch(
        r"\{\{ range \$i, \$message := \.Messages \}\}"
        rf'\{{\{{ if eq \$message\.Role "system" \}}\}}{text}{content}{text}'
        rf'\{{\{{ else if eq \$message\.Role "assistant" \}}\}}{content}{text}'
        rf"\{{\{{ else \}}\}}\{{\{{ if eq \$i 0 \}}\}}{text}\{{\{{ end \}}\}}{content}"
        rf"\{{\{{ if eq \(len \(slice \$\.Messages \$i\)\) 1 \}}\}}{text}\{{\{{ else \}}\}}{text}"
        r"\{\{ end \}\}\{\{ end \}\}\{\{ end \}\}",
        template,
    )
    assert shape, template
    before, behind, following, start, tail, between = map(read_go_string, shape.groups())
    said = ""
    for place, message in enumerate(messages):
        if message["role"] == "system":
            said += before + message["content"] + behind
        elif message["role"] == "assistant":
            said += message["content"] + following
        else:
            said += ("" if place else start) + message["content"]
            said += tail if place == len(messages) - 1 else between
    return said


def test_modelfile_asks_as_was_trained(text_bundle: Path) -> None:
    told = dict(parse_modelfile((text_bundle / "Modelfile").read_text(encoding="utf-8")))
    task = read_task(text_bundle)
    assert int(told["PARAMETER num_predict"]) == task["max_tokens"]
    assert told.get("SYSTEM") == (SYSTEM if task["type"] == "chat" else None)
    if task["type"] == "chat":
        for row in read_rows(text_bundle):
            assert fill_turns(told["TEMPLATE"], row["messages"]) == row["prompt"]


def test_server_is_judged(text_bundle: Path) -> None:
    task = read_task(text_bundle)
    with serve_file(text_bundle / "model.gguf") as (address, server):
        code, line = conform(text_bundle, address)
        rows = len(unfold(read_rows(text_bundle)))
        assert code == 0 and f"{rows} of {rows} rows are answered as scored" in line
        assert all(body["max_tokens"] == task["max_tokens"] for body in server.asked)
    other = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
    with serve_file(text_bundle / "model.gguf", template=other) as (address, _):
        code, line = conform(text_bundle, address)
        assert code == 2 and "cause: template: " in line and "parts at token " in line


@pytest.mark.parametrize("kind", ["answer", "chat"])
def test_template_of_a_text_is_refused_where_more_is_asked(kind: str) -> None:
    settings = settings_of(kind)
    task = load_task(settings["task"], settings["dataset"])
    check_template(task, "base")
    with pytest.raises(UserError, match=r"set card\.template: base"):
        check_template(task, "task")
