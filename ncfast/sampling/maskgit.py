"""Draws tokens from the prior by iterative decoding (MaskGIT, arXiv 2202.04200, section 3.2), no work wasted."""

import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ncfast.config import Config
from ncfast.engine.compile_ahead import compile_ahead
from ncfast.engine.cuda_graph import CudaGraph
from ncfast.engine.precision import autocast, computing
from ncfast.models.prior import Prior
from ncfast.models.vqvae import VQVAE
from ncfast.ops import unmask_step
from ncfast.sampling.order import halton_order


@dataclass(frozen=True)
class SamplerOptimizations:
    """What the sampler leaves out because the result is known without it. Each can be switched off, to compare.

    Attributes:
        first_step_by_class: before the first step all series of a class are the same masks, so their logits are too:
            computed once a class. Of a prior with conditions they are not.
        conditional_pass_only: at guidance 1 the logits without the class have no weight.
        masked_positions_only: nothing is drawn where a token is known: after the last attention, only masked positions
            go on. (Keys and values need all of them, and no other layer can leave one out: attention looks both ways.)
        first_layer_table: what enters the first attention depends on a token and its position alone: its queries, keys
            and values are looked up.
        drop_idle_steps: a step after which as many tokens are masked as before it has changed nothing.
    """

    first_step_by_class: bool = True
    conditional_pass_only: bool = True
    masked_positions_only: bool = True
    first_layer_table: bool = True
    drop_idle_steps: bool = True

    @classmethod
    def none(cls) -> "SamplerOptimizations":
        return cls(*[False] * 5)


def mask_schedule(num_tokens: int, steps: int, convention: str = "paper") -> list[int]:
    """How many of `num_tokens` masked tokens are still masked after each step: floor(n cos(π/2 · (t + 1) / T)), then 0.

    Google's convention ("google") reveals at least one token a step and keeps one for the last.
    """
    counts = [math.floor(num_tokens * math.cos(0.5 * math.pi * (t + 1) / steps)) for t in range(steps)]
    if convention == "google":
        unknown = num_tokens
        for t, count in enumerate(counts):
            counts[t] = unknown = min(unknown, max(1, min(count, unknown - 1)))
    return [*counts[:-1], 0]


class Sampler:
    """Tokens of new series from a trained prior.

    Every shape depends on the number of rows alone, nothing waits for the device, and random numbers are addressed by
    (seed; sample, step, position): `decode` can be captured into one CUDA graph, and a row's tokens do not depend on
    the other rows, as long as the number of rows stays the same.
    """

    # Rows of the first layer's table take 4 (dim + 3 H d) bytes each; a larger table is not made.
    MAX_TABLE_BYTES = 2**28

    @torch.no_grad()
    def __init__(
        self, prior: Prior, config: Config, savers: SamplerOptimizations | None = None, *, precision: str = "fp32"
    ) -> None:
        """
        Args:
            prior: its weights are not to change while the sampler is used.
            config: of it, the group "Sampling".
            savers: all, when not given.
            precision: of products (`engine.precision`).
        """
        self.prior = rounded(prior) if precision == "bf16" else prior
        self.config = config
        self.savers = SamplerOptimizations() if savers is None else savers
        self.precision = precision
        self.device = prior.token_embedding.device
        unguided = config.guidance_scale == 1 and self.savers.conditional_pass_only
        self.guided = (prior.num_classes > 0 or prior.condition_embedding is not None) and not unguided
        # Coarse tokens come before those of finer levels, whose codes they do not share.
        self.level_size = prior.num_tokens // config.codebook_levels
        level = torch.arange(prior.num_codes, device=self.device) // config.codebook_size
        own = level == torch.arange(config.codebook_levels, device=self.device)[:, None]
        self.level_bias = torch.zeros(own.shape, device=self.device).masked_fill_(~own, -torch.inf)  # [levels, K]
        self.table = self.first_logits = None
        with computing(precision, self.device):
            compile_ahead(self.prepare, self.device)
            self.table = self.first_logits = None
            self.prepare()
        # Row u: the schedule of a level with u tokens to fill.
        n, steps = self.level_size, config.decoding_steps
        schedules = [mask_schedule(unknown, steps, config.unmasking) for unknown in range(n + 1)]
        self.schedules = torch.tensor(schedules, device=self.device)  # [n + 1, T]
        self.schedule = schedules[n]
        self.order = None
        if config.decoding_order == "halton":
            self.order = torch.tensor(halton_order(config.n_fft // 2 + 1, n), device=self.device)

    def prepare(self) -> None:
        with autocast(self.precision, self.device):
            if self.savers.first_layer_table:
                self.table = self.first_layer_table()
            if self.savers.first_step_by_class and self.prior.condition_embedding is None:
                classes = torch.arange(self.prior.num_classes + 1, device=self.device)
                masks = torch.full((len(classes), self.prior.num_tokens), self.prior.num_codes, device=self.device)
                first = torch.arange(self.level_size, device=self.device).expand(len(classes), -1)
                first = None if self.config.codebook_levels == 1 else first
                self.first_logits = self.logits(masks, classes, first)  # [C + 1, n, K] of the coarsest level

    @torch.no_grad()
    def decode(
        self,
        labels: Tensor,
        sample: Tensor,
        seed: int | Tensor,
        known: Tensor | None = None,
        conditions: Tensor | None = None,
    ) -> Tensor:
        """
        Args:
            labels: class of each row, int64 [B] in 0..C; C is "no class".
            sample: global index of each row, int64 [B]; with the seed it decides the row's random numbers.
            seed: 64 bits; an int64 tensor without dimensions on the prior's device can change between graph replays.
            known: int64 [B, n]: tokens that stay as they are, and K where one is wanted; None wants all.
            conditions: of each row, float64 [B, k], NaN where not known; None where none is.

        Returns:
            tokens int64 [B, n] in 0..K-1.
        """
        K = self.prior.num_codes
        tokens = torch.full((len(labels), self.prior.num_tokens), K, device=self.device) if known is None else known
        for level in range(self.config.codebook_levels):
            unknown = None if known is None else (known[:, self.columns(level)] == K).sum(1)
            tokens = self.fill(level, tokens, unknown, labels, sample, seed, conditions)
        return tokens

    def columns(self, level: int) -> slice:
        """Where the tokens of a level are."""
        return slice(level * self.level_size, (level + 1) * self.level_size)

    def fill(
        self,
        level: int,
        tokens: Tensor,  # [B, n]
        unknown: Tensor | None,  # [B], tokens to fill where some were known from the start
        labels: Tensor,
        sample: Tensor,
        seed: int | Tensor,
        conditions: Tensor | None,
    ) -> Tensor:
        """Draws the masked tokens of one level, given those of coarser ones."""
        prior, config, steps = self.prior, self.config, self.config.decoding_steps
        n = self.level_size
        several = config.codebook_levels > 1
        every = None
        if several:
            columns = self.columns(level)
            every = torch.arange(columns.start, columns.stop, device=self.device).expand(len(tokens), -1)
        positions = every
        both = None
        if self.guided and conditions is not None:
            both = torch.cat([conditions, torch.full_like(conditions, torch.nan)])
        before = n
        for step in range(steps):
            # With known tokens every row has a schedule of its own, which the host does not look at.
            num_masked = self.schedule[step] if unknown is None else self.schedules[unknown, step]
            if unknown is None and num_masked == before and (self.savers.drop_idle_steps or self.order is not None):
                continue
            first_logits = self.first_logits if step == level == 0 and unknown is None else None
            if self.order is not None:
                # Only those that this step fills are looked at.
                if unknown is None:
                    following = self.order[n - before : n - num_masked].sort().values
                    first_logits = None if first_logits is None else first_logits[:, following]
                    positions = (following + self.columns(level).start).expand(len(tokens), -1)
                else:
                    positions = self.following_masked(level, tokens, num_masked)
            if first_logits is not None:
                conditional = F.embedding(labels, first_logits.flatten(1)).unflatten(1, first_logits.shape[1:])
                unconditional = first_logits[-1:].expand_as(conditional) if self.guided else None
            elif self.guided:
                conditional, unconditional = self.logits(
                    tokens.repeat(2, 1),
                    torch.cat([labels, torch.full_like(labels, prior.num_classes)]),
                    None if positions is None else positions.repeat(2, 1),
                    both,
                ).chunk(2)
            else:
                conditional, unconditional = self.logits(tokens, labels, positions, conditions), None
            if several:
                conditional = conditional + self.level_bias[level]
                unconditional = None if unconditional is None else unconditional + self.level_bias[level]
            tokens, masked = unmask_step(
                conditional,
                tokens,
                sample,
                seed=seed,
                step=level * steps + step,
                num_masked=num_masked if self.order is None else 0,
                choice_temperature=config.choice_temperature * (1 - (step + 1) / steps),
                positions=positions,
                width=None if unknown is None else prior.num_tokens,
                unconditional=unconditional,
                guidance_scale=config.guidance_scale,
                temperature=config.temperature,
                top_k=config.top_k,
                convention=config.unmasking,
            )
            if unknown is None:
                before = num_masked
                positions = masked if self.savers.masked_positions_only else every
        return tokens

    def following_masked(self, level: int, tokens: Tensor, num_masked: Tensor) -> Tensor:
        """The masked tokens of a level that come first in the order, so that num_masked [B] are left.

        tokens [B, n] -> their positions [B, n of the level], ascending, then n for none.
        """
        order = self.order + self.columns(level).start
        masked = tokens[:, order] == self.prior.num_codes
        following = masked & (masked.cumsum(1) <= masked.sum(1, keepdim=True) - num_masked[:, None])
        return torch.where(following, order, self.prior.num_tokens).sort(1).values

    def logits(
        self, tokens: Tensor, labels: Tensor, positions: Tensor | None = None, conditions: Tensor | None = None
    ) -> Tensor:
        """tokens [B, n] in 0..K, labels [B] in 0..C, conditions [B, k] -> logits at `positions` (all, when None):
        [B, m, K].

        An entry n of `positions` stands for none; its logits mean nothing.
        """
        prior = self.prior
        x, qkv = self.first_layer(tokens, labels, conditions)
        if positions is None:
            return prior.predict(prior.transformer.run(x, qkv)[:, 1:])
        # The class token comes first.
        shifted = positions.clamp(max=prior.num_tokens - 1) + 1
        return prior.predict(prior.transformer.run(x, qkv, shifted))

    def first_layer(
        self, tokens: Tensor, labels: Tensor, conditions: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """What the first block takes, x [B, 1 + n, dim], and its queries, keys and values, if they are in a table."""
        prior = self.prior
        if self.table is None:
            x = torch.cat([prior.embed_classes(labels, conditions)[:, None], prior.embed_tokens(tokens)], dim=1)
            return prior.transformer.embed(x), None
        n = prior.num_tokens
        position = torch.arange(n, device=self.device)
        if prior.condition_embedding is not None:
            rows = tokens * n + position  # [B, n]
            first = self.first_token(prior.embed_classes(labels, conditions)[:, None])  # [B, 1, dim]
            qkv = prior.transformer.blocks[0].qkv(first)
            parts = zip((first, qkv), self.table, strict=True)
            x, qkv = (torch.cat([own.to(table.dtype), F.embedding(rows, table)], dim=1) for own, table in parts)
            return x, qkv
        rows = torch.cat([(prior.num_codes + 1) * n + labels[:, None], tokens * n + position], dim=1)  # [B, 1 + n]
        return F.embedding(rows, self.table[0]), F.embedding(rows, self.table[1])

    def first_layer_table(self) -> tuple[Tensor, Tensor] | None:
        """x and qkv of token k at position i in row k n + i, then of each class; None where that takes too much memory.

        x [(K + 1) n + C + 1, dim], qkv [(K + 1) n + C + 1, 3 H d], both in the type of products, to which x is added.
        """
        prior, transformer = self.prior, self.prior.transformer
        n, K = prior.num_tokens, prior.num_codes
        width = transformer.position.shape[1] + transformer.blocks[0].attention[1].qkv.out_features
        if 4 * ((K + 1) * n + prior.num_classes + 1) * width > self.MAX_TABLE_BYTES:
            return None
        tokens = torch.arange(K + 1, device=self.device)[:, None].expand(-1, n)
        classes = prior.embed_classes(torch.arange(prior.num_classes + 1, device=self.device))
        # Any class token will do: it is dropped again.
        embedded = transformer.embed(
            torch.cat([classes[:1, None].expand(K + 1, -1, -1), prior.embed_tokens(tokens)], 1)
        )
        x = torch.cat([embedded[:, 1:].flatten(0, 1), self.first_token(classes)])
        qkv = transformer.blocks[0].qkv(x)
        return x.to(qkv.dtype), qkv

    def first_token(self, classes: Tensor) -> Tensor:
        """Embedded classes and conditions [..., D] -> what the first block takes of them [..., dim]."""
        transformer = self.prior.transformer
        return transformer.project_in(classes) + transformer.position[0] * transformer.position_scale


def rounded(prior: Prior) -> Prior:
    """A prior with the transformer's weights in bfloat16: rounded once, where autocast does it for every product."""
    shared = [prior.condition_embedding] if prior.condition_embedding is not None else []
    prior = copy.deepcopy(prior, {id(part): part for part in shared})
    for layer in prior.transformer.modules():
        if isinstance(layer, nn.Linear):
            layer.weight = nn.Parameter(layer.weight.bfloat16(), requires_grad=False)
    return prior


class ChunkDecoder:
    """Tokens and series of one chunk of rows; on a GPU all steps and the decoder are one CUDA graph."""

    def __init__(self, vqvae: VQVAE, sampler: Sampler, *, graph: bool, decode: bool = True) -> None:
        """
        Args:
            graph: worth capturing, because several chunks of one size follow; without a GPU it has no effect.
            decode: False leaves the series out.
        """
        self.vqvae = vqvae
        self.sampler = sampler
        self.with_series = decode
        self.wants_graph = graph and sampler.device.type == "cuda"
        self.graph: CudaGraph | None = None
        self.compiled = False

    @torch.no_grad()
    def __call__(
        self,
        labels: Tensor,
        sample: Tensor,
        seed: int,
        known: Tensor | None = None,
        conditions: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """labels, sample int64 [B], known int64 [B, n] and conditions float64 [B, k], or None -> tokens int64 [B, n], x
        [B, C, L] normalised.

        The next call may overwrite both. All calls give the same of known and conditions.
        """
        # Filled on the device: a copy from the host would wait for the chunk before.
        inputs = [labels, sample, torch.full((), seed, dtype=torch.int64, device=self.sampler.device)]
        given = {"known": known, "conditions": conditions}
        given = {name: value for name, value in given.items() if value is not None}
        inputs += given.values()

        def decode(labels: Tensor, sample: Tensor, seed: Tensor, *more: Tensor) -> tuple[Tensor, Tensor | None]:
            return self.decode(labels, sample, seed, **dict(zip(given, more, strict=True)))

        with computing(self.sampler.precision, self.sampler.device):
            if not self.compiled:
                compile_ahead(lambda: decode(*inputs), self.sampler.device)
                self.compiled = True
            if self.wants_graph and self.graph is None:
                self.capture(decode, inputs)
            return decode(*inputs) if self.graph is None else self.graph(*inputs)

    def capture(self, decode: Callable[..., Any], inputs: list[Tensor]) -> None:
        try:
            self.graph = CudaGraph(decode, *inputs, warm_ups=1)
        except RuntimeError as error:
            self.wants_graph = False
            warnings.warn(
                f"sampling without a CUDA graph, since it could not be captured: {error}", RuntimeWarning, stacklevel=3
            )

    def decode(
        self,
        labels: Tensor,
        sample: Tensor,
        seed: Tensor,
        known: Tensor | None = None,
        conditions: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        with autocast(self.sampler.precision, self.sampler.device):
            tokens = self.sampler.decode(labels, sample, seed, known, conditions)
            return tokens, self.vqvae.detokenize(tokens, self.sampler.config.refinements) if self.with_series else None
