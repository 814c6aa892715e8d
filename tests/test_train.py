"""The training program: it learns, repeats itself, goes on after a kill, and fails in one line."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import ROOT
from merge_adapter import merge_adapter
from pockettune.common.errors import UserError
from pockettune.data.prompts import Example, write_examples
from pockettune.models.adapters import add_adapter
from pockettune.models.folder import load_model
from pockettune.runtimes.packing import ATTENTION
from pockettune.training import loop
from pockettune.training.loop import batch_loss, cut_batch, is_out_of_memory
from train_adapter import choose_precision, train_adapter

TRAIN: dict[str, Any] = {
    "adapter": None, "variant": "lora", "rank": 4, "alpha": 8, "dropout": 0.1,
    "target_modules": ["q_proj", "v_proj", "down_proj"], "learning_rate": 1e-2,
    "batch_size": 4, "batch_tokens": None, "gradient_accumulation": 1, "epochs": 8,
    "warmup_ratio": 0.1, "scheduler": "cosine", "seed": 3, "quantization": "none",
    "gradient_checkpointing": False, "precision": "fp32",
    "eval_every": 1, "eval_limit": None, "patience": None,
}  # fmt: skip
TASK = {"type": "classification", "system": "", "prompt": "{text}", "labels": {"0": "差", "1": "好"}}  # fmt: skip
DATASET = {"text_column": "text", "label_column": "label"}
WORDS = {"差": [7, 2], "好": [9, 2]}


def make_example(number: int) -> Example:
    """Its answer is told by its first token: 10 or 11 gives 差 or 好."""
    word = list(WORDS)[number % 2]
    ids = [10 + number % 2, *(20 + number * k % 50 for k in range(number % 5 + 2))]
    return Example(str(number), "", ids, WORDS[word], word, seen=False, cut=False, defused=False)


def write_tokens(folder: Path) -> Path:
    folder.mkdir()
    write_examples(folder / "train.arrow", [make_example(n) for n in range(16)])
    write_examples(folder / "validation.arrow", [make_example(n) for n in range(16, 24)])
    answers = {"words": list(WORDS), "ids": list(WORDS.values())}
    (folder / "answers.json").write_text(json.dumps(answers))
    return folder


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    return write_tokens(tmp_path / "tokens")


def settings(**changes: Any) -> dict[str, Any]:
    return {"train": TRAIN | changes, "task": TASK, "dataset": DATASET}


def train(base: Path, tokens: Path, output: Path, **changes: Any) -> dict[str, Any]:
    scratch = output.with_name("scratch")
    train_adapter(settings(**changes), base, tokens, threads=1, scratch=scratch, output=output)
    summary: dict[str, Any] = json.loads((output / "training.json").read_text())
    return summary


def losses(summary: dict[str, Any]) -> list[float]:
    return [update["loss"] for update in summary["updates"]]


def weights(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def test_loss_falls_and_the_same_settings_give_the_same_bytes(
    tiny_model: Path, tokens: Path, tmp_path: Path
) -> None:
    first = train(tiny_model, tokens, tmp_path / "a")
    assert len(first["updates"]) == first["planned_updates"] == 8 * 16 / 4
    assert losses(first)[-1] < losses(first)[0] / 3
    assert losses(train(tiny_model, tokens, tmp_path / "b")) == losses(first)
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    assert losses(train(tiny_model, tokens, tmp_path / "c", seed=4)) != losses(first)


def test_memory_saving_settings_change_nothing(
    tiny_model: Path, tokens: Path, tmp_path: Path
) -> None:
    """Activations computed twice, and smaller passes, give the same updates."""
    plain = train(tiny_model, tokens, tmp_path / "a")
    twice = train(tiny_model, tokens, tmp_path / "b", gradient_checkpointing=True)
    assert losses(twice) == pytest.approx(losses(plain), rel=1e-4)
    smooth = train(tiny_model, tokens, tmp_path / "c", dropout=0)
    smaller = train(
        tiny_model, tokens, tmp_path / "d", dropout=0, batch_size=1, gradient_accumulation=4
    )
    assert losses(smaller) == pytest.approx(losses(smooth), rel=1e-3)


@pytest.mark.parametrize("variant", ["rslora", "dora"])
def test_variants_train_and_merge(
    variant: str, tiny_model: Path, tokens: Path, tmp_path: Path
) -> None:
    summary = train(tiny_model, tokens, tmp_path / "adapter", variant=variant)
    assert losses(summary)[-1] < losses(summary)[0] / 2
    merge_adapter(tiny_model, tmp_path / "adapter", tmp_path / "merged")
    assert (tmp_path / "merged/model.safetensors").exists()


def test_best_validation_is_exported_and_training_stops_early(
    tiny_model: Path, tokens: Path, tmp_path: Path
) -> None:
    """A rate that is far too high spoils what the first epochs learned."""
    summary = train(
        tiny_model, tokens, tmp_path / "adapter", epochs=30, learning_rate=0.05, patience=2
    )
    scores = [(v["accuracy"], -v["loss"]) for v in summary["validations"]]
    best = scores.index(max(scores))
    assert summary["exported_update"] == summary["validations"][best]["update"]
    assert len(scores) == best + 1 + 2, "two validations no better, and no more"
    assert len(summary["updates"]) < summary["planned_updates"]
    # The exported weights are those of that update: they score as they did then.
    untrained = settings(epochs=30, learning_rate=0.05)
    model = load_model(tiny_model, attention=ATTENTION, dtype=torch.float32)
    from peft import PeftModel

    from train_adapter import make_validator

    validator = make_validator(untrained, tokens, updates=120)
    assert validator is not None
    adapted = PeftModel.from_pretrained(model, tmp_path / "adapter")
    again = validator.score(adapted, loop.Hardware("cpu", "fp32"))
    assert again["loss"] == pytest.approx(-scores[best][1], rel=1e-5)


def test_rows_seen_in_train_choose_nothing(tokens: Path) -> None:
    from dataclasses import replace

    from train_adapter import make_validator

    rows = [replace(make_example(n), seen=n % 3 == 0) for n in range(16, 24)]
    write_examples(tokens / "validation.arrow", rows)
    validator = make_validator(settings(), tokens, updates=32)
    assert validator is not None
    assert [e.id for e in validator.examples] == ["16", "17", "19", "20", "22", "23"]
    assert validator.interval == 4
    assert make_validator(settings(eval_every=None), tokens, updates=32) is None


# --- killed and resumed ---


def start_program(base: Path, tokens: Path, folder: Path) -> subprocess.Popen[str]:
    """Start the program as the rule does, a checkpoint after every update."""
    command = [
        sys.executable, ROOT / "scripts/train_adapter.py",
        "--settings", json.dumps(settings(epochs=40)), "--base", base, "--tokens", tokens,
        "--threads", "1", "--scratch", folder / "scratch", "--save-every", "0",
        "--output", folder / "adapter", "--log", folder / "log",
    ]  # fmt: skip
    return subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for_updates(folder: Path, process: subprocess.Popen[str], count: int) -> None:
    """Wait until `count` more checkpoints than now have been written."""
    seen, last = 0, 0
    while seen < count and process.poll() is None:
        written = max((p.stat().st_mtime_ns for p in folder.rglob("checkpoint.pt")), default=0)
        seen, last = seen + (written != last), written
        time.sleep(0.002)


@pytest.fixture(scope="module")
def undisturbed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tokens/, and the adapter of a training that nothing disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    process = start_program(tiny_model, write_tokens(folder / "tokens"), folder)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return folder


@pytest.mark.parametrize(
    ("number", "times"), [(signal.SIGKILL, 3), (signal.SIGTERM, 1)], ids=["kill -9", "SIGTERM"]
)
def test_killed_training_goes_on_to_the_same_adapter(
    number: signal.Signals, times: int, tiny_model: Path, undisturbed: Path, tmp_path: Path
) -> None:
    killed, tokens = tmp_path, undisturbed / "tokens"
    for seed in range(times):
        process = start_program(tiny_model, tokens, killed)
        wait_for_updates(killed, process, random.Random(seed).randint(2, 30))
        process.send_signal(number)
        output, _ = process.communicate()
        assert not (killed / "adapter").exists(), "killed before the end"
        if number == signal.SIGTERM:
            assert process.returncode == 128 + signal.SIGTERM
            assert "the same command goes on from there" in output
    process = start_program(tiny_model, tokens, killed)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert weights(killed / "adapter") == weights(undisturbed / "adapter")
    summaries = [
        json.loads((f / "adapter/training.json").read_text()) for f in (killed, undisturbed)
    ]
    assert [s["resumed"] for s in summaries] == [times, 0]
    for name in ("updates", "validations", "exported_update"):
        assert summaries[0][name] == summaries[1][name]
    assert not list((killed / "scratch").rglob("*.pt")), "a finished training needs no checkpoint"


def test_other_settings_begin_anew(tiny_model: Path, tokens: Path, tmp_path: Path) -> None:
    process = start_program(tiny_model, tokens, tmp_path)
    wait_for_updates(tmp_path, process, 3)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    (checkpoint,) = (tmp_path / "scratch").rglob("checkpoint.pt")
    assert train(tiny_model, tokens, tmp_path / "adapter", epochs=39)["resumed"] == 0
    assert checkpoint.exists(), "the other training may still be wanted"
    assert train(tiny_model, tokens, tmp_path / "adapter", epochs=40)["resumed"] == 1


# --- parts ---


def test_accumulation_gives_the_gradient_of_the_whole_batch(tiny_model: Path) -> None:
    model = load_model(tiny_model, attention=ATTENTION, dtype=torch.float32)
    model = add_adapter(model, TRAIN | {"dropout": 0.0}, tiny_model)
    generator = torch.Generator().manual_seed(1)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for parameter in parameters:  # B starts at zero, which would hide the gradient of A
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    examples = [make_example(n) for n in range(6)]
    gradients = []
    for size in (6, 4, 1):
        model.zero_grad()
        for part in cut_batch(examples, TRAIN | {"batch_size": size}, "cpu"):
            (batch_loss(model, part) * len(part) / len(examples)).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
    assert gradients[0].abs().max() > 1e-3
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], atol=1e-6, rtol=1e-4)


def test_four_bit_base_trains_and_merges_onto_sixteen_bits(
    tiny_model: Path, tokens: Path, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    summary = train(tiny_model, tokens, tmp_path / "adapter", quantization="nf4")
    assert losses(summary)[-1] < losses(summary)[0] / 2
    merge_adapter(tiny_model, tmp_path / "adapter", tmp_path / "merged")
    merged = load_model(tmp_path / "merged", dtype=torch.float32)
    assert {p.dtype for p in merged.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("modules", "parameters"),
    [
        (["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], 4_399_104),
        (["q_proj", "k_proj", "v_proj", "o_proj"], 1_081_344),
    ],
)
def test_trainable_parameters_of_the_default_model(modules: list[str], parameters: int) -> None:
    from transformers import AutoModelForCausalLM, Qwen2Config

    shape = Qwen2Config(
        vocab_size=151_936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
        num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape)
        model = add_adapter(model, TRAIN | {"rank": 8, "target_modules": modules}, Path("x"))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == parameters


# --- failing ---


def test_loss_that_is_not_finite_names_the_setting_and_leaves_nothing(
    tiny_model: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverged(model: torch.nn.Module, examples: list[Example]) -> torch.Tensor:
        return batch_loss(model, examples) * float("nan")

    monkeypatch.setattr(loop, "batch_loss", diverged)
    with pytest.raises(UserError, match=r"the loss became nan at update 1: lower train\.learning_"):
        train(tiny_model, tokens, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_memory_that_runs_out_names_the_settings_and_leaves_nothing(
    tiny_model: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def greedy(model: torch.nn.Module, examples: list[Example]) -> torch.Tensor:
        return torch.empty(2**60)  # the allocator's own error

    monkeypatch.setattr(loop, "batch_loss", greedy)
    with pytest.raises(UserError, match=r"out of memory .*: lower train\.batch_size \(4\) and"):
        train(tiny_model, tokens, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_what_counts_as_out_of_memory() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes cannot be multiplied"))


def test_unknown_target_module_is_named(tiny_model: Path) -> None:
    model = load_model(tiny_model, dtype=torch.float32)
    with pytest.raises(UserError, match=r"query_key_value not in model tiny; its layers are down"):
        add_adapter(model, TRAIN | {"target_modules": ["query_key_value"]}, tiny_model)


def test_precision() -> None:
    assert choose_precision("fp32", "cpu") == "fp32"
    assert choose_precision("auto", "cpu") in ("bf16", "fp32")
    with pytest.raises(UserError, match=r"train\.precision fp16 needs a GPU"):
        choose_precision("fp16", "cpu")


def test_layers_that_no_adapter_can_change_are_named(tiny_model: Path) -> None:
    """A tied head or embedding would be another model after merging; a block is no layer."""
    model = load_model(tiny_model, dtype=torch.float32)
    for wanted in (["lm_head"], ["embed_tokens"], ["mlp"]):
        with pytest.raises(
            UserError, match=rf"{wanted[0]}.* not in model tiny; its layers are down_"
        ):
            add_adapter(model, TRAIN | {"target_modules": ["q_proj", *wanted]}, tiny_model)


def test_all_linear_layers_of_another_architecture() -> None:
    """GPT-2 has no q_proj: the error says what it has, and all-linear takes it."""
    from transformers import AutoModelForCausalLM, GPT2Config

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(GPT2Config(n_layer=2, n_embd=64, n_head=2))
    message = r"q_proj.* not in model x; its layers are c_attn, c_fc, c_proj, and all-linear"
    with pytest.raises(UserError, match=message):
        add_adapter(model, TRAIN, Path("x"))
    adapted = add_adapter(model, TRAIN | {"target_modules": "all-linear"}, Path("x"))
    targets = {
        n.split(".lora_A")[0].rpartition(".")[2]
        for n, _ in adapted.named_parameters()
        if "lora_A" in n
    }
    assert targets == {"c_attn", "c_fc", "c_proj"}
