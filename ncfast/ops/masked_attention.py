"""Bidirectional attention of short sequences, from packed queries, keys and values."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ncfast.ops import dispatch
from ncfast.ops.gradients import of_kernel

MAX_LENGTH = 128  # of a sequence that the kernels take; beyond it PyTorch's own attention is as fast
CUDA_HEAD_DIM = 64  # that the kernels in CUDA take
# That the Triton kernels take: a head of theirs stays in registers and shared memory.
MAX_HEAD_DIM = {torch.float32: 64, torch.float16: 128, torch.bfloat16: 128}


def masked_attention_reference(
    qkv: Tensor,
    key_mask: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    q_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
    null_kv: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale q kᵀ) v by PyTorch's attention; arguments and result are those of masked_attention."""
    if qkv.numel() == 0:  # torch 2.11 divides by a size of zero
        learned = [0 * x.sum() for x in (q_scale, k_scale, null_kv) if x is not None]
        return qkv[:, :, 2] + sum(learned)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, H, S, d] each
    B, H, S, d = q.shape
    if lengths is not None:
        key_mask = torch.arange(S, device=qkv.device) < lengths[:, None]
    if null_kv is not None:
        null_k, null_v = null_kv.to(qkv.dtype)[:, None, :, None].expand(2, B, H, 1, d)
        k, v = torch.cat((null_k, k), 2), torch.cat((null_v, v), 2)
        if key_mask is not None:
            key_mask = F.pad(key_mask, (1, 0), value=True)
    if q_scale is not None:
        q, k = normalised(q, q_scale), normalised(k, k_scale)
    if key_mask is None:
        return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)
    any_key = key_mask.any(-1)[:, None, None, None]  # a softmax over nothing would be NaN
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=key_mask[:, None, None] | ~any_key, scale=scale)
    return torch.where(any_key, out, 0).transpose(1, 2)


def normalised(x: Tensor, scale: Tensor) -> Tensor:
    """x / |x| * scale over the last dimension, in float32 or better."""
    wide = x if x.dtype == torch.float64 else x.float()
    return (F.normalize(wide, dim=-1) * scale.to(wide.dtype)).to(x.dtype)


def masked_attention(
    qkv: Tensor,
    key_mask: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    q_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
    null_kv: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Attention of every position to every key of its sequence, without dropout: softmax(scale q kᵀ) v.

    The attention of MaskGIT's transformer (Chang et al., arXiv 2202.04200) and, with `q_scale`, `k_scale` and
    `null_kv`, that of TimeVQVAE's (Lee et al., arXiv 2303.04743; its code takes the block from x-transformers):
    queries and keys have length one, times a learned scale, and every sequence has one more, learned key.

    Args:
        qkv: packed queries, keys and values [B, S, 3, H, d]; any float dtype.
        key_mask: bool [B, S], False for keys that no position attends to; a sequence without any key gives zeros.
        lengths: int64 [B], instead of a mask: keys at positions from there on are left out.
        q_scale, k_scale: [d] each, shared by the heads: q becomes q / |q| * q_scale, and k likewise. Both or none.
        null_kv: a key and a value of each head [2, H, d] that every position attends to as well, whatever the mask; the
            key is normalised as the others are.
        scale: of the scores; d**-0.5 by default.
        impl: "auto" (the fastest that can run the call), "reference" (PyTorch's scaled_dot_product_attention), "cpp"
            (float32, S <= 128), "cuda" (S <= 128; float16 and bfloat16, d = 64, without q_scale, k_scale and null_kv)
            or "triton" (S <= 128; float16 and bfloat16, d <= 128; float32, d <= 64).

    Returns:
        [B, S, H, d] in the type of qkv. Differentiable in qkv, q_scale, k_scale and null_kv; a second derivative is
        refused, except of the reference.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; an unknown impl.
        RuntimeError: an `impl` asked for by name that cannot run here, with the reason.
    """
    check(qkv, key_mask, lengths, q_scale, k_scale, null_kv)
    S, d = qkv.shape[1], qkv.shape[-1]
    plain = q_scale is None and null_kv is None
    name = dispatch.choose("masked_attention", impl, why_not(qkv.device, qkv.dtype, S, d, plain=plain))
    if name == "reference":
        return masked_attention_reference(
            qkv, key_mask, lengths=lengths, q_scale=q_scale, k_scale=k_scale, null_kv=null_kv, scale=scale
        )
    scale = max(1, d) ** -0.5 if scale is None else float(scale)  # heads of no elements have no scores
    key_mask, lengths = (None if x is None else x.contiguous() for x in (key_mask, lengths))
    q_scale, k_scale, null_kv = (None if x is None else x.float().contiguous() for x in (q_scale, k_scale, null_kv))
    return MaskedAttention.apply(qkv.contiguous(), key_mask, lengths, q_scale, k_scale, null_kv, scale, name)


def check(
    qkv: Tensor,
    key_mask: Tensor | None,
    lengths: Tensor | None,
    q_scale: Tensor | None,
    k_scale: Tensor | None,
    null_kv: Tensor | None,
) -> None:
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ValueError(f"masked_attention: qkv is [B, S, 3, H, d]; got {list(qkv.shape)}")
    if not qkv.is_floating_point():
        raise ValueError(f"masked_attention: qkv is floating point; got {qkv.dtype}")
    B, S, _, H, d = qkv.shape
    if key_mask is not None and lengths is not None:
        raise ValueError("masked_attention: give key_mask or lengths, not both")
    if (q_scale is None) != (k_scale is None):
        given, missing = ("k_scale", "q_scale") if q_scale is None else ("q_scale", "k_scale")
        raise ValueError(f"masked_attention: q_scale and k_scale go together; got {given} without {missing}")
    for name, tensor, dtype, shape in (
        ("key_mask", key_mask, torch.bool, [B, S]),
        ("lengths", lengths, torch.int64, [B]),
        ("q_scale", q_scale, None, [d]),
        ("k_scale", k_scale, None, [d]),
        ("null_kv", null_kv, None, [2, H, d]),
    ):
        if tensor is None:
            continue
        fits = tensor.is_floating_point() if dtype is None else tensor.dtype == dtype
        if not fits or list(tensor.shape) != shape:
            wanted = "floating point" if dtype is None else str(dtype).removeprefix("torch.")
            raise ValueError(f"masked_attention: {name} is {wanted} {shape}; got {tensor.dtype} {list(tensor.shape)}")
        if tensor.device != qkv.device:
            raise ValueError(f"masked_attention: qkv is on {qkv.device} and {name} on {tensor.device}; move one")


class MaskedAttention(torch.autograd.Function):
    """The gradient of an operator `name`, everything as its schema says."""

    @staticmethod
    def forward(ctx, qkv, key_mask, lengths, q_scale, k_scale, null_kv, scale: float, name: str) -> Tensor:
        ctx.save_for_backward(qkv, key_mask, lengths, q_scale, k_scale, null_kv)
        ctx.scale, ctx.name = scale, name
        q_scale, k_scale, null_kv = (None if x is None else x.detach() for x in (q_scale, k_scale, null_kv))
        return OPERATORS[name](qkv.detach(), key_mask, lengths, q_scale, k_scale, null_kv, scale)

    @staticmethod
    @of_kernel("masked_attention")
    def backward(ctx, grad_out: Tensor):
        _, _, _, q_scale, _, null_kv = inputs = ctx.saved_tensors
        grads = BACKWARD_OPERATORS[ctx.name](grad_out.contiguous(), *inputs, ctx.scale)
        grad_qkv, grad_q_scale, grad_k_scale, grad_null_kv = grads
        if q_scale is None:
            grad_q_scale = grad_k_scale = None
        if null_kv is None:
            grad_null_kv = None
        return grad_qkv, None, None, grad_q_scale, grad_k_scale, grad_null_kv, None, None


def why_not(
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    length: int = 1,
    head_dim: int = 1,
    *,
    plain: bool = True,
) -> dict[str, str | None]:
    """Each implementation, fastest first, with None or the reason why it cannot run on these.

    plain: without q_scale, k_scale and null_kv.
    """
    unfit = f"sequences of {length}: the kernel takes up to {MAX_LENGTH}" if length > MAX_LENGTH else None
    unfit_cpp = f"{dtype} input: the kernel is float32" if dtype != torch.float32 else unfit
    unfit_triton = unfit
    if dtype not in MAX_HEAD_DIM:
        unfit_triton = f"{dtype} input: Triton has no path for it"
    elif dtype == torch.bfloat16 and device.type != "cuda":
        unfit_triton = "bfloat16 input: Triton's interpreter takes it for integers where it multiplies"
    elif head_dim > MAX_HEAD_DIM[dtype]:
        unfit_triton = f"heads of {head_dim}: the kernel takes up to {MAX_HEAD_DIM[dtype]} of {dtype}"
    elif unfit is None and device.type == "cuda":
        wanted, there = shared_memory(dtype, length, head_dim), dispatch.shared_memory_of(device)
        if wanted > there:
            unfit_triton = f"the kernel needs {wanted} bytes of shared memory, and {device} has {there}"
    unfit_cuda = unfit
    if dtype not in (torch.float16, torch.bfloat16):
        unfit_cuda = f"{dtype} input: the kernel is float16 and bfloat16"
    elif head_dim != CUDA_HEAD_DIM:
        unfit_cuda = f"heads of {head_dim}: the kernel is for {CUDA_HEAD_DIM}"
    elif not plain:
        unfit_cuda = "q_scale, k_scale or null_kv: the kernel has none"
    elif unfit is None and device.type == "cuda":
        wanted, there = cuda_shared_memory(length), dispatch.shared_memory_of(device)
        if wanted > there:
            unfit_cuda = f"the kernel needs {wanted} bytes of shared memory, and {device} has {there}"
    # On an H100 at S = 76, d = 64 the best of PyTorch's backends takes as long forward and, in float32 forward and
    # backward together, 1.2 times as long, in bfloat16 2.2 times; twice as long with normalised queries and keys and a
    # null key.
    return dispatch.table(device, cuda=unfit_cuda, cpp=unfit_cpp, triton=unfit_triton)


def shared_memory(dtype: torch.dtype, length: int, head_dim: int) -> int:
    """Bytes that the backward kernel in Triton takes at most (Triton 3.9 for sm_90; a test compiles it to check)."""
    length, head_dim = (max(16, 1 << (size - 1).bit_length()) for size in (length, head_dim))
    elements = length * head_dim
    return max(28 * elements, 128 << 10) if dtype == torch.float32 else 8 * elements + (16 << 10)


def cuda_shared_memory(length: int) -> int:
    """Bytes that the backward kernel in CUDA takes: four tiles of 16-bit rows, weights and their gradients."""
    rows = -(-length // 16) * 16
    return rows * (4 * 2 * CUDA_HEAD_DIM + 2 * (2 * rows + 16) + 1)


def empty_result(qkv, key_mask, lengths, q_scale, k_scale, null_kv, scale) -> Tensor:
    B, S, _, H, d = qkv.shape
    return torch.empty(B, S, H, d, dtype=qkv.dtype, device=qkv.device)


def empty_gradients(grad_out, qkv, key_mask, lengths, q_scale, k_scale, null_kv, scale) -> tuple[Tensor, ...]:
    H, d = qkv.shape[-2:]
    shapes = (*2 * ((0,) if q_scale is None else (d,),), (0,) if null_kv is None else (2, H, d))
    return torch.empty_like(qkv), *(torch.empty(shape, dtype=torch.float32, device=qkv.device) for shape in shapes)


def run_cpp(*inputs) -> Tensor:
    *tensors, scale = inputs
    out = empty_result(*inputs)
    dispatch.native("_C", "masked_attention", *tensors, *out.shape, scale, torch.get_num_threads(), out)
    return out


def run_cpp_backward(grad_out: Tensor, *inputs) -> tuple[Tensor, ...]:
    *tensors, scale = inputs
    gradients, threads = empty_gradients(grad_out, *inputs), torch.get_num_threads()
    dispatch.native("_C", "masked_attention_backward", *tensors, *grad_out.shape, scale, grad_out, threads, *gradients)
    return gradients


def aligned(x: Tensor) -> Tensor:
    """x, or a copy that starts at a multiple of 16 bytes."""
    return x if x.data_ptr() % 16 == 0 else x.clone()


def run_cuda(*inputs) -> Tensor:
    return call_cuda("masked_attention", (), inputs, empty_result(*inputs))


def run_cuda_backward(grad_out: Tensor, *inputs) -> tuple[Tensor, ...]:
    grad_qkv, *others = empty_gradients(grad_out, *inputs)
    return call_cuda("masked_attention_backward", (aligned(grad_out),), inputs, grad_qkv), *others


def call_cuda(function: str, grad_out: tuple[Tensor, ...], inputs: tuple, result: Tensor) -> Tensor:
    """Fills the result."""
    qkv, key_mask, lengths, *_, scale = inputs
    B, S, _, H, _ = qkv.shape
    qkv = aligned(qkv)
    with torch.cuda.device(qkv.device):
        stream = torch.cuda.current_stream(qkv.device).cuda_stream
        sizes = (B, S, H, scale, stream)
        dispatch.native("_C_cuda", function, *grad_out, qkv, qkv.dtype, key_mask, lengths, *sizes, result)
    return result


# All contiguous: qkv [B, S, 3, H, d]; key_mask bool [B, S] or lengths int64 [B]; q_scale and k_scale [d], both or none,
# and null_kv [2, H, d], float32 -> [B, S, H, d] as qkv. Backward: the gradients of qkv and, float32, of q_scale,
# k_scale and null_kv, empty where these are not given.
INPUTS = "Tensor qkv, Tensor? key_mask, Tensor? lengths, Tensor? q_scale, Tensor? k_scale, Tensor? null_kv, float scale"
OPERATORS = dispatch.operator(
    f"masked_attention({INPUTS}) -> Tensor",
    empty_result,
    cpp=run_cpp,
    cuda=run_cuda,
    triton=dispatch.triton("masked_attention.masked_attention_triton"),
)
BACKWARD_OPERATORS = dispatch.operator(
    f"masked_attention_backward(Tensor grad_out, {INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    empty_gradients,
    cpp=run_cpp_backward,
    cuda=run_cuda_backward,
    triton=dispatch.triton("masked_attention.masked_attention_backward_triton"),
)
