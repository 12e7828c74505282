"""The pictures of a report: what is real, what is generated, and how the model makes it (matplotlib, scikit-learn)."""

from collections.abc import Callable

import numpy as np

from ncfast.data.gaps import cut
from ncfast.evaluation import measures
from ncfast.evaluation.decoding import trace_decoding
from ncfast.evaluation.material import Material
from ncfast.evaluation.plots import draw_samples, make_figure
from ncfast.sampling.class_plan import BALANCED

REAL, GENERATED, TRAIN = "C0", "C3", "0.6"
MASKED = "0.85"
MAX_POINTS = 500  # of each kind in an embedding; t-SNE takes seconds for these
MAX_LAG = 64


def figures(material: Material, seed: int) -> list[tuple[str, str, Callable]]:
    """(title, what it shows, function that draws it) of each picture that this data and these packages allow.

    seed: of the generated series.
    """
    labelled = bool(material.dataset.n_classes)
    drawn = [
        ("Real and generated series", "The first series of each class; one of them thick.", samples),
        (
            "Distribution",
            "Median and central 90 % at each time, and the mean autocorrelation. Solid is the test set, dashed is "
            "generated without a class; grey is the train set, which shows how much two real sets differ.",
            distribution,
        ),
        ("Reconstruction", "Test series (blue) through the codebook and back (red).", reconstruction),
        (
            "Embeddings",
            f"At most {MAX_POINTS} series of each kind. PCA is fitted to the test set, t-SNE to both. "
            + ("Below: features of the evaluator, which FID compares." if labelled else ""),
            embeddings,
        ),
        (
            "Codebook",
            "How often each code is used, in order of the test set's use, and |correlation| of every two codes.",
            codebook,
        ),
        ("Token maps", "Codes over frequency (up) and time (right); a colour is a code.", token_maps),
        (
            "Decoding",
            "One generated series from all masked (grey) to finished. Below: what the tokens decode to, masked ones "
            "as the mean of all codes; a refiner, where there is one, takes the last.",
            decoding,
        ),
    ]
    return [(title, text, lambda draw=draw: draw(material, seed)) for title, text, draw in drawn]


def samples(material: Material, seed: int):
    names = material.stats.class_names
    labels = material.dataset.y_test
    if labels is None:
        names, made = (), material.generated(seed)
    else:
        made = material.once(("balanced", seed), lambda: material.generate(10 * len(names), BALANCED, seed))
    x = material.stats.denormalise(made.x)
    x = x if made.length is None else cut(x, made.length)
    return draw_samples(material.dataset.X_test, labels, x, made.y, names, "in the units of the data")


def distribution(material: Material, seed: int):
    kinds = [
        ("train", material.train, TRAIN, "-"),
        ("test", material.test, REAL, "-"),
        ("generated", material.generated(seed).x, GENERATED, "--"),
    ]
    figure = make_figure(11, 3.2)
    left, right = figure.subplots(1, 2)
    lags = min(MAX_LAG, material.test.shape[-1] - 1)
    for name, x, color, line in kinds:
        x = x.numpy()
        low, median, high = np.quantile(x[:, 0], [0.05, 0.5, 0.95], axis=0)
        left.plot(median, line, color=color, linewidth=1.3, label=name)
        left.fill_between(np.arange(x.shape[-1]), low, high, color=color, alpha=0.18, linewidth=0)
        right.plot(np.arange(1, lags + 1), measures.autocorrelation(x, lags)[0], line, color=color, label=name)
    left.set(xlabel="time", title="value, first channel")
    right.set(xlabel="lag", title="autocorrelation, first channel")
    for panel in (left, right):
        panel.margins(x=0)
        panel.legend(fontsize=8)
        small(panel)
    return figure


def reconstruction(material: Material, seed: int, rows: int = 2, columns: int = 3):
    chosen = spread_over_classes(material.dataset.y_test, len(material.test), rows * columns)
    figure = make_figure(11, 1.9 * rows)
    coded = material.test_coded
    for panel, i in zip(figure.subplots(rows, columns, squeeze=False).flat, chosen, strict=False):
        end = None if material.dataset.lengths_test is None else material.dataset.lengths_test[i]
        panel.plot(material.test[i, 0, :end], color=REAL, linewidth=1.3)
        panel.plot(coded.reconstructed[i, 0, :end], color=GENERATED, linewidth=1)
        panel.set_title(f"test series {i}, mean squared error {coded.time_error[i]:.3g}")
        panel.margins(x=0)
        small(panel)
    return figure


def embeddings(material: Material, seed: int):
    measures.require_sklearn()
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    test, made = material.test, material.generated(seed)
    rows = [pick(len(x), MAX_POINTS) for x in (test, made.x)]
    spaces = {"series": [x.flatten(1).numpy() for x in (test, made.x)]}
    if material.dataset.n_classes > 1:
        spaces["features"] = [material.test_described[0], material.generated_described(seed)[0]]
    figure = make_figure(11, 4.2 * len(spaces))
    panels = figure.subplots(len(spaces), 2, squeeze=False)
    for (space, both), (left, right) in zip(spaces.items(), panels, strict=True):
        real, generated = (x[own] for x, own in zip(both, rows, strict=True))
        pca = PCA(2, random_state=0).fit(both[0])
        share = pca.explained_variance_ratio_.sum()
        left.set_title(f"{space}: PCA ({share:.0%} of the variance of the test set)")
        scatter(left, pca.transform(real), pca.transform(generated))
        joint = np.concatenate([real, generated])
        flat = TSNE(perplexity=min(30, (len(joint) - 1) / 3), random_state=0).fit_transform(joint)
        right.set_title(f"{space}: t-SNE")
        scatter(right, flat[: len(real)], flat[len(real) :])
        right.set(xticks=[], yticks=[])  # its axes mean nothing
    return figure


def codebook(material: Material, seed: int):
    usages = {
        "train": material.train_coded.tokens,
        "test": material.test_coded.tokens,
        "generated": material.generated(seed).tokens,
    }
    usages = {name: material.usage(tokens).sum(0) for name, tokens in usages.items()}
    order = np.argsort(-usages["test"], kind="stable")
    K = len(order)
    figure = make_figure(11, 3.6)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for i, ((name, usage), color) in enumerate(zip(usages.items(), (TRAIN, REAL, GENERATED), strict=True)):
        share = usage[order] / usage.sum()
        label = f"{name}: perplexity {measures.perplexity(usage):.1f}"
        left.bar(np.arange(K) + 0.27 * (i - 1), share, 0.27, color=color, label=label)
    left.set(xlabel="code, by use in the test set", ylabel="share of tokens")
    left.legend(fontsize=8)
    correlation = np.abs(measures.code_correlation(material.codebook))[np.ix_(order, order)]
    image = right.imshow(correlation, vmin=0, vmax=1, cmap="magma")
    right.set_title(f"|correlation|, off the diagonal {measures.mean_abs_off_diagonal(correlation):.3f}")
    figure.colorbar(image, ax=right, shrink=0.8)
    for panel in (left, right):
        small(panel)
    return figure


def token_maps(material: Material, seed: int, each: int = 4):
    chosen = spread_over_classes(material.dataset.y_test, len(material.test), each)
    tokens = [material.test_coded.tokens[chosen], material.generated(seed).tokens[:each]]
    figure = make_figure(11, 3.4)
    panels = figure.subplots(2, each, squeeze=False)
    for name, row, maps in zip(("test series", "generated"), panels, tokens, strict=True):
        for i, (panel, own) in enumerate(zip(row, maps, strict=False)):
            show_tokens(panel, own, material)
            panel.set_title(f"{name} {chosen[i] if row is panels[0] else i}", fontsize=9)
    return figure


def decoding(material: Material, seed: int, most: int = 6):
    trace = material.once(("trace", seed), lambda: trace_decoding(material.model, "none", seed))
    states = np.unique(np.linspace(0, len(trace.tokens) - 1, most).round().astype(int))
    K = material.model.prior.num_codes
    figure = make_figure(11, 3.2)
    above, below = figure.subplots(2, len(states), squeeze=False, sharey="row")
    for map_panel, panel, s in zip(above, below, states, strict=True):
        tokens = trace.tokens[s].numpy()
        show_tokens(map_panel, tokens, material)
        map_panel.set_title(f"step {s}: {(tokens == K).sum()} masked" if s else "all masked", fontsize=9)
        panel.plot(trace.series[s, 0], color=GENERATED, linewidth=1)
        panel.margins(x=0)
        small(panel)
    return figure


def show_tokens(panel, tokens: np.ndarray, material: Material) -> None:  # [T]; K is masked
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    K = material.model.prior.num_codes
    colors = ListedColormap([*colormaps["turbo"](np.linspace(0, 1, K)), MASKED])
    grid = tokens.reshape(-1, material.model.vqvae.grid[1])  # finer levels above
    panel.imshow(grid, vmin=0, vmax=K, cmap=colors, origin="lower", aspect="auto", interpolation="nearest")
    panel.set(xticks=[], yticks=[])


def scatter(panel, real: np.ndarray, generated: np.ndarray) -> None:
    for points, color, name in ((real, REAL, "test"), (generated, GENERATED, "generated")):
        panel.scatter(points[:, 0], points[:, 1], s=8, color=color, alpha=0.45, linewidths=0, label=name)
    panel.legend(fontsize=8)
    small(panel)


def small(panel) -> None:
    panel.tick_params(labelsize=8)
    panel.title.set_fontsize(9)


def pick(n: int, most: int) -> np.ndarray:
    """Evenly spread row indices: test sets are often sorted by class."""
    return np.unique(np.linspace(0, n - 1, min(n, most)).round().astype(int))


def spread_over_classes(labels: np.ndarray | None, n: int, most: int) -> np.ndarray:
    """Rows of all classes in turn, as far as there are."""
    if labels is None:
        return pick(n, most)
    turns = np.zeros(n, dtype=int)
    for c in np.unique(labels):
        turns[labels == c] = np.arange((labels == c).sum())
    return np.lexsort((labels, turns))[:most]
