"""A sweep: which runs it is, that nothing is made twice, what a change makes anew, and the page."""

import csv
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import ROOT, copy_checkout
from pockettune.common.errors import UserError
from pockettune.workflow.sweep import Member, expand, in_order, name_member, read_sweep
from write_leaderboard import group_seeds

OWN = yaml.safe_load((ROOT / "config.yaml").read_text())
SCHEMA = yaml.safe_load((ROOT / "schemas/config.schema.yaml").read_text())
# Of one member, made in less time than its programs take to start.
SHORT: dict[str, dict[str, Any]] = {
    "dataset": {"files": {"train": "data/few.csv"}},
    "train": {"epochs": 1, "eval_every": None, "precision": "fp32"},
    "quantize": {"q8_0": None},
    "evaluate": {"limit": 40, "greedy_rows": None},
}
OVER = {"train.rank": [4], "train.seed": [13, 14]}
RESULTS = "results/x"
PAGE = {"leaderboard": 1, "all": 1}


def expanded(over: dict[str, list[Any]], run: dict[str, Any] | None = None) -> list[Member]:
    return expand(OWN, run or {}, over, SCHEMA, Path("results/x"))


def sweep_file(folder: Path, content: Any) -> Path:
    path = folder / "x.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def run_sweep(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "scripts/run_sweep.py", "runs/sweeps/x.yaml", "--cores", "2", *arguments],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def write_sweep(folder: Path, over: dict[str, Any], **run: Any) -> None:
    """Write the sweep file and its base, in which `run` replaces whole sections."""
    base = yaml.safe_load((folder / "runs/small.yaml").read_text())
    for section, values in SHORT.items():
        base[section] = {**base.get(section, {}), **values}
    base["dataset"]["files"] = {
        split: f"data/{'few' if split == 'train' else split}.csv"
        for split in ("train", "validation", "test")
    }
    lines = (folder / "data/train.csv").read_text().splitlines()[:65]
    (folder / "data/few.csv").write_text("\n".join(lines) + "\n")
    (folder / "runs/short.yaml").write_text(yaml.safe_dump({**base, **run}, allow_unicode=True))
    (folder / "runs/sweeps").mkdir(exist_ok=True)
    text = yaml.safe_dump({"base": "runs/short.yaml", "over": over}, sort_keys=False)
    (folder / "runs/sweeps/x.yaml").write_text(text)


def planned(folder: Path, *targets: str) -> dict[str, int]:
    """Return how often a dry run would run each rule, whatever the member, without the links."""
    result = run_sweep(folder, *targets, "--dry-run")
    assert result.returncode == 0, result.stdout[-3000:]
    if "Nothing to be done" in result.stdout:
        return {}
    table = result.stdout.rsplit("Job stats:", 1)[1].split("\n\n")[0]
    found = re.findall(r"^(\S+) +(\d+)$", table, re.MULTILINE)
    counted: Counter[str] = Counter()
    for name, count in found:
        rule = name.rpartition("__")[2]
        if rule != "total" and not rule.startswith("link_"):
            counted[rule] += int(count)
    return dict(counted)


# --- which runs ---


def test_every_combination_is_a_run_with_results_of_its_own() -> None:
    members = expanded({"train.rank": [4, 8], "train.seed": [13, 14]})
    assert [member.name for member in members] == [
        "rank-4_seed-13", "rank-4_seed-14", "rank-8_seed-13", "rank-8_seed-14",
    ]  # fmt: skip
    last = members[-1].config
    assert (last["train"]["rank"], last["train"]["seed"]) == (8, 14)
    assert last["pathvars"]["results"] == "results/x/rank-8_seed-14"


def test_a_base_of_another_name_takes_no_pins_of_config_yaml() -> None:
    (member,) = expanded({"train.rank": [4]}, {"model": {"name": "somebody/other"}})
    assert (member.config["model"]["revision"], member.config["model"]["sha256"]) == ("main", None)


def test_names_tell_values_apart_that_a_path_cannot_hold() -> None:
    first, second = (name_member({"task.prompt": text + "{text}"}) for text in ("好", "差"))
    assert first != second
    assert re.fullmatch(r"[\w.-]+", first, re.ASCII)
    assert name_member({"quantize.q.type": "Q4_0", "train.learning_rate": 1e-3}) == (
        "type-Q4_0_learning_rate-0.001"
    )
    assert name_member({"train.rank": 4, "other.rank": 4}) == "train.rank-4_other.rank-4"
    assert name_member({"x.a": -1}) != name_member({"x.a": 1})


@pytest.mark.parametrize("value", ["a__b", "a_", "__"])
def test_a_name_ends_where_that_of_a_rule_begins(value: str) -> None:
    name = name_member({"task.system": value, "train.seed": 13})
    assert "__" not in name and name.startswith("system-")
    assert not name_member({"task.system": value}).endswith("_")


def test_a_number_and_a_choice_of_layers_are_members() -> None:
    choice = {"count": 16, "choose": "auto"}
    first, second = expanded({"model.keep_layers": [16, choice]})
    assert first.name == "keep_layers-16"
    assert re.fullmatch(r"keep_layers-count-16-choose-auto-\w{6}", second.name)
    assert second.config["model"]["keep_layers"] == choice


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"over": {"train.rank": [1] * 3, "train.seed": [2] * 67}}, "has 201 members, more than 200"),
        ({"over": {"train.rank": 4}}, "over train.rank is 4, not a list of values"),
        ({"over": {}, "under": 1}, "unknown key under; known: base, over; over names no key"),
        ({"over": {"pathvars.results": ["a"]}}, "gives every member a folder of its own"),
        ({"base": "runs/demo.yaml"}, "over names no key; write over: {train.rank: [4, 8]}"),
        (["train.rank"], "holds no sections"),
    ],
)  # fmt: skip
def test_what_is_no_sweep_is_told_in_one_line(tmp_path: Path, content: Any, told: str) -> None:
    with pytest.raises(UserError) as error:
        read_sweep(sweep_file(tmp_path, content))
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("over", "told"),
    [
        ({"train.rnak": [4, 8]}, "unknown key train.rnak; did you mean rank?"),
        ({"trian.rank": [4]}, "unknown key trian; did you mean train?"),
        ({"train.rank": [0, "x"]}, "train.rank is 'x', not a whole number"),
        ({"train.seed": [13, 14, 13]}, "members of equal settings: seed-13 and seed-13"),
        ({"train.batch_tokens": [512], "train.batch_size": [2, 4]}, "members of equal settings"),
        ({"report.title": ["a", "b"]}, "members of equal settings"),
        ({"model.name": ["a/b", OWN["model"]["name"]]}, "members differ in model.sha256"),
        ({"choose": [{"size_mb": 9}, {"size_mb": -1}]}, "choose.size_mb is -1"),
        ({"task.template_options.a": ["1", 1]}, "members of one name: a-1; their values are spelled alike"),
        ({"train.adapter": ["nowhere"]}, "no such file: train.adapter nowhere"),
        ({"train.teacher": [{"path": "docs"}, {"path": "docs", "weight": 0}]},
         "train.teacher.path docs is no finished run"),
    ],
)  # fmt: skip
def test_what_cannot_be_expanded_is_told_in_one_line(over: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError) as error:
        expanded(over)
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_members_of_earlier_calls_keep_what_they_own(tmp_path: Path) -> None:
    first, second, new = expanded({"train.seed": [14, 15, 13]})
    (tmp_path / first.name).mkdir()
    ordered = in_order([new, second], [first, second], tmp_path)
    assert [(member.name, current) for member, current in ordered] == [
        ("seed-14", False), ("seed-15", True), ("seed-13", True),
    ]  # fmt: skip
    (tmp_path / first.name).rmdir()
    assert [member.name for member, _ in in_order([new, second], [first, second], tmp_path)] == [
        "seed-15", "seed-13",
    ]  # fmt: skip


def test_the_example_is_a_sweep() -> None:
    base, over = read_sweep(ROOT / "runs/sweeps/example.yaml")
    assert base is not None
    assert len(expanded(over, yaml.safe_load((ROOT / base).read_text()))) == 8


# --- the page ---


def row(rank: int, seed: int, accuracy: float, size: int = 100) -> dict[str, Any]:
    return {"changed": {"train.rank": rank, "train.seed": seed}, "file": "q", "score": accuracy,
            "size_bytes": size, "prompt_rate": 10.0}  # fmt: skip


def test_seeds_are_one_group_with_mean_and_deviation() -> None:
    rows = [row(4, 14, 0.8), row(8, 13, 0.9), row(4, 13, 0.6), row(8, 14, 0.9), row(2, 13, 0.9, 50)]
    groups = group_seeds(rows)
    assert [group["settings"]["train.rank"] for group in groups] == [2, 8, 4]
    assert [round(group["mean"], 9) for group in groups] == [0.9, 0.9, 0.7]
    # By hand: deviations of 0.1 from the mean, squared and added 0.02, over n - 1 = 1.
    assert groups[2]["deviation"] == pytest.approx(0.02**0.5)
    assert groups[0]["deviation"] is None
    assert [entry["changed"]["train.seed"] for entry in groups[2]["members"]] == [13, 14]


# --- the whole ---


@pytest.fixture(scope="module")
def finished_sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = copy_checkout(tmp_path_factory.mktemp("sweep") / "checkout")
    write_sweep(folder, OVER)
    counts = planned(folder)
    assert (counts["train"], counts["quantize"], counts["evaluate_variant"]) == (2, 2, 2)
    once = (
        "fetch_dataset",
        "fetch_model",
        "tokenize",
        "check_base",
        "evaluate_base",
        "evaluate_tfidf",
    )
    assert [counts[rule] for rule in once] == [1] * len(once)
    result = run_sweep(folder)
    assert result.returncode == 0, result.stdout[-5000:]
    return folder


def test_every_run_is_complete_and_the_page_compares_them(finished_sweep: Path) -> None:
    results = finished_sweep / "results/x"
    for name in ("rank-4_seed-13", "rank-4_seed-14"):
        assert (results / name / "report.html").is_file()
        assert (results / name / "dataset/train.jsonl").is_file()
    assert (results / "rank-4_seed-14/tokens").is_symlink()
    with (results / "leaderboard.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {(line["run"], line["file"]) for line in rows} == {
        ("rank-4_seed-13", "q4_k_m"), ("rank-4_seed-14", "q4_k_m"),
    }  # fmt: skip
    assert {line["place"] for line in rows} == {"1"}
    page = (results / "leaderboard.html").read_text()
    assert 'href="rank-4_seed-14/report.html"' in page
    assert "<script" not in page
    assert "http" not in page


def test_what_is_added_is_made_and_nothing_else(finished_sweep: Path) -> None:
    assert planned(finished_sweep) == {}
    after_training = {"train": 1, "merge": 1, "convert": 1, "check_parity": 1, "quantize": 1, "compare": 1, "choose": 1,
                      "evaluate_adapter": 1, "evaluate_merged": 1, "evaluate_f16": 1, "evaluate_variant": 1,
                      "measure_speed": 2, "report": 1, **PAGE}  # fmt: skip
    # In front: the one that was first before still owns what all share.
    write_sweep(finished_sweep, {"train.rank": [4], "train.seed": [12, 13, 14]})
    assert planned(finished_sweep) == after_training
    # The owner is taken out of the sweep: the other goes on with what lies in its folder.
    write_sweep(finished_sweep, {"train.rank": [4], "train.seed": [14, 15]})
    assert planned(finished_sweep) == after_training
    write_sweep(finished_sweep, {**OVER, "quantize.q.type": ["Q4_0"]})
    # Members of other names, whose adapters are the same: only the new type is made.
    assert planned(finished_sweep) == {
        "quantize": 2, "evaluate_variant": 2, "measure_speed": 2, "compare": 2, "choose": 2, "report": 2, **PAGE,
    }  # fmt: skip
    write_sweep(finished_sweep, OVER)
    assert planned(finished_sweep) == {}


def test_a_profile_names_rules_as_the_snakefile_does(finished_sweep: Path) -> None:
    write_sweep(finished_sweep, {"train.rank": [4], "train.seed": [12, 13, 14]})
    asked = (
        "--set-resources",
        "train:mem_mb=77",
        "train:slurm_partition=gpu",
        "--set-threads",
        "train=1",
    )
    output = run_sweep(finished_sweep, "--dry-run", *asked).stdout
    (train,) = re.findall(r"^rule \S+__train:\n((?: .*\n)+)", output, re.MULTILINE)
    assert "mem_mb=77" in train and "slurm_partition=gpu" in train
    assert "threads: 2" not in train, "one is not told"
    assert len(re.findall(r"^ +resources: .*mem_mb=77", output, re.MULTILINE)) == 1


def test_what_decides_nothing_of_a_step_does_not_repeat_it(finished_sweep: Path) -> None:
    """Depths and seeds: a base for each depth, one question to the teacher, importance for each adapter."""
    teacher = {**SHORT["train"], "rank": 4, "teacher": {"path": "data/base"}}
    coarse = {name: {"type": name.upper(), "importance": True} for name in ("q4_k_m", "q4_0")}
    over = {"model.keep_layers": [None, 1], "train.seed": [13, 14]}
    write_sweep(finished_sweep, over, train=teacher, quantize={**coarse, "q8_0": None})
    counts = planned(finished_sweep)
    expected = {"fetch_dataset": 0, "tokenize": 0, "shrink_model": 1, "check_base": 1, "score_teacher": 1, "evaluate_base": 1,
                "evaluate_tfidf": 0, "train": 4, "measure_importance": 4, "quantize": 8}  # fmt: skip
    assert {rule: counts.get(rule, 0) for rule in expected} == expected
    write_sweep(finished_sweep, OVER)
    assert planned(finished_sweep) == {}


def test_page_needs_no_file_within_every_runs_budget(finished_sweep: Path) -> None:
    """A run in whose budget choose finds none does not keep the page from the others."""
    write_sweep(finished_sweep, OVER, choose={"size_mb": 0.001})
    page = planned(finished_sweep, f"{RESULTS}/leaderboard.html")
    assert page == {"report": 2, "leaderboard": 1}
    assert planned(finished_sweep) == {**page, "choose": 2, "all": 1}
    write_sweep(finished_sweep, OVER)
    assert planned(finished_sweep) == {}


def test_what_is_removed_is_made_anew_for_those_that_had_links_to_it(finished_sweep: Path) -> None:
    shutil.rmtree(finished_sweep / RESULTS / "rank-4_seed-13")
    write_sweep(finished_sweep, {"train.rank": [4], "train.seed": [14]})
    dataset = finished_sweep / RESULTS / "rank-4_seed-14/dataset"
    assert (dataset / "audit.json").is_symlink()
    result = run_sweep(finished_sweep, f"{RESULTS}/rank-4_seed-14/dataset/audit.json")
    assert result.returncode == 0, result.stdout[-5000:]
    assert (dataset / "audit.json").is_file() and not (dataset / "audit.json").is_symlink()


@pytest.mark.parametrize(
    ("over", "arguments", "told"),
    [
        ({"train.rnak": [4]}, (), "unknown key train.rnak"),
        (OVER, ("--config", "a=1"), "--config cannot be given"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(
    tmp_path: Path, over: dict[str, Any], arguments: tuple[str, ...], told: str
) -> None:
    sweep = sweep_file(tmp_path, {"over": over})
    result = subprocess.run(
        [sys.executable, "scripts/run_sweep.py", str(sweep), *arguments],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert result.returncode == 2
    assert told in result.stdout
    assert len(result.stdout.strip().splitlines()) == 1
    assert not (ROOT / "results/x").exists()
