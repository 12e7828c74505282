"""Which measures are taken of a trained model, on how many series, with which seeds: `evaluate`."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ncfast.config import SLOW_MEASURES
from ncfast.data.dataset import Dataset
from ncfast.errors import UserError
from ncfast.evaluation.fcn import Recipe, classification_accuracy_score
from ncfast.evaluation.gru_scores import discriminative_scores, predictive_scores
from ncfast.evaluation.manifold import NEIGHBOURS as MANIFOLD_NEIGHBOURS
from ncfast.evaluation.manifold import share_covered
from ncfast.evaluation.material import Material
from ncfast.evaluation.measures import (
    NEIGHBOURS,
    autocorrelation_difference,
    code_correlation,
    code_cosine,
    frechet_distance,
    inception_score,
    knn_accuracy,
    marginal_difference,
    mean_abs_off_diagonal,
    perplexity,
    require_sklearn,
    svm_accuracy,
)
from ncfast.evaluation.privacy import membership_inference_auc, ratio
from ncfast.evaluation.published import Interval, ScoreRecipe
from ncfast.evaluation.ts2vec import context_fid
from ncfast.ncvqvae import NCVQVAE
from ncfast.version import __version__

FORMAT = 1
SPLITS = 10  # of the inception score, in the papers that report one
RESAMPLES = 200  # of the bootstrap

OVER_SEEDS = "sampling seeds"
OVER_SERIES = "test series (standard error)"
OVER_RESAMPLES = f"test series ({RESAMPLES} bootstrap samples)"


@dataclass
class Figure:
    """One figure, with what is needed to judge it.

    Attributes:
        metric: its name; that of the authors' result files where it is the same measure.
        stage: what it says something about: "stage1" (codes), "stage2" (generated series) or "cas".
        value: None where it was not taken, and `reason` says why.
        std: standard deviation; None where there is but one value.
        std_over: what it would vary over.
        n: series it was computed from, and what they were compared with.
        seeds: of the generated series; none where nothing is generated.
        evaluator_accuracy: of the classifier it rests on, on the test set.
    """

    metric: str
    stage: str
    value: float | None = None
    std: float | None = None
    std_over: str | None = None
    n: str = ""
    seeds: list[int] = field(default_factory=list)
    evaluator_accuracy: float | None = None
    reason: str | None = None


def evaluate(
    model: NCVQVAE,
    dataset: Dataset,
    *,
    measures: Sequence[str] | None = None,
    num_samples: int | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    recipe: Recipe | None = None,
    fcn_seed: int = 0,
    cache: Path | None = None,
    scores: ScoreRecipe | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """How good a trained model is.

    Args:
        model: trained; `ncfast.load` reads one from its run.
        dataset: the data it was trained on, with a test split.
        measures: names out of `MEASURES`; None takes all but `SLOW_MEASURES`, which train networks for minutes, and
            ["all"] these too.
        num_samples: series that are generated for each comparison; None for the size of the test set.
        seeds: of the generated series; each figure of them is a mean and a standard deviation over these.
        recipe: of the classifiers; None for `Recipe()`.
        fcn_seed: of the evaluator, the classifier whose features FID compares: one for all seeds.
        cache: folder where trained evaluators are kept (`network_cache.default_folder()`); None keeps nothing.
        scores: of the networks of `SLOW_MEASURES`; None for `ScoreRecipe()`, the published protocol.
        quiet: no progress bars.

    Returns:
        What `evaluation.json` holds: "measures" is a list of `Figure` as dicts; `csv_rows` turns it into rows.

    Raises:
        UserError: an unknown measure, a package that a measure needs, data that does not fit the model.
    """
    names = chosen(measures)
    material = Material(
        model,
        dataset,
        num_samples=num_samples,
        recipe=recipe,
        fcn_seed=fcn_seed,
        cache=cache,
        scores=scores,
        quiet=quiet,
    )
    return measure(material, names, seeds)


def measure(material: Material, names: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    """`evaluate` of material that the caller goes on to use."""
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise UserError(f"seeds are different integers, 0 or more; got {list(seeds)}")
    seeds = list(seeds)
    dataset, model = material.dataset, material.model
    figures: list[Figure] = []
    seconds = {}
    for name in names:
        begin = time.perf_counter()
        reason = why_not(name, material)
        if reason is None:
            figures += MEASURES[name].take(material, seeds)
        else:
            figures.append(Figure(name, MEASURES[name].stage, reason=reason))
        seconds[name] = round(time.perf_counter() - begin, 1)
    evaluator = None
    if "evaluator" in vars(material):  # some measure needed it
        evaluator = {
            "sha256": material.evaluator.sha256,
            "seed": material.fcn_seed,
            "epochs": material.evaluator.epochs,
            "recipe": asdict(material.recipe),
            "test_accuracy": material.evaluator_accuracy,
        }
    return {
        "format": FORMAT,
        "ncfast": __version__,
        "dataset": {
            "name": dataset.name,
            "source": dataset.source,
            "train": len(dataset.X_train),
            "test": len(dataset.X_test),
            "channels": dataset.n_channels,
            "length": dataset.length,
            "classes": dataset.n_classes,
            "notes": list(dataset.notes),
        },
        "device": str(model.device),
        "precision": model.precision,
        "num_samples": material.num_samples,
        "seeds": seeds,
        "evaluator": evaluator,
        "measures": [asdict(figure) for figure in figures],
        "seconds": seconds,
        "config": asdict(model.config),
    }


def csv_rows(result: dict[str, Any], method: str, run_id: str) -> list[dict[str, Any]]:
    """dataset, stage, method, run_id, metric, value of every figure that was taken, as in the authors' result files."""
    return [
        {
            "dataset": result["dataset"]["name"],
            "stage": figure["stage"],
            "method": method,
            "run_id": run_id,
            "metric": figure["metric"],
            "value": figure["value"],
        }
        for figure in result["measures"]
        if figure["value"] is not None
    ]


def chosen(names: Sequence[str] | None) -> list[str]:
    """The measures in their order, each once.

    Raises:
        UserError: an unknown one, or one whose package is not installed.
    """
    if names is None:
        wanted = [name for name in MEASURES if name not in SLOW_MEASURES]
    else:
        wanted = list(MEASURES if "all" in names else names)
    unknown = [name for name in wanted if name not in MEASURES]
    if unknown or not wanted:
        raise UserError(f"no measure {', '.join(map(repr, unknown)) or 'is named'}; there are {', '.join(MEASURES)}")
    need = [name for name in ("knn", "svm") if name in wanted]
    if need:
        try:
            require_sklearn()
        except UserError:
            raise UserError(
                f"{' and '.join(need)} need scikit-learn: pip install 'ncfast[eval]', or name other --measures"
            ) from None
    return [name for name in MEASURES if name in wanted]


def why_not(name: str, material: Material) -> str | None:
    """Why a measure cannot be taken on this data, or None."""
    dataset = material.dataset
    if name in ("precision", "recall"):
        least = min(material.num_samples, len(dataset.X_train), len(dataset.X_test))
        return None if least > MANIFOLD_NEIGHBOURS else f"there are only {least} series of a kind"
    labels = MEASURES[name].labels
    if not labels:
        return None
    if not dataset.n_classes:
        return "the data has no labels"
    if dataset.n_classes < 2:
        return "all series are of one class"
    if dataset.y_test is None and labels == "test":
        return "the test series have no labels"
    if name == "knn" and len(dataset.X_train) < NEIGHBOURS:
        return f"there are only {len(dataset.X_train)} train series"
    return None


def probe(metric: str, accuracy: Callable[..., float]) -> Callable[[Material, list[int]], Iterator[Figure]]:
    def figures(material: Material, seeds: list[int]) -> Iterator[Figure]:
        data = material.dataset
        value = accuracy(material.train_coded.pooled, data.y_train, material.test_coded.pooled, data.y_test)
        n = len(data.X_test)
        # The standard error of a share.
        std = float(np.sqrt(value * (1 - value) / n))
        yield Figure(metric, "stage1", value, std, OVER_SERIES, f"{len(data.X_train)} train, {n} test")

    return figures


def reconstruction(material: Material, seeds: list[int]) -> Iterator[Figure]:
    coded = material.test_coded
    n = len(coded.time_error)
    for metric, errors in (
        ("test_reconstruction_mse", coded.time_error),
        ("test_reconstruction_stft_mse", coded.spectrum_error),
    ):
        std = float(errors.std(ddof=1) / np.sqrt(n))
        yield Figure(metric, "stage1", float(errors.mean()), std, OVER_SERIES, f"{n} test")


def codebook(material: Material, seeds: list[int]) -> Iterator[Figure]:
    usage = material.usage(material.test_coded.tokens)  # [N, K]
    n, K = usage.shape
    weights = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    std = float(perplexity(weights @ usage).std(ddof=1))
    total = usage.sum(0)
    yield Figure("test_perplexity", "stage1", float(perplexity(total)), std, OVER_RESAMPLES, f"{n} test")
    yield Figure("test_code_usage", "stage1", float((total > 0).mean()), n=f"{n} test, {K} codes")
    for metric, matrix in (
        ("mean_abs_corr_off_diagonal", code_correlation),
        ("mean_abs_cos_sim_off_diagonal", code_cosine),
    ):
        value = mean_abs_off_diagonal(matrix(material.codebook))
        yield Figure(metric, "stage1", value, n=f"{K} codes")


def fid(material: Material, seeds: list[int]) -> Iterator[Figure]:
    real = material.test_described[0]
    values = [frechet_distance(real, material.generated_described(seed)[0]) for seed in seeds]
    yield over_seeds("FID", values, material, seeds, material.evaluator_accuracy)
    yield floor("FID", frechet_distance(real, material.train_described[0]), material, True)
    # What a perfect prior would leave: the codebook's and the decoder's part.
    rebuilt = material.evaluator.model.describe(material.test_coded.reconstructed)[0]
    yield Figure(
        "FID_reconstructed",
        "stage1",
        frechet_distance(real, rebuilt),
        n=f"{len(material.test)} test, and the same reconstructed",
        evaluator_accuracy=material.evaluator_accuracy,
    )


def inception(material: Material, seeds: list[int]) -> Iterator[Figure]:
    probabilities = [material.generated_described(seed)[1] for seed in seeds]
    accuracy = material.evaluator_accuracy
    whole = [float(inception_score(p)[0]) for p in probabilities]
    yield over_seeds("IS", whole, material, seeds, accuracy, against_test=False)
    if material.num_samples >= SPLITS:
        split = [inception_score(p, SPLITS) for p in probabilities]
        for metric, statistic in (("IS_mean", np.mean), ("IS_std", np.std)):
            figure = over_seeds(
                metric, [float(statistic(s)) for s in split], material, seeds, accuracy, against_test=False
            )
            figure.n += f" in {SPLITS} parts"
            yield figure
    real = float(inception_score(material.test_described[1])[0])
    yield Figure("IS_test", "data", real, n=f"{len(material.test)} test", evaluator_accuracy=accuracy)


def cas(material: Material, seeds: list[int]) -> Iterator[Figure]:
    data = material.dataset
    values = []
    for seed in seeds:
        made = material.labelled(seed)
        values.append(
            classification_accuracy_score(
                made.x,
                made.y,
                material.test,
                data.y_test,
                data.n_classes,
                material.recipe,
                seed,
                material.model.device,
                title="" if material.quiet else f"FCN of generated series, seed {seed}",
            )
        )
    # What the same recipe reaches with the real train set is the evaluator's accuracy.
    figure = over_seeds("CAS", values, material, seeds, material.evaluator_accuracy)
    figure.stage, figure.n = "cas", f"{len(made.x)} generated, {len(material.test)} test"
    yield figure


def two_sample(
    metric: str, difference: Callable[[np.ndarray, np.ndarray], float]
) -> Callable[[Material, list[int]], Iterator[Figure]]:
    def figures(material: Material, seeds: list[int]) -> Iterator[Figure]:
        real = material.test.numpy()
        values = [difference(real, material.generated(seed).x.numpy()) for seed in seeds]
        yield over_seeds(metric, values, material, seeds)
        yield floor(metric, difference(real, material.train.numpy()), material)

    return figures


def nearest(material: Material, seeds: list[int]) -> Iterator[Figure]:
    figure = over_seeds("NND", [material.generated_nearest(seed) for seed in seeds], material, seeds)
    figure.n = f"{material.num_samples} generated, {len(material.train)} train"
    yield figure
    n = f"{len(material.test)} test, {len(material.train)} train"
    yield Figure("NND_test", "data", material.test_nearest, n=n)


def nearest_ratio(material: Material, seeds: list[int]) -> Iterator[Figure]:
    if material.test_nearest == 0:
        yield Figure("NNDR", "stage2", reason="the median test series is itself a train series")
        return
    values = [ratio(material.generated_nearest(seed), material.test_nearest) for seed in seeds]
    yield of_all_splits(over_seeds("NNDR", values, material, seeds), material)


def membership(material: Material, seeds: list[int]) -> Iterator[Figure]:
    train, test = material.train.numpy(), material.test.numpy()
    values = [membership_inference_auc(material.generated(seed).x.numpy(), train, test) for seed in seeds]
    yield of_all_splits(over_seeds("MIA", values, material, seeds), material)


def of_all_splits(figure: Figure, material: Material) -> Figure:
    figure.n = f"{material.num_samples} generated, {len(material.train)} train, {len(material.test)} test"
    return figure


def covered(
    metric: str, share: Callable[[np.ndarray, np.ndarray], float]
) -> Callable[[Material, list[int]], Iterator[Figure]]:
    def figures(material: Material, seeds: list[int]) -> Iterator[Figure]:
        real = material.points(material.test)
        values = [share(material.points(material.generated(seed).x), real) for seed in seeds]
        accuracy = material.evaluator_accuracy if material.has_evaluator else None
        yield over_seeds(metric, values, material, seeds, accuracy)
        yield floor(metric, share(material.points(material.train), real), material, material.has_evaluator)

    return figures


def trained_after(
    metric: str, scores: Callable[[Material, np.ndarray, np.ndarray], list[float]]
) -> Callable[[Material, list[int]], Iterator[Figure]]:
    """A score of networks that are trained on the series of the first seed. scores: of material, real, generated."""

    def figures(material: Material, seeds: list[int]) -> Iterator[Figure]:
        real, made = (material.unit_range(x) for x in (material.train, material.generated(seeds[0]).x))
        values = scores(material, real, made)
        n = f"{len(made)} generated, {len(real)} train"
        yield Figure(metric, "stage2", *Interval.of(values), over_repeats(values), n, seeds[:1])

    return figures


def over_repeats(values: list[float]) -> str | None:
    return f"{len(values)} repeats (95 % interval)" if len(values) > 1 else None


def discriminative(material: Material, real: np.ndarray, made: np.ndarray) -> list[float]:
    recipe = material.scores
    return discriminative_scores(
        real, made, repeats=recipe.repeats, steps=recipe.discriminative_steps, device=material.model.device
    )


def predictive(material: Material, real: np.ndarray, made: np.ndarray) -> list[float]:
    recipe = material.scores
    return predictive_scores(
        real, made, repeats=recipe.repeats, steps=recipe.predictive_steps, device=material.model.device
    )


def context(material: Material, real: np.ndarray, made: np.ndarray) -> list[float]:
    return [context_fid(material.encoder(seed), real, made) for seed in range(material.scores.repeats)]


def over_seeds(
    metric: str,
    values: list[float],
    material: Material,
    seeds: list[int],
    accuracy: float | None = None,
    *,
    against_test: bool = True,
) -> Figure:
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    n = f"{material.num_samples} generated" + (f", {len(material.test)} test" if against_test else "")
    return Figure(
        metric, "stage2", float(np.mean(values)), std, OVER_SEEDS if len(values) > 1 else None, n, seeds, accuracy
    )


def floor(metric: str, value: float, material: Material, evaluator: bool = False) -> Figure:
    """The same measure of real train series: what a perfect generator of as many series would reach."""
    return Figure(
        f"{metric}_train",
        "data",
        value,
        n=f"{len(material.train)} train, {len(material.test)} test",
        evaluator_accuracy=material.evaluator_accuracy if evaluator else None,
    )


class Measure(NamedTuple):
    take: Callable[[Material, list[int]], Iterator[Figure]]
    stage: str
    labels: str = ""  # of which split it needs them


# In the order of the table: the codes first, then what is generated from them.
MEASURES: dict[str, Measure] = {
    "reconstruction": Measure(reconstruction, "stage1"),
    "codebook": Measure(codebook, "stage1"),
    "knn": Measure(probe("knn_accuracy", knn_accuracy), "stage1", "test"),
    "svm": Measure(probe("svm_accuracy", svm_accuracy), "stage1", "test"),
    "fid": Measure(fid, "stage2", "train"),  # a classifier of the train set is enough
    "is": Measure(inception, "stage2", "train"),
    "cas": Measure(cas, "cas", "test"),
    "acd": Measure(two_sample("ACD", autocorrelation_difference), "stage2"),
    "mdd": Measure(two_sample("MDD", marginal_difference), "stage2"),
    "nnd": Measure(nearest, "stage2"),
    "precision": Measure(covered("precision", share_covered), "stage2"),
    "recall": Measure(covered("recall", lambda made, real: share_covered(real, made)), "stage2"),
    "nndr": Measure(nearest_ratio, "stage2"),
    "mia": Measure(membership, "stage2"),
    "discriminative": Measure(trained_after("discriminative", discriminative), "stage2"),
    "predictive": Measure(trained_after("predictive", predictive), "stage2"),
    "context_fid": Measure(trained_after("context_FID", context), "stage2"),
}
