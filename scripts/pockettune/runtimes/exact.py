"""Loads a model to compute in fp32: its weights too where they fit, else each only while it is used.

A weight that is stored in 16 bits is the same number in fp32, so that both ways compute the same.
"""

from pathlib import Path
from typing import Any

import torch

from pockettune.common import program
from pockettune.common.limits import free_memory
from pockettune.models.folder import count_parameters, load_model
from pockettune.runtimes.packing import ATTENTION

SIXTEEN_BITS = (torch.float16, torch.bfloat16)
BESIDE = 1.5e9  # bytes that computing takes besides the weights


def load_exact(folder: Path, attention: str = ATTENTION, device: str = "cpu") -> torch.nn.Module:
    """Load a model to compute in fp32 on `device`.

    Where fp32 weights do not fit into the free memory, they stay in the 16 bits they are stored in, half
    the bytes; widening a layer at each pass then takes time.
    """
    needed = 4 * count_parameters(folder)
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else free_memory()
    if needed + BESIDE <= free:
        return load_model(folder, attention=attention, dtype=torch.float32).to(device).eval()
    program.logger.info(
        "weights stay in 16 bits, widened layer by layer: in fp32 they take %.1f GB, %.1f GB are free",
        needed / 1e9,
        free / 1e9,
    )
    model = load_model(folder, attention=attention, dtype="auto").to(device).eval()
    widen_while_used(model)
    return model


def widen_while_used(model: torch.nn.Module) -> None:
    """Have each module's own 16-bit weights in fp32 while it computes, and only then."""
    for module in model.modules():
        if any(p.dtype in SIXTEEN_BITS for p in module.parameters(recurse=False)):
            module.register_forward_pre_hook(_widen)
            module.register_forward_hook(_narrow, always_call=True)


def _widen(module: Any, _: Any) -> None:
    module.narrow = {name: p for name, p in module._parameters.items() if p is not None}
    for name, parameter in module.narrow.items():
        module._parameters[name] = torch.nn.Parameter(parameter.float(), requires_grad=False)


def _narrow(module: Any, _: Any, __: Any) -> None:
    module._parameters.update(module.narrow)
