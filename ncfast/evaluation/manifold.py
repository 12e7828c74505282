"""Precision and recall of generated series: how real they are, and how much of the real ones they cover."""

import numpy as np

NEIGHBOURS = 3  # Kynkäänniemi et al. 2019
ROWS = 256  # points whose distances to all others are held at once


def precision_and_recall(real: np.ndarray, generated: np.ndarray, k: int = NEIGHBOURS) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991, eqs. 1 to 3).

    Args:
        real, generated: features [N, D] and [M, D], N and M above k.

    Returns:
        Share of generated points in the manifold of the real ones, and of real points in that of the generated ones.

    Raises:
        ValueError: too few points, or two numbers of features.
    """
    return share_covered(generated, real, k), share_covered(real, generated, k)


def share_covered(points: np.ndarray, others: np.ndarray, k: int = NEIGHBOURS) -> float:
    """Share of points in the manifold of `others`: no further from one of these than that one's k-th neighbour is.

    Args:
        points, others: [N, D] and [M, D].
    """
    if points.ndim != 2 or points.shape[1:] != others.shape[1:] or len(others) <= k or not len(points):
        raise ValueError(f"points are [N, D] and [M, D], M above {k}; got {points.shape} and {others.shape}")
    points, others = (np.asarray(z, dtype=np.float64) for z in (points, others))
    radii = np.concatenate(
        [
            # The point itself is at distance 0, so that it is left out by taking one more.
            np.partition(squared_distances(others[i : i + ROWS], others), k, axis=1)[:, k]
            for i in range(0, len(others), ROWS)
        ]
    )
    covered = [(squared_distances(points[i : i + ROWS], others) <= radii).any(1) for i in range(0, len(points), ROWS)]
    return float(np.concatenate(covered).mean())


def squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:  # [N, D], [M, D] -> [N, M]
    squares = np.square(x).sum(1)[:, None] + np.square(y).sum(1) - 2 * x @ y.T
    return np.maximum(squares, 0.0)  # below zero by rounding only
