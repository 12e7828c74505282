"""The SSL losses against transcriptions of their definitions in float64, with the D x D matrix written out."""

import pytest
import torch

from ncfast.ops import barlow_twins_loss, vibcreg_loss, vicreg_loss


def off_diagonal(matrix):
    return matrix - torch.diag(matrix.diagonal())


def barlow_twins_oracle(za, zb, lambd=0.005):
    N, D = za.shape
    za = (za - za.mean(0)) / (za.std(0, correction=1) + 1e-8)
    zb = (zb - zb.mean(0)) / (zb.std(0, correction=1) + 1e-8)
    c = za.T @ zb / N
    return ((1 - c.diagonal()).square().sum() + lambd * off_diagonal(c).square().sum()) / D


def hinge(z):
    return torch.relu(1 - torch.sqrt(z.var(0, correction=1) + 1e-4)).mean()


def vicreg_oracle(za, zb, sim=25.0, var=25.0, cov=1.0):
    def covariance(z):
        return off_diagonal(torch.cov(z.T)).square().sum() / z.shape[1]

    return sim * (za - zb).square().mean() + var * (hinge(za) + hinge(zb)) + cov * (covariance(za) + covariance(zb))


def vibcreg_oracle(za, zb, sim=25.0, var=25.0, cov=100.0):
    def correlation(z):
        z = z - z.mean(0)
        z = z / z.norm(dim=0).clamp_min(1e-12)
        return off_diagonal(z.T @ z).square().mean()

    return sim * (za - zb).square().mean() + var * (hinge(za) + hinge(zb)) + cov * (correlation(za) + correlation(zb))


LOSSES = {
    "barlow": (barlow_twins_loss, barlow_twins_oracle),
    "vicreg": (vicreg_loss, vicreg_oracle),
    "vibcreg": (vibcreg_loss, vibcreg_oracle),
}


def views(N, D, dtype=torch.float64):
    generator = torch.Generator().manual_seed(N * 1000 + D)
    za = torch.randn(N, D, generator=generator, dtype=torch.float64) * 0.7 + 0.3
    zb = za + 0.5 * torch.randn(N, D, generator=generator, dtype=torch.float64)
    return za.to(dtype).requires_grad_(), zb.to(dtype).requires_grad_()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("route", ["gram", "direct", "auto"])
@pytest.mark.parametrize("shape", [(2, 3), (16, 64), (63, 63), (128, 17)], ids=lambda s: f"N{s[0]}-D{s[1]}")
def test_value_and_gradients_in_float64(name, route, shape):
    loss, oracle = LOSSES[name]
    za, zb = views(*shape)
    expected = oracle(za, zb)
    expected_grads = torch.autograd.grad(expected, (za, zb))
    actual = loss(za, zb, route=route)
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    for a, e in zip(torch.autograd.grad(actual, (za, zb)), expected_grads, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_float32_gradients_at_the_paper_shape(name):
    loss, oracle = LOSSES[name]
    za, zb = views(128, 1024, torch.float32)
    exact = torch.autograd.grad(oracle(za.double(), zb.double()), (za, zb))
    for actual, expected in zip(torch.autograd.grad(loss(za, zb), (za, zb)), exact, strict=True):
        assert (actual - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("name", LOSSES)
def test_is_float32_under_autocast(name):
    loss, _ = LOSSES[name]
    za, zb = (z.detach().bfloat16() for z in views(32, 256))
    with torch.autocast("cpu", torch.bfloat16):
        actual = loss(za, zb)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, loss(za.float(), zb.float()), rtol=0, atol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_compiles_whole(name):
    loss, _ = LOSSES[name]
    za, zb = (z.detach().float() for z in views(16, 64))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(za, zb), loss(za, zb))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    ("za", "zb", "options", "message"),
    [
        (torch.zeros(4, 3), torch.zeros(4, 2), {}, "alike"),
        (torch.zeros(4, 3, 2), torch.zeros(4, 3, 2), {}, r"\[N, D\]"),
        (torch.zeros(1, 3), torch.zeros(1, 3), {}, "N >= 2"),
        (torch.zeros(4, 3), torch.zeros(4, 3), {"route": "fft"}, "route is"),
        (torch.zeros(4, 3), torch.zeros(4, 3), {"convention": "byol"}, "convention is"),
        (torch.zeros(4, 3), torch.zeros(4, 3), {"impl": "cuda"}, "got impl=.cuda."),
    ],
)
def test_refuses_what_it_cannot_do(name, za, zb, options, message):
    with pytest.raises(ValueError, match=message):
        LOSSES[name][0](za, zb, **options)
