"""Bundles and apps of tasks of text, of the small run's model: its answers are no good, which none of them minds."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

from conftest import CONVERTER, ROOT, run_program
from evaluate_gguf import open_gguf
from make_app import make_app
from make_bundle import make_bundle
from pockettune.common import program
from pockettune.data.records import write_records
from pockettune.evaluation.stages import evaluate
from small_run import OTHER_WORDS, reviews
from tokenize_dataset import tokenize_dataset

ROWS = 24
NO = OTHER_WORDS[
    False
]  # what the base says of bad reviews, so that windows with and without an answer are there
TASKS: dict[str, dict[str, Any]] = {
    "entities": {"prompt": "{text}\n情感：", "types": {"PLACE": "地点", "THING": "东西"}},
    "answer": {"prompt": "{text}\n{question}\n情感：", "no_answer": NO, "count": "characters", "stride": 16},
    "chat": {"prompt": ""},
}  # fmt: skip
SYSTEM = "一个助手"  # of the chat
LONG = (5, 11, 17)  # of `answer`, records that are asked about in windows


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
    texts = reviews(ROWS, seed=5)[0]
    for number, text in enumerate(texts):
        if kind == "answer" and number in LONG:
            text = "".join(texts[number - 5 : number + 7])
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
            "answer": {"question": text[:2], "answers": [[text[2:5], 2]]},
            "chat": {"messages": turns},
        }
        records.append({**record, **own[kind]})
    return records


def make_text_bundle(model: Path, folder: Path, kind: str) -> Path:
    """Make F16 of a model as the file of a task of text, have it answer, and return its bundle."""
    settings = settings_of(kind)
    records, tokens, gguf = folder / "test.jsonl", folder / "tokens", folder / "f16.gguf"
    metrics, predictions = folder / "f16.json", folder / "f16.parquet"
    write_records(records, make_records(kind))
    (folder / "card.md").write_text("card")
    tokenize_dataset(settings, model, {"test": records}, tokens)
    # In a process of its own: the converter has a gguf package of its own.
    told = ("--model", model, "--converter", CONVERTER, "--settings", json.dumps(settings))
    result = run_program("convert_model.py", *told, "--output", gguf)
    assert result.returncode == 0, result.stdout[-3000:]
    common: dict[str, Any] = {
        "settings": settings,
        "tokens": tokens,
        "records": records,
        "threads": 2,
    }
    evaluate(
        Namespace(**common, model=gguf, reference=None, metrics=metrics, predictions=predictions),
        open_gguf,
    )
    program.write_json(metrics, {"stages": {"f16": program.read_json(metrics)}})
    page = ROOT / "report/bundle.md.j2"
    make_bundle(
        Namespace(**common, model=model, gguf=gguf, predictions=[predictions], metrics=metrics,
                  card=folder / "card.md", page=page, output=folder / "bundle")
    )  # fmt: skip
    return folder / "bundle"


def make_text_app(folder: Path, kind: str, wllama: Path) -> Path:
    """Make the app of the bundle in a folder."""
    page = [path for path in sorted((ROOT / "app").iterdir()) if path.is_file()]
    names = {name: folder / name for name in ("bundle", "tokens")}
    make_app(
        Namespace(
            settings=settings_of(kind), **names, wllama=wllama, page=page, output=folder / "app"
        )
    )
    return folder / "app"
