"""A short copy of a base model: the same configuration with a few layers and random weights.

What goes wrong with an architecture on its way to a phone goes wrong with a few layers too, in seconds.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pockettune.common import program
from pockettune.models.adapters import add_adapter
from pockettune.models.folder import copy_tokenizer

DEPTHS = ("num_hidden_layers", "n_layer", "num_layers")
# Of LoRA's second matrix, which begins at zero: enough to move logits far beyond rounding.
SPREAD = 0.05


def make_short(base: Path, adapter_settings: Mapping[str, Any], output: Path) -> int:
    """Write `output`/base, a short model of base's configuration, and `output`/adapter; return its layers."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    whole = AutoConfig.from_pretrained(base, trust_remote_code=False).to_dict()
    layers = count_kinds(whole)
    told = cut_layers(program.read_json(base / "config.json"), depth(whole), layers)
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


def depth(config: Mapping[str, Any]) -> int:
    """Return how many layers a configuration has; 0 where it does not say so by a known name."""
    return next((int(config[name]) for name in DEPTHS if config.get(name)), 0)


def count_kinds(config: Mapping[str, Any]) -> int:
    """Return the fewest layers, from the first on, among which every kind of layer is."""
    layers = depth(config)
    needed = int(config.get("first_k_dense_replace") or 0) + 1
    for kinds in of_layers(config, layers).values():
        needed = max(needed, *(kinds.index(kind) + 1 for kind in kinds))
    return min(needed, layers)


def of_layers(config: Mapping[str, Any], layers: int) -> dict[str, list[Any]]:
    """Return the keys that hold an entry for each layer."""
    lists = {key: value for key, value in config.items() if isinstance(value, list)}
    return {key: value for key, value in lists.items() if layers > 1 and len(value) == layers}


def cut_layers(config: Mapping[str, Any], layers: int, kept: int) -> dict[str, Any]:
    """Return the configuration of its first `kept` layers."""
    cut: dict[str, Any] = {k: value[:kept] for k, value in of_layers(config, layers).items()}
    cut |= {name: kept for name in DEPTHS if name in config}
    if "max_window_layers" in config:  # Qwen2's, of a window that it does not use
        cut["max_window_layers"] = min(kept, config["max_window_layers"])
    return {**config, **cut}
