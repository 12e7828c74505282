"""A trained NC-VQVAE: both stages, and what it takes to return series in data units. Kept in a run folder."""

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ncfast.config import Config, make_config
from ncfast.data.sources import Dataset
from ncfast.engine.checkpoint import read_json, read_tensors, write_json, write_tensors
from ncfast.errors import UserError
from ncfast.ops import philox
from ncfast.stage1 import VQVAE
from ncfast.stage2 import Prior, decode_iteratively
from ncfast.version import __version__

FORMAT = 1


@dataclass(frozen=True)
class DataFacts:
    """What a run remembers of its training data."""

    name: str
    source: str
    num_series: int
    channels: int
    length: int
    class_names: tuple[str, ...]  # empty without labels
    class_counts: tuple[int, ...]
    mean: tuple[float, ...]  # of each channel over the train set
    std: tuple[float, ...]
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, dataset: Dataset) -> "DataFacts":
        X = dataset.X_train.astype(np.float64)  # [N, C, L]
        counts = () if dataset.y_train is None else np.bincount(dataset.y_train, minlength=dataset.n_classes).tolist()
        std = X.std(axis=(0, 2))
        return cls(
            name=dataset.name,
            source=dataset.source,
            num_series=X.shape[0],
            channels=X.shape[1],
            length=X.shape[2],
            class_names=tuple(dataset.class_names),
            class_counts=tuple(counts),
            mean=tuple(X.mean(axis=(0, 2)).tolist()),
            # A channel that never changes is only shifted.
            std=tuple(np.where(std > 0, std, 1.0).tolist()),
            notes=tuple(dataset.notes),
        )

    def normalise(self, X: np.ndarray, device: torch.device) -> Tensor:
        """Data units -> zero mean and unit variance a channel (over the train set), on `device`.  X [N, C, L]."""
        mean, std = (np.array(v)[:, None] for v in (self.mean, self.std))
        return torch.from_numpy(((X - mean) / std).astype(np.float32)).to(device)

    def denormalise(self, x: Tensor) -> np.ndarray:
        mean, std = (np.array(v)[:, None] for v in (self.mean, self.std))
        return (x.double().cpu().numpy() * std + mean).astype(np.float32)


class Batch(NamedTuple):
    """Consecutive generated series, as arrays."""

    index: np.ndarray  # int64 [B], global sample index
    x: np.ndarray  # float32 [B, C, L], in data units
    y: np.ndarray | None  # int64 [B] class index, None for a model without classes
    tokens: np.ndarray  # uint16 [B, n]


class NCVQVAE:
    """Draws new series.

    Attributes:
        config: how it was trained.
        data: facts of the training data: class names, length, normalisation.
        device: where it runs.
    """

    def __init__(self, config: Config, data: DataFacts, vqvae: VQVAE, prior: Prior, device: torch.device) -> None:
        self.config = config
        self.data = data
        self.device = device
        self.vqvae = vqvae.to(device).eval()
        self.prior = prior.to(device).eval()

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.data.class_names

    @property
    def chunk_size(self) -> int:
        """Rows a forward pass. Fixed, because a matrix product may round differently for another number of rows."""
        return 64 if self.device.type == "cpu" else 1024

    def sample(
        self, n: int, label: Any = None, seed: int = 0, *, start: int = 0
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """New series in data units.

        Series i depends on the seed, its label and i alone: on one machine, any split of a range of indices gives the
        same series bit for bit.

        Args:
            n: how many.
            label: a class name, or several to take in turn; None draws classes in the train set's proportions.
            seed: of all random numbers.
            start: index of the first series.

        Returns:
            X float32 [n, C, L], and y, the class name of each series [n] (None for a model without classes).

        Raises:
            UserError: a label the model does not know.
        """
        batches = list(self.sample_batches(n, label, seed, start=start))
        x = np.concatenate([np.empty((0, self.data.channels, self.data.length), np.float32), *[b.x for b in batches]])
        if not self.class_names:
            return x, None
        y = np.concatenate([np.empty(0, np.int64), *[b.y for b in batches]])
        return x, np.array(self.class_names)[y]

    @torch.no_grad()
    def sample_batches(self, n: int, label: Any = None, seed: int = 0, *, start: int = 0) -> Iterator[Batch]:
        """As `sample`, a chunk at a time, with token grids and class indices."""
        if n < 0 or start < 0:
            raise UserError(f"the number of series and the start index are not negative; got {n} and {start}")
        choices = self.resolve_labels(label)
        size = self.chunk_size
        for first in range(start // size * size, start + n, size):
            # Whole chunks, aligned to the sample index: a series always sits in the same row of the same product.
            sample = torch.arange(first, first + size, device=self.device)
            labels = self.draw_labels(sample, choices, seed)
            tokens = decode_iteratively(
                self.prior,
                labels,
                sample,
                seed=seed,
                steps=self.config.decoding_steps,
                choice_temperature=self.config.choice_temperature,
                guidance_scale=self.config.guidance_scale,
            )
            x = self.data.denormalise(self.vqvae.detokenize(tokens))
            rows = slice(max(start - first, 0), min(start + n - first, size))
            yield Batch(
                index=sample.cpu().numpy()[rows],
                x=x[rows],
                y=labels.cpu().numpy()[rows] if self.class_names else None,
                tokens=tokens.cpu().numpy().astype(np.uint16)[rows],
            )

    def resolve_labels(self, label: Any) -> Tensor | None:
        """Class indices [m] of the given name or names; None stays None."""
        if label is None:
            return None
        if not self.class_names:
            raise UserError("this model was trained without labels, so it has no classes to choose from")
        names = [label] if isinstance(label, str) or not isinstance(label, Sequence | np.ndarray) else list(label)
        unknown = [str(name) for name in names if str(name) not in self.class_names]
        if unknown or not names:
            what = f"no class {unknown[0]!r}" if unknown else "no class named"
            raise UserError(f"{what}; this model knows {', '.join(self.class_names)}")
        return torch.tensor([self.class_names.index(str(name)) for name in names], device=self.device)

    def draw_labels(self, sample: Tensor, choices: Tensor | None, seed: int) -> Tensor:
        """Class index of each sample index: the choices in turn, or drawn in the train set's proportions."""
        if not self.class_names:
            return torch.zeros_like(sample)
        if choices is not None:
            return choices[sample % len(choices)]
        cdf = torch.tensor(self.data.class_counts, dtype=torch.float64, device=self.device).cumsum(0)
        u = philox.uniform(seed, sample, torch.zeros_like(sample), step=0, stream=philox.LABELS)
        return (cdf <= u[:, None] * cdf[-1]).sum(-1)

    @torch.no_grad()
    def reconstruct(self, X: np.ndarray) -> np.ndarray:
        """Series through the codebook and back, in data units.  X [n, C, L] or [n, L] -> [n, C, L]."""
        X = np.asarray(X, dtype=np.float32)
        X = X[:, None] if X.ndim == 2 else X
        if X.shape[1:] != (self.data.channels, self.data.length):
            raise UserError(f"series are [n, {self.data.channels}, {self.data.length}]; got {list(X.shape)}")
        x = self.data.normalise(X, self.device)
        return self.data.denormalise(torch.cat([self.vqvae.reconstruct(block) for block in x.split(self.chunk_size)]))

    def save(self, folder: str | Path) -> None:
        """Writes config.json, stage1.safetensors and stage2.safetensors."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_config(folder, self.config, self.data)
        write_tensors(folder / "stage1.safetensors", self.vqvae.state_dict())
        write_tensors(folder / "stage2.safetensors", self.prior.state_dict())


def load(run: str | Path, device: str | torch.device = "cpu") -> NCVQVAE:
    """The model of a finished run.

    Args:
        run: the run's folder (`--out` of `ncfast.train`).
        device: where it shall run, "cpu" or "cuda".

    Raises:
        UserError: no such run, one that is not finished, or a damaged file.
    """
    folder = Path(run)
    config, data = read_config(folder)
    for stage in (1, 2):
        if not (folder / f"stage{stage}.safetensors").exists():
            raise UserError(f"{folder} has not finished stage {stage}; continue it with `ncfast.train ... --resume`")
    vqvae, prior = build_models(config, data)
    for name, module in (("stage1", vqvae), ("stage2", prior)):
        load_weights(folder / f"{name}.safetensors", module)
    return NCVQVAE(config, data, vqvae, prior, torch.device(device))


def build_models(config: Config, data: DataFacts) -> tuple[VQVAE, Prior]:
    vqvae = VQVAE(config, data.channels, data.length)
    return vqvae, Prior(config, vqvae.vq.codebook, vqvae.num_tokens, len(data.class_names))


def load_weights(path: Path, module: torch.nn.Module) -> None:
    try:
        module.load_state_dict(read_tensors(path))
    except RuntimeError as error:
        raise UserError(f"{path} does not fit its config.json: {str(error).splitlines()[-1].strip()}") from error


def write_config(folder: Path, config: Config, data: DataFacts) -> None:
    content = {
        "format": FORMAT,
        "ncfast": __version__,
        "config": dataclasses.asdict(config),
        "data": dataclasses.asdict(data),
    }
    write_json(folder / "config.json", content)


def read_config(folder: Path) -> tuple[Config, DataFacts]:
    path = folder / "config.json"
    if not path.exists():
        raise UserError(f"{folder} is not the folder of a run: it has no config.json")
    content = read_json(path)
    try:
        if content["format"] != FORMAT:
            raise UserError(f"{path} has format {content['format']}; this ncfast {__version__} reads format {FORMAT}")
        data = {k: tuple(v) if isinstance(v, list) else v for k, v in content["data"].items()}
        return make_config(**content["config"]), DataFacts(**data)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a run's configuration ({error!r})") from error


def weights_sha256(folder: Path) -> str:
    """One hash over both weight files."""
    digest = hashlib.sha256()
    for stage in (1, 2):
        digest.update((folder / f"stage{stage}.safetensors").read_bytes())
    return digest.hexdigest()
