"""Whether generated series give away the ones that the generator was trained on."""

import numpy as np

from ncfast.evaluation.measures import nearest_distance, nearest_distances


def nearest_neighbour_ratio(generated: np.ndarray, train: np.ndarray, test: np.ndarray) -> float:
    """Median distance of generated series to the nearest train series, over that of real series never trained on.

    About 1 where generated series are as far from the train series as new real ones; below 0.7 the generator has
    memorised, and at 0 it copies.

    Args:
        generated, train, test: series [N, C, L], [M, C, L] and [K, C, L], in the same units.

    Returns:
        NaN where the median test series is itself a train series.
    """
    return ratio(nearest_distance(generated, train), nearest_distance(test, train))


def ratio(generated: float, test: float) -> float:
    """Of two median distances."""
    return generated / test if test > 0 else float("nan")


def membership_inference_auc(generated: np.ndarray, train: np.ndarray, test: np.ndarray) -> float:
    """How well one who sees generated series alone tells who was trained on: the attack of Chen et al. 2020 (GAN-Leaks,
    arXiv 1909.03935, section 4.2), which takes a series for a member where some generated series is near it.

    Args:
        generated, train, test: as `nearest_neighbour_ratio`.

    Returns:
        Area under the ROC curve of minus the distance to the nearest generated series, train against test series: 0.5
        where nothing leaks, 1 where every train series is nearer than every test series.
    """
    return roc_auc(-nearest_distances(train, generated), -nearest_distances(test, generated))


def roc_auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Probability that a positive has the higher score of two drawn at random; ties count half.  [N], [M]."""
    ordered = np.sort(negative)
    below, up_to = (np.searchsorted(ordered, positive, side) for side in ("left", "right"))
    return float((below + up_to).sum() / (2 * len(positive) * len(negative)))
