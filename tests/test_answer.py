"""Questions on a text: SQuAD's layout and flat rows, scores as the official scripts', windows."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import ROOT
from fetch_dataset import fetch_dataset
from pockettune.common.errors import UserError
from pockettune.data.records import read_records, read_table
from pockettune.tasks.answer import Answer, find_nearest
from pockettune.tasks.answer_scores import score_answer

CMRC = ROOT.parent / "shared/data/cmrc2018"
SETTINGS: dict[str, Any] = {
    "type": "answer", "system": "", "prompt": "{text}\n{question}", "labels": {}, "template_options": {},
    "no_answer": "无", "count": "characters", "stride": 4, "max_answer_tokens": 64,
}  # fmt: skip
COLUMNS = {"text_column": "context", "question_column": "question", "label_column": "answers"}
TASK = Answer(SETTINGS, COLUMNS)
TEXT = "北京在北方，上海在南方"
ROW = {"context": TEXT, "question": "哪里在南方？"}


@pytest.mark.parametrize(
    "answers",
    [
        "上海",
        ["上海"],
        [{"text": "上海", "answer_start": 6}],
        [{"text": " 上海", "answer_start": 5}],
        {"text": ["上海"], "answer_start": [6]},
        {"text": ["上海"], "answer_start": [9]},  # off by some
    ],
)
def test_answers_of_every_shape_give_the_same_record(answers: Any) -> None:
    record = TASK.read({**ROW, "answers": answers})
    assert record == {"text": TEXT, "question": "哪里在南方？", "answers": [["上海", 6]]}
    assert TASK.answer(record) == "上海" and TASK.reference(record) == ["上海"]


@pytest.mark.parametrize("answers", [[], None, {"text": [], "answer_start": []}, "", float("nan")])
def test_question_without_an_answer(answers: Any) -> None:
    record = TASK.read({**ROW, "answers": answers})
    assert TASK.answer(record) == "无" and TASK.reference(record) == []
    assert TASK.parse(" 无\n") == "" and TASK.parse("上海 ") == "上海" and TASK.parse(" ") is None
    with pytest.raises(ValueError, match=r"it has no answer; set task\.no_answer"):
        Answer({**SETTINGS, "no_answer": None}, COLUMNS).read({**ROW, "answers": answers})


def test_place_nearest_to_the_one_that_is_said() -> None:
    assert [find_nearest("abcabcabc", "abc", start) for start in (-1, 0, 2, 8)] == [0, 0, 3, 6]
    assert find_nearest("abc", "x", 0) == -1


def test_of_several_answers_one_must_stand_in_the_text() -> None:
    record = TASK.read({**ROW, "answers": ["是上海", "上海"]})
    assert TASK.answer(record) == "上海" and TASK.reference(record) == ["是上海", "上海"]
    with pytest.raises(ValueError, match="answer '广州'; '深圳' does not stand in its context"):
        TASK.read({**ROW, "answers": ["广州", "深圳"]})


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"context": " ", "question": None}, "context is empty; question is empty"),
        ({"answers": [3]}, "answer {'text': 3} is not text, nor {text, answer_start}"),
        (
            {"answers": "无", "context": "无"},
            "answer '无' is task.no_answer; take another word there",
        ),
    ],
)
def test_bad_rows_are_told(row: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError) as caught:
        TASK.read({**ROW, "answers": "上海", **row})
    assert told in str(caught.value)


def squad(*answers: list[str]) -> dict[str, Any]:
    questions = [{"id": str(n), "question": f"问{n}", "answers": [{"text": a, "answer_start": 0} for a in found]}
                 for n, found in enumerate(answers)]  # fmt: skip
    return {"version": "2", "data": [{"title": "t", "paragraphs": [{"context": TEXT, "qas": questions}]}]}  # fmt: skip


def test_squad_file_becomes_rows_of_questions(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    dataset = {**COLUMNS, "files": dict.fromkeys(("train", "validation", "test"), str(path)),
               "split": None, "unlabelled": "refuse", "bad_rows": "refuse"}  # fmt: skip
    path.write_text(json.dumps(squad(["上海", "北京"], [])))
    fetch_dataset(dataset, SETTINGS, tmp_path, tmp_path)
    assert list(read_records(tmp_path / "train.jsonl")) == [
        {"id": "train-1", "text": TEXT, "question": "问0", "answers": [["上海", 6], ["北京", 0]]},
        {"id": "train-2", "text": TEXT, "question": "问1", "answers": []},
    ]
    path.write_text(json.dumps(squad(["广州"], ["北京"], ["深圳"])))
    with pytest.raises(UserError) as caught:
        fetch_dataset(dataset, SETTINGS, tmp_path, tmp_path)
    assert "\n" not in str(caught.value)
    assert "row 1: answer '广州' does not stand in its context; train, row 3: answer '深圳'" in str(caught.value)  # fmt: skip
    path.write_text('{"data": [{"paragraphs": [{"context": "a"}]}]}')
    with pytest.raises(UserError, match=r"is not in SQuAD's layout, .* 'qas' is missing"):
        read_table(path, ["context"])


# By cmrc2018_evaluate.py at c0eb1b6, nltk 3.10.4's word_tokenize without its sentence model.
BY_CMRC = [
    (["踢爆"], "踢爆", 1, 1.0),
    (["踢爆", "一踢爆"], "为踢爆。", 0, 0.8),
    (["4分钟"], "中离+4分钟", 0, 0.75),
    (["NT$3,500.5 (约)"], "nt$3,500.5(约)", 0, 1.0),
    (["Nexon公司的K-Pop"], "nexon公司的kpop", 1, 1.0),
    (["可选择经典、热血、狙击等模式进行游戏。"], "经典、热血、狙击", 0, 0.5454545454545454),
    (["2011年"], "2012年", 0, 0.5),
    (["北京大学"], "大学北京", 0, 0.5),
    (["don't stop, U.S."], "stop", 0, 0.2857142857142857),
    (["……"], "…", 0, 0.0),
]


@pytest.mark.parametrize(("golds", "answer", "em", "f1"), BY_CMRC)
def test_scores_by_character_are_those_of_cmrc(
    golds: list[str], answer: str, em: int, f1: float
) -> None:
    assert score_answer(golds, answer, "characters") == (em, pytest.approx(f1, abs=1e-15))


# By compute_exact and compute_f1 of SQuAD's evaluate-v2.0.py.
BY_SQUAD = [
    ("the U.S. Army", "us army", 1, 1.0),
    ("Denver Broncos", "the broncos of Denver, Denver", 0, 0.6666666666666666),
    ("10,000", "10000", 1, 1.0),
    ("an", "the", 1, 1),
    ("well-known", "well known", 0, 0),
    ("Saint Mary", "Mary", 0, 0.6666666666666666),
    ("", "the", 1, 1),
    ("", "x", 0, 0),
]


@pytest.mark.parametrize(("gold", "answer", "em", "f1"), BY_SQUAD)
def test_scores_by_word_are_those_of_squad(gold: str, answer: str, em: int, f1: float) -> None:
    assert score_answer([gold] if gold else [], answer, "words") == (em, pytest.approx(f1))


def test_scores_of_questions_with_and_without_answers() -> None:
    references = [["上海"], ["北京", "京"], [], []]
    predictions = ["上海", "北", "", "上海"]
    scores = TASK.score(references, predictions)
    assert scores["answerable"] == {
        "f1": pytest.approx((1 + 2 / 3) / 2),
        "exact_match": 0.5,
        "n": 2,
    }
    assert scores["unanswerable"] == {"f1": 0.5, "exact_match": 0.5, "n": 2}
    sums = [sum(n) for n in zip(*map(TASK.counts, references, predictions), strict=True)]
    assert TASK.measure(sums) == scores["f1"] and sums[0] / sums[2] == scores["exact_match"]
    assert TASK.counts(["上海"], None) == TASK.counts([], None) == (0, 0, 1)
    assert "unanswerable" not in TASK.score([["a"]], ["a"])


def count_tokens(record: dict[str, Any]) -> int:
    """A token a character, digits half of one; five for the frame."""
    digits = sum(character.isdigit() for character in record["text"])
    return 5 + len(record["text"]) - digits // 2


@settings(deadline=None, database=None)
@given(st.text("ab12", min_size=1, max_size=80), st.integers(20, 40), st.data())
def test_windows_hold_every_short_answer(text: str, room: int, data: Any) -> None:
    start = data.draw(st.integers(0, len(text) - 1))
    answer = text[start : start + data.draw(st.integers(1, 3))]
    record = {"id": "x", "text": text, "question": "q", "answers": [[answer, start]]}
    windows = TASK.questions(record, count_tokens, room)
    assert all(count_tokens(window) <= room for window in windows)
    assert any(TASK.answer(window) == answer for window in windows)
    for window in windows:
        place = window["answers"][0][1]
        assert window["text"] in text and (place < 0 or window["text"][place:].startswith(answer))
    assert text.startswith(windows[0]["text"]) and text.endswith(windows[-1]["text"])
    assert (len(windows) == 1) == (count_tokens(record) <= room)


def test_windows_need_a_word_and_room() -> None:
    record = {"id": "train-7", "text": "a" * 40, "question": "q", "answers": [["a", 0]]}
    bare = Answer({**SETTINGS, "no_answer": None}, COLUMNS)
    assert bare.questions(record, count_tokens, 45) == [record]
    with pytest.raises(UserError, match=r"record train-7: its prompt of 45 tokens .* need task\.no_answer"):  # fmt: skip
        bare.questions(record, count_tokens, 20)
    with pytest.raises(UserError, match="leaves 3 tokens for its text, too few for windows"):
        TASK.questions(record, count_tokens, 8)


def test_best_window_is_the_likeliest_that_has_an_answer() -> None:
    assert TASK.combine(["", "上海", "北京", None], [-0.1, -3.0, -2.0, -0.5]) == "北京"
    assert TASK.combine(["", None], [-9.0, -0.1]) == "" and TASK.combine([None], [0.0]) is None


def test_text_and_question_go_into_the_prompt_as_they_are() -> None:
    record = {"text": "{question}", "question": "{text}?"}
    assert TASK.prompt(record) == [{"role": "user", "content": "{question}\n{text}?"}]
    assert TASK.prompt(TASK.trial())[0]["content"] == SETTINGS["prompt"]


def test_defused_text_keeps_its_answer() -> None:
    record = {"text": "<s>上<s>海", "question": "<s>", "answers": [["上<s>海", 3], ["海上", -1]]}
    clean = TASK.clean(record, lambda text: text.replace("<s>", "< s>"))
    assert clean == {"text": "< s>上< s>海", "question": "< s>", "answers": [["上< s>海", 4], ["海上", -1]]}  # fmt: skip
    cut = TASK.shorten(clean, 1, lambda text, excess: text[:-excess])
    assert cut and TASK.answer(cut) == "无"


@pytest.mark.skipif(not CMRC.exists(), reason="the CMRC 2018 files are not here")
def test_cmrc_is_read_and_its_own_answers_are_right() -> None:
    records, faults = [], []
    for row in read_table(CMRC / "trial.json", TASK.columns).to_dict("records"):
        try:
            records.append(TASK.read({str(key): cell for key, cell in row.items()}))
        except ValueError as error:
            faults.append(str(error))
    assert len(records) == 1000 and faults == ["question is empty"] * 2
    scores = TASK.score(list(map(TASK.reference, records)), list(map(TASK.answer, records)))
    assert scores == {"f1": 1, "exact_match": 1, "n": 1000, "answerable": {"f1": 1, "exact_match": 1, "n": 1000}}  # fmt: skip
