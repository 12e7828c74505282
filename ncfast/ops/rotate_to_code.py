"""From vectors to their codes, with a gradient: the rotation trick or straight through, and the commitment loss."""

import torch
from torch import Tensor

from ncfast.ops import dispatch
from ncfast.ops.code_stats import code_stats
from ncfast.ops.gradients import of_kernel

LEAST_NORM = 1e-6  # norms are kept above it where they divide; rows shorter than it are not rotated


def rotate_to_code_reference(
    z: Tensor, codebook: Tensor, indices: Tensor, rotate: bool = True
) -> tuple[Tensor, Tensor]:
    """The definition in plain PyTorch, differentiated by autograd. z [H, M, D], codebook [H, K, D], indices [H, M]."""
    H, K, _ = codebook.shape
    heads = torch.arange(H, device=z.device)[:, None]
    q = codebook[heads, torch.where((indices >= 0) & (indices < K), indices, 0)].to(z.dtype)  # [H, M, D]
    return at_codes(z, q, indices, K, rotate)


def at_codes(z: Tensor, q: Tensor, indices: Tensor, num_codes: int, rotate: bool) -> tuple[Tensor, Tensor]:
    """The same with the code of each vector in q [H, M, D]."""
    used, D = (indices >= 0) & (indices < num_codes), z.shape[-1]
    # Rows without a code are zeros from here on, whatever they held.
    x, code = (torch.where(used[..., None], rows, 0) for rows in (z, q))
    if z.dtype != torch.float64:
        x, code = x.float(), code.float()
    loss = (x - code).square().sum() / (used.sum() * D).clamp(min=1)
    code = code.detach()
    path = rotated(x, code) if rotate else x
    # Its value is the code, exactly; its gradient that of the path.
    return (code + (path - path.detach())).to(z.dtype), loss


def rotated(z: Tensor, q: Tensor) -> Tensor:
    """λ R z = q, with the rotation R from z/|z| to q/|q| and λ = |q|/|z| taken as constants (arXiv 2410.06424, 4.2)."""
    constant = z.detach()
    norm_z, norm_q = constant.norm(dim=-1, keepdim=True), q.norm(dim=-1, keepdim=True)
    u, v = constant / norm_z.clamp(min=LEAST_NORM), q / norm_q.clamp(min=LEAST_NORM)
    w = (u + v) / (u + v).norm(dim=-1, keepdim=True).clamp(min=LEAST_NORM)
    turned = z - 2 * (z * w).sum(-1, keepdim=True) * w + 2 * (z * u).sum(-1, keepdim=True) * v
    return torch.where(norm_z >= LEAST_NORM, turned * (norm_q / norm_z.clamp(min=LEAST_NORM)), z)


def rotate_to_code(
    z: Tensor, codebook: Tensor, indices: Tensor, *, rotate: bool = True, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The code of each vector, with a gradient to the vector, and the commitment loss: one pass each way.

    The value is `codebook[indices]`, exactly. The gradient of z is that of the rotation trick (Fifty et al.,
    arXiv 2410.06424, section 4.2), or straight through: with u = z/|z|, v = code/|code|, s = u + v,

        grad_z = |code|/|z| (g - 2 (g·s) s/|s|² + 2 (g·v) u)      or      grad_z = g,

    plus that of the loss. A vector shorter than 1e-6 has no direction to rotate, and its gradient goes straight
    through. A vector whose index is not in 0..K-1, such as the -1 of a masked one, gives zeros, gets no gradient and
    does not count in the loss.

    Args:
        z: vectors, float32, float64, float16 or bfloat16 [M, D], or [H, M, D].
        codebook: codes [K, D], or [H, K, D]. When it requires a gradient it gets that of the loss (van den Oord et
            al., arXiv 1711.00937, eq. 3), not that of the output.
        indices: int64 [M], or [H, M].
        rotate: the rotation trick, or straight through.
        impl: "auto" (the fastest that can run the call), "reference", "cpp" or "triton".

    Returns:
        codes, shaped and typed as z, and the mean of (z - code)² over all used elements, a scalar in float32 (float64
        for float64 input). Differentiable, twice too: a second derivative is the reference's.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; an unknown impl.
        RuntimeError: an `impl` asked for by name that cannot run here, with the reason.
    """
    check(z, codebook, indices)
    name = dispatch.choose("rotate_to_code", impl, why_not(z.device, z.dtype))
    batched = z.dim() == 3
    if not batched:
        z, codebook, indices = z[None], codebook[None], indices[None]
    if name == "reference":
        q, loss = rotate_to_code_reference(z, codebook, indices, rotate)
    else:
        codebook = codebook.double() if z.dtype == torch.float64 else codebook.float()
        q, loss = RotateToCode.apply(z.contiguous(), codebook.contiguous(), indices.contiguous(), rotate, name)
    return q if batched else q[0], loss


def check(z: Tensor, codebook: Tensor, indices: Tensor) -> None:
    if z.dim() not in (2, 3) or indices.shape != z.shape[:-1]:
        raise ValueError(
            f"rotate_to_code: z is [M, D] with indices [M], or [H, M, D] with [H, M]; got {list(z.shape)} and "
            f"{list(indices.shape)}"
        )
    if codebook.dim() != z.dim() or codebook.shape[-1] != z.shape[-1] or codebook.shape[:-2] != z.shape[:-2]:
        raise ValueError(
            f"rotate_to_code: codebook is [K, D] for z [M, D], [H, K, D] for z [H, M, D]; got {list(codebook.shape)} "
            f"with z {list(z.shape)}"
        )
    if codebook.shape[-2] == 0:
        raise ValueError("rotate_to_code: the codebook holds no code")
    for name, tensor in (("z", z), ("codebook", codebook)):
        if tensor.dtype not in dispatch.DTYPE_CODES:
            raise ValueError(f"rotate_to_code: {name} is float32, float64, float16 or bfloat16; got {tensor.dtype}")
    if indices.dtype != torch.int64:
        raise ValueError(f"rotate_to_code: indices are int64; got {indices.dtype}")
    if not z.device == codebook.device == indices.device:
        raise ValueError(
            f"rotate_to_code: z is on {z.device}, the codebook on {codebook.device} and indices on {indices.device}; "
            "move them to one device"
        )


def rotate_to_code_again(ctx) -> tuple[tuple, tuple]:
    z, q, indices, _ = ctx.saved_tensors
    q = q.detach()  # an output: its graph is this one
    codebook = ctx.codebook
    if codebook is not None:
        # Its rows have a gradient, and the values that they had: it may have been overwritten.
        heads = torch.arange(len(codebook), device=z.device)[:, None]
        rows = codebook[heads, indices.clamp(0, ctx.num_codes - 1)].to(q.dtype)
        q = q + (rows - rows.detach())
    return (z, codebook), at_codes(z, q, indices, ctx.num_codes, ctx.rotate)


class RotateToCode(torch.autograd.Function):
    """The gradient of an operator `name`: z [H, M, D], codebook [H, K, D] float32 or as z, indices [H, M]."""

    @staticmethod
    def forward(ctx, z: Tensor, codebook: Tensor, indices: Tensor, rotate: bool, name: str) -> tuple[Tensor, Tensor]:
        q, loss, inverse_count = OPERATORS[name](z.detach(), codebook.detach(), indices)
        # q stands in for the codebook, which may be overwritten before the backward pass.
        ctx.save_for_backward(z, q, indices, inverse_count)
        ctx.rotate, ctx.name, ctx.num_codes = rotate, name, codebook.shape[1]
        ctx.codebook = codebook if ctx.needs_input_grad[1] else None
        return q, loss

    @staticmethod
    @of_kernel("rotate_to_code", rotate_to_code_again)
    def backward(ctx, grad_q: Tensor, grad_loss: Tensor):
        z, q, indices, inverse_count = ctx.saved_tensors
        grad_z = grad_codebook = None
        if ctx.needs_input_grad[0]:
            grad_z = BACKWARD_OPERATORS[ctx.name](
                grad_q.contiguous(), grad_loss, z, q, indices, inverse_count, ctx.num_codes, ctx.rotate
            )
        if ctx.needs_input_grad[1]:
            error = q - z if z.dtype == torch.float64 else q.float() - z.float()
            grad_codebook = 2 * grad_loss * inverse_count * code_stats(error, indices, ctx.num_codes)[1]
        return grad_z, grad_codebook, None, None, None


def why_not(device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, str | None]:
    """Each implementation, fastest first, with None or the reason why it cannot run on these."""
    double = "float64 input: Triton has no path for it" if dtype == torch.float64 else None
    return dispatch.table(device, cpp=None, triton=double)


def empty_results(z: Tensor, codebook: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    return torch.empty_like(z), *(torch.empty((), dtype=dtype, device=z.device) for _ in range(2))


def empty_gradient(grad_q: Tensor, grad_loss: Tensor, z: Tensor, *others) -> Tensor:
    return torch.empty_like(z)


def run_cpp(z: Tensor, codebook: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    (H, M, D), K, results = z.shape, codebook.shape[1], empty_results(z, codebook, indices)
    threads = torch.get_num_threads()
    dispatch.native("_C", "rotate_to_code", z, z.dtype, codebook, indices, H, M, K, D, threads, *results)
    return results


def run_cpp_backward(grad_q, grad_loss, z, q, indices, inverse_count, num_codes: int, rotate: bool) -> Tensor:
    grad_z = torch.empty_like(z)
    sizes, threads = (indices.numel(), num_codes, z.shape[-1]), torch.get_num_threads()
    inputs = (grad_q, grad_loss, z, q, indices, inverse_count, z.dtype)
    dispatch.native("_C", "rotate_to_code_backward", *inputs, *sizes, rotate, threads, grad_z)
    return grad_z


# All contiguous; the codebook float32 (float64 exactly when z is) -> codes as z, loss, 1 / elements in the mean.
OPERATORS = dispatch.operator(
    "rotate_to_code(Tensor z, Tensor codebook, Tensor indices) -> (Tensor, Tensor, Tensor)",
    empty_results,
    cpp=run_cpp,
    triton=dispatch.triton("rotate_to_code.rotate_to_code_triton"),
)
BACKWARD_OPERATORS = dispatch.operator(
    "rotate_to_code_backward(Tensor grad_q, Tensor grad_loss, Tensor z, Tensor q, Tensor indices, "
    "Tensor inverse_count, SymInt num_codes, bool rotate) -> Tensor",
    empty_gradient,
    cpp=run_cpp_backward,
    triton=dispatch.triton("rotate_to_code.rotate_to_code_backward_triton"),
)
