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
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

from pockettune import program  # noqa: E402
from pockettune.metrics import processor_name  # noqa: E402

WORK = ROOT / "benchmarks/work"
CONVERTER = ROOT / "resources/llama.cpp-0.3.36"
PARAMETERS = 494_032_768
SETTINGS = {
    "dataset": {"files": {s: str(WORK / f"data/{s}.csv") for s in ("train", "validation", "test")},
                "split": None, "text_column": "text", "label_column": "label"},
    "task": {"type": "classification", "system": "你是一个情感分析助手。",
             "prompt": "判断下面评论的情感，只回答“正面”或“负面”。\n评论：{text}\n情感：",
             "labels": {"0": "负面", "1": "正面"}},
    "tokenize": {"max_length": 512},
    "train": {"rank": 8, "alpha": 16, "dropout": 0.05, "learning_rate": 2e-4, "batch_size": 4,
              "gradient_accumulation": 1, "epochs": 1, "warmup_ratio": 0.03, "scheduler": "cosine",
              "seed": 13, "quantization": "none", "precision": "auto",
              "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]},
    "evaluate": {"split": "test", "limit": None},
}  # fmt: skip


@dataclass
class Measured:
    """One finished process."""

    seconds: float
    peak_bytes: int


def measure(command: Sequence[object]) -> Measured:
    """Run a command to its end; wall time and the largest resident set of its process."""
    started = time.perf_counter()
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"error: {command[0]} ended with status {process.returncode}")
    return Measured(time.perf_counter() - started, usage.ru_maxrss * 1024)


def make_model(folder: Path) -> None:
    """Write a random model of Qwen2.5-0.5B's shape with Qwen2's vocabulary."""
    import torch
    from gguf import GGUFReader
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
    from tokenizers import pre_tokenizers as pre
    from transformers import Qwen2Config, Qwen2ForCausalLM

    fields = GGUFReader(CONVERTER / "models/ggml-vocab-qwen2.gguf").fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
    from make_demo_base import PATTERN

    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens[:151_643])}, merges))
    tokenizer.normalizer = normalizers.NFC()
    split = pre.Split(Regex(PATTERN), behavior="isolated")
    tokenizer.pre_tokenizer = pre.Sequence([split, pre.ByteLevel(add_prefix_space=False, use_regex=False)])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in tokens[151_643:151_646]])
    torch.manual_seed(0)
    shape = Qwen2Config(
        vocab_size=151_936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
        num_attention_heads=14, num_key_value_heads=2, max_position_embeddings=32_768,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6}, tie_word_embeddings=True,
        bos_token_id=151_643, eos_token_id=151_645,
    )  # fmt: skip
    model = Qwen2ForCausalLM._from_config(shape, dtype=torch.bfloat16)
    count = sum(p.numel() for p in model.parameters())
    assert count == PARAMETERS, count
    with program.staged(folder) as partial:
        model.save_pretrained(partial)
        tokenizer.save(str(partial / "tokenizer.json"))
        config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>",
                  "pad_token": "<|endoftext|>", "bos_token": None,
                  "chat_template": fields["tokenizer.chat_template"].contents()}  # fmt: skip
        program.write_json(partial / "tokenizer_config.json", config)


def make_data(rows: int) -> None:
    """Write generated reviews: `rows` to train on, half as many to score."""
    import random

    import pandas as pd

    from make_demo_data import make_review

    source = random.Random(0)
    (WORK / "data").mkdir(parents=True, exist_ok=True)
    for split, count in (("train", rows), ("validation", 8), ("test", rows // 2)):
        # Five reviews in a row are as long as one of ChnSentiCorp: about 70 tokens.
        texts = ["".join(make_review(source, i % 2 == 0, True) for _ in range(5)) for i in range(count)]  # fmt: skip
        table = pd.DataFrame({"text": texts, "label": [(i + 1) % 2 for i in range(count)]})
        table.to_csv(WORK / f"data/{split}.csv", index=False)


def commands(threads: int) -> dict[str, list[str | Path]]:
    """Return each step's command, in order."""

    def step(name: str, *arguments: str | Path) -> list[str | Path]:
        return [sys.executable, ROOT / f"scripts/{name}.py", *arguments, "--log", WORK / "log"]

    def settings(*sections: str) -> tuple[str, str]:
        return "--settings", json.dumps({s: SETTINGS[s] for s in sections}, ensure_ascii=False)

    dataset, tokens = WORK / "dataset", WORK / "tokens"
    splits = [
        x for s in ("train", "validation", "test") for x in (f"--{s}", dataset / f"{s}.jsonl")
    ]
    scored = settings("task", "dataset", "evaluate")

    def evaluate(stage: str, *model: str | Path) -> list[str | Path]:
        name = "evaluate_gguf" if stage != "merged" else "evaluate_model"
        return step(name, *scored, "--stage", stage, *model, "--tokens", tokens, "--threads",
                    str(threads), "--metrics", WORK / f"{stage}.json",
                    "--predictions", WORK / f"{stage}.parquet")  # fmt: skip

    return {
        "fetch_dataset": step("fetch_dataset", *settings("dataset", "task"), "--downloads", WORK, "--output", dataset),
        "tokenize": step("tokenize_dataset", *settings("task", "tokenize", "dataset"), "--model", WORK / "model", *splits, "--output", tokens),
        "train": step("train_adapter", *settings("train"), "--base", WORK / "model", "--tokens", tokens, "--threads", str(threads), "--output", WORK / "adapter"),
        "merge": step("merge_adapter", "--base", WORK / "model", "--adapter", WORK / "adapter", "--output", WORK / "merged"),
        "convert": step("convert_model", "--model", WORK / "merged", "--converter", CONVERTER, "--name", "random", "--output", WORK / "f16.gguf"),
        "quantize": step("quantize_model", "--settings", '{"type": "Q4_K_M"}', "--source", WORK / "f16.gguf", "--threads", str(threads), "--output", WORK / "q4_k_m.gguf"),
        "evaluate_merged": evaluate("merged", "--model", WORK / "merged"),
        "evaluate_f16": evaluate("f16", "--model", WORK / "f16.gguf"),
        "evaluate_q4_k_m": evaluate("q4_k_m", "--model", WORK / "q4_k_m.gguf"),
    }  # fmt: skip


def compare(ours: Sequence[object], theirs: Sequence[object], runs: int = 3) -> str:
    """Time two commands in turn; return a row: both medians and the ratio of each pair's times."""
    pairs = [(measure(ours), measure(theirs)) for _ in range(runs)]
    ratios = sorted(a.seconds / b.seconds for a, b in pairs)
    a, b = (statistics.median(pair[i].seconds for pair in pairs) for i in (0, 1))
    return f"{a:.1f} s | {b:.1f} s | {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


def check_files() -> list[str]:
    """Return what the two files store; stop where it is not what the shape gives."""
    from pockettune.gguf_files import describe_tensors

    lines = []
    for name, expected in (("f16", 994.3e6), ("q4_k_m", 397.8e6)):
        path = WORK / f"{name}.gguf"
        stored = describe_tensors(path)
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
    if not (WORK / "model").exists():
        make_model(WORK / "model")
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
        tool: list[str | Path] = [arguments.llama_quantize, WORK / "f16.gguf", WORK / "theirs.gguf",
                           "Q4_K_M", str(arguments.threads)]  # fmt: skip
        against.append(f"| quantize, against llama-quantize | {compare(steps['quantize'], tool)} |")
    page = "\n".join([
        "# A model of Qwen2.5-0.5B's shape, step by step", "",
        f"Made by `python benchmarks/true_scale.py --rows {arguments.rows}` on {os.cpu_count()} cores of "
        f"{processor_name()}; random weights, generated reviews; {arguments.rows} rows to train on, "
        f"{arguments.rows // 2} to score.", "",
        "| step | time | peak memory |", "|---|---|---|", *rows, "",
        "| file | bytes | tensors | bits a weight | types |", "|---|---|---|---|---|", *check_files(), "",
        "| compared, in turn, three times | ours | llama.cpp's | ratio, median (range) |", "|---|---|---|---|", *against, "",
    ])  # fmt: skip
    (ROOT / "benchmarks/true_scale.md").write_text(page, encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
