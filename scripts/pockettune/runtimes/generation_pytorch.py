"""Free text in PyTorch: generates answers as generation.py does in llama.cpp; packing.logits_at reads given ones.

For base, adapter and merged model, on a sample where the machine has no GPU. Models are those that were
loaded with packing's attention.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import DynamicCache

from pockettune.runtimes.answers import (
    Generation,
    Tokens,
    find_room,
    log_probability,
)
from pockettune.runtimes.batching import group_by_tokens
from pockettune.runtimes.packing import ATTENTION, TOKENS_A_PASS

# transformers' own attention; packing's keeps no keys and values.
WITH_CACHE = "eager"
PROMPTS_A_BATCH = 16


def generate(
    model: torch.nn.Module,
    prompts: Sequence[Tokens],
    *,
    ends: Collection[int],
    max_tokens: int,
) -> Iterator[Generation]:
    """Yield the likeliest continuation of each prompt, in the prompts' order.

    It is over with one of the tokens `ends`, or after `max_tokens` tokens (the end among them), or where
    the model's context is full. Raises UserError, before the first, for prompts longer than that.
    """
    if not prompts:
        return iter(())
    rooms = find_room(prompts, max_tokens, _context_length(model))
    return _generate(model, list(zip(prompts, rooms, strict=True)), ends)


def _generate(
    model: torch.nn.Module, prompts: Sequence[tuple[Tokens, int]], ends: Collection[int]
) -> Iterator[Generation]:
    limit = TOKENS_A_PASS[next(model.parameters()).device.type]
    for group in group_by_tokens(prompts, limit, _tokens_at_most, PROMPTS_A_BATCH):
        with torch.inference_mode(), _attention(model, WITH_CACHE):
            generated = _generate_together(model, group, ends)
        yield from generated


def _tokens_at_most(item: tuple[Tokens, int]) -> int:
    prompt, room = item
    return len(prompt) + room


def _generate_together(
    model: Any, prompts: Sequence[tuple[Tokens, int]], ends: Collection[int]
) -> list[Generation]:
    """Continue prompts of one batch, padded on the left; those that have ended drop out."""
    device = next(model.parameters()).device
    width = max(len(prompt) for prompt, _ in prompts)
    ids = torch.tensor([[0] * (width - len(p)) + list(p) for p, _ in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p, _ in prompts], device=device)
    cache = DynamicCache(config=model.config)
    running = list(range(len(prompts)))
    answers: list[list[int]] = [[] for _ in prompts]
    sums, ended = [0.0] * len(prompts), [False] * len(prompts)
    while running:
        places = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        logits = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=places,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        going = []
        for row, (number, values) in enumerate(
            zip(running, logits.float().cpu().numpy(), strict=True)
        ):
            token = int(values.argmax())
            sums[number] += log_probability(values, token)
            ended[number] = token in ends
            if not ended[number]:
                answers[number].append(token)
                if len(answers[number]) < prompts[number][1]:
                    going.append(row)
        running = [running[row] for row in going]
        rows = torch.tensor(going, dtype=torch.long, device=device)
        if len(going) < len(mask) and going:
            cache.batch_select_indices(rows)
        ids = torch.tensor([[answers[number][-1]] for number in running], device=device)
        mask = torch.nn.functional.pad(mask[rows], (0, 1), value=1)
    return [Generation(*parts) for parts in zip(answers, ended, sums, strict=True)]


def _context_length(model: Any) -> int | None:
    """Return how many tokens the model takes, where its config says so."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


@contextmanager
def _attention(model: Any, name: str) -> Iterator[None]:
    """Have the model compute with one of transformers' own attentions, then with packing's again."""
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(ATTENTION)
