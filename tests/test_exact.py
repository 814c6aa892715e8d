"""A model whose weights stay in 16 bits computes the numbers of fp32."""

import argparse
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

import evaluate_model
from pockettune.common.errors import UserError
from pockettune.models.adapters import add_adapter
from pockettune.models.folder import load_model
from pockettune.runtimes import exact

PROMPT = torch.tensor([[5, 17, 301, 44, 9]])
NARROW = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
          "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}  # fmt: skip


def save_narrow(folder: Path, kind: str, dtype: torch.dtype) -> Path:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **NARROW)
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder / kind)
    return folder / kind


def without_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "free_memory", lambda: 10**6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "kind", ["qwen2", "qwen3", "llama", "gemma3_text", "phi3", "granite", "olmo2"]
)
def test_weights_that_stay_in_16_bits(
    kind: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_narrow(tmp_path, kind, dtype)
    whole = exact.load_exact(folder, attention="eager")
    without_memory(monkeypatch)
    narrow = exact.load_exact(folder, attention="eager")
    assert {p.dtype for p in whole.parameters()} == {torch.float32}
    with torch.inference_mode():
        expected, found = whole(PROMPT).logits, narrow(PROMPT).logits
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    assert {p.dtype for p in narrow.parameters()} == {dtype}, "and are narrow again afterwards"


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_adapter_beside_weights_in_16_bits(
    variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_narrow(tmp_path, "qwen2", torch.bfloat16)
    train = {"variant": variant, "rank": 4, "alpha": 16, "dropout": 0.0, "target_modules": "all-linear"}  # fmt: skip
    adapted: Any = add_adapter(load_model(folder, dtype=torch.float32), train, folder)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data += torch.randn(parameter.shape) * 0.05
    adapted.save_pretrained(tmp_path / "adapter")
    results = []
    for _ in range(2):
        model = exact.load_exact(folder, attention="eager")
        with torch.inference_mode():
            results.append(
                PeftModel.from_pretrained(model, tmp_path / "adapter").eval()(PROMPT).logits
            )
        without_memory(monkeypatch)
    torch.testing.assert_close(results[1], results[0], atol=1e-6, rtol=0)
    assert (results[0] - whole_base(folder)).abs().max() > 0.01, "the adapter must matter"


def whole_base(folder: Path) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = load_model(folder, dtype=torch.float32).eval()(PROMPT).logits
    return logits


def test_scoring_out_of_memory_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB\nmore lines")

    monkeypatch.setattr(evaluate_model, "load_exact", load)
    arguments = argparse.Namespace(model=Path("x"), adapter=None, threads=torch.get_num_threads())
    with (
        pytest.raises(
            UserError, match=r"^out of memory \(CUDA out of memory.*20 GiB\): run it where"
        ),
        evaluate_model.open_model(arguments, []),
    ):
        pass


def test_told_before_it_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save_narrow(tmp_path, "qwen2", torch.float16)
    caplog.set_level(logging.INFO)
    exact.load_exact(folder)
    assert "16 bits" not in caplog.text
    without_memory(monkeypatch)
    exact.load_exact(folder)
    assert (
        "weights stay in 16 bits, widened layer by layer: in fp32 they take 0.0 GB" in caplog.text
    )
