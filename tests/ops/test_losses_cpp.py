"""The SSL losses in C++, with every instruction set, against their definitions in float64."""

import functools

import loss_oracle
import pytest
import torch
from implementations import isa, poisoned_memory
from loss_oracle import CONVENTIONS, LOSSES, Oracle, views

from ncfast.ops import dispatch

every_loss = pytest.mark.parametrize("name", LOSSES)
ISAS = ("avx512", "avx2", "neon", "portable")


@pytest.fixture(params=ISAS)
def check(request):
    """loss_oracle.check by the kernels of one instruction set."""
    with instruction_set(request.param):
        yield functools.partial(loss_oracle.check, run)


def instruction_set(name):
    module, reason = dispatch.load_module("_C")
    if module is None:
        pytest.skip(reason)
    if name not in module.isas():
        pytest.skip(f"this machine has no {name}")
    return isa(name)


def run(name, za, zb, *, upstream=1.0, **options):
    za, zb = (z.detach().requires_grad_() for z in (za, zb))
    loss = LOSSES[name](za, zb, route="gram", impl="cpp", **options)
    assert loss.dtype == torch.float32 and loss.shape == ()
    return loss.detach(), *torch.autograd.grad(loss * upstream, (za, zb))


@pytest.mark.parametrize(
    ("name", "convention"), [(name, convention) for name in LOSSES for convention in CONVENTIONS[name]]
)
def test_every_convention(check, name, convention):
    check(name, *views(16, 40), convention=convention, upstream=-2.5)


@every_loss
@pytest.mark.parametrize("D", [1, 17, 56, 57, 500])
@pytest.mark.parametrize("N", [2, 3, 31, 32, 63, 129, 300])
def test_odd_sizes(check, name, N, D):
    with poisoned_memory():
        check(name, *views(N, D))


@functools.cache
def papers_oracle(name):
    return Oracle(name, *views(128, 4096), CONVENTIONS[name]["ncvqvae"])


@every_loss
def test_the_papers_size(check, name):
    check(name, *views(128, 4096), oracle=papers_oracle(name))


@every_loss
def test_columns_far_from_the_origin(check, name):
    check(name, *views(48, 40, offset=1000.0))


@every_loss
def test_columns_of_very_different_sizes(check, name):
    za, zb = views(24, 20)
    size = torch.logspace(-3, 3, 20)
    # Of VICReg's energy, which is not normalised, the widest column's variance is then all but a hundredth.
    check(name, za * size, zb * size, tolerance=1e-4 if name == "vicreg_loss" else 1e-5)


@pytest.mark.parametrize("name", ISAS)
def test_constant_columns(name):
    za, zb = views(24, 20)
    za[:, 2], zb[:, 5] = 2.5, 0.0  # in one view
    za[:, 9], zb[:, 9] = 1024.0, -3.0  # in both
    with instruction_set(name):
        for loss in LOSSES:
            oracle = Oracle(loss, za, zb, CONVENTIONS[loss]["ncvqvae"])
            value, *grads = run(loss, za, zb)
            torch.testing.assert_close(value.double(), oracle.loss, rtol=1e-5, atol=0)
            for grad, exact in zip(grads, oracle.grads, strict=True):
                # Column by column: Barlow Twins' gradient in a constant one is 1e8 times that in the others.
                assert ((grad - exact).norm(dim=0) <= 1e-5 * exact.norm(dim=0) + 1e-9).all()


@every_loss
@pytest.mark.parametrize(("N", "D"), [(17, 300), (130, 1000)])
def test_same_bits_for_any_number_of_threads(name, N, D, threads):
    with instruction_set("portable"):
        answers = []
        for count in (1, 2, 3):
            threads(count)
            answers.append(run(name, *views(N, D)))
    for answer in answers[1:]:
        assert all(torch.equal(x, y) for x, y in zip(answer, answers[0], strict=True))


@every_loss
def test_what_the_kernels_leave_to_pytorch(name):
    with instruction_set("portable"):
        za, zb = views(20, 5)
        with pytest.raises(RuntimeError, match="the kernels take the N x N route"):
            LOSSES[name](za, zb, impl="cpp")
        with pytest.raises(RuntimeError, match="float64 input"):
            LOSSES[name](*(z.double() for z in views(5, 20)), impl="cpp")
