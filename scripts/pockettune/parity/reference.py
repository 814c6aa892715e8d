"""What PyTorch computes of a model, with which files of every format are compared."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from pockettune.runtimes.packing import next_token_logits

Tokens = Sequence[int]


def logits_of_torch(model: torch.nn.Module, prompts: Sequence[Tokens]) -> np.ndarray:
    """Return the logits behind each prompt in PyTorch: (prompts, vocabulary)."""
    return np.stack(list(next_token_logits(model, prompts)))


def generate_greedy(
    model: torch.nn.Module, prompts: Sequence[Tokens], limit: int, ends: Iterable[int]
) -> list[list[int]]:
    """Return each prompt's likeliest continuation in PyTorch, up to one of `ends` or `limit` tokens.

    Computed anew for each token: a few short prompts need no cache.
    """
    stops = set(ends)
    generated: list[list[int]] = [[] for _ in prompts]
    for _ in range(limit):
        running = [i for i, tokens in enumerate(generated) if stops.isdisjoint(tokens)]
        if not running:
            break
        grown = [[*prompts[i], *generated[i]] for i in running]
        for i, logits in zip(running, next_token_logits(model, grown), strict=True):
            generated[i].append(int(logits.argmax()))
    return generated
