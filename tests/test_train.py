"""Training on a tiny model: it learns, it repeats, it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from merge_adapter import merge_adapter
from pockettune.errors import UserError
from pockettune.models import load_model
from pockettune.prompts import Example, write_examples
from train_adapter import add_adapter, batch_loss, choose_precision, cut_batch, train_adapter

SETTINGS: dict[str, Any] = {
    "rank": 4, "alpha": 8, "dropout": 0.1, "target_modules": ["q_proj", "v_proj", "down_proj"],
    "learning_rate": 1e-2, "batch_size": 4, "gradient_accumulation": 1, "epochs": 8,
    "warmup_ratio": 0.1, "scheduler": "cosine", "seed": 3, "quantization": "none",
    "precision": "fp32",
}  # fmt: skip


def make_example(number: int) -> Example:
    """Its answer is told by its first token: 10 or 11 gives 7 or 9."""
    ids = [10 + number % 2, *(20 + number * k % 50 for k in range(number % 5 + 2))]
    answer = [7 + 2 * (number % 2), 2]
    return Example(str(number), "", ids, answer, "", seen=False, cut=False, defused=False)


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    folder = tmp_path / "tokens"
    folder.mkdir()
    write_examples(folder / "train.parquet", [make_example(n) for n in range(16)])
    return folder


def train(base: Path, tokens: Path, output: Path, **changes: Any) -> list[float]:
    train_adapter(SETTINGS | changes, base, tokens, threads=1, output=output)
    summary = json.loads((output / "training.json").read_text())
    return [update["loss"] for update in summary["updates"]]


def test_loss_falls_and_the_same_settings_give_the_same_bytes(
    tiny_model: Path, tokens: Path, tmp_path: Path
) -> None:
    losses = train(tiny_model, tokens, tmp_path / "a")
    assert len(losses) == 8 * 16 / 4
    assert losses[-1] < losses[0] / 3
    assert train(tiny_model, tokens, tmp_path / "b") == losses
    weights = [(tmp_path / n / "adapter_model.safetensors").read_bytes() for n in "ab"]
    assert weights[0] == weights[1]
    assert train(tiny_model, tokens, tmp_path / "c", seed=4) != losses


def test_accumulation_gives_the_gradient_of_the_whole_batch(tiny_model: Path) -> None:
    model = load_model(tiny_model, dtype=torch.float32)
    model = add_adapter(model, SETTINGS | {"dropout": 0.0}, tiny_model)
    generator = torch.Generator().manual_seed(1)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for parameter in parameters:  # B starts at zero, which would hide the gradient of A
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    examples = [make_example(n) for n in range(6)]
    gradients = []
    for size in (6, 4, 1):
        model.zero_grad()
        for part in cut_batch(examples, size, "cpu"):
            (batch_loss(model, part) * len(part) / len(examples)).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
    assert gradients[0].abs().max() > 1e-3
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], atol=1e-6, rtol=1e-4)


def test_four_bit_base_trains_and_merges_onto_sixteen_bits(
    tiny_model: Path, tokens: Path, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    losses = train(tiny_model, tokens, tmp_path / "adapter", quantization="nf4")
    assert losses[-1] < losses[0] / 2
    merge_adapter(tiny_model, tmp_path / "adapter", tmp_path / "merged")
    merged = load_model(tmp_path / "merged", dtype=torch.float32)
    assert {p.dtype for p in merged.parameters()} == {torch.float32}


def test_loss_that_is_not_finite_names_the_setting_and_leaves_nothing(
    tiny_model: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverged(model: torch.nn.Module, examples: list[Example]) -> torch.Tensor:
        return batch_loss(model, examples) * float("nan")

    monkeypatch.setattr("train_adapter.batch_loss", diverged)
    with pytest.raises(UserError, match=r"the loss became nan at update 1 of 32: lower"):
        train(tiny_model, tokens, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_unknown_target_module_is_named(tiny_model: Path) -> None:
    model = load_model(tiny_model, dtype=torch.float32)
    with pytest.raises(UserError, match=r"query_key_value not in model tiny; its layers are down"):
        add_adapter(model, SETTINGS | {"target_modules": ["query_key_value"]}, tiny_model)


def test_precision() -> None:
    assert choose_precision("fp32", "cpu") == "fp32"
    assert choose_precision("auto", "cpu") in ("bf16", "fp32")
    with pytest.raises(UserError, match=r"train\.precision fp16 needs a GPU"):
        choose_precision("fp16", "cpu")
