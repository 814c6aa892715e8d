"""Take a tiny random model of each architecture through the workflow; write the table of docs/models.md.

    python benchmarks/models.py            # all, in two minutes
    python benchmarks/models.py Gemma      # those of this name; writes nothing

Each runs the programs of the rules one after the other; what refuses it, and with which line, is its
result. Weights are random, so this shows what is computed rightly and not what is learned well.
"""

import json
import multiprocessing
import os
import re
import runpy
import shutil
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from architectures import ARCHITECTURES, Architecture, make_tiny
from common import CONVERTER, ROOT, WORK, data_steps, default_settings, make_data, step

# The page, and what its table is written in.
PAGES = {
    "docs/models.md": ("| model | `model_type` | `target_modules` | result |", "as in config.yaml", "works", "{}: {}"),
    "docs/models.zh-CN.md": ("| 模型 | `model_type` | `target_modules` | 结果 |", "同 config.yaml", "可用", "{}：{}"),
}  # fmt: skip
BEGIN, END = "<!-- table -->\n", "<!-- end -->\n"
DEFAULT_TARGETS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def run_settings() -> dict[str, Any]:
    """Return the default settings, shortened to a few updates and a few rows."""
    settings = default_settings()
    settings["tokenize"]["max_length"] = 256
    settings["train"].update(
        target_modules="all-linear", epochs=1, batch_size=8, eval_every=None, learning_rate=5e-3
    )
    settings["model"].update(name=None, revision=None, path="tiny")
    return settings


def workflow_steps(folder: Path, base: Path, settings: dict[str, Any]) -> dict[str, list[object]]:
    """Return the commands of one model's way, in the order of the rules."""
    told = json.dumps(settings, ensure_ascii=False)
    tokens, f16, q4 = (folder / name for name in ("tokens", "f16.gguf", "q4.gguf"))
    adapter, merged, data = folder / "adapter", folder / "merged", WORK / "dataset"
    splits = [x for s in ("train", "validation", "test") for x in (f"--{s}", data / f"{s}.jsonl")]
    common = ("--settings", told, "--threads", 1)
    return {
        "tokenize": step("tokenize_dataset", "--settings", told, "--model", base, *splits, "--output", tokens),
        "check_base": step("check_base", *common, "--base", base, "--tokens", tokens, "--converter", CONVERTER,
                           "--output", folder / "base_check.json"),
        "train": step("train_adapter", *common, "--base", base, "--tokens", tokens, "--output", adapter),
        "merge": step("merge_adapter", "--base", base, "--adapter", adapter, "--output", merged),
        "convert": step("convert_model", "--settings", told, "--model", merged, "--converter", CONVERTER, "--output", f16),
        "check_parity": step("check_parity", *common, "--base", base, "--adapter", adapter, "--model", merged, "--gguf", f16,
                             "--tokens", tokens, "--records", data / "test.jsonl", "--output", folder / "parity.json"),
        "quantize": step("quantize_model", "--settings", '{"type": "Q4_K_M"}', "--source", f16, "--threads", 1, "--output", q4),
        "evaluate": step("evaluate_gguf", *common, "--model", q4, "--tokens", tokens,
                         "--metrics", folder / "q4.json", "--predictions", folder / "q4.parquet"),
    }  # fmt: skip


def run_program(command: list[object]) -> None:
    """Run a program in this process."""
    sys.argv = list(map(str, command[1:]))
    runpy.run_path(sys.argv[0], run_name="__main__")


def in_a_process(work: Callable[[], None], output: Path) -> str | None:
    """Run `work` in a forked process: what was imported need not be again, and a crash ends it alone.

    Returns the line by which it failed, or None.
    """

    def child() -> None:
        sys.stdout = sys.stderr = file = output.open("w", buffering=1)
        for native in (1, 2):  # what llama.cpp writes
            os.dup2(file.fileno(), native)
        try:
            work()
        except SystemExit:
            raise
        except BaseException as error:
            kind = type(error).__name__
            told = str(error) if kind == "UserError" else f"{kind}: {error}"
            print(f"\nerror: {' '.join(told.split())}", flush=True)
            os._exit(1)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(300)
    if process.is_alive():
        process.kill()
        return "did not end within 300 s"
    if process.exitcode == 0:
        return None
    lines = output.read_text(errors="replace").splitlines()
    told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return told[-1] if told else f"ended with status {process.exitcode}: {(lines or [''])[-1]}"


def try_architecture(architecture: Architecture, texts: list[str]) -> dict[str, Any]:
    """Return {"step", "line"} of what refused the model, both None where it works."""
    with tempfile.TemporaryDirectory(prefix="pockettune-") as name:
        folder = Path(name)
        base = folder / architecture.kind
        steps: dict[str, Callable[[], None]] = {
            "make": lambda: make_tiny(architecture, texts, base)
        }
        for title, command in workflow_steps(folder, base, run_settings()).items():
            steps[title] = partial(run_program, command)
        for title, work in steps.items():
            if line := in_a_process(work, folder / "output"):
                # Without what is another in every run: the folder, the name of an unfinished file.
                plain = re.sub(r"\.([\w.]+)\.\w+\.partial", r"\1", line.replace(f"{folder}/", ""))
                return {"step": title, "line": plain}
        return {"step": None, "line": None, "targets": targets(folder / "adapter")}


def targets(adapter: Path) -> list[str]:
    """Return the names of the layers that got an adapter."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    return sorted(config["target_modules"])


def write_tables(results: dict[str, dict[str, Any]]) -> None:
    """Write the results into the pages, between their marks."""
    kinds = {architecture.name: architecture.kind for architecture in ARCHITECTURES}
    for page, (header, default, works, refused) in PAGES.items():
        lines = [header, "|---|---|---|---|"]
        for name, result in results.items():
            usual = DEFAULT_TARGETS.issubset(result.get("targets", ()))
            chosen = "" if result["step"] else default if usual else "`all-linear`"
            told = works
            if result["step"]:
                told = refused.format(f"`{result['step']}`", cell(result["line"]))
            lines.append(f"| {name} | {kinds[name]} | {chosen} | {told} |")
        path = ROOT / page
        before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
        after = rest.partition(END)[2]
        table = "\n".join(lines) + "\n"
        path.write_text(before + BEGIN + table + END + after, encoding="utf-8")


def cell(line: str) -> str:
    """Return an error's line without the advice that leads to this very page."""
    return line.partition("; take another model")[0].replace("|", "/").strip()


def prepare() -> list[str]:
    """Make the rows once; return the texts of which tokenizers are made."""
    import pandas as pd

    shutil.rmtree(WORK / "dataset", ignore_errors=True)
    make_data(48)
    run = data_steps(WORK / "none", json.dumps(run_settings(), ensure_ascii=False))
    if line := in_a_process(lambda: run_program(run["fetch_dataset"]), WORK / "output"):
        raise SystemExit(f"error: {line}")
    task = run_settings()["task"]
    told = [task["system"], task["prompt"], *task["labels"].values()] * 20
    return [*pd.read_csv(WORK / "data/train.csv")["text"], *told]


def import_all() -> None:
    """Import once what every program imports, before the processes are forked."""
    import llama_cpp  # noqa: F401
    import peft  # noqa: F401
    import sklearn.metrics  # noqa: F401
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(1)


def main() -> None:
    wanted = sys.argv[1:]
    import_all()
    texts = prepare()
    results = {}
    for architecture in ARCHITECTURES:
        if wanted and not any(word in architecture.name for word in wanted):
            continue
        results[architecture.name] = result = try_architecture(architecture, texts)
        print(
            f"{architecture.name}: {result['step'] or 'works'} {result['line'] or ''}", flush=True
        )
    if not wanted:
        write_tables(results)


if __name__ == "__main__":
    main()
