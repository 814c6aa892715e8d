"""The run that the tests make: the DAG of the real job on generated reviews and a base of seconds.

The base learned which of two made-up words answers a review, so it knows what to look at. It saw the
task's own words as answers drawn by lot: that they may stand there, and not which is right.
"""

import atexit
import functools
import itertools
import json
import random
import shutil
import string
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy
from transformers import Qwen2Config, Qwen2ForCausalLM

from generated import SPECIAL, make_review, train_tokenizer, write_tokenizer_config

ROWS = {"train": 600, "validation": 50, "test": 300}
BASE_ROWS, BASE_EPOCHS, BASE_BATCH = 1600, 2, 32
OTHER_WORDS = {True: "甲", False: "乙"}
TASK_WORDS = ["负面", "正面"]
LOT_SHARE = 0.2  # of the rows are answered with a word of the task, drawn by lot
PROMPT = "{text}\n情感："
VOCABULARY, UNUSED = (
    512,
    128,
)  # tokens of the reviews, and others that a trimmed vocabulary leaves out

RUN: dict[str, Any] = {
    "pathvars": {"results": "results/small"},
    "model": {"path": "data/base"},
    "dataset": {"files": {split: f"data/{split}.csv" for split in ROWS}},
    "task": {"system": "", "prompt": PROMPT},
    "tokenize": {"max_length": 128},
    # On the CPU, where the same settings give the same bytes; the tests' SLURM reserves a GPU that is none.
    "train": {"learning_rate": 5e-3, "batch_size": 32, "epochs": 2, "device": "cpu"},
    "choose": {"size_mb": 100},
    "card": {"license": "mit"},
    "report": {"title": "Small run"},
}


def reviews(count: int, seed: int) -> tuple[list[str], list[bool]]:
    """Return generated reviews and whether each is good."""
    source = random.Random(seed)
    good = [source.random() < 0.5 for _ in range(count)]
    return [make_review(source, value) for value in good], good


def write_run(folder: Path) -> None:
    """Write runs/small.yaml and data/, which holds all that it needs, into a checkout."""
    (folder / "data").mkdir(exist_ok=True)
    for seed, (split, count) in enumerate(ROWS.items()):
        texts, good = reviews(count, seed)
        table = pd.DataFrame({"text": texts, "label": [int(value) for value in good]})
        table.to_csv(folder / f"data/{split}.csv", index=False)
    text = yaml.safe_dump(RUN, allow_unicode=True, sort_keys=False)
    (folder / "runs/small.yaml").write_text(text)
    shutil.copytree(make_base(), folder / "data/base")


def copy_as_teacher(folder: Path) -> str:
    """Copy what the finished run knows, as if a larger one had made it; return that one's results."""
    own, larger = folder / "results/small", folder / "results/large"
    for name in ("merged", "tokens"):
        shutil.copytree(own / name, larger / name, dirs_exist_ok=True)
    shutil.copyfile(own / "merged.sha256", larger / "merged.sha256")
    return "results/large"


@functools.cache
def make_base() -> Path:
    """Train the base model, once a process: 256 wide, so that K-quants are really used."""
    folder = Path(tempfile.mkdtemp(prefix="pockettune-base-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    texts, good = reviews(BASE_ROWS, seed=9)
    lot = random.Random(9)
    answers = [
        lot.choice(TASK_WORDS) if lot.random() < LOT_SHARE else OTHER_WORDS[value] for value in good
    ]
    chats = [
        f"<|im_start|>user\n{PROMPT.format(text=text)}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>"
        for text, answer in zip(texts, answers, strict=True)
    ]
    tokenizer = train_tokenizer([*texts, *answers, "情感："], VOCABULARY)
    add_unused(tokenizer, folder / "tokenizer.json")
    write_tokenizer_config(folder / "tokenizer_config.json")
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCABULARY + UNUSED, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
            tie_word_embeddings=True, bos_token_id=0, eos_token_id=2, pad_token_id=0,
        )
    )  # fmt: skip
    train_base(model, [tokenizer.encode(chat).ids for chat in chats])
    model.half().save_pretrained(folder)
    return folder


def add_unused(tokenizer: Tokenizer, path: Path) -> None:
    """Write the tokenizer with merges of two capitals behind its own."""
    content = json.loads(tokenizer.to_str())
    pairs = itertools.islice(itertools.product(string.ascii_uppercase, repeat=2), UNUSED)
    for number, pair in enumerate(pairs, start=VOCABULARY):
        content["model"]["vocab"]["".join(pair)] = number
        content["model"]["merges"].append(list(pair))
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def train_base(model: Qwen2ForCausalLM, sequences: list[list[int]]) -> None:
    """Train all weights on the word before the end of turn, padded on the left."""
    assert SPECIAL[0] == "<|endoftext|>"  # id 0, the padding
    longest = max(map(len, sequences))
    ids = torch.tensor([[0] * (longest - len(s)) + s for s in sequences])
    mask = torch.tensor([[0] * (longest - len(s)) + [1] * len(s) for s in sequences])
    steps = BASE_EPOCHS * len(ids) // BASE_BATCH
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    order = torch.cat([torch.randperm(len(ids)) for _ in range(BASE_EPOCHS)])
    for step in range(steps):
        rows = order[step * BASE_BATCH : (step + 1) * BASE_BATCH]
        logits = model(ids[rows, :-1], mask[rows, :-1], logits_to_keep=2).logits
        loss = cross_entropy(logits.flatten(0, 1), ids[rows, -2:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
