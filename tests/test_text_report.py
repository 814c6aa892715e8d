"""Report, card and leaderboard of a task whose answer is text, from a finished run's numbers by hand."""

import html
import json
import re
from argparse import Namespace
from copy import deepcopy
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from compare_stages import list_flips, list_samples, show_record
from conftest import ROOT
from pockettune.common.errors import UserError
from pockettune.common.words import Words, english, read_words
from pockettune.evaluation.bootstrap import compare_counts, metric_interval
from pockettune.evaluation.verdict import judge
from pockettune.tasks.chat import Chat
from tags import Tags
from write_leaderboard import as_table, common_metric, group_seeds
from write_report import gather, render

EVIL = "</dd><script>alert(1)</script>"
TASK = {"system": "", "prompt": "{text}\n标签：", "template_options": {}}
TAGS = Tags(TASK, {"text_column": "text", "label_column": "label"})
RECORDS: dict[str, dict[str, Any]] = {
    f"test-{n}": {"id": f"test-{n}", "text": f"第 {n} 条 & <b>", "tags": ["甲", "乙"][: 1 + n % 2]}
    for n in range(8)
}
STAGES = ("base", "merged", "f16", "q4_k_m")


def answers_of(stage: str, rows: list[str]) -> pd.DataFrame:
    """Return a stage's predictions: base says the same of all, the small file errs once, and how."""
    said = {row: "丙" if stage == "base" else TAGS.answer(RECORDS[row]) for row in rows}
    if stage == "q4_k_m":
        said["test-3"] = EVIL
    if stage == "base":
        said["test-0"] = "<img src=x onerror=alert(2)>\n第二行"
    counts = [TAGS.counts(TAGS.reference(RECORDS[row]), TAGS.parse(said[row])) for row in rows]
    numbers = {f"count_{place}": column for place, column in enumerate(zip(*counts, strict=True))}
    return pd.DataFrame({"id": rows, "answer": [said[row] for row in rows], **numbers})


TABLES = {
    stage: answers_of(stage, list(RECORDS)[:: 1 if stage in ("f16", "q4_k_m") else 2])
    for stage in STAGES
}


def describe_stage(stage: str) -> dict[str, Any]:
    table, f16 = TABLES[stage], TABLES["f16"]
    counts = table.filter(like="count_").to_numpy()
    score = TAGS.measure(counts.sum(axis=0).tolist())
    told: dict[str, Any] = {
        "metric": "micro_f1", "n": len(table), "micro_f1": score, "score": score, "exact_match": 0.25,
        "unseen": {"n": len(table) - 1, "micro_f1": score}, "size_bytes": 2_000_000,
        "interval": metric_interval(counts, TAGS.measure),
        "reading": {"tokens": 24, "token_accuracy": 0.625, "loss": 1.0, "perplexity": 2.718},
        "generated": {"rows": len(table), "ended": len(table) - 1, "understood": len(table) - 2},
        "noise": {"rows": 4, "changed": 1},
    }  # fmt: skip
    if stage != "f16":
        both = f16[f16["id"].isin(table["id"])]
        paired = compare_counts(both.filter(like="count_").to_numpy(), counts, TAGS.measure)
        told["against_f16"] = {"n": len(table), "flips": 1, **paired}
        told["verdict"] = judge(told["against_f16"], 0.005)
        told["parting"] = {"rows": len(table), "equal": len(table) - 1, "first_token": 2.0}
        told["against_before"] = {"stage": "base", **told["against_f16"]}
    if stage in ("merged", "q4_k_m"):
        told["reading"] |= {
            "kl_vocabulary": {"mean": 0.0123, "p999": 0.456}, "likeliest_equal": 0.9375,
        }  # fmt: skip
    if stage in ("f16", "q4_k_m"):
        types = {"Q4_K": 12, "F32": 11}
        told["stored"] = {"bits_per_weight": 5.0, "embedding_type": "Q6_K", "embedding_share": 0.1,
                          "fallback_share": 0.0, "tensor_types": types}  # fmt: skip
        told["constrained"] = {"rows": 4, "ended": 4, "understood": 4, "micro_f1": 0.875}
    told["provenance"] = {"python": "3.11", "llama-cpp-python": "0.3.36"}
    return told


METRICS = {stage: describe_stage(stage) for stage in STAGES}
METRICS["q4_k_m"]["size_bytes"] = 700_000


def write_run(folder: Path, stages: dict[str, Any], samples: list[dict[str, Any]]) -> Namespace:
    """Write what the report is made from, but for the settings; return it as the program's arguments."""
    split = {
        "rows": 8, "answers": {"甲": 4, "甲乙": 4}, "characters": {"median": 9, "max": 12},
        "duplicates": 0, "seen_in_train": 1, "seen_in_validation": 0, "texts_with_line_breaks": 0,
        "bad_rows": None,
    }  # fmt: skip
    tokens = {"prompt_tokens": {"median": 20, "max": 30}, "texts_cut": 2, "answers_cut": 3}
    splits = ("train", "validation", "test")
    rate = {"mean": 50.0, "deviation": 1.0, "tokens": 32}
    speed = {"prompt": rate, "generation": rate, "resident_bytes": 9_000_000, "threads": 2}
    shown = {row: show_record(TAGS, record) for row, record in RECORDS.items()}
    updates = [{"loss": 1.0}, {"loss": 0.5}]
    files: dict[str, Any] = {
        "metrics.json": {"stages": stages},
        "flips.json": list_flips(TABLES, shown),
        "samples.json": samples,
        "parity.json": {"checks": [{"name": "token_ids", "passed": True, "detail": "8 / 8"}]},
        "audit.json": {"splits": dict.fromkeys(splits, split), "train_texts_with_several_answers": 2},
        "tokens/statistics.json": dict.fromkeys(splits, tokens),
        "tokens/chat.json": {"prompt": "U: {text}\n标签：A: ", "end": "<e>", "options": {},
                             "day": "1 Jan", "reads_clock": False},
        "adapter/training.json": {
            "examples": 8, "teacher": None, "trainable_parameters": 64, "precision": "fp32",
            "device": "cpu", "seconds": 1.0, "peak_memory_bytes": None, "planned_updates": 2,
            "resumed": 0, "metric": "token_accuracy", "exported_update": 2, "validation_rows": 8,
            "validation_seen": False, "updates": updates,
            "validations": [{"update": 2, "token_accuracy": 0.5, "loss": 0.7}],
        },
        "base/source.json": {"origin": "base", "sha256": {"model.safetensors": "0" * 64}},
        **{f"speed/{name}.json": speed for name in ("f16", "q4_k_m")},
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    (folder / "train.tsv").write_text("s\tmax_rss\n1.5\t100.0\n")
    return Namespace(
        metrics=folder / "metrics.json", flips=folder / "flips.json", samples=folder / "samples.json",
        parity=folder / "parity.json", format_parity=[], speed=sorted((folder / "speed").glob("*.json")),
        audit=folder / "audit.json", vocabulary=None, tokens=folder / "tokens",
        adapter=folder / "adapter", base=folder / "base", benchmarks=[folder / "train.tsv"],
    )  # fmt: skip


def make_pages(
    folder: Path, stages: dict[str, Any] | None = None, words: Words = english, **task: Any
) -> tuple[str, str]:
    """Return report.html, and card.md, of the run, `task` laid over that section of its settings."""
    shown = {row: show_record(TAGS, record) for row, record in RECORDS.items()}
    arguments = write_run(folder, stages or METRICS, list_samples(TABLES, shown))
    settings = yaml.safe_load((ROOT / "config.yaml").read_text())
    settings["task"] |= {**TASK, "type": "tags", "labels": {}, **task}
    settings["train"]["metric"] = None
    settings["report"] = {"title": "标签", "language": "en" if words is english else "zh"}
    content = gather(Namespace(settings=settings, **vars(arguments)), words)
    page, card = (
        render(ROOT / f"report/{t}.j2", content, words) for t in ("report.html", "card.md")
    )
    return page, card


def test_number_has_its_own_name_everywhere(tmp_path: Path) -> None:
    for text in map(html.unescape, make_pages(tmp_path)):
        told = re.sub(r"<pre>.*?</pre>|[Tt]oken accuracy", "", text, flags=re.DOTALL)
        assert "accuracy" not in told.lower() and "micro F1" in told
        for word in ("tfidf", "Counting characters", "alibration", "labelled", "label."):
            assert word not in told, word
    assert "<text" in make_pages(tmp_path)[0].split("micro F1, %")[0], "an axis of a plot"


def test_first_screen_and_verdict(tmp_path: Path) -> None:
    page = html.unescape(make_pages(tmp_path)[0])
    (first,) = re.findall(r'<dl class="answers">(.*?)</dl>', page, re.DOTALL)
    # By hand: 12 tags to find and 12 found, but that 2 became 30 characters, of which none is right.
    found = 2 * 10 / (10 + len(set(EVIL)) + 12)
    assert re.findall(r"<b>(.*?)</b>", first)[:3] == [
        "q4_k_m.gguf",
        "0.7 MB",
        f"{100 * found:.1f} %",
    ]
    assert "micro F1 on 8 rows, untrained 0.0 %; perplexity of the reference answers 2.72" in first
    (verdict,) = re.findall(r'<p class="verdict">(.*?)</p>', page, re.DOTALL)
    assert f"reaches {100 * found:.1f} % (micro F1) on 8 rows" in verdict
    assert "before, it was 0.0 % of 4" in verdict
    assert "7 of 8 written answers the same to the end" in verdict


def test_page_has_what_only_text_has(tmp_path: Path) -> None:
    page = html.unescape(make_pages(tmp_path)[0])
    read = page.split("reference answers</h2>")[1].split("q4_k_m</td>")[1]
    cells = ["24", "62.5 %", "2.72", "0.0123", "0.4560", "93.8 %"]
    assert re.findall(r"<td>(.*?)</td>", read)[:6] == cells
    written, held = page.split("<h2>Answers written</h2>")[1].split("q4_k_m</td>")[1:3]
    cells = ["8", "87.5 %", "75.0 %", "87.5 %", "2", "1 of 4"]
    assert re.findall(r"<td>(.*?)</td>", written)[:6] == cells
    assert re.findall(r"<td>(.*?)</td>", held)[:4] == ["4", "100.0 %", "100.0 %", "87.5 %"]
    assert "<h2>Which answers</h2>" not in page and "<th>labels</th>" not in page


def test_hostile_answers_are_text(tmp_path: Path) -> None:
    page, _ = make_pages(tmp_path)
    assert "<script" not in page and "<img" not in page and "<b>\n标签" not in page
    samples, flips = page.split("<h2>Side by side</h2>")[1].split("<h2>Changed answers</h2>")
    assert html.escape(EVIL) in flips and "&lt;img src=x onerror=alert(2)&gt;\n第二行" in samples
    assert "第 0 条 &amp; &lt;b&gt;\n标签：" in samples


def test_chinese_pages_say_the_same(tmp_path: Path) -> None:
    table = ROOT / "report/zh.json"
    sentences = [sentence for sentence in json.loads(table.read_text()) if len(sentence) > 30]
    stages = give_details(METRICS)
    for english_page, page in zip(
        make_pages(tmp_path, stages), make_pages(tmp_path, stages, read_words(table)), strict=True
    ):
        page, english_page = html.unescape(page), html.unescape(english_page)
        assert [sentence for sentence in sentences if sentence in page] == []
        assert "微平均 F1" in page and "准确率" not in page.replace("词元准确率", "")
        plain = [re.sub(r"<svg.*?</svg>", "", t, flags=re.DOTALL) for t in (page, english_page)]
        ours, theirs = (sorted(re.findall(r"\d+\.\d+", text)) for text in plain)
        assert ours == theirs and len(ours) > 15


def give_details(stages: dict[str, Any]) -> dict[str, Any]:
    """Return the stages with what entities and questions have beside."""
    stages = deepcopy(stages)
    for stage in stages.values():
        scores = {"precision": 0.8, "recall": 0.6, "f1": 0.686, "n": 5}
        stage["per_type"] = {"人名 <i>": scores}
        stage["errors"] = {"type": 1, "boundary": 2, "missing": 3, "made_up": 41, "its_own": 5}
        stage["answerable"] = {"micro_f1": 0.5, "exact_match": 0.4, "n": 6}
        stage["unanswerable"] = {"micro_f1": 1.0, "exact_match": 0.511, "n": 2}
    # The base, on fewer rows, met no such type and no such question.
    stages["base"]["per_type"] = {}
    del stages["base"]["answerable"]
    return stages


def test_tasks_own_details(tmp_path: Path) -> None:
    page = make_pages(tmp_path, give_details(METRICS))[0]
    types = page.split("<h2>By type</h2>")[1].split("</table>")[0]
    assert re.findall(r"<td>(.*?)</td>", types) == [
        "人名 &lt;i&gt;", "5", "80.0 %", "60.0 %", "–", "68.6 %", "68.6 %", "68.6 %",
    ]  # fmt: skip
    assert "<th>made up</th><th>its_own</th>" in page and "<td>41</td>" in page
    parts = page.split("<h2>Questions with and without an answer</h2>")[1]
    assert re.findall(r"<td>(.*?)</td>", parts)[:6] == ["base", "0", "–", "–", "2", "51.1 %"]


def test_conversations_are_read_and_may_not_be_written(tmp_path: Path) -> None:
    """A task that is scored by its reference answers, with evaluate.greedy_rows: null."""
    stages = deepcopy(METRICS)
    for stage in stages.values():
        stage["metric"] = "token_accuracy"
        stage["unseen"]["token_accuracy"] = 0.5
        stage["generated"] = {"rows": 0, "ended": 0, "understood": 0}
        del stage["noise"]
        stage.pop("constrained", None)
        if "parting" in stage:
            stage["parting"] = {"rows": 0, "equal": 0, "first_token": None}
    page, card = map(html.unescape, make_pages(tmp_path, stages, prompt="{text}\n情感："))
    assert "its likeliest token the same at 93.8 % of the reference answers' tokens" in page
    assert "(token accuracy) on 8 rows" in page and "under the grammar" not in page
    assert "情感" not in card, "the task does not use that key"
    assert "nothing is put around it" in card and "read token by token; written" in card


def test_samples_are_what_every_stage_answered() -> None:
    shown = {row: show_record(TAGS, record) for row, record in RECORDS.items()}
    samples = list_samples(TABLES, shown)
    assert [sample["id"] for sample in samples] == ["test-0", "test-2", "test-4", "test-6"]
    assert samples[1] == {
        "id": "test-2", "text": "第 2 条 & <b>\n标签：", "reference": "甲",
        "answers": {"base": "丙", "merged": "甲", "f16": "甲", "q4_k_m": "甲"},
    }  # fmt: skip


def test_reference_of_a_conversation_has_every_turn() -> None:
    settings: dict[str, Any] = {"system": None, "template_options": {}, "max_answer_tokens": 8}
    task = Chat(settings, {"text_column": "messages", "label_column": None})
    turns = [("user", "一"), ("assistant", "二"), ("user", "三"), ("assistant", "四")]
    messages = [{"role": role, "content": content} for role, content in turns]
    record = {"id": "test-1", **task.read({"messages": messages})}
    assert show_record(task, record) == {"text": "三", "reference": "二\n四"}


def test_leaderboard_names_the_metric() -> None:
    row = {"changed": {"train.rank": 4}, "file": "q", "metric": "micro_f1", "score": 0.5,
           "f16_score": 0.75, "size_bytes": 1, "prompt_rate": 1.0}  # fmt: skip
    metric = common_metric([row])
    table = as_table(group_seeds([row]), metric)
    assert [table.loc[0, name] for name in ("micro_f1", "f16_micro_f1", "mean_micro_f1")] == [
        0.5,
        0.75,
        0.5,
    ]
    assert not {"score", "metric", "accuracy"} & set(table)
    with pytest.raises(UserError, match="accuracy and micro_f1, and cannot be put into one order"):
        common_metric([row, {**row, "metric": "accuracy"}])
