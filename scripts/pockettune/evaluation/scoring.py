"""Scores the allowed answers of a prompt by their probability, whatever runtime computes it."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from pockettune.common.program import progress

Tokens = Sequence[int]

# Takes prompts as token ids, yields the logits behind each one's last token: (vocabulary,), float32.
NextTokenLogits = Callable[[Sequence[Tokens]], Iterable[np.ndarray]]


def decisive_prefixes(answers: Sequence[Tokens]) -> list[tuple[int, ...]]:
    """Return for each answer the shortest start that no other answer shares.

    Answers end with the end-of-turn token, so none is the start of another. With answers of one
    token each this is that token; what follows it is certain and need not be computed.
    """
    prefixes = []
    for answer in answers:
        for length in range(1, len(answer) + 1):
            prefix = tuple(answer[:length])
            if sum(tuple(other[:length]) == prefix for other in answers) == 1:
                break
        prefixes.append(prefix)
    return prefixes


def next_tokens(answers: Sequence[Tokens]) -> dict[tuple[int, ...], dict[int, int]]:
    """Return by each start of answers behind which they part: the token that follows, by answer."""
    decisive = decisive_prefixes(answers)
    shared = sorted({prefix[:i] for prefix in decisive for i in range(len(prefix))})
    return {
        start: {
            column: prefix[len(start)]
            for column, prefix in enumerate(decisive)
            if prefix[: len(start)] == start and len(prefix) > len(start)
        }
        for start in shared
    }


def score_answers(
    next_token_logits: NextTokenLogits,
    prompts: Sequence[Tokens],
    answers: Sequence[Tokens],
    description: str = "scoring",
) -> np.ndarray:
    """Return log probabilities (prompts, answers), each answer's up to where it is decided.

    One forward pass a prompt where the answers differ in their first token; one more for every
    start that several answers share.
    """
    scores = np.zeros((len(prompts), len(answers)))
    for start, nexts in next_tokens(answers).items():
        extended = [[*prompt, *start] for prompt in prompts]
        computed = progress(
            next_token_logits(extended),
            description=description,
            unit="prompts",
            total=len(prompts),
        )
        for row, logits in enumerate(computed):
            add_log_probabilities(scores[row], logits, nexts)
    return scores


def add_log_probabilities(row: np.ndarray, logits: np.ndarray, nexts: Mapping[int, int]) -> None:
    """Add to a prompt's scores (answers,) what the logits of one position give each answer's token."""
    normaliser = log_sum_exp(logits)
    for column, token in nexts.items():
        row[column] += float(logits[token]) - normaliser


def log_sum_exp(logits: np.ndarray) -> float:
    """Return log(sum(exp(logits))) of one position, in double precision."""
    values = logits.astype(np.float64)
    peak = values.max()
    return float(peak + np.log(np.exp(values - peak).sum()))
