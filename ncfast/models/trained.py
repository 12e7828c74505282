"""A trained model: configuration, statistics of its data and both networks, and the files they are kept in."""

import dataclasses
import hashlib
import os
from pathlib import Path

import torch

from ncfast.config import Config, make_config
from ncfast.data.stats import DataStats
from ncfast.engine.checkpoint import read_json, read_tensors, write_json
from ncfast.engine.precision import resolve_precision
from ncfast.errors import UserError
from ncfast.models.prior import Prior
from ncfast.models.refiner import Refiner
from ncfast.models.vqvae import VQVAE
from ncfast.nn.meta import without_memory
from ncfast.version import __version__

FORMAT = 1
# Options that earlier versions did not have, with what they did.
EARLIER = {
    "detail": 0.0,
    "samples_per_column": 0,
    "level": "off",
    "codebook_levels": 1,
    "prior_dropout": 0.0,
    "token_temperature": 1.0,
    "refiner": "none",
    "stretch": 0.0,
    "decoding_order": "confidence",
}


class TrainedModel:
    """Both networks, ready to run on a device, and what they were trained on; attributes as of `ncfast.NCVQVAE`."""

    def __init__(
        self,
        config: Config,
        data: DataStats,
        vqvae: VQVAE,
        prior: Prior,
        device: torch.device,
        precision: str | None = None,
    ) -> None:
        """precision: None for that of the training, where the device has it."""
        self.config = config
        self.data = data
        self.device = device
        asked = config.precision if precision is None else precision
        self.precision = resolve_precision(asked, device, fall_back=precision is None)
        self.vqvae = vqvae.to(device).eval()
        self.prior = prior.to(device).eval()

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.data.class_names

    @property
    def chunk_size(self) -> int:
        """Rows a forward pass when drawing (`sampling.series`)."""
        return 64 if self.device.type == "cpu" else 1024


def build_models(config: Config, data: DataStats) -> tuple[VQVAE, Prior]:
    vqvae = VQVAE(config, data.channels, data.length, data.has_gaps)
    return vqvae, build_prior(config, data, vqvae)


def build_prior(config: Config, data: DataStats, vqvae: VQVAE) -> Prior:
    """On the CPU, but for that of a model without memory."""
    codebook = vqvae.codebook
    codebook = codebook if codebook.is_meta else codebook.cpu()
    conditions = data.conditions + data.levels
    return Prior(config, codebook, vqvae.num_tokens, len(data.class_names), conditions, data.num_series)


def build_refiner(config: Config, data: DataStats) -> Refiner | None:
    return Refiner(data.channels, config.refiner_dim) if config.refiner == "flow" else None


def on_meta(config: Config, data: DataStats) -> tuple[VQVAE, Prior, Refiner | None]:
    """The models' shapes, without memory for them."""
    with without_memory():
        return *build_models(config, data), build_refiner(config, data)


def size_of(*modules: torch.nn.Module | None) -> int:
    """Numbers in parameters and buffers."""
    there = [module for module in modules if module is not None]
    return sum(t.numel() for module in there for t in (*module.parameters(), *module.buffers()))


def load_weights(path: Path, module: torch.nn.Module) -> None:
    tensors = read_tensors(path)
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise UserError(f"{path} is damaged: its {name} is not finite; train the run again, or restore the file")
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit its config.json: {str(error).splitlines()[-1].strip()}") from error


def write_config(folder: Path, config: Config, data: DataStats) -> None:
    content = {
        "format": FORMAT,
        "ncfast": __version__,
        "config": dataclasses.asdict(config),
        "data": dataclasses.asdict(data),
    }
    write_json(folder / "config.json", content)


def read_config(folder: Path) -> tuple[Config, DataStats]:
    path = folder / "config.json"
    if not os.path.exists(path):  # unlike Path.exists it takes any name
        # Of `train --seeds` of earlier versions.
        hint = "; it holds one for each seed, such as seed1" if (folder / "seeds.json").exists() else ""
        raise UserError(f"{folder} is not the folder of a run: it has no config.json{hint}")
    content = read_json(path)
    try:
        if content["format"] != FORMAT:
            raise UserError(
                f"it has format {content['format']}, and this ncfast {__version__} reads format {FORMAT}; use the "
                f"version that wrote it, {content.get('ncfast')}"
            )
        return make_config(**{**EARLIER, **content["config"]}), DataStats.from_json(content["data"])
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"{path} is not a run's configuration ({error!r}); it is damaged or of another format"
        ) from error


def weights_sha256(folder: Path) -> str:
    """One hash over the weight files."""
    digest = hashlib.sha256()
    for stage in (1, 2, 3):
        path = folder / f"stage{stage}.safetensors"
        if stage < 3 or path.exists():
            digest.update(path.read_bytes())
    return digest.hexdigest()
