"""How far one stage's probabilities are from another's, and from how often they are right.

Sources: Guo et al., arXiv 1706.04599, expected calibration error and temperature; El-Yaniv and
Wiener, JMLR 11 (2010), coverage against accuracy where unsure answers are refused.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

CALIBRATION_BINS = 15


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


def accuracy_by_coverage(
    confidence: np.ndarray, right: np.ndarray, thresholds: Sequence[float]
) -> list[dict[str, Any]]:
    """Return for each threshold the share of rows at least that sure, and their accuracy.

    The accuracy is None where no row is.
    """
    table = []
    for threshold in thresholds:
        kept = confidence >= threshold
        accuracy = float(right[kept].mean()) if kept.any() else None
        table.append({"threshold": threshold, "coverage": float(kept.mean()), "accuracy": accuracy})
    return table
