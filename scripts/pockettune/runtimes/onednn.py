"""Matrix products in fp32 by oneDNN instead of MKL, where PyTorch computes on a CPU.

PyTorch gives fp32 products to MKL, which on processors of other makers than Intel's takes a slower
path; oneDNN, which PyTorch ships too, does not. benchmarks/onednn.md has the figures.
"""

import torch

# Smaller ones, such as an adapter's, cost more to hand over than they gain.
SMALLEST = 64


class OneDnnLinear(torch.nn.Module):
    """A linear layer for inference: (…, in) to (…, out), in fp32."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = torch.nn.Parameter(linear.weight.detach(), requires_grad=False)
        self.packed = linear.weight.detach().to_mkldnn()
        self.bias = None if linear.bias is None else linear.bias.detach().to_mkldnn()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, self.in_features).to_mkldnn()
        return (
            torch.nn.functional.linear(flat, self.packed, self.bias)
            .to_dense()
            .view(*x.shape[:-1], -1)
        )


def use_onednn(model: torch.nn.Module) -> torch.nn.Module:
    """Replace a model's larger linear layers in place, where it computes on a CPU in fp32."""
    if not torch.backends.mkldnn.is_available():
        return model
    for module in list(model.modules()):
        for name, child in module.named_children():
            if (
                type(child) is torch.nn.Linear
                and child.weight.device.type == "cpu"
                and child.weight.dtype == torch.float32
                and min(child.in_features, child.out_features) >= SMALLEST
            ):
                setattr(module, name, OneDnnLinear(child))
    return model
