"""Merges an adapter into a base model tensor by tensor, so that memory does not grow with the model.

The model itself is built without weights. PEFT's own layers do the arithmetic, each with its base weight
only while it is merged: LoRA, rsLoRA and DoRA come out as merge_and_unload makes them of the whole model.
"""

from pathlib import Path
from typing import Any

import torch

from pockettune.common.errors import UserError
from pockettune.models.folder import check_unchanged
from pockettune.models.shards import Stored, list_stored, write_shards

FP16_MAX = torch.finfo(torch.float16).max


def empty_model(base: Path) -> Any:
    """Return a model folder's model without weights (on PyTorch's device `meta`)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(base, trust_remote_code=False)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float16)


def find_tensors(model: Any, base: Path) -> dict[str, tuple[Stored, str]]:
    """Return the tensors that the model takes from the base's files, by their stored names, each with
    the module whose weight it is.

    Each is given to the parameter to which transformers 5.23 gives it when it loads the base. Left out
    is what transformers leaves out: what is tied to another, and what the architecture has not.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    transforms = get_model_conversion_mapping(model)
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    renamings: Any = [t for t in transforms if not isinstance(t, WeightConverter)]
    wanted, prefix = dict(model.state_dict()), model.base_model_prefix
    found = {}
    for stored in list_stored(base):
        parameter, _ = rename_source_key(stored.name, renamings, converters, prefix, wanted)
        if parameter in wanted and parameter not in model.all_tied_weights_keys:
            found[stored.name] = (stored, parameter.removesuffix(".weight"))
    return found


def lay_adapter(model: Any, adapter: Path) -> dict[str, Any]:
    """Lay an adapter over a model without weights; return its LoRA layers by module name.

    Raises ValueError where weights of the adapter are missing, or fit no layer.
    """
    from peft import PeftConfig, PeftModel, load_peft_weights, set_peft_model_state_dict
    from peft.tuners.lora import LoraLayer

    laid = PeftModel(model, PeftConfig.from_pretrained(str(adapter)), low_cpu_mem_usage=True)
    layers = {
        name.removeprefix("base_model.model."): layer
        for name, layer in laid.named_modules()
        if isinstance(layer, LoraLayer)
    }
    for layer in layers.values():
        # A single zero, seen as a matrix: PEFT moves an adapter's weights to where its layer's are.
        inner: Any = layer.get_base_layer()
        inner.weight = torch.nn.Parameter(torch.zeros(()).expand(inner.weight.shape), False)
    weights = load_peft_weights(str(adapter), device="cpu")
    result: Any = set_peft_model_state_dict(laid, weights, low_cpu_mem_usage=True)
    absent = [n for n, p in laid.named_parameters() if "lora_" in n and p.is_meta]
    if faults := [*result.unexpected_keys, *absent]:
        raise ValueError(f"its weights are not those of its layers: {', '.join(faults[:3])}")
    return layers


def merge_layer(layer: Any, weight: torch.Tensor) -> torch.Tensor:
    """Return a LoRA layer's merged weight in fp32; ValueError where it holds NaN."""
    inner = layer.get_base_layer()
    empty = inner.weight
    inner.weight = torch.nn.Parameter(weight.float(), requires_grad=False)
    try:
        layer.merge(safe_merge=True)
        return inner.weight.data
    finally:
        inner.weight = empty


def round_to_fp16(name: str, weight: torch.Tensor) -> torch.Tensor:
    """Return a weight in FP16; UserError where a number is beyond what that can hold."""
    if not weight.is_floating_point():
        return weight
    if (peak := weight.abs().max().item()) > FP16_MAX:
        raise UserError(
            f"merged {name} reaches {peak:.3g}, FP16 ends at {FP16_MAX:.0f}: the training"
            " diverged; lower train.learning_rate"
        )
    return weight.half()


def write_merged(base: Path, adapter: Path, output: Path) -> int:
    """Write the merged weights and config.json into the folder `output`; return their parameters.

    Raises UserError where the base's weights have changed since they were fetched, where a weight is
    beyond FP16, and where the adapter does not fit; ValueError where it holds NaN.
    """
    check_unchanged(base)
    model = empty_model(base)
    found = find_tensors(model, base)
    config, architecture = model.config, type(model).__name__
    layers = lay_adapter(model, adapter)
    if missing := sorted(layers.keys() - {module for _, module in found.values()}):
        raise UserError(
            f"adapter {adapter} cannot be merged onto {base}: the base stores no weight of"
            f" {', '.join(missing[:3])}" + (" …" if len(missing) > 3 else "")
        )

    def make(name: str, stored: Stored) -> torch.Tensor:
        layer, weight = layers.get(found[name][1]), stored.load()
        return round_to_fp16(name, weight if layer is None else merge_layer(layer, weight))

    write_shards({name: stored for name, (stored, _) in found.items()}, make, output)
    config.dtype, config.architectures = torch.float16, [architecture]
    config.save_pretrained(output)
    return sum(stored.elements for stored, _ in found.values())
