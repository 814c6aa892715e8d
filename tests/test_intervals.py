"""Intervals and verdicts: against a second computation, and against what they promise."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from scipy import stats
from scipy.optimize import minimize_scalar

from pockettune.evaluation import intervals
from pockettune.evaluation.bootstrap import compare_counts
from pockettune.evaluation.intervals import (
    ONE_SIDED,
    compare_changes,
    compare_paired,
    detectable_difference,
    mcnemar_exact,
    paired_interval,
    paired_score,
    wilson_interval,
)
from pockettune.evaluation.verdict import judge, say

MARGIN = 0.005


@pytest.mark.parametrize("case", range(50))
def test_mcnemar_is_the_binomial_test(case: int) -> None:
    lost, gained = np.random.default_rng(case).integers(0, 40, size=2).tolist()
    if lost + gained:
        both = sum(math.comb(lost + gained, k) for k in range(min(lost, gained) + 1))
        expected = min(1.0, 2 * both / 2 ** (lost + gained))
        assert mcnemar_exact(lost, gained) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_without_flips_says_nothing() -> None:
    assert mcnemar_exact(0, 0) == 1.0


def test_no_error_in_few_rows_is_not_certainty() -> None:
    low, high = wilson_interval(20, 20)
    assert 0.8 < low < 0.9 and high == 1.0
    # By hand, Wilson 1927: n / (n + z²).
    assert low == pytest.approx(20 / (20 + 1.959964**2), rel=1e-6)
    assert wilson_interval(0, 20) == pytest.approx((0, 1 - low))


@pytest.mark.parametrize("n", [20, 300, 1200, 10_000])
def test_no_flip_is_no_more_than_the_rule_of_three(n: int) -> None:
    """Of rows with a true loss of 3 / n, one sample in twenty shows none."""
    right = np.ones(n, dtype=bool)
    low, high = compare_paired(right, right)["interval"]
    assert low < -3 / n and high > 3 / n


@pytest.mark.parametrize("case", range(30))
def test_score_is_tangos(case: int) -> None:
    """The standard error is that of the likeliest table in which the difference is true."""
    random = np.random.default_rng(case)
    n = int(random.integers(50, 2000))
    lost, gained = random.integers(1, 20, size=2).tolist()
    difference = float(random.uniform(-0.05, 0.05))

    def misfit(share_lost: float) -> float:
        shares = np.array([share_lost, share_lost + difference, 1 - 2 * share_lost - difference])
        return -float((np.array([lost, gained, n - lost - gained]) * np.log(shares)).sum())

    bounds = (max(0, -difference) + 1e-12, (1 - difference) / 2 - 1e-12)
    q = minimize_scalar(misfit, bounds=bounds, method="bounded", options={"xatol": 1e-12}).x
    above = gained - lost - n * difference
    error = math.sqrt(n * (2 * q + difference - difference**2))
    expected = math.copysign(max(abs(above) - 0.5, 0), above) / error
    assert paired_score(lost, gained, n, difference) == pytest.approx(expected, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("case", range(30))
def test_interval_holds_the_difference_and_turns_with_the_stages(case: int) -> None:
    random = np.random.default_rng(case)
    n = int(random.integers(1, 500))
    lost = int(random.integers(0, n + 1))
    gained = int(random.integers(0, n - lost + 1))
    low, high = paired_interval(lost, gained, n)
    assert -1 <= low <= (gained - lost) / n <= high <= 1
    assert paired_interval(gained, lost, n) == pytest.approx((-high, -low), abs=1e-9)


def outcomes(n: int, lost: float, gained: float) -> tuple[np.ndarray, np.ndarray]:
    """Return (lost, gained) counts (pairs, 2) with all but no probability, and their probability."""
    ranges = [np.arange(int(n * p - 6 * math.sqrt(n * p) - 9), int(n * p + 6 * math.sqrt(n * p) + 9)) for p in (lost, gained)]  # fmt: skip
    pairs = np.stack(np.meshgrid(*[r[(r >= 0) & (r <= n)] for r in ranges]), -1).reshape(-1, 2)
    counts = np.column_stack([pairs, n - pairs.sum(axis=1)])
    return pairs, stats.multinomial.pmf(counts, n, [lost, gained, 1 - lost - gained])


@pytest.mark.parametrize("n", [300, 1200, 10_000])
@pytest.mark.parametrize("changed", [0.0051, 0.01, 0.02, 0.05])
def test_false_claims_stay_below_their_five_percent(n: int, changed: float) -> None:
    """Not simulated: the probability of every outcome is summed."""
    pairs, chance = outcomes(n, (changed + MARGIN) / 2, (changed - MARGIN) / 2)
    good = [paired_score(lost, gained, n, -MARGIN) > ONE_SIDED for lost, gained in pairs.tolist()]
    assert chance.sum() == pytest.approx(1, abs=1e-6)
    assert chance[good].sum() < 0.05
    pairs, chance = outcomes(n, changed / 2, changed / 2)
    worse = [paired_score(lost, gained, n, 0) < -ONE_SIDED for lost, gained in pairs.tolist()]
    assert chance[worse].sum() < 0.05


@pytest.mark.parametrize("n", [300, 1200, 10_000])
@pytest.mark.parametrize("changed", [0.0, 0.01, 0.05])
def test_detectable_difference_is_detected_in_four_of_five_samples(n: int, changed: float) -> None:
    loss = detectable_difference(changed, n)
    share = max(changed, loss)
    pairs, chance = outcomes(n, (share + loss) / 2, (share - loss) / 2)
    likely = chance > 1e-5
    claims = [
        judge(compare_changes(lost, gained, n), 1e-9)["claim"]
        for lost, gained in pairs[likely].tolist()
    ]
    power = chance[likely][np.array(claims) == "worse"].sum()
    assert 0.79 < power < 0.96


def test_detectable_difference_of_a_handful_of_rows_is_all() -> None:
    assert detectable_difference(0.0, 1) == 1.0


@pytest.mark.parametrize(
    ("lost", "gained", "n", "claim", "words"),
    [
        (0, 0, 1200, "as good", "proved as good (difference at least -0.30 points, margin 0.5)"),
        (10, 0, 1200, "worse", "proved worse (difference at most -0.47 points)"),
        (0, 0, 300, "undecided",
         "not decided by these rows, which could have shown a difference of 2.37 points"),
        (0, 50, 300, "as good", "proved as good (difference at least +13.28 points, margin 0.5)"),
    ],
)  # fmt: skip
def test_verdict_and_its_words(lost: int, gained: int, n: int, claim: str, words: str) -> None:
    verdict = judge(compare_changes(lost, gained, n), MARGIN)
    assert verdict["claim"] == claim and verdict["margin"] == MARGIN
    assert say(verdict) == words


def test_verdict_follows_the_score() -> None:
    """The bound and the test it inverts are of one mind."""
    for lost in range(0, 30, 3):
        claim = judge(compare_changes(lost, 5, 1200), MARGIN)["claim"]
        assert (claim == "as good") == (paired_score(lost, 5, 1200, -MARGIN) > ONE_SIDED)


def test_paired_comparison_by_hand() -> None:
    before = np.array([True, True, True, False, False, True, False, True])
    after = np.array([True, False, True, True, True, True, False, True])
    compared = compare_paired(before, after)
    assert (compared["lost"], compared["gained"]) == (1, 2)
    assert compared["mcnemar_p"] == 1.0
    assert compared["difference"] == pytest.approx(1 / 8)
    low, high = compared["interval"]
    assert low <= 1 / 8 <= high
    assert intervals.CONFIDENCE == 0.95


def f1(sums: Sequence[float]) -> float:
    right, predicted, wanted = sums
    return 2 * right / (predicted + wanted) if predicted + wanted else 1.0


def test_bootstrap_of_rows_that_do_not_differ_has_not_seen_all() -> None:
    right = np.ones((80, 3))
    compared = compare_counts(right, right, f1)
    # By hand, Wilson's bound for none of 80: at 1.645² and at (1.645 + 0.842)².
    assert compared["one_sided"] == pytest.approx((-2.7055 / 82.7055, 2.7055 / 82.7055), abs=1e-4)
    assert compared["detectable"] == pytest.approx(6.1826 / 86.1826, abs=1e-4)
    assert judge(compared, MARGIN)["claim"] == "undecided"


def test_bootstrap_stays_within_what_a_difference_can_be() -> None:
    wrong, right = np.tile([0.0, 1.0, 1.0], (20, 1)), np.ones((20, 3))
    for before, after, sign in ((wrong, right, 1), (right, wrong, -1)):
        compared = compare_counts(before, after, f1)
        assert compared["difference"] == sign and sign in compared["interval"]
        assert all(-1 <= bound <= 1 for bound in compared["interval"] + compared["one_sided"])
