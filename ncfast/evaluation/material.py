"""What measures and pictures of a trained model are made from: each part is made when first asked for, and once."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ncfast.data.dataset import Dataset
from ncfast.data.stats import DataStats
from ncfast.engine.logging import progress_bar
from ncfast.engine.precision import computing
from ncfast.errors import UserError
from ncfast.evaluation.fcn import Recipe
from ncfast.evaluation.fcn_cache import Evaluator, cached_fcn
from ncfast.evaluation.measures import nearest_distance
from ncfast.evaluation.published import ScoreRecipe, to_unit_range
from ncfast.evaluation.ts2vec import TS2Vec, cached_ts2vec
from ncfast.ncvqvae import NCVQVAE
from ncfast.sampling.class_plan import NONE

# Fewer series than that do not train a classifier.
LEAST_LABELLED_SAMPLES = 1000


class GeneratedSet(NamedTuple):
    x: Tensor  # float32 [n, C, L], normalised, on the CPU
    y: np.ndarray | None  # int64 [n], class index; None for series without a class
    tokens: np.ndarray  # int64 [n, T]
    length: np.ndarray | None = None  # int64 [n], from where on x repeats a value; None for series of one length


class Coded(NamedTuple):
    """Real series as the VQVAE sees them."""

    tokens: np.ndarray  # int64 [N, T]
    pooled: np.ndarray  # float32 [N, D], mean of the quantised latents: what the probes see
    reconstructed: Tensor  # float32 [N, C, L], normalised, on the CPU
    time_error: np.ndarray  # float64 [N], mean squared, in normalised units
    spectrum_error: np.ndarray  # float64 [N], the same of the spectrogram


class Material:
    """A model and the series it is held against.

    Nothing here trains or changes the model: it is in eval mode, and neither batch statistics nor the codebook move.
    Series are in units of the train set, zero mean and unit variance a channel.

    Attributes:
        model, dataset: as given.
        num_samples: series that are generated for a comparison with the test set.
    """

    def __init__(
        self,
        model: NCVQVAE,
        dataset: Dataset,
        *,
        num_samples: int | None = None,
        recipe: Recipe | None = None,
        fcn_seed: int = 0,
        cache: Path | None = None,
        scores: ScoreRecipe | None = None,
        quiet: bool = False,
    ) -> None:
        """
        Args:
            model: trained.
            dataset: with a test split, of the shape and classes the model was trained for.
            num_samples: None for as many as there are test series.
            recipe: of the classifiers.
            fcn_seed: of the evaluator.
            cache: folder of trained networks (`network_cache`); None keeps nothing.
            scores: of the networks of the discriminative, predictive and Context-FID scores.
            quiet: no progress bars.

        Raises:
            UserError: data that does not fit the model, or fewer than 2 series to compare.
        """
        check(model, dataset)
        self.model = model
        self.dataset = dataset
        self.num_samples = len(dataset.X_test) if num_samples is None else num_samples
        if min(self.num_samples, len(dataset.X_test), len(dataset.X_train)) < 2:
            raise UserError(
                f"to compare distributions takes 2 series or more of each; got {len(dataset.X_train)} for training, "
                f"{len(dataset.X_test)} for testing and {self.num_samples} to generate"
            )
        self.recipe = Recipe() if recipe is None else recipe
        self.fcn_seed = fcn_seed
        self.cache = cache
        self.scores = ScoreRecipe() if scores is None else scores
        self.quiet = quiet
        self.made: dict[tuple[str, int], Any] = {}  # by seed
        # Of the data and not of the model, so that all models on a data set share one evaluator.
        self.stats = DataStats.of(dataset)
        # Missing values are on straight lines between their neighbours, and series go on with their last value beyond
        # their end, as measures and classifiers take no gaps; generated ones too.
        self.train = self.stats.normalise_observed(dataset.X_train, torch.device("cpu"))[0]  # [N, C, L]
        self.test = self.stats.normalise_observed(dataset.X_test, torch.device("cpu"))[0]  # [M, C, L]

    @functools.cached_property
    def evaluator(self) -> Evaluator:
        """The classifier of the train split."""
        return cached_fcn(
            self.train,
            self.dataset.y_train,
            self.dataset.n_classes,
            self.recipe,
            self.fcn_seed,
            self.model.device,
            self.cache,
            name=self.dataset.name,
            quiet=self.quiet,
        )

    @functools.cached_property
    def evaluator_accuracy(self) -> float | None:
        """On the test set; None where that has no labels."""
        if self.dataset.y_test is None:
            return None
        return float((self.test_described[1].argmax(1) == self.dataset.y_test).mean())

    @functools.cached_property
    def train_described(self) -> tuple[np.ndarray, np.ndarray]:
        """The evaluator's features [N, 128] and class probabilities [N, classes]."""
        return self.evaluator.model.describe(self.train)

    @functools.cached_property
    def test_described(self) -> tuple[np.ndarray, np.ndarray]:
        return self.evaluator.model.describe(self.test)

    def generated_described(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        return self.once(("described", seed), lambda: self.evaluator.model.describe(self.generated(seed).x))

    def encoder(self, seed: int) -> TS2Vec:
        """TS2Vec of the train split."""
        return cached_ts2vec(
            self.unit_range(self.train),
            seed,
            self.model.device,
            self.cache,
            name=self.dataset.name,
            steps=self.scores.encoder_steps,
            quiet=self.quiet,
        )

    def unit_range(self, x: Tensor) -> np.ndarray:
        """Normalised series [N, C, L], in units in which the train series fill 0..1."""
        return to_unit_range(x.numpy(), self.train.numpy())

    def points(self, x: Tensor) -> np.ndarray:
        """What precision and recall compare: features of the evaluator [N, 128], or without one the series themselves
        [N, C·L]."""
        return self.evaluator.model.describe(x)[0] if self.has_evaluator else x.numpy().reshape(len(x), -1)

    @property
    def has_evaluator(self) -> bool:
        """Whether the train series have the labels that a classifier needs."""
        return self.dataset.y_train is not None and self.dataset.n_classes >= 2

    @functools.cached_property
    def test_nearest(self) -> float:
        """How far the median test series is from the train series nearest to it."""
        return nearest_distance(self.test.numpy(), self.train.numpy())

    def generated_nearest(self, seed: int) -> float:
        return self.once(
            ("nearest", seed), lambda: nearest_distance(self.generated(seed).x.numpy(), self.train.numpy())
        )

    def generated(self, seed: int) -> GeneratedSet:
        """`num_samples` series without a class, which the authors of NC-VQVAE compare with the test set."""
        return self.once(("generated", seed), lambda: self.generate(self.num_samples, NONE, seed))

    def labelled(self, seed: int) -> GeneratedSet:
        """Series of every class in the train set's proportions: that set's size, or a multiple that makes 1000."""
        return self.once(("labelled", seed), lambda: self.generate_labelled(seed))

    def once(self, what: tuple[str, int], make: Callable[[], Any]) -> Any:
        if what not in self.made:
            self.made[what] = make()
        return self.made[what]

    def generate_labelled(self, seed: int) -> GeneratedSet:
        times = -(-LEAST_LABELLED_SAMPLES // len(self.train))
        counts = {
            name: times * count for name, count in zip(self.stats.class_names, self.stats.class_counts, strict=True)
        }
        return self.generate(sum(counts.values()), counts, seed)

    def generate(self, n: int, labels: str | dict[str, int], seed: int) -> GeneratedSet:
        parts = []
        with progress_bar(f"generate, seed {seed}", n, unit="series", quiet=self.quiet) as bar:
            for batch in self.model.sample_batches(n, labels, seed):
                parts.append(batch)
                bar.update(len(batch.index))
        x = np.concatenate([part.x for part in parts])
        y = None if parts[0].y is None else np.concatenate([part.y for part in parts])
        tokens = np.concatenate([part.tokens for part in parts]).astype(np.int64)
        length = None if parts[0].length is None else np.concatenate([part.length for part in parts])
        return GeneratedSet(self.stats.normalise_observed(x, torch.device("cpu"))[0], y, tokens, length)

    @functools.cached_property
    def train_coded(self) -> Coded:
        return self.code(self.dataset.X_train)

    @functools.cached_property
    def test_coded(self) -> Coded:
        return self.code(self.dataset.X_test)

    @torch.no_grad()
    def code(self, X: np.ndarray) -> Coded:  # [N, C, L], in data units
        model = self.model
        x, observed = model.data.normalise_observed(X, model.device)
        if observed is None:
            observed = torch.ones_like(x, dtype=torch.bool)
        shift, scale = (each.expand(len(x), -1, -1) for each in model.data.units(x.device, model.data.levels_of(X)))
        parts = zip(*(each.split(model.chunk_size) for each in (x, observed, shift, scale)), strict=True)
        with computing("fp32", model.device):
            blocks = [self.code_block(*part) for part in parts]
        tokens, pooled, reconstructed, time, spectrum = (torch.cat(parts).cpu() for parts in zip(*blocks, strict=True))
        return Coded(tokens.numpy(), pooled.numpy(), reconstructed, time.double().numpy(), spectrum.double().numpy())

    def code_block(self, x: Tensor, observed: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        """x, observed [B, C, L]; shift and scale [B, C, 1] make units of the train set of x (`DataStats.units`)."""
        vqvae = self.model.vqvae
        tokens = vqvae.tokenize(x, observed)
        z_q = vqvae.embed(tokens)  # [B, n, D]
        u_hat = vqvae.decode(z_q)
        x_hat = vqvae.stft.inverse(u_hat)
        # Where nothing was observed there is no error, as in the losses (`training.stage1`).
        x = torch.where(observed, x, x_hat)
        share = observed.flatten(1).float().mean(1)  # [B]
        both = scale.repeat_interleave(2, 1)[..., None]  # of real and imaginary part
        missed = (x_hat - x) * scale, (u_hat - vqvae.stft(x)) * both
        errors = [each.square().flatten(1).mean(1) / share for each in missed]
        return tokens, z_q.mean(1), shift + scale * x_hat, *errors

    def usage(self, tokens: np.ndarray) -> np.ndarray:
        """How often each code occurs in each series.  tokens [N, T] -> int64 [N, K]."""
        K = self.model.prior.num_codes
        rows = np.arange(len(tokens))[:, None] * K
        return np.bincount((tokens + rows).ravel(), minlength=len(tokens) * K).reshape(len(tokens), K)

    @property
    def codebook(self) -> np.ndarray:
        """float32 [K, D]."""
        return self.model.vqvae.codebook.detach().float().cpu().numpy()


def check(model: NCVQVAE, dataset: Dataset) -> None:
    trained, given = model.data, DataStats.of(dataset)
    if dataset.X_test is None:
        raise UserError(
            f"{dataset.name} ({dataset.source}) has no test split, and a model is measured on series it has not seen; "
            "give a data set with X_test (HDF5, .npz) or a _TEST file beside its _TRAIN file"
        )
    for what in ("channels", "length", "class_names"):
        if getattr(trained, what) != getattr(given, what):
            raise UserError(
                f"{dataset.name} has other {what.replace('_', ' ')} than the data of the run ({trained.name}): "
                f"{getattr(given, what)} instead of {getattr(trained, what)}"
            )
