"""What the paper claims, tested on cells: effect and Wilcoxon's signed-rank test, paired by set and seed, and by set.

Files are tables of `paper_table` and `checks`; --authors tests the means that the authors published in their place. A
variant is compared with `regular`, one with "+" in its name with what stands before that. Pairs of one set are not
independent: it is the test over sets that speaks for other sets.
"""

import argparse
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.common import table
from experiments.paper_table import SETTINGS
from experiments.rows import Row, rows_of
from ncfast.cli.parser import run as run_program
from ncfast.errors import UserError
from ncfast.evaluation.comparison import authors

PLAIN, DEFAULT, VIEWS, ABOVE_VIEWS = "regular", "default", "views", "above views"
SSL = [name for name in SETTINGS if name not in (PLAIN, DEFAULT)]
ALL_SSL = "mean of those with SSL"
NOTE = (
    "Effects are means over sets of differences, or geometric means of ratios (x). As claimed: of how many pairs (set, "
    "seed). Rank-biserial: over pairs, +1 where all go up, -1 where all go down. p: two-sided. Holm: p by set, "
    "adjusted for the variants of a claim."
)
Values = dict[tuple[str, int, str], dict[str, float]]  # of (set, seed, variant): measures by name
Effects = dict[tuple[str, int], float]  # of (set, seed)


class Claim(NamedTuple):
    text: str
    metric: str
    up: bool  # whether the claim is that the metric goes up
    # Of the variants that are compared with what stands before it; "": those with SSL, with `regular`, as are "default"
    # and, for "views", reconstructed views alone; "above views": those with SSL, with the same views alone.
    suffix: str = ""
    ratio: bool = False  # effects are ratios, not differences


CLAIMS = (
    Claim("SSL: kNN up", "knn_accuracy", True),
    Claim("SSL: SVM up", "svm_accuracy", True),
    Claim("SSL: IS up", "IS_mean", True),
    Claim("SSL: FID down", "FID", False, ratio=True),
    Claim("SSL: CAS up", "CAS", True),
    Claim("views alone: kNN up", "knn_accuracy", True, VIEWS),
    Claim("views alone: FID down", "FID", False, VIEWS, ratio=True),
    Claim("views alone: MSE up", "test_reconstruction_mse", True, VIEWS, ratio=True),
    Claim("SSL above views: kNN up", "knn_accuracy", True, ABOVE_VIEWS),
    Claim("SSL above views: FID down", "FID", False, ABOVE_VIEWS, ratio=True),
    Claim("SSL above views: MSE up", "test_reconstruction_mse", True, ABOVE_VIEWS, ratio=True),
    Claim("SSL: kNN up, codes move while probed", "knn_accuracy_moving", True),
    Claim("SSL: SVM up, codes move while probed", "svm_accuracy_moving", True),
    Claim("`default`: kNN up", "knn_accuracy", True, DEFAULT),
    Claim("`default`: SVM up", "svm_accuracy", True, DEFAULT),
    Claim("`default`: IS up", "IS_mean", True, DEFAULT),
    Claim("`default`: FID down", "FID", False, DEFAULT, ratio=True),
    Claim("`default`: CAS up", "CAS", True, DEFAULT),
    Claim("random embeddings: FID up", "FID", True, "random-embeddings", ratio=True),
    Claim("random embeddings: IS down", "IS_mean", False, "random-embeddings"),
    Claim("views not reconstructed: MSE up", "test_reconstruction_mse", True, "view-weight-0", ratio=True),
    Claim("views not reconstructed: perplexity down", "test_perplexity", False, "view-weight-0", ratio=True),
    Claim("36 % masked: FID up", "FID", True, "kept", ratio=True),
    Claim("36 % masked: IS down", "IS_mean", False, "kept"),
)
DIAGRAMS = ("FID", "IS_mean", "CAS", "knn_accuracy", "svm_accuracy")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m experiments.claims", description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="tables of cells")
    parser.add_argument("--authors", action="store_true", help="test the authors' published means over sets instead")
    parser.add_argument("--budget", type=float, default=1.0, help="cells with this share of the epochs [1]")
    parser.add_argument("--diagrams", type=Path, metavar="DIR", help="draw critical-difference diagrams there")
    return parser


def main() -> None:
    arguments = make_parser().parse_args()
    if arguments.authors == bool(arguments.files):
        raise UserError("give tables of cells, or --authors")
    if missing := [str(path) for path in arguments.files if not path.exists()]:
        raise UserError(f"there is no {', '.join(missing)}")
    rows = [row for path in arguments.files for row in rows_of(path) if row["cell"]["budget"] == arguments.budget]
    values = values_of_authors() if arguments.authors else values_of(rows)
    if not values:
        raise UserError(f"no cells with the budget {arguments.budget:g} in {', '.join(map(str, arguments.files))}")
    print(as_table(values))
    if arguments.diagrams is not None:
        for path in draw(values, arguments.diagrams, "authors" if arguments.authors else "ncfast"):
            print(f"wrote {path}")


def values_of(rows: Iterable[Row]) -> Values:
    """Of a variant that several tables have, measures are the first's, and the others' that it has not."""
    values: Values = {}
    for row in rows:
        cell = row["cell"]
        key = Path(cell["set"]).stem, cell["seed"], cell["variant"]
        values[key] = row["values"] | values.get(key, {})
    return values


def values_of_authors() -> Values:
    """Their means over four runs, as of one seed: single runs of different methods have nothing that pairs them."""
    values: Values = {}
    for (name, method, metric), (mean, _) in authors().items():
        values.setdefault((name, 0, method), {})[metric] = mean
    return values


def as_table(values: Values) -> str:
    lines = []
    for claim in CLAIMS:
        variants = compared(values, claim)
        effects = {
            name: each for name, against in variants.items() if (each := effects_of(values, claim, name, against))
        }
        results = {name: Result.of(each) for name, each in effects.items()}
        adjusted = dict(zip(results, holm([result.p_sets for result in results.values()]), strict=True))
        if not claim.suffix and len(effects) > 1:
            results = {ALL_SSL: Result.of(mean_of(list(effects.values()))), **results}
        lines += [
            [claim.text, name, *result.cells(claim), f"{adjusted[name]:.2g}" if name in adjusted else ""]
            for name, result in results.items()
            if result.pairs
        ]
    columns = ["claim", "variant", "effect", "as claimed", "rank-biserial", "p, by set and seed", "sets", "p, by set"]
    return table([*columns, "Holm"], lines) + "\n\n" + NOTE


def compared(values: Values, claim: Claim) -> dict[str, str]:
    """Variants that the claim is about, and what each is compared with."""
    there = list(dict.fromkeys(variant for _, _, variant in values))
    if not claim.suffix:
        return {name: PLAIN for name in SSL if name in there}
    if claim.suffix in (DEFAULT, VIEWS):
        return {name: PLAIN for name in there if name.partition("_")[0] == claim.suffix}
    if claim.suffix == ABOVE_VIEWS:
        alone = {name: f"{VIEWS}_{name.partition('_')[2]}" for name in SSL if name in there}
        return {name: against for name, against in alone.items() if against in there}
    return {name: name.partition("+")[0] for name in there if name.partition("+")[2] == claim.suffix}


def effects_of(values: Values, claim: Claim, variant: str, against: str) -> Effects:
    """Differences, or logarithms of ratios, wherever both have been measured."""
    effects = {}
    for (name, seed, each), measures in values.items():
        other = values.get((name, seed, against), {})
        if each != variant or claim.metric not in measures or claim.metric not in other:
            continue
        pair = measures[claim.metric], other[claim.metric]
        if not claim.ratio:
            effects[name, seed] = pair[0] - pair[1]
        elif min(pair) > 0:
            effects[name, seed] = math.log(pair[0] / pair[1])
    return effects


def mean_of(effects: Sequence[Effects]) -> Effects:
    """Over variants, of what has been measured of all of them."""
    common = [pair for pair in effects[0] if all(pair in each for each in effects)]
    return {pair: statistics.fmean(each[pair] for each in effects) for pair in common}


class Result(NamedTuple):
    """Of a variant and what it is compared with."""

    effect: float  # mean over sets of the means over seeds
    pairs: int  # (set, seed)
    ups: int  # of them
    downs: int
    rank_biserial: float
    p_pairs: float
    sets: int
    p_sets: float

    @classmethod
    def of(cls, effects: Effects) -> "Result":
        by_set: dict[str, list[float]] = {}
        for (name, _), effect in effects.items():
            by_set.setdefault(name, []).append(effect)
        means = [statistics.fmean(each) for each in by_set.values()]
        pairs = list(effects.values())
        effect = statistics.fmean(means) if means else math.nan
        counts = len(pairs), sum(each > 0 for each in pairs), sum(each < 0 for each in pairs)
        return cls(effect, *counts, rank_biserial(pairs), wilcoxon(pairs), len(means), wilcoxon(means))

    def cells(self, claim: Claim) -> list[str]:
        effect = f"x {math.exp(self.effect):.3g}" if claim.ratio else f"{self.effect:+.3g}"
        share = f"{self.ups if claim.up else self.downs} of {self.pairs}"
        by_set = [str(self.sets), f"{self.p_sets:.2g}"]
        return [effect, share, f"{self.rank_biserial:+.2f}", f"{self.p_pairs:.2g}", *by_set]


def wilcoxon(effects: Sequence[float]) -> float:
    """Two-sided p that they are as often up as down and as far; 1 where none differs from 0."""
    return float(scipy_stats().wilcoxon(effects).pvalue) if any(effects) else 1.0


def scipy_stats() -> Any:
    try:
        from scipy import stats
    except ModuleNotFoundError:
        raise UserError("the tests need scipy: pip install 'ncfast[eval]'") from None
    return stats


def rank_biserial(effects: Sequence[float]) -> float:
    """(ranks that go up - ranks that go down) / all ranks, ranks by size (Kerby, 2014); those of 0 are left out."""
    sizes = np.array([each for each in effects if each])
    if not len(sizes):
        return 0.0
    smaller = np.abs(sizes)[:, None] > np.abs(sizes)
    equal = np.abs(sizes)[:, None] == np.abs(sizes)
    ranks = smaller.sum(1) + (equal.sum(1) + 1) / 2
    return float((ranks * np.sign(sizes)).sum() / ranks.sum())


def holm(p: Sequence[float]) -> list[float]:
    """p adjusted for how many there are (Holm, 1979)."""
    adjusted = [0.0] * len(p)
    highest = 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        highest = max(highest, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = highest
    return adjusted


def draw(values: Values, folder: Path, whose: str) -> list[Path]:
    """A critical-difference diagram of each of DIAGRAMS, from means over seeds of the sets that all variants have."""
    try:
        from aeon.visualisation import plot_critical_difference
        from matplotlib import pyplot
    except ModuleNotFoundError:
        raise UserError("diagrams need aeon and matplotlib: pip install 'ncfast[data,eval]'") from None
    folder.mkdir(parents=True, exist_ok=True)
    pyplot.rcParams["svg.hashsalt"] = "ncfast"  # the same file of the same figures
    paths = []
    for metric in DIAGRAMS:
        variants, scores = scores_of(values, metric)
        if len(scores) < 3 or len(variants) < 2:
            print(f"no diagram of {metric}: {len(scores)} sets have {len(variants)} variants, and it takes 3 and 2")
            continue
        figure, _ = plot_critical_difference(scores, variants, lower_better=metric == "FID", textspace=2)
        paths.append(folder / f"cd_{whose}_{metric}.svg")
        figure.savefig(paths[-1], bbox_inches="tight", metadata={"Date": None})
        pyplot.close(figure)
    return paths


def means_of(values: Values, metric: str) -> dict[str, dict[str, float]]:
    """Over seeds, of each set and each setting of the table."""
    seeds: dict[str, dict[str, list[float]]] = {}
    for (name, _, variant), measures in values.items():
        if metric in measures and variant in SETTINGS:
            seeds.setdefault(name, {}).setdefault(variant, []).append(measures[metric])
    return {name: {variant: statistics.fmean(each) for variant, each in own.items()} for name, own in seeds.items()}


def scores_of(values: Values, metric: str) -> tuple[list[str], np.ndarray]:
    """Variants, and their means over seeds [sets, variants]."""
    means = means_of(values, metric)
    variants = sorted({variant for each in means.values() for variant in each}, key=[*SETTINGS].index)
    return variants, np.array([[own[each] for each in variants] for own in means.values() if len(own) == len(variants)])


if __name__ == "__main__":
    run_program(main)
