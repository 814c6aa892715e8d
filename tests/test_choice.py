"""Which file is chosen, and what is said of it: made-up metrics of files that nobody has to make."""

import json
from pathlib import Path
from typing import Any

import pytest

from conftest import run_program
from pockettune.evaluation.choice import Limits, choose, read_limits
from pockettune.evaluation.intervals import compare_changes

ROWS = 10_000
NO_LIMITS = Limits(size_mb=None, memory_mb=None, margin=0.005)


def stage(size_mb: float, lost: int, gained: int = 0, n: int = ROWS) -> dict[str, Any]:
    return {
        "size_bytes": int(size_mb * 1e6), "score": 0.9 - (lost - gained) / n, "stored": {},
        "against_f16": {**compare_changes(lost, gained, n), "n": n},
    }  # fmt: skip


F16 = {"size_bytes": 543_000_000, "score": 0.9, "stored": {}}
STAGES = {
    "tfidf": {"score": 0.87, "size_bytes": None},
    "f16": F16,
    "q8_0": stage(289, 10, 10),
    "q4_k_m": stage(253, 400),  # worse
    "iq4_nl": stage(242, 20, 20),
    "q4_0": stage(241, 165, 140),  # not decided
}


def speed(memory_mb: float | None = 300, rate: float = 400) -> dict[str, Any]:
    memory = None if memory_mb is None else int(memory_mb * 1e6)
    return {"prompt": {"mean": rate}, "resident_bytes": memory}


SPEED = dict.fromkeys(STAGES, speed())


def chosen(limits: Limits, stages: dict[str, Any] = STAGES, speeds: dict[str, Any] = SPEED) -> str:
    name: str = choose(stages, speeds, limits)["chosen"]
    return name


def test_smallest_file_that_is_proved_as_good_is_chosen() -> None:
    choice = choose(STAGES, SPEED, NO_LIMITS)
    claims = {name: e["verdict"]["claim"] for name, e in choice["files"].items() if "verdict" in e}
    assert claims == {
        "q4_0": "undecided", "iq4_nl": "as good", "q4_k_m": "worse", "q8_0": "as good"
    }  # fmt: skip
    assert choice["chosen"] == "iq4_nl" and choice["proved"]
    assert choice["why"] == (
        "the smallest within the budget that is proved as good (difference at least -0.11 points,"
        " margin 0.5)"
    )
    assert list(choice["files"]) == ["q4_0", "iq4_nl", "q4_k_m", "q8_0", "f16"], "by size"


def test_margin_of_the_choice_is_that_of_evaluate_unless_it_has_its_own() -> None:
    evaluate = {"margin": 0.005}
    assert read_limits({"choose": None, "evaluate": evaluate}) == NO_LIMITS
    own = read_limits({"choose": {"size_mb": 250, "margin": 0.02}, "evaluate": evaluate})
    assert own == Limits(250, None, 0.02)
    assert chosen(own) == "q4_0", "proved as good within two points"
    assert chosen(Limits(None, None, 0.0005)) == "q8_0", "nothing proved: the closest bound"


def test_budget_that_only_unproved_files_meet() -> None:
    choice = choose(STAGES, SPEED, Limits(241.5, None, 0.005))
    assert (choice["chosen"], choice["proved"]) == ("q4_0", False)
    assert choice["why"].startswith(
        "no file within the budget is proved as good as F16; this one has the closest bound"
        " (difference at least -0.54 points, margin 0.5): q4_0: not decided by these rows, which"
        " could have shown a difference of "
    )
    assert (
        "; iq4_nl: over budget (size 242.0 MB, choose.size_mb is 241.5), proved as good ("
    ) in choice["why"]


def test_memory_counts_too() -> None:
    speeds = SPEED | {"iq4_nl": speed(310), "q4_0": speed(None)}
    limits = Limits(None, 305, 0.005)
    assert chosen(limits, speeds=speeds) == "q8_0"
    files = choose(STAGES, speeds, limits)["files"]
    assert files["iq4_nl"]["over"] == ["memory 310.0 MB, choose.memory_mb is 305"]
    assert files["q4_0"]["over"] == ["memory not measured on this system, choose.memory_mb is 305"]
    assert chosen(NO_LIMITS, speeds=speeds) == "iq4_nl", "no limit asks for no memory"


def test_too_few_rows_prove_nothing_and_it_is_said() -> None:
    stages = {"f16": F16, "q8_0": stage(289, 1, 1, n=40), "q4_0": stage(241, 2, 0, n=40)}
    choice = choose(stages, SPEED, NO_LIMITS)
    assert (choice["chosen"], choice["proved"]) == ("q8_0", False)
    assert (
        choice["why"].count("not decided by these rows, which could have shown a difference") == 2
    )


def test_ties_by_size_go_to_the_higher_bound_and_then_by_name() -> None:
    stages = {"f16": F16, "b": stage(241, 20, 20), "a": stage(241, 30, 20), "c": stage(241, 20, 20)}
    speeds = dict.fromkeys(stages, speed())
    assert chosen(NO_LIMITS, stages, speeds) == "b"
    unproved = {name: stages[name] | {"size_bytes": size} for name, size in (("f16", 9), ("b", 8), ("c", 7))}  # fmt: skip
    assert chosen(Limits(None, None, 1e-6), unproved, speeds) == "c", "of equal bounds the smaller"


def test_front_holds_what_no_file_beats() -> None:
    stages = {
        "f16": F16, "q8_0": stage(289, 0), "q5_0": stage(260, 100), "q4_0": stage(241, 50),
        "twin": stage(241, 50), "fast": stage(289, 200),
    }  # fmt: skip
    rates = {"f16": 428, "q8_0": 428, "q5_0": 300, "q4_0": 476, "twin": 476, "fast": 500}
    speeds = {name: speed(rate=rate) for name, rate in rates.items()}
    files = choose(stages, speeds, NO_LIMITS)["files"]
    on_front = {name for name, entry in files.items() if entry["front"]}
    assert on_front == {"q8_0", "q4_0", "twin", "fast"}, "equal files do not beat each other"


@pytest.fixture
def program_arguments(tmp_path: Path) -> list[str | Path]:
    (tmp_path / "metrics.json").write_text(json.dumps({"stages": STAGES}))
    arguments: list[str | Path] = ["--metrics", tmp_path / "metrics.json", "--speed"]
    files = []
    for name in list(STAGES)[1:]:
        (tmp_path / f"{name}.json").write_text(json.dumps(SPEED[name]))
        (tmp_path / f"{name}.gguf").write_text(f"GGUF {name}")
        arguments.append(tmp_path / f"{name}.json")
        files.append(tmp_path / f"{name}.gguf")
    arguments += ["--files", *files]
    return [*arguments, "--gguf", tmp_path / "out/best.gguf", "--json", tmp_path / "out/best.json"]


def run(arguments: list[str | Path], **limits: float) -> tuple[int, str]:
    settings = json.dumps({"choose": limits, "evaluate": {"margin": 0.005}})
    result = run_program("choose_file.py", *arguments, "--settings", settings)
    return result.returncode, result.stdout


def test_program_copies_the_chosen_file(
    program_arguments: list[str | Path], tmp_path: Path
) -> None:
    code, output = run(program_arguments, size_mb=250)
    assert code == 0, output
    assert (
        "best.gguf is iq4_nl.gguf: the smallest within the budget that is proved as good" in output
    )
    assert (tmp_path / "out/best.gguf").read_text() == "GGUF iq4_nl"
    assert json.loads((tmp_path / "out/best.json").read_text())["chosen"] == "iq4_nl"


def test_budget_that_no_file_meets_is_one_line(
    program_arguments: list[str | Path], tmp_path: Path
) -> None:
    code, output = run(program_arguments, size_mb=200)
    assert code == 2
    assert len(output.splitlines()) == 1 and output.startswith(
        "error: choose: no file is within the budget: q4_0: over budget (size 241.0 MB,"
        " choose.size_mb is 200), not decided"
    )
    assert output.endswith("raise it or add a smaller recipe to quantize\n")
    assert not (tmp_path / "out").exists()
