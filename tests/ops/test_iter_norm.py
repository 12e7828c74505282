import pytest
import torch

from ncfast.ops import iter_norm


def newton_schulz_oracle(x, groups, iterations, eps):
    """Group by group, as the algorithm is printed."""
    N, D = x.shape
    d = D // groups
    blocks = []
    for g in range(groups):
        block = x[:, g * d : (g + 1) * d]
        block = block - block.mean(0)
        sigma = eps * torch.eye(d, dtype=x.dtype) + block.T @ block / N
        normalised = sigma / sigma.trace()
        P = torch.eye(d, dtype=x.dtype)
        for _ in range(iterations):
            P = 0.5 * (3 * P - P @ P @ P @ normalised)
        blocks.append(block @ (P / sigma.trace().sqrt()).T)
    return torch.cat(blocks, 1)


@pytest.mark.parametrize(("N", "D", "groups"), [(7, 6, 1), (63, 12, 4), (129, 64, 8), (500, 10, 10)])
def test_value_and_gradient_in_float64(N, D, groups):
    x = torch.randn(N, D, dtype=torch.float64, generator=torch.Generator().manual_seed(D)).requires_grad_()
    weight = torch.linspace(-1, 1, N * D, dtype=torch.float64).view(N, D)
    expected = newton_schulz_oracle(x, groups, 5, 1e-5)
    actual = iter_norm(x, groups=groups)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(
        torch.autograd.grad((actual * weight).sum(), x)[0],
        torch.autograd.grad((expected * weight).sum(), x)[0],
        rtol=1e-8,
        atol=1e-10,
    )


def test_whitens():
    x = torch.randn(4000, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = x @ (torch.eye(8, dtype=torch.float64) + 0.2)
    y = iter_norm(x, groups=2, iterations=12, eps=0.0)
    for block in y.split(4, 1):
        torch.testing.assert_close(block.T @ block / len(y), torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-6)


def test_is_float32_under_autocast():
    x = torch.randn(64, 32).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert iter_norm(x, groups=4).dtype == torch.float32


@pytest.mark.parametrize(
    ("shape", "groups", "message"), [((1, 8), 2, "N >= 2"), ((4, 8), 3, "multiple"), ((4, 2, 2), 1, r"\[N, D\]")]
)
def test_refuses_shapes(shape, groups, message):
    with pytest.raises(ValueError, match=message):
        iter_norm(torch.zeros(shape), groups=groups)
