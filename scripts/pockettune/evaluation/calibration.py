"""How far probabilities can be trusted: a temperature that sets them right, and what is left when
doubtful answers are refused.

Source: Guo et al., arXiv 1706.04599 (temperature scaling).
"""

from typing import Any

import numpy as np

from pockettune.common.program import logger
from pockettune.evaluation.statistics import accuracy_by_coverage, calibration_error, normalise

FEWEST_ROWS = 30  # of fewer a temperature would be chance
TEMPERATURES = (0.1, 10.0)
THRESHOLDS = (0.0, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)


def fit_temperature(scores: np.ndarray, true: np.ndarray) -> dict[str, Any] | None:
    """Return the temperature T that makes log probabilities / T likeliest, and what it mends.

    `scores` are the answers' log probabilities (rows, answers), `true` the right ones' places
    (rows,). None where they do not tell one: too few rows, or all answered rightly, of which the
    surest answers would be the likeliest.
    """
    from scipy.optimize import minimize_scalar  # scikit-learn brings it; a second to import

    right = normalise(scores).argmax(axis=1) == true
    if len(true) < FEWEST_ROWS or right.all():
        why = "all are answered rightly" if right.all() else f"{FEWEST_ROWS} are needed"
        logger.info("no temperature from %d rows of validation: %s", len(true), why)
        return None

    def loss(log_temperature: float) -> float:
        return mean_loss(scores, true, float(np.exp(log_temperature)))

    bounds = tuple(np.log(TEMPERATURES))
    value = float(np.exp(minimize_scalar(loss, bounds=bounds, method="bounded").x))
    return {
        "value": value,
        "rows": len(true),
        "loss_before": mean_loss(scores, true, 1.0),
        "loss_after": mean_loss(scores, true, value),
        "calibration_error_before": calibration_error(confidence(scores, 1.0), right),
        "calibration_error_after": calibration_error(confidence(scores, value), right),
    }


def mean_loss(scores: np.ndarray, true: np.ndarray, temperature: float) -> float:
    """Return minus the mean log probability of the right answers at this temperature."""
    scaled = normalise(scores / temperature)
    return -float(scaled[np.arange(len(true)), true].mean())


def confidence(scores: np.ndarray, temperature: float) -> np.ndarray:
    """Return the probability of each row's likeliest answer among the allowed ones: (rows,)."""
    return np.exp(normalise(scores / temperature).max(axis=1))


def cover(scores: np.ndarray, true: np.ndarray, temperature: float) -> list[dict[str, Any]]:
    """Return what is left, and how much of it is right, where less sure answers are refused."""
    right = scores.argmax(axis=1) == true
    return accuracy_by_coverage(confidence(scores, temperature), right, THRESHOLDS)
