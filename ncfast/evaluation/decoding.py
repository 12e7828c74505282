"""What stands where after each step of iterative decoding: the sampler, watched."""

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ncfast.engine.precision import autocast, computing
from ncfast.ncvqvae import NCVQVAE
from ncfast.sampling.class_plan import LabelPlan
from ncfast.sampling.condition_plan import ConditionPlan
from ncfast.sampling.maskgit import Sampler, SamplerOptimizations


class Trace(NamedTuple):
    """One series as it is decoded, S states: all masked first, finished last."""

    tokens: Tensor  # int64 [S, T]; K where a token is masked
    series: (
        Tensor  # float32 [S, C, L], normalised: masked tokens are decoded as the mean of all codes; the last refined
    )


class WatchedSampler(Sampler):
    """Keeps the tokens that each step starts from."""

    def __init__(self, *arguments, **options) -> None:
        # The first step's logits would come from a table, unseen.
        super().__init__(
            *arguments, savers=dataclasses.replace(SamplerOptimizations(), first_step_by_class=False), **options
        )
        self.seen: list[Tensor] = []

    def logits(self, tokens: Tensor, *more: Tensor | None) -> Tensor:
        self.seen.append(tokens)
        return super().logits(tokens, *more)


@torch.no_grad()
def trace_decoding(model: NCVQVAE, labels: str = "none", seed: int = 0) -> Trace:
    """Series 0 of `model.sample(labels=labels, seed=seed)`, step by step. Steps that change nothing are left out."""
    sampler = WatchedSampler(model.prior, model.config, precision=model.precision)
    # In a whole chunk, as `sample` draws it: a product may round differently for another number of rows.
    sample = torch.arange(model.chunk_size, device=model.device)
    classes = LabelPlan(labels, model.class_names, model.data.class_counts)(sample, seed)
    embedding = model.prior.condition_embedding
    conditions = None
    if embedding is not None:
        plan = ConditionPlan(embedding, None, len(model.class_names), num_levels=len(model.data.levels))
        conditions = plan(sample, classes, seed)
    vqvae = model.vqvae
    with computing(model.precision, model.device), autocast(model.precision, model.device):
        finished = sampler.decode(classes, sample, seed, conditions=conditions)
        tokens = torch.stack([state[0] for state in [*sampler.seen, finished]])
        # In the place of a masked token its level's mean code.
        K = model.prior.num_codes
        codes = torch.cat([vqvae.codebook, *[vq.codebook.mean(0, keepdim=True) for vq in vqvae.levels]])
        level = torch.arange(tokens.shape[1], device=tokens.device) * len(vqvae.levels) // tokens.shape[1]
        codes = F.embedding(torch.where(tokens == K, K + level, tokens), codes)
        series = vqvae.stft.inverse(vqvae.decode(codes.unflatten(1, (len(vqvae.levels), -1)).sum(1)))
        series[-1:] = vqvae.detokenize(tokens[-1:], model.config.refinements)
    return Trace(tokens.cpu(), series.cpu())
