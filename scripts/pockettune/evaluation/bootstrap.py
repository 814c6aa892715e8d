"""Intervals of a metric that is no share of rows, such as F1: by resampling rows with all they count.

Sources: Efron and Tibshirani, An Introduction to the Bootstrap (1993), the percentile interval; Berg-
Kirkpatrick et al., EMNLP 2012, paired resampling of two systems' outputs.
"""

from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

from pockettune.evaluation.intervals import CONFIDENCE, ONE_SIDED, POWER, mcnemar_exact

Measure = Callable[[Sequence[float]], float]

RESAMPLES = 2000
SEED = 13
TWO_SIDED = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)


def resample(counts: np.ndarray, measure: Measure) -> np.ndarray:
    """Return the metric of RESAMPLES samples of the rows of (rows, numbers), drawn with replacement.

    The same rows are drawn for every table of as many, so that two stages' samples are paired.
    """
    rows = len(counts)
    drawn = np.random.default_rng(SEED).multinomial(rows, np.full(rows, 1 / rows), RESAMPLES)
    return np.array([measure(sums.tolist()) for sums in drawn @ counts])


def metric_interval(counts: np.ndarray, measure: Measure) -> tuple[float, float]:
    """Return the two-sided 95 % interval of the metric."""
    share = (1 - CONFIDENCE) / 2
    low, high = np.quantile(resample(counts, measure), [share, 1 - share])
    return float(low), float(high)


def compare_counts(before: np.ndarray, after: np.ndarray, measure: Measure) -> dict[str, Any]:
    """Compare two stages on the same rows; the keys are those of intervals.compare_paired.

    "lost" and "gained" are rows whose own metric fell or rose, McNemar's p is that of a sign test on
    them. What no row of these showed, another may: the intervals are at least as wide as the share of rows
    that may change unseen, z² / (n + z²), Wilson's bound for none of n, and no smaller loss is detectable.
    """
    n = len(after)
    own = np.array([[measure(row.tolist()) for row in table] for table in (before, after)])
    lost, gained = int((own[1] < own[0]).sum()), int((own[1] > own[0]).sum())
    difference = measure(after.sum(axis=0).tolist()) - measure(before.sum(axis=0).tolist())
    differences = resample(after, measure) - resample(before, measure)

    def unseen(z: float) -> float:
        return z * z / (n + z * z)

    def interval(z: float) -> tuple[float, float]:
        outside = 1 - NormalDist().cdf(z)
        low, high = np.quantile(differences, [outside, 1 - outside])
        widest = difference - unseen(z), difference + unseen(z)
        return max(min(float(low), widest[0]), -1.0), min(max(float(high), widest[1]), 1.0)

    return {
        "lost": lost,
        "gained": gained,
        "mcnemar_p": mcnemar_exact(lost, gained),
        "difference": difference,
        "interval": interval(TWO_SIDED),
        "one_sided": interval(ONE_SIDED),
        "detectable": max(
            (ONE_SIDED + POWER) * float(differences.std()), unseen(ONE_SIDED + POWER)
        ),
    }
