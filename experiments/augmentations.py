"""Which views help which data? Operations alone and in pairs, weaker and stronger, beside properties of the sets.

Stage 1 alone. Gains are kNN and SVM on codes less those on a plain VQVAE's of the same set, seed and budget, and the
ratio of the squared errors. Then how much of the gain is the set's and how much the view's, what a pair adds to its two
operations, and the rank correlation over sets of the gain of kNN with each property: with few sets, a hint of where to
look. Tables are of all cells in the file that have this loss or none.
"""

import argparse
import itertools
import operator
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from benchmarks.common import table
from experiments.cells import add_arguments, run
from experiments.claims import scipy_stats
from experiments.held_out import add_measuring, cell_of, sizes_of, spread, work_of
from experiments.rows import Row, rows_of
from ncfast.cli.parser import run as run_program
from ncfast.config import PAPER_METHODS
from ncfast.data.augment import OPERATIONS, Augment
from ncfast.data.dataset import Dataset
from ncfast.data.sources import load_dataset
from ncfast.errors import UserError

MEASURES = ("reconstruction", "codebook", "knn", "svm")
PLAIN = "regular"
# By measure: what its table is called, and how that of a view compares with a plain VQVAE's.
GAINS: dict[str, tuple[str, Callable[[float, float], float]]] = {
    "knn_accuracy": ("gain of kNN", operator.sub),
    "svm_accuracy": ("gain of SVM", operator.sub),
    "test_reconstruction_mse": ("MSE, times the plain one", operator.truediv),
}
ACCURACIES = ("knn_accuracy", "svm_accuracy")
Run = tuple[str, int, float]  # set, seed, budget
WINDOWS = 8  # of a series, whose means tell whether it is stationary


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m experiments.augmentations", description=__doc__.splitlines()[0])
    names = list(OPERATIONS)
    parser.add_argument("--operations", nargs="+", default=names, choices=names, metavar="NAME", help="[all]")
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.5, 1, 2], help="above 0, at most 2 [0.5 1 2]")
    parser.add_argument("--pairs", action="store_true", help="pairs of operations, both of a strength, too")
    methods = [name for name in PAPER_METHODS if name != "none"]
    parser.add_argument("--ssl", default="barlow", choices=methods, help="loss that compares the views [barlow]")
    add_arguments(parser, variants=False)
    add_measuring(parser, measures=MEASURES, num_samples=None)
    return parser


def main() -> None:
    arguments = make_parser().parse_args()
    sizes_of(arguments)
    variants = variants_of(arguments.operations, arguments.strengths, arguments.pairs, arguments.ssl)
    cells = [
        cell_of(arguments, name, variant, {"preset": "paper", "stage2_epochs": 1, **options}, seed)
        for name in arguments.sets
        for seed in arguments.seeds
        for variant, options in variants.items()
    ]
    run(cells, work_of(arguments), arguments)
    rows = [row for row in rows_of(arguments.out) if row["cell"]["options"]["ssl"] in ("none", arguments.ssl)]
    names = dict.fromkeys([*arguments.sets, *(row["cell"]["set"] for row in rows)])
    known = {Path(name).stem: properties(load_dataset(name, arguments.data)) for name in names}
    for name, value in plain_values(rows).items():
        known[name]["plain kNN"] = value
    found = {measure: gains(rows, measure) for measure in GAINS}
    tables = [gain_table(each, GAINS[measure][0]) for measure, each in found.items()]
    tables += [share_table(found, ACCURACIES), pair_table(rows, ACCURACIES), property_table(known)]
    print("\n\n".join([*tables, correlation_table(found["knn_accuracy"], known)]))


def variants_of(operations: list[str], strengths: list[float], pairs: bool, ssl: str) -> dict[str, dict[str, object]]:
    views = [(each,) for each in operations]
    if pairs:
        views += itertools.combinations(operations, 2)
    chosen = [[f"{name}:{strength:g}" for name in view] for view in views for strength in strengths]
    for view in chosen:
        Augment(view)  # raises UserError where a strength is none
    return {PLAIN: {"ssl": "none"}} | {"+".join(view): {"ssl": ssl, "augment": view} for view in chosen}


def gains(rows: list[Row], measure: str = "knn_accuracy") -> dict[str, dict[str, list[float]]]:
    """View -> set -> what it gains over a plain VQVAE of the same seed and budget, of each seed."""
    found: dict[str, dict[str, list[float]]] = {}
    for view, each in gains_of_runs(rows, measure).items():
        for (name, *_), gain in each.items():
            found.setdefault(view, {}).setdefault(name, []).append(gain)
    return found


def gains_of_runs(rows: list[Row], measure: str) -> dict[str, dict[Run, float]]:
    """The same by view and run."""
    values = {
        (row["cell"]["variant"], Path(row["cell"]["set"]).stem, row["cell"]["seed"], row["cell"]["budget"]): value
        for row in rows
        if (value := row["values"].get(measure)) is not None
    }
    found: dict[str, dict[Run, float]] = {}
    for (view, *run_of), value in values.items():
        plain = values.get((PLAIN, *run_of))
        if view != PLAIN and plain is not None:
            found.setdefault(view, {})[tuple(run_of)] = GAINS[measure][1](value, plain)
    return dict(sorted(found.items()))


def plain_values(rows: list[Row], measure: str = "knn_accuracy") -> dict[str, float]:
    """Set -> its mean over plain VQVAEs."""
    values: dict[str, list[float]] = {}
    for row in rows:
        if row["cell"]["variant"] == PLAIN and (value := row["values"].get(measure)) is not None:
            values.setdefault(Path(row["cell"]["set"]).stem, []).append(value)
    return {name: statistics.fmean(each) for name, each in values.items()}


def is_pair(view: str) -> bool:
    return "+" in view


def complete(found: dict[str, dict[str, list[float]]], pairs: bool) -> tuple[list[str], list[str], np.ndarray]:
    """Views of one operation, or pairs, that all sets have; these sets, which have most; mean gains [views, sets]."""
    views = {view: each for view, each in found.items() if is_pair(view) == pairs}
    counts = {name: sum(name in each for each in views.values()) for each in views.values() for name in each}
    sets = [name for name, count in counts.items() if 2 * count > max(counts.values())]
    whole = {view: each for view, each in views.items() if all(name in each for name in sets)}
    means = [[statistics.fmean(each[name]) for name in sets] for each in whole.values()]
    return list(whole), sets, np.array(means).reshape(len(whole), len(sets))


def share_table(found: dict[str, dict[str, dict[str, list[float]]]], measures: Sequence[str]) -> str:
    """Of the variance of the gains, what lies between sets, between views, and the rest: interplay and chance.

    p is Friedman's, of views that are all alike.
    """
    stats = scipy_stats()
    lines = []
    for measure, pairs in itertools.product(measures, (False, True)):
        views, sets, x = complete(found[measure], pairs)
        if len(views) < 3 or len(sets) < 3 or np.ptp(x) == 0:
            continue
        total = np.square(x - x.mean()).sum()
        between_sets = len(views) * np.square(x.mean(0) - x.mean()).sum() / total
        between_views = len(sets) * np.square(x.mean(1) - x.mean()).sum() / total
        shares = [f"{share:.2f}" for share in (between_sets, between_views, 1 - between_sets - between_views)]
        kind = "pairs" if pairs else "one operation"
        p = stats.friedmanchisquare(*x).pvalue
        lines.append([f"{GAINS[measure][0]}, {kind}", str(len(views)), str(len(sets)), *shares, f"{p:.2g}"])
    return table(["variance of the", "views", "sets", "between sets", "between views", "rest", "p of views"], lines)


def pair_table(rows: list[Row], measures: Sequence[str]) -> str:
    """What a pair has above the mean of its two operations of that seed, and above the better one, and how often."""
    lines = []
    for measure in measures:
        title, found = GAINS[measure][0], gains_of_runs(rows, measure)
        above: dict[str, list[tuple[float, float]]] = {}
        for view, each in found.items():
            for run_of, gain in each.items() if is_pair(view) else ():
                parts = [found[part][run_of] for part in view.split("+") if run_of in found.get(part, {})]
                if len(parts) == 2:
                    above.setdefault(run_of[0], []).append((gain - statistics.fmean(parts), gain - max(parts)))
        for name, each in above.items():
            mean, better = (statistics.fmean(column) for column in zip(*each, strict=True))
            often = sum(difference > 0 for _, difference in each)
            lines.append([f"{title}, {name}", f"{mean:+.3f}", f"{better:+.3f}", f"{often} of {len(each)}"])
    return table(["pairs", "above their mean", "above the better", "above it in"], lines)


def gain_table(found: dict[str, dict[str, list[float]]], title: str) -> str:
    sets = list(dict.fromkeys(name for each in found.values() for name in each))
    lines = [[view, *(spread(each.get(name, [])) for name in sets)] for view, each in found.items()]
    return table([f"view, {title}", *sets], lines)


def properties(dataset: Dataset) -> dict[str, float]:
    """Of the train series [N, C, L], without gaps; means over series and channels.

    centroid: mean frequency of the power spectrum, in cycles a sample, 0..0.5, the mean of the series left out.
    flatness: geometric over arithmetic mean of the power spectrum: 1 for white noise, 0 for a tone.
    drift: variance of the means of 8 windows over the variance of the series: 0 where the level does not move.
    classes: how many there are.
    classes by level, by shape: share of the variance between classes, of the means of series, and of the series
        without their means. Classes that only differ in when something happens have little of both.
    """
    x = dataset.X_train.astype(np.float64)
    if not np.isfinite(x).all():
        raise UserError(f"{dataset.name} has missing values, and its properties are of series without")
    means = x.mean(-1)  # [N, C]
    flat = x - means[..., None]
    power = np.square(np.abs(np.fft.rfft(flat)[..., 1:])) + 1e-12  # [N, C, L // 2]
    frequency = np.arange(1, power.shape[-1] + 1) / x.shape[-1]
    windows = np.stack([part.mean(-1) for part in np.array_split(x, WINDOWS, axis=-1)], -1)  # [N, C, WINDOWS]
    found = {
        "centroid": float(((power * frequency).sum(-1) / power.sum(-1)).mean()),
        "flatness": float((np.exp(np.log(power).mean(-1)) / power.mean(-1)).mean()),
        "drift": float((windows.var(-1) / (flat.var(-1) + 1e-12)).mean()),
    }
    if dataset.y_train is not None:
        found["classes"] = float(len(np.unique(dataset.y_train)))
        found["classes by level"] = between_classes(means, dataset.y_train)
        found["classes by shape"] = between_classes(flat.reshape(len(x), -1), dataset.y_train)
    return found


def between_classes(x: np.ndarray, y: np.ndarray) -> float:
    """Share of the variance of x [N, D] that lies between the means of classes y [N]."""
    centred = x - x.mean(0)
    total = np.square(centred).sum()
    if total <= 1e-9 * max(1.0, np.square(x).sum()):  # series that all have one level
        return 0.0
    between = sum((y == k).sum() * np.square(centred[y == k].mean(0)).sum() for k in np.unique(y))
    return float(between / total)


def property_table(known: dict[str, dict[str, float]]) -> str:
    columns = list(dict.fromkeys(name for each in known.values() for name in each))
    lines = [[name, *(f"{each[c]:.3g}" if c in each else "" for c in columns)] for name, each in known.items()]
    return table(["set", *columns], lines)


def correlation_table(found: dict[str, dict[str, list[float]]], known: dict[str, dict[str, float]]) -> str:
    """Spearman's, over sets, of mean gain and property; none of fewer than 3 sets, or where all are alike."""
    stats = scipy_stats()
    columns = list(dict.fromkeys(name for each in known.values() for name in each))
    _, sets, means = complete(found, pairs=False)
    whole = {"mean of the views of one operation": dict(zip(sets, means.T.tolist(), strict=True))} if sets else {}
    lines = []
    for view, each in (whole | found).items():
        cells = []
        for column in columns:
            pairs = [(statistics.fmean(v), known[name][column]) for name, v in each.items() if column in known[name]]
            usable = len(pairs) > 2 and all(len(set(side)) > 1 for side in zip(*pairs, strict=True))
            if usable:
                rank = stats.spearmanr(*zip(*pairs, strict=True))
                cells.append(f"{rank.statistic:+.2f} (p {rank.pvalue:.2g})")
            else:
                cells.append("-")
        lines.append([view, str(len(each)), *cells])
    return table(["view, rank correlation of its gain with", "sets", *columns], lines)


if __name__ == "__main__":
    run_program(main, on_interrupt="interrupted; the same command goes on")
