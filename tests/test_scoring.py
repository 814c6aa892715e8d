"""Scoring answers by probability, against the definition."""

from collections.abc import Sequence

import numpy as np
import pytest

from pockettune.evaluation.scoring import decisive_prefixes, log_sum_exp, score_answers

VOCABULARY = 12
END = 0


def toy_model(prompts: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Logits that depend on every token of the prompt and on their order."""
    return [
        np.random.default_rng([7, *prompt]).normal(size=VOCABULARY).astype(np.float32)
        for prompt in prompts
    ]


def log_probability(prompt: list[int], continuation: tuple[int, ...]) -> float:
    """The definition: the sum of each token's log softmax behind those before it."""
    total = 0.0
    for i, token in enumerate(continuation):
        logits = toy_model([[*prompt, *continuation[:i]]])[0].astype(np.float64)
        total += np.log(np.exp(logits[token]) / np.exp(logits).sum())
    return total


@pytest.mark.parametrize(
    ("answers", "prefixes"),
    [
        ([[5, END], [6, END]], [(5,), (6,)]),
        ([[5, 1, END], [5, 2, END], [6, END]], [(5, 1), (5, 2), (6,)]),
        ([[5, END], [5, 6, END]], [(5, END), (5, 6)]),  # one is the start of the other
        ([[5, 6, 7, END], [5, 6, 8, END]], [(5, 6, 7), (5, 6, 8)]),
    ],
)
def test_answers_are_scored_up_to_where_they_are_decided(
    answers: list[list[int]], prefixes: list[tuple[int, ...]]
) -> None:
    assert decisive_prefixes(answers) == prefixes
    prompts = [[1, 2, 3], [4], [9, 9]]
    scores = score_answers(toy_model, prompts, answers)
    expected = [[log_probability(prompt, prefix) for prefix in prefixes] for prompt in prompts]
    np.testing.assert_allclose(scores, expected, rtol=1e-6)


def test_single_tokens_take_one_pass() -> None:
    calls = []

    def counting(prompts: Sequence[Sequence[int]]) -> list[np.ndarray]:
        calls.append(len(prompts))
        return toy_model(prompts)

    score_answers(counting, [[1], [2]], [[5, END], [6, END]])
    assert calls == [2]


def test_log_sum_exp_of_large_logits_is_finite() -> None:
    assert log_sum_exp(np.array([1000.0, 1000.0], dtype=np.float32)) == pytest.approx(1000 + np.log(2))  # fmt: skip
