"""Per code: how many vectors chose it, and their sum. What an EMA codebook needs, without a one-hot matrix."""

import torch
from torch import Tensor

from ncfast.ops import dispatch


def code_stats_reference(z: Tensor, indices: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """z [H, M, D], indices [H, M] -> counts [H, K], sums [H, K, D], in plain PyTorch.

    Deterministic on the CPU; on a GPU index_add_ adds in any order.
    """
    H, _, D = z.shape
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    used = (indices >= 0) & (indices < num_codes)
    # Rows that count nowhere go to a bin of their own behind the last code.
    bins = torch.where(used, indices, num_codes) + torch.arange(H, device=z.device)[:, None] * (num_codes + 1)
    bins = bins.flatten()
    counts = bins.new_zeros(H * (num_codes + 1)).index_add(0, bins, torch.ones_like(bins))
    # One accumulator takes all rows of a code: in float64, as there may be very many.
    sums = z.new_zeros(H * (num_codes + 1), D, dtype=torch.float64).index_add(0, bins, z.flatten(0, 1).double())
    counts, sums = counts.reshape(H, num_codes + 1).to(dtype), sums.reshape(H, num_codes + 1, D).to(dtype)
    return counts[:, :-1].contiguous(), sums[:, :-1].contiguous()


def code_stats(z: Tensor, indices: Tensor, num_codes: int, *, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """Counts and sums of the vectors of each code.

    In C++ and Triton the vectors of a code are summed in a fixed order: the result is the same bit for bit on every
    call, whatever the number of threads.

    Args:
        z: vectors, float32, float64, float16 or bfloat16 [M, D]; or [H, M, D], H sets of vectors, each with its own
            codes.
        indices: the code of each vector, int64 [M] or [H, M], in 0..num_codes-1. A vector with any other index, such
            as the -1 of a masked one, counts nowhere.
        num_codes: K.
        impl: "auto" (the fastest that can run the call), "reference", "cpp" or "triton".

    Returns:
        counts [K] and sums [K, D], or [H, K] and [H, K, D]; float32 (float64 for float64 input). Not differentiable.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; an unknown impl.
        RuntimeError: an `impl` asked for by name that cannot run here, with the reason.
    """
    check(z, indices, num_codes)
    z, indices = z.detach(), indices.detach()
    name = dispatch.choose("code_stats", impl, why_not(z.device, z.dtype))
    batched = z.dim() == 3
    if not batched:
        z, indices = z[None], indices[None]
    if name == "reference":
        counts, sums = code_stats_reference(z, indices, num_codes)
    else:
        counts, sums = OPERATORS[name](z.contiguous(), indices.contiguous(), num_codes)
    return (counts, sums) if batched else (counts[0], sums[0])


def check(z: Tensor, indices: Tensor, num_codes: int) -> None:
    if z.dim() not in (2, 3) or indices.shape != z.shape[:-1]:
        raise ValueError(
            f"code_stats: z is [M, D] with indices [M], or [H, M, D] with [H, M]; got {list(z.shape)} and "
            f"{list(indices.shape)}"
        )
    if z.dtype not in dispatch.DTYPE_CODES:
        raise ValueError(f"code_stats: z is float32, float64, float16 or bfloat16; got {z.dtype}")
    if indices.dtype != torch.int64:
        raise ValueError(f"code_stats: indices are int64; got {indices.dtype}")
    if z.device != indices.device:
        raise ValueError(f"code_stats: z is on {z.device} and indices on {indices.device}; move one")
    if num_codes < 1:
        raise ValueError(f"code_stats: num_codes is 1 or more; got {num_codes}")


def why_not(device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, str | None]:
    """Each implementation, fastest first, with None or the reason why it cannot run on these."""
    double = "float64 input: Triton has no path for it" if dtype == torch.float64 else None
    return dispatch.table(device, cpp=None, triton=double)


def empty_results(z: Tensor, indices: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    H, _, D = z.shape
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    return (
        torch.empty(H, num_codes, dtype=dtype, device=z.device),
        torch.empty(H, num_codes, D, dtype=dtype, device=z.device),
    )


def run_cpp(z: Tensor, indices: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    (H, M, D), results = z.shape, empty_results(z, indices, num_codes)
    threads = torch.get_num_threads()
    dispatch.native("_C", "code_stats", z, z.dtype, indices, H, M, num_codes, D, threads, *results)
    return results


# z [H, M, D] contiguous, indices [H, M] contiguous -> counts [H, K], sums [H, K, D]
OPERATORS = dispatch.operator(
    "code_stats(Tensor z, Tensor indices, SymInt num_codes) -> (Tensor, Tensor)",
    empty_results,
    cpp=run_cpp,
    triton=dispatch.triton("code_stats.code_stats_triton"),
)
