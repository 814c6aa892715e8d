"""Run every program once on a model of Qwen2.5-0.5B's exact shape, and time it.

The weights are random, so this measures sizes, time and memory and nothing about accuracy. The
vocabulary is Qwen2's own, out of llama.cpp's source release. Converting and quantizing are also
timed against llama.cpp's own script and tool, in turn.

    python benchmarks/true_scale.py [--llama-quantize PATH] [--rows 64]

Writes benchmarks/true_scale.md: a table for each, with the machine's name.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from common import (
    CONVERTER,
    WORK,
    data_steps,
    default_settings,
    machine,
    make_data,
    make_model,
    measure,
    step,
    write_page,
)

MODEL = WORK / "model"


def commands(threads: int) -> dict[str, list[object]]:
    """Return each step's command, in order."""
    settings = default_settings()
    settings["train"].update(epochs=1, eval_every=None)
    text = json.dumps(settings, ensure_ascii=False)

    def evaluate(stage: str, model: Path) -> list[object]:
        name = "evaluate_gguf" if model.suffix == ".gguf" else "evaluate_model"
        return step(name, "--settings", text, "--model", model, "--tokens", WORK / "tokens",
                    "--threads", threads, "--metrics", WORK / f"{stage}.json",
                    "--predictions", WORK / f"{stage}.parquet")  # fmt: skip

    return {
        **data_steps(MODEL, text),
        "check_base": step("check_base", "--settings", text, "--base", MODEL, "--tokens", WORK / "tokens", "--converter", CONVERTER, "--threads", threads, "--output", WORK / "base_check.json"),
        "train": step("train_adapter", "--settings", text, "--base", MODEL, "--tokens", WORK / "tokens", "--threads", threads, "--scratch", WORK / "scratch", "--output", WORK / "adapter"),
        "merge": step("merge_adapter", "--base", MODEL, "--adapter", WORK / "adapter", "--output", WORK / "merged"),
        "convert": step("convert_model", "--model", WORK / "merged", "--converter", CONVERTER, "--settings", text, "--output", WORK / "f16.gguf"),
        "quantize": step("quantize_model", "--settings", '{"type": "Q4_K_M"}', "--source", WORK / "f16.gguf", "--threads", threads, "--output", WORK / "q4_k_m.gguf"),
        "evaluate_merged": evaluate("merged", WORK / "merged"),
        "evaluate_f16": evaluate("f16", WORK / "f16.gguf"),
        "evaluate_q4_k_m": evaluate("q4_k_m", WORK / "q4_k_m.gguf"),
    }  # fmt: skip


def compare(ours: Sequence[object], theirs: Sequence[object], runs: int = 3) -> str:
    """Time two commands in turn; return a row: both medians and the ratio of each pair's times."""
    pairs = [(measure(ours), measure(theirs)) for _ in range(runs)]
    ratios = sorted(a.seconds / b.seconds for a, b in pairs)
    a, b = (statistics.median(pair[i].seconds for pair in pairs) for i in (0, 1))
    return f"{a:.1f} s | {b:.1f} s | {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


def check_files() -> list[str]:
    """Return what the two files store; stop where it is not what the shape gives."""
    from pockettune.gguf.files import describe_file

    lines = []
    for name, expected in (("f16", 994.3e6), ("q4_k_m", 397.8e6)):
        path = WORK / f"{name}.gguf"
        stored = describe_file(path)
        size = path.stat().st_size
        assert abs(size - expected) < 0.2e6, f"{name} is {size:,} bytes"
        assert stored["tensors"] == 290, f"{name} has {stored['tensors']} tensors: untied?"
        types = ", ".join(f"{n} {t}" for t, n in stored["tensor_types"].items())
        lines.append(f"| {path.name} | {size:,} | {stored['tensors']} | {stored['bits_per_weight']:.2f} | {types} |")  # fmt: skip
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--llama-quantize", type=Path, help="llama.cpp's own tool, to compare with")
    parser.add_argument("--rows", type=int, default=64, help="rows to train on")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    make_model(MODEL)
    make_data(arguments.rows)
    steps = commands(arguments.threads)
    rows = []
    for name, command in steps.items():
        result = measure(command)
        rows.append(f"| {name} | {result.seconds:.1f} s | {result.peak_bytes / 1e9:.2f} GB |")
        print(rows[-1], flush=True)
    script = [sys.executable, CONVERTER / "convert_hf_to_gguf.py", WORK / "merged", "--outtype",
              "f16", "--outfile", WORK / "theirs.gguf"]  # fmt: skip
    against = [f"| convert, against convert_hf_to_gguf.py | {compare(steps['convert'], script)} |"]
    if arguments.llama_quantize:
        tool = [arguments.llama_quantize, WORK / "f16.gguf", WORK / "theirs.gguf", "Q4_K_M", arguments.threads]  # fmt: skip
        against.append(f"| quantize, against llama-quantize | {compare(steps['quantize'], tool)} |")
    write_page("true_scale", [
        "# A model of Qwen2.5-0.5B's shape, step by step", "",
        f"Made by `python benchmarks/true_scale.py --rows {arguments.rows}` on {machine()}; random weights,"
        f" generated reviews; {arguments.rows} rows to train on, {arguments.rows // 2} to score.", "",
        "| step | time | peak memory |", "|---|---|---|", *rows, "",
        "| file | bytes | tensors | bits a weight | types |", "|---|---|---|---|---|", *check_files(), "",
        "| compared, in turn, three times | ours | llama.cpp's | ratio, median (range) |", "|---|---|---|---|", *against,
    ])  # fmt: skip


if __name__ == "__main__":
    main()
