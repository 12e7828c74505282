"""The scikit-learn estimator: the library's own checks, and what it draws."""

import numpy as np
import pytest
from runs import SMALL, waves

pytest.importorskip("sklearn")

from sklearn.base import clone
from sklearn.utils.estimator_checks import parametrize_with_checks

import ncfast
from ncfast import estimator
from ncfast.estimator import SeriesGenerator


def generator(**parameters):
    return SeriesGenerator(
        **{"stage1_epochs": 1, "stage2_epochs": 1, "options": SMALL, "random_state": 0, **parameters}
    )


@parametrize_with_checks([generator(ssl="none")])
def test_scikit_learn(estimator, check):
    check(estimator)


@pytest.fixture(autouse=True)
def longer(request, monkeypatch):
    """The library's data have one to ten features, no series: each is made eight samples of what is trained on."""
    if "check" in request.fixturenames:
        monkeypatch.setattr(estimator, "LEAST_LENGTH", 1)
        monkeypatch.setattr(estimator, "fit", lambda X, *a, **options: ncfast.fit(np.repeat(X, 8, -1), *a, **options))


@pytest.mark.parametrize("channels", [None, 2])
@pytest.mark.parametrize("labels", [(3, 1), (True, False), ("slow", "fast")])
def test_series_and_labels_come_back_as_they_were(channels, labels):
    X, y = waves(20, channels=channels or 1)
    X = X if channels else X[:, 0]
    y = np.where(y == "slow", *labels)
    made = generator().fit(X, y)
    assert made.classes_.dtype == y.dtype and made.n_features_in_ == X.shape[1]
    x, drawn = made.sample(6, labels={labels[0]: 2, labels[1]: 4})
    assert x.shape == (6, *X.shape[1:]) and sorted(drawn.tolist()) == sorted([labels[0]] * 2 + [labels[1]] * 4)
    assert set(made.sample(4, labels=[labels[1]])[1].tolist()) == {labels[1]}
    with pytest.raises(ValueError, match="labels are of"):
        made.sample(4, labels=["nothing"])


def test_the_random_state_decides():
    X, _ = waves(20)
    first = generator().fit(X)
    assert first.sample(3)[1] is None
    again = clone(first).fit(X)
    assert np.array_equal(first.sample(3)[0], again.sample(3)[0])
    other = clone(first).set_params(random_state=1).fit(X)
    assert not np.array_equal(first.sample(3)[0], other.sample(3)[0])
    with pytest.raises(ValueError, match="ssl is one of|--ssl is one of"):
        generator(ssl="nothing").fit(X)


def test_lists_of_unequal_lengths_and_gaps():
    x, y = waves(12, 20)
    listed = [series[0, : 14 + i % 7] for i, series in enumerate(x)]
    made = generator()
    with pytest.warns(UserWarning, match="14 to 20 time points"):
        made.fit(listed, y)
    drawn, _ = made.sample(30)
    assert drawn.shape == (30, 20) and made.n_features_in_ == 20
    assert {*(~np.isnan(drawn)).sum(1).tolist()} <= {*range(14, 21)}
    gappy = x[:, 0].copy()
    gappy[::2, 5:9] = np.nan
    with pytest.warns(UserWarning, match="missing values"):
        assert np.isfinite(generator().fit(gappy, y).sample(3)[0]).all()
    with pytest.raises(ValueError, match="unequal numbers of channels"):
        generator().fit([np.ones((2, 9)), np.ones((3, 8))])


def test_conditions():
    X = np.random.default_rng(0).normal(size=(12, 20)).cumsum(1)
    fitted = generator().fit(X, conditions={"age": np.arange(12)})
    first, other = (fitted.sample(50, condition={"age": age})[0] for age in (0, 99))
    assert first.shape == (50, 20) and not np.array_equal(first, other)
    with pytest.raises(ValueError, match="no condition 'size'"):
        fitted.sample(3, condition={"size": 1})
