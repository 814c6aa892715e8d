"""Reading datasets: formats, the audit, and what is said about a bad file."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from conftest import ROOT
from fetch_dataset import fetch_dataset
from pockettune.common.errors import UserError
from pockettune.data.partition import cut_rows
from pockettune.data.records import read_records, read_table

CHNSENTICORP = ROOT.parent / "shared/data/chnsenticorp"
TASK = {"type": "classification", "system": "", "prompt": "{text}", "labels": {"0": "负面", "1": "正面"}, "template_options": {}}  # fmt: skip
ROWS = [("很好", 1), ("很差", 0), ("一般\n换行，“引号”", 1)]


def settings(**files: Path) -> dict[str, Any]:
    return {
        "files": {name: str(path) for name, path in files.items()},
        "split": {"validation": 0.2, "test": 0.3, "seed": 1},
        "text_column": "text",
        "label_column": "label",
        "unlabelled": "refuse",
        "bad_rows": "refuse",
    }


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_formats_give_the_same_records(suffix: str, tmp_path: Path) -> None:
    table = pd.DataFrame(ROWS, columns=["text", "label"])
    path = tmp_path / f"a.{suffix}"
    if suffix == "csv":
        table.to_csv(path, index=False)
    elif suffix == "jsonl":
        table.to_json(path, orient="records", lines=True, force_ascii=False)
    else:
        table.to_parquet(path)
    fetch_dataset(settings(train=path, validation=path, test=path), TASK, tmp_path, tmp_path)
    assert list(read_records(tmp_path / "train.jsonl")) == [
        {"id": "train-1", "text": "很好", "label": "正面"},
        {"id": "train-2", "text": "很差", "label": "负面"},
        {"id": "train-3", "text": "一般\n换行，“引号”", "label": "正面"},
    ]


def test_a_quote_in_a_tsv_is_text(tmp_path: Path) -> None:
    path = write(tmp_path, "a.tsv", 'text\tlabel\n"没有关上\t1\n下一行\t0\n')
    assert read_table(path, ["text", "label"])["text"].tolist() == ['"没有关上', "下一行"]


@pytest.mark.parametrize("rows", ["好,1,\n差,0,\n", "好,1,\n差,0\n"])
def test_a_comma_at_the_end_of_rows_is_no_cell(rows: str, tmp_path: Path) -> None:
    table = read_table(write(tmp_path, "a.csv", f"text,label\n{rows}"), ["text", "label"])
    assert table.to_dict("list") == {"text": ["好", "差"], "label": ["1", "0"]}


def test_rows_of_a_parquet_with_an_index_of_its_own_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pd.DataFrame({"text": ["a", "b"], "label": [1, 0]}, index=["x", "y"]).to_parquet(path)
    fetch_dataset(settings(train=path, validation=path, test=path), TASK, tmp_path, tmp_path)
    assert [r["id"] for r in read_records(tmp_path / "test.jsonl")] == ["test-1", "test-2"]


def test_texts_of_several_lines_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path, "a.csv", 'text,label\n"1,好\n2,不错",1\n差,0\n')
    fetch_dataset(settings(train=path, validation=path, test=path), TASK, tmp_path, tmp_path)
    audit = json.loads((tmp_path / "audit.json").read_text())
    assert audit["splits"]["train"]["texts_with_line_breaks"] == 1
    assert "train: 1 texts hold line breaks" in caplog.text


def test_one_file_is_cut_into_disjoint_splits_with_stable_ids(tmp_path: Path) -> None:
    path = write(
        tmp_path, "all.csv", "text,label\n" + "".join(f"t{i},{i % 2}\n" for i in range(100))
    )
    fetch_dataset(settings(all=path), TASK, tmp_path, tmp_path / "a")
    fetch_dataset(settings(all=path), TASK, tmp_path, tmp_path / "b")
    splits = {name: list(read_records(tmp_path / f"a/{name}.jsonl")) for name in ("train", "validation", "test")}  # fmt: skip
    assert {name: len(rows) for name, rows in splits.items()} == {
        "train": 50, "validation": 20, "test": 30,
    }  # fmt: skip
    texts = [record["text"] for rows in splits.values() for record in rows]
    assert len(set(texts)) == 100
    # An id names the row of the file, whatever split it fell into.
    assert all(r["id"].split("-")[1] == str(int(r["text"][1:]) + 1) for r in splits["test"])
    assert (tmp_path / "a/test.jsonl").read_bytes() == (tmp_path / "b/test.jsonl").read_bytes()


def cut(rows: list[tuple[str, int]], folder: Path) -> dict[str, set[str]]:
    """Return the texts of each split of one file."""
    path = folder / "all.csv"
    pd.DataFrame(rows, columns=["text", "label"]).to_csv(path, index=False)
    fetch_dataset(settings(all=path), TASK, folder, folder)
    return {
        name: {record["text"] for record in read_records(folder / f"{name}.jsonl")}
        for name in ("train", "validation", "test")
    }


def test_a_new_row_leaves_the_others_in_their_splits(tmp_path: Path) -> None:
    rows = [(f"t{i}", i % 2) for i in range(200)]
    before, after = cut(rows, tmp_path), cut([("new", 1), *rows], tmp_path)
    moved = [text for name in before for text in before[name] - after[name]]
    assert len(moved) <= 2  # one beside each cut


def test_rows_of_one_text_fall_into_one_split(tmp_path: Path) -> None:
    splits = cut([(form.format(i), i % 2) for i in range(60) for form in ("a{}", "A{} ")], tmp_path)
    texts = [{text.strip().lower() for text in found} for found in splits.values()]
    assert sum(map(len, texts)) == len(set.union(*texts)) == 60


def test_every_label_has_its_share_of_each_split(tmp_path: Path) -> None:
    cut([(f"t{i}", int(i < 10)) for i in range(200)], tmp_path)
    audit = json.loads((tmp_path / "audit.json").read_text())
    assert {name: facts["answers"]["正面"] for name, facts in audit["splits"].items()} == {
        "train": 5, "validation": 2, "test": 3,
    }  # fmt: skip


def test_many_labels_of_few_texts_give_their_share_together() -> None:
    labels = [str(i // 4) for i in range(400)]
    shares = {"test": 0.1, "validation": 0.1}
    parts = cut_rows([f"t{i}" for i in range(400)], labels, shares, seed=13)
    assert 25 < len(parts["test"]) < 55 and 25 < len(parts["validation"]) < 55


def test_texts_alike_but_for_form_are_seen(tmp_path: Path) -> None:
    train = write(tmp_path, "train.csv", "text,label\nGood  Food,1\n差！,0\n")
    validation = write(tmp_path, "validation.csv", "text,label\n中,1\n")
    test = write(tmp_path, "test.csv", "text,label\ngood food ,1\n差!,1\n中,1\n新,0\n")
    fetch_dataset(settings(train=train, validation=validation, test=test), TASK, tmp_path, tmp_path)
    assert [r["seen"] for r in read_records(tmp_path / "test.jsonl")] == [True, True, False, False]
    audit = json.loads((tmp_path / "audit.json").read_text())["splits"]["test"]
    assert (audit["seen_in_train"], audit["seen_in_validation"]) == (2, 1)
    assert audit["contradicts_train"] == 1


def test_audit_counts_what_a_score_hides(tmp_path: Path) -> None:
    train = write(tmp_path, "train.csv", "text,label\na,1\na,1\nb,0\nb,1\nc,0\n")
    test = write(tmp_path, "test.csv", "text,label\na,0\nb,0\nd,1\nd,1\n")
    fetch_dataset(settings(train=train, validation=test, test=test), TASK, tmp_path, tmp_path)
    audit = json.loads((tmp_path / "audit.json").read_text())
    assert audit["splits"]["train"]["duplicates"] == 2
    assert audit["splits"]["train"]["answers"] == {"正面": 3, "负面": 2}
    assert audit["train_texts_with_several_answers"] == 1
    assert audit["splits"]["test"]["seen_in_train"] == 2
    assert audit["splits"]["test"]["contradicts_train"] == 1
    assert [r["seen"] for r in read_records(tmp_path / "test.jsonl")] == [True, True, False, False]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", "is empty"),
        ("a.csv", b"text,label\n", "a header and no rows"),
        ("a.csv", b"content,label\nx,1\n", "no column text; it has content, label"),
        ("a.csv", "text,label\n好,1\n".encode("gb18030"), "line 2 is not UTF-8 (byte 0xba)"),
        (
            "a.csv",
            b"text,label\nx,1\ny,2\nz,7\n",
            "row 2: label '2' is not one of 0 (负面), 1 (正面); train, row 3",
        ),
        ("a.csv", b"text,label\n ,1\n", "row 1: text is empty"),
        ("a.csv", b"text,label\nx,1,2,3\ny,1,2,3,4\n", "cannot be read as csv"),
        ("a.csv", b"text,label\nx,1,5\ny,0,6\n", "rows have 3 cells, its header 2"),
        (
            "a.csv",
            'text,label\n"好店,1\n差店,0\n不错",1\n中,0\n'.encode(),
            "row 1: text has ,1 at the end of a line",
        ),
        (
            "a.csv",
            b'label,text\n1,"a\n0,b\n1,c"\n0,d\n',
            "row 1: text has 0, at the start of a line",
        ),
        (
            "a.csv",
            b'id,label,text\n7,1,"a\n8,0,b"\n9,0,d\n',
            "row 1: text has 8,0, at the start of a line",
        ),
        ("a.jsonl", b'{"text": "x", "label": 1}\n{oops\n', "line 2 is not JSON"),
        ("a.jsonl", b'["x", 1]\n', "line 1 is not a JSON object"),
        ("a.parquet", b"PAR1....", "cannot be read as parquet"),
        ("a.xlsx", b"PK", "format '.xlsx' is not one of .csv, .tsv, .jsonl, .parquet"),
    ],
)
def test_bad_file_is_told_in_one_line(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    output = tmp_path / "dataset"
    with pytest.raises(UserError) as caught:
        fetch_dataset(settings(train=path, validation=path, test=path), TASK, tmp_path, output)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not output.exists()


BAD = "text,label\na,1\n ,0\nb,0\nc,7\n"


def test_bad_rows_of_all_splits_are_told_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", BAD)
    with pytest.raises(UserError) as caught:
        fetch_dataset(settings(train=path, validation=path, test=path), TASK, tmp_path, tmp_path)
    message = str(caught.value)
    assert "train, row 2: text is empty; train, row 4: label '7' is not one of" in message
    assert "validation, row 2: " in message and message.endswith("dataset.bad_rows: drop leaves them out")  # fmt: skip


def test_bad_rows_are_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path, "a.csv", BAD)
    files = settings(train=path, validation=path, test=path)
    fetch_dataset({**files, "bad_rows": "drop"}, TASK, tmp_path, tmp_path)
    audit = json.loads((tmp_path / "audit.json").read_text())
    assert audit["splits"]["test"]["rows"] == 2
    assert audit["splits"]["test"]["bad_rows"] == {
        "count": 2,
        "first": ["row 2: text is empty", "row 4: label '7' is not one of 0 (负面), 1 (正面)"],
    }
    assert [r["id"] for r in read_records(tmp_path / "test.jsonl")] == ["test-1", "test-3"]
    assert "test: 2 bad rows are left out: row 2: text is empty" in caplog.text


def test_a_split_of_bad_rows_alone_is_refused(tmp_path: Path) -> None:
    path, bad = write(tmp_path, "a.csv", BAD), write(tmp_path, "b.csv", "text,label\n ,1\n")
    files = settings(train=path, validation=bad, test=bad)
    with pytest.raises(UserError, match="no good row is left of validation, test"):
        fetch_dataset({**files, "bad_rows": "drop"}, TASK, tmp_path, tmp_path)


def test_train_of_one_label_is_refused(tmp_path: Path) -> None:
    one, two = (
        write(tmp_path, "a.csv", "text,label\na,1\nb,1\n"),
        write(tmp_path, "b.csv", "text,label\na,1\nb,0\n"),
    )
    with pytest.raises(UserError, match="train: every row is answered 正面"):
        fetch_dataset(settings(train=one, validation=two, test=two), TASK, tmp_path, tmp_path)
    assert not (tmp_path / "audit.json").exists()


def labelled(labels: dict[str, str], values: list[Any], folder: Path) -> list[str]:
    """Return how the label cells `values` are read with task.labels `labels`."""
    path = folder / "a.jsonl"
    rows = [{"text": f"t{i}", "label": value} for i, value in enumerate(values)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = settings(train=path, validation=path, test=path)
    fetch_dataset(files, {**TASK, "labels": labels}, folder, folder)
    return [record["label"] for record in read_records(folder / "train.jsonl")]


STARS = {str(i): str(i + 1) for i in range(5)}


@pytest.mark.parametrize(
    ("labels", "values", "read"),
    [
        (STARS, [0, 1, 2, 3, 4], ["1", "2", "3", "4", "5"]),
        (STARS, [1, 2, 3, 4, 5], ["1", "2", "3", "4", "5"]),  # 5 is no value: these are words
        ({"1": "1", "2": "2"}, [1, 2], ["1", "2"]),
        (TASK["labels"], ["正面", "负面"], ["正面", "负面"]),
        (TASK["labels"], ["1.0", "0", 1.0, 1], ["正面", "负面", "正面", "正面"]),
        ({"1.0": "好", "0.0": "差"}, [1, "0"], ["好", "差"]),
        ({"True": "好", "False": "差"}, [True, False], ["好", "差"]),
    ],
)
def test_a_label_column_is_read_in_one_way(
    labels: dict[str, str], values: list[Any], read: list[str], tmp_path: Path
) -> None:
    assert labelled(labels, values, tmp_path) == read


@pytest.mark.parametrize(
    ("labels", "values", "message"),
    [
        (
            STARS,
            [1, 2, 3, 4],
            "column label holds 1, 2, 3, 4, each a value of task.labels and the word of another",
        ),
        (STARS, [0, 1, 5], "column label holds values of task.labels (0) and words of it (5)"),
        (TASK["labels"], [0, "正面", 1], "values of task.labels (0, 1) and words of it (正面)"),
        (TASK["labels"], [[0], "1"], "row 1: label '[0]' is not one of"),
        ({"1": "a", "1.0": "b"}, [1, 1], "task.labels: 1 and 1.0 are read as one"),
    ],
)
def test_a_label_column_of_two_readings_is_refused(
    labels: dict[str, str], values: list[Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        labelled(labels, values, tmp_path)
    assert message in str(caught.value)
    assert not (tmp_path / "audit.json").exists()


def test_missing_labels_of_a_parquet_are_told(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    column = pd.array([1, None, 0], dtype="Int64")
    pd.DataFrame({"text": ["a", "b", "c"], "label": column}).to_parquet(path)
    with pytest.raises(UserError, match="train 1 of 3, the first is row 2"):
        fetch_dataset(settings(train=path, validation=path, test=path), TASK, tmp_path, tmp_path)


@pytest.mark.parametrize("value", [12, 3.5, True, ["x"]])
def test_a_text_that_is_none_is_told_as_it_is(value: Any, tmp_path: Path) -> None:
    rows = [{"text": value, "label": 0}, {"text": "x", "label": 1}]
    content = "".join(json.dumps(row) + "\n" for row in rows)
    path = write(tmp_path, "a.jsonl", content)
    with pytest.raises(UserError, match=r"train, row 1: text is .*, not text"):
        fetch_dataset(settings(train=path, validation=path, test=path), TASK, tmp_path, tmp_path)


@pytest.mark.skipif(not CHNSENTICORP.is_dir(), reason="the ChnSentiCorp files are not here")
def test_chnsenticorp_leaks_a_quarter_of_its_test_rows(tmp_path: Path) -> None:
    files = {n: CHNSENTICORP / f"{f}.tsv" for n, f in [("train", "train"), ("validation", "dev"), ("test", "test")]}  # fmt: skip
    fetch_dataset({**settings(**files), "text_column": "text_a"}, TASK, tmp_path, tmp_path)
    audit = json.loads((tmp_path / "audit.json").read_text())
    assert [audit["splits"][s]["rows"] for s in ("train", "validation", "test")] == [9600, 1200, 1200]  # fmt: skip
    assert audit["splits"]["test"]["seen_in_train"] == 331
    assert audit["splits"]["test"]["seen_in_validation"] == 40
    assert audit["splits"]["validation"]["seen_in_train"] == 338
    assert audit["splits"]["train"]["duplicates"] == 1351
    assert audit["train_texts_with_several_answers"] == 24
