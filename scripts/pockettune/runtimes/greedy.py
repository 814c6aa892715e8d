"""Greedy answers in llama.cpp: the likeliest token after the likeliest, several prompts at once."""

import ctypes
from collections.abc import Sequence

import llama_cpp

from pockettune.runtimes.batching import common_prefix, group_by_tokens
from pockettune.runtimes.llama import PROMPTS_A_BATCH, TOKENS_A_BATCH, Context, LlamaModel

Tokens = Sequence[int]


def answer_greedily(model: LlamaModel, prompts: Sequence[Tokens], limit: int) -> list[str | None]:
    """Return each prompt's likeliest answer as text, without the token that ends it.

    None for an answer that does not end within `limit` tokens. The prompts' common start is computed
    once, as in scoring.
    """
    prefix = common_prefix(prompts)
    tails = [list(prompt[len(prefix) :]) for prompt in prompts]
    capacity = max(TOKENS_A_BATCH, max(map(len, tails)))
    room = len(prefix) + capacity + PROMPTS_A_BATCH * limit
    answers: list[str | None] = []
    with model.open_context(room, max(len(prefix), capacity)) as context:
        if prefix:
            context.decode([(0, 0, prefix)])
        for group in group_by_tokens(tails, capacity, len, PROMPTS_A_BATCH):
            context.share(len(group))
            for answer in continue_greedily(model, context, len(prefix), group, limit):
                ended = bool(answer) and model.stops_at(answer[-1])
                answers.append(as_text(model, answer[:-1]) if ended else None)
            context.drop(len(group))
    return answers


def continue_greedily(
    model: LlamaModel, context: Context, start: int, tails: Sequence[Tokens], limit: int
) -> list[list[int]]:
    """Return up to `limit` tokens behind each tail; sequences that have ended drop out."""
    answers: list[list[int]] = [[] for _ in tails]
    pending = {number: (start, tail) for number, tail in enumerate(tails)}
    for _ in range(limit):
        if not pending:
            break
        rows = context.decode([(n + 1, begin, tokens) for n, (begin, tokens) in pending.items()])
        following: dict[int, tuple[int, Tokens]] = {}
        for row, (number, (begin, tokens)) in zip(rows, pending.items(), strict=True):
            token = int(context.logits(row).argmax())
            answers[number].append(token)
            if not model.stops_at(token):
                following[number] = (begin + len(tokens), [token])
        pending = following
    return answers


def as_text(model: LlamaModel, tokens: Tokens) -> str:
    """Return the text of tokens; special ones are left out, as a chat program does."""
    pieces = []
    for token in tokens:
        buffer = ctypes.create_string_buffer(256)
        size = llama_cpp.llama_token_to_piece(model.vocabulary, token, buffer, 256, 0, False)
        pieces.append(buffer.raw[: max(size, 0)])
    return b"".join(pieces).decode("utf-8", "replace")
