"""Recipes of several formats: what a config may say, how stages are paired, what is chosen."""

import importlib.util
import json
import shutil
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from compare_stages import compare_stages, list_flips, stage_before
from conftest import ROOT
from pockettune.common import extras
from pockettune.common.errors import UserError
from pockettune.common.formats import file_name, variants_of
from pockettune.evaluation.choice import Limits, choose
from pockettune.evaluation.intervals import compare_changes
from pockettune.machine.estimate import file_names, memory_items
from pockettune.machine.exported import file_bytes
from pockettune.machine.shape import Shape, Tensor, tensors_of
from pockettune.machine.software import check_extra_packages
from pockettune.workflow.config import check_config, drop_idle
from test_doctor import make_run
from test_parity import COLUMNS, TASK, write_tokens
from write_report import shown_file

SCHEMA = yaml.safe_load((ROOT / "schemas/config.schema.yaml").read_text())
OWN = yaml.safe_load((ROOT / "config.yaml").read_text())
NAMES = [
    "tfidf",
    "base",
    "adapter",
    "merged",
    "f16",
    "q8_0",
    "onnx_float",
    "int4",
    "litert_float",
    "wi8",
]


def settled(**recipes: Any) -> dict[str, Any]:
    """Return `quantize:` as rules see it, q8_0 and these recipes."""
    config = deepcopy(OWN) | {"quantize": {"q8_0": {"type": "Q8_0"}, **recipes}}
    check_config(config, SCHEMA)
    drop_idle(config)
    return config["quantize"]


def test_recipe_without_a_format_stays_what_it_was() -> None:
    plain = settled()["q8_0"]
    assert plain == {"type": "Q8_0", "pure": False, "importance": False, "tensors": {}}
    spelled = settled(other={"format": "gguf", "type": "Q8_0"})["other"]
    assert spelled == plain, "a default spelled out is no reason to rerun"


def test_recipe_has_the_keys_of_its_format_and_their_defaults() -> None:
    recipe = settled(a={"format": "onnx", "type": "int4"})["a"]
    assert recipe == {
        "format": "onnx", "type": "int4", "block": 32, "accuracy_level": 4, "algorithm": "default",
    }  # fmt: skip
    assert "algorithm" not in settled(a={"format": "onnx", "type": "int8"})["a"]


@pytest.mark.parametrize(
    "recipe, line",
    [
        ({"format": "onnx", "type": "Q4_0"}, "quantize.a.type is 'Q4_0'; known: int8, int4"),
        ({"format": "onnx", "type": "int4", "pure": True}, "unknown key quantize.a.pure; did you mean type? (known: format, type, block"),
        ({"format": "onnx", "type": "int4", "block": 48}, "quantize.a.block is 48; did you mean 64? (known: 16, 32"),
        ({"format": "onnx"}, "quantize.a.type is missing"),
        ({"format": "onxx", "type": "int4"}, "quantize.a.format is 'onxx'; did you mean onnx?"),
        ({"type": "Q4_0", "block": 32}, "unknown key quantize.a.block"),
        ({"format": "onnx", "type": "int8", "algorithm": "rtn"}, "int8 has one, take it away"),
    ],
)  # fmt: skip
def test_recipe_that_its_format_does_not_know_is_one_line(recipe: Any, line: str) -> None:
    with pytest.raises(UserError) as error:
        settled(a=recipe)
    assert line in str(error.value) and "\n" not in str(error.value)


def test_names_of_float_rungs_are_taken() -> None:
    for name in ("onnx_float", "litert_float"):
        with pytest.raises(UserError, match="is a stage's"):
            settled(**{name: {"type": "Q4_0"}})


def test_a_run_has_a_gguf_file() -> None:
    config = deepcopy(OWN) | {"quantize": {"a": {"format": "onnx", "type": "int4"}}}
    with pytest.raises(UserError, match="has no recipe of format gguf"):
        check_config(config, SCHEMA)
    config = deepcopy(OWN) | {"bundle": {"file": "a"}}
    config["quantize"]["a"] = {"format": "onnx", "type": "int4"}
    with pytest.raises(UserError, match=r"bundle\.file is 'a'"):
        check_config(config, SCHEMA)


def test_each_stage_is_paired_with_what_it_was_made_of() -> None:
    kinds = {"int4": "onnx", "onnx_float": "onnx", "wi8": "litert", "litert_float": "litert"}
    before = {name: stage_before(name, NAMES, kinds.get(name, "gguf")) for name in NAMES}
    assert before == {
        "tfidf": "tfidf", "base": "tfidf", "adapter": "base", "merged": "adapter", "f16": "merged",
        "q8_0": "f16", "onnx_float": "merged", "int4": "onnx_float", "litert_float": "merged",
        "wi8": "litert_float",
    }  # fmt: skip


def predictions(rows: int, wrong: int = 0) -> pd.DataFrame:
    """Return `rows` answered rows, the first `wrong` of them wrongly."""
    said = ["b"] * wrong + ["a"] * (rows - wrong)
    return pd.DataFrame(
        {
            "id": [str(i) for i in range(rows)], "reference": "a", "prediction": said, "seen": False,
            "log_probability_a": -0.1, "log_probability_b": -2.0,
        }
    )  # fmt: skip


def test_rung_on_fewer_rows_is_compared_on_those_and_shows_no_flips() -> None:
    tables = {name: predictions(20) for name in NAMES}
    tables |= {"onnx_float": predictions(5), "int4": predictions(20, wrong=2)}
    metrics: dict[str, Any] = {
        name: {"n": len(table), "metric": "accuracy", "accuracy": 1.0}
        for name, table in tables.items()
    }
    metrics["int4"]["format"] = metrics["onnx_float"]["format"] = "onnx"
    metrics["wi8"]["format"] = "litert"
    stages = compare_stages(metrics, tables, 0.01, {})["stages"]
    assert stages["onnx_float"]["against_before"]["stage"] == "merged"
    assert stages["onnx_float"]["against_f16"]["n"] == 5
    assert stages["int4"]["against_before"]["stage"] == "onnx_float"
    assert stages["int4"]["against_before"]["n"] == 5 and stages["int4"]["against_f16"]["lost"] == 2
    flips = list_flips(tables, {str(i): {"text": "text", "reference": "a"} for i in range(20)})
    assert list(flips) == ["q8_0", "int4", "wi8"] and len(flips["int4"]) == 2


def test_best_gguf_is_a_gguf_file_however_small_another_is() -> None:
    def stage(size: int, **more: Any) -> dict[str, Any]:
        paired = compare_changes(0, 0, 10_000)
        return {"size_bytes": size, "score": 0.9, "stored": {}, "against_f16": paired, **more}

    stages = {
        "merged": {"score": 0.9},
        "f16": {"size_bytes": 9, "score": 0.9, "stored": {}},
        "q8_0": stage(5),
        "int4": stage(3, format="onnx"),
        "onnx_float": {"size_bytes": 20, "score": 0.9, "format": "onnx"},
    }
    speed = {name: {"resident_bytes": 1, "prompt": {"mean": 1}} for name in ("f16", "q8_0", "int4")}
    choice = choose(stages, speed, Limits(None, None, 0.01))
    assert choice["chosen"] == "q8_0" and shown_file(choice) == "q8_0"
    assert choice["files"]["int4"]["format"] == "onnx" and choice["files"]["int4"]["front"]
    assert "onnx_float" not in choice["files"], "a rung is no file that is handed out"
    assert shown_file(choice | {"chosen": None}) == "q8_0"


def test_missing_packages_are_one_line_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extras, "MODULES", {"onnx": "no_such_module", "litert": "no_such_module"})
    extras.check_extras([], tmp_path)
    with pytest.raises(UserError, match=r"format onnx and litert: .* make onnx && make litert"):
        extras.check_extras(["onnx", "litert"], tmp_path)
    folder = extras.extra_folder("onnx", tmp_path)
    folder.mkdir(parents=True)
    with pytest.raises(UserError, match="make onnx"):  # an installation that was cut short
        extras.check_extras(["onnx"], tmp_path)
    (folder / extras.INSTALLED).touch()
    extras.check_extras(["onnx"], tmp_path)


def test_doctor_names_what_is_missing_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extras, "MODULES", {"onnx": "no_such_module", "litert": "no_such_module"})
    run = make_run(
        quantize={
            "a": {"format": "onnx", "type": "int4"},
            "b": {"format": "litert", "type": "dynamic_wi8_afp32"},
        }
    )
    run.root = tmp_path
    for missing in (["onnx", "litert"], ["litert"]):
        (finding,) = check_extra_packages(run)
        assert finding.state == "problem" and f"format {' and '.join(missing)}:" in finding.detail
        assert finding.remedy == " && ".join(f"make {kind}" for kind in missing)
        folder = extras.extra_folder(missing[0], tmp_path)
        folder.mkdir(parents=True)
        (folder / extras.INSTALLED).touch()
    (finding,) = check_extra_packages(run)
    assert (finding.state, finding.detail) == ("ok", "packages of onnx, litert are here")


def test_files_of_all_formats_have_a_place_and_a_size() -> None:
    quantize = settled(
        a={"format": "onnx", "type": "int4"},
        b={"format": "onnx", "type": "int4", "algorithm": "k_quant_mixed"},
        c={"format": "onnx", "type": "int8"},
    )
    assert file_names(quantize) == ["onnx_float.onnx", "q8_0.gguf", "a.onnx", "b.onnx", "c.onnx"]
    assert variants_of(quantize, "onnx") == ["a", "b", "c"]
    litert = settled(d={"format": "litert", "type": "dynamic_wi8_afp32"})
    assert file_names(litert)[1:] == ["q8_0.gguf", "d.tflite", "d.litertlm"]
    assert file_name("x", "litert") == "x.tflite"
    # SmolLM2-135M, whose three files were made: 86.3, 113.4 and 151.7 MB.
    layer = [("q_proj", (576, 576)), ("k_proj", (192, 576)), ("v_proj", (192, 576)), ("o_proj", (576, 576)),
             ("gate_proj", (1536, 576)), ("up_proj", (1536, 576)), ("down_proj", (576, 1536))]  # fmt: skip
    tensors = [Tensor(name, size, n) for n in range(30) for name, size in layer]
    shape = Shape((Tensor("embed_tokens", (49152, 576)), *tensors), "a test")
    sizes = [file_bytes(shape, quantize[name]) / 1e6 for name in "abc"]  # type: ignore[operator]
    assert np.allclose(sizes, [86.3, 113.4, 151.7], rtol=0.06), sizes
    untied = Shape((*shape.tensors, Tensor("lm_head", (49152, 576))), "a test")
    more = file_bytes(untied, quantize["a"]) - file_bytes(shape, quantize["a"])  # type: ignore[operator]
    assert more == 4 * 49152 * 576, "a table of its own stays in fp32"


def test_gemma_3_is_said_beforehand() -> None:
    """A 270M, whose files and peaks were measured: three fifths of it are the table of tokens."""
    quantize = settled(
        onnx_int4={"format": "onnx", "type": "int4"},
        mixed={"format": "onnx", "type": "int4", "algorithm": "k_quant_mixed"},
        onnx_int8={"format": "onnx", "type": "int8"},
        litert_int8={"format": "litert", "type": "dynamic_wi8_afp32"},
        litert_int4={"format": "litert", "type": "dynamic_wi4b32_afp32"},
    )
    shape = Shape(
        tensors_of(
            {"model_type": "gemma3_text", "vocab_size": 262144, "hidden_size": 640, "intermediate_size": 2048,
             "num_hidden_layers": 18, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256}
        ) or (),
        "a test",
    )  # fmt: skip
    sizes = {
        name: (file_bytes(shape, recipe) or 0) / 1e6
        for name, recipe in quantize.items()
        if name != "q8_0"
    }
    assert sizes == pytest.approx(
        {"onnx_int4": 169.8, "mixed": 271.2, "onnx_int8": 303.9, "litert_int8": 279.9, "litert_int4": 233.3}, rel=0.05
    )  # fmt: skip
    peaks = memory_items(make_run(quantize=quantize), shape, None, "cpu", "fp32")
    measured = {"export (ONNX)": 8.66e9, "export (LiteRT)": 5.92e9, "quantize (LiteRT)": 1.89e9,
                "check_parity (LiteRT)": 4.42e9, "check_parity (ONNX)": 3.01e9, "evaluate (ONNX)": 2.43e9}  # fmt: skip
    assert {name: peaks[name] for name in measured} == pytest.approx(measured, rel=0.2)
    del quantize["mixed"]
    peaks = memory_items(make_run(quantize=quantize), shape, None, "cpu", "fp32")
    assert peaks["export (ONNX)"] == pytest.approx(3.64e9, rel=0.2)


def test_every_format_has_its_pins_in_both_places() -> None:
    for name in ("onnx", "litert"):
        pins = [
            line.split("#")[0].strip()
            for line in (ROOT / f"requirements-{name}.txt").read_text().splitlines()
            if "==" in line.split("#")[0]
        ]
        environment = yaml.safe_load((ROOT / f"envs/{name}.yaml").read_text())
        (brought,) = (
            entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)
        )
        assert brought == pins, json.dumps(pins)


# What each program that needs a format's packages is told; the files are not looked at before.
PROGRAMS = {
    "export_onnx": "settings model threads output",
    "check_parity_onnx": "settings model export tokens records threads output",
    "evaluate_onnx": "settings model tokens threads metrics predictions",
    "measure_speed_onnx": "model threads output",
    "export_litert": "settings model threads output",
    "check_parity_litert": "settings model export tokens records threads output",
    "quantize_litert": "settings source model tokens bundle output",
    "evaluate_litert": "settings model bundle tokens threads metrics predictions",
    "measure_speed_litert": "model threads output",
}


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs in a checkout without .packages."""
    folder = tmp_path_factory.mktemp("bare")
    shutil.copytree(
        ROOT / "scripts", folder / "scripts", ignore=shutil.ignore_patterns("__pycache__")
    )
    return folder


@pytest.mark.parametrize("name", PROGRAMS)
def test_program_without_its_packages_is_one_line(
    name: str, bare: Path, tiny_model: Path, tmp_path: Path
) -> None:
    kind = name.rpartition("_")[2]
    if importlib.util.find_spec(extras.MODULES[kind]):
        pytest.skip(f"the packages of format {kind} are in the environment itself")
    tokens, made = write_tokens(tiny_model, tmp_path / "tokens"), tmp_path / "made"
    settings = {
        "task": TASK, "dataset": COLUMNS, "tokenize": {"max_length": 128}, "recipe": {"type": "int4", "block": 32, "accuracy_level": 4},
        "card": {"template": "task"}, "evaluate": {"split": "test", "limit": None, "greedy_rows": 0},
    }  # fmt: skip
    values: dict[str, Any] = {"settings": json.dumps(settings), "threads": 1, "tokens": tokens,
                              "model": tiny_model, "records": tokens / "test.jsonl"}  # fmt: skip
    options = [
        str(word)
        for option in PROGRAMS[name].split()
        for word in (f"--{option}", values.get(option, made / option))
    ]
    result = subprocess.run(
        [sys.executable, bare / f"scripts/{name}.py", *options], capture_output=True, text=True
    )
    assert result.returncode == 2, result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert errors == [
        f"error: format {kind}: the packages that make and run such files are not here; install them:"
        f" make {kind} (docs/formats.md)"
    ]
    assert "Traceback" not in result.stderr and not list(made.rglob("*.*"))
