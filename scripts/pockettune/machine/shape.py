"""The shape of a run's base model, from as little as is known before the weights are here."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pockettune.common.errors import UserError
from pockettune.machine.network import fetch_model_config, first_with
from pockettune.machine.run import Run

# A GGUF tensor's name without "blk.<number>." and ".weight", and its name in a model folder.
GGUF_NAMES = {"token_embd": "embed_tokens", "output": "lm_head", "attn_q": "q_proj", "attn_k": "k_proj",
              "attn_v": "v_proj", "attn_output": "o_proj", "ffn_gate": "gate_proj", "ffn_up": "up_proj",
              "ffn_down": "down_proj"}  # fmt: skip
# Architectures whose layers are those of `tensors_of`; of another, config.json does not tell.
KNOWN = ("qwen2", "qwen3", "llama", "mistral", "gemma", "gemma2", "gemma3_text")


@dataclass(frozen=True)
class Tensor:
    """A weight: its layer's plain name (q_proj, embed_tokens …) and (rows, columns) or (length,)."""

    name: str
    shape: tuple[int, ...]
    layer: int = 0

    @property
    def elements(self) -> int:
        count = 1
        for length in self.shape:
            count *= length
        return count


@dataclass(frozen=True)
class Shape:
    """All weights of a model, and where that is known from."""

    tensors: tuple[Tensor, ...]
    source: str
    file_bytes: int | None = None  # of what fetch_model makes; None where it is not known
    extra_bytes: int | None = None  # of it, what is not weights: the tokenizer

    @property
    def parameters(self) -> int:
        return sum(tensor.elements for tensor in self.tensors)

    @property
    def layers(self) -> int:
        return 1 + max((tensor.layer for tensor in self.tensors), default=0)

    def find(self, name: str) -> Tensor | None:
        return next((tensor for tensor in self.tensors if tensor.name == name), None)

    @property
    def vocabulary(self) -> int:
        embedding = self.find("embed_tokens")
        return embedding.shape[0] if embedding else 0

    @property
    def hidden(self) -> int:
        embedding = self.find("embed_tokens")
        return embedding.shape[1] if embedding else 0

    @property
    def intermediate(self) -> int:
        up = self.find("up_proj")
        return up.shape[0] if up else 4 * self.hidden


def find_shape(run: Run) -> Shape | None:
    """Return the base model's shape: of the fetched base, of the local model, or told by a hub."""
    if run.own_model is not None or run.base.is_dir():
        return find_shape_here(run)
    config = fetch_model_config(run)
    tensors = tensors_of(config) if config else None
    if not tensors:
        return None
    reply = first_with(run.facts["replies"](), "model")
    sizes = reply.sizes if reply else {}
    total = sum(size for name, size in sizes.items() if is_fetched(name)) or None
    weights = sum(size for name, size in sizes.items() if name.endswith(".safetensors"))
    return Shape(
        tensors,
        f"config.json from {reply.source.text if reply else 'the hub'}",
        total,
        total and total - weights,
    )


def find_shape_here(run: Run) -> Shape | None:
    """Return the shape of the fetched base or of the local model; None where neither is here."""
    for place in (run.base, run.own_model):
        if place is not None and place.exists():
            try:
                return shape_of_gguf(place) if place.is_file() else shape_of_folder(place)
            except (UserError, OSError, ValueError, TypeError, KeyError, ImportError):
                return (
                    None  # models.check_model says what is wrong with it; packages may be missing
                )
    return None


def is_fetched(name: str) -> bool:
    """Whether fetch_model takes a repository's file."""
    from pockettune.sources.hub import is_safe

    return is_safe(name)


def shape_of_folder(folder: Path) -> Shape:
    """Return the shape that the headers of a folder's safetensors files tell."""
    from pockettune.models.folder import tensor_shapes, weight_files

    tensors = []
    for name, shape in tensor_shapes(folder).items():
        layer = re.search(r"\.layers\.(\d+)\.", name)
        plain = (
            name.removesuffix(".weight").rpartition(".")[2]
            if name.endswith(".weight")
            else name.rpartition(".")[2]
        )
        tensors.append(Tensor(plain, tuple(shape), int(layer[1]) if layer else 0))
    size = sum(
        path.stat().st_size for path in folder.iterdir() if path.is_file() and is_fetched(path.name)
    )
    weights = sum(path.stat().st_size for path in weight_files(folder))
    return Shape(tuple(tensors), "its safetensors files", size, size - weights)


def shape_of_gguf(path: Path) -> Shape:
    """Return the shape that a GGUF file's header tells; fetch_model makes a folder of 16 bits of it."""
    from pockettune.gguf.files import read_gguf

    tensors = []
    for stored in read_gguf(path)[1]:
        layer = re.match(r"blk\.(\d+)\.", stored.name)
        plain = re.sub(r"^blk\.\d+\.|\.(weight|bias)$", "", stored.name)
        tensors.append(
            Tensor(GGUF_NAMES.get(plain, plain), stored.shape[::-1], int(layer[1]) if layer else 0)
        )
    return Shape(tuple(tensors), "the GGUF file's header")


def tensors_of(config: Mapping[str, Any]) -> tuple[Tensor, ...] | None:
    """Return the weights that config.json implies; None for an architecture that is not known."""
    kind = config.get("model_type")
    if kind not in KNOWN:
        return None
    try:
        hidden, inner = int(config["hidden_size"]), int(config["intermediate_size"])
        heads = int(config["num_attention_heads"])
        width = int(config.get("head_dim") or hidden // heads)
        queries, keys = heads * width, int(config.get("num_key_value_heads") or heads) * width
        vocabulary, layers = int(config["vocab_size"]), int(config["num_hidden_layers"])
    except (KeyError, TypeError, ValueError):
        return None
    each = {"q_proj": (queries, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden), "o_proj": (hidden, queries),
            "gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner),
            "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}  # fmt: skip
    biased = kind == "qwen2" or config.get("attention_bias")
    biases = {"q_bias": (queries,), "k_bias": (keys,), "v_bias": (keys,)} if biased else {}
    tensors = [
        Tensor(name, shape, n) for n in range(layers) for name, shape in (each | biases).items()
    ]
    tied = config.get("tie_word_embeddings", kind.startswith("gemma"))
    head = [] if tied else [Tensor("lm_head", (vocabulary, hidden))]
    return (
        Tensor("embed_tokens", (vocabulary, hidden)),
        *tensors,
        Tensor("norm", (hidden,)),
        *head,
    )


def read_config(folder: Path) -> dict[str, Any]:
    """Return a model folder's config.json; empty where it cannot be read."""
    try:
        return dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}
