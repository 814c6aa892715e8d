"""What is damaged or exchanged on the way is noticed and named, before anything is made of it."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from safetensors.torch import load_file, save_file

import fetch_dataset as fetch_dataset_module
from compare_stages import check_rows
from conftest import LINEAGE, run_program, run_snakemake
from fetch_dataset import fetch_dataset
from fetch_model import fetch_model
from loopback_hub import COMMIT, serve
from pockettune.common.errors import UserError
from pockettune.models.folder import check_model_folder, load_model

NAME = "somebody/tiny"
MODEL = {"name": NAME, "revision": COMMIT, "path": None}
TASK = json.loads(LINEAGE)["task"]


def flip_bit(path: Path, place: int) -> None:
    """Flip one bit of the byte at `place`, keeping the file's time as a failing disk does."""
    times = path.stat()
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


# --- the download, and what was downloaded ---


@pytest.mark.parametrize("source", ["huggingface", "modelscope"])
@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json"])
def test_byte_flipped_on_the_way(
    file: str, source: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve(tiny_model, NAME) as hub:
        monkeypatch.setenv("POCKETTUNE_HUB_SOURCES", hub.entry(source))
        hub.damage.add(file)
        with pytest.raises(UserError) as caught:
            fetch_model(MODEL, tmp_path / "downloads", tmp_path / "model")
    assert file in str(caught.value)
    assert "damaged on the way" in str(caught.value)
    assert not (tmp_path / "model").exists()


@pytest.fixture
def fetched(tiny_model: Path, tmp_path: Path) -> Path:
    """A base model as fetch_model.py leaves it."""
    fetch_model({**MODEL, "path": str(tiny_model)}, tmp_path, tmp_path / "fetched")
    return tmp_path / "fetched"


def test_byte_flipped_in_the_fetched_folder(fetched: Path, tmp_path: Path) -> None:
    load_model(fetched)
    flip_bit(fetched / "model.safetensors", -1000)
    with pytest.raises(UserError, match=r"model\.safetensors has changed since it was fetched"):
        load_model(fetched)
    result = run_program("merge_adapter.py", "--base", fetched, "--adapter", tmp_path,
                         "--output", tmp_path / "merged")  # fmt: skip
    assert result.returncode == 2
    assert result.stdout.splitlines()[-1].startswith(f"error: model {fetched}: model.safetensors")
    assert not (tmp_path / "merged").exists()


def test_missing_part_of_the_weights(tiny_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    names = dict.fromkeys(load_file(folder / "model.safetensors"), "model.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    check_model_folder(folder)
    index.write_text(json.dumps({"weight_map": {**names, "x": "../part-2.safetensors"}}))
    with pytest.raises(UserError, match=r"\.\./part-2\.safetensors, which .* names, is not in"):
        check_model_folder(folder)


# --- GGUF files ---


def tear_tail(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def tear_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:500])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def spoil_type(path: Path) -> None:
    """Make the type of the first tensor one that there is none of."""
    content = path.read_bytes()
    place = content.index(b"token_embd.weight") + len(b"token_embd.weight") + 4 + 2 * 8
    path.write_bytes(content[:place] + b"\xee" + content[place + 1 :])


def repeat_a_token(path: Path) -> None:
    """Make two tokens of the vocabulary the same, which llama.cpp takes for impossible."""
    one_letter = b"\x01" + bytes(7)  # a string's length
    path.write_bytes(path.read_bytes().replace(one_letter + b"B", one_letter + b"A", 1))


def test_llama_cpp_does_not_end_without_a_word(f16: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copyfile(f16, tmp_path / "broken.gguf"))
    repeat_a_token(broken)
    output, log = tmp_path / "out", tmp_path / "log"
    arguments = arguments_of("measure_speed.py", broken, output)
    result = run_program("measure_speed.py", *arguments, "--log", log)
    assert result.returncode == 2
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("error: ")]
    assert re.match(
        r"error: llama\.cpp stopped at llama-vocab\.cpp:\d+: GGML_ASSERT.* remove it", line
    )
    assert line in log.read_text() and not output.exists()


@pytest.mark.parametrize("program", ["quantize_model.py", "measure_speed.py", "evaluate_gguf.py"])
@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (tear_tail, "is truncated: "),
        (tear_header, "its header cannot be read"),
        (empty, "is empty"),
        (spoil_type, "its header cannot be read"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_damaged_gguf_is_named(
    harm: Callable[[Path], None], message: str, program: str, f16: Path, tmp_path: Path
) -> None:
    broken = Path(shutil.copyfile(f16, tmp_path / "broken.gguf"))
    harm(broken)
    output = tmp_path / "out"
    result = run_program(program, *arguments_of(program, broken, output))
    assert result.returncode == 2, result.stdout
    last = result.stdout.splitlines()[-1]
    assert last.startswith(f"error: {broken} ") and message in last
    assert "Traceback" not in result.stdout
    assert not output.exists()


def arguments_of(program: str, gguf: Path, output: Path) -> list[str | Path]:
    """Return what the program needs to come as far as opening the file."""
    if program == "quantize_model.py":
        return ["--settings", '{"type": "Q8_0"}', "--source", gguf, "--threads", "1", "--output", output]  # fmt: skip
    if program == "measure_speed.py":
        return ["--model", gguf, "--threads", "1", "--output", output]
    from pockettune.data.prompts import write_examples

    tokens = gguf.parent / "tokens"
    tokens.mkdir()
    (tokens / "answers.json").write_text('{"words": ["好"], "ids": [[5, 2]]}')
    write_examples(tokens / "test.arrow", [])
    settings = {
        "task": TASK,
        "dataset": {"text_column": "text", "label_column": "label"},
        "evaluate": {"split": "test", "limit": None},
    }
    return ["--settings", json.dumps(settings), "--tokens", tokens, "--model", gguf,
            "--threads", "1", "--metrics", output, "--predictions", output]  # fmt: skip


# --- an adapter of another base, through the workflow ---


def test_adapter_of_another_base(finished_run: Path) -> None:
    adapter = finished_run / "foreign 适配器 $(touch pwned)"
    shutil.copytree(finished_run / "results/small/adapter", adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "Qwen/Qwen3-0.6B"
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    weights = load_file(adapter / "adapter_model.safetensors")
    first = next(name for name in weights if "lora_A" in name)
    weights[first] = weights[first][:, :-1].clone()
    save_file(weights, adapter / "adapter_model.safetensors")
    run = yaml.safe_load((finished_run / "runs/small.yaml").read_text())
    run |= {"pathvars": {"results": "results/foreign"}, "train": {"adapter": adapter.name}}
    (finished_run / "runs/foreign.yaml").write_text(yaml.safe_dump(run, allow_unicode=True))
    try:
        result = run_snakemake(
            finished_run, "--configfile", "runs/foreign.yaml", "--", "results/foreign/merged"
        )
    finally:
        shutil.rmtree(adapter)
    assert result.returncode != 0
    (line,) = {line for line in result.stdout.splitlines() if line.startswith("error: ")}
    assert line.startswith(f"error: train.adapter {adapter.name} does not fit base@")
    assert "it was trained on Qwen/Qwen3-0.6B" in line and "wide at its input, the base" in line
    assert "Traceback" not in result.stdout
    assert not (finished_run / "results/foreign/adapter").exists()
    assert not list(finished_run.rglob("pwned*"))


# --- the dataset ---


def dataset(folder: Path) -> dict[str, Any]:
    files = {}
    for split in ("train", "validation", "test"):
        path = folder / f"{split}.csv"
        path.write_text("text,label\n好,1\n差,0\n")
        files[split] = str(path)
    return {
        "files": files, "split": None, "text_column": "text", "label_column": "label",
        "unlabelled": "refuse", "bad_rows": "refuse",
    }  # fmt: skip


@pytest.mark.parametrize("changed", ["train", "test"])
def test_file_changed_while_it_is_read(
    changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = dataset(tmp_path)
    read = fetch_dataset_module.read_table

    def read_then_change(path: Path, *others: Any) -> pd.DataFrame:
        table = read(path, *others)
        if path.stem == "test":  # all were read now
            (tmp_path / f"{changed}.csv").write_text("text,label\n坏,1\n差,0\n")
        return table

    monkeypatch.setattr(fetch_dataset_module, "read_table", read_then_change)
    with pytest.raises(UserError, match=rf"{changed}\.csv changed while it was read; run again"):
        fetch_dataset(settings, TASK, tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_predictions_of_other_records() -> None:
    """Ids alone do not tell two datasets apart: both have a test-1."""
    answers = {"test-1": "好", "test-2": "差"}
    table = pd.DataFrame({"id": list(answers), "reference": list(answers.values())})
    check_rows({"base": table, "f16": table}, answers)
    with pytest.raises(UserError, match=r"of f16 are of other records: 1 of 2 rows differ, the first is test-2"):  # fmt: skip
        check_rows({"base": table, "f16": table.assign(reference="好")}, answers)
