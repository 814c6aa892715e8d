"""Show how time and memory grow with the rows: fetch, tokenize, and a fixed number of updates.

    python benchmarks/growth.py [--rows 1000 10000 100000 1000000]

On a random model of 2 million parameters, generated reviews, 40 updates of 16 rows each.
Writes benchmarks/growth.md.
"""

import argparse
import json
import os
import random

from common import (
    WORK,
    apart,
    data_steps,
    default_settings,
    machine,
    make_data,
    measure,
    program,
    step,
    write_page,
)

UPDATES, BATCH = 40, 16
BASE = WORK / "small"


def make_base() -> None:
    """Write the model, 256 wide and three layers deep, with a tokenizer of 1,024 tokens."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from generated import make_review, train_tokenizer, write_tokenizer_config

    torch.manual_seed(0)
    source = random.Random(0)
    tokenizer = train_tokenizer([make_review(source, i % 2 == 0) for i in range(3000)], 1024)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=1024, hidden_size=256, intermediate_size=512, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
            tie_word_embeddings=True, bos_token_id=0, eos_token_id=2, pad_token_id=0,
        )
    )  # fmt: skip
    with program.staged(BASE) as partial:
        model.half().save_pretrained(partial)
        tokenizer.save(str(partial / "tokenizer.json"))
        write_tokenizer_config(partial / "tokenizer_config.json")


def measure_rows(rows: int) -> str:
    """Return a table's row for a dataset of this many rows."""
    apart(make_data, rows)
    settings = default_settings()
    settings["train"].update(
        batch_size=BATCH, epochs=UPDATES * BATCH / rows, eval_every=None, learning_rate=2e-3
    )
    text = json.dumps(settings, ensure_ascii=False)
    steps = data_steps(BASE, text)
    fetched = measure(steps["fetch_dataset"])
    tokenized = measure(steps["tokenize"])
    trained = measure(
        step("train_adapter", "--settings", text, "--base", BASE, "--tokens", WORK / "tokens", "--threads",
             os.cpu_count(), "--scratch", WORK / "scratch", "--output", WORK / "adapter")
    )  # fmt: skip
    size = sum(path.stat().st_size for path in (WORK / "tokens").iterdir())
    return (
        f"| {rows:,} | {fetched.seconds:.1f} | {fetched.peak_bytes / 1e6:.0f} | {tokenized.seconds:.1f} | {tokenized.peak_bytes / 1e6:.0f} | {size / 1e6:.1f}"
        f" | {trained.seconds:.1f} | {trained.peak_bytes / 1e6:.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000])
    arguments = parser.parse_args()
    apart(make_base)
    lines = [measure_rows(rows) for rows in arguments.rows]
    write_page("growth", [
        "# Rows, time and memory", "",
        f"Made by `python benchmarks/growth.py` on {machine()}: a random model of 2 M parameters, generated reviews;"
        f" rows to train on, half as many in test; {UPDATES} updates of {BATCH} rows.", "",
        "| rows | fetch, s | fetch, peak MB | tokenize, s | tokenize, peak MB | tokens/, MB | train, s | train, peak MB |",
        "|---|---|---|---|---|---|---|---|", *lines,
    ])  # fmt: skip


if __name__ == "__main__":
    main()
