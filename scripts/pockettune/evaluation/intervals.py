"""Exact or near-exact intervals of accuracies and of their paired differences.

Sources: Wilson, JASA 22 (1927), for one accuracy; McNemar, Psychometrika 12 (1947), in its exact
binomial form; Tango, Statistics in Medicine 17 (1998), the score interval of a paired difference,
here with a continuity correction of half a row; Connor, Biometrics 43 (1987), what a number of rows
can show.

Tango's interval and not that of the changed rows alone (Clopper-Pearson): the share of changed rows
is uncertain too, and where none changed that one has no width. The correction keeps a false claim
below the promised 5 % at any number of changed rows; without it, small numbers reach 6 %.
"""

import math
from statistics import NormalDist
from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.stats import binomtest

CONFIDENCE = 0.95
ONE_SIDED = NormalDist().inv_cdf(CONFIDENCE)  # what a one-sided claim at 95 % takes, 1.645
POWER = NormalDist().inv_cdf(0.8)  # "could have shown" means: in four of five samples
CORRECTION = 0.5  # rows


def wilson_interval(count: int, n: int) -> tuple[float, float]:
    """Return the two-sided 95 % interval of a share, `count` of `n` rows."""
    interval = binomtest(count, n).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


def mcnemar_exact(lost: int, gained: int) -> float:
    """Return the two-sided p-value that `lost` and `gained` rows differ in number by chance alone."""
    return float(binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0


def paired_score(lost: int, gained: int, n: int, difference: float) -> float:
    """Return how many standard errors the rows lie above a true `difference` of accuracy.

    Tango's statistic, less the correction; the standard error is that under `difference`.
    """
    # q is the likeliest share of lost rows, were `difference` true: 2nq² + bq + c = 0.
    b = (2 * n - gained + lost) * difference - lost - gained
    c = -lost * difference * (1 - difference)
    q = (math.sqrt(max(b * b - 8 * n * c, 0.0)) - b) / (4 * n)
    variance = n * (2 * q + difference * (1 - difference))
    above = gained - lost - n * difference
    above = math.copysign(max(abs(above) - CORRECTION, 0.0), above)
    return above / math.sqrt(variance) if above else 0.0  # the variance is 0 only where both are


def paired_interval(
    lost: int, gained: int, n: int, quantile: float = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
) -> tuple[float, float]:
    """Return the interval of the difference of accuracy, after minus before.

    Both bounds lie `quantile` standard errors away: by default it is the two-sided 95 % interval; with
    ONE_SIDED each bound alone holds with 95 %.
    """
    observed = (gained - lost) / n

    def bound(sign: int) -> float:
        def outside(difference: float) -> float:
            return sign * paired_score(lost, gained, n, difference) + quantile

        # Not -1 and 1 themselves, where the standard error is 0.
        end = sign * (1 - 1e-9)
        return float(brentq(outside, observed, end)) if outside(end) < 0 else float(sign)

    return bound(-1), bound(1)


def detectable_difference(changed: float, n: int) -> float:
    """Return the smallest loss of accuracy that `n` rows show as one in four of five samples.

    `changed` is the share of rows whose being right changed.
    """

    def shortfall(loss: float) -> float:
        share = max(changed, loss)
        spread = ONE_SIDED * math.sqrt(share) + POWER * math.sqrt(max(share - loss * loss, 0.0))
        return n * loss - CORRECTION - spread * math.sqrt(n)

    return float(brentq(shortfall, 0, 1)) if shortfall(1) > 0 else 1.0


def compare_paired(before: np.ndarray, after: np.ndarray) -> dict[str, Any]:
    """Compare which rows two stages answered rightly, (rows,) of bool each.

    Returns rows lost and gained, McNemar's p, the difference of accuracy with its interval, and
    "one_sided", whose bounds hold with 95 % each alone.
    """
    lost, gained = int((before & ~after).sum()), int((~before & after).sum())
    return compare_changes(lost, gained, len(before))


def compare_changes(lost: int, gained: int, n: int) -> dict[str, Any]:
    """Return what `compare_paired` does, of rows that were counted already."""
    return {
        "lost": lost,
        "gained": gained,
        "mcnemar_p": mcnemar_exact(lost, gained),
        "difference": (gained - lost) / n,
        "interval": paired_interval(lost, gained, n),
        "one_sided": paired_interval(lost, gained, n, ONE_SIDED),
        "detectable": detectable_difference((lost + gained) / n, n),
    }
