"""Scoring a stage: what is kept of the vocabulary, greedy answers, and the count of characters."""

import errno
import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from evaluate_tfidf import fit
from pockettune.common.errors import DiskFullError
from pockettune.data.prompts import Example
from pockettune.evaluation.observers import OffLabels, Recorder, record
from pockettune.evaluation.stages import Runtime, answer_greedily

LOGITS = np.random.default_rng(0).normal(size=(5, 40)).astype(np.float32)
TASK = {
    "task": {"type": "classification", "system": "", "prompt": "{text}",
             "labels": {"0": "差", "1": "好", "2": "好极"}, "template_options": {}},
    "dataset": {"text_column": "text", "label_column": "label"},
}  # fmt: skip


# --- F16's answers over the whole vocabulary ---


def test_reference_is_numpys_format_to_the_byte(tmp_path: Path) -> None:
    path = tmp_path / "f16.npy"
    with record(path, LOGITS.shape) as recorder:
        for row, logits in enumerate(LOGITS):
            recorder.see(row, logits)
    kept = np.load(path, mmap_mode="r")
    exact = LOGITS - np.log(np.exp(LOGITS.astype(np.float64)).sum(axis=1, keepdims=True))
    np.testing.assert_array_equal(kept, exact.astype(np.float16))
    again = io.BytesIO()
    np.save(again, kept)
    assert again.getvalue() == path.read_bytes()


def test_reference_is_refused_where_there_is_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1))
    told = pytest.raises(DiskFullError, match=r"f16\.npy needs 0\.0 MB \(400 bytes\)")
    with told, record(tmp_path / "f16.npy", LOGITS.shape):
        raise AssertionError("scored in vain")
    assert list(tmp_path.iterdir()) == []


def test_reference_file_is_closed_before_it_is_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows moves no file that is open or mapped."""
    recorders: list[Recorder] = []
    closed: list[bool] = []
    move = Path.replace

    def watched(self: Path, target: Path) -> Path:
        closed.append(recorders[0].stream.closed)
        return move(self, target)

    monkeypatch.setattr(Path, "replace", watched)
    with record(tmp_path / "f16.npy", LOGITS.shape) as recorder:
        recorders.append(recorder)
    assert closed == [True]


def test_full_disk_in_mid_work_leaves_nothing(tmp_path: Path) -> None:
    told = pytest.raises(DiskFullError, match="disk full while writing")
    with told, record(tmp_path / "f16.npy", LOGITS.shape):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []


# --- what a program that lets the model write would get ---


def test_what_lies_off_the_answers() -> None:
    observer = OffLabels([[3, 0], [5, 1, 0], [5, 2, 0]])
    logits = np.log(np.full((2, 10), 0.01))
    logits[0, 3], logits[0, 5] = np.log(0.62), np.log(0.3)
    logits[1, 7], logits[1, 5] = np.log(0.52), np.log(0.4)
    for row in range(2):
        observer.see(row, logits[row])
    told = observer.describe()["off_labels"]
    assert told["rows"] == 0.5
    assert told["mass"] == pytest.approx((0.08 + 0.59) / 2)


def greedy(said: list[str | None], right: list[str], rows: int | None) -> dict[str, Any]:
    """Score what a runtime said; by the scores, 差 was the answer to every row."""
    examples = [Example(f"test-{n}", "", [n], [3, 0], r, False, False, False) for n, r in enumerate(right)]  # fmt: skip
    asked: list[int] = []

    def answer(prompts: Any, limit: int) -> list[str | None]:
        asked.append(limit)
        return [said[prompt[0]] for prompt in prompts]

    runtime = Runtime(lambda _: [], [e.prompt_ids for e in examples], 10, {}, answer)
    answers = {"words": ["差", "好", "好极"], "ids": [[3, 0], [5, 0], [5, 2, 0]]}
    settings = {**TASK, "evaluate": {"greedy_rows": rows}}
    scores = np.array([[0.0, -1.0, -2.0]] * len(right))
    told = answer_greedily(settings, runtime, examples, answers, scores)
    assert all(limit > 3 for limit in asked), "room for the longest answer and its end"
    return told


def test_greedy_answers_are_read_by_the_task() -> None:
    said = [" 好", "差", None, "好极了", "差"]
    assert greedy(said, ["好", "差", "差", "好极", "好"], 100) == {
        "greedy": {"rows": 5, "right": 2, "no_answer": 2, "scored_right": 2}
    }


@pytest.mark.parametrize("rows", [0, None])
def test_no_greedy_answers_where_none_are_wanted(rows: int | None) -> None:
    assert greedy(["差"], ["差"], rows) == {}


def test_label_that_shares_its_start_is_lost_in_greedy_text_alone() -> None:
    """差 0.40, 好 0.35, 好极 0.25: the scores say 差, the text begins with the likelier 好."""
    told = greedy(["好"], ["差"], 1)["greedy"]
    assert (told["right"], told["scored_right"]) == (0, 1)


# --- characters counted ---


def test_training_rows_of_one_class_are_answered_with_it() -> None:
    model = fit(["房间很干净"] * 3, ["好"] * 3)
    assert list(model.predict(["服务很差", "x"])) == ["好", "好"]
    assert np.exp(model.predict_log_proba(["x"])).tolist() == [[1.0]]


def test_few_short_texts_have_nothing_in_common() -> None:
    model = fit(["ab", "cd"], ["好", "差"])
    assert list(model.predict(["ab", "cd"])) == ["好", "差"]
