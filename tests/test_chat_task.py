"""Chat: files of three traditions, what is wrong with a conversation, and what is asked of one."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from fetch_dataset import fetch_dataset
from pockettune.common.errors import UserError
from pockettune.data.records import read_records
from pockettune.tasks.chat import Chat

SETTINGS: dict[str, Any] = {
    "type": "chat", "system": "", "prompt": "", "labels": {}, "template_options": {}, "max_answer_tokens": 256,
}  # fmt: skip
COLUMNS = {"text_column": "messages", "label_column": None}
TASK = Chat(SETTINGS, COLUMNS)
TALK = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "q1"},
    {"role": "assistant", "content": "a1"},
    {"role": "user", "content": "q2"},
    {"role": "assistant", "content": "a2"},
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pd.DataFrame(rows).to_parquet(path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    return path


def fetch(path: Path, **columns: Any) -> list[dict[str, Any]]:
    dataset = {**COLUMNS, **columns, "files": dict.fromkeys(("train", "validation", "test"), str(path)),
               "split": None, "unlabelled": "refuse", "bad_rows": "refuse"}  # fmt: skip
    fetch_dataset(dataset, SETTINGS, path.parent, path.parent)
    return [record["messages"] for record in read_records(path.parent / "train.jsonl")]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_three_traditions_give_the_same_conversations(suffix: str, tmp_path: Path) -> None:
    talks = [TALK[1:3], [TALK[1], {"role": "assistant", "content": "other"}]]
    messages = [{"messages": talk} for talk in talks]
    assert fetch(write(tmp_path / f"a.{suffix}", messages)) == talks
    names = {"user": "human", "assistant": "gpt"}
    turns = [{"conversations": [{"from": names[m["role"]], "value": m["content"]} for m in talk]} for talk in talks]  # fmt: skip
    assert fetch(write(tmp_path / f"b.{suffix}", turns), text_column="conversations") == talks
    told = [{"instruction": q["content"], "input": "", "output": a["content"]} for q, a in talks]
    alpaca = {"text_column": "instruction", "label_column": "output"}
    assert fetch(write(tmp_path / f"c.{suffix}", told), **alpaca) == talks


def test_input_and_system_of_a_row() -> None:
    task = Chat(
        {**SETTINGS, "system": "of task"}, {"text_column": "instruction", "label_column": "output"}
    )
    row = {"instruction": "Translate", "input": "chat", "output": "猫", "system": "of row"}
    assert task.read(row)["messages"] == [
        {"role": "system", "content": "of row"},
        {"role": "user", "content": "Translate\nchat"},
        {"role": "assistant", "content": "猫"},
    ]
    without = task.read({**row, "system": float("nan"), "input": None})
    assert without["messages"][:2] == [
        {"role": "system", "content": "of task"},
        {"role": "user", "content": "Translate"},
    ]
    assert without["text"] == "Translate"


def test_own_system_message_is_kept() -> None:
    task = Chat({**SETTINGS, "system": "of task"}, COLUMNS)
    assert task.read({"messages": TALK})["messages"] == TALK


SYSTEM, USER, ASSISTANT = TALK[0], TALK[1], TALK[2]


@pytest.mark.parametrize(
    ("turns", "told"),
    [
        ([ASSISTANT, USER, ASSISTANT], "it begins with the assistant"),
        ([USER, {**ASSISTANT, "content": " \n"}], "turn 2 (assistant) is empty"),
        ([USER, {"role": "tool", "content": "x"}], "turn 2: role 'tool' is not one of system, user, human, assistant, gpt"),
        ([USER, ASSISTANT, SYSTEM, USER, ASSISTANT], "turn 3 is the system's, which must be the first"),
        ([USER, ASSISTANT, USER], "it ends with the user; take the last turn away"),
        ([USER, USER, ASSISTANT], "turn 2: user follows user; join the two"),
        ([SYSTEM], "it has no turn but the system's"),
        ([USER, {"role": "assistant", "content": None}], "turn 2 (assistant) is None, not text"),
        ([USER, "hello"], "turn 2 is 'hello', not role and content"),
        ([], "[] is not a list of turns"),
        ("hello", "messages is 'hello', not a list of turns"),
        (None, "messages is empty"),
        ([ASSISTANT, {**USER, "content": ""}], "turn 2 (user) is empty; it begins with the assistant; it ends with the user"),
    ],
)  # fmt: skip
def test_bad_conversations(turns: Any, told: str) -> None:
    with pytest.raises(ValueError) as caught:
        TASK.read({"messages": turns})
    assert told in str(caught.value)


def test_bad_conversations_are_told_at_once(tmp_path: Path) -> None:
    rows = [{"messages": [ASSISTANT]}, {"messages": [USER, ASSISTANT]}, {"messages": [USER]}]
    with pytest.raises(UserError) as caught:
        fetch(write(tmp_path / "a.jsonl", rows))
    assert "train, row 1: it begins with the assistant; train, row 3: it ends with the user" in str(caught.value)  # fmt: skip


def test_missing_column_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no column messages; it has conversations"):
        fetch(write(tmp_path / "a.jsonl", [{"conversations": TALK}]))


def test_every_turn_of_the_assistant_is_asked() -> None:
    record = {"id": "train-1", **TASK.read({"messages": TALK})}
    first, second = TASK.questions(record, lambda _: 0, 0)
    assert (TASK.prompt(first), TASK.answer(first)) == (TALK[:2], "a1")
    assert (TASK.prompt(second), TASK.answer(second)) == (TALK[:4], "a2")
    assert TASK.reference(record) == ["a1", "a2"] and second["id"] == "train-1"
    assert TASK.prompt(TASK.trial()) == [{"role": "user", "content": "{text}"}]


def test_long_conversation_loses_its_oldest_exchange_then_the_message() -> None:
    record = {"messages": TALK, "text": "q1"}

    def cut(text: str, excess: int) -> str:
        return text[:-excess]

    shorter = TASK.shorten(record, 1, cut)
    assert shorter and shorter["messages"] == [TALK[0], *TALK[3:]]
    shorter = TASK.shorten(shorter, 1, cut)
    assert shorter and shorter["messages"][1] == {"role": "user", "content": "q"}
    shorter = TASK.shorten(shorter, 1, cut)
    assert shorter and TASK.answer(shorter) == "a2" and TASK.shorten(shorter, 1, cut) is None


def test_control_tokens_are_defused_in_every_turn() -> None:
    talk = [{**message, "content": f"<s>{message['content']}"} for message in TALK]
    record = TASK.clean(TASK.read({"messages": talk}), lambda text: text.replace("<s>", "< s>"))
    assert all(message["content"].startswith("< s>") for message in record["messages"])


def test_score_is_the_share_of_tokens() -> None:
    references = [["a"], ["b", "c"]]
    predictions: list[Any] = [[1, 2], TASK.combine([[3, 3], [2, 5]], [0.0, 0.0])]
    assert TASK.score(references, predictions) == {"token_accuracy": 6 / 10, "tokens": 10}
    assert TASK.measure((0, 0)) == 1
