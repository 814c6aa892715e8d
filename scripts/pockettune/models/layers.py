"""The layers of a model: how many, of which kinds, and a configuration of some of them."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pockettune.common import program
from pockettune.common.errors import UserError

if TYPE_CHECKING:
    from torch.nn import Module

DEPTHS = ("num_hidden_layers", "n_layer", "num_layers")
# A tensor's layer in its name: Llama and most, GPT-2, MPT.
NUMBER = re.compile(r"(?P<before>(?:^|\.)(?:layers|h|blocks)\.)(?P<number>\d+)(?=\.)")


def read_configs(base: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the configuration as transformers completes it, and as the base tells it: with an entry
    for each layer also where the base leaves to a rule which layer is of which kind."""
    from transformers import AutoConfig

    whole = AutoConfig.from_pretrained(base, trust_remote_code=False).to_dict()
    return whole, of_layers(whole, depth(whole)) | program.read_json(base / "config.json")


def choose_layers(keep: int | Sequence[int], layers: int) -> list[int]:
    """Return the layers to keep, ascending; UserError where there are no such layers."""
    kept = list(range(keep)) if isinstance(keep, int) else list(keep)
    if not layers:
        raise UserError(
            "model.keep_layers: the model's config.json does not say how many layers it has"
        )
    if kept[-1] >= layers or kept != sorted(set(kept)):
        raise UserError(
            f"model.keep_layers {keep}: the model has {layers} layers; give a number up to {layers}, or a"
            f" list of layers from 0 to {layers - 1}, each once, ascending"
        )
    return kept


def find_layers(model: "Module") -> list["Module"]:
    """Return the modules that are a model's layers, first to last; UserError where none are known."""
    lists: dict[str, list[Module]] = {}
    for name, module in model.named_modules():
        # A name that ends in the number is the layer itself.
        if (found := NUMBER.search(f"{name}.")) and found.end() == len(name):
            lists.setdefault(name[: found.start("number")], []).append(module)
    layers = depth(model.config.to_dict())  # type: ignore[union-attr, operator]
    whole = [modules for modules in lists.values() if len(modules) == layers]
    if len(whole) != 1:
        raise UserError(
            f"model.keep_layers: the layers of a {model.config.model_type} model are not found"  # type: ignore[union-attr]
            " under a known name; give a number or a list instead of choose: auto"
        )
    return whole[0]


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


def cut_layers(config: Mapping[str, Any], layers: int, kept: Sequence[int]) -> dict[str, Any]:
    """Return the configuration of the `kept` ones of its layers, counted from 0."""
    lists = of_layers(config, layers).items()
    cut: dict[str, Any] = {key: [value[layer] for layer in kept] for key, value in lists}
    cut |= {name: len(kept) for name in DEPTHS if name in config}
    if "max_window_layers" in config:  # Qwen2's, of a window that it does not use
        cut["max_window_layers"] = min(len(kept), config["max_window_layers"])
    return {**config, **cut}


def rename_layer(name: str, kept: Sequence[int]) -> str | None:
    """Return a tensor's name in a model of the `kept` layers; None where its layer is left out."""
    found = NUMBER.search(name)
    if not found:
        return name
    layer = int(found["number"])
    if layer not in kept:
        return None
    return f"{name[: found.start()]}{found['before']}{kept.index(layer)}{name[found.end() :]}"
