"""The measures against independent computations: scipy, loops, closed forms."""

import sys

import numpy as np
import pytest

from ncfast.errors import UserError
from ncfast.evaluation import measures


def gaussian(rng, n, d):
    return rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + rng.normal(size=d)


@pytest.mark.parametrize("n, m, d", [(500, 300, 16), (200, 1000, 128), (40, 30, 3)])
def test_frechet_distance_is_that_of_sqrtm(n, m, d):
    linalg = pytest.importorskip("scipy.linalg")
    rng = np.random.default_rng(0)
    a, b = gaussian(rng, n, d), gaussian(rng, m, d)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = linalg.sqrtm(cov_a @ cov_b).real
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(cov_a + cov_b - 2 * root)
    assert measures.frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_fewer_rows_than_features():
    """Where sqrtm of a singular product fails or is complex: through the symmetric root of one covariance."""
    rng = np.random.default_rng(1)
    a, b = gaussian(rng, 20, 64), gaussian(rng, 601, 64)
    values, vectors = np.linalg.eigh(np.cov(a, rowvar=False))
    root_a = vectors @ np.diag(np.sqrt(np.clip(values, 0, None))) @ vectors.T
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root_a @ np.cov(b, rowvar=False) @ root_a), 0, None)).sum()
    expected = np.square(a.mean(0) - b.mean(0)).sum() + a.var(0, ddof=1).sum() + b.var(0, ddof=1).sum() - 2 * cross
    assert measures.frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_in_closed_form():
    """Of the same features nothing, of shifted ones the square of the shift, of scaled ones (s - 1)² tr Σ."""
    rng = np.random.default_rng(2)
    a = gaussian(rng, 100, 8)
    a -= a.mean(0)
    assert measures.frechet_distance(a, a[::-1]) == pytest.approx(0, abs=1e-9)
    assert measures.frechet_distance(a, a + 3) == pytest.approx(9 * 8)
    assert measures.frechet_distance(a, 2.5 * a) == pytest.approx(1.5**2 * np.trace(np.cov(a, rowvar=False)))
    # float32 features of a large mean: no digit is lost in the covariance.
    assert measures.frechet_distance((a + 1000).astype(np.float32), a + 1000) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    "a, b", [((1, 3), (5, 3)), ((5, 3), (1, 3)), ((5, 3), (5, 4)), ((5, 4), (5, 3)), ((5,), (5,)), ((5, 3, 3), (5, 3))]
)
def test_frechet_distance_refuses_other_shapes(a, b):
    with pytest.raises(ValueError, match="two rows"):
        measures.frechet_distance(np.zeros(a), np.zeros(b))


def test_inception_score_is_the_exponential_of_the_mutual_information():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.full(5, 0.3), size=103)
    # I(x; y) = H(y) - H(y | x), another form of the mean divergence.
    parts = [p[:51], p[51:102]]
    expected = [np.exp(stats.entropy(part.mean(0)) - stats.entropy(part, axis=1).mean()) for part in parts]
    np.testing.assert_allclose(measures.inception_score(p, splits=2), expected, rtol=1e-12)


def test_inception_score_at_its_ends():
    assert measures.inception_score(np.tile([0.2, 0.5, 0.3], (9, 1)))[0] == pytest.approx(1)
    assert measures.inception_score(np.eye(7)[np.arange(70) % 7])[0] == pytest.approx(7)
    np.testing.assert_allclose(measures.inception_score(np.eye(7)[np.arange(70) // 10], 7), 1)  # a class a split
    with pytest.raises(ValueError, match="10 splits"):
        measures.inception_score(np.eye(7), 10)


def autocorrelation_by_loops(x, lags):
    total = np.zeros((x.shape[1], lags))
    for series in x.astype(np.float64):
        for c, values in enumerate(series):
            v = values - values.mean()
            for k in range(1, lags + 1):
                if np.ptp(values):
                    total[c, k - 1] += (v[:-k] * v[k:]).sum() / (v * v).sum()
    return total / len(x)


@pytest.mark.parametrize("length, lags", [(8, 64), (33, 64), (100, 5)])
def test_autocorrelation_difference_is_that_of_loops(length, lags):
    rng = np.random.default_rng(length)
    x = rng.normal(size=(7, 2, length)).cumsum(-1).astype(np.float32)
    y = rng.normal(size=(5, 2, length)).astype(np.float32) + 100
    y[2, 1] = 0.1  # constant
    k = min(lags, length - 1)
    expected = np.abs(autocorrelation_by_loops(x, k) - autocorrelation_by_loops(y, k)).mean()
    assert measures.autocorrelation_difference(x, y, lags) == pytest.approx(expected, rel=1e-9)
    # Neither a scale nor an offset nor the order counts.
    assert measures.autocorrelation_difference(x, 3 * x[::-1].astype(np.float64) + 1) == pytest.approx(0, abs=1e-6)


def test_marginal_difference_is_that_of_histograms():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(200, 2, 9)).astype(np.float32), rng.normal(0.5, 2, size=(80, 2, 9)).astype(np.float32)
    distances = []
    for c in range(2):
        for t in range(9):
            low, high = float(x[:, c, t].min()), float(x[:, c, t].max())
            edges = [-np.inf, *np.linspace(low, high, 21), np.inf]
            edges[-2] = np.nextafter(high, np.inf)
            p, q = (np.histogram(z[:, c, t].astype(float), edges)[0] / len(z) for z in (x, y))
            distances.append(np.abs(p - q).sum() / 2)
    assert measures.marginal_difference(x, y, bins=20) == pytest.approx(np.mean(distances), rel=1e-12)
    assert measures.marginal_difference(x, y) == measures.marginal_difference(x, y, bins=15)  # √200


def test_marginal_difference_at_its_ends():
    x = np.random.default_rng(0).normal(size=(50, 1, 12))
    x[:, :, 3] = 7  # the same in every series
    assert measures.marginal_difference(x, x[::-1]) == 0
    assert measures.marginal_difference(x, x + 100) == 1
    shuffled = np.random.default_rng(1).permuted(x, axis=0)  # each time on its own: all that it does not see
    assert measures.marginal_difference(x, shuffled) == 0


@pytest.mark.parametrize("rows", [3, 256])
def test_nearest_distance_is_that_of_loops(rows):
    rng = np.random.default_rng(0)
    x, train = (rng.normal(size=(n, 2, 9)).astype(np.float32) + 100 for n in (11, 17))
    distances = [min(np.sqrt(((a - b).astype(np.float64) ** 2).mean()) for b in train) for a in x]
    np.testing.assert_allclose(measures.nearest_distances(x, train, rows), distances, rtol=1e-6)
    assert measures.nearest_distance(x, train) == pytest.approx(sorted(distances)[5], rel=1e-6)
    assert (measures.nearest_distances(train[3:9], train, rows) == 0).all()


@pytest.mark.parametrize("measure", [measures.autocorrelation_difference, measures.marginal_difference])
def test_measures_of_series_refuse_other_shapes(measure):
    with pytest.raises(ValueError, match=r"\[N, C, L\]"):
        measure(np.zeros((3, 1, 8)), np.zeros((3, 1, 9)))
    with pytest.raises(ValueError, match=r"\[N, C, L\]"):
        measure(np.zeros((3, 1, 8)), np.zeros((0, 1, 8)))


def test_perplexity():
    stats = pytest.importorskip("scipy.stats")
    counts = np.array([[3, 0, 5, 2], [1, 1, 1, 1], [0, 9, 0, 0]])
    np.testing.assert_allclose(measures.perplexity(counts), np.exp(stats.entropy(counts, axis=1)), rtol=1e-12)


def test_correlation_of_codes_is_that_of_numpy():
    codes = np.random.default_rng(0).normal(1, 1, size=(6, 10)).astype(np.float32)
    expected = np.corrcoef(codes.astype(np.float64))
    np.testing.assert_allclose(measures.code_correlation(codes), expected, atol=1e-12)
    away = [abs(expected[i, j]) for i in range(6) for j in range(6) if i != j]
    assert measures.mean_abs_off_diagonal(expected) == pytest.approx(np.mean(away))
    a, b = codes[:2].astype(np.float64)
    cosine = a @ b / np.sqrt((a @ a) * (b @ b))
    assert measures.code_cosine(codes)[0, 1] == pytest.approx(cosine)


def scaled(train, *others):
    low, high = train.min(0), train.max(0)
    return [2 * (x - low) / (high - low) - 1 for x in (train, *others)]


def blobs(n, seed):
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 3
    # The second feature is noise of a scale that would drown the first.
    return np.stack([y + 0.3 * rng.normal(size=n), 1000 * rng.normal(size=n), rng.normal(size=n)], 1), y


def test_knn_accuracy_is_that_of_counting_votes():
    pytest.importorskip("sklearn")
    (train, y), (test, y_test) = blobs(90, 0), blobs(60, 1)
    a, b = scaled(train, test)
    nearest = np.square(b[:, None] - a).sum(-1).argsort(1)[:, :5]
    votes = np.stack([(y[nearest] == c).sum(1) for c in range(3)], 1)
    assert measures.knn_accuracy(train, y, test, y_test) == (votes.argmax(1) == y_test).mean()
    with pytest.raises(UserError, match="there are 4"):
        measures.knn_accuracy(train[:4], y[:4], test, y_test)


def test_svm_accuracy_is_that_of_the_dual_problem():
    """Two classes: the dual, min ½ αᵀQα - Σα with 0 ≤ α ≤ 1 and yᵀα = 0, solved by scipy."""
    pytest.importorskip("sklearn")
    optimize = pytest.importorskip("scipy.optimize")
    rng = np.random.default_rng(0)
    train, test = rng.normal(size=(40, 2)), rng.normal(size=(200, 2))
    y, y_test = ((x @ [1, 0.7] + 0.4 * rng.normal(size=len(x)) > 0.2).astype(int) for x in (train, test))
    a, b = scaled(train, test)
    sign = 2 * y - 1
    Q = (sign[:, None] * a) @ (sign[:, None] * a).T
    solved = optimize.minimize(
        lambda alpha: 0.5 * alpha @ Q @ alpha - alpha.sum(),
        np.full(40, 0.1),
        jac=lambda alpha: Q @ alpha - 1,
        bounds=[(0, 1)] * 40,
        constraints={"type": "eq", "fun": lambda alpha: sign @ alpha, "jac": lambda alpha: sign},
        options={"maxiter": 500, "ftol": 1e-12},
    )
    w = (solved.x * sign) @ a
    free = (solved.x > 1e-3) & (solved.x < 1 - 1e-3)
    bias = (sign - a @ w)[free].mean()
    assert measures.svm_accuracy(train, y, test, y_test) == pytest.approx(
        ((b @ w + bias > 0) == y_test).mean(), abs=0.01
    )
    with pytest.raises(UserError, match="two classes"):
        measures.svm_accuracy(train, np.zeros(40), test, y_test)


@pytest.mark.parametrize("measure", [measures.knn_accuracy, measures.svm_accuracy])
def test_without_sklearn_says_what_to_install(measure, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(UserError, match=r"ncfast\[eval\]"):
        measure(np.zeros((6, 2)), np.arange(6), np.zeros((1, 2)), np.zeros(1))
