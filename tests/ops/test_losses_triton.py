"""The SSL losses in Triton against their definitions in float64, with the D x D matrix written out.

On a GPU where there is one; otherwise in Triton's interpreter, with fewer and smaller sizes.
"""

import functools
import importlib

import loss_oracle
import pytest
import torch
from implementations import GPU, poisoned_memory
from loss_oracle import CONVENTIONS, LOSSES, OPTIONS, Oracle, views
from offline import compile_offline, needs_triton

from ncfast.ops import dispatch

INTERPRETED = GPU == "cpu"
pytestmark = [
    needs_triton,
    pytest.mark.skipif(
        dispatch.why_not_triton(torch.device(GPU)) is not None, reason="Triton runs on a GPU or in its interpreter"
    ),
    # What divides by zero in the interpreter is NumPy's to report and the kernel's to expect.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


every_loss = pytest.mark.parametrize("name", LOSSES)


def run(name, za, zb, *, upstream=1.0, **options):
    """The loss, and its gradients times `upstream`, back on the CPU."""
    za, zb = (z.detach().to(GPU).requires_grad_() for z in (za, zb))
    loss = LOSSES[name](za, zb, route="gram", impl="triton", **options)
    assert loss.dtype == torch.float32 and loss.shape == ()
    grads = torch.autograd.grad(loss * upstream, (za, zb))
    return loss.detach().cpu(), *(grad.cpu() for grad in grads)


check = functools.partial(loss_oracle.check, run)


@pytest.mark.parametrize(
    ("name", "convention"), [(name, convention) for name in LOSSES for convention in CONVENTIONS[name]]
)
def test_every_convention(name, convention):
    check(name, *views(16, 40), convention=convention, upstream=-2.5)


@every_loss
def test_options_of_ones_own(name):
    if name == "barlow_twins_loss":
        options = {"lambd": 0.3, "ddof": 0, "eps": 0.01, "eps_std": 0.05, "scale": 3.0}
    else:
        options = {"sim": 2.0, "var": 5.0, "cov": 7.0, "eps": 0.02, "var_reduction": "mean"}
    check(name, *views(12, 20), **options)
    for weight in options:
        if weight in ("lambd", "sim", "var", "cov"):
            check(name, *views(5, 20), **{**options, weight: 0.0})


SIZES_N, SIZES_D = (2, 3, 17, 63, 64, 65, 128, 129, 193, 300), (1, 17, 64, 500)
# One or more row blocks in each pass, odd and even numbers of tiles, one split and several.
QUICK = {(2, 1), (2, 17), (3, 1), (17, 64), (63, 17), (65, 17)}
SLOW = {"barlow_twins_loss": {(300, 1)}, "vicreg_loss": {(128, 17)}, "vibcreg_loss": {(3, 500), (129, 64)}}


@every_loss
@pytest.mark.parametrize("D", SIZES_D)
@pytest.mark.parametrize("N", SIZES_N)
def test_odd_sizes(name, N, D):
    if INTERPRETED and (N, D) not in QUICK | SLOW[name]:
        pytest.skip("the interpreter takes some of the sizes")
    with poisoned_memory():
        check(name, *views(N, D))


@every_loss
def test_columns_far_from_the_origin(name):
    # What float32 holds of such views is exact to the oracle; only the arithmetic is put to the test.
    za, zb = views(48, 40, offset=1000.0)
    check(name, za, zb)
    zb[:, ::2] -= 2000
    check(name, za, zb, **({} if name == "barlow_twins_loss" else {"sim": 0.0}))


@every_loss
def test_columns_of_very_different_sizes(name):
    za, zb = views(24, 20)
    size = torch.logspace(-3, 3, 20)
    # Of VICReg's energy, which is not normalised, the widest column's variance is then all but a hundredth.
    check(name, za * size, zb * size, tolerance=1e-4 if name == "vicreg_loss" else 1e-5)


@pytest.mark.parametrize(
    ("name", "convention"), [(name, each) for name in LOSSES for each in CONVENTIONS[name] if each != "vibcreg"]
)
def test_constant_columns(name, convention):
    za, zb = views(24, 20)
    za[:, 2], zb[:, 5] = 2.5, 0.0  # in one view
    za[:, 9], zb[:, 9] = 1024.0, -3.0  # in both
    oracle = Oracle(name, za, zb, CONVENTIONS[name][convention])
    loss, *grads = run(name, za, zb, convention=convention)
    torch.testing.assert_close(loss.double(), oracle.loss, rtol=1e-5, atol=0)
    for grad, exact in zip(grads, oracle.grads, strict=True):
        # Column by column: Barlow Twins' gradient in a constant one is 1e8 times that in the others.
        assert ((grad - exact).norm(dim=0) <= 1e-5 * exact.norm(dim=0) + 1e-9).all()


def test_what_has_no_value_has_none():
    za, zb = views(24, 20)
    za[:, 2] = 1.0
    assert run("barlow_twins_loss", za, zb, convention="vibcreg")[0].isnan()  # 0 / 0
    for name in LOSSES:
        for value in (torch.nan, torch.inf):
            za[5, 3] = value
            assert run(name, za, zb)[0].isnan()


@every_loss
def test_equal_views_and_equal_rows(name):
    za, _ = views(24, 20)
    check(name, za, za.clone(), tolerance=1e-4)
    if name != "barlow_twins_loss":
        loss, *grads = run(name, torch.ones(5, 3), torch.ones(5, 3))
        torch.testing.assert_close(loss, torch.tensor(2 * 25 * (1 - 1e-4**0.5)))
        assert not torch.stack(grads).any()


@every_loss
def test_bitwise_the_same_every_time(name):
    z = views(17, 40) if INTERPRETED else views(300, 1000)
    first, second = run(name, *z), run(name, *z)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@every_loss
@pytest.mark.parametrize(("N", "D"), [(3, 17), (18, 33)])
def test_every_element_is_written(name, N, D):
    za, zb = views(N, D)
    module = importlib.import_module(f"ncfast.ops.triton.{name}")
    with poisoned_memory():
        loss, saved = getattr(module, f"{name}_triton")(za.to(GPU), zb.to(GPU), *OPTIONS[name])
    assert saved.numel() == getattr(module, f"{name}_saved_numel")(N, D)
    assert saved.dtype == loss.dtype == torch.float32
    assert not saved.isnan().any()


@every_loss
def test_views_are_only_read(name):
    za, zb = (z.T.contiguous().T for z in views(6, 20))  # not contiguous
    before = za.clone(), zb.clone()
    check(name, za, zb)
    assert torch.equal(za, before[0]) and torch.equal(zb, before[1])


@pytest.mark.parametrize("N", [2, 16, 17, 64, 65, 128, 300, 2048, 20_000])
@pytest.mark.parametrize("D", [1, 16, 65, 4096, 100_003])
def test_stretches_cover_the_columns_once(N, D):
    from ncfast.ops.triton.gram import GRAM_BLOCKS, GRAM_PROGRAMS, gram_grid

    tiles, splits, split = gram_grid(N, D)
    assert split % GRAM_BLOCKS["BLOCK_D"] == 0
    assert (splits - 1) * split < D <= splits * split
    assert splits == 1 or 2 * tiles * splits <= GRAM_PROGRAMS


@pytest.mark.gpu
@every_loss
@pytest.mark.parametrize(("N", "D"), [(128, 4096), (300, 1000)])
def test_no_synchronisation_and_a_cuda_graph(name, N, D):
    za, zb = (z.cuda().requires_grad_() for z in views(N, D))
    upstream = torch.full((), 2.0, device="cuda")

    def step():
        loss = LOSSES[name](za, zb, route="gram", impl="triton")
        return loss.detach(), *torch.autograd.grad(loss, (za, zb), upstream)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        expected = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        for part in captured:
            part.fill_(torch.nan)
        graph.replay()
        assert all(torch.equal(x, y) for x, y in zip(captured, expected, strict=True))
    with torch.no_grad():
        za.mul_(1.5)
        upstream.mul_(0.5)
    graph.replay()
    assert all(torch.equal(x, y) for x, y in zip(captured, step(), strict=True))


@pytest.mark.gpu
@every_loss
def test_no_memory_of_D_by_D(name):
    N, D = 64, 50_000
    za, zb = (z.cuda().requires_grad_() for z in views(N, D))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.autograd.grad(LOSSES[name](za, zb, impl="triton"), (za, zb))
    assert torch.cuda.max_memory_allocated() - before < 4 * (4 * N * D) + 2**25


@pytest.mark.gpu
@every_loss
def test_large_batch(name):
    check(name, *views(1500, 2500))


FLOATS = (
    *("lambd", "eps", "eps_std", "scale", "of_product"),
    *("of_energy", "of_difference", "of_hinge", "of_covariance", "of_correlation"),
)
TYPES = {
    **dict.fromkeys(("za", "zb", "saved", "partials", "loss", "grad_loss", "grad_za", "grad_zb"), "*fp32"),
    **dict.fromkeys(FLOATS, "fp32"),
    "terms": "*fp64",
    "energies": "*fp64",
}


def test_triton_kernels_compile_offline():
    from ncfast.ops.triton.gram import (
        COLUMN_BLOCKS,
        GRAM_BLOCKS,
        LOSS_BLOCKS,
        SUM_BLOCKS,
        backward_blocks,
        gram_block,
    )

    jobs = [
        ("gram_kernel", TYPES, {**GRAM_BLOCKS, "BLOCK": gram_block(128)}),
        ("gram_sum_kernel", TYPES, {**SUM_BLOCKS, "BLOCK_N": gram_block(3), "CROSS": True}),
        ("gram_sum_kernel", TYPES, {**SUM_BLOCKS, "BLOCK_N": gram_block(128), "CROSS": False}),
        ("gram_backward_kernel", TYPES, {**backward_blocks(128), "CROSS": True}),
        ("gram_backward_kernel", TYPES, {**backward_blocks(129), "CROSS": False}),
        ("gram_loss_kernel", TYPES, LOSS_BLOCKS),
    ]
    used = compile_offline("ncfast.ops.triton.gram", jobs)
    for name in ("barlow_twins", "vicreg", "vibcreg"):
        used += compile_offline(f"ncfast.ops.triton.{name}_loss", [(f"{name}_kernel", TYPES, COLUMN_BLOCKS)])
    for resources in used:
        assert resources["shared"] <= 99 << 10  # that a program has on the GPUs with the least
