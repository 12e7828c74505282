"""The configuration of a run: one dataclass and its presets."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ncfast.errors import UserError

# Words that options take, here for the programs' --help, which imports nothing else.
IMPLEMENTATIONS = ("auto", "reference", "cpp", "cuda", "triton")  # of NCFAST_IMPL; `ops.dispatch`
PRECISIONS = ("fp32", "tf32", "bf16")  # `engine.precision` says what they are
DTYPES = ("float32", "float16")  # of generated series on disk
FILE_FORMATS = ("h5", "csv", "tsv", "npz", "parquet")  # that `ncfast.generate` writes
COMPRESSIONS = ("none", "lzf", "gzip", "zstd")
PAPER_METHODS = {
    "none": "regular",
    "barlow": "barlowtwins",
    "vibcreg": "vibcreg",
    "vicreg": "vicreg",
}  # --ssl: the authors' name
METHODS = PAPER_METHODS | {name: name for name in ("ntxent", "byol", "simsiam", "sigreg", "visreg")}
MEASURES = (
    "reconstruction",
    "codebook",
    "knn",
    "svm",
    "fid",
    "is",
    "cas",
    "acd",
    "mdd",
    "nnd",
    "precision",
    "recall",
    "nndr",
    "mia",
    "discriminative",
    "predictive",
    "context_fid",
)
SLOW_MEASURES = ("discriminative", "predictive", "context_fid")  # taken only where they are asked for


def option(default: Any, help: str, group: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": help, "group": group, **more})


@dataclass(frozen=True)
class Config:
    """Everything that decides what a training run computes. Field `a_b` is the flag `--a-b`."""

    ssl: Literal["none", "barlow", "vicreg", "vibcreg", "ntxent", "byol", "simsiam", "sigreg", "visreg", "views"] = (
        option(
            "vicreg",
            "self-supervised loss between the two views; none trains a plain VQVAE, views one that also reconstructs "
            "the augmented view, without such a loss",
            "Self-supervision",
        )
    )
    augment: tuple[str, ...] = option(
        ("warp",),
        "recipes (gauss, slice, warp) or single operations, applied in this order; with a strength from 0 to 2 behind "
        "it, such as warp:0.5, weaker or stronger than the paper's",
        "Self-supervision",
    )
    ssl_weight: float | None = option(
        None,
        "weight of the SSL loss [1 for barlow, byol, simsiam and sigreg, 0.1 for ntxent and visreg, 0.01 for vicreg "
        "and vibcreg]",
        "Self-supervision",
    )
    view_weight: float = option(1.0, "weight of the augmented view's reconstruction", "Self-supervision")
    projector_dim: int = option(
        1024,
        "width of the projector; its last layer is 128 wide for ntxent, sigreg and visreg, 256 for byol",
        "Self-supervision",
        minimum=1,
        maximum=2**20,
    )

    n_fft: int = option(4, "STFT window in samples; the hop is a quarter of it", "VQVAE", minimum=4)
    dim: int = option(64, "width of encoder, decoder and codes", "VQVAE", minimum=1, maximum=2**16)
    residual_blocks: int = option(4, "residual blocks in encoder and decoder", "VQVAE", minimum=0, maximum=1000)
    codebook_size: int = option(128, "number of codes", "VQVAE", minimum=2, maximum=65535)
    codebook_levels: int = option(
        1,
        "codes that are added up for each latent, coarse to fine: each level has a codebook of its own for what the "
        "levels before it leave",
        "VQVAE",
        minimum=1,
        maximum=8,
    )
    codebook_init: Literal["random", "kmeans"] = option(
        "random", "codes start as normal random vectors, or as k-means of the first batch's latents", "VQVAE"
    )
    dead_code_threshold: float = option(
        0.0, "a code whose moving count falls below is replaced by a latent of the batch; 0: never", "VQVAE", minimum=0
    )
    halvings: int | None = option(
        None,
        "how often the encoder halves the time axis [by the length: 7 to 15 columns remain of 70 samples and more, and "
        "more as --detail and --samples-per-column say]",
        "VQVAE",
        minimum=1,
    )
    detail: float = option(
        0.2,
        "without --halvings, as many halvings less as tell this share of the variance apart (but for white noise), up "
        "to 33 columns; 0: by the length alone",
        "VQVAE",
        minimum=0,
        maximum=1,
    )
    samples_per_column: int = option(
        32,
        "a column stands for at most so many samples, so that long series keep their detail; 0: no such limit",
        "VQVAE",
        minimum=0,
        maximum=2**24,
    )
    level: Literal["auto", "on", "off"] = option(
        "auto",
        "on: each series is coded without its mean and standard deviation, which are drawn beside the tokens; auto: "
        "where 90 %% of the variance or more lies between the means of series",
        "VQVAE",
    )
    codebook_decay: float = option(0.9, "decay of the codebook's moving averages", "VQVAE", minimum=0, maximum=1)

    prior_dim: int = option(256, "width of the prior's transformer", "Prior", minimum=1, maximum=2**16)
    prior_layers: int = option(4, "transformer blocks", "Prior", minimum=1, maximum=1000)
    prior_heads: int = option(2, "attention heads", "Prior", minimum=1, maximum=2**12)
    prior_head_dim: int = option(64, "width of a head", "Prior", minimum=1, maximum=2**12)
    prior_ff_mult: int = option(1, "feed-forward width over model width", "Prior", minimum=1, maximum=2**10)
    embeddings: Literal["learned", "random"] = option(
        "learned", "token embeddings start as the stage-1 codebook, or at random; both then train", "Prior"
    )
    prior_dropout: float = option(
        0.0,
        "share of the embeddings and of what each layer adds that is dropped in training",
        "Prior",
        minimum=0,
        maximum=0.9,
    )
    token_temperature: float = option(
        1.0,
        "the prior learns tokens drawn from softmax(-|z - e_k|^2 / this), of the coarsest level; 0: the nearest codes",
        "Prior",
        minimum=0,
    )
    masking: Literal["masked", "kept"] = option(
        "masked",
        "whether the floor(n cos(pi t / 2)) drawn positions are masked (64 %% on average) or kept (36 %% masked)",
        "Prior",
    )
    class_dropout: float | None = option(
        None,
        "share of labels replaced by 'no class' [0.5, of series with conditions, lengths or levels 0.2]",
        "Prior",
        minimum=0,
        maximum=1,
    )

    refiner: Literal["flow", "none"] = option(
        "flow", "what gives decoded series back the detail that the codebook took", "Refiner"
    )
    refiner_dim: int = option(64, "width of the refiner", "Refiner", minimum=1, maximum=2**12)
    refiner_temperature: float = option(
        1.0, "the refiner learns from series of codes drawn from softmax(-|z - e_k|^2 / this)", "Refiner", minimum=0
    )

    refinements: int = option(
        8, "steps of the refiner, where there is one; 0 leaves it out", "Sampling", minimum=0, maximum=1000
    )
    decoding_steps: int = option(40, "steps of iterative decoding", "Sampling", minimum=1, maximum=1000)
    decoding_order: Literal["confidence", "halton"] = option(
        "confidence",
        "the surest tokens first, or a fixed order that spreads over the grid (Halton's sequence)",
        "Sampling",
    )
    choice_temperature: float = option(
        1000.0,
        "Gumbel noise on the confidence that orders the tokens, annealed to 0; so much of it makes any order",
        "Sampling",
        minimum=0,
    )
    guidance_scale: float = option(1.0, "u + s (c - u) on the logits; 1 is plain conditional", "Sampling", minimum=0)
    temperature: float = option(1.0, "the logits are divided by it", "Sampling", minimum=1e-3)
    top_k: int = option(
        0, "draw among the k most likely codes only; 0 draws among all", "Sampling", minimum=0, maximum=2**31 - 1
    )
    unmasking: Literal["paper", "google"] = option(
        "paper",
        "confidence log(p + 1e-5) and floor(n cos) masked tokens, or log p and at least one token a step revealed",
        "Sampling",
    )

    stage1_epochs: int | None = option(
        None, "epochs of stage 1 [as many as make --stage1-steps]", "Training", minimum=1, maximum=10**7
    )
    stage2_epochs: int | None = option(
        None, "epochs of stage 2 [as many as make --stage2-steps]", "Training", minimum=1, maximum=10**7
    )
    stage1_steps: int = option(
        3000, "optimiser steps of stage 1, unless epochs are given", "Training", minimum=1, maximum=10**8
    )
    stage2_steps: int | None = option(
        None,
        "optimiser steps of stage 2, unless epochs are given [6000; of few series 20 for each, 1000 at least]",
        "Training",
        minimum=1,
        maximum=10**8,
    )
    refiner_epochs: int | None = option(
        None,
        "epochs of stage 3, the refiner [half of those of stage 1]",
        "Training",
        minimum=1,
        maximum=10**7,
    )
    batch_size: int = option(128, "series a step of stages 1 and 3", "Training", minimum=2)
    stage2_batch_size: int = option(256, "series a stage-2 step", "Training", minimum=1)
    learning_rate: float = option(1e-3, "of AdamW; cosine to 0 over each stage", "Training", minimum=0)
    weight_decay: float = option(1e-3, "of AdamW", "Training", minimum=0)
    stretch: float | None = option(
        None,
        "all stages train on copies too, whose time runs faster here and slower there: standard deviation of the log "
        "speed; 0: on the series alone [0.3 of at most 12 series a class without gaps, else 0]",
        "Training",
        minimum=0,
        maximum=2,
    )
    precision: Literal["fp32", "tf32", "bf16"] | None = option(
        None, "number format of products and convolutions [fp32 on a CPU, tf32 on a GPU]", "Training"
    )
    seed: int = option(0, "random seed", "Training", minimum=0, maximum=2**63 - 1)


PRESETS: dict[str, dict[str, Any]] = {
    # The values above: chosen on held-out train series of six data sets (docs/experiments.md).
    "default": {},
    # What the authors ran.
    "paper": {
        "augment": ("gauss",),
        "view_weight": 0.1,
        "n_fft": 8,
        "codebook_size": 32,
        "detail": 0.0,
        "samples_per_column": 0,
        "level": "off",
        "class_dropout": 0.2,
        "refiner": "none",
        "stretch": 0.0,
        "projector_dim": 4096,
        "decoding_steps": 10,
        "choice_temperature": 4.0,
        "stage1_epochs": 1000,
        "stage2_epochs": 1000,
    },
}


def make_config(preset: str = "default", **values: Any) -> Config:
    """A checked Config: the preset's values, then the given ones. Unknown names and values raise UserError."""
    if preset not in PRESETS:
        raise UserError(f"preset is one of {', '.join(PRESETS)}; got {preset!r}")
    fields = {f.name: f for f in dataclasses.fields(Config)}
    hints = typing.get_type_hints(Config)
    for name in values:
        if name not in fields:
            close = difflib.get_close_matches(name, fields, n=1)
            raise UserError(f"no option {name!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
    resolved = {
        name: checked(fields[name], hints[name], value) for name, value in {**PRESETS[preset], **values}.items()
    }
    return Config(**resolved)


def epochs_text(config: Config) -> str:
    """The epochs of each stage, of a resolved configuration, such as "16 + 94 + 12"."""
    epochs = (config.stage1_epochs, config.stage2_epochs, config.refiner_epochs)
    return " + ".join(str(number) for number in epochs if number is not None)


def sampling_values(config: Config) -> dict[str, Any]:
    """The options of the group "Sampling"."""
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(Config) if f.metadata["group"] == "Sampling"}


def sampling_config(config: Config, values: Mapping[str, Any]) -> Config:
    """`config` with other options of the group "Sampling".

    Raises:
        UserError: an option of another group, or a value that it cannot have.
    """
    names = sampling_values(config)
    for name in values:
        if name not in names:
            raise UserError(f"no sampling option {name!r}; there are {', '.join(names)}")
    return make_config(**{**dataclasses.asdict(config), **values})


def checked(f: dataclasses.Field, hint: Any, value: Any) -> Any:
    flag = "--" + f.name.replace("_", "-")
    if is_optional(hint):
        if value is None:
            return None
        hint = without_none(hint)
    if typing.get_origin(hint) is Literal:
        if not isinstance(value, str) or value not in typing.get_args(hint):
            raise UserError(f"{flag} is one of {', '.join(typing.get_args(hint))}; got {value!r}")
        return value
    if typing.get_origin(hint) is tuple:
        names = (value,) if isinstance(value, str) else value
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            raise UserError(f"{flag} is a list of names; got {value!r}")
        return tuple(names)
    if isinstance(value, bool) or not isinstance(value, (int, float) if hint is float else int):
        raise UserError(f"{flag} is a{'n integer' if hint is int else ' number'}; got {value!r}")
    if hint is float and isinstance(value, int):
        value = float(value) if abs(value) <= 2**1000 else float("inf")
    low, high = f.metadata.get("minimum"), f.metadata.get("maximum")
    # Written so that NaN fails too.
    if (low is not None and not value >= low) or (high is not None and not value <= high) or value - value != 0:
        bounds = " and ".join([f"at least {low}"] * (low is not None) + [f"at most {high}"] * (high is not None))
        raise UserError(f"{flag} is {bounds or 'a finite number'}; got {value}")
    return value


def is_optional(hint: Any) -> bool:
    return typing.get_origin(hint) in (types.UnionType, typing.Union)


def without_none(hint: Any) -> Any:
    """X of the type X | None."""
    return next(each for each in typing.get_args(hint) if each is not type(None))
