"""Nearest code: `torch.cdist(z, codebook).argmin(-1)`, exact, without the [M, K] distances."""

import math

import torch
from torch import Tensor

from ncfast.ops import dispatch

# Up to so many codes Triton's one launch, which keeps them in registers, is faster than the CUDA kernel, each block of
# which packs all codes first.
FEW_CODES = 64


def nearest_code_reference(z: Tensor, codebook: Tensor) -> Tensor:
    """The definition, in plain PyTorch and float64: argmax of z·e - |e|²/2, lowest index on exact ties.

    z [H, M, D], codebook [H, K, D] -> int64 [H, M].
    """
    usable = codebook.isfinite().all(-1)  # [H, K]
    e = torch.where(usable[..., None], codebook, 0).double()
    bias = torch.where(usable, -0.5 * e.square().sum(-1), -torch.inf)  # [H, K]
    rounding = (z.shape[-1] + 2) * 2.0**-53
    nearest = []
    # Rows in blocks, so that the scores never outgrow 128 MiB.
    for block in z.split(max(1, 2**24 // max(1, codebook.shape[-2])), dim=1):
        # A finite row's score is never NaN; the row of zeros that stands in for another never wins by accident.
        rows = block.nan_to_num(0.0, 0.0, 0.0).double()
        scores = torch.baddbmm(bias[:, None, :], rows, e.transpose(1, 2))  # [H, rows, K]
        best, index = scores.max(-1)
        # A matrix product may round equal codes differently; the first within that rounding is the tie's lowest index.
        norm = (-2 * bias.gather(1, index)).sqrt()
        lowest = best - rounding * norm * (2 * rows.norm(dim=-1) + norm)
        tied = scores >= lowest[..., None]
        nearest.append(torch.where(block.isfinite().all(-1), tied.to(torch.uint8).argmax(-1), 0))
    return torch.cat(nearest, dim=1)


def nearest_code(z: Tensor, codebook: Tensor, *, precision: str = "exact", impl: str = "auto") -> Tensor:
    """Index of the nearest code of every vector, by Euclidean distance.

    Equals `torch.cdist(z.double(), codebook.double()).argmin(-1)`: the smallest float64 distance of the inputs as
    given; an exact tie goes to the lowest index. A vector with a NaN or an infinity gets index 0; a code with one is
    never chosen while another can be. Memory is O(M·D + K·D): the distances are never stored.

    Args:
        z: vectors, float32, float64, float16 or bfloat16 [..., D]; or [H, ..., D] when the codebook is [H, K, D].
        codebook: codes, any of those dtypes, [K, D], or [H, K, D] for one codebook a head.
        precision: "exact", or "fast", which allows an implementation to skip the exact re-scoring of near ties. In CUDA
            "fast" takes the best of scores whose products are those of fp16 numbers.
        impl: "auto" (the fastest that can run the call), "reference", "cpp", "cuda" or "triton".

    Returns:
        int64 [...] (with a leading H for batched codebooks). Not differentiable.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; an unknown precision or impl.
        RuntimeError: an `impl` asked for by name that cannot run here, with the reason.
    """
    check(z, codebook, precision)
    batched = codebook.dim() == 3
    shape = z.shape[:-1]
    # No -1 in the shape: it has no value when H or D is 0.
    H, M = (shape[0], math.prod(shape[1:])) if batched else (1, math.prod(shape))
    z = z.detach().reshape(H, M, z.shape[-1])  # [H, M, D]
    codebook = codebook.detach() if batched else codebook.detach()[None]  # [H, K, D]
    name = dispatch.choose(
        "nearest_code", impl, why_not(z.device, z.dtype, codebook.dtype, num_codes=codebook.shape[1])
    )
    if name == "reference":
        return nearest_code_reference(z, codebook).reshape(shape)
    double = torch.float64 in (z.dtype, codebook.dtype)
    z = z.double() if double else z
    codebook = codebook.double() if double else codebook.float()
    options = {"exact": precision == "exact"} if name == "cuda" else {}
    return OPERATORS[name](z.contiguous(), codebook.contiguous(), **options).reshape(shape)


def check(z: Tensor, codebook: Tensor, precision: str) -> None:
    if precision not in ("exact", "fast"):
        raise ValueError(f"nearest_code: precision is 'exact' or 'fast'; got {precision!r}")
    if codebook.dim() not in (2, 3):
        raise ValueError(f"nearest_code: codebook is [K, D] or [H, K, D]; got {list(codebook.shape)}")
    if z.dim() < codebook.dim() - 1 or z.shape[-1] != codebook.shape[-1]:
        raise ValueError(
            f"nearest_code: z ends in the code dimension D = {codebook.shape[-1]}; got z {list(z.shape)} "
            f"with codebook {list(codebook.shape)}"
        )
    if codebook.dim() == 3 and z.shape[0] != codebook.shape[0]:
        raise ValueError(
            f"nearest_code: with {codebook.shape[0]} codebooks z is [{codebook.shape[0]}, ..., D]; got {list(z.shape)}"
        )
    if codebook.shape[-2] == 0:
        raise ValueError("nearest_code: the codebook holds no code")
    for name, tensor in (("z", z), ("codebook", codebook)):
        if tensor.dtype not in dispatch.DTYPE_CODES:
            raise ValueError(f"nearest_code: {name} is float32, float64, float16 or bfloat16; got {tensor.dtype}")
    if z.device != codebook.device:
        raise ValueError(f"nearest_code: z is on {z.device} and the codebook on {codebook.device}; move one")


def why_not(device: torch.device, *dtypes: torch.dtype, num_codes: int | None = None) -> dict[str, str | None]:
    """Each implementation, fastest first, with None or the reason why it cannot run on these."""
    double = "float64 input: Triton has no exact path for it" if torch.float64 in dtypes else None
    table = dispatch.table(device, cuda=None, cpp=None, triton=double)
    few = device.type == "cuda" and num_codes is not None and num_codes <= FEW_CODES
    return {"triton": table["triton"], **table} if few else table


def empty_indices(z: Tensor, codebook: Tensor, exact: bool = True) -> Tensor:
    return torch.empty(z.shape[:-1], dtype=torch.int64, device=z.device)


def run_cpp(z: Tensor, codebook: Tensor) -> Tensor:
    (H, M, D), K, threads = z.shape, codebook.shape[1], torch.get_num_threads()
    indices = torch.empty(H, M, dtype=torch.int64)
    dispatch.native("_C", "nearest_code", z, z.dtype, codebook, H, M, K, D, threads, indices)
    return indices


def run_cuda(z: Tensor, codebook: Tensor, exact: bool = True) -> Tensor:
    (H, M, D), K, indices = z.shape, codebook.shape[1], empty_indices(z, codebook)
    module, _ = dispatch.load_module("_C_cuda")
    workspace = torch.empty(module.nearest_code_workspace_bytes(H, M, K, D), dtype=torch.uint8, device=z.device)
    with torch.cuda.device(z.device):
        stream = torch.cuda.current_stream(z.device).cuda_stream
        dispatch.native("_C_cuda", "nearest_code", z, z.dtype, codebook, H, M, K, D, exact, stream, workspace, indices)
    return indices


# z [H, M, D] contiguous; codebook [H, K, D] contiguous, float32 (float64 exactly when z is) -> int64 [H, M]
SCHEMA = "nearest_code(Tensor z, Tensor codebook{}) -> Tensor"
OPERATORS = {
    **dispatch.operator(
        SCHEMA.format(""), empty_indices, cpp=run_cpp, triton=dispatch.triton("nearest_code.nearest_code_triton")
    ),
    **dispatch.operator(SCHEMA.format(", bool exact=True"), empty_indices, cuda=run_cuda),
}
