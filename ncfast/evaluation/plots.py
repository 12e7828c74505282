"""Pictures of a run (matplotlib, extra `eval`)."""

from pathlib import Path

import numpy as np

from ncfast.engine.checkpoint import atomic_path
from ncfast.errors import UserError

MAX_CLASSES = 12


def draw_samples(
    real: np.ndarray,
    real_labels: np.ndarray | None,
    generated: np.ndarray,
    generated_labels: np.ndarray | None,
    class_names: tuple[str, ...],
    title: str,
    series_each: int = 10,
):
    """A figure: a row a class, real series on the left, generated on the right, the same axes.

    Args:
        real, generated: series [n, C, L], both in one unit; the first channel is drawn.
        real_labels, generated_labels: class index of each series [n], or None.
        series_each: how many series a panel overlays.

    Raises:
        UserError: matplotlib is not installed.
    """
    rows = list(range(len(class_names)))[:MAX_CLASSES] if real_labels is not None else [None]
    height = 0.6 + 1.6 * len(rows)
    figure = make_figure(11, height, layout="none")
    axes = figure.subplots(len(rows), 2, sharex=True, sharey="row", squeeze=False)
    # Fixed margins: finding them takes as long as drawing, and a short training waits for it.
    figure.subplots_adjust(0.06, 0.25 / height, 0.99, 1 - 0.65 / height, wspace=0.03, hspace=0.25)
    more = (
        "" if len(rows) >= len(class_names) or rows == [None] else f" (first {len(rows)} of {len(class_names)} classes)"
    )
    figure.suptitle(title + more)
    for row, pair in zip(rows, axes, strict=True):
        panels = ((real, real_labels, "C0", "real"), (generated, generated_labels, "C3", "generated"))
        for panel, (x, labels, color, name) in zip(pair, panels, strict=True):
            chosen = x if row is None else x[labels == row]
            # Spread over the set: neighbours may be windows of one stretch of time.
            chosen = chosen[np.linspace(0, len(chosen) - 1, min(series_each, len(chosen))).astype(int)]
            # Overlaid thin lines show the spread; one thick line shows what a single series looks like.
            panel.plot(chosen[1:, 0].T, color=color, alpha=0.35, linewidth=0.7)
            panel.plot(chosen[:1, 0].T, color=color, linewidth=1.4)
            panel.margins(x=0)
            panel.set_title(name if row is None else f"{name}, class {class_names[row]}", fontsize=9)
            panel.tick_params(labelsize=8)
    return figure


def draw_completions(real: np.ndarray, observed: dict[str, np.ndarray], drawn: dict[str, np.ndarray], title: str):
    """A figure: a row a series, a column a task; what was observed, what was drawn, and what really followed.

    Args:
        real: whole series in data units [m, C, L]; the first channel is drawn.
        observed: bool [L] of each task, True where the model saw the series.
        drawn: completed series of each task [k, C, L], series i completing real[i mod m].
        title: of the figure.

    Raises:
        UserError: matplotlib is not installed.
    """
    m = len(real)
    figure = make_figure(4 * len(observed), 0.6 + 1.8 * m)
    figure.suptitle(title)
    axes = figure.subplots(m, len(observed), sharex=True, sharey="row", squeeze=False)
    for column, task in zip(axes.T, observed, strict=True):
        seen = observed[task]
        for i, panel in enumerate(column):
            panel.plot(drawn[task][i::m, 0].T, color="C3", alpha=0.35, linewidth=0.7)
            panel.plot(real[i, 0], color="black", linestyle=":", linewidth=1)
            panel.plot(np.where(seen, real[i, 0], np.nan), color="C0", linewidth=1.6)
            panel.margins(x=0)
            panel.tick_params(labelsize=8)
        column[0].set_title(task, fontsize=9)
    return figure


def make_figure(width: float, height: float, layout: str = "constrained"):
    """Inches."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("pictures need matplotlib: pip install 'ncfast[eval]'") from None
    return Figure(figsize=(width, height), layout=layout)


def write_figure(figure, path: Path) -> None:
    """As a PNG."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
