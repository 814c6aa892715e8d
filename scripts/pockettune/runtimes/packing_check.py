"""Whether packed sequences make of a model the numbers of each sequence alone, before it is trained."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pockettune.common.errors import UserError
from pockettune.runtimes.batching import common_prefix
from pockettune.runtimes.exact import load_exact
from pockettune.runtimes.packing import ADVICE, Tokens, packed_logits

# Tokens of the shared start and of the two tails, and the difference of logits, in
# standard deviations of the logits, up to which it is fp32's rounding: 0.00001 of SmolLM2's 30
# layers and Gemma 3's 18. A wrong attention is off by 0.4 and more.
CHECKED_START, CHECKED_TAILS = 12, (20, 14)
CHECKED_DIFFERENCE = 1e-3


def check_packing(folder: Path, prompts: Sequence[Tokens]) -> dict[str, float]:
    """Raise UserError where packed sequences would make other numbers of a model than its own.

    Two sequences out of the prompts' tokens are computed in fp32, behind a shared start and each
    alone in transformers' plain attention of this model; every logit behind the start is compared.
    Returns the largest difference and the standard deviation of the logits.
    """
    model: Any = load_exact(folder)
    sequences = _sequences_to_check(model.config.get_text_config(), prompts)
    shared = len(common_prefix(sequences))
    places = [range(shared, len(sequence)) for sequence in sequences]
    try:
        with torch.inference_mode():
            packed = packed_logits(model, sequences, places).float()
            model.set_attn_implementation("eager")
            alone = [
                model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, shared:].float()
                for tokens in sequences
            ]
    except UserError as error:
        raise UserError(f"model {folder.name} cannot be trained here: {error}") from error
    except Exception as error:  # foreign code, asked for what it may not know
        reason = " ".join(str(error).split())
        raise UserError(
            f"model {folder.name} cannot be trained here: {reason}; {ADVICE}"
        ) from error
    expected = torch.cat(alone)
    spread = expected.std().item()
    difference = (
        (packed - expected).abs().max().item() if packed.shape == expected.shape else math.inf
    )
    if not difference <= CHECKED_DIFFERENCE * spread:
        kind = getattr(model.config, "model_type", "unknown")
        raise UserError(
            f"model {folder.name} cannot be trained here: behind a shared start its logits are off by"
            f" {difference:.2g} (their spread is {spread:.2g}), so layers of its architecture ({kind})"
            f" mix the sequences of a pass; {ADVICE}"
        )
    return {"difference": difference, "spread": spread}


def _sequences_to_check(config: Any, prompts: Sequence[Tokens]) -> list[list[int]]:
    """Return two sequences of a shared start: short, but longer than a window that cuts prompts."""
    stock = [token for prompt in prompts for token in prompt]
    longest = max(map(len, prompts))
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    window = min((w for w in windows if w and w < longest), default=0)
    # Other tokens in each tail: those of the stock from two places on, round and round.
    start = [stock[i % len(stock)] for i in range(CHECKED_START + window)]
    first, second = (
        [stock[(len(start) + shift + i) % len(stock)] for i in range(length)]
        for shift, length in zip((0, len(stock) // 2), CHECKED_TAILS, strict=True)
    )
    if first[0] == second[0]:  # so that what is shared is the start and no more
        second = second[::-1]
    return [start + first, start + second]
