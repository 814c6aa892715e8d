"""A short copy of a base model: the same configuration with a few layers and random weights.

What goes wrong with an architecture on its way to a phone goes wrong with a few layers too, in seconds.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pockettune.common import program
from pockettune.models.adapters import add_adapter
from pockettune.models.folder import copy_tokenizer
from pockettune.models.layers import count_kinds, cut_layers, depth

# Of LoRA's second matrix, which begins at zero: enough to move logits far beyond rounding.
SPREAD = 0.05


def make_short(base: Path, adapter_settings: Mapping[str, Any], output: Path) -> int:
    """Write `output`/base, a short model of base's configuration, and `output`/adapter; return its layers."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    whole = AutoConfig.from_pretrained(base, trust_remote_code=False).to_dict()
    layers = count_kinds(whole)
    told = cut_layers(program.read_json(base / "config.json"), depth(whole), range(layers))
    folder = output / "base"
    folder.mkdir(parents=True)
    program.write_json(folder / "config.json", told)
    copy_tokenizer(base, folder)
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    model.save_pretrained(folder)
    # As the hub has it: what transformers leaves out, the converter may ask for.
    program.write_json(folder / "config.json", told)
    adapted: Any = add_adapter(model, adapter_settings, base)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=SPREAD)
    adapted.save_pretrained(output / "adapter")
    return layers
