"""What the benchmarks share: the model of Qwen2.5-0.5B's shape, the settings, a stop-watch."""

import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

from pockettune.common import program  # noqa: E402
from pockettune.evaluation.metrics import processor_name  # noqa: E402

WORK = ROOT / "benchmarks/scratch"
CONVERTER = ROOT / "resources/llama.cpp-0.3.36"
PARAMETERS = 494_032_768


def default_settings() -> dict[str, Any]:
    """Return config.yaml, its dataset replaced by the files of `make_data`."""
    settings: dict[str, Any] = yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))
    files = {split: str(WORK / f"data/{split}.csv") for split in ("train", "validation", "test")}
    settings["dataset"].update(name=None, revision=None, files=files, split=None)
    return settings


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


def apart(function: Callable[..., object], *arguments: object) -> None:
    """Call a function in a process of its own: Linux counts what a parent holds as its child's peak."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        pool.apply(function, arguments)


def machine() -> str:
    """Return what the numbers of a page were measured on."""
    return f"{os.cpu_count()} cores of {processor_name()}"


def write_page(name: str, lines: Sequence[str]) -> None:
    """Write and print benchmarks/<name>.md."""
    page = "\n".join(lines) + "\n"
    (ROOT / f"benchmarks/{name}.md").write_text(page, encoding="utf-8")
    print(page)


def make_model(folder: Path) -> None:
    """Write a random model of Qwen2.5-0.5B's shape with Qwen2's vocabulary, if it is not there."""
    make_qwen(folder, PARAMETERS, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14)  # fmt: skip


def make_qwen(folder: Path, parameters: int, **shape: int) -> None:
    """Write a random model of one of Qwen2.5's smaller shapes in BF16, if it is not there."""
    if folder.exists():
        return
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config: Any = Qwen2Config(
        vocab_size=151_936, num_key_value_heads=2, max_position_embeddings=32_768,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6}, tie_word_embeddings=True,
        bos_token_id=151_643, eos_token_id=151_645, **shape,  # type: ignore[arg-type]
    )  # fmt: skip
    model = Qwen2ForCausalLM._from_config(config, dtype=torch.bfloat16)
    count = sum(p.numel() for p in model.parameters())
    assert count == parameters, count
    with program.staged(folder) as partial:
        model.save_pretrained(partial)
        write_tokenizer(partial)


def write_tokenizer(folder: Path) -> None:
    """Write Qwen2's tokenizer, out of the vocabulary that llama.cpp tests with."""
    from gguf import GGUFReader
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
    from tokenizers import pre_tokenizers as pre

    from generated import PATTERN

    fields = GGUFReader(CONVERTER / "models/ggml-vocab-qwen2.gguf").fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens[:151_643])}, merges))
    tokenizer.normalizer = normalizers.NFC()
    split = pre.Split(Regex(PATTERN), behavior="isolated")
    byte_level = pre.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in tokens[151_643:151_646]])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "bos_token": None,
        "chat_template": fields["tokenizer.chat_template"].contents(),
    }
    program.write_json(folder / "tokenizer_config.json", config)


def make_data(rows: int) -> None:
    """Write generated reviews: `rows` to train on, half as many to score."""
    import random

    import pandas as pd

    from generated import make_review

    source = random.Random(0)
    (WORK / "data").mkdir(parents=True, exist_ok=True)
    for split, count in (("train", rows), ("validation", 8), ("test", rows // 2)):
        # Three reviews in a row are as long as one of ChnSentiCorp: about 70 tokens.
        texts = ["".join(make_review(source, i % 2 == 0) for _ in range(3)) for i in range(count)]  # fmt: skip
        table = pd.DataFrame({"text": texts, "label": [(i + 1) % 2 for i in range(count)]})
        table.to_csv(WORK / f"data/{split}.csv", index=False)


def step(name: str, *arguments: object) -> list[object]:
    """Return the command of one program."""
    return [sys.executable, ROOT / f"scripts/{name}.py", *arguments, "--log", WORK / "log"]


def data_steps(model: Path, settings: str) -> dict[str, list[object]]:
    """Return the commands from the files of `make_data` to tokens/, in order."""
    splits = ("train", "validation", "test")
    files = [x for s in splits for x in (f"--{s}", WORK / f"dataset/{s}.jsonl")]
    return {
        "fetch_dataset": step("fetch_dataset", "--settings", settings, "--downloads", WORK, "--audit", WORK / "dataset/audit.json"),
        "tokenize": step("tokenize_dataset", "--settings", settings, "--model", model, *files, "--output", WORK / "tokens"),
    }  # fmt: skip
