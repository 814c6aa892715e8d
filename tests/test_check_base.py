"""What is tried before anything is trained: packed sequences, and a short model's whole way."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from architectures import ARCHITECTURES, make_tiny
from conftest import CONVERTER, run_program
from pockettune.common import program
from pockettune.data.prompts import Example, encode, write_examples
from pockettune.models.folder import load_tokenizer
from pockettune.models.layers import count_kinds, cut_layers

SHAPE = {"adapter": None, "variant": "lora", "rank": 4, "alpha": 8, "dropout": 0.0,
         "target_modules": ["q_proj", "v_proj", "down_proj"]}  # fmt: skip
TEXTS = ["房间很干净，但是服务很差。", "前台很热情", "The room is clean, 12 o'clock."]


def write_tokens(model: Path, folder: Path, spoilt: int | None = None) -> Path:
    """Write tokens/ of a few prompts; those of the prompt numbered `spoilt` are not its own."""
    tokenizer = load_tokenizer(model)
    folder.mkdir()
    examples = []
    for number in range(30):
        prompt = f"{TEXTS[number % 3]} {number}"
        ids = encode(tokenizer, prompt)
        ids = ids[:-1] if number == spoilt else ids
        examples.append(Example(str(number), prompt, ids, [7, 2], "a", seen=False, cut=False, defused=False))  # fmt: skip
    for split in ("train", "validation", "test"):
        write_examples(folder / f"{split}.arrow", examples)
    program.write_json(folder / "answers.json", {"words": ["a", "b"], "ids": [[7, 2], [9, 2]]})
    return folder


def check(
    model: Path, tmp_path: Path, spoilt: int | None = None, **shape: Any
) -> tuple[str, dict[str, Any] | None]:
    """Run the program on a model with tokens of its own; return what it said and what it wrote.

    In a process of its own: the converter brings its own gguf, which another test may have imported.
    """
    tokens, output = write_tokens(model, tmp_path / "tokens", spoilt), tmp_path / "out/check.json"
    output.parent.mkdir()
    result = run_program(
        "check_base.py", "--settings", json.dumps({"train": SHAPE | shape}), "--base", model,
        "--tokens", tokens, "--converter", CONVERTER, "--threads", "1", "--output", output,
    )  # fmt: skip
    assert result.returncode == (0 if output.exists() else 2), result.stdout
    left = [path.name for path in output.parent.iterdir() if path != output]
    assert not left, "the short model is removed"
    return result.stdout.splitlines()[-1], program.read_json(output) if output.exists() else None


@pytest.mark.parametrize("changes", [{}, {"variant": "dora"}, {"adapter": "elsewhere"}], ids=str)
def test_model_that_works(changes: dict[str, Any], tiny_model: Path, tmp_path: Path) -> None:
    _, found = check(tiny_model, tmp_path, **changes)
    assert found
    assert found["layers"] == 1 and len(found["checks"]) == 8
    assert all(result["passed"] for result in found["checks"])
    assert found["packing"]["difference"] < 1e-3 * found["packing"]["spread"]
    (ids,) = (result for result in found["checks"] if result["name"] == "token_ids")
    assert ids["prompts"] == 90, "those of every split"


def test_prompt_that_is_read_otherwise_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    told, found = check(tiny_model, tmp_path, spoilt=17)
    assert re.match(r"error: model tiny cannot be taken to the end: .*token_ids: at ", told)
    assert found is None


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("LFM2", "cannot be trained here: .* mix the sequences"),
        ("OPT", "cannot be taken to the end: .*llama.cpp's converter does not know"),
    ],
)
def test_model_that_cannot_is_refused_by_name(name: str, fault: str, tmp_path: Path) -> None:
    (architecture,) = (a for a in ARCHITECTURES if a.name == name)
    base = tmp_path / architecture.kind
    make_tiny(architecture, TEXTS * 40, base)
    told, found = check(base, tmp_path, target_modules="all-linear")
    assert re.match(f"error: model {architecture.kind} {fault}", told), told
    assert found is None


def test_short_model_has_every_kind_of_layer() -> None:
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    config = {"num_hidden_layers": 18, "layer_types": kinds * 3, "max_window_layers": 18}
    assert count_kinds(config) == 6
    assert cut_layers(config, 18, range(6)) == {
        "num_hidden_layers": 6, "layer_types": kinds, "max_window_layers": 6}  # fmt: skip
    assert count_kinds({"num_hidden_layers": 24}) == 1
    assert count_kinds({"num_hidden_layers": 27, "first_k_dense_replace": 1}) == 2


def test_the_run_was_checked(finished_run: Path) -> None:
    results = finished_run / "results/small"
    checked = program.read_json(results / "base_check.json")
    assert {result["name"] for result in checked["checks"]} >= {"token_ids", "logits", "merge"}
    assert re.search(r"packed sequences: within", (results / "logs/check_base.log").read_text())
