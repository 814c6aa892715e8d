"""Runs a model on several sequences at once without padding, and asks logits only where needed.

What all sequences of a pass start with (the chat template, the instruction) is laid once, and behind
it the rest of each, end to end:

    [shared start | tail 1 | tail 2 | …]

Position ids go on from the start in every tail, and a tail attends to the start and to itself. So
neither padding nor a repeated start is computed, and logits and gradients are those of each sequence
alone: tests hold it to that. (Prompt sharing as in vLLM's prefix caching, here with gradients.)
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from pockettune.common.errors import UserError
from pockettune.runtimes.batching import common_prefix, group_by_tokens

Tokens = Sequence[int]

ATTENTION = "pockettune_packed"  # the name under which `attend` is known to transformers

# What models hand to their attention and the result does not hang on. Dropout of attention weights
# is left out: LoRA has its own (train.dropout).
WITHOUT_EFFECT = {"dropout", "is_causal", "position_ids", "use_cache", "cache_position", "return_dict",
                  "output_attentions", "output_hidden_states", "output_router_logits"}  # fmt: skip

ADVICE = "take another model (docs/models.md lists those that work)"

# Tokens in one forward pass: enough to fill the hardware.
TOKENS_A_PASS = {"cpu": 2048, "cuda": 16384}
# Rows of logits in one: of 151,936 columns they are the largest part of it.
ROWS_A_PASS = 1024


@dataclass(frozen=True)
class Packing:
    """Where the sequences of one pass lie, in tokens."""

    start: int  # length of the shared start
    lengths: tuple[int, ...]  # of the tails
    device: torch.device
    # varlen_attn's arguments, and the rows of its keys; empty: it is not used
    varlen: dict[str, Any]
    made: dict[int | None, list[torch.Tensor]] = field(default_factory=dict)  # masks, by window

    @cached_property
    def spans(self) -> list[tuple[int, int]]:
        """Begin and end of the start, where there is one, and of each tail."""
        ends = list(accumulate(self.lengths, initial=self.start))
        return ([(0, self.start)] if self.start else []) + list(pairwise(ends))

    @property
    def longest(self) -> int:
        return self.start + max(self.lengths)

    def masks(self, window: int | None) -> list[torch.Tensor]:
        """Return a mask (own, seen) for each row of `spans`, true where a token may look.

        With a window a token sees that many tokens, the last of them itself.
        """
        if window not in self.made:
            self.made[window] = [self._mask(begin, end, window) for begin, end in self.spans]
        return self.made[window]

    def _mask(self, begin: int, end: int, window: int | None) -> torch.Tensor:
        own = end - begin
        before = self.start if begin else 0
        mask = torch.ones(own, before + own, dtype=torch.bool, device=self.device).tril(before)
        return mask if window is None else mask.triu(before - window + 1)


def pack(start: int, lengths: Sequence[int], device: torch.device, varlen: bool) -> Packing:
    """Lay tails of the given lengths behind a shared start."""
    packing = Packing(start, tuple(lengths), device, {})
    if varlen:
        seen = [[*range(start if begin else 0), *range(begin, end)] for begin, end in packing.spans]
        own = [end - begin for begin, end in packing.spans]
        packing.varlen.update(
            {
                "keys": torch.tensor([row for rows in seen for row in rows], device=device),
                "cu_seq_q": _offsets(own, device),
                "cu_seq_k": _offsets(list(map(len, seen)), device),
                "max_q": max(own),
                "max_k": max(map(len, seen)),
            }
        )
    return packing


def _offsets(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    packing: Packing | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer: query (1, heads, tokens, width) to (1, tokens, heads, width).

    The signature is transformers' (5.23, AttentionInterface); `packing` comes through the model's
    keyword arguments. Raises UserError where a model asks for what would change the result.
    """
    unknown = [n for n, x in others.items() if x is not None and n not in WITHOUT_EFFECT]
    if unknown or others.get("is_causal") is False:
        named = ", ".join(unknown) or "tokens that look ahead"
        raise UserError(
            f"this model's attention has {named}, which packed sequences do not support; {ADVICE}"
        )
    if packing is None:
        raise UserError(
            "this model does not pass on what its attention must know about packed sequences;"
            f" {ADVICE}"
        )
    if sliding_window is not None and sliding_window >= packing.longest:
        sliding_window = None
    plain = sliding_window is None and not softcap and value.shape[3] == query.shape[3]
    if packing.varlen and plain:
        return _attend_varlen(query, key, value, packing.varlen, scaling), None
    masks = packing.masks(sliding_window)
    return _attend_each(query, key, value, packing, masks, scaling, softcap), None


def _attend_each(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packing: Packing,
    masks: Sequence[torch.Tensor],
    scaling: float | None,
    softcap: float | None,
) -> torch.Tensor:
    """One call a sequence. On a CPU this costs less than one masked call over the whole pass."""
    heads, width = query.shape[1], query.shape[3]
    groups = heads // key.shape[1]
    outputs = []
    for (begin, end), mask in zip(packing.spans, masks, strict=True):
        keys, values = (
            torch.cat([x[:, :, : packing.start], x[:, :, begin:end]], dim=2)
            if begin and packing.start
            else x[:, :, begin:end]
            for x in (key, value)
        )
        # The heads that share a key are folded into its rows: the same numbers as enable_gqa,
        # whose backward pass takes 1.4 times as long (2 cores, 14 heads of 2 keys, 85 tokens).
        folded = query[:, :, begin:end].reshape(1, heads // groups, -1, width)
        rows = mask.repeat(groups, 1)
        if softcap:
            output = _attend_capped(folded, keys, values, rows, scaling, softcap)
        else:
            output = scaled_dot_product_attention(
                folded, keys, values, attn_mask=rows, scale=scaling
            )
        outputs.append(output.reshape(1, heads, end - begin, value.shape[3]))
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _attend_capped(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scaling: float | None,
    softcap: float,
) -> torch.Tensor:
    """Attention whose scores bend towards ±softcap before the softmax (Gemma 2, arXiv 2408.00118)."""
    scores = query @ key.transpose(2, 3) * (query.shape[3] ** -0.5 if scaling is None else scaling)
    scores = (softcap * torch.tanh(scores / softcap)).masked_fill(~mask, float("-inf"))
    return scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype) @ value


def _attend_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    arguments: dict[str, Any],
    scaling: float | None,
) -> torch.Tensor:
    """PyTorch's own flash attention over sequences of different lengths.

    Its causal mask is aligned at the last key, which is what a tail behind a start needs.
    """
    from torch.nn.attention.varlen import varlen_attn

    keys = arguments["keys"]
    output = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1)[keys],
        value[0].transpose(0, 1)[keys],
        **{name: x for name, x in arguments.items() if name != "keys"},
        scale=scaling,
        window_size=(-1, 0),
        enable_gqa=True,
    )
    assert isinstance(output, torch.Tensor)
    return output[None]


AttentionInterface.register(ATTENTION, attend)


def uses_varlen(model: torch.nn.Module) -> bool:
    """Whether the model computes where flash attention runs: Ampere or newer, in 16 bits."""
    parameter = next(model.parameters())
    return (
        parameter.is_cuda
        and parameter.dtype in (torch.bfloat16, torch.float16)
        and torch.cuda.get_device_capability(parameter.device) >= (8, 0)
    )


def packed_logits(
    model: torch.nn.Module, sequences: Sequence[Tokens], positions: Sequence[Sequence[int]]
) -> torch.Tensor:
    """Return the logits at the given positions of each sequence, one row each, in order.

    `positions` counts from the start of its sequence. Shape: (all positions together, vocabulary).
    The head is computed for these rows only; of 151,936 columns it would else be the largest part.
    The model is one that was loaded with the attention `ATTENTION`.
    """
    device = next(model.parameters()).device
    # What is asked for must lie in a tail.
    first = min((p for chosen in positions for p in chosen), default=0)
    start = common_prefix(sequences)[:first]
    tails = [tokens[len(start) :] for tokens in sequences]
    packing = pack(len(start), [len(tail) for tail in tails], device, uses_varlen(model))
    begins = accumulate(packing.lengths[:-1], initial=len(start))
    kept = [
        begin + p - len(start)
        for begin, chosen in zip(begins, positions, strict=True)
        for p in chosen
    ]
    ids = [*start, *(token for tail in tails for token in tail)]
    places = [*range(len(start)), *(len(start) + i for tail in tails for i in range(len(tail)))]
    return model(
        input_ids=torch.tensor([ids], device=device),
        position_ids=torch.tensor([places], device=device),
        logits_to_keep=torch.tensor(kept, device=device),
        use_cache=False,
        packing=packing,
    ).logits[0]


def logits_at(
    model: torch.nn.Module, sequences: Sequence[Tokens], places: Sequence[Sequence[int]]
) -> Iterator[Any]:
    """Yield the logits behind the given places of each sequence, in order: (places, vocabulary), float32.

    As many sequences a pass as have TOKENS_A_PASS tokens and ROWS_A_PASS rows of logits, or one.
    """
    limit = TOKENS_A_PASS[next(model.parameters()).device.type]
    pairs = list(zip(sequences, places, strict=True))
    with torch.inference_mode():
        for group in group_by_tokens(
            pairs, limit, lambda pair: max(len(pair[0]), len(pair[1]) * limit // ROWS_A_PASS)
        ):
            rows = packed_logits(model, [s for s, _ in group], [p for _, p in group])
            yield from (
                part.float().cpu().numpy() for part in rows.split([len(p) for _, p in group])
            )


def next_token_logits(model: torch.nn.Module, prompts: Sequence[Tokens]) -> Iterator[Any]:
    """Yield the logits behind each prompt's last token, in order: (vocabulary,), float32."""
    limit = TOKENS_A_PASS[next(model.parameters()).device.type]
    with torch.inference_mode():
        for group in group_by_tokens(prompts, limit, len):
            last = [[len(prompt) - 1] for prompt in group]
            yield from packed_logits(model, group, last).float().cpu().numpy()
