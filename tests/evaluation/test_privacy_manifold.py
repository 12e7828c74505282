"""Privacy and coverage on points whose answer is known, and against scikit-learn."""

import numpy as np
import pytest

from ncfast.evaluation.manifold import precision_and_recall, share_covered
from ncfast.evaluation.privacy import membership_inference_auc, nearest_neighbour_ratio, roc_auc


def series(n, seed, channels=2):
    return np.random.default_rng(seed).normal(size=(n, channels, 15)).astype(np.float32)


def test_copies_have_ratio_0_and_new_series_about_1():
    train, test = series(80, 0), series(60, 1)
    assert nearest_neighbour_ratio(train[:20], train, test) == 0
    assert nearest_neighbour_ratio(test, train, test) == 1
    assert nearest_neighbour_ratio(series(60, 2), train, test) == pytest.approx(1, abs=0.1)
    assert np.isnan(nearest_neighbour_ratio(test, train, train))


@pytest.mark.parametrize("values", [3, 1000])
def test_auc_is_scikit_learns_ties_and_all(values):
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    positive, negative = rng.integers(0, values, 57) + 1, rng.integers(0, values, 31)
    expected = metrics.roc_auc_score([1] * 57 + [0] * 31, [*positive, *negative])
    assert roc_auc(positive, negative) == pytest.approx(expected, abs=1e-12)
    assert roc_auc(np.ones(4), np.ones(3)) == 0.5


def test_membership_is_known_of_copies_and_unknown_of_new_series():
    train, test = series(80, 0), series(60, 1)
    assert membership_inference_auc(train, train, test) == 1
    assert membership_inference_auc(test, train, test) == 0
    assert membership_inference_auc(series(60, 2), train, test) == pytest.approx(0.5, abs=0.1)


def test_points_on_a_line():
    line = np.arange(10.0)[:, None]  # the third neighbour of an inner point is 2 away, of an end 3
    points = np.array([[0.5], [-2.9], [-3.1], [11.9], [12.1], [100.0]])
    assert share_covered(points, line, k=3) == 3 / 6
    assert share_covered(line, line, k=1) == 1
    # Two clusters, of which only one is generated: all of it is real, half of the real ones are covered.
    real = np.concatenate([line, line + 1000])
    assert precision_and_recall(real, line + 0.1) == (1, 0.5)
    assert precision_and_recall(real, line + 500) == (0, 0)


def test_shares_are_those_of_loops():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(300, 4)), rng.normal(size=(290, 4)) * 1.5
    distances = np.linalg.norm(b[:, None] - b, axis=-1)
    radii = np.sort(distances, axis=1)[:, 3]
    expected = np.mean([(np.linalg.norm(point - b, axis=1) <= radii).any() for point in a])
    assert share_covered(a, b, k=3) == expected


def test_too_few_points_are_refused():
    with pytest.raises(ValueError, match="M above 3"):
        share_covered(np.zeros((5, 2)), np.zeros((3, 2)))
