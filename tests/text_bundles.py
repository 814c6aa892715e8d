"""Bundles and apps of tasks of text, of the small run's model: its answers are no good, which none of them minds."""

import json
from pathlib import Path
from typing import Any

from conftest import CONVERTER, ROOT, run_program
from pockettune.data.records import write_records
from pockettune.tasks import load_task
from small_run import reviews

ROWS = 24
TASKS: dict[str, dict[str, Any]] = {
    "entities": {"prompt": "{text}\n情感：", "types": {"PLACE": "地点", "THING": "东西"}, "no_answer": "无"},
    "answer": {"prompt": "{text}\n{question}\n情感：", "no_answer": "无", "count": "characters", "stride": 16},
    "chat": {"prompt": ""},
}  # fmt: skip
SYSTEM = "一个助手"  # of the chat


def settings_of(kind: str) -> dict[str, Any]:
    """Return the sections of a run's config that the programs take."""
    task = {"system": "", "template_options": {}, "labels": {}, "max_answer_tokens": 12}
    return {
        "model": {"name": None, "revision": None, "path": "data/base"},
        "dataset": {
            "name": None, "revision": None,
            "text_column": "text", "label_column": "label", "question_column": "question",
        },
        "task": {**task, "type": kind, **TASKS[kind], "system": SYSTEM if kind == "chat" else ""},
        "tokenize": {"max_length": 128},
        "evaluate": {"split": "test", "limit": None, "greedy_rows": 12},
        "card": {"license": "mit", "languages": ["zh"], "template": "task" if kind == "entities" else "base"},
        "bundle": {"file": "f16"},
        "report": {"title": "Small run"},
    }  # fmt: skip


def make_records(kind: str) -> list[dict[str, Any]]:
    """Return records as the task reads them."""
    records = []
    for number, text in enumerate(reviews(ROWS, seed=5)[0]):
        record: dict[str, Any] = {"id": f"test-{number}", "text": text}
        turns = [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": text},
            {"role": "assistant", "content": "好"},
            {"role": "user", "content": text[:6]},
            {"role": "assistant", "content": text[-3:]},
        ]
        own: dict[str, Any] = {
            "entities": {"entities": [["东西", 0, 2]]},
            "answer": {"question": text[:4], "answers": [[text[2:5], 2]]},
            "chat": {"messages": turns},
        }
        records.append({**record, **own[kind]})
    return records


def make_text_bundle(model: Path, folder: Path, kind: str) -> Path:
    """Make F16 of a model as the file of a task of text, have it answer, and return its bundle."""
    settings = settings_of(kind)
    load_task(settings["task"], settings["dataset"])
    told = json.dumps(settings)
    records, tokens, gguf = folder / "test.jsonl", folder / "tokens", folder / "f16.gguf"
    write_records(records, make_records(kind))
    (folder / "card.md").write_text("card")
    steps = {
        "tokenize_dataset.py": ("--model", model, "--train", records, "--validation", records, "--test", records,
                                "--output", tokens),
        "convert_model.py": ("--model", model, "--converter", CONVERTER, "--output", gguf),
        "evaluate_gguf.py": ("--model", gguf, "--tokens", tokens, "--records", records, "--threads", "2",
                             "--metrics", folder / "f16.json", "--predictions", folder / "f16.parquet"),
        "make_bundle.py": ("--model", model, "--tokens", tokens, "--records", records, "--gguf", gguf,
                           "--predictions", folder / "f16.parquet", "--metrics", folder / "f16.json", "--threads", "2",
                           "--card", folder / "card.md", "--page", ROOT / "report/bundle.md.j2",
                           "--output", folder / "bundle"),
    }  # fmt: skip
    for name, arguments in steps.items():
        result = run_program(name, "--settings", told, *arguments)
        assert result.returncode == 0, result.stdout[-3000:]
    return folder / "bundle"


def make_text_app(folder: Path, kind: str, wllama: Path) -> Path:
    """Make the app of the bundle in a folder."""
    page = [path for path in sorted((ROOT / "app").iterdir()) if path.is_file()]
    result = run_program(
        "make_app.py", "--settings", json.dumps(settings_of(kind)), "--bundle", folder / "bundle",
        "--tokens", folder / "tokens", "--wllama", wllama, "--page", *page, "--output", folder / "app",
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-3000:]
    return folder / "app"
