"""Fetching from a hub: one on the loopback address answers as the real ones do."""

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from fetch_dataset import fetch_dataset
from fetch_model import fetch_model
from loopback_hub import COMMIT, serve
from pockettune.common.checksums import sha256
from pockettune.common.errors import UserError
from pockettune.data.records import read_records

NAME = "somebody/tiny"
LABELS = {"0": "负面", "1": "正面"}
TASK = {
    "type": "classification",
    "system": "",
    "prompt": "{text}",
    "labels": LABELS,
    "template_options": {},
}


def model_settings(**changes: Any) -> dict[str, Any]:
    return {"name": NAME, "revision": COMMIT, "path": None} | changes


@pytest.fixture
def repository(tiny_model: Path, tmp_path: Path) -> Path:
    """A model repository with what hubs hold besides: code and pickles."""
    folder = tmp_path / "repository"
    shutil.copytree(tiny_model, folder)
    (folder / "modeling_evil.py").write_text("raise SystemExit('ran')")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    (folder / "onnx").mkdir()
    (folder / "onnx/config.json").write_text("{}")
    return folder


@pytest.fixture(params=["huggingface", "modelscope"])
def source(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_model_comes_whole_and_without_code(
    source: str, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = sha256(repository / "model.safetensors")
    with serve(repository, NAME) as hub:
        monkeypatch.setenv("POCKETTUNE_HUB_SOURCES", hub.entry(source))
        pins = json.dumps({"model.safetensors": digest})
        monkeypatch.setenv("POCKETTUNE_MODEL_SHA256", pins)
        fetch_model(model_settings(), tmp_path / "downloads", tmp_path / "model")
    for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "model" / name).read_bytes() == (repository / name).read_bytes()
    assert not {"modeling_evil.py", "pytorch_model.bin", "onnx"} & {
        path.name for path in (tmp_path / "model").iterdir()
    }
    assert not any("onnx" in line or ".py" in line or ".bin" in line for line in hub.ranges)
    recorded = json.loads((tmp_path / "model/source.json").read_text())
    assert recorded == {
        "origin": f"{NAME}@{COMMIT}",
        "name": NAME,
        "sha256": {"model.safetensors": digest},
    }


def test_byte_flipped_on_the_way_is_noticed_and_mended(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve(repository, NAME) as hub:
        monkeypatch.setenv("POCKETTUNE_HUB_SOURCES", hub.address)
        hub.damage.add("model.safetensors")
        with pytest.raises(UserError, match=r"model\.safetensors was damaged on the way"):
            fetch_model(model_settings(), tmp_path / "downloads", tmp_path / "model")
        assert not (tmp_path / "model").exists()
        hub.damage.clear()
        fetch_model(model_settings(), tmp_path / "downloads", tmp_path / "model")
    assert (tmp_path / "model/model.safetensors").exists()


def test_other_weights_than_the_pinned_are_refused(
    source: str, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve(repository, NAME) as hub:
        monkeypatch.setenv("POCKETTUNE_HUB_SOURCES", hub.entry(source))
        pins = json.dumps({"model.safetensors": "0" * 64})
        monkeypatch.setenv("POCKETTUNE_MODEL_SHA256", pins)
        with pytest.raises(UserError, match=r"model\.sha256 is 0000.*not the pinned weights"):
            fetch_model(model_settings(), tmp_path / "downloads", tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_unreachable_hub_names_the_three_ways_on(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve(tmp_path, NAME) as hub:
        entry = hub.entry(source)  # nobody listens there once the block is left
    monkeypatch.setenv("POCKETTUNE_HUB_SOURCES", entry)
    with pytest.raises(UserError) as caught:
        fetch_model(model_settings(), tmp_path / "downloads", tmp_path / "model")
    for way in (entry, "hub.sources", "model.path", "offline bundle"):
        assert way in str(caught.value)
    assert not (tmp_path / "model").exists()


def test_dataset_comes_with_its_splits(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "repository/data"
    repository.mkdir(parents=True)
    for split, text in [("train", "很好 很差"), ("validation", "很差"), ("test", "很好")]:
        texts = text.split()
        table = pd.DataFrame({"text": texts, "label": [int(one == "很好") for one in texts]})
        table.to_parquet(repository / f"{split}-00000-of-00001.parquet")
    dataset = {"name": NAME, "revision": COMMIT, "files": None, "split": None, "subset": None,
               "splits": None, "unlabelled": "refuse", "bad_rows": "refuse", "text_column": "text", "label_column": "label"}  # fmt: skip
    with serve(repository.parent, NAME) as hub:
        monkeypatch.setenv("POCKETTUNE_HUB_SOURCES", hub.entry(source))
        fetch_dataset(dataset, TASK, tmp_path / "downloads", tmp_path / "dataset")
    assert list(read_records(tmp_path / "dataset/test.jsonl")) == [
        {"id": "test-1", "text": "很好", "label": "正面", "seen": True}
    ]
