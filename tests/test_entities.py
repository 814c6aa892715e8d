"""Entities: three ways to label a row, the answer and back, places in the text, and scores as seqeval's."""

import ctypes
import json
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import ROOT
from fetch_dataset import fetch_dataset
from pockettune.common.errors import UserError
from pockettune.data.records import read_records, read_table
from pockettune.tasks import as_text_task
from pockettune.tasks.entities import Entities
from pockettune.tasks.entity_answers import place_names, read_answer, salvage_answer, write_answer
from pockettune.tasks.entity_rows import join_tokens, read_entities
from pockettune.tasks.entity_scores import kinds_of_error, score_entities

WEIBO = ROOT.parent / "shared/data/weibo_ner"
SETTINGS: dict[str, Any] = {
    "type": "entities", "system": "", "prompt": "{text}", "labels": {}, "template_options": {},
    "types": {"PER": "人名", "LOC": "地名", "ORG": "组织"}, "max_answer_tokens": 64,
}  # fmt: skip
COLUMNS = {"text_column": "text", "label_column": "label"}
TASK = Entities(SETTINGS, COLUMNS)

TEXT = "王小明在北京上学"
SPANS = [["人名", 0, 3], ["地名", 4, 6]]
TAGS = ["B-PER", "I-PER", "I-PER", "O", "B-LOC", "I-LOC", "O", "O"]


@pytest.mark.parametrize(
    ("text", "label"),
    [
        (list(TEXT), TAGS),
        (TEXT, TAGS),
        (["王小明", "在", "北京", "上学"], ["S-PER", "O", "B-LOC", "O"]),
        (list(TEXT), ["B-PER", "M-PER", "E-PER", "O", "B-LOC", "E-LOC", "O", "O"]),
        (TEXT, [[4, 6, "LOC"], [0, 3, "PER"]]),
        (TEXT, [{"start": 4, "end": 6, "label": "LOC"}, {"start": 0, "end": 3, "type": "PER"}]),
        (TEXT, {"PER": {"王小明": [[0, 2]]}, "LOC": {"北京": [[4, 5]]}, "ORG": None}),
    ],
)
def test_three_ways_to_label_give_the_same_record(text: Any, label: Any) -> None:
    assert TASK.read({"text": text, "label": label}) == {"text": TEXT, "entities": SPANS}


def test_words_are_joined_by_spaces_where_their_script_has_them() -> None:
    assert join_tokens(["Ann", "met", "李", "明", "in", "Rome", "。"])[0] == "Ann met李明in Rome。"
    text, spans = read_entities(["John", "Smith", "left"], ["B-PER", "I-PER", "O"])
    assert text[spans[0].start : spans[0].end] == "John Smith"


@pytest.mark.parametrize(
    ("text", "label", "told"),
    [
        ("北京大学", [[0, 2, "LOC"], [0, 4, "ORG"]], "LOC '北京' and ORG '北京大学' overlap; keep one of them"),
        ("北京大学", [[0, 2, "LOC"], [2, 9, "ORG"]], "[2, 9, 'ORG'] ends behind the text of 4 characters"),
        ("北京", [[1, 1, "LOC"], ["0", 1, "LOC"]], "[1, 1, 'LOC'] is not a start, an end behind it and a type; ['0'"),
        ("北京", ["O", "I-LOC"], "label 2 is I-LOC and begins an entity; write B-LOC"),
        ("北京人", ["B-LOC", "I-PER", "I-PER"], "label 2 is I-PER within LOC; write B-PER"),
        ("北京", ["S-LOC", "I-LOC"], "label 2 is I-LOC and begins an entity"),
        ("北京人", ["B-LOC", "O"], "it has 3 tokens and 2 labels"),
        ("北京人", ["B-LOC", "X", "LOC"], "label 2 is 'X', not O, B-type or I-type; label 3 is 'LOC'"),
        ("北京", {"LOC": {"北": [[1, 1]]}}, "LOC '北' is not at [1, 1], where '京' stands"),
        ("北 京", [[1, 2, "LOC"]], "LOC ' ' is empty"),
        ("北京", [[0, 2, "GPE"]], "type GPE is not one of task.types: PER, LOC, ORG"),
        ("北京", "LOC", "labels are 'LOC', not BIO labels, spans or names by type"),
        ("  ", [], "text is empty"),
    ],
)  # fmt: skip
def test_bad_rows_are_told_with_all_that_is_wrong(text: str, label: Any, told: str) -> None:
    with pytest.raises(ValueError) as caught:
        TASK.read({"text": text, "label": label})
    assert told in str(caught.value)


def test_bad_rows_are_told_at_once_and_in_one_line(tmp_path: Path) -> None:
    rows = [{"text": "北京", "label": ["I-LOC", "O"]}, {"text": "大学", "label": [[0, 1, "LOC"], [0, 2, "LOC"]]},
            {"text": "北京", "label": ["B-LOC", "I-LOC"]}, {"text": "上学", "label": []}]  # fmt: skip
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    dataset = {**COLUMNS, "files": dict.fromkeys(("train", "validation", "test"), str(path)), "split": None,
               "unlabelled": "refuse", "bad_rows": "refuse"}  # fmt: skip
    with pytest.raises(UserError) as caught:
        fetch_dataset(dataset, SETTINGS, tmp_path, tmp_path)
    assert "\n" not in str(caught.value)
    assert "train, row 1: label 1 is I-LOC and begins an entity; write B-LOC; train, row 2: LOC '大' and" in str(caught.value)  # fmt: skip
    fetch_dataset({**dataset, "bad_rows": "drop"}, SETTINGS, tmp_path, tmp_path)
    kept = list(read_records(tmp_path / "train.jsonl"))
    assert [record["entities"] for record in kept] == [[["地名", 0, 2]], []]
    audit = json.loads((tmp_path / "audit.json").read_text())
    assert audit["splits"]["train"]["answers"] == {'[["地名","北京"]]': 1, "[]": 1}


def test_file_of_a_token_a_line(tmp_path: Path) -> None:
    path = tmp_path / "a.bio"
    path.write_text("-DOCSTART- O\n\nJohn NNP B-PER\nSmith NNP I-PER\n\n\n北\tB-LOC\n京\tI-LOC\n")
    table = read_table(path, ["tokens", "tags"])
    assert table.to_dict("list") == {
        "tokens": [["John", "Smith"], ["北", "京"]],
        "tags": [["B-PER", "I-PER"], ["B-LOC", "I-LOC"]],
    }
    path.write_text("a O\nb\n\nc O\nd\n")
    with pytest.raises(UserError, match=r"no label beside the token in line 2: 'b'; line 5: 'd'"):
        read_table(path, ["tokens", "tags"])


def test_json_of_any_layout(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    rows = [{"text": "a", "label": {"PER": {"a": [[0, 0]]}}}, {"text": "b", "label": {}}]
    for text in (json.dumps(rows), "\n".join(json.dumps(row, indent=1) for row in rows)):
        path.write_text(text)
        assert read_table(path, ["text", "label"]).to_dict("records") == rows
    path.write_text('{"text": "a"}\n{"text": }\n')
    with pytest.raises(UserError, match="line 2 is not JSON"):
        read_table(path, ["text"])


NAMES = st.lists(
    st.tuples(st.sampled_from(["人名", "地名"]), st.text("北京a :\"\\[],\n", min_size=1))
)  # fmt: skip


@settings(deadline=None, database=None)
@given(NAMES)
def test_answer_is_read_as_it_was_written(names: list[tuple[str, str]]) -> None:
    assert read_answer(write_answer(names)) == names


@settings(deadline=None, database=None)
@given(NAMES, st.integers(min_value=0))
def test_of_a_cut_answer_what_was_finished_is_kept(names: list[tuple[str, str]], cut: int) -> None:
    answer = write_answer(names)
    cut %= len(answer)
    finished = [n for n in range(len(names)) if len(write_answer(names[: n + 1])) - 1 <= cut]
    assert read_answer(salvage_answer(answer[:cut]) or "[]") == [names[n] for n in finished]


def test_answer_and_back() -> None:
    record = TASK.read({"text": TEXT, "label": TAGS})
    assert TASK.answer(record) == '[["人名","王小明"],["地名","北京"]]'
    assert TASK.parse(TASK.answer(record), record) == TASK.reference(record)
    assert TASK.parse("[]", record) == [] and TASK.answer({"text": "好", "entities": []}) == "[]"
    assert TASK.parse(' [["人名", "王小明"]]\n', record) == [["人名", "王小明", 0, 3]]
    assert TASK.parse('[["人名", ""]]', record) == [["人名", "", -1, -1]]
    for said in (
        "", "人名: 王小明", "1", "{}", '["人名"]', '[["人名"]]', '[["人名","王","小"]]', '[["人名",1]]',
        '[["国名","王小明"]]', '[["人名","王小明"]', '[["人名","\\ud83d"]]', "[" * 100_000, "{\"人名\":\"王\"}",
    ):  # fmt: skip
        assert TASK.parse(said, record) is None, said


def test_names_take_places_left_to_right() -> None:
    text = "北京的北京大学在北京"
    found = place_names(
        [("地名", "北京"), ("组织", "北京大学"), ("地名", "北京"), ("地名", "北京")], text
    )
    assert found == [("地名", "北京", 0, 2), ("组织", "北京大学", 3, 7), ("地名", "北京", 8, 10), ("地名", "北京", -1, -1)]  # fmt: skip
    # Out of order it is found all the same, and a place is given once.
    assert place_names([("地名", "在"), ("地名", "北京大学"), ("地名", "京大")], text)[1:] == [
        ("地名", "北京大学", 3, 7), ("地名", "京大", -1, -1),
    ]  # fmt: skip


def test_text_that_was_cut_or_defused_keeps_its_entities_right() -> None:
    record = {"text": "<s>王小明<s>在北京", "entities": [["人名", 3, 6], ["地名", 10, 12]]}
    cut = TASK.shorten(record, 1, lambda text, excess: text[:-excess])
    assert cut and TASK.answer(cut) == '[["人名","王小明"]]'
    clean = TASK.clean(record, lambda text: text.replace("<s>", "< s>"))
    assert TASK.answer(clean) == TASK.answer(record) and clean["text"] == "< s>王小明< s>在北京"


VOCABULARY = sorted(ROOT.glob("resources/llama.cpp-*/models/ggml-vocab-qwen2.gguf"))
TOKEN = np.dtype([("id", "i4"), ("logit", "f4"), ("p", "f4")])  # llama_token_data


class Reader:
    """Reads texts by a grammar, as llama.cpp does, with a vocabulary and no model."""

    def __init__(self, path: Path) -> None:
        options = llama_cpp.llama_model_default_params()
        options.vocab_only = True
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
        self.words = llama_cpp.llama_model_get_vocab(self.model)

    def accepts(self, grammar: str, text: str) -> bool:
        sampler = llama_cpp.llama_sampler_init_grammar(self.words, grammar.encode(), b"root")
        assert sampler, grammar
        ids, given = (llama_cpp.llama_token * 512)(), text.encode()
        count = llama_cpp.llama_tokenize(self.words, given, len(given), ids, 512, False, False)
        for token in [*ids[:count], llama_cpp.llama_vocab_eos(self.words)]:
            asked = np.zeros(1, TOKEN)
            asked["id"] = token
            data = asked.ctypes.data_as(llama_cpp.llama_token_data_p)
            array = llama_cpp.llama_token_data_array(data, 1, -1, False)
            llama_cpp.llama_sampler_apply(sampler, ctypes.byref(array))
            if not np.isfinite(asked["logit"][0]):
                break
            llama_cpp.llama_sampler_accept(sampler, token)
        llama_cpp.llama_sampler_free(sampler)
        return bool(np.isfinite(asked["logit"][0]))


@pytest.mark.skipif(not VOCABULARY, reason="llama.cpp's vocabularies are not here (make setup)")
def test_grammar_allows_what_is_understood() -> None:
    reader = Reader(VOCABULARY[0])
    name = json.dumps('a"\\[]\n', ensure_ascii=False)
    allowed = ["[]", '[["人名","王小明"]]', f'[["人名","王"],["地名",{name}]]']
    refused = [
        "", "无", "[[]]", '[["国名","甲"]]', '[["人名",""]]', '[["人名","王"],]', '[["人名","王"]', '[["人名","a\nb"]]',
        '[["人名","\\u00e9"]]', f'[["人名","{"字" * 65}"]]',
    ]  # fmt: skip
    for text in [*allowed, *refused]:
        assert reader.accepts(TASK.grammar(), text) == (text in allowed), text
        assert text in refused or TASK.parse(text) is not None, text


# By seqeval 1.2.2 (f1_score, classification_report) on the same tags.
TRUE = ["B-PER I-PER O B-LOC O", "B-ORG I-ORG I-ORG O B-PER", "O O O", "B-LOC B-LOC I-LOC O"]
SAID = ["B-PER I-PER O B-ORG O", "B-ORG I-ORG O O B-PER", "O B-PER O", "B-LOC B-LOC I-LOC O"]


def entities_of(tags: str) -> list[list[Any]]:
    text = "甲乙丙丁戊"[: len(tags.split())]
    return [[s.type, text[s.start : s.end], s.start, s.end] for s in read_entities(text, tags.split())[1]]  # fmt: skip


def test_scores_are_those_of_seqeval() -> None:
    references, predictions = list(map(entities_of, TRUE)), list(map(entities_of, SAID))
    scores = score_entities(references, predictions, ["PER", "LOC", "ORG"])
    assert scores["micro_f1"] == pytest.approx(0.6153846153846153, abs=1e-15)
    assert scores["macro_f1"] == pytest.approx(0.5333333333333333, abs=1e-15)
    assert scores["precision"] == pytest.approx(0.5714285714285714, abs=1e-15)
    assert scores["recall"] == pytest.approx(0.6666666666666666, abs=1e-15)
    assert {k: v["f1"] for k, v in scores["per_type"].items()} == {
        "PER": 0.8,
        "LOC": 0.8,
        "ORG": 0.0,
    }
    assert scores["errors"] == {"type": 1, "boundary": 1, "missing": 0, "made_up": 1, "not_in_text": 0}  # fmt: skip
    sums = [sum(n) for n in zip(*map(TASK.counts, references, predictions), strict=True)]
    assert TASK.measure(sums) == scores["micro_f1"]


def test_errors_by_kind() -> None:
    gold = [["人名", "王小明", 0, 3], ["地名", "北京", 4, 6]]
    said = [["人名", "小明", 1, 3], ["组织", "学", 7, 8], ["人名", "张三", -1, -1]]
    assert kinds_of_error(gold, said) == {
        "boundary": 1,
        "made_up": 1,
        "not_in_text": 1,
        "missing": 1,
    }
    assert kinds_of_error(gold, None)["missing"] == 2
    assert TASK.counts(gold, said) == (0, 2, 2) and TASK.counts(gold, None) == (0, 0, 2)


def test_nothing_to_find_and_nothing_found_is_right() -> None:
    assert TASK.measure([0, 0, 0]) == 1 and TASK.measure([0, 1, 0]) == 0
    assert TASK.score([[]], [[]])["micro_f1"] == 1


def test_task_is_one_of_text() -> None:
    assert as_text_task(TASK) is TASK and TASK.combine([[]], [0.0]) == []


@pytest.mark.skipif(not WEIBO.exists(), reason="the Weibo NER files are not here")
def test_weibo_ner_is_read_and_its_answers_are_found_again() -> None:
    types = {f"{kind}.{level}": f"{kind}{level}" for kind in ("PER", "LOC", "ORG", "GPE") for level in ("NAM", "NOM")}  # fmt: skip
    task = Entities({**SETTINGS, "types": types}, COLUMNS)
    records, faults = [], []
    for row in read_table(WEIBO / "test.json", ["text", "label"]).to_dict("records"):
        try:
            records.append(task.read({str(key): cell for key, cell in row.items()}))
        except ValueError as error:
            faults.append(str(error))
    assert len(records) == 266 and all("begins an entity; write B-" in fault for fault in faults)
    references = [task.reference(record) for record in records]
    parsed = [task.parse(task.answer(record), record) for record in records]
    # 3 of its 399 names stand in the text before where they are labelled, which an answer cannot tell.
    assert task.score(references, parsed)["micro_f1"] == pytest.approx(396 / 399)
