"""How far generated series are from real ones, and what a representation knows: measures of plain arrays.

Each takes NumPy arrays and returns a float; none knows of a model, a data set or a seed it was not given.
"""

import math

import numpy as np

from ncfast.errors import UserError

NEIGHBOURS = 5


def frechet_distance(features_a: np.ndarray, features_b: np.ndarray) -> float:
    """Distance of two Gaussians fitted to two sets of features: FID (Heusel et al. 2017, arXiv 1706.08500, eq. 6).

        |μa - μb|² + tr Σa + tr Σb - 2 tr (Σa Σb)^½

    The last trace is the sum of the square roots of the eigenvalues of Σa Σb. With Σ = RᵀR these are the singular
    values of Ra Rbᵀ, which are never negative or complex, however few rows there are, and lose no digit to a root of
    something near zero.

    Args:
        features_a, features_b: [N, D] and [M, D], N and M at least 2; computed in float64.

    Raises:
        ValueError: not two such matrices.
    """
    a, b = (np.asarray(f, dtype=np.float64) for f in (features_a, features_b))
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"frechet_distance: [N, D] and [M, D], two rows or more; got {a.shape} and {b.shape}")
    distance = np.square(a.mean(0) - b.mean(0)).sum()
    roots = []
    for f in (a, b):
        root = np.linalg.qr((f - f.mean(0)) / np.sqrt(len(f) - 1), mode="r")  # [min(N, D), D], RᵀR = Σ
        distance += np.square(root).sum()  # tr Σ
        roots.append(root)
    distance -= 2 * np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum()
    return max(float(distance), 0.0)  # below zero by rounding only


def inception_score(probabilities: np.ndarray, splits: int = 1) -> np.ndarray:
    """exp(mean KL(p(y|x) ‖ p(y))) of each split (Salimans et al. 2016, arXiv 1606.03498, section 4).

    1 where every series has the same class probabilities, the number of classes where each is sure and all are equally
    frequent. A split of N series is biased low: it can only hold min(N, classes) of them.

    Args:
        probabilities: p(y|x), rows that sum to 1 [N, classes]; computed in float64.
        splits: consecutive parts of N // splits rows, the rest left out.

    Returns:
        float64 [splits].

    Raises:
        ValueError: fewer rows than splits.
    """
    p = np.asarray(probabilities, dtype=np.float64)
    rows = len(p) // splits
    if rows < 1:
        raise ValueError(f"inception_score: at least a row for each of {splits} splits; got {len(p)}")
    p = p[: rows * splits].reshape(splits, rows, -1)
    marginal = np.broadcast_to(p.mean(1, keepdims=True), p.shape)
    # Where p is 0 so is its term; a marginal of 0 has only such.
    ratio = np.divide(p, marginal, out=np.ones_like(p), where=p > 0)
    return np.exp((p * np.log(ratio)).sum(-1).mean(-1))


def autocorrelation(x: np.ndarray, max_lag: int) -> np.ndarray:
    """Mean over series of their autocorrelation at lags 1 to `max_lag`.  x [N, C, L] -> float64 [C, max_lag].

    Each series has its own mean and variance, and lag k sums L - k products divided by that of lag 0. One that never
    changes has no autocorrelation and counts as 0.
    """
    x = np.asarray(x, dtype=np.float64)
    length = x.shape[-1]
    size = 1 << (2 * length - 1).bit_length()  # room enough that no product wraps around
    total = np.zeros((x.shape[1], max_lag))
    for rows in np.array_split(x, -(-len(x) // 1024)):
        centred = rows - rows.mean(-1, keepdims=True)
        power = np.square(np.abs(np.fft.rfft(centred, size)))
        products = np.fft.irfft(power, size)[..., : max_lag + 1]
        variance = products[..., :1]
        # What centring leaves of a constant by rounding is none of it.
        varies = variance > length * np.square(np.abs(rows).max(-1, keepdims=True) * 1e-14)
        total += np.divide(products[..., 1:], variance, out=np.zeros_like(products[..., 1:]), where=varies).sum(0)
    return total / len(x)


def autocorrelation_difference(x: np.ndarray, y: np.ndarray, max_lag: int = 64) -> float:
    """Mean over channels and lags of |autocorrelation of x - autocorrelation of y| (TSGBench, arXiv 2309.03755: ACD).

    Args:
        x, y: series [N, C, L] and [M, C, L].
        max_lag: the last lag, or L - 1 where that is less.

    Returns:
        0 to 2; 0 for the same series in any order. No unit: a scale or an offset of a series changes nothing.
    """
    check_series(x, y)
    lags = min(max_lag, x.shape[-1] - 1)
    return float(np.abs(autocorrelation(x, lags) - autocorrelation(y, lags)).mean())


def marginal_difference(x: np.ndarray, y: np.ndarray, bins: int | None = None) -> float:
    """Total variation distance of the values at one time, mean over channels and times (as TSGBench's MDD, 2309.03755).

    The values of x and y at each time are counted in `bins` equal bins between the smallest and the largest of x, and
    one bin on either side. It says nothing of how values follow each other in time.

    Args:
        x, y: series [N, C, L] and [M, C, L]; x, the real ones, set the bins.
        bins: None for √N, 50 at most: with few series, more bins would count little but chance.

    Returns:
        0 for the same values to 1 where no bin holds both.
    """
    check_series(x, y)
    bins = min(50, math.ceil(math.sqrt(len(x)))) if bins is None else bins
    low, high = x.min(0).astype(np.float64), x.max(0).astype(np.float64)  # [C, L]
    width = np.where(high > low, high - low, 1.0) / bins

    def frequencies(z: np.ndarray) -> np.ndarray:  # -> [C·L, bins + 2]
        place = np.floor((z - low) / width)
        place = np.where(z == high, bins - 1, place)  # the last bin is closed
        place = (np.clip(place, -1, bins) + 1).astype(np.int64).reshape(len(z), -1)
        columns = place.shape[1]
        counts = np.bincount((place + (bins + 2) * np.arange(columns)).ravel(), minlength=columns * (bins + 2))
        return counts.reshape(columns, bins + 2) / len(z)

    return float(np.abs(frequencies(x) - frequencies(y)).sum(1).mean() / 2)


def nearest_distances(x: np.ndarray, others: np.ndarray, rows: int = 256) -> np.ndarray:
    """Distance of each series of x to the one of `others` nearest to it: root of the mean square over channels and
    times.

    Args:
        x, others: series [N, C, L] and [M, C, L].
        rows: of x at a time; N x M distances at once would not fit.

    Returns:
        float64 [N].
    """
    check_series(x, others)
    x, others = (np.asarray(z, dtype=np.float64).reshape(len(z), -1) for z in (x, others))
    squares = np.square(others).sum(1)
    nearest = []
    for block in (x[i : i + rows] for i in range(0, len(x), rows)):
        # |x - t|² without |x|², which is the same for all t.
        closest = others[(squares - 2 * block @ others.T).argmin(1)]
        nearest.append(np.sqrt(np.square(block - closest).mean(1)))
    return np.concatenate(nearest)


def nearest_distance(x: np.ndarray, train: np.ndarray) -> float:
    """Distance of the median series of x to the train series nearest to it (`nearest_distances`). A generator that
    copies is near 0; one that does not is about as far as real series that it never saw.

    Args:
        x, train: series [N, C, L] and [M, C, L].
    """
    return float(np.median(nearest_distances(x, train)))


def check_series(x: np.ndarray, y: np.ndarray) -> None:
    if x.ndim != 3 or x.shape[1:] != y.shape[1:] or not len(x) or not len(y):
        raise ValueError(f"series are [N, C, L] and [M, C, L]; got {x.shape} and {y.shape}")


def perplexity(counts: np.ndarray) -> float:
    """exp of the entropy of how often each code is used: how many codes there would be, were all used alike.

    counts: of each code [K], or of several sets of tokens [..., K] -> [...].
    """
    p = counts / counts.sum(-1, keepdims=True)
    return np.exp(-(p * np.log(np.where(p > 0, p, 1.0))).sum(-1))


def mean_abs_off_diagonal(matrix: np.ndarray) -> float:
    """Mean of |m_ij|, i != j, of a square matrix."""
    away = ~np.eye(len(matrix), dtype=bool)
    return float(np.abs(matrix[away]).mean())


def code_correlation(codebook: np.ndarray) -> np.ndarray:
    """Pearson correlation of every two codes, over their components.  [K, D] -> float64 [K, K]."""
    return code_cosine(codebook - codebook.mean(1, keepdims=True, dtype=np.float64))


def code_cosine(codebook: np.ndarray) -> np.ndarray:
    """Cosine of the angle between every two codes.  [K, D] -> float64 [K, K]; 0 for a code that is zero."""
    codes = np.asarray(codebook, dtype=np.float64)
    lengths = np.linalg.norm(codes, axis=1, keepdims=True)
    unit = np.divide(codes, lengths, out=np.zeros_like(codes), where=lengths > 0)
    return unit @ unit.T


def knn_accuracy(train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray) -> float:
    """Share of test rows that the majority of their 5 nearest train rows labels right.

    Features [N, D] and [M, D] are first scaled to -1..1 by the range of the train rows, as the authors of NC-VQVAE do.

    Raises:
        UserError: fewer than 5 train rows, or scikit-learn is not installed.
    """
    require_sklearn()
    from sklearn.neighbors import KNeighborsClassifier

    if len(train) < NEIGHBOURS:
        raise UserError(f"{NEIGHBOURS} nearest neighbours need as many train series; there are {len(train)}")
    return probe(KNeighborsClassifier(NEIGHBOURS), train, train_labels, test, test_labels)


def svm_accuracy(train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray) -> float:
    """Share of test rows that a linear SVM (C = 1, one against one) of the train rows labels right; scaled as for kNN.

    Raises:
        UserError: the train rows are of one class, or scikit-learn is not installed.
    """
    require_sklearn()
    from sklearn.svm import SVC

    if len(np.unique(train_labels)) < 2:
        raise UserError("a classifier needs two classes at least; the train series are of one")
    return probe(SVC(kernel="linear"), train, train_labels, test, test_labels)


def probe(classifier, train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray) -> float:
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import MinMaxScaler

    fitted = make_pipeline(MinMaxScaler((-1, 1)), classifier).fit(train, train_labels)
    return float(fitted.score(test, test_labels))


def require_sklearn() -> None:
    try:
        import sklearn  # noqa: F401
    except ImportError:
        raise UserError("this measure needs scikit-learn: pip install 'ncfast[eval]'") from None
