"""Datasets as hubs have them: subsets, missing splits, hidden labels, packed files."""

import gzip
import json
import zipfile
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from fetch_dataset import fetch_dataset
from loopback_hub import COMMIT, LoopbackHub, serve
from pockettune.common.errors import UserError
from pockettune.data.records import read_records
from pockettune.sources.splits import with_names

NAME = "somebody/reviews"
TASK = {
    "type": "classification",
    "system": "",
    "prompt": "{text}",
    "labels": {"0": "差", "1": "好"},
    "template_options": {},
}
DATASET = {"name": NAME, "revision": COMMIT, "files": None, "split": None, "subset": None,
           "splits": None, "unlabelled": "refuse", "bad_rows": "refuse", "text_column": "text", "label_column": "label"}  # fmt: skip


def table(count: int, label: int | None = None) -> pd.DataFrame:
    labels = [i % 2 if label is None else label for i in range(count)]
    return pd.DataFrame({"text": [f"t{i}" for i in range(count)], "label": labels})


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A dataset with train and an unlabelled test alone, as many on the hubs."""
    folder = tmp_path / "repository"
    folder.mkdir()
    table(20).to_csv(folder / "train.csv", index=False)
    table(5, label=-1).to_csv(folder / "test.csv", index=False)
    return folder


@pytest.fixture
def fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    def run(repository: Path, **settings: Any) -> dict[str, list[str]]:
        """Return the texts of each split."""
        with serve(repository, NAME) as hub:
            monkeypatch.setenv("POCKETTUNE_HUB_SOURCES", hub.address)
            run.hub = hub  # type: ignore[attr-defined]
            fetch_dataset(DATASET | settings, TASK, tmp_path / "downloads", tmp_path / "out")
        return {
            split: [record["text"] for record in read_records(tmp_path / f"out/{split}.jsonl")]
            for split in ("train", "validation", "test")
        }

    return run


def error(fetch: Any, repository: Path, **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        fetch(repository, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_split_is_told_with_what_to_write(fetch: Any, repository: Path) -> None:
    line = error(fetch, repository)
    assert f"dataset {NAME} has no split validation; it has train, test. Say what to take" in line
    assert 'dataset.splits: {train: "train[10%:]", validation: "train[:10%]", test: "test"}' in line
    table(5).to_csv(repository / "test.csv", index=False)
    splits = {"train": "train[10%:]", "validation": "train[:10%]", "test": "test"}
    texts = fetch(repository, splits=splits)
    assert texts["validation"] == ["t0", "t1"] and texts["train"][0] == "t2"
    assert {split: len(rows) for split, rows in texts.items()} == {
        "train": 18, "validation": 2, "test": 5,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["train"], 'train: "train[20%:]", validation: "train[10%:20%]", test: "train[:10%]"'),
        (["train", "validation"], 'validation: "train[:10%]", test: "validation"'),
    ],
)
def test_what_to_write_can_be_written(
    names: list[str], told: str, fetch: Any, repository: Path
) -> None:
    (repository / "test.csv").unlink()
    for name in names:
        table(20).to_csv(repository / f"{name}.csv", index=False)
    assert told in error(fetch, repository)


def test_wrong_parts_are_all_told(fetch: Any, repository: Path) -> None:
    splits = {"train": "trian", "validation": "train[:200%]", "test": "test"}
    line = error(fetch, repository, splits=splits)
    assert "dataset.splits.train is 'trian': Unknown split" in line
    assert "dataset.splits.validation is 'train[:200%]': Percent slice" in line


def test_subset_is_chosen_by_name(fetch: Any, repository: Path) -> None:
    configs = "".join(
        f"- config_name: {name}\n  data_files:\n"
        + "".join(f"  - {{split: {split}, path: {file}.csv}}\n"
                  for split, file in (("train", "train"), ("validation", name), ("test", name)))
        for name in ("north", "south")
    )  # fmt: skip
    (repository / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    table(3).to_csv(repository / "north.csv", index=False)
    table(4).to_csv(repository / "south.csv", index=False)
    line = error(fetch, repository)
    assert f"{NAME} has several subsets; set dataset.subset to one of north, south" in line
    assert "has no subset west; set dataset.subset to one of" in error(fetch, repository, subset="west")  # fmt: skip
    assert len(fetch(repository, subset="south")["test"]) == 4


def test_rows_without_a_label(
    fetch: Any, repository: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table(4).to_csv(repository / "validation.csv", index=False)
    with (repository / "train.csv").open("a") as file:
        file.write("no label,\n")
    line = error(fetch, repository)
    assert "train 1 of 21, the first is row 21; test 5 of 5, the first is row 1; dataset.unlabelled" in line  # fmt: skip
    line = error(fetch, repository, unlabelled="drop")
    assert "no row of test has a label; take other rows" in line
    splits = {"train": "train", "validation": "validation", "test": "train[:20%]"}
    with caplog.at_level("INFO", logger="pockettune"):
        texts = fetch(repository, unlabelled="drop", splits=splits)
    assert "rows without a label are left out: train 1 of 21" in caplog.text
    assert len(texts["train"]) == 20 and "no label" not in texts["train"]


def test_label_may_be_called_minus_one(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label\na,-1\nb,1\n")
    settings = DATASET | {"files": dict.fromkeys(("train", "validation", "test"), str(path))}
    task = TASK | {"labels": {"-1": "差", "1": "好"}}
    fetch_dataset(settings, task, tmp_path, tmp_path / "out")
    first = json.loads((tmp_path / "out/train.jsonl").read_text().splitlines()[0])
    assert first["label"] == "差"


@pytest.mark.parametrize("packed", ["json.gz", "jsonl.gz", "csv.gz", "zip", "json"])
def test_packed_files_are_read(packed: str, fetch: Any, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    repository.mkdir()
    (repository / "loader.py").write_text("raise SystemExit")
    for split, count in (("train", 6), ("validation", 2), ("test", 3)):
        rows = table(count)
        if packed == "json":
            rows.to_json(repository / f"{split}.json", orient="records")
        elif packed == "csv.gz":
            rows.to_csv(repository / f"{split}.csv.gz", index=False)
        elif packed == "zip":
            with zipfile.ZipFile(repository / f"{split}.zip", "w") as archive:
                archive.writestr(f"{split}.csv", rows.to_csv(index=False))
        else:
            text = rows.to_json(orient="records", lines=True)
            (repository / f"{split}.{packed}").write_bytes(gzip.compress(text.encode()))
    assert {split: len(rows) for split, rows in fetch(repository).items()} == {
        "train": 6, "validation": 2, "test": 3,
    }  # fmt: skip
    hub: LoopbackHub = fetch.hub
    assert not any("loader.py" in line for line in hub.ranges)


def test_split_of_one_answer_is_told(
    fetch: Any, repository: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The first rows of a dataset are often all of one label."""
    rows = table(20)
    rows["label"] = sorted(rows["label"])
    rows.to_csv(repository / "train.csv", index=False)
    splits = {"train": "train", "validation": "train[:10%]", "test": "train[:10%]+train[-10%:]"}
    with caplog.at_level("INFO", logger="pockettune"):
        (repository / "test.csv").unlink()
        fetch(repository, splits=splits)
    assert "validation: every row is answered 差" in caplog.text
    assert "test: every row" not in caplog.text and "train: every row" not in caplog.text


def test_nothing_is_left_of_reading(fetch: Any, repository: Path, tmp_path: Path) -> None:
    table(5).to_csv(repository / "test.csv", index=False)
    table(5).to_csv(repository / "validation.csv", index=False)
    folder = f"datasets--somebody--reviews@{COMMIT}"
    left = tmp_path / "downloads" / f"{folder}.arrow-killed"
    left.mkdir(parents=True)
    fetch(repository)
    assert {path.name for path in (tmp_path / "downloads").iterdir()} == {folder, f"{folder}.lock"}


def test_lists_of_class_numbers_come_as_their_names() -> None:
    from datasets import ClassLabel, Dataset, Features, Sequence, Value

    tags = Sequence(ClassLabel(names=["O", "B-PER", "I-PER"]))
    features = Features(
        {"tokens": Sequence(Value("string")), "ner_tags": tags, "n": Value("int32")}
    )
    rows = {"tokens": [["Ann", "Lee"], []], "ner_tags": [[1, 2], []], "n": [1, 2]}
    named = with_names(Dataset.from_dict(rows, features=features))
    assert named["ner_tags"].tolist() == [["B-PER", "I-PER"], []]
    assert named["n"].tolist() == [1, 2]
