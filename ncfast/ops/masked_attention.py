"""Bidirectional attention of short sequences, from packed queries, keys and values."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ncfast.ops import dispatch

MAX_LENGTH = 128  # of a sequence that the kernels take; beyond it PyTorch's own attention is as fast


def masked_attention_reference(qkv: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ / sqrt(d)) v by PyTorch's attention.  qkv [B, S, 3, H, d], key_mask bool [B, S] -> [B, S, H, d]."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, H, S, d] each
    if key_mask is None:
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    any_key = key_mask.any(-1)[:, None, None, None]  # a softmax over nothing would be NaN
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=key_mask[:, None, None] | ~any_key)
    return torch.where(any_key, out, 0).transpose(1, 2)


def masked_attention(qkv: Tensor, key_mask: Tensor | None = None, *, impl: str = "auto") -> Tensor:
    """Attention of every position to every key of its sequence, without dropout.

    Args:
        qkv: packed queries, keys and values [B, S, 3, H, d]; any float dtype.
        key_mask: bool [B, S], False for keys that no position attends to; a sequence without any key gives zeros.
        impl: "auto" (the fastest that can run the call: the C++ kernel takes float32 and S <= 128), "reference"
            (torch.nn.functional.scaled_dot_product_attention) or "cpp".

    Returns:
        [B, S, H, d] in the type of qkv, differentiable in qkv (once; twice only by the reference).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; an unknown impl.
        RuntimeError: an `impl` asked for by name that cannot run here, with the reason.
    """
    check(qkv, key_mask)
    name = dispatch.choose("masked_attention", impl, why_not(qkv.device, qkv.dtype, qkv.shape[1]))
    if name == "reference":
        return masked_attention_reference(qkv, key_mask)
    return MaskedAttention.apply(qkv.contiguous(), None if key_mask is None else key_mask.contiguous(), name)


def check(qkv: Tensor, key_mask: Tensor | None) -> None:
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ValueError(f"masked_attention: qkv is [B, S, 3, H, d]; got {list(qkv.shape)}")
    if not qkv.is_floating_point():
        raise ValueError(f"masked_attention: qkv is floating point; got {qkv.dtype}")
    if key_mask is None:
        return
    if key_mask.dtype != torch.bool or key_mask.shape != qkv.shape[:2]:
        raise ValueError(
            f"masked_attention: key_mask is bool {list(qkv.shape[:2])}; got {key_mask.dtype} {list(key_mask.shape)}"
        )
    if key_mask.device != qkv.device:
        raise ValueError(f"masked_attention: qkv is on {qkv.device} and key_mask on {key_mask.device}; move one")


class MaskedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv: Tensor, key_mask: Tensor | None, name: str) -> Tensor:
        ctx.save_for_backward(qkv, key_mask)
        ctx.name = name
        return OPERATORS[name](qkv.detach(), key_mask)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out: Tensor):
        qkv, key_mask = ctx.saved_tensors
        return BACKWARD_OPERATORS[ctx.name](grad_out.contiguous(), qkv, key_mask), None, None


def why_not(device: torch.device, dtype: torch.dtype = torch.float32, length: int = 1) -> dict[str, str | None]:
    """Each implementation, fastest first, with None or the reason why it cannot run on these."""
    unfit = None
    if dtype != torch.float32:
        unfit = f"{dtype} input: the kernel is float32"
    elif length > MAX_LENGTH:
        unfit = f"sequences of {length}: the kernel takes up to {MAX_LENGTH}"
    return {"cpp": dispatch.why_not_cpp(device) or unfit, "reference": None}


def _cpp(qkv: Tensor, key_mask: Tensor | None) -> Tensor:
    B, S, _, H, d = qkv.shape
    out = _fake(qkv, key_mask)
    mask = 0 if key_mask is None else key_mask.data_ptr()
    module, _ = dispatch.load_module("_C")
    module.masked_attention(qkv.data_ptr(), mask, B, S, H, d, torch.get_num_threads(), out.data_ptr())
    return out


def _cpp_backward(grad_out: Tensor, qkv: Tensor, key_mask: Tensor | None) -> Tensor:
    B, S, _, H, d = qkv.shape
    grad_qkv = torch.empty_like(qkv)
    mask = 0 if key_mask is None else key_mask.data_ptr()
    module, _ = dispatch.load_module("_C")
    module.masked_attention_backward(
        grad_out.data_ptr(), qkv.data_ptr(), mask, B, S, H, d, torch.get_num_threads(), grad_qkv.data_ptr()
    )
    return grad_qkv


def _fake(qkv: Tensor, key_mask: Tensor | None) -> Tensor:
    B, S, _, H, d = qkv.shape
    return qkv.new_empty(B, S, H, d)


def _fake_backward(grad_out: Tensor, qkv: Tensor, key_mask: Tensor | None) -> Tensor:
    return torch.empty_like(qkv)


OPERATORS, BACKWARD_OPERATORS = {}, {}
for _name, _forward, _backward, _key in (("cpp", _cpp, _cpp_backward, "CPU"),):
    # All contiguous, float32: qkv [B, S, 3, H, d], key_mask bool [B, S] -> [B, S, H, d]
    dispatch.library.define(f"masked_attention_{_name}(Tensor qkv, Tensor? key_mask) -> Tensor")
    dispatch.library.define(
        f"masked_attention_backward_{_name}(Tensor grad_out, Tensor qkv, Tensor? key_mask) -> Tensor"
    )
    dispatch.library.impl(f"masked_attention_{_name}", _forward, _key)
    dispatch.library.impl(f"masked_attention_backward_{_name}", _backward, _key)
    torch.library.register_fake(f"ncfast::masked_attention_{_name}", _fake, lib=dispatch.library)
    torch.library.register_fake(f"ncfast::masked_attention_backward_{_name}", _fake_backward, lib=dispatch.library)
    OPERATORS[_name] = getattr(torch.ops.ncfast, f"masked_attention_{_name}").default
    BACKWARD_OPERATORS[_name] = getattr(torch.ops.ncfast, f"masked_attention_backward_{_name}").default
