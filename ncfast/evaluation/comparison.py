"""Results beside those of the authors of NC-VQVAE (arXiv 2408.16613), as one Markdown page.

`authors.csv` has mean and standard deviation over the authors' four runs of each data set and method, from the result
files of their repository (erlendlokna/Generative-SSL-VQVAE-modelling). They measure otherwise: their probes update the
codebook on the test set, their CAS is a moving average, and their FID rests on another classifier, so that it is ratios
between methods that can be compared.
"""

import csv
import statistics
from collections.abc import Iterable, Sequence
from importlib import resources
from typing import Any

COLUMNS = ("dataset", "stage", "method", "run_id", "metric", "value")
# Of each table: what it is called, the metric, and whether more is better.
TABLES = (
    ("FID", "FID", False),
    ("Inception score (of 10 parts)", "IS_mean", True),
    ("CAS", "CAS", True),
    ("kNN probe, accuracy", "knn_accuracy", True),
    ("Linear SVM probe, accuracy", "svm_accuracy", True),
    ("Reconstruction, MSE of the test set", "test_reconstruction_mse", False),
    ("Codebook perplexity, test set", "test_perplexity", True),
    ("Autocorrelation difference", "ACD", False),
    ("Marginal distribution difference", "MDD", False),
    ("Training stage 1, seconds", "training_time", False),
)

Key = tuple[str, str, str]  # data set, method, metric


def authors() -> dict[Key, tuple[float, float]]:
    """Mean and standard deviation over their runs."""
    text = resources.files("ncfast.evaluation").joinpath("authors.csv").read_text()
    return {
        (row["dataset"], row["method"], row["metric"]): (float(row["mean"]), float(row["std"]))
        for row in csv.DictReader(text.splitlines())
    }


def gathered(rows: Iterable[dict[str, Any]]) -> dict[Key, list[float]]:
    """Values of all runs."""
    values: dict[Key, list[float]] = {}
    for row in rows:
        values.setdefault((row["dataset"], row["method"], row["metric"]), []).append(float(row["value"]))
    return values


def as_markdown(rows: Sequence[dict[str, Any]], datasets: dict[str, dict[str, Any]], head: Sequence[str]) -> str:
    """The page.

    Args:
        rows: dicts of COLUMNS.
        datasets: of each name what `evaluate` says of it.
        head: lines to begin with.
    """
    ours, theirs = gathered(rows), authors()
    lines = ["# NC-VQVAE, again", "", *head, ""]
    for name, data in datasets.items():
        notes = "".join(f"; {note}" for note in data["notes"])
        lines.append(f"- {name}: {data['train']} train, {data['test']} test series{notes}")
    for title, metric, more_is_better in TABLES:
        keys = [key for key in ours if key[2] == metric]
        if not keys:
            continue
        best = {name: pick([k for k in keys if k[0] == name], ours, more_is_better) for name in datasets}
        lines += ["", f"## {title}", "", "| data | method | ours | runs | authors | ours - authors |"]
        lines.append("|---|---|---:|---:|---:|---:|")
        for key in sorted(keys, key=lambda key: list(datasets).index(key[0])):
            values = ours[key]
            own = spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)
            own = f"**{own}**" if key == best[key[0]] else own
            mean, std = theirs.get(key, (None, None))
            difference = "" if mean is None else f"{statistics.fmean(values) - mean:+.3g}"
            beside = "" if mean is None else spread(mean, std)
            lines.append(f"| {key[0]} | {key[1]} | {own} | {len(values)} | {beside} | {difference} |")
    lines += ["", "Means ± standard deviations over runs; bold: the best of a data set. The authors' are of four runs."]
    return "\n".join(lines) + "\n"


def pick(keys: Sequence[Key], values: dict[Key, list[float]], more_is_better: bool) -> Key | None:
    return (max if more_is_better else min)(keys, key=lambda key: statistics.fmean(values[key]), default=None)


def spread(mean: float, std: float | None) -> str:
    return f"{mean:.4g}" if std is None else f"{mean:.4g} ± {std:.2g}"
