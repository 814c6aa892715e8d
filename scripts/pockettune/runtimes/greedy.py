"""Greedy answers in llama.cpp, as text."""

import ctypes
from collections.abc import Sequence

import llama_cpp

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
    pieces = []
    for token in tokens:
        buffer = ctypes.create_string_buffer(256)
        size = llama_cpp.llama_token_to_piece(model.vocabulary, token, buffer, 256, 0, False)
        pieces.append(buffer.raw[: max(size, 0)])
    return b"".join(pieces).decode("utf-8", "replace")
