"""Types of the options of `fit` and `sample`, for type checkers: the fields of `Config`, to which a test holds them."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

Labels = str | Sequence[str] | Mapping[str, int]  # which classes are drawn
Condition = Mapping[str, Any]  # by name a value, or several


class SamplingOptions(TypedDict, total=False):
    """Options of the group "Sampling" of `ncfast.config.Config`."""

    refinements: int
    decoding_steps: int
    decoding_order: Literal["confidence", "halton"]
    choice_temperature: float
    guidance_scale: float
    temperature: float
    top_k: int
    unmasking: Literal["paper", "google"]


class Options(SamplingOptions, total=False):
    """All options of `ncfast.config.Config`."""

    ssl: Literal["none", "barlow", "vicreg", "vibcreg", "ntxent", "byol", "simsiam", "sigreg", "visreg", "views"]
    augment: str | Sequence[str]
    ssl_weight: float | None
    view_weight: float
    projector_dim: int
    n_fft: int
    dim: int
    residual_blocks: int
    codebook_size: int
    codebook_levels: int
    codebook_init: Literal["random", "kmeans"]
    dead_code_threshold: float
    halvings: int | None
    detail: float
    samples_per_column: int
    level: Literal["auto", "on", "off"]
    codebook_decay: float
    prior_dim: int
    prior_layers: int
    prior_heads: int
    prior_head_dim: int
    prior_ff_mult: int
    embeddings: Literal["learned", "random"]
    prior_dropout: float
    token_temperature: float
    masking: Literal["masked", "kept"]
    class_dropout: float | None
    refiner: Literal["flow", "none"]
    refiner_dim: int
    refiner_temperature: float
    stage1_epochs: int | None
    stage2_epochs: int | None
    stage1_steps: int
    stage2_steps: int | None
    refiner_epochs: int | None
    batch_size: int
    stage2_batch_size: int
    learning_rate: float
    weight_decay: float
    stretch: float | None
    precision: Literal["fp32", "tf32", "bf16"] | None
    seed: int
