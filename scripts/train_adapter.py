"""Train a LoRA (or QLoRA) adapter to give the task's answer behind the prompt.

The answer is a token or two behind a prompt of about a hundred, so logits are computed where an
answer token is predicted and nowhere else, and sequences are laid end to end instead of padded
(pockettune.packing). Loss: cross-entropy, mean over an answer's tokens, then over the examples.

Input   the base model; the folder tokens/
Output  a PEFT adapter folder (adapter_config.json, adapter_model.safetensors) with training.json:
        loss and learning rate by update, trainable parameters, seconds, peak memory
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch.nn.functional import cross_entropy
from transformers import BitsAndBytesConfig, get_scheduler, set_seed

from pockettune import metrics, program
from pockettune.errors import UserError
from pockettune.models import load_model
from pockettune.packing import TOKENS_A_PASS, group_by_tokens, packed_logits
from pockettune.prompts import Example, read_examples

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
GRADIENT_NORM_LIMIT = 1.0  # the usual clip; keeps one odd batch from undoing the rest


def train_adapter(
    settings: Mapping[str, Any], base: Path, tokens: Path, threads: int, output: Path
) -> None:
    """Train on tokens/train.parquet and write the adapter folder."""
    torch.set_num_threads(threads)
    set_seed(settings["seed"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    precision = choose_precision(settings["precision"], device)
    examples = read_examples(tokens / "train.parquet")
    model = add_adapter(load_base(base, settings, precision, device), settings, base)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    program.logger.info(
        "%d examples, %s trainable parameters, %s on %s",
        len(examples), f"{trainable:,}", precision, device,
    )  # fmt: skip
    started = time.perf_counter()
    history = run_updates(model, examples, settings, precision, device)
    with program.staged(output) as partial:
        model.save_pretrained(partial)  # type: ignore[operator]  # PEFT wraps a Module
        summary = {
            "examples": len(examples),
            "trainable_parameters": trainable,
            "precision": precision,
            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
            "seconds": round(time.perf_counter() - started, 2),
            "peak_memory_bytes": peak_memory(device),
            "provenance": metrics.provenance("torch", "transformers", "peft"),
            "updates": history,
        }
        program.write_json(partial / "training.json", summary)
    program.logger.info("loss %.4f after %d updates", history[-1]["loss"], len(history))


def choose_precision(wanted: str, device: str) -> str:
    """Return the number format to compute in; `auto` takes bf16 where the hardware has it."""
    if wanted == "fp16" and device == "cpu":
        raise UserError("train.precision fp16 needs a GPU; on a CPU use auto, bf16 or fp32")
    if wanted != "auto":
        return wanted
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    # Emulated bf16 is slower than fp32, so ask for the instructions themselves.
    capable = torch.cpu.get_capabilities()
    return "bf16" if capable.get("avx512_bf16") or capable.get("amx_bf16") else "fp32"


def load_base(
    base: Path, settings: Mapping[str, Any], precision: str, device: str
) -> torch.nn.Module:
    """Load the frozen base, in 4 bits if asked."""
    dtype = DTYPES[precision]
    if settings["quantization"] == "none":
        model = load_model(base, dtype=dtype)
        return model.to(device)
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    model = load_model(base, dtype=dtype, quantization_config=nf4, device_map=device)
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def add_adapter(model: torch.nn.Module, settings: Mapping[str, Any], base: Path) -> torch.nn.Module:
    """Return the model with a fresh LoRA adapter, whose own parameters are fp32."""
    names = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    unknown = [name for name in settings["target_modules"] if name not in names]
    if unknown:
        raise UserError(
            f"train.target_modules: {', '.join(unknown)} not in model {base.name};"
            f" its layers are {', '.join(sorted(n for n in names if n.endswith('_proj')))}"
        )
    lora = LoraConfig(
        r=settings["rank"],
        lora_alpha=settings["alpha"],
        lora_dropout=settings["dropout"],
        target_modules=settings["target_modules"],
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, lora)


def batch_loss(model: torch.nn.Module, examples: Sequence[Example]) -> torch.Tensor:
    """Return the mean over examples of each one's mean cross-entropy over its answer tokens."""
    sequences = [[*e.prompt_ids, *e.answer_ids[:-1]] for e in examples]
    # The token at position p is predicted at p - 1: the answer's first one at the prompt's last.
    positions = [
        range(len(e.prompt_ids) - 1, len(s)) for e, s in zip(examples, sequences, strict=True)
    ]
    logits = packed_logits(model, sequences, positions)
    targets = torch.tensor([t for e in examples for t in e.answer_ids], device=logits.device)
    weights = [1 / len(e.answer_ids) for e in examples for _ in e.answer_ids]
    losses = cross_entropy(logits.float(), targets, reduction="none")
    return (losses * torch.tensor(weights, device=logits.device)).sum() / len(examples)


def draw_batches(
    examples: Sequence[Example], batch_size: int, epochs: float, seed: int
) -> Iterator[list[Example]]:
    """Yield batches in a new random order each epoch; the last of an epoch may be smaller."""
    generator = torch.Generator().manual_seed(seed)
    remaining = math.ceil(math.ceil(len(examples) / batch_size) * epochs)
    while remaining > 0:
        order = torch.randperm(len(examples), generator=generator).tolist()
        for start in range(0, len(order), batch_size):
            if remaining == 0:
                return
            yield [examples[i] for i in order[start : start + batch_size]]
            remaining -= 1


def cut_batch(batch: list[Example], batch_size: int, device: str) -> Iterator[list[Example]]:
    """Cut an update's examples into forward passes that the setting and the hardware allow.

    The gradient does not depend on the cuts.
    """
    for start in range(0, len(batch), batch_size):
        part = batch[start : start + batch_size]
        yield from group_by_tokens(part, TOKENS_A_PASS[device], lambda e: len(e.prompt_ids))


def run_updates(
    model: torch.nn.Module,
    examples: Sequence[Example],
    settings: Mapping[str, Any],
    precision: str,
    device: str,
) -> list[dict[str, float]]:
    """Train; return loss and learning rate of every update. UserError where the loss is NaN."""
    batch_size = settings["batch_size"] * settings["gradient_accumulation"]
    batches = list(draw_batches(examples, batch_size, settings["epochs"], settings["seed"]))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=settings["learning_rate"], weight_decay=0.0, fused=True
    )
    warmup = round(settings["warmup_ratio"] * len(batches))
    scheduler = get_scheduler(settings["scheduler"], optimizer, warmup, len(batches))
    scaler = torch.amp.GradScaler(device, enabled=precision == "fp16")
    history: list[dict[str, float]] = []
    model.train()
    for batch in program.progress(batches, description="training", unit="updates"):
        loss = 0.0
        for passed in cut_batch(batch, settings["batch_size"], device):
            with torch.autocast(device, DTYPES[precision], enabled=precision != "fp32"):
                part = batch_loss(model, passed) * (len(passed) / len(batch))
            scaler.scale(part).backward()
            loss += part.item()
        if not math.isfinite(loss):
            raise UserError(
                f"the loss became {loss} at update {len(history) + 1} of {len(batches)}: lower "
                f"train.learning_rate ({settings['learning_rate']}) or set train.precision to fp32"
            )
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(parameters, GRADIENT_NORM_LIMIT)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        history.append({"loss": loss, "learning_rate": scheduler.get_last_lr()[0]})
        scheduler.step()
    return history


def peak_memory(device: str) -> int | None:
    """Return the most memory held so far, in bytes: the GPU's, or this process's; None unknown."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return None
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main() -> None:
    parser = program.argument_parser(__doc__)
    parser.add_argument("--settings", type=json.loads, required=True, help="section train")
    parser.add_argument("--base", type=Path, required=True, help="base model's folder")
    parser.add_argument("--tokens", type=Path, required=True, help="folder of tokenize_dataset.py")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True, help="adapter folder to make")

    def work(a: argparse.Namespace) -> None:
        train_adapter(a.settings["train"], a.base, a.tokens, a.threads, a.output)

    program.run(parser, work)


if __name__ == "__main__":
    main()
