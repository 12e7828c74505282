"""Gradients of gradients, for every operation: those of the reference, or a refusal; never zeros without a word."""

import pytest
import torch

from ncfast import ops


def randn(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def to_code(z, codebook, *, impl, rotate=True):
    indices = torch.tensor([0, 3, -1, 2, 3, 1, 0])
    q, loss = ops.rotate_to_code(z, codebook, indices, impl=impl, rotate=rotate)
    return (q * q.detach().cos()).sum() + loss


def straight(z, codebook, *, impl):
    return to_code(z, codebook, impl=impl, rotate=False)


def whitened(x, *, impl):
    return ops.iter_norm(x, groups=2, iterations=3, impl=impl).pow(3).sum()


def skip_unless_it_runs(call):
    """Skips an implementation that is not here or does not exist; any other error is one."""
    try:
        call()
    except (RuntimeError, ValueError) as error:
        if "cannot run this call" not in str(error) and "has the implementations" not in str(error):
            raise
        pytest.skip(str(error))


ROUTE = {"route": "gram"}
COMPUTED = {  # function, inputs, options
    "barlow_twins_loss": (ops.barlow_twins_loss, [randn(6, 20), randn(6, 20, seed=1)], ROUTE),
    "vicreg_loss": (ops.vicreg_loss, [randn(6, 20), randn(6, 20, seed=1)], ROUTE),
    "vibcreg_loss": (ops.vibcreg_loss, [randn(6, 20), randn(6, 20, seed=1)], ROUTE),
    "vicreg_loss, facebook": (
        ops.vicreg_loss,
        [randn(6, 20), randn(6, 20, seed=1)],
        {**ROUTE, "convention": "facebook"},
    ),
    "rotate_to_code": (to_code, [randn(7, 5), randn(4, 5, seed=1)], {}),
    "rotate_to_code, straight through": (straight, [randn(7, 5), randn(4, 5, seed=1)], {}),
    "iter_norm": (whitened, [randn(9, 6)], {}),
}


def product(function, inputs, directions, impl, **options):
    """Value, gradients and Hessian-vector product."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    value = function(*leaves, impl=impl, **options)
    gradients = torch.autograd.grad(value, leaves, create_graph=True)
    along = sum((g * v).sum() for g, v in zip(gradients, directions, strict=True))
    return value, gradients, torch.autograd.grad(along, leaves, allow_unused=True)


@pytest.mark.parametrize("impl", ["cpp", "triton"])
@pytest.mark.parametrize("name", COMPUTED)
def test_are_those_of_the_definition(name, impl):
    function, inputs, options = COMPUTED[name]
    directions = [randn(*x.shape, seed=7 + i) for i, x in enumerate(inputs)]
    skip_unless_it_runs(lambda: function(*inputs, impl=impl, **options))
    _, _, found = product(function, inputs, directions, impl, **options)
    exact = [x.double() for x in inputs], [v.double() for v in directions]
    _, _, expected = product(function, *exact, "reference", **options)
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            assert b.norm() > 0 or "through" in name
            assert (a.double() - b).norm() <= 1e-4 * b.norm() + 1e-6


@pytest.mark.parametrize("loss", [ops.barlow_twins_loss, ops.vicreg_loss, ops.vibcreg_loss])
def test_hvp_is_a_difference_of_gradients(loss):
    a, b, v = randn(6, 20), randn(6, 20, seed=1), randn(6, 20, seed=2)
    _, found = torch.autograd.functional.hvp(lambda u: loss(u, b), a, v)

    def gradient(u):
        u = u.requires_grad_()
        return torch.autograd.grad(loss(u, b.double(), impl="reference"), u)[0]

    step = 1e-4 * v.double()
    expected = (gradient(a.double() + step) - gradient(a.double() - step)) / 2e-4
    assert (found.double() - expected).norm() <= 1e-4 * expected.norm()


def test_a_penalty_on_a_gradient_trains_rightly():
    z, codes, weight = randn(7, 5), randn(4, 5, seed=1), randn(5, 5, seed=2)
    results = []
    for impl, dtype in (("auto", torch.float32), ("reference", torch.float64)):
        x, w = z.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        loss = to_code(x @ w, codes.to(dtype), impl=impl)
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        results.append(torch.autograd.grad(gradient.square().sum(), w)[0].double())
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


def norm_of(x, impl):
    return ops.batch_norm(x, torch.ones(3), torch.zeros(3), impl=impl)


REFUSED = {
    "fused_linear": (lambda x, impl: ops.fused_linear(x, randn(3, 8), gelu=True, impl=impl), (4, 8)),
    "layer_norm": (lambda x, impl: ops.layer_norm(x, torch.ones(8), torch.zeros(8), impl=impl), (2, 4, 8)),
    "masked_attention": (lambda x, impl: ops.masked_attention(x, impl=impl), (2, 5, 3, 1, 4)),
    "batch_norm": (norm_of, (4, 3, 2, 2)),
    "thin_conv_transpose": (lambda x, impl: ops.thin_conv_transpose(x, randn(2, 1, 3, 4), impl=impl), (2, 2, 2, 3)),
}


@pytest.mark.parametrize("impl", ["cpp", "triton"])
@pytest.mark.parametrize("name", REFUSED)
def test_are_refused_where_there_are_none(name, impl):
    function, shape = REFUSED[name]
    x = randn(*shape).requires_grad_()
    skip_unless_it_runs(lambda: function(x.detach(), impl))
    y = function(x, impl)
    torch.autograd.grad(y.square().sum(), x, retain_graph=True)
    # The incoming gradient requires none: nothing but create_graph tells that a second derivative is wanted.
    with pytest.raises(RuntimeError, match=f"{name}: its kernels have no second derivative.*impl='reference'"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
