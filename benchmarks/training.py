"""Time training against TRL's SFTTrainer, on a model of Qwen2.5-0.5B's exact shape.

Six ways, each in a process of its own, in turn, over the same rows in the same chat format, with
LoRA of rank 8 on all linear layers and the loss on the answer alone:

    PocketTune                   as config.yaml has it
    PocketTune, recomputing      with train.gradient_checkpointing
    SFTTrainer                   as it comes: activations recomputed
    SFTTrainer bf16              with bf16 weights and bf16 autocast
    SFTTrainer bf16, keeping     the same with activations kept
    SFTTrainer fp32, keeping     nothing switched on, as transformers' own Trainer comes

    python benchmarks/training.py [--batch-sizes 4] [--updates 4] [--rounds 2]

Writes benchmarks/training.md. Tokens are those of the prompts and answers, whoever pads or repeats
what. With a GPU, memory is the GPU's. The rows are ChnSentiCorp's where benchmarks/chnsenticorp.yaml
finds them, else generated ones of the same length.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

import torch

from common import (
    ROOT,
    WORK,
    data_steps,
    default_settings,
    machine,
    make_data,
    make_model,
    measure,
    write_page,
)

MODEL = WORK / "model"
BF16 = {"bf16": True, "model_init_kwargs": {"dtype": "bfloat16"}}
FP32 = {"bf16": False, "model_init_kwargs": {"dtype": "float32"}}
THEIRS: dict[str, dict[str, Any]] = {  # SFTConfig's settings
    "SFTTrainer": {},
    "SFTTrainer bf16": BF16,
    "SFTTrainer bf16, keeping": BF16 | {"gradient_checkpointing": False},
    "SFTTrainer fp32, keeping": FP32 | {"gradient_checkpointing": False},
}
WAYS = ("PocketTune", "PocketTune, recomputing", *THEIRS)
REAL = WORK / "chnsenticorp"


def settings_of_run() -> dict[str, Any]:
    """Return config.yaml with ChnSentiCorp's files, or generated ones, as its dataset."""
    settings = default_settings()
    if REAL.is_dir():
        names = {"train": "train", "validation": "dev", "test": "test"}
        files = {split: str(REAL / f"{name}.tsv") for split, name in names.items()}
        settings["dataset"].update(files=files, text_column="text_a")
    return settings


def time_ours(rows: list[int], batch_size: int, recompute: bool) -> list[float]:
    """Return the seconds of each update on `rows`, `batch_size` at a time."""
    from pockettune.data.prompts import Examples
    from pockettune.models.adapters import add_adapter
    from pockettune.training import loop
    from train_adapter import choose_precision, load_base

    train = default_settings()["train"]
    train.update(batch_size=batch_size, gradient_checkpointing=recompute)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hardware = loop.Hardware(device, choose_precision(train["precision"], device))
    examples = Examples(WORK / "tokens/train.arrow")
    model = add_adapter(load_base(MODEL, train, hardware), train, MODEL)
    weights = loop.AnswerWeights(float(examples.count_answer_tokens().mean()))
    state = loop.start_training(model, train, hardware, len(rows) // batch_size)
    model.train()
    seconds = []
    for start in range(0, len(rows), batch_size):
        begun = time.perf_counter()
        batch = [examples[row] for row in rows[start : start + batch_size]]
        # Its loss is read, so that the device has ended its work.
        loop.make_update(model, batch, state, train, weights, hardware)
        seconds.append(time.perf_counter() - begun)
    return seconds


def time_theirs(rows: list[int], batch_size: int, options: dict[str, Any]) -> list[float]:
    """Return the seconds of each of SFTTrainer's updates on the same rows in the same order."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from pockettune.data.records import read_records
    from pockettune.tasks import load_task

    settings = settings_of_run()
    train, task = settings["train"], load_task(settings["task"], settings["dataset"])
    records = list(read_records(WORK / "dataset/train.jsonl"))
    chats = [
        {
            "prompt": task.prompt(records[row]),
            "completion": [{"role": "assistant", "content": task.answer(records[row])}],
        }
        for row in rows
    ]
    stamps: list[float] = []

    class Stamp(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            stamps.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            stamps.append(time.perf_counter())

    trainer = SFTTrainer(
        model=str(MODEL),
        train_dataset=Dataset.from_list(chats),
        args=SFTConfig(
            output_dir=str(WORK / "trl"),
            per_device_train_batch_size=batch_size,
            learning_rate=train["learning_rate"],
            max_length=settings["tokenize"]["max_length"],
            num_train_epochs=1,
            shuffle_dataset=False,
            train_sampling_strategy="sequential",
            save_strategy="no",
            report_to=[],
            use_cpu=not torch.cuda.is_available(),
            disable_tqdm=True,
            **options,
        ),
        peft_config=LoraConfig(
            r=train["rank"],
            lora_alpha=train["alpha"],
            lora_dropout=train["dropout"],
            target_modules=train["target_modules"],
            task_type="CAUSAL_LM",
        ),
        callbacks=[Stamp()],
    )
    trainer.train()
    return [end - begin for begin, end in zip(stamps[::2], stamps[1::2], strict=True)]


def run_one(way: str, batch_size: int, updates: int) -> dict[str, float]:
    """Train on a few updates in this process; the first, which warms up, is not counted."""
    from pockettune.data.prompts import Examples

    torch.set_num_threads(os.cpu_count() or 1)
    count = (updates + 1) * batch_size
    lengths = Examples(WORK / "tokens/train.arrow").count_tokens()
    rows = [index * len(lengths) // count for index in range(count)]
    if way.startswith("PocketTune"):
        seconds = time_ours(rows, batch_size, recompute=way.endswith("recomputing"))
    else:
        seconds = time_theirs(rows, batch_size, THEIRS[way])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    total = sum(seconds[1:])
    tokens = int(lengths[rows[batch_size:]].sum())
    return {
        "examples_a_second": updates * batch_size / total,
        "tokens_a_second": tokens / total,
        "peak_bytes": peak,
    }


def compare(batch_size: int, updates: int, rounds: int) -> list[str]:
    """Run every way in turn, `rounds` times; return a table's rows."""
    results: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way in WAYS:
            command = [sys.executable, __file__, "--only", way, "--batch-sizes", batch_size, "--updates", updates]  # fmt: skip
            output = subprocess.run(
                list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
            ).stdout
            results[way].append(json.loads(output.splitlines()[-1]))
            print(way, results[way][-1], flush=True)

    def median(way: str, key: str) -> float:
        return statistics.median(result[key] for result in results[way])

    lines = []
    for way in WAYS:
        rate, memory = median(way, "examples_a_second"), median(way, "peak_bytes")
        lines.append(
            f"| {way} | {batch_size} | {rate:.2f} | {median(way, 'tokens_a_second'):.0f}"
            f" | {memory / 1e9:.2f} | {median(WAYS[0], 'examples_a_second') / rate:.2f}"
            f" | {median(WAYS[0], 'peak_bytes') / memory:.2f} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[4])
    parser.add_argument("--updates", type=int, default=4, help="timed, after one to warm up")
    parser.add_argument("--rounds", type=int, default=2, help="each way is run this often, in turn")
    parser.add_argument("--only", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(run_one(arguments.only, arguments.batch_sizes[0], arguments.updates)))
        return
    make_model(MODEL)
    make_data(256)
    for command in data_steps(MODEL, json.dumps(settings_of_run(), ensure_ascii=False)).values():
        measure(command)
    lines = [row for size in arguments.batch_sizes for row in compare(size, arguments.updates, arguments.rounds)]  # fmt: skip
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else machine()
    write_page("training", [
        "# Training against TRL's SFTTrainer", "",
        f"Made by `make bench-train` on {device}: {arguments.updates} updates after one to warm up, {arguments.rounds}"
        f" rounds in turn, medians. Qwen2.5-0.5B's shape, random weights, {'ChnSentiCorp' if REAL.is_dir() else 'generated'} rows.", "",
        "| way | batch | examples/s | tokens/s | peak memory, GB | PocketTune is faster by | PocketTune's memory, share |",
        "|---|---|---|---|---|---|---|", *lines,
    ])  # fmt: skip


if __name__ == "__main__":
    main()
