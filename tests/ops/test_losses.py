"""The SSL losses against transcriptions of their definitions in float64, with the D x D matrix written out."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from ncfast.ops import barlow_twins_loss, vibcreg_loss, vicreg_loss
from ncfast.ops.barlow_twins_loss import CONVENTIONS as BARLOW_CONVENTIONS
from ncfast.ops.vibcreg_loss import CONVENTIONS as VIBCREG_CONVENTIONS
from ncfast.ops.vicreg_loss import CONVENTIONS as VICREG_CONVENTIONS


def off_diagonal(matrix):
    return matrix - torch.diag(matrix.diagonal())


def barlow_twins_oracle(za, zb, lambd=0.005, ddof=1, eps=0.0, eps_std=1e-8, scale=None):
    N, D = za.shape
    za = (za - za.mean(0)) / ((za.var(0, correction=ddof) + eps).sqrt() + eps_std)
    zb = (zb - zb.mean(0)) / ((zb.var(0, correction=ddof) + eps).sqrt() + eps_std)
    c = za.T @ zb / N
    loss = (1 - c.diagonal()).square().sum() + lambd * off_diagonal(c).square().sum()
    return loss / D if scale is None else scale * loss


def hinges(za, zb, eps, var_reduction):
    total = sum(torch.relu(1 - torch.sqrt(z.var(0, correction=1) + eps)).mean() for z in (za, zb))
    return {"sum": total, "mean": total / 2}[var_reduction]


def vicreg_oracle(za, zb, sim=25.0, var=25.0, cov=1.0, eps=1e-4, var_reduction="sum"):
    def covariance(z):
        z = z - z.mean(0)
        return off_diagonal(z.T @ z / (len(z) - 1)).square().sum() / z.shape[1]

    distance = (za - zb).square().mean()
    return sim * distance + var * hinges(za, zb, eps, var_reduction) + cov * (covariance(za) + covariance(zb))


def vibcreg_oracle(za, zb, sim=25.0, var=25.0, cov=100.0, eps=1e-4, var_reduction="sum"):
    def correlation(z):
        z = z - z.mean(0)
        z = z / z.norm(dim=0).clamp_min(1e-12)
        return off_diagonal(z.T @ z).square().mean()

    distance = (za - zb).square().mean()
    return sim * distance + var * hinges(za, zb, eps, var_reduction) + cov * (correlation(za) + correlation(zb))


def batch_norm_barlow(za, zb, lambd, scale):
    """Barlow Twins by BatchNorm1d without affine parameters, as its authors, lightly and solo-learn write it."""
    za, zb = (F.batch_norm(z, None, None, training=True, eps=1e-5) for z in (za, zb))
    c = za.T @ zb / len(za)
    return scale * ((c.diagonal() - 1).square().sum() + lambd * off_diagonal(c).square().sum())


LOSSES = {
    "barlow": (barlow_twins_loss, barlow_twins_oracle),
    "vicreg": (vicreg_loss, vicreg_oracle),
    "vibcreg": (vibcreg_loss, vibcreg_oracle),
}
# Each convention as its implementation has it: a function of the views.
CONVENTIONS = {
    ("barlow", "ncvqvae"): barlow_twins_oracle,
    ("barlow", "facebook"): lambda za, zb: batch_norm_barlow(za, zb, 0.0051, 1.0),
    ("barlow", "lightly"): lambda za, zb: batch_norm_barlow(za, zb, 0.005, 1.0),
    ("barlow", "solo"): lambda za, zb: batch_norm_barlow(za, zb, 0.005, 0.025),
    ("barlow", "vibcreg"): lambda za, zb: barlow_twins_oracle(za, zb, 0.005, ddof=1, eps_std=0.0, scale=1.0),
    ("vicreg", "ncvqvae"): vicreg_oracle,
    ("vicreg", "facebook"): lambda za, zb: vicreg_oracle(za, zb, var_reduction="mean"),
    ("vicreg", "lightly"): lambda za, zb: vicreg_oracle(za, zb, var_reduction="mean"),
    ("vicreg", "solo"): lambda za, zb: vicreg_oracle(za, zb, var_reduction="sum"),
    ("vibcreg", "ncvqvae"): vibcreg_oracle,
    ("vibcreg", "vibcreg"): lambda za, zb: vibcreg_oracle(za, zb, cov=200.0),
    ("vibcreg", "solo"): lambda za, zb: vibcreg_oracle(za, zb, cov=200.0),
}
# Values that no convention has.
OPTIONS = {
    "barlow": {"lambd": 0.3, "ddof": 0, "eps": 0.2, "eps_std": 0.1, "scale": 3.0},
    "vicreg": {"sim": 3.0, "var": 5.0, "cov": 7.0, "eps": 0.2, "var_reduction": "mean"},
    "vibcreg": {"sim": 3.0, "var": 5.0, "cov": 7.0, "eps": 0.2, "var_reduction": "mean"},
}


def views(N, D, dtype=torch.float64):
    generator = torch.Generator().manual_seed(N * 1000 + D)
    za = torch.randn(N, D, generator=generator, dtype=torch.float64) * 0.7 + 0.3
    zb = za + 0.5 * torch.randn(N, D, generator=generator, dtype=torch.float64)
    return za.to(dtype).requires_grad_(), zb.to(dtype).requires_grad_()


def check(actual, expected, inputs, rtol=1e-9, atol=1e-12):
    """Values and gradients, both in float64."""
    torch.testing.assert_close(actual, expected, rtol=rtol / 10, atol=atol)
    grads = torch.autograd.grad(actual, inputs), torch.autograd.grad(expected, inputs)
    for mine, reference in zip(*grads, strict=True):
        torch.testing.assert_close(mine, reference, rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("route", ["gram", "direct", "auto"])
@pytest.mark.parametrize("shape", [(2, 3), (16, 64), (63, 63), (128, 17), (7, 1)], ids=lambda s: f"N{s[0]}-D{s[1]}")
def test_value_and_gradients_in_float64(name, route, shape):
    loss, oracle = LOSSES[name]
    za, zb = views(*shape)
    actual = loss(za, zb, route=route)
    assert actual.dtype == torch.float64 and actual.shape == ()
    check(actual, oracle(za, zb), (za, zb))


def test_every_convention_is_tested():
    conventions = {"barlow": BARLOW_CONVENTIONS, "vicreg": VICREG_CONVENTIONS, "vibcreg": VIBCREG_CONVENTIONS}
    assert {(name, convention) for name, each in conventions.items() for convention in each} == set(CONVENTIONS)


@pytest.mark.parametrize("route", ["gram", "direct"])
@pytest.mark.parametrize("shape", [(9, 40), (40, 9)], ids=lambda s: f"N{s[0]}-D{s[1]}")
@pytest.mark.parametrize(("name", "convention"), CONVENTIONS)
def test_conventions(name, convention, shape, route):
    za, zb = views(*shape)
    actual = LOSSES[name][0](za, zb, convention=convention, route=route)
    check(actual, CONVENTIONS[name, convention](za, zb), (za, zb))


@pytest.mark.parametrize("shape", [(9, 40), (64, 256)], ids=lambda s: f"N{s[0]}-D{s[1]}")
@pytest.mark.parametrize(("name", "convention"), CONVENTIONS)
def test_conventions_in_float32(name, convention, shape):
    za, zb = views(*shape, torch.float32)
    exact = torch.autograd.grad(CONVENTIONS[name, convention](za.double(), zb.double()), (za, zb))
    actual = torch.autograd.grad(LOSSES[name][0](za, zb, convention=convention), (za, zb))
    for mine, reference in zip(actual, exact, strict=True):
        assert mine.dtype == torch.float32
        assert (mine - reference).norm() <= 1e-5 * reference.norm()


@pytest.mark.parametrize(("name", "option"), [(name, option) for name in OPTIONS for option in [*OPTIONS[name], "all"]])
@pytest.mark.parametrize("convention", ["ncvqvae", "solo"])
def test_arguments_override_the_convention(name, option, convention):
    loss, oracle = LOSSES[name]
    conventions = {"barlow": BARLOW_CONVENTIONS, "vicreg": VICREG_CONVENTIONS, "vibcreg": VIBCREG_CONVENTIONS}[name]
    given = OPTIONS[name] if option == "all" else {option: OPTIONS[name][option]}
    if {**conventions[convention], **given} == conventions[convention]:
        given = {option: {0: 1}[given[option]]}  # ddof has two values alone
    za, zb = views(9, 40)
    actual = loss(za, zb, convention=convention, **given)
    check(actual, oracle(za, zb, **{**conventions[convention], **given}), (za, zb))
    assert not torch.isclose(actual, loss(za, zb, convention=convention), rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_an_argument_of_zero_is_an_argument(name):
    za, zb = views(9, 40)
    loss, oracle = LOSSES[name]
    given = {"lambd": 0.0, "eps_std": 0.0} if name == "barlow" else {"sim": 0.0, "cov": 0.0}
    check(loss(za, zb, **given), oracle(za, zb, **given), (za, zb))


@pytest.mark.parametrize("name", LOSSES)
def test_weights_are_linear(name):
    za, zb = views(9, 40)
    loss = LOSSES[name][0]
    if name == "barlow":
        torch.testing.assert_close(loss(za, zb, scale=6.0), 3 * loss(za, zb, scale=2.0))
        return
    zero = {"sim": 0.0, "var": 0.0, "cov": 0.0}
    terms = [loss(za, zb, **{**zero, weight: 1.0}) for weight in zero]
    total = 2 * terms[0] + 3 * terms[1] + 4 * terms[2]
    torch.testing.assert_close(loss(za, zb, sim=2.0, var=3.0, cov=4.0), total)


def lightly(module, name):
    """A loss of lightly from its own file: the package of the losses imports torchvision, which these do not need."""
    package = importlib.util.find_spec("lightly")
    if package is None:
        pytest.skip("lightly is not installed: pip install --no-deps lightly")
    path = Path(package.submodule_search_locations[0]) / "loss" / f"{module}.py"
    spec = importlib.util.spec_from_file_location(f"lightly_{module}", path)
    loaded = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(loaded)
    except ImportError as error:
        pytest.skip(f"lightly does not import: {error}")
    return getattr(loaded, name)


@pytest.mark.parametrize("shape", [(9, 40), (40, 9), (2, 5)], ids=lambda s: f"N{s[0]}-D{s[1]}")
@pytest.mark.parametrize("given", [False, True])
def test_is_lightlys_barlow_twins(shape, given):
    theirs = lightly("barlow_twins_loss", "BarlowTwinsLoss")
    za, zb = views(*shape)
    expected = theirs(lambda_param=0.02)(za, zb) if given else theirs()(za, zb)
    check(barlow_twins_loss(za, zb, convention="lightly", lambd=0.02 if given else None), expected, (za, zb))


@pytest.mark.parametrize("shape", [(9, 40), (40, 9), (2, 5)], ids=lambda s: f"N{s[0]}-D{s[1]}")
@pytest.mark.parametrize("given", [False, True])
def test_is_lightlys_vicreg(shape, given):
    theirs = lightly("vicreg_loss", "VICRegLoss")
    za, zb = views(*shape)
    expected = theirs(lambda_param=2.0, mu_param=3.0, nu_param=4.0, eps=0.1)(za, zb) if given else theirs()(za, zb)
    options = {"sim": 2.0, "var": 3.0, "cov": 4.0, "eps": 0.1} if given else {}
    check(vicreg_loss(za, zb, convention="lightly", **options), expected, (za, zb))


@pytest.mark.parametrize("name", LOSSES)
def test_float32_gradients_at_the_paper_shape(name):
    loss, oracle = LOSSES[name]
    za, zb = views(128, 1024, torch.float32)
    exact = torch.autograd.grad(oracle(za.double(), zb.double()), (za, zb))
    for actual, expected in zip(torch.autograd.grad(loss(za, zb), (za, zb)), exact, strict=True):
        assert (actual - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_is_float32_of_low_precision_and_under_autocast(name, dtype, autocast):
    loss, _ = LOSSES[name]
    za, zb = (z.detach().to(dtype).requires_grad_() for z in views(32, 256))
    exact = [z.detach().float().requires_grad_() for z in (za, zb)]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        actual = loss(za, zb)
    assert actual.dtype == torch.float32
    expected = loss(*exact)
    assert torch.equal(actual, expected)
    grads = torch.autograd.grad(actual, (za, zb)), torch.autograd.grad(expected, exact)
    for mine, reference in zip(*grads, strict=True):
        assert mine.dtype == dtype and torch.equal(mine, reference.to(dtype))


@pytest.mark.parametrize("name", LOSSES)
def test_views_of_two_precisions_take_the_higher(name):
    loss, oracle = LOSSES[name]
    za, zb = views(8, 20)
    low = za.detach().bfloat16()
    assert loss(low, zb.float()).dtype == torch.float32
    actual = loss(low, zb)
    assert actual.dtype == torch.float64
    check(actual, oracle(low.double(), zb), (zb,))


@pytest.mark.parametrize("name", LOSSES)
def test_large_float16_views_do_not_overflow(name):
    """Their squares exceed what float16 holds."""
    loss, oracle = LOSSES[name]
    za, zb = (300 * z.detach().half() for z in views(32, 64))
    torch.testing.assert_close(loss(za, zb).double(), oracle(za.double(), zb.double()), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_reads_views_of_any_stride(name):
    za, zb = views(9, 40)
    strided = [torch.stack([z.detach(), z.detach()], -1)[..., 0].float().T.contiguous().T for z in (za, zb)]
    assert not strided[0].is_contiguous()
    loss = LOSSES[name][0]
    torch.testing.assert_close(loss(*strided), loss(*(z.contiguous() for z in strided)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_a_view_may_be_detached(name):
    """NC-VQVAE detaches none, but users of BYOL-like targets do."""
    loss, oracle = LOSSES[name]
    za, zb = views(9, 40)
    check(loss(za, zb.detach()), oracle(za, zb.detach()), (za,))


@pytest.mark.parametrize("name", LOSSES)
def test_a_dead_column_has_a_finite_gradient(name):
    za, zb = (z.detach().float() for z in views(16, 40))
    za[:, 3] = 0
    za, zb = za.requires_grad_(), zb.requires_grad_()
    loss = LOSSES[name][0](za, zb)
    assert loss.isfinite() and all(grad.isfinite().all() for grad in torch.autograd.grad(loss, (za, zb)))


ERRORS = [
    (torch.zeros(4, 3), torch.zeros(4, 2), {}, r"za and zb are \[N, D\] and alike; got \[4, 3\] and \[4, 2\]"),
    (torch.zeros(4, 3, 2), torch.zeros(4, 3, 2), {}, r"\[N, D\]"),
    (torch.zeros(1, 3), torch.zeros(1, 3), {}, r"N >= 2 samples and D >= 1; got \[1, 3\]"),
    (torch.zeros(4, 0), torch.zeros(4, 0), {}, r"D >= 1; got \[4, 0\]"),
    (torch.zeros(4, 3), torch.zeros(4, 3, dtype=torch.int64), {}, "floating point; got torch.float32 and torch.int64"),
    (torch.zeros(4, 3), torch.zeros(4, 3, device="meta"), {}, "za is on cpu and zb on meta; move one"),
    (torch.zeros(4, 3), torch.zeros(4, 3), {"route": "fft"}, "route is 'auto', 'gram' or 'direct'; got 'fft'"),
    (torch.zeros(4, 3), torch.zeros(4, 3), {"convention": "byol"}, "convention is one of ncvqvae, .*; got 'byol'"),
    (torch.zeros(4, 3), torch.zeros(4, 3), {"impl": "fpga"}, "has the implementations .*reference.*got impl='fpga'"),
]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(("za", "zb", "options", "message"), ERRORS, ids=range(len(ERRORS)))
def test_refuses_what_it_cannot_do(name, za, zb, options, message):
    with pytest.raises(ValueError, match=message) as error:
        LOSSES[name][0](za, zb, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["vicreg", "vibcreg"])
def test_refuses_an_unknown_reduction(name):
    with pytest.raises(ValueError, match=f"{name}_loss: var_reduction is sum or mean; got 'max'"):
        LOSSES[name][0](torch.zeros(4, 3), torch.zeros(4, 3), var_reduction="max")


@pytest.mark.parametrize(("name", "convention"), [("vicreg", "vibcreg"), ("vibcreg", "facebook")])
def test_refuses_a_convention_of_another_loss(name, convention):
    with pytest.raises(ValueError, match=f"{name}_loss: convention is one of .*got '{convention}'"):
        LOSSES[name][0](torch.zeros(4, 3), torch.zeros(4, 3), convention=convention)


@pytest.mark.parametrize("name", LOSSES)
def test_refuses_the_kernels_what_they_do_not_do(name):
    z = torch.zeros(4, 40)
    for options in ({"route": "direct"}, {}):
        with pytest.raises(RuntimeError, match="impl='cpp' cannot run this call"):
            LOSSES[name][0](*((z, z) if options else (z.double(), z.double())), impl="cpp", **options)
