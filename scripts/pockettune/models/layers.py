"""The layers of a model: how many, of which kinds, and a configuration of some of them."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

DEPTHS = ("num_hidden_layers", "n_layer", "num_layers")
# A tensor's layer in its name: Llama and most, GPT-2, MPT.
NUMBER = re.compile(r"(?P<before>(?:^|\.)(?:layers|h|blocks)\.)(?P<number>\d+)(?=\.)")


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
