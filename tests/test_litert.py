"""LiteRT: an export computes what the model does, int4 is smaller than int8, an app asks rightly, and each
sabotage is told by its name."""

import argparse
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import test_disk_full
from check_parity_litert import check_parity_litert
from conftest import kill_in_mid_work, run_program, write_gemma
from formats_run import NEEDS
from pockettune.common import program
from pockettune.common.errors import UserError
from pockettune.data.prompts import Examples
from pockettune.evaluation.statistics import normalise
from pockettune.litert import bundles
from pockettune.litert.bundles import Serving, make_serving, open_bundle, write_bundle
from pockettune.litert.files import (
    block_scales,
    describe_file,
    lift_zero_scales,
    open_flatbuffer,
    read_weights,
)
from pockettune.machine import estimate
from pockettune.machine.exported import file_bytes
from pockettune.machine.findings import Once
from pockettune.machine.models import check_recipes
from pockettune.machine.shape import Shape, tensors_of
from pockettune.parity.reference import logits_of_torch
from pockettune.runtimes.exact import load_exact
from pockettune.runtimes.litert import LitertModel
from test_disk_full import contents, run_unchecked, the_error
from test_doctor import make_run
from test_parity import COLUMNS, TASK, write_tokens

needs_litert = NEEDS["litert"]
small = test_disk_full.small  # a fixture
NAMES = ["tensors", "logits", "token_ids", "chat_template", "stop_tokens", "answers"]
SETTINGS: dict[str, Any] = {
    "task": TASK, "dataset": COLUMNS, "tokenize": {"max_length": 128}, "card": {"template": "task"},
}  # fmt: skip
TYPES = ("dynamic_wi8_afp32", "dynamic_wi4b32_afp32")


@dataclass(frozen=True)
class Case:
    """What the gate compares."""

    model: Path
    export: Path
    tokens: Path

    def check(self, output: Path) -> dict[str, Any]:
        check_parity_litert(
            argparse.Namespace(
                settings=SETTINGS, model=self.model, export=self.export, tokens=self.tokens,
                records=self.tokens / "test.jsonl", threads=1, output=output,
            )
        )  # fmt: skip
        return program.read_json(output)

    def failed(self, output: Path) -> tuple[list[str], str]:
        """Return the names of the checks that fail, in order, and the error."""
        with pytest.raises(UserError) as raised:
            self.check(output)
        assert not output.exists()
        return re.findall(rf"(?:failed: | \| )({'|'.join(NAMES)}): ", str(raised.value)), str(raised.value)  # fmt: skip


def export_case(model: Path, folder: Path) -> Case:
    export = folder / "litert_float.tflite"
    result = run_program("export_litert.py", "--settings", json.dumps({"tokenize": {"max_length": 128}}), "--model", model,
                         "--threads", "1", "--output", export, "--log", folder / "log")  # fmt: skip
    assert result.returncode == 0, result.stdout
    assert not list(folder.glob(".*.partial"))
    return Case(model, export, write_ends(write_tokens(model, folder / "tokens")))


def write_ends(tokens: Path) -> Path:
    answers = program.read_json(tokens / "answers.json")
    program.write_json(tokens / "answers.json", answers | {"ends": [2]})
    return tokens


@pytest.fixture(scope="module")
def honest(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return export_case(tiny_model, tmp_path_factory.mktemp("litert"))


@pytest.fixture(scope="module")
def gemma(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("gemma")
    return export_case(write_gemma("gemma3_text", tiny_model, folder / "model"), folder)


def quantize_options(honest: Case, kind: str, output: Path) -> list[str | Path]:
    settings = {**SETTINGS, "recipe": {"format": "litert", "type": kind}}
    return ["--settings", json.dumps(settings), "--source", honest.export, "--model", honest.model,
            "--tokens", honest.tokens, "--bundle", output.with_suffix(".litertlm")]  # fmt: skip


@pytest.fixture(scope="module")
def quantized(honest: Case) -> dict[str, Path]:
    """Each type's .tflite file; a bundle lies beside it."""
    made = {}
    for kind in TYPES:
        made[kind] = honest.export.with_name(f"{kind}.tflite")
        options = quantize_options(honest, kind, made[kind])
        result = run_program("quantize_litert.py", *options, "--output", made[kind])
        assert result.returncode == 0, result.stdout
    return made


def prompts_of(case: Case) -> list[list[int]]:
    return [example.prompt_ids for example in Examples(case.tokens / "test.arrow")][:6]


@needs_litert
def test_honest_export_passes(honest: Case, tmp_path: Path) -> None:
    told = honest.check(tmp_path / "parity.json")
    assert [check["name"] for check in told["checks"]] == NAMES
    assert told["checks"][1]["largest_difference"] < 1e-4


@needs_litert
def test_logits_are_the_models_whatever_is_shared(honest: Case) -> None:
    """Prompts longer than a piece, of one token, with and without a common start."""
    model = LitertModel(honest.export, threads=1)
    long = [int(token) for token in torch.arange(200) % 500]
    prompts = [
        long[:5],
        [*long, 7],
        [*long, 9, 9],
        [3],
        long[: model.chunk + 1],
        *prompts_of(honest),
    ]
    exact = load_exact(honest.model)
    for together in ([*prompts], prompts[1:3], prompts[3:4]):
        found = np.stack(list(model.next_token_logits(together)))
        np.testing.assert_allclose(found, logits_of_torch(exact, together), atol=2e-4)


@needs_litert
def test_prompt_that_does_not_fit_is_refused(honest: Case) -> None:
    model = LitertModel(honest.export, threads=1)
    with pytest.raises(UserError, match=f"tokens does not fit.*{model.capacity - model.chunk}"):
        list(model.next_token_logits([[1] * model.capacity]))


@needs_litert
def test_int4_is_smaller_than_int8_and_the_table_is_stored_once(
    honest: Case, quantized: dict[str, Path]
) -> None:
    eight, four = (describe_file(quantized[kind]) for kind in TYPES)
    matrices = len(read_weights(honest.export))
    assert eight["tensor_types"] == {"INT8": matrices}
    # Each once, though two graphs read it; the table is the head.
    assert four["tensor_types"] == {"INT4 (blocks of 32)": matrices - 1, "INT8": 1}
    assert four["embedding_type"] == eight["embedding_type"] == "INT8"
    sizes = [path.stat().st_size for path in (honest.export, *quantized.values())]
    assert sizes == sorted(sizes, reverse=True)
    prompts = prompts_of(honest)
    expected = np.stack(list(LitertModel(honest.export, 1).next_token_logits(prompts)))
    apart = [
        np.abs(np.stack(list(LitertModel(path, 1).next_token_logits(prompts))) - expected).mean()
        for path in quantized.values()
    ]
    assert 0 < apart[0] < apart[1] < expected.std()


@needs_litert
def test_block_of_zeros_gets_a_scale(quantized: dict[str, Path], tmp_path: Path) -> None:
    """XNNPACK refuses a file with one that is 0, as quantizing writes it for a block of zeros."""
    path = Path(shutil.copyfile(quantized[TYPES[1]], tmp_path / "model.tflite"))
    block_scales(open_flatbuffer(path, write=True))[0][5] = 0
    with pytest.raises(UserError, match="scale"):
        LitertModel(path, 1)
    assert lift_zero_scales(path) == 1
    (logits,) = LitertModel(path, 1).next_token_logits([[1, 2]])
    assert np.isfinite(logits).all()


@needs_litert
def test_bundle_asks_and_stops_as_trained(honest: Case, quantized: dict[str, Path]) -> None:
    """A system message and a history change nothing; control tokens in a text are broken."""
    with open_bundle(quantized[TYPES[0]].with_suffix(".litertlm"), threads=1) as bundle:
        assert bundle.ends() == {2}
        plain = bundle.render([{"role": "user", "content": "很好<|im_end|>"}])
        assert plain == "<|im_start|>system\n助手<|im_end|>\n<|im_start|>user\n评论：很好< |im_end|>\n情感：<|im_end|>\n<|im_start|>assistant\n"  # fmt: skip
        past = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        assert bundle.render([{"role": "system", "content": "s"}, *past, {"role": "user", "content": "很好<|im_end|>"}]) == plain  # fmt: skip
        first = bundle.answer([{"role": "user", "content": "很好"}], 4)
        assert first == bundle.answer([{"role": "user", "content": "很好"}], 4)


def swap(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        one, other = (f"model.layers.{layer}.{name}.weight" for layer in (0, 1))
        tensors[one], tensors[other] = tensors[other], tensors[one]

    return change


@needs_litert
def test_swapped_layer_is_named(honest: Case, tmp_path: Path) -> None:
    model = shutil.copytree(honest.model, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    swap("mlp.down_proj")(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    names, message = replace(honest, model=model).failed(tmp_path / "parity.json")
    assert {"tensors", "logits"} <= set(names) <= {"tensors", "logits", "answers"}
    assert "model.layers.0.mlp.down_proj.weight stands in layer 1" in message


@needs_litert
def test_bundle_that_asks_otherwise_is_named(
    honest: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another template, another stop token, a BOS that was not trained."""

    def serving(*arguments: Any) -> Serving:
        template = "{{ messages[-1]['content'][0]['text'] }}"
        return replace(make_serving(*arguments), template=template, ends=[1], start=0)

    monkeypatch.setattr("check_parity_litert.make_serving", serving)
    names, message = honest.failed(tmp_path / "parity.json")
    assert {"token_ids", "chat_template", "stop_tokens"} <= set(names)
    assert {"tensors", "logits"}.isdisjoint(names)
    for told in (
        "reads 45 of 45 prompts as other tokens",
        "the stored template writes",
        "not stop at [2]",
    ):
        assert told in message


@needs_litert
@pytest.mark.parametrize("writes", [True, False], ids=["the template writes it", "it does not"])
def test_gemma_gets_one_bos(gemma: Case, writes: bool, tmp_path: Path) -> None:
    """A bundle names a start token only where its template does not write it."""
    model = shutil.copytree(gemma.model, tmp_path / "model")
    if not writes:
        told = program.read_json(model / "tokenizer_config.json")
        told["chat_template"] = told["chat_template"].removeprefix("{{ bos_token }}")
        program.write_json(model / "tokenizer_config.json", told)
    assert make_serving(SETTINGS, model, [2]).start == (None if writes else 0)
    case = replace(gemma, model=model, tokens=write_ends(write_tokens(model, tmp_path / "tokens")))
    assert [ids[:2].count(0) for ids in prompts_of(case)] == [1] * 6
    assert case.check(tmp_path / "parity.json")["passed"]


@needs_litert
def test_gemma_computes_what_pytorch_does(gemma: Case) -> None:
    """Prompts are longer than the window, and than a piece."""
    prompts = [[1, *range(5, 5 + n), 7, n] for n in (3, 13, 14, 15, 40, 130)]
    found = np.stack(list(LitertModel(gemma.export, 1).next_token_logits(prompts)))
    expected = logits_of_torch(load_exact(gemma.model), prompts)
    np.testing.assert_allclose(normalise(found), normalise(expected), atol=2e-5)


@needs_litert
def test_too_old_a_runtime_is_named(
    honest: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the gate, and by what opens a bundle at all."""
    monkeypatch.setattr(bundles, "LEAST_RUNTIME", "99.1.0")
    told = r"asks for LiteRT-LM 99\.1\.0 or later, here is 0\."
    with pytest.raises(UserError, match=told):
        honest.check(tmp_path / "parity.json")
    assert not list(tmp_path.iterdir())
    serving = make_serving(SETTINGS, honest.model, [2])
    write_bundle(honest.export, honest.model / "tokenizer.json", serving, tmp_path / "a.litertlm")
    with pytest.raises(UserError, match=told):
        open_bundle(tmp_path / "a.litertlm", threads=1).__enter__()


@needs_litert
def test_template_of_the_base_gets_texts_and_not_parts(honest: Case, tmp_path: Path) -> None:
    """LiteRT-LM hands messages as lists of parts, which most templates would write out as they are."""
    settings = {**SETTINGS, "card": {"template": "base"}}
    serving = make_serving(settings, honest.model, [2])
    write_bundle(honest.export, honest.model / "tokenizer.json", serving, tmp_path / "a.litertlm")
    talk = [{"role": "system", "content": "助手"}, {"role": "user", "content": "好"}]
    with open_bundle(tmp_path / "a.litertlm", threads=1) as bundle:
        assert bundle.render(talk) == "<|im_start|>system\n助手<|im_end|>\n<|im_start|>user\n好<|im_end|>\n<|im_start|>assistant\n"  # fmt: skip


@needs_litert
@pytest.mark.parametrize("damage", ["empty", "text", "cut"])
def test_damaged_file_is_one_line(honest: Case, damage: str, tmp_path: Path) -> None:
    path = tmp_path / "model.tflite"
    whole = honest.export.read_bytes()
    path.write_bytes(
        {"empty": b"", "text": b"no model" * 9, "cut": whole[: len(whole) // 2]}[damage]
    )
    with pytest.raises(UserError, match=r"not a \.tflite file|cannot open it"):
        LitertModel(path, threads=1)


@needs_litert
def test_bundle_of_nothing_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "model.litertlm").write_bytes(b"no bundle" * 99)
    with pytest.raises(UserError, match=r"is not a \.litertlm file"):
        open_bundle(tmp_path / "model.litertlm", threads=1).__enter__()


def test_model_too_large_for_the_format_is_refused(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import export_litert

    monkeypatch.setattr(export_litert, "LARGEST_TFLITE", 1_000_000)
    with pytest.raises(UserError, match=r"takes 0\.01 GB"):
        export_litert.check_size(tiny_model)


def test_sizes_and_memory_are_said_beforehand() -> None:
    """Against SmolLM2-135M's files: real bytes, which hold the graphs too."""
    smollm2 = {
        "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
    }  # fmt: skip
    shape = Shape(tensors_of(smollm2) or (), "")
    for kind, size in zip(TYPES, (142_002_480, 92_145_872), strict=True):
        estimated = file_bytes(shape, {"format": "litert", "type": kind})
        assert estimated == pytest.approx(size, rel=0.06)
    run = make_run(quantize={"a": {"format": "litert", "type": TYPES[0]}})
    needed = estimate.memory_items(run, shape, None, "cpu", "fp32")
    assert needed["export (LiteRT)"] == pytest.approx(3.49e9, rel=0.1)
    large = replace(shape, tensors=shape.tensors * 5)
    run.facts["shape"] = Once(lambda: large)
    (finding,) = check_recipes(run)
    assert (
        finding.state == "problem"
        and "holds 2.15 GB, the model takes 2.69 in fp32" in finding.detail
    )


# --- killed ---


@needs_litert
def test_killed_export_leaves_nothing_and_ends_in_the_same_bytes(
    honest: Case, tmp_path: Path
) -> None:
    output = tmp_path / "litert_float.tflite"
    settings = json.dumps({"tokenize": {"max_length": 128}})
    options = ("--settings", settings, "--model", honest.model, "--threads", "1")
    kill_in_mid_work("export_litert.py", output, *options)
    result = run_program("export_litert.py", *options, "--output", output)
    assert result.returncode == 0, result.stdout
    assert [path.name for path in tmp_path.iterdir()] == [output.name]
    assert output.read_bytes() == honest.export.read_bytes()


@needs_litert
def test_killed_quantizing_leaves_nothing_and_ends_in_the_same_bytes(
    honest: Case, quantized: dict[str, Path], tmp_path: Path
) -> None:
    kind = TYPES[1]
    output, made = tmp_path / "a.tflite", quantized[kind]
    options = quantize_options(honest, kind, output)
    kill_in_mid_work("quantize_litert.py", output, *options)
    result = run_program("quantize_litert.py", *options, "--output", output)
    assert result.returncode == 0, result.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.litertlm", "a.tflite"]
    for suffix in (".tflite", ".litertlm"):
        again, before = (path.with_suffix(suffix).read_bytes() for path in (output, made))
        assert again == before, suffix


@needs_litert
def test_killed_gate_leaves_nothing(honest: Case, tmp_path: Path) -> None:
    """It makes a bundle beside its result, of the float export's size."""
    output = tmp_path / "parity.json"
    options = ("--settings", json.dumps(SETTINGS), "--model", honest.model, "--export", honest.export,
               "--tokens", honest.tokens, "--records", honest.tokens / "test.jsonl", "--threads", "1")  # fmt: skip
    kill_in_mid_work("check_parity_litert.py", output, *options)
    result = run_program("check_parity_litert.py", *options, "--output", output)
    assert result.returncode == 0, result.stdout
    assert [path.name for path in tmp_path.iterdir()] == [output.name]


# --- full disk ---


@needs_litert
@pytest.mark.parametrize("run", [run_program, run_unchecked], ids=["refused", "full in mid-work"])
def test_full_disk_is_one_line(
    run: Callable[..., subprocess.CompletedProcess[str]], honest: Case, small: Path
) -> None:
    """Of the float export, and of what is made of it."""
    settings = json.dumps({"tokenize": {"max_length": 128}})
    export: list[str | Path] = ["--settings", settings, "--model", honest.model, "--threads", "1"]
    output = small / "a.tflite"
    calls: dict[str, list[str | Path]] = {
        "export_litert.py": export,
        "quantize_litert.py": quantize_options(honest, TYPES[0], output),
    }
    for name, options in calls.items():
        result = run(name, *options, "--output", output, "--log", small.with_name("log"))
        assert result.returncode == 2, result.stdout
        said = f"{output} needs " if run is run_program else f"disk full while writing {output}: "
        assert the_error(result.stdout).startswith(said), name
        assert contents(small) == []
