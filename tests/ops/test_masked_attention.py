"""masked_attention against float64 written out with numpy, by every implementation."""

import math

import numpy as np
import pytest
import torch
from implementations import Implementation, each, isa, poisoned_memory

from ncfast.ops import dispatch, masked_attention
from ncfast.ops.masked_attention import BACKWARD_OPERATORS, MAX_LENGTH, OPERATORS, why_not

IMPLEMENTATIONS = {
    "reference": Implementation(masked_attention, why_not, "reference"),
    **{
        f"cpp-{name}": Implementation(masked_attention, why_not, "cpp", isa=name)
        for name in ("avx512", "avx2", "portable")
    },
}
every_implementation = each(IMPLEMENTATIONS)
every_cpp = each(IMPLEMENTATIONS, "cpp")
# B, S, H, d
SHAPES = [(2, 1, 1, 1), (3, 7, 2, 17), (2, 63, 2, 32), (2, 76, 2, 64), (1, 128, 3, 8), (1, 33, 1, 100)]


def data(B, S, H, d, *, masked=False, scale=1.0):
    generator = torch.Generator().manual_seed(S * 100 + d)
    qkv = scale * torch.randn(B, S, 3, H, d, generator=generator)
    mask = None
    if masked:
        mask = torch.rand(B, S, generator=generator) < 0.7
        mask[0] = False  # a sequence without any key
    return qkv, mask, torch.randn(B, S, H, d, generator=generator)


def oracle(qkv, mask, grad_out):
    """Output and gradient of qkv, float64, head by head."""
    qkv, grad_out = qkv.double().numpy(), grad_out.double().numpy()
    B, S, _, H, d = qkv.shape
    out, grad = np.zeros((B, S, H, d)), np.zeros_like(qkv)
    for b in range(B):
        kept = np.ones(S, bool) if mask is None else mask[b].numpy()
        if not kept.any():
            continue
        for h in range(H):
            q, k, v = (qkv[b, :, part, h] for part in range(3))
            scores = np.where(kept, q @ k.T / math.sqrt(d), -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            out[b, :, h] = weights @ v
            g = grad_out[b, :, h]
            of_weights = g @ v.T
            of_scores = weights * (of_weights - (weights * of_weights).sum(-1, keepdims=True)) / math.sqrt(d)
            grad[b, :, 0, h], grad[b, :, 1, h] = of_scores @ k, of_scores.T @ q
            grad[b, :, 2, h] = weights.T @ g
    return out, grad


def relative_error(actual, expected):
    return np.linalg.norm(actual.double().numpy() - expected) / max(np.linalg.norm(expected), 1e-30)


@every_implementation
@pytest.mark.parametrize("masked", [False, True], ids=["all-keys", "key-mask"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradient(run, shape, masked):
    qkv, mask, grad_out = data(*shape, masked=masked)
    expected, expected_grad = oracle(qkv, mask, grad_out)
    qkv.requires_grad_()
    out = run(qkv, mask)
    out.backward(grad_out)
    assert relative_error(out.detach(), expected) < 1e-6
    if np.any(expected_grad):
        # Scores of one key have no gradient; what is left of it then is rounding.
        assert relative_error(qkv.grad, expected_grad) < 2e-6


@every_cpp
@pytest.mark.parametrize("scale", [1e-3, 30.0])
def test_flat_and_sharp_weights(run, scale):
    """Scores up to thousands apart: weights of 0 and 1, and no overflow."""
    qkv, mask, grad_out = data(2, 40, 2, 16, masked=True, scale=scale)
    expected, expected_grad = oracle(qkv, mask, grad_out)
    qkv.requires_grad_()
    out = run(qkv, mask)
    out.backward(grad_out)
    assert relative_error(out.detach(), expected) < 1e-4 * max(1, scale / 30)
    assert relative_error(qkv.grad, expected_grad) < 1e-3


@every_cpp
def test_a_nan_stays_in_its_sequence(run):
    qkv, _, _ = data(3, 9, 2, 8)
    clean = run(qkv)
    qkv[1, 4, 1] = torch.nan  # a key
    out = run(qkv)
    assert out[1].isnan().all()
    assert torch.equal(out[[0, 2]], clean[[0, 2]])


@every_cpp
def test_masked_keys_do_not_matter(run):
    qkv, mask, _ = data(3, 20, 2, 8, masked=True)
    changed = qkv.clone()
    changed[:, :, 1:] = torch.where(mask[:, :, None, None, None], changed[:, :, 1:], 7.0)
    assert torch.equal(run(qkv, mask), run(changed, mask))


@every_cpp
def test_same_bits_for_any_batch_and_thread_count(run, threads):
    qkv, mask, grad_out = data(5, 76, 2, 64, masked=True)
    answers = []
    for count in (1, 2, 3):
        threads(count)
        own = qkv.clone().requires_grad_()
        out = run(own, mask)
        out.backward(grad_out)
        answers.append((out.detach(), own.grad))
    for out, grad in answers[1:]:
        assert torch.equal(out, answers[0][0]) and torch.equal(grad, answers[0][1])
    for b in range(5):
        assert torch.equal(run(qkv[b : b + 1], mask[b : b + 1]), answers[0][0][b : b + 1])


@every_cpp
def test_every_element_is_written(run):
    qkv, mask, grad_out = data(2, 17, 2, 9, masked=True)
    qkv.requires_grad_()
    with poisoned_memory():
        out = run(qkv, mask)
        out.backward(grad_out)
    assert out.isfinite().all() and qkv.grad.isfinite().all()


@every_implementation
@pytest.mark.parametrize("shape", [(0, 5, 2, 4), (2, 0, 2, 4)], ids=str)
def test_empty(run, shape):
    qkv, _, _ = data(*shape)
    assert run(qkv).shape == (shape[0], shape[1], shape[2], shape[3])


def test_non_contiguous_and_other_dtypes():
    qkv, mask, _ = data(2, 11, 2, 8, masked=True)
    expected = masked_attention(qkv, mask)
    strided = qkv.transpose(0, 1).contiguous().transpose(0, 1)
    torch.testing.assert_close(masked_attention(strided, mask), expected)
    for dtype, tolerance in ((torch.float64, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 3e-3)):
        out = masked_attention(qkv.to(dtype), mask)
        assert out.dtype == dtype
        torch.testing.assert_close(out.float(), expected, rtol=tolerance, atol=tolerance)


def test_auto_leaves_what_the_kernel_does_not_take_to_pytorch():
    assert why_not(torch.device("cpu"), torch.float32, MAX_LENGTH)["cpp"] == dispatch.why_not_cpp(torch.device("cpu"))
    assert "up to 128" in why_not(torch.device("cpu"), torch.float32, MAX_LENGTH + 1)["cpp"]
    long, _, _ = data(1, MAX_LENGTH + 1, 1, 8)
    assert masked_attention(long).shape == (1, MAX_LENGTH + 1, 1, 8)
    with pytest.raises(RuntimeError, match="sequences of 129: the kernel takes up to 128"):
        masked_attention(long, impl="cpp")


@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(masked):
    if dispatch.why_not_cpp(torch.device("cpu")):
        pytest.skip(dispatch.why_not_cpp(torch.device("cpu")))
    qkv, mask, grad_out = data(2, 6, 2, 4, masked=masked)
    torch.library.opcheck(OPERATORS["cpp"], (qkv, mask))
    torch.library.opcheck(BACKWARD_OPERATORS["cpp"], (grad_out, qkv, mask))


@pytest.mark.parametrize("masked", [False, True])
def test_compiles_whole_without_recompiling(masked):
    qkv, mask, grad_out = data(2, 12, 2, 8, masked=masked)
    torch._dynamo.reset()
    compiled = torch.compile(masked_attention, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            own, plain = qkv.clone().requires_grad_(), qkv.clone().requires_grad_()
            out, expected = compiled(own, mask), masked_attention(plain, mask)
            torch.testing.assert_close(out, expected, rtol=0, atol=0)
            out.backward(grad_out)
            expected.backward(grad_out)
            torch.testing.assert_close(own.grad, plain.grad, rtol=0, atol=0)


def test_second_derivative_is_refused():
    if dispatch.why_not_cpp(torch.device("cpu")):
        pytest.skip(dispatch.why_not_cpp(torch.device("cpu")))
    qkv, _, _ = data(1, 5, 1, 4)
    qkv.requires_grad_()
    (grad,) = torch.autograd.grad(masked_attention(qkv, impl="cpp").square().sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_unknown_instruction_set_is_named():
    if dispatch.why_not_cpp(torch.device("cpu")):
        pytest.skip(dispatch.why_not_cpp(torch.device("cpu")))
    with isa("avx7"), pytest.raises(ValueError, match="NCFAST_ISA=avx7"):
        masked_attention(data(1, 4, 1, 4)[0], impl="cpp")


@pytest.mark.parametrize(
    ("qkv", "mask", "message"),
    [
        (torch.zeros(2, 3, 4), None, r"qkv is \[B, S, 3, H, d\]; got \[2, 3, 4\]"),
        (torch.zeros(2, 3, 2, 1, 4), None, r"qkv is \[B, S, 3, H, d\]"),
        (torch.zeros(2, 3, 3, 1, 4, dtype=torch.int64), None, "floating point; got torch.int64"),
        (torch.zeros(2, 3, 3, 1, 4), torch.ones(2, 4, dtype=torch.bool), r"key_mask is bool \[2, 3\]"),
        (torch.zeros(2, 3, 3, 1, 4), torch.ones(2, 3), "got torch.float32"),
    ],
)
def test_refuses(qkv, mask, message):
    with pytest.raises(ValueError, match=message):
        masked_attention(qkv, mask)
