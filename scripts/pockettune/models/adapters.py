"""LoRA adapters: makes a fresh one, and checks one that was trained elsewhere."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pockettune.common.errors import UserError, list_faults
from pockettune.models.folder import read_header, weight_files

if TYPE_CHECKING:
    import torch

WEIGHTS = "adapter_model.safetensors"
PREFIX, DOWN, UP = "base_model.model.", ".lora_A.weight", ".lora_B.weight"


def add_adapter(
    model: "torch.nn.Module", settings: Mapping[str, Any], base: Path
) -> "torch.nn.Module":
    """Return the model with a fresh LoRA adapter, whose own parameters are fp32."""
    from peft import LoraConfig, get_peft_model

    targets = choose_targets(model, settings["target_modules"], base.name)
    lora = LoraConfig(
        r=settings["rank"],
        lora_alpha=settings["alpha"],
        lora_dropout=settings["dropout"],
        target_modules=targets,
        use_rslora=settings["variant"] == "rslora",
        use_dora=settings["variant"] == "dora",
        task_type="CAUSAL_LM",
    )
    adapted: Any = get_peft_model(model, lora)
    # A list, because a set is written in another order by every process.
    adapted.peft_config["default"].target_modules = targets
    return adapted


def choose_targets(model: "torch.nn.Module", wanted: Sequence[str] | str, name: str) -> list[str]:
    """Return the plain names of the layers that get an adapter, sorted; `all-linear` is PEFT's word
    for all but the output head.

    Raises UserError naming those that are no linear layer of the model, and a head that is tied to
    the embedding: merging would change the embedding with it.
    """
    from torch.nn import Linear
    from transformers.pytorch_utils import Conv1D

    layers = {n: m for n, m in model.named_modules() if isinstance(m, (Linear, Conv1D))}
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    heads = {n.rpartition(".")[2] for n, layer in layers.items() if layer is head}
    inner = {n.rpartition(".")[2] for n in layers} - heads
    if wanted == "all-linear":
        return sorted(inner)
    tied = head is not None and head.weight is embedding.weight
    unknown = [n for n in wanted if n not in (inner if tied else inner | heads)]
    if unknown:
        told = [f"{n} (tied to the embedding)" if n in heads else n for n in unknown]
        raise UserError(
            f"train.target_modules: {', '.join(told)} not in model {name};"
            f" its layers are {', '.join(sorted(inner))}, and all-linear names them all"
        )
    return sorted(wanted)


def check_adapter(adapter: Path, base: Path) -> dict[str, Any]:
    """Raise UserError naming all that keeps an adapter from being merged onto `base`.

    Reads headers, no weights. Returns the adapter's config.
    """
    names = ("adapter_config.json", WEIGHTS)
    missing = [f"{name} is missing" for name in names if not (adapter / name).is_file()]
    if missing:
        raise UserError(
            f"train.adapter {adapter}: {list_faults(missing)}; it must be a PEFT folder"
        )
    try:
        config = dict(json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8")))
        shapes = {name: entry["shape"] for name, entry in read_header(adapter / WEIGHTS).items()}
    except (ValueError, TypeError) as error:
        raise UserError(f"train.adapter {adapter}: a file of it {error}") from error
    faults = _config_faults(config, base)
    faults += _shape_faults(shapes, base, transposed=bool(config.get("fan_in_fan_out")))
    if faults:
        raise UserError(f"train.adapter {adapter} does not fit {base.name}: {list_faults(faults)}")
    return config


def _config_faults(config: Mapping[str, Any], base: Path) -> list[str]:
    faults = []
    told = config.get("base_model_name_or_path")
    if told and _plain_name(told) != _plain_name(base.name):
        faults.append(
            f"it was trained on {told} (if that is the same model under another name, correct"
            " base_model_name_or_path in adapter_config.json)"
        )
    if config.get("peft_type") != "LORA":
        faults.append(f"peft_type is {config.get('peft_type')}, only LORA can be merged")
    if config.get("modules_to_save"):
        faults.append(
            f"it replaces whole layers (modules_to_save: {', '.join(config['modules_to_save'])}),"
            " which would untie or resize the embedding"
        )
    if config.get("bias", "none") != "none":
        faults.append(f"it trains biases (bias: {config['bias']})")
    return faults


def _plain_name(model: str) -> str:
    """Return a model's name without owner, revision and the mark of a 4-bit copy."""
    name = model.rstrip("/").rsplit("/", 1)[-1].split("@")[0].lower()
    return re.sub(r"-(unsloth-)?bnb-4bit$", "", name)


def _shape_faults(shapes: Mapping[str, list[int]], base: Path, transposed: bool) -> list[str]:
    """Compare each pair A (rank, in) and B (out, rank) with its layer's weight (out, in).

    GPT-2 stores its weights transposed, (in, out).
    """
    layers = {
        name.removesuffix(".weight"): entry["shape"][:: -1 if transposed else 1]
        for file in weight_files(base)
        for name, entry in read_header(file).items()
    }
    faults = []
    for name, shape in shapes.items():
        layer = name.removeprefix(PREFIX)
        if name.endswith(DOWN):
            layer, other = layer.removesuffix(DOWN), name.removesuffix(DOWN) + UP
            width, side = -1, "in"
        elif name.endswith(UP):
            layer, other = layer.removesuffix(UP), name.removesuffix(UP) + DOWN
            width, side = 0, "out"
        elif name.endswith(".lora_magnitude_vector"):  # DoRA: one number a row
            continue
        else:
            faults.append(f"{name} is neither A nor B of a LoRA layer")
            continue
        if layer not in layers:
            faults.append(f"{layer} is no layer of the base")
        elif shape[width] != layers[layer][width]:
            faults.append(f"{layer}: {shape[width]} wide at its {side}put, the base {layers[layer][width]}")  # fmt: skip
        if other not in shapes:
            faults.append(f"{other} is missing")
    return faults if shapes else ["it holds no weights"]
