"""The statistics against a second implementation (scipy, scikit-learn), on random cases."""

import numpy as np
import pytest
from scipy import stats
from scipy.special import log_softmax, rel_entr
from sklearn.metrics import accuracy_score, f1_score

from pockettune.evaluation import statistics
from pockettune.evaluation.statistics import (
    bootstrap_interval,
    calibration_error,
    compare_paired,
    kl_divergence,
    mcnemar_exact,
    normalise,
)
from pockettune.tasks.classification import Classification

RANDOM = np.random.default_rng(5)


@pytest.mark.parametrize("case", range(50))
def test_mcnemar_is_the_binomial_test(case: int) -> None:
    lost, gained = np.random.default_rng(case).integers(0, 40, size=2).tolist()
    if lost + gained:
        assert mcnemar_exact(lost, gained) == pytest.approx(
            stats.binomtest(lost, lost + gained).pvalue, rel=1e-9
        )


def test_mcnemar_without_flips_says_nothing() -> None:
    assert mcnemar_exact(0, 0) == 1.0


@pytest.mark.parametrize("case", range(5))
def test_bootstrap_interval_is_scipys(case: int) -> None:
    values = np.random.default_rng(case).choice([-1.0, 0.0, 1.0], p=[0.05, 0.9, 0.05], size=600)
    low, high = bootstrap_interval(values)
    theirs = stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=10_000, rng=case
    ).confidence_interval
    # Both are drawn at random: the quantiles of 10,000 means vary by about 2 % of the width.
    tolerance = 0.05 * (theirs.high - theirs.low)
    assert low == pytest.approx(theirs.low, abs=tolerance)
    assert high == pytest.approx(theirs.high, abs=tolerance)
    assert bootstrap_interval(values) == (low, high), "the same at every call"


def test_paired_comparison_by_hand() -> None:
    before = np.array([True, True, True, False, False, True, False, True])
    after = np.array([True, False, True, True, True, True, False, True])
    compared = compare_paired(before, after)
    assert (compared["lost"], compared["gained"]) == (1, 2)
    assert compared["mcnemar_p"] == 1.0
    assert compared["difference"] == pytest.approx(1 / 8)
    low, high = compared["interval"]
    assert low <= 1 / 8 <= high


def test_kl_divergence_is_scipys() -> None:
    p, q = (log_softmax(RANDOM.normal(size=(20, 500)) * 3, axis=1) for _ in range(2))
    expected = rel_entr(np.exp(p), np.exp(q)).sum(axis=1)
    np.testing.assert_allclose(kl_divergence(p, q), expected, rtol=1e-9)
    assert kl_divergence(p, p).max() == 0


def test_normalise_is_log_softmax() -> None:
    scores = RANDOM.normal(size=(7, 3)) * 50
    np.testing.assert_allclose(normalise(scores), log_softmax(scores, axis=1), atol=1e-12)


def test_calibration_error_by_another_way() -> None:
    confidence = RANDOM.uniform(0.5, 1, size=2000)
    right = RANDOM.uniform(size=2000) < confidence**2
    edges = np.linspace(0, 1, statistics.CALIBRATION_BINS + 1)
    counts = stats.binned_statistic(confidence, right, "count", edges).statistic
    means = stats.binned_statistic(confidence, [right, confidence], "mean", edges).statistic
    gaps = np.nan_to_num(np.abs(means[0] - means[1]))
    assert calibration_error(confidence, right) == pytest.approx((gaps * counts).sum() / 2000)
    assert calibration_error(np.ones(10), np.ones(10, dtype=bool)) == 0


@pytest.mark.parametrize("case", range(20))
def test_scores_of_a_classification_are_scikit_learns(case: int) -> None:
    random = np.random.default_rng(case)
    labels = {str(i): name for i, name in enumerate(["甲", "乙", "丙"])}
    task = Classification(
        {"system": "", "prompt": "{text}", "labels": labels, "template_options": {}},
        {"text_column": "text", "label_column": "label"},
    )
    references = random.choice(list(labels.values()), size=30).tolist()
    predictions = random.choice(list(labels.values()), size=30).tolist()
    scored = task.score(references, predictions)
    assert scored["accuracy"] == pytest.approx(accuracy_score(references, predictions))
    assert scored["macro_f1"] == pytest.approx(f1_score(references, predictions, average="macro"))
