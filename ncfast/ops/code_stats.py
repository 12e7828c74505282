"""Per code: how many vectors chose it, and their sum. What an EMA codebook needs, without a one-hot matrix."""

import torch
from torch import Tensor

from ncfast.ops import dispatch


def code_stats_reference(z: Tensor, indices: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """z [M, D], indices [M] -> counts [K], sums [K, D]."""
    z = z if z.dtype == torch.float64 else z.float()
    counts = torch.zeros(num_codes, dtype=z.dtype, device=z.device)
    counts = counts.index_add(0, indices, torch.ones_like(indices, dtype=z.dtype))
    sums = torch.zeros(num_codes, z.shape[1], dtype=z.dtype, device=z.device).index_add(0, indices, z)
    return counts, sums


def code_stats(z: Tensor, indices: Tensor, num_codes: int, *, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """Counts and sums of the vectors of each code.

    Args:
        z: vectors [M, D], any float dtype.
        indices: the code of each vector, int64 [M], in 0..num_codes-1.
        num_codes: K.
        impl: "auto" or "reference".

    Returns:
        counts [K] and sums [K, D], float32 (float64 for float64 input). Not differentiable.

    Raises:
        ValueError: shapes that do not fit.
    """
    dispatch.choose("code_stats", impl, why_not(z.device))
    if z.dim() != 2 or indices.shape != z.shape[:1]:
        raise ValueError(f"code_stats: z is [M, D] and indices [M]; got {list(z.shape)} and {list(indices.shape)}")
    return code_stats_reference(z.detach(), indices, num_codes)


def why_not(device: torch.device) -> dict[str, str | None]:
    """Each implementation, fastest first, with None or the reason why it cannot run there."""
    return {"reference": None}
