"""Take a model of Qwen2.5-3B's exact shape through merge, convert, gate and quantize, and time it.

The weights and the adapter are random, so this measures time and memory and nothing about accuracy. The
gate runs twice: with the memory as it is, and with so little left free that fp32 weights do not fit.

    python benchmarks/larger.py [--rows 32]

Writes benchmarks/larger.md. Takes 30 GB of the disk, which it frees at its end.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from common import (
    CONVERTER,
    WORK,
    apart,
    data_steps,
    default_settings,
    machine,
    make_data,
    make_qwen,
    measure,
    step,
    write_page,
)

PARAMETERS = 3_085_938_688
SHAPE = {"hidden_size": 2048, "intermediate_size": 11_008, "num_hidden_layers": 36, "num_attention_heads": 16}  # fmt: skip
MODEL, ADAPTER = WORK / "model-3b", WORK / "adapter-3b"
LEFT_FREE = 9 * 10**9  # bytes, for the second gate: fp32 weights take 12.3 GB


def make_models() -> None:
    """Write the model, and an adapter of the default shape whose B is not zero."""
    make_qwen(MODEL, PARAMETERS, **SHAPE)
    if ADAPTER.exists():
        return
    import torch

    from pockettune.models.adapters import add_adapter
    from pockettune.models.folder import load_model

    base = load_model(MODEL, dtype=torch.bfloat16)
    adapted: Any = add_adapter(base, default_settings()["train"], MODEL)
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.02)
    adapted.save_pretrained(ADAPTER)


def commands(settings: dict[str, Any], threads: int) -> dict[str, list[object]]:
    """Return each step's command, in order."""
    text = json.dumps(settings, ensure_ascii=False)
    tokens, merged, gguf = WORK / "tokens", WORK / "merged-3b", WORK / "f16-3b.gguf"
    gate = step("check_parity", "--settings", text, "--base", MODEL, "--adapter", ADAPTER, "--model", merged, "--gguf", gguf, "--tokens", tokens, "--records", WORK / "dataset/test.jsonl", "--threads", threads, "--output", WORK / "parity-3b.json")  # fmt: skip
    return {
        **data_steps(MODEL, text),
        "merge": step("merge_adapter", "--base", MODEL, "--adapter", ADAPTER, "--output", merged),
        "convert": step("convert_model", "--model", merged, "--converter", CONVERTER, "--settings", text, "--output", gguf),
        "check_parity": gate,
        f"check_parity, {LEFT_FREE / 1e9:.0f} GB left free": gate,
        "quantize": step("quantize_model", "--settings", '{"type": "Q4_K_M"}', "--source", gguf, "--threads", threads, "--output", WORK / "q4_k_m-3b.gguf"),
    }  # fmt: skip


def hold(left: int) -> None:
    """Hold so much memory that only `left` bytes are free, until the standard input ends."""
    import numpy as np

    from pockettune.common.limits import free_memory

    ballast = np.ones(max(free_memory() - left, 0), dtype=np.uint8)
    print(f"holds {ballast.nbytes} bytes", flush=True)
    sys.stdin.read()


@contextmanager
def beside(*arguments: object) -> Iterator[None]:
    """Run this file with these arguments beside the block."""
    command = [sys.executable, __file__, *map(str, arguments)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdin
        process.stdout.readline()
        yield
        process.stdin.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--rows", type=int, default=32, help="rows whose prompts the gate takes")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--hold", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.hold:
        hold(arguments.hold)
    else:
        measure_steps(arguments.rows, arguments.threads)


def measure_steps(count: int, threads: int) -> None:
    """Run all steps, write the page, and free the disk."""
    apart(make_models)
    make_data(2 * count)
    rows, gates = [], []
    for name, command in commands(default_settings(), threads).items():
        with beside("--hold", LEFT_FREE) if "left free" in name else nullcontext():
            result = measure(command)
        rows.append(f"| {name} | {result.seconds:.1f} s | {result.peak_bytes / 1e9:.2f} GB |")
        print(rows[-1], flush=True)
        if name.startswith("check_parity"):
            gates.append(describe_gate(name))
    sizes = [f"| {p.name} | {p.stat().st_size:,} |" for p in sorted(WORK.glob("*-3b.gguf"))]
    write_page("larger", [
        "# A model of Qwen2.5-3B's shape, step by step", "",
        f"Made by `python benchmarks/larger.py` on {machine()}; {PARAMETERS:,} random weights in BF16, a"
        " random adapter, generated reviews. Peak memory is the largest resident set, in which the pages"
        " of files that are mapped count too.", "",
        "| step | time | peak memory |", "|---|---|---|", *rows, "",
        "| gate | logits apart by (of 0.05) | merge by (of 0.02) | weights |", "|---|---|---|---|", *gates, "",
        "| file | bytes |", "|---|---|", *sizes,
    ])  # fmt: skip
    for path in WORK.glob("*-3b*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def describe_gate(name: str) -> str:
    """Return a row of what the gate found, and in which form it held the weights."""
    checks = {c["name"]: c for c in json.loads((WORK / "parity-3b.json").read_text())["checks"]}
    apart = [checks[n]["max_answer_difference_in_spreads"] for n in ("logits", "merge")]
    held = "16 bits" if "stay in 16 bits" in (WORK / "log").read_text() else "fp32"
    return f"| {name} | {apart[0]:.2g} | {apart[1]:.2g} | {held} |"


if __name__ == "__main__":
    main()
