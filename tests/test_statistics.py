"""The statistics against a second implementation (scipy, scikit-learn), on random cases."""

import numpy as np
import pytest
from scipy import stats
from scipy.special import log_softmax, rel_entr
from sklearn.metrics import accuracy_score, f1_score

from pockettune.evaluation import statistics
from pockettune.evaluation.statistics import (
    accuracy_by_coverage,
    calibration_error,
    kl_divergence,
    normalise,
)
from pockettune.tasks.classification import Classification

RANDOM = np.random.default_rng(5)


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


def test_accuracy_by_coverage_by_hand() -> None:
    confidence, right = np.array([0.5, 0.9, 0.9, 0.99]), np.array([False, True, False, True])
    assert accuracy_by_coverage(confidence, right, [0.5, 0.9, 1.0]) == [
        {"threshold": 0.5, "coverage": 1.0, "accuracy": 0.5},
        {"threshold": 0.9, "coverage": 0.75, "accuracy": pytest.approx(2 / 3)},
        {"threshold": 1.0, "coverage": 0.0, "accuracy": None},
    ]


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
