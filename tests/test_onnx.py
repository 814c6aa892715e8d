"""ONNX: an honest export passes the gate, each sabotage is told by its name, rows are scored alike."""

import json
import shutil
import subprocess
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

import test_disk_full
from check_parity_onnx import check_parity_onnx
from conftest import kill_in_mid_work, run_program, write_gemma
from export_onnx import export_onnx, prepare
from formats_run import NEEDS
from pockettune.common import program
from pockettune.common.checksums import list_checksums
from pockettune.common.errors import UserError
from pockettune.common.extras import use_extra
from pockettune.evaluation.statistics import normalise
from pockettune.parity.exported import check_logits, check_token_ids
from pockettune.parity.reference import logits_of_torch
from pockettune.runtimes.exact import load_exact
from pockettune.runtimes.onnx import (
    CHAT_TEMPLATE,
    CONFIG,
    MADE,
    MODEL,
    OnnxModel,
    OnnxTokenizer,
    answer_greedily,
    check_runtime,
    describe_folder,
)
from test_disk_full import contents, run_unchecked, the_error
from test_parity import COLUMNS, TASK, write_tokens

pytestmark = NEEDS["onnx"]
small = test_disk_full.small  # a fixture
Run = Callable[..., subprocess.CompletedProcess[str]]

SETTINGS = {
    "task": TASK,
    "dataset": COLUMNS,
    "tokenize": {"max_length": 128},
    "card": {"license": "mit", "languages": ["zh"], "template": "task"},
}
INT4 = {"format": "onnx", "type": "int4", "block": 32, "accuracy_level": 4, "algorithm": "default"}
TEXTS = [f"房间{n}很干净，但是服务很差。" for n in range(40)]
PROMPTS = [[1, 5, 6, 7, 8], [1, 5, 6, 9], [1, 5, 6, 7, 8, 10, 11, 12]]


@dataclass(frozen=True)
class Case:
    """What the gate compares."""

    model: Path
    export: Path
    tokens: Path

    def check(self, output: Path) -> None:
        check_parity_onnx(
            Namespace(
                settings=SETTINGS, model=self.model, export=self.export, tokens=self.tokens,
                records=self.tokens / "test.jsonl", threads=1, output=output,
            )
        )  # fmt: skip

    def failed(self, output: Path) -> tuple[list[str], str]:
        """Return the names of the checks that fail, and the error; ([], "") where all pass."""
        try:
            self.check(output)
        except UserError as error:
            told = str(error).split("checks failed: ")[1].split(" | ")
            return [part.split(":")[0] for part in told], str(error)
        assert program.read_json(output)["passed"]
        return [], ""


@pytest.fixture(scope="module")
def honest(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Its vocabulary has as many tokens as its MLP has rows, which the builder by itself takes for the head."""
    folder = tmp_path_factory.mktemp("onnx")
    model, export = folder / "model", folder / "onnx_float.onnx"
    shutil.copytree(tiny_model, model)
    weights = load_file(model / "model.safetensors")
    for number, name in enumerate(name for name in weights if name.endswith("norm.weight")):
        weights[name] += number / 64  # no two alike, so that a misplaced one shows
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    export_onnx({**SETTINGS, "recipe": {"type": "fp32"}}, model, 1, export)
    return Case(model, export, write_tokens(model, folder / "tokens", TEXTS))


@pytest.fixture(scope="module")
def int8(honest: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx") / "int8.onnx"
    recipe = {"format": "onnx", "type": "int8", "block": 32, "accuracy_level": 4}
    export_onnx({**SETTINGS, "recipe": recipe}, honest.model, 1, folder)
    return folder


@pytest.fixture(scope="module")
def int4(honest: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx") / "int4.onnx"
    export_onnx({**SETTINGS, "recipe": INT4}, honest.model, 1, folder)
    return folder


def test_honest_export_passes_and_leaves_nothing_beside(honest: Case, tmp_path: Path) -> None:
    assert honest.failed(tmp_path / "parity.json") == ([], "")
    checks = program.read_json(tmp_path / "parity.json")["checks"]
    assert [check["name"] for check in checks] == [
        "token_ids", "stop_tokens", "vectors", "chat_template", "logits", "answers",
    ]  # fmt: skip
    assert next(c for c in checks if c["name"] == "logits")["largest_difference"] < 1e-4
    left = sorted(path.name for path in honest.export.iterdir())
    assert left == [
        "chat_template.jinja", "genai_config.json", "model.onnx", "model.onnx.data", "pockettune.json",
        "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    original = (honest.model / "tokenizer.json").read_bytes()
    assert (honest.export / "tokenizer.json").read_bytes() == original


def edited(case: Case, folder: Path, change: Callable[[Path], object]) -> Case:
    """Return the case with a changed copy of its export."""
    shutil.copytree(case.export, folder / "export.onnx")
    change(folder / "export.onnx")
    return replace(case, export=folder / "export.onnx")


def change_json(name: str, **values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        told = program.read_json(folder / name)
        told["model"] |= values
        program.write_json(folder / name, told)

    return change


def change_template(folder: Path) -> None:
    path = folder / CHAT_TEMPLATE
    path.write_text(path.read_text().replace("情感：", "情感是"), encoding="utf-8")


def swap(part: str) -> Callable[[Path], None]:
    """Swap the weights of two layers whose names hold `part`."""

    def change(folder: Path) -> None:
        import onnx

        model = onnx.load(str(folder / MODEL), load_external_data=False)
        first, second = (
            next(t for t in model.graph.initializer if f"layers.{n}.{part}" in t.name)
            for n in (0, 1)
        )
        first.name, second.name = second.name, first.name
        onnx.save(model, str(folder / MODEL))

    return change


SABOTAGE: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "another chat template": (change_template, ["chat_template"]),
    "another stop token": (change_json(CONFIG, eos_token_id=5), ["stop_tokens"]),
    "two layers' matrices swapped": (swap("mlp.down_proj"), ["logits"]),
    "two layers' norms swapped": (swap("input_layernorm"), ["vectors"]),
}


@pytest.mark.parametrize("name", SABOTAGE)
def test_sabotage_is_told_by_its_name(name: str, honest: Case, tmp_path: Path) -> None:
    change, expected = SABOTAGE[name]
    found, message = edited(honest, tmp_path, change).failed(tmp_path / "parity.json")
    assert set(expected) <= set(found), message
    assert "cause: " in message and "remedy: " in message and "\n" not in message
    assert not (tmp_path / "parity.json").exists()


def test_export_of_another_model_fails(honest: Case, tmp_path: Path) -> None:
    """As when the merged model was made anew and the export was not."""
    shutil.copytree(honest.model, tmp_path / "model")
    weights = load_file(tmp_path / "model/model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] *= 1.5
    save_file(weights, tmp_path / "model/model.safetensors", {"format": "pt"})
    assert replace(honest, model=tmp_path / "model").failed(tmp_path / "p.json")[0] == ["logits"]


def test_a_runtime_that_is_too_old_is_named(honest: Case, tmp_path: Path) -> None:
    case = edited(honest, tmp_path, lambda folder: program.write_json(
        folder / MADE, {**program.read_json(folder / MADE), "needs": {"onnxruntime": "99.1"}}
    ))  # fmt: skip
    with pytest.raises(UserError, match=r"made for ONNX Runtime 99\.1 or newer, this one is 1\."):
        OnnxModel(case.export, 1)
    check_runtime(honest.export, "1.100.0")  # newer, though its text comes before
    with pytest.raises(UserError, match="which lacks its operators"):
        check_runtime(case.export, "9.9.9")


def test_gate_names_a_runtime_that_is_too_old(
    honest: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before onnxruntime-genai is loaded, which says in its own words that it finds another one."""
    use_extra("onnx")
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "__version__", "1.20.1")
    monkeypatch.setattr("check_parity_onnx.OnnxTokenizer", None)
    with pytest.raises(
        UserError, match=r"made for ONNX Runtime 1\.23\.2 or newer, this one is 1\.20\.1"
    ):
        honest.check(tmp_path / "parity.json")
    assert not (tmp_path / "parity.json").exists()


def test_exporter_names_a_runtime_that_is_too_old(
    honest: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("export_onnx.version", lambda package: "1.22.1")
    with pytest.raises(
        UserError, match=r"onnxruntime 1\.22\.1 is here, exporting needs 1\.23\.2 or"
    ):
        export_onnx({**SETTINGS, "recipe": INT4}, honest.model, 1, tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())


def test_folder_that_cannot_be_loaded_is_one_line(honest: Case, tmp_path: Path) -> None:
    case = edited(honest, tmp_path, lambda folder: (folder / MODEL).write_bytes(b"no model"))
    with pytest.raises(UserError, match="ONNX Runtime cannot load it: "):
        OnnxModel(case.export, 1)


def test_common_start_changes_no_logit(honest: Case, int4: Path) -> None:
    for folder in (honest.export, int4):
        model = OnnxModel(folder, 1)
        together = list(model.next_token_logits(PROMPTS))
        alone = [next(model.next_token_logits([prompt])) for prompt in PROMPTS]
        plain = [model.decode(prompt, model.nothing())[0] for prompt in PROMPTS]
        assert together[0].shape == (512,) and together[0].dtype == np.float32
        assert np.abs(np.array(together) - plain).max() < 1e-4
        assert np.abs(np.array(alone) - plain).max() < 1e-4


def test_int4_stores_what_it_says(honest: Case, int4: Path) -> None:
    told = describe_folder(int4)
    assert told["tensor_types"] == {"INT4": 11} and told["embedding_type"] == "INT4"
    assert 4.5 < told["bits_per_weight"] < 8  # small matrices, and rotations for 1,024 positions
    assert describe_folder(honest.export)["tensor_types"] == {"FP32": 11}
    assert told["least_runtime"].startswith("ONNX Runtime 1.")
    logits = [next(OnnxModel(f, 1).next_token_logits(PROMPTS)) for f in (honest.export, int4)]
    assert np.abs(logits[0] - logits[1]).max() > 1e-3, "what computes the same was not quantized"


def test_int8_stores_embeddings_and_head_once(honest: Case, int8: Path) -> None:
    told = describe_folder(int8)
    assert told["tensor_types"] == {"INT8": 11} and told["embedding_type"] == "INT8"
    assert (
        told["bits_per_weight"] < 11
    )  # 9, and rotations for 1,024 positions; with a table in fp32 beside 16
    logits = [next(OnnxModel(f, 1).next_token_logits(PROMPTS)) for f in (honest.export, int8)]
    assert 1e-4 < np.abs(logits[0] - logits[1]).max() < 0.05


def test_greedy_answers_end_at_a_stop_token(honest: Case) -> None:
    model, tokenizer = OnnxModel(honest.export, 1), OnnxTokenizer(honest.export)
    model.stops = set()
    likeliest = model.generate_greedy(PROMPTS[0], 3)
    assert len(likeliest) == 3
    model.stops = {likeliest[0]}
    assert model.generate_greedy(PROMPTS[0], 3) == likeliest[:1]
    assert answer_greedily(model, tokenizer, PROMPTS[:1], 3) == [""]
    model.stops = set()
    assert answer_greedily(model, tokenizer, PROMPTS[:1], 3) == [None]


def test_context_is_the_tasks_and_not_the_models(honest: Case) -> None:
    told = program.read_json(honest.export / CONFIG)
    assert told["search"]["max_length"] == 512 == told["model"]["context_length"]
    assert not told["search"]["do_sample"]


def test_rotations_of_gemma_3_are_laid_out_as_the_builder_reads_them() -> None:
    rope = {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    config = Namespace(rope_parameters=rope, max_position_embeddings=32768)
    prepare(config, 1024)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 1e6}
    assert (config.rope_theta, config.rope_local_base_freq) == (1e6, 1e4)
    assert config.max_position_embeddings == 1024
    scaled = Namespace(rope_parameters={"rope_type": "llama3"}, max_position_embeddings=131072)
    prepare(scaled, 1024)
    assert scaled.max_position_embeddings == 131072, "its rotations depend on it"


@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text"])
def test_gemma_computes_what_pytorch_does(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    """Prompts are longer than the window."""
    model, export = write_gemma(kind, tiny_model, tmp_path / "model"), tmp_path / "out"
    export_onnx({**SETTINGS, "recipe": {"type": "fp32"}}, model, 1, export)
    case = Case(model, export, write_tokens(model, tmp_path / "tokens", TEXTS))
    assert case.failed(tmp_path / "parity.json") == ([], "")
    prompts = [[1, *range(5, 5 + n), 7, n] for n in (3, 13, 14, 15, 16, 40)]
    found = np.stack(list(OnnxModel(export, 1).next_token_logits(prompts)))
    expected = logits_of_torch(load_exact(model), prompts)
    assert np.abs(normalise(found) - normalise(expected)).max() < 2e-5


def test_checks_name_nan_and_a_tokenizer_of_another_kind(honest: Case) -> None:
    logits = np.zeros((2, 8))
    assert check_logits(logits, logits, [1, 2])["passed"]
    broken = logits.copy()
    broken[0, 3] = np.nan
    assert not check_logits(broken, logits, [1, 2])["passed"]
    examples = [Namespace(id=str(n), prompt=str(n), prompt_ids=[1, 2]) for n in range(100)]
    few = check_token_ids("it", lambda text: [1, 3 if text == "7" else 2], examples)  # type: ignore[arg-type]
    assert few["passed"] and few["prompts_differing"] == 1
    assert "1 of 100 prompts as other tokens, 7 from token 1 on: [3], not [2]" in few["detail"]
    assert not check_token_ids("it", lambda _: [0, 1, 2], examples)["passed"]  # type: ignore[arg-type]
    use_extra("onnx")


# --- killed ---


def test_killed_export_leaves_nothing_and_ends_in_the_same_bytes(
    honest: Case, tmp_path: Path
) -> None:
    output = tmp_path / "onnx_float.onnx"
    settings = json.dumps({**SETTINGS, "recipe": {"type": "fp32"}})
    options = ("--settings", settings, "--model", honest.model, "--threads", "1")
    kill_in_mid_work("export_onnx.py", output, *options)
    assert not output.with_name("onnx_float.onnx.sha256").exists()
    result = run_program("export_onnx.py", *options, "--output", output)
    assert result.returncode == 0, result.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == [output.name, f"{output.name}.sha256"]
    assert list_checksums(output) == list_checksums(honest.export)


# --- full disk ---


@pytest.mark.parametrize("run", [run_program, run_unchecked], ids=["refused", "full in mid-work"])
def test_full_disk_is_one_line(run: Run, honest: Case, small: Path) -> None:
    output = small / "int4.onnx"
    settings = json.dumps({**SETTINGS, "recipe": INT4})
    options = ("--settings", settings, "--model", honest.model, "--threads", "1")
    result = run("export_onnx.py", *options, "--output", output)
    assert result.returncode == 2, result.stdout
    said = f"{output} needs " if run is run_program else f"disk full while writing {output}: "
    assert the_error(result.stdout).startswith(said)
    assert contents(small) == []
