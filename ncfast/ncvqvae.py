"""The public face of a trained NC-VQVAE: load it, draw series, decode, reconstruct, save."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ncfast import hub
from ncfast.config import sampling_config
from ncfast.data.arrays import to_numpy
from ncfast.data.conditions import LENGTH, decode_conditions
from ncfast.data.dataset import series
from ncfast.data.gaps import cut, last_observed
from ncfast.engine.checkpoint import make_folder, reason, write_tensors
from ncfast.engine.device import usable_device
from ncfast.engine.memory import check_fits, human
from ncfast.engine.precision import autocast, computing
from ncfast.errors import UserError
from ncfast.models.trained import (
    TrainedModel,
    build_models,
    build_refiner,
    load_weights,
    on_meta,
    read_config,
    size_of,
    write_config,
)
from ncfast.options import Condition, Labels, SamplingOptions
from ncfast.sampling.class_plan import TRAIN
from ncfast.sampling.series import Batch, SeriesSampler, checked_index

if TYPE_CHECKING:
    from typing_extensions import Unpack


class NCVQVAE(TrainedModel):
    """Draws new series.

    Attributes:
        config: how it was trained.
        data: statistics of the training data: class names, length, normalisation.
        device: where it runs.
        precision: of products and convolutions (`engine.precision`).
    """

    def sample(
        self,
        n: int | None = None,
        labels: Labels = TRAIN,
        seed: int = 0,
        *,
        start: int = 0,
        context: np.ndarray | None = None,
        mask: np.ndarray | None = None,
        condition: Condition | None = None,
        **sampling: "Unpack[SamplingOptions]",
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """New series in data units.

        Series i depends on the seed, its label, its conditions, its context and i alone: on one machine, any split of a
        range of indices gives the same series bit for bit.

        With `context`, series are completed: what is observed stays as it is, and the rest is drawn given the tokens
        that the observed samples determine (`sampling.completion`). Imputation, interpolation and forecasting differ
        only in where the gap is.

        Args:
            n: how many; with counts in `labels`, or with `context`, it may be left out.
            labels: "train" draws classes in the train set's proportions, "balanced" takes all in turn, "none" draws
                without a class; a class name, or several to take in turn; or {name: count}. With `context`, "train"
                means "none": a class drawn at random could contradict what is observed.
            seed: of all random numbers, 0 <= seed < 2**63.
            start: index of the first series.
            context: observed series in data units, [L], [m, L] or [m, C, L]; series i completes context i mod m.
            mask: bool, True where `context` is observed, of its shape or [L]; None takes NaN for missing.
            condition: of a model with conditions (`fit(conditions=...)`): by name one value, or m, and series i gets
                number i mod m. Those left out are drawn as the training series of the class have them, and do not
                depend on those given (`sample_conditions` says what they are); with `context` they are not known.
            sampling: options of the group "Sampling" of `ncfast.config.Config`, such as guidance_scale=2.0; the run's
                own by default.

        A model of series of unequal lengths has a condition more, `length`, an integer from 1 to L, which is drawn or
        given like the others. With `context` and no length given, series have the length L.

        A model with `--level on` draws a mean and a standard deviation of each series and channel besides, near those
        of a training series of the class; with `context` they are those of the observed samples.

        Returns:
            X float32 [n, C, L], NaN from the end of each series on where lengths are unequal (`ncfast.data.to_list`
            makes a list of such series), and y, the class name of each series [n]; None for series without a class.

        Raises:
            UserError: a label or condition the model does not know, counts that do not sum to n, or a context that does
                not fit.
        """
        sampler, n = self.sampler(n, labels, seed, context=context, mask=mask, condition=condition, **sampling)
        size = 4 * self.data.channels * self.data.length
        advice = "draw fewer, or take them in batches with `sample_batches`"
        check_fits(n * size, torch.device("cpu"), f"{n} series of {human(size)}", advice)
        batches = list(sampler.batches(n, start))
        x = np.concatenate([np.empty((0, self.data.channels, self.data.length), np.float32), *[b.x for b in batches]])
        if batches and batches[0].y is None:
            return x, None
        y = np.concatenate([np.empty(0, np.int64), *[b.y for b in batches]])
        return x, np.array(self.class_names)[y]

    def sample_conditions(
        self,
        n: int | None = None,
        labels: Labels = TRAIN,
        seed: int = 0,
        *,
        start: int = 0,
        condition: Condition | None = None,
    ) -> dict[str, np.ndarray]:
        """The conditions of the series that `sample` draws with the same arguments, without drawing these.

        Returns:
            The values of each condition by its name, float64 or text [n], and `length`, int64, of a model of unequal
            lengths; {} for a model without conditions.
        """
        sampler, n = self.sampler(n, labels, seed, condition=condition)
        if sampler.conditions is None:
            return {}
        index = torch.arange(n, device=self.device) + checked_index("start", start)
        rows = sampler.conditions(index, sampler.plan(index, sampler.seed), sampler.seed)
        values = decode_conditions(self.data.conditions, rows.cpu().numpy())
        return values | {LENGTH: values[LENGTH].astype(np.int64)} if self.data.has_lengths else values

    def sample_batches(
        self,
        n: int | None = None,
        labels: Labels = TRAIN,
        seed: int = 0,
        *,
        start: int = 0,
        batch_size: int | None = None,
        context: np.ndarray | None = None,
        mask: np.ndarray | None = None,
        condition: Condition | None = None,
        decode: bool = True,
        **sampling: "Unpack[SamplingOptions]",
    ) -> Iterator[Batch]:
        """As `sample`, `batch_size` series at a time (None: as they come), with token grids, class indices, encoded
        conditions (`ncfast.data.conditions`), lengths and levels (`ncfast.data.level`).

        Args:
            batch_size: of the batches; the last may be smaller.
            decode: False leaves out the decoder: the batches have tokens and no series.
        """
        sampler, n = self.sampler(
            n, labels, seed, context=context, mask=mask, condition=condition, decode=decode, **sampling
        )
        return sampler.batches(n, start, batch_size)

    def sampler(self, n: int | None, labels: Labels, seed: int, **options: Any) -> tuple[SeriesSampler, int]:
        """How series are drawn, and how many."""
        sampler = SeriesSampler(self, labels, seed, **options)
        n = sampler.total() if n is None else n
        if n is None:
            raise UserError("say how many: n, or counts in labels")
        return sampler, checked_index("n", n)

    @torch.no_grad()
    def decode(
        self, tokens: np.ndarray, refinements: int | None = None, levels: np.ndarray | None = None
    ) -> np.ndarray:
        """Series of token grids, in data units: int [n, T] in 0..K-1 -> float32 [n, C, L].

        On the device and in the precision that drew them, the same series bit for bit, wherever in `tokens` they are.
        Tokens do not say where a series ends: all have the length L, and `ncfast.data.to_list(X, length)` cuts them.

        Args:
            refinements: steps of the refiner, where there is one; None takes the run's own.
            levels: of a model that draws level and scale apart (`--level`), those drawn with the tokens, float64
                [n, 2C]: `levels` of a batch or a file (`ncfast.data.level`). Others take none.
        """
        config = self.config if refinements is None else sampling_config(self.config, {"refinements": refinements})
        tokens = to_numpy(tokens, "tokens")
        T, K = self.prior.num_tokens, self.prior.num_codes
        if tokens.ndim != 2 or tokens.shape[1] != T or tokens.dtype.kind not in "ui":
            raise UserError(f"tokens are integers [n, {T}]; got {tokens.dtype} {list(tokens.shape)}")
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < K:
            raise UserError(f"tokens are 0 to {K - 1}; got {tokens.min()} to {tokens.max()}")
        shape = (len(tokens), len(self.data.levels))
        if (levels is None) != (shape[1] == 0) or (levels is not None and np.shape(levels) != shape):
            expected = f"takes levels {list(shape)}, `levels` of a batch or a file" if shape[1] else "takes no levels"
            raise UserError(
                f"this model {expected}; got {'none' if levels is None else f'the shape {list(np.shape(levels))}'}"
            )
        parts = [np.empty((0, self.data.channels, self.data.length), np.float32)]
        for first in range(0, len(tokens), self.chunk_size):
            chunk = tokens[first : first + self.chunk_size].astype(np.int64)
            whole = np.resize(chunk, (self.chunk_size, T))  # as many rows as when they were drawn
            with computing(self.precision, self.device), autocast(self.precision, self.device):
                x = self.vqvae.detokenize(torch.from_numpy(whole).to(self.device), config.refinements)
            own = None
            if levels is not None:
                own = np.resize(levels[first : first + self.chunk_size], (self.chunk_size, shape[1]))
            parts.append(self.data.denormalise(x, own)[: len(chunk)])
        return np.concatenate(parts)

    @torch.no_grad()
    def reconstruct(self, X: np.ndarray) -> np.ndarray:
        """Series through the codebook and back, in data units.  X [n, C, L] or [n, L] -> [n, C, L].

        A model of series with gaps also takes NaN where a value is missing, and gives one. One of unequal lengths takes
        shorter series too, or a list [C, L_i], and NaN from the end of each on is NaN in the result.
        """
        X = series(X, "X", gaps=self.data.has_gaps)
        if self.data.has_lengths and X.shape[2] < self.data.length:
            X = np.pad(X, ((0, 0), (0, 0), (0, self.data.length - X.shape[2])), constant_values=np.nan)
        if X.shape[1:] != (self.data.channels, self.data.length):
            raise UserError(f"series are [n, {self.data.channels}, {self.data.length}]; got {list(X.shape)}")
        x, observed = self.data.normalise_observed(X, self.device)
        blocks = []
        with computing(self.precision, self.device), autocast(self.precision, self.device):
            for first in range(0, len(x), self.chunk_size):
                rows = slice(first, first + self.chunk_size)
                blocks.append(self.vqvae.reconstruct(x[rows], None if observed is None else observed[rows]))
        x_hat = self.data.denormalise(torch.cat(blocks), self.data.levels_of(X))
        return cut(x_hat, last_observed(X)) if self.data.has_lengths else x_hat

    def save(self, folder: str | Path) -> None:
        """Writes config.json, stage1.safetensors, stage2.safetensors and, of a refiner, stage3.safetensors."""
        folder = Path(folder)
        make_folder(folder)
        write_config(folder, self.config, self.data)
        write_tensors(folder / "stage1.safetensors", self.vqvae.state_dict_of_stage1())
        write_tensors(folder / "stage2.safetensors", self.prior.state_dict())
        if self.vqvae.refiner is not None:
            write_tensors(folder / "stage3.safetensors", self.vqvae.refiner.state_dict())

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        device: str | torch.device = "auto",
        precision: str | None = None,
    ) -> "NCVQVAE":
        """The model of a run folder, or of a repository on the Hugging Face hub.

        Args:
            name: a folder, or "owner/name" of a repository.
            revision: branch, tag or commit of the repository.
            token: of the hub; None takes that of `hf auth login`.
            cache_dir: where downloads are kept; None takes the hub's own folder.
            device, precision: as for `ncfast.load`.

        Raises:
            UserError: no such folder or repository, one without a finished run, or no huggingface_hub.
        """
        folder = Path(name) if Path(name).is_dir() else hub.download(str(name), revision, token, cache_dir)
        return load(folder, device, precision)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        run: str | Path | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        message: str = "Upload a model of ncfast",
    ) -> str:
        """Uploads the model with a card to the Hugging Face hub, as JSON and safetensors.

        Args:
            repo_id: "owner/name"; the repository is made if it is not there.
            run: folder of its run, whose picture and evaluation then go with it.
            private: of a new repository; None is the owner's default.
            token: of the hub; None takes that of `hf auth login`.
            revision: branch to commit to.
            message: of the commit.

        Returns:
            The commit's address.
        """
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            self.save(folder)
            for shown in hub.SHOWN if run is not None else ():
                if (Path(run) / shown).exists():
                    shutil.copy(Path(run) / shown, folder)
            (folder / "README.md").write_text(hub.model_card(self.config, self.data, folder, repo_id))
            return hub.upload(folder, repo_id, private, token, revision, message)


def load(run: str | Path, device: str | torch.device = "auto", precision: str | None = None) -> NCVQVAE:
    """The model of a finished run.

    Args:
        run: the run's folder (`--out` of `ncfast.train`).
        device: where it shall run: "auto" (the current GPU where torch sees one), "cpu", "cuda" or "cuda:N".
        precision: of products and convolutions, "fp32", "tf32" or "bf16"; None for that of the training, where the
            device has it. Another precision or device draws other series from the same seed, of the same distribution.

    Raises:
        UserError: no such run, one that is not finished, or a damaged file; a precision that the device does not have.
    """
    folder = Path(run)
    config, data = read_config(folder)
    device = usable_device(device)
    for stage in (1, 2, 3) if config.refiner != "none" else (1, 2):
        if not (folder / f"stage{stage}.safetensors").exists():
            raise UserError(f"{folder} has not finished stage {stage}; continue it with `ncfast.train ... --resume`")
    path = folder / "config.json"
    try:
        numbers = size_of(*on_meta(config, data))
    except (RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{path} describes no model that can be made ({reason(error)}); it is damaged") from error
    check_fits(4 * numbers, torch.device("cpu"), f"the model that {path} describes", "is that file damaged?")
    vqvae, prior = build_models(config, data)
    refiner = build_refiner(config, data)
    for stage, module in enumerate((vqvae, prior, refiner), 1):
        if module is not None:
            load_weights(folder / f"stage{stage}.safetensors", module)
    vqvae.refiner = refiner
    return NCVQVAE(config, data, vqvae, prior, device, precision)
