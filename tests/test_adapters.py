"""An adapter trained elsewhere: what fits is taken, and all that does not is named at once."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from import_adapter import import_adapter
from merge_adapter import merge_adapter
from pockettune.common.errors import UserError
from pockettune.models.adapters import WEIGHTS, check_adapter
from pockettune.models.folder import load_model


@pytest.fixture
def adapter(tiny_model: Path, tmp_path: Path) -> Path:
    """As another trainer leaves it: other target modules, other rank, a README beside it."""
    model = load_model(tiny_model, dtype=torch.float32)
    config = LoraConfig(r=6, lora_alpha=3, target_modules=["k_proj", "up_proj"], use_rslora=True)
    get_peft_model(model, config).save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


def change_config(adapter: Path, **values: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_adapter_is_taken_and_can_be_merged(
    adapter: Path, tiny_model: Path, tmp_path: Path
) -> None:
    import_adapter(adapter, tiny_model, tmp_path / "taken")
    summary = json.loads((tmp_path / "taken/training.json").read_text())
    # Two layers; k_proj is 256 -> 128, up_proj 256 -> 512; rank times (in + out).
    assert summary["trainable_parameters"] == 2 * 6 * (256 + 128 + 256 + 512)
    assert not (tmp_path / "taken/README.md").exists()
    merge_adapter(tiny_model, tmp_path / "taken", tmp_path / "merged")
    assert (tmp_path / "merged/model.safetensors").exists()


@pytest.mark.parametrize(
    "name", ["tiny", "somebody/Tiny", "unsloth/tiny-unsloth-bnb-4bit", "resources/models/tiny@7ae5"]
)
def test_names_of_the_same_base(name: str, adapter: Path, tiny_model: Path) -> None:
    change_config(adapter, base_model_name_or_path=name)
    check_adapter(adapter, tiny_model)


def test_all_faults_are_named_at_once(adapter: Path, tiny_model: Path, tmp_path: Path) -> None:
    change_config(adapter, base_model_name_or_path="Qwen/Qwen3-0.6B", bias="all")
    tensors = load_file(adapter / WEIGHTS)
    a, b = (n for n in tensors if "layers.0.mlp.up_proj" in n)
    tensors[a] = torch.zeros(6, 99)
    tensors[b.replace("layers.0", "layers.7")] = tensors.pop(b)
    save_file(tensors, adapter / WEIGHTS)
    with pytest.raises(UserError) as caught:
        import_adapter(adapter, tiny_model, tmp_path / "taken")
    for part in (
        "it was trained on Qwen/Qwen3-0.6B",
        "bias: all",
        "model.layers.0.mlp.up_proj: 99 wide at its input, the base 256",
        "model.layers.7.mlp.up_proj is no layer of the base",
        "lora_B.weight is missing",
    ):
        assert part in str(caught.value)
    assert not (tmp_path / "taken").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is IA3, only LORA"),
        ({"modules_to_save": ["lm_head"]}, "replaces whole layers (modules_to_save: lm_head)"),
    ],
)
def test_adapter_of_another_kind_is_refused(
    values: dict[str, Any], message: str, adapter: Path, tiny_model: Path
) -> None:
    change_config(adapter, **values)
    with pytest.raises(UserError) as caught:
        check_adapter(adapter, tiny_model)
    assert message in str(caught.value)


def test_folder_that_is_no_adapter(tiny_model: Path, adapter: Path) -> None:
    with pytest.raises(UserError, match=r"adapter_config\.json is missing; adapter_model\.saf"):
        check_adapter(tiny_model, tiny_model)
    (adapter / WEIGHTS).write_bytes((adapter / WEIGHTS).read_bytes()[:-10])
    with pytest.raises(UserError, match="is truncated"):
        check_adapter(adapter, tiny_model)
