"""The small run, made once from an empty checkout, and what a change to it would rerun."""

import html
import json
import os
import re
import shlex
import shutil
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from conftest import SMALL, run_snakemake
from pockettune.common.words import Words, english
from small_run import copy_as_teacher

AFTER_EVALUATION = {"compare": 1, "choose": 1, "report": 1, "all": 1}
COMPARED_WITH_F16 = {"evaluate_f16": 1, "evaluate_adapter": 1, "evaluate_merged": 1, "evaluate_variant": 2}  # fmt: skip
EVALUATION = {"evaluate_tfidf": 1, "evaluate_base": 1, **COMPARED_WITH_F16, **AFTER_EVALUATION}
ONE_VARIANT = {"quantize": 1, "measure_speed": 1, "evaluate_variant": 1, **AFTER_EVALUATION}
FROM_CONVERT = {"convert": 1, "check_parity": 1, "quantize": 2, "measure_speed": 3, **COMPARED_WITH_F16, **AFTER_EVALUATION}  # fmt: skip
FROM_MERGE = {"merge": 1, **FROM_CONVERT}
FROM_TRAIN = {"train": 1, **FROM_MERGE}
FROM_TOKENIZE = {
    "tokenize": 1,
    "check_base": 1,
    "evaluate_base": 1,
    "evaluate_tfidf": 1,
    **FROM_TRAIN,
}
FROM_DATASET = {"fetch_dataset": 1, **FROM_TOKENIZE}
FROM_MODEL = {"fetch_model": 1, **FROM_TOKENIZE}


def planned(folder: Path, *arguments: str) -> dict[str, int]:
    """Return the jobs that a dry run plans, by rule."""
    result = run_snakemake(folder, "--dry-run", *(arguments or SMALL))
    assert result.returncode == 0, result.stdout[-3000:]
    if "Nothing to be done" in result.stdout:
        return {}
    table = result.stdout.rsplit("Job stats:", 1)[1].split("\n\n")[0]
    jobs = {rule: int(count) for rule, count in re.findall(r"^(\w+) +(\d+)$", table, re.MULTILINE)}
    assert jobs.pop("total") == sum(jobs.values())
    return jobs


@pytest.fixture
def checkout(finished_run: Path) -> Iterator[Path]:
    """The finished run, its text files put back afterwards."""
    names = ["config.yaml", "runs/small.yaml", "data/test.csv", "data/base/generation_config.json",
             "report/zh.json"]  # fmt: skip
    paths = [finished_run / n for n in names] + sorted((finished_run / "scripts").rglob("*.py"))
    before = {path: path.read_bytes() for path in paths}
    yield finished_run
    for path, content in before.items():
        if path.read_bytes() != content:
            path.write_bytes(content)
    (finished_run / "data/more.txt").unlink(missing_ok=True)  # of a test with a teacher
    shutil.rmtree(finished_run / ".packages", ignore_errors=True)  # of one with another format


# --- what a run makes ---


def test_run_learns_and_keeps_what_it_learned(finished_run: Path) -> None:
    results = finished_run / "results/small"
    stages = json.loads((results / "metrics.json").read_text())["stages"]
    assert list(stages) == ["tfidf", "base", "adapter", "merged", "f16", "q4_k_m", "q8_0"]
    assert 0.35 < stages["base"]["accuracy"] < 0.65, "the base must not know the task"
    for stage in ("adapter", "merged", "f16", "q4_k_m", "q8_0"):
        assert stages[stage]["accuracy"] > 0.9, stage
    assert stages["f16"]["prompts_tokenized_otherwise"] == 0
    assert stages["q4_k_m"]["stored"]["tensor_types"]["Q4_K"] > 0, "K-quants must be used"
    assert stages["q4_k_m"]["size_bytes"] == (results / "q4_k_m.gguf").stat().st_size
    assert stages["merged"]["against_before"]["flips"] == 0, "merging changes no answer"
    assert stages["q4_k_m"]["against_tfidf"]["difference"] > 0
    assert 0 < stages["q8_0"]["kl_vocabulary"]["mean"] < stages["q4_k_m"]["kl_vocabulary"]["mean"]
    checks = json.loads((results / "parity.json").read_text())["checks"]
    assert len(checks) == 8 and all(check["passed"] for check in checks)
    assert all(s["off_labels"]["mass"] < 0.5 for n, s in stages.items() if n in ("f16", "q8_0"))
    assert [name for name in stages if "greedy" in stages[name]] == ["f16", "q4_k_m", "q8_0"]
    assert stages["f16"]["greedy"]["right"] == stages["f16"]["greedy"]["scored_right"]
    assert {stages[name]["verdict"]["claim"] for name in ("base", "tfidf")} == {"worse"}
    assert "q8_0 against f16: " in (results / "logs/compare.log").read_text()
    table = pd.read_csv(results / "metrics.csv").set_index("stage")
    assert table.loc["q4_k_m", "unseen_accuracy"] == stages["q4_k_m"]["unseen"]["accuracy"]


def test_f16_file_answers_as_the_merged_model(finished_run: Path) -> None:
    folder = finished_run / "results/small/predictions"
    merged, f16, q4_k_m = (pd.read_parquet(folder / f"{s}.parquet") for s in ("merged", "f16", "q4_k_m"))  # fmt: skip
    columns = [c for c in merged.columns if c.startswith("log_probability_")]
    assert (merged["prediction"] == f16["prediction"]).all()
    assert np.abs(merged[columns].to_numpy() - f16[columns].to_numpy()).max() < 0.05
    changed = np.abs(q4_k_m[columns].to_numpy() - f16[columns].to_numpy()).max()
    assert changed > 0.001, "a quantized file that computes the same was not quantized"


def test_trimmed_vocabulary_answers_alike(finished_run: Path, tmp_path: Path) -> None:
    """From the finished run's merged model on, in a copy of it."""
    folder = tmp_path / "copy"
    shutil.copytree(finished_run, folder, ignore=shutil.ignore_patterns("downloads"))
    edit_run("vocabulary", keep="task")(folder)
    targets = [
        f"results/small/{name}"
        for name in ("metrics/trimmed.json", "metrics/merged.json", "parity.json")
    ]
    result = run_snakemake(folder, *SMALL, "--", *targets)
    assert result.returncode == 0, result.stdout[-3000:]
    results = folder / "results/small"
    told = json.loads((results / "vocabulary.json").read_text())
    assert len(told["kept"]) == 512 and told["of"] == 640
    assert told["tokens_a_text"]["test"]["before"] == told["tokens_a_text"]["test"]["after"]
    merged, trimmed = (
        pd.read_parquet(results / f"predictions/{s}.parquet") for s in ("merged", "trimmed")
    )
    assert (merged["prediction"] == trimmed["prediction"]).all()
    ours, theirs = (t.filter(like="log_probability_").to_numpy() for t in (merged, trimmed))
    # A softmax over fewer words adds the same to each label's log probability.
    assert np.abs((ours - theirs) - (ours - theirs)[:, :1]).max() < 1e-4
    metrics = {
        s: json.loads((results / f"metrics/{s}.json").read_text()) for s in ("merged", "trimmed")
    }
    assert max(entry["kl_vocabulary"]["mean"] for entry in metrics.values()) < 1e-4
    before = finished_run / "results/small/f16.gguf"
    assert before.stat().st_size - (results / "f16.gguf").stat().st_size > 128 * 256 * 2
    checks = json.loads((results / "parity.json").read_text())["checks"]
    assert "the base's 640" in next(c["detail"] for c in checks if c["name"] == "vocabulary")


def test_report_is_one_file_and_loads_nothing(finished_run: Path) -> None:
    page = (finished_run / "results/small/report.html").read_text(encoding="utf-8")
    assert "Small run" in re.search(r"<h1>(.*?)</h1>", page)[1]  # type: ignore[index]
    assert page.count("<svg") == 3
    assert "<script" not in page
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#)""", page)
    assert not re.search(r"""url\((?!#)""", page)


def test_best_file_is_a_copy_of_the_chosen_one(finished_run: Path) -> None:
    results = finished_run / "results/small"
    choice = json.loads((results / "best.json").read_text())
    assert (results / "best.gguf").read_bytes() == (
        results / f"{choice['chosen']}.gguf"
    ).read_bytes()
    for page in ("report.html", "card.md"):
        text = html.unescape((results / page).read_text(encoding="utf-8"))
        assert f"best.gguf is {choice['chosen']}.gguf: {choice['why']}" in text, page


def test_report_tells_of_files_where_none_is_chosen(finished_run: Path) -> None:
    from write_report import render

    flips = finished_run / "results/small/flips.json"
    content = gather_report(finished_run, flips)  # with config.yaml's choose: null
    templates = [finished_run / f"report/{name}.j2" for name in ("report.html", "card.md")]
    page, card = (render(template, content) for template in templates)
    assert "<h2>Which file?</h2>" in page and "beaten by none" in page
    assert "best.gguf" not in page + card and "(chosen)" not in page
    assert "That is the smallest file" in page and "the smallest; none was chosen" in page
    small = {"size_mb": 0.001, "memory_mb": None, "margin": None}
    content = gather_report(finished_run, flips, choose=small)
    page, card = (render(template, content) for template in templates)
    assert "There is no best.gguf: no file is within the budget: " in page
    assert "the smallest; none is within the budget" in page
    assert "best.gguf" not in card


def test_first_screen_answers_before_anything_else(finished_run: Path) -> None:
    results = finished_run / "results/small"
    page = html.unescape((results / "report.html").read_text(encoding="utf-8"))
    choice = json.loads((results / "best.json").read_text())
    stage = json.loads((results / "metrics.json").read_text())["stages"][choice["chosen"]]
    (first,) = re.findall(r'<dl class="answers">(.*?)</dl>', page, re.DOTALL)
    assert page.index("<dl") < page.index("<p") < page.index("<table")
    found = re.findall(r"<b>(.*?)</b>", first)
    speed = json.loads((results / f"speed/{choice['chosen']}.json").read_text())
    assert found[:4] == [
        f"{choice['chosen']}.gguf",
        f"{stage['size_bytes'] / 1e6:,.1f} MB",
        f"{100 * stage['accuracy']:.1f} %",
        f"{speed['prompt']['mean']:,.0f} tokens/s",
    ]
    claim = choice["files"][choice["chosen"]]["verdict"]["claim"]
    assert found[4] == {"as good": "proved as good", "undecided": "not decided", "worse": "proved worse"}[claim]  # fmt: skip
    assert "chosen: the smallest" in first if choice["proved"] else "chosen: the closest" in first
    assert "<code>make app CONFIG=FILE</code>" in first


def test_report_and_card_in_chinese_say_the_same(finished_run: Path) -> None:
    from pockettune.common.words import read_words
    from write_report import render

    table = finished_run / "report/zh.json"
    report = {"title": "小试", "language": "zh"}
    flips = finished_run / "results/small/flips.json"
    sections: dict[str, Any] = {
        "choose": {"size_mb": 100, "memory_mb": 100, "margin": None},
        "report": report,
    }
    chinese = gather_report(finished_run, flips, read_words(table), **sections)
    english = gather_report(finished_run, flips, **sections)
    sentences = [s for s in json.loads(table.read_text()) if len(s) > 30]
    for name in ("report.html", "card.md"):
        template = finished_run / f"report/{name}.j2"
        page = html.unescape(render(template, chinese, read_words(table)))
        assert [s for s in sentences if s in page] == [], "English amid the Chinese"
        told = (page, html.unescape(render(template, english)))
        numbers = [sorted(re.findall(r"\d+\.\d+", re.sub(r"<svg.*?</svg>", "", t, flags=re.DOTALL))) for t in told]  # fmt: skip
        assert numbers[0] == numbers[1] and len(numbers[0]) > 30, name
    page = render(finished_run / "report/report.html.j2", chinese, read_words(table))
    assert '<html lang="zh">' in page and "哪个文件" in page and "与 16 位文件相比：" in page
    assert ">准确率，%</text>" in page, (
        "text of the plots is text, for which the browser has the fonts"
    )


def test_snakemakes_own_report(finished_run: Path, tmp_path: Path) -> None:
    page = tmp_path / "snakemake.html"
    result = run_snakemake(finished_run, *SMALL, "--report", str(page))
    assert result.returncode == 0, result.stdout[-2000:]
    text = page.read_text(encoding="utf-8")
    assert "metrics.csv" in text and "One row a stage" in text, "captions are in it"


def gather_report(
    finished_run: Path, flips: Path, words: Words = english, **sections: Any
) -> dict[str, Any]:
    """Return what the run's page and card are rendered from, `sections` laid over config.yaml."""
    from write_report import gather

    results = finished_run / "results/small"
    return gather(
        Namespace(
            settings=yaml.safe_load((finished_run / "config.yaml").read_text()) | sections,
            metrics=results / "metrics.json",
            flips=flips,
            parity=results / "parity.json",
            format_parity=[],
            speed=sorted((results / "speed").glob("*.json")),
            audit=results / "dataset/audit.json",
            tokens=results / "tokens",
            adapter=results / "adapter",
            samples=None,
            vocabulary=None,
            base=next((finished_run / "resources/models").glob("base@*/")),
            benchmarks=sorted((results / "benchmarks").glob("*.tsv")),
        ),
        words,
    )


def test_text_of_a_review_cannot_become_part_of_the_page(
    finished_run: Path, tmp_path: Path
) -> None:
    from write_report import render

    evil = "<script>alert(1)</script>"
    flip = {"id": "test-1", "text": evil, "reference": "好", "f16": "好", "now": "差"}
    (tmp_path / "flips.json").write_text(json.dumps({"q8_0": [flip]}))
    content = gather_report(finished_run, tmp_path / "flips.json")
    page = render(finished_run / "report/report.html.j2", content)
    assert evil not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


def test_temperature_is_told_where_one_was_fitted(finished_run: Path) -> None:
    from write_report import render

    content = gather_report(finished_run, finished_run / "results/small/flips.json")
    for stage in content["stages"].values():
        stage.pop("at_temperature", None)
    templates = [finished_run / "report" / name for name in ("report.html.j2", "card.md.j2")]
    for template in templates:
        assert "fitted on" not in render(template, content)
    content["training"] |= {
        "temperature": {"value": 1.5, "rows": 90, "loss_before": 0.4, "loss_after": 0.3,
                        "calibration_error_before": 0.05, "calibration_error_after": 0.02},
        "coverage": [{"threshold": 0.9, "coverage": 0.6, "accuracy": None}],
    }  # fmt: skip
    content["stages"]["f16"]["at_temperature"] = {
        "temperature": 1.5, "calibration_error": 0.031,
        "coverage": [{"threshold": 0.9, "coverage": 0.7, "accuracy": 0.987}],
    }  # fmt: skip
    page, card = (render(template, content) for template in templates)
    assert "5.0 % to 2.0 %" in page and "<td>60.0 %, –</td>" in page
    assert "<td>70.0 %, 98.7 %</td>" in page
    assert "divided by 1.5, fitted on validation: f16 3.1 %" in card


def test_report_and_card_tell_what_was_left_out_and_seen_elsewhere(finished_run: Path) -> None:
    from write_report import render

    content = gather_report(finished_run, finished_run / "results/small/flips.json")
    templates = [finished_run / f"report/{name}.j2" for name in ("report.html", "card.md")]
    page, card = (render(template, content) for template in templates)
    assert "left out" not in page and "stand in validation" not in card
    splits = content["audit"]["splits"]
    splits["train"]["bad_rows"] = {"count": 4, "first": [f"line {i}: no label" for i in range(4)]}
    splits["test"] |= {"seen_in_validation": 7, "texts_with_line_breaks": 11}
    page, card = (render(template, content) for template in templates)
    assert "4 rows of train were left out (dataset.bad_rows): line 0: no label; " in page
    assert "<td>7</td><td>11</td>" in page
    assert "7 of the test rows stand in validation" in card
    assert "4 unusable rows of train were left out" in card


def test_teacher_is_told_by_its_name_alone(finished_run: Path) -> None:
    from write_report import render

    folder = finished_run / "results/small"
    content = gather_report(finished_run, folder / "flips.json")
    templates = [finished_run / f"report/{name}.j2" for name in ("report.html", "card.md")]
    assert not any("its teacher" in render(template, content) for template in templates)
    told = {"path": "/home/li/runs/large", "weight": 0.7, "temperature": 2.0, "unlabelled_texts": "/data/t.txt"}  # fmt: skip
    train = {**content["config"]["train"], "teacher": told}
    content = gather_report(finished_run, folder / "flips.json", train=train)
    assert content["config"]["train"]["teacher"]["path"] == "large"
    content["training"] |= {
        "teacher": content["config"]["train"]["teacher"],
        "unlabelled_examples": 12,
    }
    for template in templates:
        page = render(template, content)
        assert "/home/li" not in page and "its teacher, large, finds" in page.replace("\n", " "), (
            template
        )
        assert "of 12 texts without a label too" in page


def test_report_and_card_tell_how_layers_were_chosen(finished_run: Path) -> None:
    from write_report import render

    content = gather_report(finished_run, finished_run / "results/small/flips.json")
    content["source"] |= {"layers": 4, "kept_layers": [0, 2, 3]}
    templates = [finished_run / f"report/{name}.j2" for name in ("report.html", "card.md")]
    for template in templates:
        assert "chosen on" not in render(template, content)
    label_kl = {"tail": 0.25, "greedy": 0.0625}
    content["source"]["layers_choice"] = {"chosen": "greedy", "rows": 64, "label_kl": label_kl}
    told = "; greedy chosen on 64 rows of validation by label KL against the whole base: tail 0.2500, greedy 0.0625"
    page, card = (render(template, content) for template in templates)
    assert f"cut before the training: 0, 2, 3{told}</td>" in page
    assert f"(0, 2, 3), cut before the training{told}\n- Adapter: " in card


def test_model_card_names_licence_language_and_numbers(finished_run: Path) -> None:
    card = (finished_run / "results/small/card.md").read_text(encoding="utf-8")
    header = yaml.safe_load(card.split("---")[1])
    assert header["license"] == "mit" and header["language"] == ["zh"]
    stages = json.loads((finished_run / "results/small/metrics.json").read_text())["stages"]
    assert f"{100 * stages['q4_k_m']['accuracy']:.1f} %" in card
    assert "{text}" in card and "正面" in card
    assert "{text}" in card and "<|im_start|>assistant\\n" in card, (
        "the prompt as the model sees it"
    )
    assert "llama-server --" not in card and "the day" not in card
    assert "Send the text as the user's message and nothing else" in card


def test_report_and_card_of_an_adapter_trained_elsewhere(finished_run: Path) -> None:
    from write_report import render

    content = gather_report(finished_run, finished_run / "results/small/flips.json")
    # As import_adapter writes it, which knows nothing of the training.
    content["training"] = {"imported_from": "theirs", "base": None, "trainable_parameters": 12_345}
    page, card = (
        render(finished_run / f"report/{name}.j2", content) for name in ("report.html", "card.md")
    )
    assert "it comes from theirs" in page
    assert "trained elsewhere, 12,345 parameters" in card and "Teacher" not in card


def test_model_card_says_how_a_runtime_asks_alike(finished_run: Path) -> None:
    from write_report import render

    content = gather_report(finished_run, finished_run / "results/small/flips.json")
    options = {"enable_thinking": False, "date_string": "it's 26 Jul 2024"}
    content["chat"] |= {"options": options, "reads_clock": True}
    assert "llama-server --" not in render(finished_run / "report/card.md.j2", content), (
        "the task's template has them written in"
    )
    content["config"]["card"]["template"] = "base"
    card = render(finished_run / "report/card.md.j2", content)
    command = next(line for line in card.splitlines() if line.startswith("llama-server"))
    assert json.loads(shlex.split(command)[2]) == options
    assert "which no option changes" in card and content["chat"]["day"] in card


# --- the promise: a change reruns what depends on it and nothing else ---


def edit_config(change: Callable[[dict[str, Any]], object], file: str = "config.yaml"):  # type: ignore[no-untyped-def]
    def edit(folder: Path) -> None:
        config = yaml.safe_load((folder / file).read_text())
        change(config)
        (folder / file).write_text(yaml.safe_dump(config, allow_unicode=True, sort_keys=False))

    return edit


def edit_run(section: str, **values: Any):  # type: ignore[no-untyped-def]
    return edit_config(lambda c: c.setdefault(section, {}).update(values), "runs/small.yaml")


def append(file: str, text: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        with (folder / file).open("a") as stream:
            stream.write(text)

    return edit


def touch_everything(folder: Path) -> None:
    """Give every file and folder a new time, the last first: as a copy to another disk may."""
    paths = [path for path in sorted(folder.rglob("*")) if ".snakemake" not in path.parts]
    for second, path in enumerate(reversed(paths), start=int(time.time()) - len(paths)):
        os.utime(path, times=(second, second))


def reorder(folder: Path) -> None:
    def turned(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: turned(value[key]) for key in reversed(value)}
        return value

    for file in ("config.yaml", "runs/small.yaml"):
        config = turned(yaml.safe_load((folder / file).read_text()))
        (folder / file).write_text(yaml.safe_dump(config, sort_keys=False, width=40))


def swap_rank_and_alpha(config: dict[str, Any]) -> None:
    train = config["train"]
    train["rank"], train["alpha"] = train["alpha"], train["rank"]


def bring_adapter(folder: Path) -> None:
    """Use the run's own adapter as if it came from another trainer."""
    target = folder / "my adapter"
    shutil.copytree(folder / "results/small/adapter", target, dirs_exist_ok=True)
    edit_run("train", adapter="my adapter")(folder)


def bring_teacher(folder: Path) -> None:
    """Learn from a copy of the run's own model as if another run had made it."""
    edit_run("train", teacher={"path": copy_as_teacher(folder)})(folder)


def add_format(name: str, kind: str) -> Callable[[Path], None]:
    """Ask for a file of another format, as if its packages were here: nothing is run."""

    def add(folder: Path) -> None:
        (folder / ".packages" / name).mkdir(parents=True, exist_ok=True)
        (folder / ".packages" / name / "installed").touch()
        edit_run("quantize", small={"format": name, "type": kind})(folder)

    return add


REBUILDS: dict[str, tuple[Callable[[Path], object], dict[str, int]]] = {
    "nothing": (lambda folder: None, {}),
    "touching every file": (touch_everything, {}),
    "reordering and reformatting the config": (reorder, {}),
    "hub.sources": (edit_run("hub", sources=["modelscope", "https://hf-mirror.com"]), {}),
    "hub.send_token_to": (edit_run("hub", send_token_to=["hub.example.org"]), {}),
    "dataset.subset, idle beside files": (edit_run("dataset", subset="x"), {}),
    "model.keep_layers": (
        edit_run("model", keep_layers=1),
        {"shrink_model": 1, "check_base": 1, "evaluate_base": 1, **FROM_TRAIN},
    ),
    "model.keep_layers, chosen": (
        edit_run("model", keep_layers={"count": 1, "choose": "auto"}),
        {"measure_layers": 1, "shrink_model": 1, "check_base": 1, "evaluate_base": 1, **FROM_TRAIN},
    ),
    "model.keep_layers, a list": (edit_run("model", keep_layers=[1]),
                                  {"shrink_model": 1, "check_base": 1, "evaluate_base": 1, **FROM_TRAIN}),
    "choose.memory_mb": (edit_run("choose", memory_mb=4000), {"choose": 1, "report": 1, "all": 1}),
    "vocabulary.keep": (
        edit_run("vocabulary", keep="task"),
        {"check_vocabulary": 1, "trim_vocabulary": 1, "tokenize_trimmed": 1, "evaluate_trimmed": 1, **FROM_CONVERT},
    ),
    "vocabulary.scripts, idle beside full": (edit_run("vocabulary", scripts=["han"]), {}),
    "model.name, idle beside a path": (edit_run("model", name="a/b"), {}),
    "numbers spelled another way": (edit_run("train", alpha=16.0, batch_size=32.0, epochs=2.0), {}),
    "a default spelled out": (edit_run("quantize", q8_0={"type": "Q8_0", "pure": False, "importance": False, "tensors": {}}), {}),
    "report.title": (edit_run("report", title="x"), {"report": 1, "all": 1}),
    "report.language": (edit_run("report", language="zh"), {"report": 1, "all": 1}),
    "a Chinese sentence, beside an English report": (append("report/zh.json", " "), {}),
    "evaluate.limit": (edit_run("evaluate", limit=50), EVALUATION),
    "evaluate.pytorch_limit": (edit_run("evaluate", pytorch_limit=50),
                               {"evaluate_base": 1, "evaluate_adapter": 1, "evaluate_merged": 1, **AFTER_EVALUATION}),
    "evaluate.greedy_rows": (edit_run("evaluate", greedy_rows=0), {**COMPARED_WITH_F16, **AFTER_EVALUATION}),
    "evaluate.margin": (edit_run("evaluate", margin=0.01), AFTER_EVALUATION),
    "choose.size_mb": (edit_run("choose", size_mb=200), {"choose": 1, "report": 1, "all": 1}),
    "choose.margin": (edit_run("choose", margin=0.05), {"choose": 1, "report": 1, "all": 1}),
    "choose, given up": (edit_config(lambda c: c.pop("choose"), "runs/small.yaml"), {"report": 1, "all": 1}),
    "another variant": (edit_run("quantize", q4_0={"type": "Q4_0"}), ONE_VARIANT),
    "a variant of format onnx": (
        add_format("onnx", "int4"),
        {"export_onnx_float": 1, "check_parity_onnx": 1, "export_onnx": 1, "evaluate_onnx_float": 1, "evaluate_onnx": 1,
         "measure_speed_onnx": 1, **AFTER_EVALUATION},
    ),
    "a variant of format litert": (
        add_format("litert", "dynamic_wi8_afp32"),
        {"export_litert": 1, "check_parity_litert": 1, "quantize_litert": 1, "evaluate_litert_float": 1, "evaluate_litert": 1,
         "measure_speed_litert": 1, **AFTER_EVALUATION},
    ),
    "another variant, with importance": (edit_run("quantize", q4_0={"type": "Q4_0", "importance": True}),
                                         {"measure_importance": 1, **ONE_VARIANT}),
    "importance of one variant": (edit_run("quantize", q8_0={"type": "Q4_0", "importance": True}),
                                  {"measure_importance": 1, **ONE_VARIANT}),
    "a type by pattern": (edit_run("quantize", q8_0={"type": "Q8_0", "tensors": {"ffn_up": "Q6_K"}}), ONE_VARIANT),
    "one variant's recipe": (edit_run("quantize", q8_0={"type": "Q6_K"}), ONE_VARIANT),
    "pure of one variant": (edit_run("quantize", q4_k_m={"type": "Q4_K_M", "pure": True}), ONE_VARIANT),
    "card.license": (edit_run("card", license="cc-by-4.0"), FROM_CONVERT),
    "card.template": (edit_run("card", template="base"), FROM_CONVERT),
    "bundle.file": (edit_run("bundle", file="q8_0"), {}),
    "train.learning_rate": (edit_run("train", learning_rate=1e-3), FROM_TRAIN),
    "train.adapter": (bring_adapter, {"check_base": 1, "import_adapter": 1, **FROM_MERGE}),
    "train.teacher": (bring_teacher, {"score_teacher": 1, **FROM_TRAIN}),
    "train.teacher without weight": (edit_run("train", teacher={"path": "data/base", "weight": 0}), {}),
    "two values of train swapped": (edit_config(swap_rank_and_alpha), {"check_base": 1, **FROM_TRAIN}),
    "tokenize.max_length": (edit_run("tokenize", max_length=64), FROM_TOKENIZE),
    "task.prompt": (edit_run("task", prompt="{text}"), FROM_TOKENIZE),
    "task.template_options": (edit_run("task", template_options={"a": True}), FROM_TOKENIZE),
    "dataset.label_column": (edit_run("dataset", label_column="x"), FROM_DATASET),
    "a row of the dataset": (append("data/test.csv", "很好,1\n"), FROM_DATASET),
    "generation_config.json of a local model": (append("data/base/generation_config.json", "\n"), FROM_MODEL),
    "a line of merge_adapter.py": (append("scripts/merge_adapter.py", "# x\n"), FROM_MERGE),
    "a line of write_report.py": (append("scripts/write_report.py", "# x\n"), {"report": 1, "all": 1}),
    "a line of a module, gguf/files.py": (append("scripts/pockettune/gguf/files.py", "# x\n"),
        {"evaluate_base": 1, **FROM_CONVERT}),  # PyTorch's rungs compare text with F16 in llama.cpp
    "a line of a module's module, classification.py":
        (append("scripts/pockettune/tasks/classification.py", "# x\n"), FROM_DATASET),
}  # fmt: skip


@pytest.mark.parametrize("change", REBUILDS)
def test_change_reruns_what_depends_on_it(change: str, checkout: Path) -> None:
    edit, expected = REBUILDS[change]
    edit(checkout)
    assert planned(checkout) == expected


def test_teacher_is_asked_once(checkout: Path) -> None:
    """What it says is kept while its temperature or weight changes, and asked anew for with its files."""
    edit_config(lambda c: c.update(pathvars={"results": "results/taught"}), "runs/small.yaml")(
        checkout
    )
    (checkout / "data/more.txt").write_text("房间很好，早餐也好\n服务很慢\n", encoding="utf-8")
    bring_teacher(checkout)
    teacher: dict[str, Any] = {"path": "results/large", "unlabelled_texts": "data/more.txt"}
    edit_run("train", teacher=teacher, epochs=0.2, eval_every=None)(checkout)
    target = (*SMALL, "--", "results/taught/merged")
    result = run_snakemake(checkout, *target)
    assert result.returncode == 0, result.stdout[-3000:]
    told = json.loads((checkout / "results/taught/teacher/teacher.json").read_text())
    assert told["train_agreement"] > 0.9 and told["unlabelled_texts"] == 2
    training = json.loads((checkout / "results/taught/adapter/training.json").read_text())
    assert training["unlabelled_examples"] == 2 and training["teacher"]["weight"] == 0.7
    assert planned(checkout, *target) == {}
    touch_everything(checkout)
    assert planned(checkout, *target) == {}
    changed: dict[str, Any]
    for changed in ({"temperature": 3.0}, {"weight": 0.5}):
        edit_run("train", teacher=teacher | changed)(checkout)
        assert planned(checkout, *target) == {"train": 1, "merge": 1}
    edit_run("train", teacher=teacher)(checkout)
    edit_run("model", keep_layers=1)(checkout)
    assert planned(checkout, *target) == {
        "shrink_model": 1,
        "check_base": 1,
        "train": 1,
        "merge": 1,
    }
    edit_run("model", keep_layers=None)(checkout)
    asked_anew = {"score_teacher": 1, "train": 1, "merge": 1}
    for changed in ({"path": "data/base"}, {"unlabelled_texts": None}):
        edit_run("train", teacher=teacher | changed)(checkout)
        assert planned(checkout, *target) == asked_anew, changed
    edit_run("train", teacher=teacher)(checkout)
    for file in ("data/more.txt", "results/large/merged.sha256"):
        before = (checkout / file).read_bytes()
        append(file, "x\n")(checkout)
        assert planned(checkout, *target) == asked_anew, file
        (checkout / file).write_bytes(before)
    assert planned(checkout, *target) == {}


def test_layers_are_chosen_anew_for_another_count(checkout: Path) -> None:
    edit_config(lambda c: c.update(pathvars={"results": "results/cut"}), "runs/small.yaml")(
        checkout
    )
    edit_run("model", keep_layers={"count": 1, "choose": "auto"})(checkout)
    target = (*SMALL, "--", "results/cut/base")
    result = run_snakemake(checkout, *target)
    assert result.returncode == 0, result.stdout[-3000:]
    choice = json.loads((checkout / "results/cut/layers.json").read_text())
    source = json.loads((checkout / "results/cut/base/source.json").read_text())
    assert source["kept_layers"] == choice[choice["chosen"]]["kept"]
    assert planned(checkout, *target) == {}
    touch_everything(checkout)
    assert planned(checkout, *target) == {}
    edit_run("train", rank=4)(checkout)
    assert planned(checkout, *target) == {}
    edit_run("model", keep_layers={"count": 2, "choose": "auto"})(checkout)
    assert planned(checkout, *target) == {"measure_layers": 1, "shrink_model": 1}
    edit_run("model", keep_layers=1)(checkout)
    assert planned(checkout, *target) == {"shrink_model": 1}
    edit_run("model", keep_layers={"count": 99, "choose": "auto"})(checkout)
    result = run_snakemake(checkout, *target)
    lines = {line for line in result.stdout.splitlines() if line.startswith("error: ")}
    assert len(lines) == 1 and "model.keep_layers 99: the model has " in lines.pop()
    assert not list((checkout / "results/cut").rglob("*.partial"))


@pytest.mark.parametrize(
    ("path", "told"),
    [("results/small", "is of this run itself"), ("results/half", "is no finished run (merged or f16.gguf in it)")],
)  # fmt: skip
def test_teacher_that_cannot_be_is_refused(path: str, told: str, checkout: Path) -> None:
    (checkout / "results/half/tokens").mkdir(parents=True, exist_ok=True)
    edit_run("train", teacher={"path": path})(checkout)
    result = run_snakemake(checkout, "--dry-run", *SMALL)
    assert result.returncode == 2 and "Traceback" not in result.stdout
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: config: train.teacher.path {path} {told}")


def test_checksum_of_a_model_is_no_reason_to_rerun(checkout: Path, tmp_path: Path) -> None:
    run_file, pin = tmp_path / "pinned.yaml", "1" * 64
    run_file.write_text(yaml.safe_dump({"model": {"name": "a/b", "sha256": pin}}))
    result = run_snakemake(checkout, "--dry-run", "--printshellcmds", "--configfile", str(run_file))
    assert result.returncode == 0, result.stdout[-2000:]
    assert "fetch_model.py --settings" in result.stdout and pin not in result.stdout
    assert result.stdout.count("warning: not pinned: model.revision; ") == 1


BUNDLES: dict[str, tuple[Callable[[Path], object], dict[str, int]]] = {
    "nothing": (lambda folder: None, {}),
    "a default spelled out": (edit_run("bundle", file="best"), {}),
    "bundle.file": (edit_run("bundle", file="q8_0"), {"bundle": 1}),
    "report.title, which stands in the card": (edit_run("report", title="x"), {"report": 1, "bundle": 1}),
    "choose.size_mb": (edit_run("choose", size_mb=200), {"choose": 1, "report": 1, "bundle": 1}),
    "a line of make_bundle.py": (append("scripts/make_bundle.py", "# x\n"), {"bundle": 1}),
}  # fmt: skip


@pytest.mark.parametrize("change", BUNDLES)
def test_bundle_is_made_anew_where_what_is_in_it_changed(
    change: str, bundle: Path, checkout: Path
) -> None:
    edit, expected = BUNDLES[change]
    edit(checkout)
    assert planned(checkout, *SMALL, "--", "results/small/bundle") == expected


def test_readme_states_the_same_table() -> None:
    from conftest import ROOT

    for name in ("README.md", "README.zh-CN.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        for key in ("report.", "evaluate.", "train.", "dataset.", "task.prompt"):
            assert key in text, (name, key)


# --- bad input ---


def fail(folder: Path, config: dict[str, Any]) -> str:
    """Run with `config` laid over the run; return the one line that says what is wrong."""
    run = yaml.safe_load((folder / "runs/small.yaml").read_text())
    for section, values in config.items():
        run.setdefault(section, {}).update(values)
    run["pathvars"] = {"results": "results/bad"}
    shutil.rmtree(folder / "results/bad", ignore_errors=True)
    (folder / "runs/bad.yaml").write_text(yaml.safe_dump(run, allow_unicode=True, sort_keys=False))
    result = run_snakemake(folder, "--configfile", "runs/bad.yaml", "--", "results/bad/tokens")
    assert result.returncode != 0
    lines = {line for line in result.stdout.splitlines() if line.startswith("error: ")}
    assert len(lines) == 1, result.stdout
    assert "Traceback" not in result.stdout
    assert not (folder / "results/bad/tokens").exists()
    assert not [p for top in ("results", "resources") for p in (folder / top).rglob("*.partial")]
    return lines.pop()


def test_unknown_key(checkout: Path) -> None:
    line = fail(checkout, {"train": {"epoch": 3}})
    assert line.startswith("error: config: unknown key train.epoch; did you mean epochs?")


def test_number_as_text(checkout: Path) -> None:
    assert "write 2.0e-04" in fail(checkout, {"train": {"learning_rate": "2e-4"}})


def test_unknown_type_of_variant(checkout: Path) -> None:
    assert "known: Q2_K, Q3_K_S" in fail(checkout, {"quantize": {"x": {"type": "Q4_K_XXL"}}})


@pytest.mark.parametrize("how", [["--dry-run"], []], ids=["dry run", "run"])
def test_missing_packages_of_formats(how: list[str], checkout: Path) -> None:
    small = {"a": {"format": "onnx", "type": "int4"}, "b": {"format": "litert", "type": "dynamic_wi8_afp32"}}  # fmt: skip
    edit_run("quantize", **small)(checkout)
    result = run_snakemake(checkout, *how, *SMALL)
    assert result.returncode == 2 and "Traceback" not in result.stdout
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: format onnx and litert: the packages that make and run such files are not here")  # fmt: skip
    assert "make onnx && make litert" in line
    assert not (checkout / "results/small/parity_onnx.json").exists()


def test_missing_file(checkout: Path) -> None:
    line = fail(checkout, {"dataset": {"files": {"train": "a.csv", "validation": "a.csv", "test": "b.csv"}}})  # fmt: skip
    assert "no such file: dataset.files.train a.csv; dataset.files.validation a.csv; dataset.files.test b.csv" in line  # fmt: skip


def test_unknown_label(checkout: Path) -> None:
    (checkout / "bad.csv").write_text("text,label\n好,1\n差,7\n")
    files = dict.fromkeys(("train", "validation", "test"), "bad.csv")
    line = fail(checkout, {"dataset": {"files": files}})
    assert "row 2: label '7' is not one of 0 (负面), 1 (正面)" in line
    assert not (checkout / "results/bad/dataset/train.jsonl").exists()


def test_truncated_weights(checkout: Path) -> None:
    model = checkout / "bad model 模型"
    model.mkdir(exist_ok=True)
    for path in (checkout / "data/base").iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    line = fail(checkout, {"model": {"path": "bad model 模型"}})
    assert "model.safetensors is truncated" in line
    assert not list((checkout / "resources/models").glob("*模型*"))


def test_programs_on_this_machines_gpu_take_turns(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a GPU (nvidia-smi is there) training and scoring in PyTorch each need the one turn."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = run_snakemake(finished_run, "--dry-run", "--forceall", *SMALL).stdout
    turns = {
        rule: int(turn)
        for rule, turn in re.findall(r"^rule (\w+):(?:\n .*)*?gpu_turn=(\d)", found, re.MULTILINE)
    }
    on_gpu = ("train", "evaluate_base", "evaluate_adapter", "evaluate_merged")
    assert turns == dict.fromkeys(on_gpu, 1)
    profile = yaml.safe_load((finished_run / "profiles/default/config.yaml").read_text())
    assert profile["resources"]["gpu_turn"] == 1
