"""A base of fewer layers: the same numbers as the model whose other layers are taken out."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fetch_model import fetch_model
from pockettune.common.errors import UserError
from pockettune.models import shards
from pockettune.models.folder import check_model_folder, load_model, weight_files
from pockettune.models.layers import choose_layers
from shrink_model import shrink_model

PROMPT = torch.tensor([[5, 17, 301, 44, 9]])
NARROW: Any = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6,
               "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}  # fmt: skip
KINDS = {
    "qwen2": {},
    "gemma3_text": {"sliding_window": 3, "head_dim": 16},  # every sixth layer sees all
    "gpt2": {"n_embd": 64, "n_layer": 6, "n_head": 4, "n_positions": 64, "num_hidden_layers": None},
}


def make_base(kind: str, tokenizer: Path, folder: Path) -> Path:
    torch.manual_seed(0)
    settings = {k: v for k, v in (NARROW | KINDS[kind]).items() if v is not None}
    config = AutoConfig.for_model(kind, **settings)
    made = shutil.copytree(tokenizer, folder / "made")
    (made / "model.safetensors").unlink()
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(made)
    model_settings = {"path": str(made), "name": None, "revision": None, "chat_template": None}
    fetch_model(model_settings, folder / "downloads", folder / "base")
    return folder / "base"


@pytest.mark.parametrize("keep", [4, [0, 2, 5]], ids=str)
@pytest.mark.parametrize("kind", list(KINDS))
def test_computes_as_the_base_without_the_other_layers(
    kind: str,
    keep: int | list[int],
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = make_base(kind, tiny_model, tmp_path)
    monkeypatch.setattr(shards, "SHARD", 60_000)
    shrink_model(base, keep, tmp_path / "short")
    check_model_folder(tmp_path / "short")
    assert len(weight_files(tmp_path / "short")) > 1

    whole: Any = load_model(base, dtype=torch.float32).eval()
    inner = whole.model if kind != "gpt2" else whole.transformer
    name = "layers" if kind != "gpt2" else "h"
    kept = range(keep) if isinstance(keep, int) else keep
    setattr(inner, name, torch.nn.ModuleList([getattr(inner, name)[i] for i in kept]))
    whole.config.num_hidden_layers = len(kept)
    if kind == "gemma3_text":
        whole.config.layer_types = [whole.config.layer_types[i] for i in kept]
    short: Any = load_model(tmp_path / "short", dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = whole(PROMPT, use_cache=False).logits
        assert torch.equal(short(PROMPT, use_cache=False).logits, expected)
    source = json.loads((tmp_path / "short/source.json").read_text())
    assert source["layers"] == 6 and source["kept_layers"] == list(kept)
    assert set(source["sha256"]) == {path.name for path in weight_files(tmp_path / "short")}


@pytest.mark.parametrize("keep", [99, 7, [0, 6], [2, 1], [1, 1]], ids=str)
def test_layers_that_are_not_there_are_refused(keep: int | list[int]) -> None:
    with pytest.raises(UserError, match="the model has 6 layers; give a number up to 6, or a list"):
        choose_layers(keep, 6)
    assert choose_layers(6, 6) == list(range(6))
