"""Sums the squares of what a model's linear layers are given, as llama.cpp's llama-imatrix does.

llama-imatrix leaves out a head that is tied to the embedding; here it counts, at the positions that
answer. The start that the prompts of a pass share is computed once and counted for each of them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from pockettune.gguf.importance import Inputs
from pockettune.runtimes.packing import Packing, Tokens, next_token_logits


class _Sums:
    """Forward hooks of one model, and what they have seen of it."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.head = model.get_output_embeddings()  # type: ignore[operator]
        self.packing: Packing | None = None
        self.seen: dict[str, tuple[torch.Tensor, int]] = {}
        # The order of a pass: the model is called with its packing, then its layers.
        self.hooks = [model.register_forward_pre_hook(self._begin_pass, with_kwargs=True)]
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear | Conv1D):
                self.hooks.append(module.register_forward_pre_hook(self._add_to(name)))

    def _begin_pass(self, _: Any, __: Any, arguments: dict[str, Any]) -> None:
        self.packing = arguments["packing"]

    def _add_to(self, name: str) -> Any:
        def add(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            rows = arguments[0].detach().flatten(0, -2).float()
            weights = torch.ones(len(rows), device=rows.device)
            if module is not self.head:  # which is given the answering positions alone
                assert self.packing is not None
                weights[: self.packing.start] = len(self.packing.lengths)
            sums, count = self.seen.get(name, (0.0, 0))
            # fp32 holds a pass; over all passes it would lose digits.
            added = (weights @ rows.square()).double().cpu()
            self.seen[name] = (sums + added, count + int(weights.sum()))

        return add


def sum_squares(model: torch.nn.Module, prompts: Sequence[Tokens]) -> dict[str, Inputs]:
    """Return what each linear layer was given over all prompts, by module.

    The model is one that was loaded with packing's attention.
    """
    sums = _Sums(model)
    try:
        for _ in next_token_logits(model, prompts):
            pass
    finally:
        for hook in sums.hooks:
            hook.remove()
    return {name: Inputs(total.numpy(), count) for name, (total, count) in sums.seen.items()}
