"""Files of the other formats in the workflow: on the ladder, made anew where they must be, whole after a kill."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from conftest import SMALL, run_snakemake
from formats_run import HERE, NEEDS, copy_run
from kill_every_rule import compare, kill_all
from pockettune.common import program
from test_workflow import (
    AFTER_EVALUATION,
    FROM_CONVERT,
    FROM_TOKENIZE,
    append,
    edit_run,
    planned,
)

pytestmark = pytest.mark.skipif(
    not HERE, reason="no packages of another format are here: make onnx, make litert"
)


@pytest.fixture(scope="module")
def run(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the finished run with files of the formats on its ladder. Leave it as it was."""
    folder = copy_run(finished_run, tmp_path_factory.mktemp("formats") / "run")
    result = run_snakemake(folder, *SMALL)
    assert result.returncode == 0, result.stdout[-3000:]
    return folder


@NEEDS["onnx"]
def test_onnx_file_stands_on_the_ladder(run: Path) -> None:
    results = run / "results/small"
    stages = program.read_json(results / "metrics.json")["stages"]
    rung, small = stages["onnx_float"], stages["small_int4"]
    assert rung["against_before"]["stage"] == "merged" and rung["against_before"]["flips"] == 0
    assert rung["kl_vocabulary"]["mean"] < 1e-4 < small["kl_vocabulary"]["mean"]
    assert small["against_before"]["stage"] == "onnx_float" and small["accuracy"] > 0.9
    assert small["format"] == "onnx" and small["greedy"]["right"] > 0
    assert stages["q8_0"]["against_before"]["stage"] == "f16"
    page = (results / "report.html").read_text(encoding="utf-8")
    assert "<td>small_int4.onnx</td>" in page and "Is the ONNX export the merged model?" in page
    assert "<td>q8_0.gguf</td>" in page
    card = (results / "card.md").read_text(encoding="utf-8")
    assert "small_int4.onnx needs ONNX Runtime 1." in card
    choice = program.read_json(results / "best.json")
    assert choice["chosen"] == "q8_0" and choice["files"]["small_int4"]["format"] == "onnx"


@NEEDS["litert"]
def test_litert_files_stand_on_the_ladder(run: Path) -> None:
    results = run / "results/small"
    stages = program.read_json(results / "metrics.json")["stages"]
    assert list(stages)[-3:] == ["litert_float", "small_wi4", "small_wi8"]
    rung, eight, four = (stages[name] for name in ("litert_float", "small_wi8", "small_wi4"))
    assert rung["against_before"]["stage"] == "merged" and rung["against_before"]["flips"] == 0
    moved = [stage["kl_vocabulary"]["mean"] for stage in (rung, eight, four)]
    assert moved == sorted(moved) and moved[0] < 1e-6 < moved[1]
    for stage in (eight, four):
        assert stage["against_before"]["stage"] == "litert_float" and stage["accuracy"] > 0.9
        assert stage["greedy"]["right"] == stage["greedy"]["scored_right"] > 0
        assert stage["prompts_tokenized_otherwise"] == 0
    assert four["size_bytes"] == (results / "small_wi4.tflite").stat().st_size < eight["size_bytes"]
    speed = program.read_json(results / "speed/small_wi4.json")
    assert speed["prompt"]["mean"] > 0 and speed["generation"]["mean"] > 0
    page = (results / "report.html").read_text(encoding="utf-8")
    assert "<td>small_wi4.tflite</td>" in page and "Is the LiteRT export the merged model?" in page
    card = (results / "card.md").read_text(encoding="utf-8")
    assert "small_wi8.tflite needs LiteRT-LM 0." in card
    choice = program.read_json(results / "best.json")
    assert choice["chosen"] == "q8_0" and choice["files"]["small_wi8"]["format"] == "litert"


# --- what a change reruns ---

# Rules of each format, as often as the run has files: up to the float export, with the gate; the rest.
FLOAT = {
    "onnx": {"export_onnx_float": 1},
    "litert": {"export_litert": 1},
}
GATE = {kind: {f"check_parity_{kind}": 1} for kind in FLOAT}
FILES = {
    "onnx": {"export_onnx": 1, "measure_speed_onnx": 1},
    "litert": {"quantize_litert": 2, "measure_speed_litert": 2},
}
RUNGS = {kind: {f"evaluate_{kind}_float": 1} for kind in FLOAT}
SCORES = {"onnx": {"evaluate_onnx": 1}, "litert": {"evaluate_litert": 2}}
ONE_ONNX = {"export_onnx": 1, "evaluate_onnx": 1, "measure_speed_onnx": 1}
ONE_LITERT = {"quantize_litert": 1, "evaluate_litert": 1, "measure_speed_litert": 1}
EVALUATED = {"evaluate_tfidf": 1, "evaluate_base": 1, "evaluate_adapter": 1, "evaluate_merged": 1,
             "evaluate_f16": 1, "evaluate_variant": 1, **AFTER_EVALUATION}  # fmt: skip


def of_formats(*parts: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    """Return the rules of those formats that are here."""
    return {rule: count for part in parts for kind in HERE for rule, count in part[kind].items()}


def with_one_gguf(jobs: Mapping[str, int]) -> dict[str, int]:
    """Return the finished run's jobs with those of one GGUF variant the fewer."""
    fewer = {"quantize", "measure_speed", "evaluate_variant"}
    return {rule: count - (rule in fewer) for rule, count in jobs.items()}


EVERYTHING = of_formats(FLOAT, GATE, FILES, RUNGS, SCORES)
Edit = Callable[[Path], object]
REBUILDS: dict[str, tuple[Edit, dict[str, int]]] = {
    "nothing": (lambda folder: None, {}),
    "a GGUF recipe": (
        edit_run("quantize", q8_0={"type": "Q6_K"}),
        {"quantize": 1, "measure_speed": 1, "evaluate_variant": 1, **AFTER_EVALUATION}),
    "the recipe's format spelled out for gguf": (
        edit_run("quantize", q8_0={"type": "Q8_0", "format": "gguf"}), {}),
    "evaluate.limit": (
        edit_run("evaluate", limit=50), {**EVALUATED, **of_formats(RUNGS, SCORES)}),
    "evaluate.greedy_rows": (
        edit_run("evaluate", greedy_rows=0),
        {"evaluate_adapter": 1, "evaluate_merged": 1, "evaluate_f16": 1, "evaluate_variant": 1,
         **AFTER_EVALUATION, **of_formats(RUNGS, SCORES)}),
    "evaluate.margin": (edit_run("evaluate", margin=0.01), AFTER_EVALUATION),
    "report.title": (edit_run("report", title="x"), {"report": 1, "all": 1}),
    "card.license": (
        edit_run("card", license="cc-by-4.0"),
        {**with_one_gguf(FROM_CONVERT), **{k: n for k, n in EVERYTHING.items() if k != "export_litert"}}),
    "task.prompt": (edit_run("task", prompt="{text}"), {**with_one_gguf(FROM_TOKENIZE), **EVERYTHING}),
    "a line of quantize_model.py": (
        append("scripts/quantize_model.py", "# x\n"),
        {"quantize": 1, "measure_speed": 1, "evaluate_variant": 1, **AFTER_EVALUATION}),
}  # fmt: skip
REBUILDS_OF_ONNX: dict[str, tuple[Edit, dict[str, int]]] = {
    "block of the one variant": (
        edit_run("quantize", small_int4={"format": "onnx", "type": "int4", "block": 64}), ONE_ONNX),
    "another variant": (edit_run("quantize", other={"format": "onnx", "type": "int8"}), ONE_ONNX),
    "no variant of the format": (edit_run("quantize", small_int4=None), {}),
    "a line of runtimes/onnx.py": (
        append("scripts/pockettune/runtimes/onnx.py", "# x\n"),
        {part: n for d in (FLOAT, GATE, FILES, RUNGS, SCORES) for part, n in d["onnx"].items()}),
}  # fmt: skip
REBUILDS_OF_LITERT: dict[str, tuple[Edit, dict[str, int]]] = {
    "type of one variant": (
        edit_run("quantize", small_wi8={"format": "litert", "type": "dynamic_wi4b32_afp32"}), ONE_LITERT),
    "another variant": (
        edit_run("quantize", other={"format": "litert", "type": "dynamic_wi8_afp32"}), ONE_LITERT),
    "no variant of the format": (edit_run("quantize", small_wi8=None, small_wi4=None), {}),
    "a line of litert/quantizing.py": (
        append("scripts/pockettune/litert/quantizing.py", "# x\n"), {**FILES["litert"], **SCORES["litert"]}),
    "a line of runtimes/litert.py": (
        append("scripts/pockettune/runtimes/litert.py", "# x\n"),
        {**GATE["litert"], **FILES["litert"], **RUNGS["litert"], **SCORES["litert"]}),
}  # fmt: skip


def assert_reruns(run: Path, edit: Edit, expected: Mapping[str, int]) -> None:
    """Plan the run with the change, and take the change back."""
    paths = [run / "runs/small.yaml", *(run / "scripts").rglob("*.py")]
    before = {path: path.read_bytes() for path in paths}
    try:
        edit(run)
        assert planned(run) == expected
    finally:
        for path, content in before.items():
            if path.read_bytes() != content:
                path.write_bytes(content)


@pytest.mark.parametrize("change", REBUILDS)
def test_change_reruns_what_depends_on_it(change: str, run: Path) -> None:
    assert_reruns(run, *REBUILDS[change])


@NEEDS["onnx"]
@pytest.mark.parametrize("change", REBUILDS_OF_ONNX)
def test_change_of_onnx_reruns_what_depends_on_it(change: str, run: Path) -> None:
    edit, expected = REBUILDS_OF_ONNX[change]
    assert_reruns(run, edit, {**expected, **AFTER_EVALUATION})


@NEEDS["litert"]
@pytest.mark.parametrize("change", REBUILDS_OF_LITERT)
def test_change_of_litert_reruns_what_depends_on_it(change: str, run: Path) -> None:
    edit, expected = REBUILDS_OF_LITERT[change]
    assert_reruns(run, edit, {**expected, **AFTER_EVALUATION})


# --- kills ---


def test_killed_in_every_rule_of_the_formats(finished_run: Path, run: Path, tmp_path: Path) -> None:
    """snakemake and the program, at a random moment of each; the same bytes in the end."""
    killed = copy_run(finished_run, tmp_path / "killed")
    hits = kill_all(run, killed, 1, 5, spare=("compare", "choose", "report"))
    assert len(hits) >= 4 * len(HERE), "some are quicker than the kill; most must be hit"
    compare(run, killed)
