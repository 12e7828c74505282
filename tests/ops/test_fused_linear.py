"""fused_linear against float64, by every implementation."""

import itertools

import numpy as np
import pytest
import torch
from implementations import Implementation, each, poisoned_memory

from ncfast.ops import dispatch, fused_linear
from ncfast.ops.fused_linear import NORM_BACKWARD, OPERATOR, why_not

IMPLEMENTATIONS = {
    "reference": Implementation(fused_linear, lambda device, *dtypes: why_not(device), "reference"),
    **{
        f"cpp-{name}": Implementation(fused_linear, lambda device, *dtypes: why_not(device), "cpp", isa=name)
        for name in ("avx512", "avx2", "portable")
    },
}
every_implementation = each(IMPLEMENTATIONS)
every_cpp = each(IMPLEMENTATIONS, "cpp")
SIZES = [(1, 1, 1), (7, 33, 5), (63, 17, 129), (129, 64, 31), (57, 500, 256), (500, 7, 63)]  # M, N, K


@pytest.fixture
def needs_cpp():
    if dispatch.why_not_cpp(torch.device("cpu")):
        pytest.skip(dispatch.why_not_cpp(torch.device("cpu")))


def data(M, N, K, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed + 1000 * M + N)
    x, weight, bias, norm_weight, residual = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((M, K), (N, K), (N,), (K,), (M, N))
    )
    return tuple(part.to(dtype) for part in (x, weight / K**0.5, bias, norm_weight, residual))


def oracle(x, weight, bias, norm_weight, residual, *, norm_eps, gelu):
    x, weight, bias, norm_weight, residual = (
        None if part is None else part.double().numpy() for part in (x, weight, bias, norm_weight, residual)
    )
    if norm_weight is not None:
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + norm_eps) * norm_weight
    y = x @ weight.T + (0 if bias is None else bias)
    if gelu:
        erf = torch.special.erf(torch.from_numpy(y / np.sqrt(2))).numpy()
        y = y * 0.5 * (1 + erf)
    return y + (0 if residual is None else residual)


@every_implementation
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_combination(run, size):
    x, weight, *parts = data(*size)
    for given, gelu in itertools.product(itertools.product([False, True], repeat=3), [False, True]):
        chosen = [part if keep else None for part, keep in zip(parts, given, strict=True)]
        actual = run(x, weight, *chosen, norm_eps=1e-3, gelu=gelu)
        expected = oracle(x, weight, *chosen, norm_eps=1e-3, gelu=gelu)
        np.testing.assert_allclose(actual.numpy(), expected, rtol=2e-5, atol=2e-5)
        if size[2] > 1:
            assert np.linalg.norm(actual.numpy() - expected) < 1e-6 * np.linalg.norm(expected)


@every_cpp
def test_gelu_is_exact_in_its_tails(run):
    """x Φ(x) keeps its relative error where it is tiny, and is x or 0 far out."""
    x = torch.cat([torch.linspace(-9, 9, 20001), torch.tensor([0.0, -0.0, 40.0, -40.0, 1e30, -1e30])])[:, None]
    y = run(x, torch.ones(1, 1), gelu=True)[:, 0].double().numpy()
    z = x[:, 0].double()
    expected = (0.5 * z * torch.special.erfc(-z / 2**0.5)).numpy()
    # The exponent -x²/2 is a float32: its rounding is the relative error of a tail.
    tolerance = 4e-7 * np.maximum(1, z.numpy() ** 2)
    tolerance[np.abs(z.numpy()) > 9] = 1e-6
    assert (np.abs(y - expected) <= tolerance * np.abs(expected) + 1e-37).all()


@every_cpp
def test_nan_and_infinity_stay_in_their_row(run):
    x, weight, *parts = data(5, 40, 20)
    clean = run(x, weight, *parts, gelu=True)
    x[1, 3], x[3, 0] = torch.nan, torch.inf
    out = run(x, weight, *parts, gelu=True)
    assert out[1].isnan().all() and not out[3].isfinite().any()
    assert torch.equal(out[[0, 2, 4]], clean[[0, 2, 4]])


@every_cpp
def test_a_row_is_the_same_bits_among_any_rows_and_threads(run, threads):
    x, weight, *parts = data(131, 70, 64)
    whole = run(x, weight, *parts, gelu=True)
    for count, rows in itertools.product((1, 2, 3), (1, 3, 14, 56, 130)):
        threads(count)
        part = run(x[1 : 1 + rows], weight, *parts[:-1], parts[-1][1 : 1 + rows], gelu=True)
        assert torch.equal(part, whole[1 : 1 + rows])


@every_cpp
def test_every_element_is_written(run):
    x, weight, *parts = data(19, 45, 8)
    parts = [part.requires_grad_() for part in (x, weight, *parts)]
    with poisoned_memory():
        out = run(*parts, gelu=True)
        out.sum().backward()
    assert out.isfinite().all() and all(part.grad.isfinite().all() for part in parts)


@every_implementation
def test_shapes(run):
    x, weight, bias, norm_weight, _ = data(24, 10, 6)
    flat = run(x, weight, bias, norm_weight)
    assert run(x.view(2, 3, 4, 6), weight, bias, norm_weight).equal(flat.view(2, 3, 4, 10))
    assert run(x[:0], weight, bias).shape == (0, 10) and run(x, weight[:0]).shape == (24, 0)
    assert run(x[0], weight).shape == (10,)
    assert run(x[:, :0], weight[:, :0], bias).equal(bias.expand(24, 10))


def test_non_contiguous_and_other_dtypes():
    x, weight, *parts = data(12, 9, 16)
    expected = fused_linear(x, weight, *parts)
    strided = [part.mT.contiguous().mT if part.dim() == 2 else part for part in (x, weight, *parts)]
    torch.testing.assert_close(fused_linear(*strided), expected)
    for dtype, tolerance in ((torch.float64, 1e-5), (torch.bfloat16, 5e-2)):
        out = fused_linear(*(part.to(dtype) for part in (x, weight, *parts)))
        assert out.dtype == dtype
        torch.testing.assert_close(out.float(), expected, rtol=tolerance, atol=tolerance)


@every_implementation
@pytest.mark.parametrize("size", [*SIZES, (300, 8, 40)], ids=str)
def test_gradients(run, size):
    """Against autograd of the reference in float64, for every part alone and all together."""
    *inputs, grad_y = (*data(*size), data(*size, seed=1)[4])
    for given, gelu in itertools.product(itertools.product([False, True], repeat=3), [False, True]):
        chosen = [True, True, *given]
        ours, exact = ([part if keep else None for part, keep in zip(inputs, chosen, strict=True)] for _ in range(2))
        ours = [None if part is None else part.clone().requires_grad_() for part in ours]
        exact = [None if part is None else part.double().requires_grad_() for part in exact]
        run(*ours, norm_eps=1e-3, gelu=gelu).backward(grad_y)
        fused_linear(*exact, norm_eps=1e-3, gelu=gelu, impl="reference").backward(grad_y.double())
        for actual, expected in zip(ours, exact, strict=True):
            if actual is None:
                continue
            error = (actual.grad.double() - expected.grad).norm()
            assert error <= 2e-6 * expected.grad.norm() + 1e-6


def test_gradcheck_of_the_reference():
    parts = [part.double().requires_grad_() for part in data(3, 4, 5)]
    assert torch.autograd.gradcheck(lambda *p: fused_linear(*p, gelu=True), parts)


@every_cpp
def test_gradient_is_the_same_bits_for_any_number_of_threads(run, threads):
    answers = []
    for count in (1, 2, 3):
        threads(count)
        x, weight, bias, norm_weight, residual = (part.requires_grad_() for part in data(600, 33, 64))
        run(x, weight, bias, norm_weight, residual).sum().backward()
        answers.append((x.grad, norm_weight.grad))
    for other in answers[1:]:
        assert all(torch.equal(a, b) for a, b in zip(answers[0], other, strict=True))


def test_second_derivative_is_refused(needs_cpp):
    x, weight, *_ = data(3, 4, 5)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(fused_linear(x, weight, gelu=True, impl="cpp").square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_opcheck(needs_cpp):
    torch.library.opcheck(OPERATOR, (*data(4, 5, 6), 1e-6, True, True))
    x, weight, _, norm_weight, _ = data(4, 5, 6)
    torch.library.opcheck(OPERATOR, (x, weight, None, None, None, 1e-6, False, False))
    torch.library.opcheck(NORM_BACKWARD, (x, x, norm_weight, 1e-6))


def test_compiles_whole_without_recompiling(needs_cpp):
    parts = data(8, 12, 6)
    trained = [part.clone().requires_grad_() for part in parts]
    torch._dynamo.reset()
    compiled = torch.compile(fused_linear, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            assert torch.equal(compiled(*parts, gelu=True), fused_linear(*parts, gelu=True))
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            ours = torch.autograd.grad(compiled(*trained, gelu=True).sum(), trained)
            plain = torch.autograd.grad(fused_linear(*trained, gelu=True).sum(), trained)
            assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(4, 3)}, r"x is \[..., K\] and weight \[N, K\]; got \[2, 5\] and \[4, 3\]"),
        ({"bias": torch.zeros(5)}, r"bias is \[4\]; got \[5\]"),
        ({"norm_weight": torch.zeros(4)}, r"norm_weight is \[5\]; got \[4\]"),
        ({"residual": torch.zeros(4)}, r"residual is \[2, 4\]; got \[4\]"),
        ({"weight": torch.zeros(4, 5).double()}, "weight torch.float64 on cpu; they are alike"),
        ({"x": torch.zeros(2, 5, dtype=torch.int64)}, "x is floating point; got torch.int64"),
    ],
)
def test_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        fused_linear(**({"x": torch.zeros(2, 5), "weight": torch.zeros(4, 5)} | change))
