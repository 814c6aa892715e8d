"""Runs a model on several sequences at once without padding, and asks logits only where needed.

Sequences are laid end to end with position ids that begin anew at each. Given no attention mask,
transformers reads the borders from the position ids and lets no sequence see another
(transformers 5.23, masking_utils.find_packed_sequence_indices); tests hold it to that.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch

Tokens = Sequence[int]
Item = TypeVar("Item")

# Tokens in one forward pass: enough to fill the hardware, few enough that attention over the
# packed sequences, which is computed whole and masked, stays small beside the matrix products.
TOKENS_A_PASS = {"cpu": 512, "cuda": 8192}


def packed_logits(
    model: torch.nn.Module, sequences: Sequence[Tokens], positions: Sequence[Sequence[int]]
) -> torch.Tensor:
    """Return the logits at the given positions of each sequence, one row each, in order.

    `positions` counts from the start of its sequence. Shape: (all positions together, vocabulary).
    The head is computed for these rows only; of 151,936 columns it would else be the largest part.
    """
    device = next(model.parameters()).device
    starts = np.concatenate([[0], np.cumsum([len(tokens) for tokens in sequences])])
    kept = [starts[i] + p for i, chosen in enumerate(positions) for p in chosen]
    return model(
        input_ids=torch.tensor([[t for tokens in sequences for t in tokens]], device=device),
        position_ids=torch.tensor([[p for s in sequences for p in range(len(s))]], device=device),
        logits_to_keep=torch.tensor(kept, device=device),
        use_cache=False,
    ).logits[0]


def next_token_logits(model: torch.nn.Module, prompts: Sequence[Tokens]) -> Iterator[np.ndarray]:
    """Yield the logits behind each prompt's last token, in order: (vocabulary,), float32."""
    limit = TOKENS_A_PASS[next(model.parameters()).device.type]
    with torch.inference_mode():
        for group in group_by_tokens(prompts, limit, len):
            last = [[len(prompt) - 1] for prompt in group]
            yield from packed_logits(model, group, last).float().cpu().numpy()


def group_by_tokens(
    items: Sequence[Item], limit: int, count_tokens: Callable[[Item], int]
) -> Iterator[list[Item]]:
    """Cut items, in order, into groups of at most `limit` tokens or of one item."""
    group: list[Item] = []
    tokens = 0
    for item in items:
        if group and tokens + count_tokens(item) > limit:
            yield group
            group, tokens = [], 0
        group.append(item)
        tokens += count_tokens(item)
    if group:
        yield group
