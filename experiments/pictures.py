"""Pictures of the paper's table, and of views: what each setting changes against the plain model.

A dot is a set, the mean over seeds against that of `regular` on the same set: a ratio for FID, a difference for others.
In those of the table the authors' stand beside ours.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import numpy as np

from experiments.augmentations import GAINS, gains, is_pair
from experiments.claims import PLAIN, Values, means_of, values_of, values_of_authors
from experiments.paper_table import SETTINGS
from experiments.rows import rows_of
from ncfast.cli.parser import run as run_program
from ncfast.errors import UserError

PICTURES = {  # by measure: its name, and whether it is compared by ratios
    "FID": ("FID, times that of the plain model", True),
    "svm_accuracy": ("linear SVM on codes, accuracy above the plain model's", False),
}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m experiments.pictures", description=__doc__.splitlines()[0])
    parser.add_argument("table", type=Path, metavar="FILE", help="cells of `paper_table`")
    parser.add_argument("--views", type=Path, metavar="FILE", help="cells of `augmentations`")
    parser.add_argument("--out", type=Path, default=Path("docs/img"), metavar="DIR", help="[docs/img]")
    return parser


def main() -> None:
    arguments = make_parser().parse_args()
    for path in (arguments.table, arguments.views):
        if path is not None and not path.exists():
            raise UserError(f"there is no {path}")
    ours = values_of([row for row in rows_of(arguments.table) if row["cell"]["budget"] == 1])
    for metric in PICTURES:
        print(f"wrote {draw(ours, values_of_authors(), metric, arguments.out)}")
    if arguments.views is not None:
        print(f"wrote {draw_views(gains(rows_of(arguments.views)), arguments.out)}")


def changes_of(values: Values, metric: str, ratio: bool) -> dict[str, dict[str, float]]:
    """By set and setting, of each set that has `regular`: the means over seeds against its."""
    changes = {}
    for name, means in means_of(values, metric).items():
        plain = means.pop(PLAIN, None)
        if plain is not None:
            changes[name] = {setting: mean / plain if ratio else mean - plain for setting, mean in means.items()}
    return changes


def plotting() -> Any:
    try:
        from matplotlib import pyplot
    except ModuleNotFoundError:
        raise UserError("pictures need matplotlib: pip install 'ncfast[eval]'") from None
    return pyplot


def draw(ours: Values, authors: Values, metric: str, folder: Path) -> Path:
    pyplot = plotting()
    title, ratio = PICTURES[metric]
    own = changes_of(ours, metric, ratio)
    if not own:
        raise UserError(f"no set has {metric} of {PLAIN} at the full budget")
    theirs = {name: each for name, each in changes_of(authors, metric, ratio).items() if name in own}
    settings = [name for name in SETTINGS if any(name in each for each in own.values())]
    figure, axes = pyplot.subplots(figsize=(9, 4), layout="constrained")
    for i, name in enumerate(own):
        color = f"C{i}"
        for changes, shift, filled in ((own, -0.15, True), (theirs, 0.15, False)):
            at = [k for k, setting in enumerate(settings) if setting in changes.get(name, {})]
            y = [changes[name][settings[k]] for k in at]
            face = color if filled else "none"
            label = name if filled else None
            axes.scatter(np.add(at, shift), y, 28, facecolors=face, edgecolors=color, label=label, zorder=3)
    axes.scatter([], [], 28, facecolors="none", edgecolors="0.4", label="the authors'")
    axes.axhline(1 if ratio else 0, color="0.4", linewidth=1)
    if ratio:
        ticks = [0.05, 0.1, 0.2, 0.5, 1, 2, 4]
        axes.set_yscale("log")
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
        axes.minorticks_off()
    axes.set_xticks(range(len(settings)), [name.replace("_", "\n") for name in settings], fontsize=8)
    axes.set_xlim(-0.6, len(settings) - 0.4)
    axes.set_ylabel(title, fontsize=9)
    axes.grid(axis="y", color="0.9")
    axes.legend(fontsize=8, ncols=3, loc="lower left" if ratio else "upper left", frameon=False)
    return saved(pyplot, figure, folder / f"table_{metric}.svg")


def draw_views(found: dict[str, dict[str, list[float]]], folder: Path) -> Path:
    """Gain of kNN by view of one operation and set (`augmentations.gains`), strengths of an operation side by side."""
    found = {view: each for view, each in found.items() if not is_pair(view)}
    if not found:
        raise UserError(f"no view has {GAINS['knn_accuracy'][0]}: that of {PLAIN} is missing")
    pyplot = plotting()
    figure, axes = pyplot.subplots(figsize=(9, 4), layout="constrained")
    for i, name in enumerate(dict.fromkeys(name for each in found.values() for name in each)):
        at = [k for k, each in enumerate(found.values()) if name in each]
        y = [statistics.fmean(each[name]) for each in found.values() if name in each]
        axes.scatter(at, y, 28, color=f"C{i}", label=name, zorder=3)
        axes.axhline(statistics.fmean(y), color=f"C{i}", linewidth=1, linestyle=":")
    axes.axhline(0, color="0.4", linewidth=1)
    axes.set_xticks(range(len(found)), list(found), fontsize=8, rotation=60, ha="right", rotation_mode="anchor")
    axes.set_ylabel("kNN above the plain model's", fontsize=9)
    axes.grid(axis="y", color="0.9")
    axes.legend(fontsize=8, ncols=4, loc="lower left", bbox_to_anchor=(0, 1), frameon=False)
    return saved(pyplot, figure, folder / "views_knn.svg")


def saved(pyplot: Any, figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyplot.rcParams["svg.hashsalt"] = "ncfast"  # the same file of the same figures
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return path


if __name__ == "__main__":
    run_program(main)
