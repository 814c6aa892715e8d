"""A task of text, added by one file and one line, through the whole workflow."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from conftest import copy_checkout, run_snakemake
from generated import SUBJECTS
from small_run import RUN, reviews
from test_workflow import planned

TEXT = ("--configfile", "runs/tags.yaml")
LINE = '    "classification": Classification,'


def tags_of(text: str) -> list[str]:
    """Return which of praise and blame stand in a review."""
    praised = any(word in text for _, words, _ in SUBJECTS.values() for word in words)
    blamed = any(word in text for _, _, words in SUBJECTS.values() for word in words)
    return ["甲"] * praised + ["乙"] * blamed


def write_tags(folder: Path) -> None:
    """Give a checkout the task and a run of it: whether a review praises, blames, or both."""
    shutil.copyfile(
        Path(__file__).with_name("tags.py"), folder / "scripts/pockettune/tasks/tags.py"
    )
    tasks = folder / "scripts/pockettune/tasks/__init__.py"
    text = tasks.read_text().replace(LINE, LINE + '\n    "tags": Tags,')
    assert '"tags": Tags' in text
    tasks.write_text(
        text.replace(
            "\nif TYPE_CHECKING", "from pockettune.tasks.tags import Tags\n\nif TYPE_CHECKING", 1
        )
    )
    files = {}
    for seed, (split, rows) in enumerate({"train": 500, "validation": 30, "test": 80}.items()):
        texts, _ = reviews(rows, seed)
        tags = [" ".join(tags_of(text)) for text in texts]
        files[split] = f"data/tags-{split}.csv"
        pd.DataFrame({"text": texts, "label": tags}).to_csv(folder / files[split], index=False)
    run: dict[str, Any] = {
        **RUN,
        "pathvars": {"results": "results/tags"},
        "dataset": {"files": files},
        "task": {"type": "tags", "system": "", "prompt": "{text}\n标签："},
        "train": {**RUN["train"], "epochs": 3},
        "quantize": {"q8_0": {"type": "Q8_0"}, "q4_k_m": {"type": "Q4_K_M"}},
        "evaluate": {"greedy_rows": 20, "pytorch_limit": 20},
        "card": {"license": "mit", "template": "task"},
        "choose": None,
    }
    (folder / "runs/tags.yaml").write_text(yaml.safe_dump(run, allow_unicode=True, sort_keys=False))


@pytest.fixture(scope="module")
def text_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = copy_checkout(tmp_path_factory.mktemp("text") / "checkout")
    write_tags(folder)
    result = run_snakemake(folder, *TEXT)
    assert result.returncode == 0, result.stdout[-5000:]
    yield folder


def test_task_of_one_file_goes_the_whole_way(text_run: Path) -> None:
    results = text_run / "results/tags"
    stages = json.loads((results / "metrics.json").read_text())["stages"]
    assert list(stages) == ["base", "adapter", "merged", "f16", "q4_k_m", "q8_0"]
    assert stages["base"]["n"] == 20 and stages["f16"]["n"] == 80
    assert stages["base"]["score"] < 0.88 < 0.9 < stages["f16"]["score"]
    for name in ("adapter", "merged", "f16", "q8_0"):
        assert (
            stages[name]["reading"]["token_accuracy"] > stages["base"]["reading"]["token_accuracy"]
        )
        assert stages[name]["generated"]["ended"] == stages[name]["n"], name
    assert (
        stages["q8_0"]["reading"]["kl_vocabulary"]["mean"]
        < stages["q4_k_m"]["reading"]["kl_vocabulary"]["mean"]
    )
    assert stages["merged"]["reading"]["kl_vocabulary"]["mean"] < 1e-3
    assert stages["f16"]["constrained"]["understood"] == stages["f16"]["constrained"]["rows"] == 20
    assert stages["q8_0"]["parting"]["rows"] == 80
    assert stages["q4_k_m"]["verdict"]["claim"] in ("as good", "worse", "undecided")
    page = (results / "report.html").read_text(encoding="utf-8")
    assert "micro F1" in page and page.count('<div class="sample">') == 12
    assert set(json.loads((results / "samples.json").read_text())[0]["answers"]) == set(stages)


def reruns(folder: Path, **changed: dict[str, Any]) -> set[str]:
    """Return the rules that a dry run plans when a run file has these values, then take them back."""
    path = folder / "runs/tags.yaml"
    before = path.read_text()
    run = yaml.safe_load(before)
    for section, values in changed.items():
        run[section] = {**run.get(section, {}), **values}
    path.write_text(yaml.safe_dump(run, allow_unicode=True, sort_keys=False))
    try:
        return set(planned(folder, *TEXT)) - {"all"}
    finally:
        path.write_text(before)


def test_a_change_reruns_what_depends_on_it(text_run: Path) -> None:
    scored = {
        "evaluate_adapter",
        "evaluate_merged",
        "evaluate_f16",
        "evaluate_variant",
        "compare",
        "report",
    }
    assert reruns(text_run) == set()
    assert reruns(text_run, task={"labels": {"0": "x", "1": "y"}}) == set()
    assert reruns(text_run, train={"metric": "macro_f1"}) == set()
    assert reruns(text_run, evaluate={"margin": 0.01}) == {"compare", "report"}
    assert reruns(text_run, evaluate={"greedy_rows": 10}) == {"evaluate_base", *scored}
    for changed in ({"prompt": "{text}\n"}, {"max_answer_tokens": 5}):
        anew = reruns(text_run, task=changed)
        assert {"tokenize", "train", "convert", "evaluate_base", *scored} <= anew
        assert "fetch_dataset" not in anew
    assert {"fetch_dataset", "tokenize"} <= reruns(text_run, task={"no_answer": "没有"})


def test_keys_that_go_by_labels_are_refused(text_run: Path) -> None:
    path = text_run / "runs/tags.yaml"
    before = path.read_text()
    run = yaml.safe_load(before)
    run["train"]["class_weights"] = "balanced"
    run["model"]["keep_layers"] = {"count": 1, "choose": "auto"}
    path.write_text(yaml.safe_dump(run, allow_unicode=True, sort_keys=False))
    result = run_snakemake(text_run, *TEXT, "--dry-run")
    path.write_text(before)
    assert result.returncode == 2
    assert (
        "train.class_weights: balanced, model.keep_layers.choose: auto: made for labels"
        in result.stdout
    )


@pytest.mark.parametrize("name", ["entities", "answer", "chat"])
def test_run_file_of_a_task_can_be_planned(name: str, text_run: Path) -> None:
    run = yaml.safe_load((text_run / f"runs/{name}.yaml").read_text())
    for path in run["dataset"]["files"].values():
        (text_run / path).parent.mkdir(parents=True, exist_ok=True)
        (text_run / path).write_text("{}\n")
    jobs = planned(text_run, "--configfile", f"runs/{name}.yaml")
    assert jobs["train"] == jobs["evaluate_f16"] == 1 and "evaluate_tfidf" not in jobs
