"""Merging an adapter: by numbers a reader can check, and by equal logits."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

from merge_adapter import carry_config, check_shape, merge_adapter
from pockettune.common.errors import UserError
from pockettune.models import merging, shards
from pockettune.models.adapters import add_adapter
from pockettune.models.folder import load_model, read_header, weight_files

PROMPT = torch.tensor([[5, 17, 301, 44, 9]])


def make_adapter(base: Path, output: Path, scale: float = 0.05) -> Path:
    """Write an adapter whose B is not zero, as it would be before training."""
    model = load_model(base, dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]))  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            weight.data = torch.randn(weight.shape, generator=generator) * scale
    adapted.save_pretrained(str(output))
    return output


def test_merged_weight_by_hand(tiny_model: Path, tmp_path: Path) -> None:
    """W is 3 everywhere, A = (1 2 3 4 0 …), B = (5 6 7 0 …)ᵀ, alpha / r = 8 / 4 = 2: W + 2 B A."""
    base, name = tmp_path / "base", "model.layers.0.self_attn.q_proj.weight"
    base.mkdir()
    for path in tiny_model.iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    weights = load_file(base / "model.safetensors")
    weights[name] = torch.full_like(weights[name], 3)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    adapter = make_adapter(base, tmp_path / "adapter", scale=0)
    tensors = load_file(adapter / "adapter_model.safetensors")
    a = next(k for k in tensors if "layers.0.self_attn.q_proj.lora_A" in k)
    tensors[a][0, :4] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    tensors[a.replace("lora_A", "lora_B")][:3, 0] = torch.tensor([5.0, 6.0, 7.0])
    save_file(tensors, adapter / "adapter_model.safetensors")

    merge_adapter(base, adapter, tmp_path / "merged")

    merged = load_file(tmp_path / "merged/model.safetensors")
    assert merged[name][:4, :5].tolist() == [
        [13, 23, 33, 43, 3],  # 3 + 2·5·1, 3 + 2·5·2, …
        [15, 27, 39, 51, 3],
        [17, 31, 45, 59, 3],
        [3, 3, 3, 3, 3],
    ]
    assert merged.keys() == weights.keys()
    untouched = [key for key in weights if key != name]
    assert all(torch.equal(merged[key], weights[key]) for key in untouched)


def test_merged_logits_are_those_of_base_and_adapter(tiny_model: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tiny_model, tmp_path / "adapter")
    merge_adapter(tiny_model, adapter, tmp_path / "merged")
    base = load_model(tiny_model, dtype=torch.float32).eval()
    with torch.inference_mode():
        plain = base(PROMPT).logits
        adapted = PeftModel.from_pretrained(base, adapter).eval()(PROMPT).logits
        merged = load_model(tmp_path / "merged", dtype=torch.float32).eval()(PROMPT).logits
    assert (adapted - plain).abs().max() > 0.1, "the adapter must matter for this test to mean anything"  # fmt: skip
    # The merged weights are rounded to FP16 once: 2^-11 of each weight.
    torch.testing.assert_close(merged, adapted, atol=2e-3, rtol=0)


def test_merged_folder_keeps_tokenizer_bytes_and_tied_embedding(
    tiny_model: Path, tmp_path: Path
) -> None:
    merged = tmp_path / "merged"
    merge_adapter(tiny_model, make_adapter(tiny_model, tmp_path / "adapter"), merged)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (merged / name).read_bytes() == (tiny_model / name).read_bytes()
    assert "lm_head.weight" not in read_header(merged / "model.safetensors")
    assert json.loads((merged / "config.json").read_text())["dtype"] == "float16"
    assert {e["dtype"] for e in read_header(merged / "model.safetensors").values()} == {"F16"}


def test_untied_or_resized_embedding_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    weights = load_file(tiny_model / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    save_file({**weights, "lm_head.weight": embedding.clone()}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"added lm_head\.weight.*untied"):
        check_shape(tiny_model, tmp_path)
    padded = torch.cat([embedding, embedding[:1]])
    save_file({**weights, "model.embed_tokens.weight": padded}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"from \[512, 256\] to \[513, 256\]"):
        check_shape(tiny_model, tmp_path)


def test_weight_beyond_fp16_is_refused() -> None:
    with pytest.raises(UserError, match="q_proj reaches 7e\\+04, FP16 ends at 65504"):
        merging.round_to_fp16("q_proj", torch.tensor([70_000.0]))


def merge_whole(base: Path, adapter: Path, output: Path) -> None:
    """Merge with the whole model in memory, as PEFT's documentation does."""
    adapted: Any = PeftModel.from_pretrained(load_model(base, dtype=torch.float32), adapter)
    merged = adapted.merge_and_unload(safe_merge=True).half()
    merged.save_pretrained(output)


@pytest.mark.parametrize("variant", ["lora", "rslora", "dora"])
@pytest.mark.parametrize("kind", ["tied", "untied, in bf16", "transposed, names cut short"])
def test_merged_tensor_by_tensor_as_whole(
    variant: str, kind: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The very numbers of PEFT's merge of the whole model, also where they fill several files."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    make_base(kind, tiny_model, base)
    train = {"variant": variant, "rank": 4, "alpha": 16, "dropout": 0.0, "target_modules": "all-linear"}  # fmt: skip
    adapted: Any = add_adapter(load_model(base, dtype=torch.float32), train, base)
    torch.manual_seed(2)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data += torch.randn(parameter.shape) * 0.05
    adapted.save_pretrained(adapter)

    merge_whole(base, adapter, tmp_path / "whole")
    merge_adapter(base, adapter, tmp_path / "merged")
    monkeypatch.setattr(shards, "SHARD", 60_000)
    merge_adapter(base, adapter, tmp_path / "sharded")

    whole, merged = load_all(tmp_path / "whole"), load_all(tmp_path / "merged")
    assert whole.keys() == merged.keys()
    assert all(torch.equal(merged[name], whole[name]) for name in whole)
    assert len(weight_files(tmp_path / "sharded")) > 3
    sharded = load_all(tmp_path / "sharded")
    assert sharded.keys() == merged.keys()
    assert all(torch.equal(sharded[name], merged[name]) for name in merged)
    loaded = [load_model(tmp_path / n, dtype=torch.float32).eval() for n in ("whole", "sharded")]
    with torch.inference_mode():
        assert torch.equal(*(model(PROMPT).logits for model in loaded))


def make_base(kind: str, tiny_model: Path, base: Path) -> None:
    """Write a small model: Qwen2's, the same with a head of its own, or GPT-2 as it was published."""
    shutil.copytree(tiny_model, base)
    if kind == "tied":
        return
    (base / "model.safetensors").unlink()
    torch.manual_seed(1)
    sizes: Any = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    if kind.startswith("untied"):
        config: Any = Qwen2Config(**sizes, tie_word_embeddings=False)
        Qwen2ForCausalLM(config).bfloat16().save_pretrained(base)
        return
    config = GPT2Config(vocab_size=512, n_positions=64, n_embd=64, n_layer=2, n_head=4)
    GPT2LMHeadModel(config).save_pretrained(base)
    weights = load_file(base / "model.safetensors")
    cut = {name.removeprefix("transformer."): weight for name, weight in weights.items()}
    save_file(cut, base / "model.safetensors", metadata={"format": "pt"})


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    """Return all weights; of GPT-2 by their short names, as it was published."""
    stored = {k: v for path in weight_files(folder) for k, v in load_file(path).items()}
    return {name.removeprefix("transformer."): weight for name, weight in stored.items()}


def test_base_without_a_layer_that_the_adapter_has_is_refused(
    tiny_model: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_model, tmp_path / "adapter")
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    weights = load_file(base / "model.safetensors")
    weights["model.layers.0.renamed.weight"] = weights.pop("model.layers.0.self_attn.q_proj.weight")
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"stores no weight of model\.layers\.0\.self_attn\.q_proj"):
        merge_adapter(base, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_adapter_with_nan_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tiny_model, tmp_path / "adapter", scale=float("nan"))
    with pytest.raises(UserError, match="NaN"):
        merge_adapter(tiny_model, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_config_keeps_what_the_converter_asks_for(tiny_model: Path, tmp_path: Path) -> None:
    """GPT-2's n_ctx, which transformers does not save."""
    for name, added in (("base", {"n_ctx": 512, "n_special": 1}), ("merged", {})):
        (tmp_path / name).mkdir()
        config = json.loads((tiny_model / "config.json").read_text())
        (tmp_path / name / "config.json").write_text(json.dumps({**config, **added}))
    carry_config(tmp_path / "base", tmp_path / "merged")
    merged = json.loads((tmp_path / "merged/config.json").read_text())
    assert merged == {**config, "n_ctx": 512}
