"""Greedy answers in llama.cpp, as text."""

from collections.abc import Sequence

from pockettune.runtimes.answers import Tokens
from pockettune.runtimes.generation import generate
from pockettune.runtimes.llama import LlamaModel


def answer_greedily(model: LlamaModel, prompts: Sequence[Tokens], limit: int) -> list[str | None]:
    """Return each prompt's likeliest answer as text, without the token that ends it.

    None for an answer that does not end within `limit` tokens.
    """
    generated = generate(model, prompts, ends=model.end_tokens(), max_tokens=limit)
    return [as_text(model, answer.ids) if answer.ended else None for answer in generated]


def as_text(model: LlamaModel, tokens: Tokens) -> str:
    """Return the text of tokens; special ones are left out, as a chat program does."""
    pieces = (model.piece(token, special=False) for token in tokens)
    return b"".join(pieces).decode("utf-8", "replace")
