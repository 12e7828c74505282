"""Which codes VectorQuantize chooses: the nearest, the k nearest, or drawn ones."""

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ncfast.nn.codebook import Codebook, Snapshot, unit
from ncfast.ops import dispatch


class Chosen(NamedTuple):
    """The codes chosen for vectors [H, M, D]."""

    indices: Tensor  # int64 [H, M], or [H, M, k]
    masked: Tensor  # the same, -1 where masked
    codes: Tensor  # [H, K, D], or [H, M, K, D] where each vector has its own
    similarities: Tensor | None  # [H, M, K]
    soft: Tensor | None  # [H, M, K]: gumbel-softmax's probabilities, for their gradient
    sequence_length: int
    dtype: torch.dtype

    def take(self) -> Tensor:
        """The chosen codes [H, M, (k,) D] in the vectors' type, differentiable in the codes."""
        H, D = self.codes.shape[0], self.codes.shape[-1]
        if self.codes.dim() == 4:
            q = self.codes.gather(2, self.indices.reshape(*self.indices.shape[:2], -1, 1).expand(-1, -1, -1, D))
            q = q.reshape(*self.indices.shape, D)
        else:
            first = torch.arange(H, device=self.indices.device) * self.codes.shape[1]
            flat = self.indices + first.reshape(H, *[1] * (self.indices.dim() - 1))
            q = F.embedding(flat, self.codes.flatten(0, 1))
        if self.soft is not None:
            path = self.soft @ self.codes.detach().to(self.soft.dtype)
            q = q + (path - path.detach())
        return q.to(self.dtype)


class Selection:
    """How codes are chosen in one forward; called again after an in-place step of the codes."""

    MAX_SIMILARITIES = 2**22  # made at once where they need not be kept

    def __init__(
        self,
        codebook: Codebook,
        z: Tensor,
        rows: Tensor | None,
        sequence_length: int,
        temperature: float | None,
        topk: int | None,
        transform: Callable[[Tensor], Tensor] | None,
        soft: float | None,
        keep: bool,
    ) -> None:
        """temperature: of the draw; None: the nearest. soft: that of a softmax that gives the output its gradient;
        None: none. keep: whether all similarities are needed, with their gradient."""
        self.codebook, self.z, self.rows, self.sequence_length = codebook, z, rows, sequence_length
        self.temperature, self.topk, self.transform, self.soft = temperature, topk, transform, soft
        self.keep = keep or soft is not None or transform is not None

    def __call__(self) -> Chosen:
        codes, similarities = self.codebook.codes(), None
        if self.keep:
            # Their gradient needs the codes as they are now: a moving average overwrites them.
            codes = Snapshot.apply(codes)
            if self.transform is None:
                similarities = self.codebook.similarities(self.z, codes)
            else:
                codes = self.transform(codes).flatten(1, 2)  # [H, M, K, D]
                codes, similarities = self.similarities_to_own(codes)
        # Indices have no gradient anyhow, and a program with such a region cannot be saved.
        with contextlib.nullcontext() if dispatch.exporting() else torch.no_grad():
            if self.temperature is None and self.topk is None and self.transform is None:
                indices = self.codebook.nearest(self.z, codes)
            elif similarities is not None:
                indices = self.best(similarities)
            else:
                indices = self.best_in_blocks(codes)
        masked = indices
        if self.rows is not None:
            rows = self.rows if self.topk is None else self.rows[..., None]
            masked = indices.masked_fill(~rows, -1)
        soft = None if self.soft is None else (similarities / self.soft).softmax(-1)
        return Chosen(indices, masked, codes, similarities, soft, self.sequence_length, self.z.dtype)

    def similarities_to_own(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """codes of each vector [H, M, K, D] -> codes as they are compared, similarities [H, M, K]."""
        z = self.z.float()[:, :, None]
        if self.codebook.use_cosine_sim:
            codes = unit(codes)
            return codes, (z * codes).sum(-1)
        return codes, -F.pairwise_distance(z, codes)

    def best(self, similarities: Tensor) -> Tensor:
        """[..., K] -> [...] or [..., k]: the highest, or drawn by Gumbel noise."""
        if self.temperature is not None:
            noise = torch.empty_like(similarities).uniform_()
            noise = -(-noise.clamp(min=1e-20).log()).clamp(min=1e-20).log()
            similarities = similarities / self.temperature + noise
        return similarities.argmax(-1) if self.topk is None else similarities.topk(self.topk, dim=-1).indices

    def best_in_blocks(self, codes: Tensor) -> Tensor:
        """As `best`, with similarities of some rows at a time: the noise is that of all of them drawn at once."""
        step = max(1, self.MAX_SIMILARITIES // codes.shape[1])
        return torch.stack(
            [
                torch.cat([self.best(self.codebook.similarities(block[None], own[None])[0]) for block in z.split(step)])
                for z, own in zip(self.z, codes, strict=True)
            ]
        )
