"""Paired statistics of two stages that answered the same rows.

Sources: McNemar, Psychometrika 12 (1947), in its exact binomial form; Efron, Annals of Statistics 7
(1979), percentile bootstrap; Guo et al., arXiv 1706.04599, expected calibration error.
"""

from math import comb
from typing import Any

import numpy as np

BOOTSTRAP_SAMPLES = 10_000
CALIBRATION_BINS = 15


def mcnemar_exact(lost: int, gained: int) -> float:
    """Return the two-sided p-value that `lost` and `gained` rows differ in number by chance alone."""
    n, fewer = lost + gained, min(lost, gained)
    if n == 0:
        return 1.0
    tail = sum(comb(n, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**n)


def bootstrap_interval(values: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """Return the percentile interval of the mean of (rows,), the same at every call.

    Of paired differences it is the interval of the difference.
    """
    # Rows with the same value are interchangeable, so drawing how many of each is enough.
    kinds, counts = np.unique(values, return_counts=True)
    generator = np.random.default_rng(0)
    drawn = generator.multinomial(len(values), counts / len(values), size=BOOTSTRAP_SAMPLES)
    means = drawn @ kinds / len(values)
    outside = (1 - confidence) / 2
    low, high = np.quantile(means, [outside, 1 - outside])
    return float(low), float(high)


def compare_paired(before: np.ndarray, after: np.ndarray) -> dict[str, Any]:
    """Compare which rows two stages answered rightly, (rows,) of bool each.

    Returns rows lost and gained, McNemar's p, and the difference of accuracy with its interval.
    """
    lost, gained = int((before & ~after).sum()), int((~before & after).sum())
    difference = after.astype(float) - before.astype(float)
    return {
        "lost": lost,
        "gained": gained,
        "mcnemar_p": mcnemar_exact(lost, gained),
        "difference": float(difference.mean()),
        "interval": bootstrap_interval(difference),
    }


def kl_divergence(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return KL(reference || other) of each row, in nats, from log probabilities (rows, outcomes)."""
    reference, other = reference.astype(np.float64), other.astype(np.float64)
    return np.sum(np.exp(reference) * (reference - other), axis=-1)


def normalise(log_scores: np.ndarray) -> np.ndarray:
    """Return log probabilities that sum to one over the last axis."""
    values = log_scores.astype(np.float64)
    peak = values.max(axis=-1, keepdims=True)
    return values - peak - np.log(np.exp(values - peak).sum(axis=-1, keepdims=True))


def calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """Return the expected calibration error: |accuracy - confidence|, weighted over equal bins."""
    bins = np.clip(np.ceil(confidence * CALIBRATION_BINS).astype(int) - 1, 0, CALIBRATION_BINS - 1)
    error = 0.0
    for chosen in (bins == number for number in range(CALIBRATION_BINS)):
        if chosen.any():
            error += chosen.mean() * abs(right[chosen].mean() - confidence[chosen].mean())
    return float(error)
