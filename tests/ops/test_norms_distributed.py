"""Batch norm over processes: against one process that has all rows. One gloo process a rank."""

import itertools

import pytest
import torch
import torch.distributed as dist
from processes import on_processes

from ncfast.ops import batch_norm, dispatch
from ncfast.ops.batch_norm import batch_norm_reference

SHARDS = {"even": (4, 4), "uneven": (7, 2), "one_row_each": (1, 1), "empty": (0, 5), "three": (3, 0, 4)}
WORLDS = {2: ("even", "uneven", "one_row_each", "empty"), 3: ("three",)}
CHANNELS, HEIGHT, WIDTH = 5, 3, 4
NO_TRITON = dispatch.why_not_triton(torch.device("cpu"))  # where there is a GPU it is not interpreted
OPTIONS = (  # views, with a residual, options
    (1, False, {}),
    (2, False, {"slope": 0.2}),
    (2, True, {"slope": 0.0, "then_slope": 0.1}),
    (1, True, {"pad": True, "momentum": 0.3, "eps": 1e-3}),
)


def drawn(*shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def maps(rows, dtype=torch.float64):
    """[rows, C, H, W] of channels with means and scales of their own."""
    ramp = torch.arange(1.0, CHANNELS + 1, dtype=torch.float64)[:, None, None]
    return (drawn(rows, CHANNELS, HEIGHT, WIDTH) * ramp + 3 * ramp).to(dtype)


def own(x, counts, views, rank):
    """The rows of a process: those of each view [views·N, ...]."""
    return torch.cat([view.split(counts)[rank] for view in x.chunk(views)])


def batch_norm_case(counts, views, with_residual, options, rank=None, group=None, dtype=torch.float64, impl="auto"):
    """Results, gradients and running statistics; of one process's rows with a group."""
    x, residual = maps(views * sum(counts)), drawn(views * sum(counts), CHANNELS, HEIGHT, WIDTH)
    if rank is not None:
        x, residual = (own(each, counts, views, rank) for each in (x, residual))
    weight, bias = drawn(CHANNELS) + 1, drawn(CHANNELS + 1)[:CHANNELS]
    inputs = [x, weight, bias, *([residual] if with_residual else [])]
    inputs = [each.to(dtype, copy=True).requires_grad_() for each in inputs]
    x, weight, bias, *residual = inputs
    running = [torch.linspace(0, 1, CHANNELS, dtype=dtype), torch.ones(CHANNELS, dtype=dtype)]
    call = batch_norm_reference if group is None else batch_norm
    more = {} if group is None else {"group": group, "impl": impl}
    results = call(x, weight, bias, *running, *residual, views=views, **options, **more)
    results = results if isinstance(results, tuple) else (results,)
    total = sum((result * row_weights(result, counts, views, rank)).sum() for result in results)
    gradients = torch.autograd.grad(total, inputs)
    return [result.detach() for result in results], list(gradients), running


def row_weights(y, counts, views, rank):
    """Another upstream gradient for each element."""
    weights = drawn(views * sum(counts), *y.shape[1:])
    return weights if rank is None else own(weights, counts, views, rank)


def rank_results(shard_names):
    rank, group = dist.get_rank(), dist.group.WORLD
    results = {}
    for name in shard_names:
        counts = SHARDS[name]
        for i, (views, with_residual, options) in enumerate(OPTIONS):
            case = counts, views, with_residual, options, rank, group
            results["reference", name, i] = batch_norm_case(*case)
            if NO_TRITON is None:
                results["triton", name, i] = batch_norm_case(*case, torch.float32, "triton")
        # Far from zero a difference of squares in float32 would have no correct digit.
        x = own(maps(sum(counts)) + 1e4, counts, 1, rank).float()
        variance = torch.zeros(CHANNELS)
        batch_norm(x, torch.ones(CHANNELS), torch.zeros(CHANNELS), variance.clone(), variance, group=group, momentum=1)
        results["far", name] = variance
        x = own(maps(sum(counts)), counts, 1, rank)
        rounded = batch_norm(x.bfloat16(), torch.ones(CHANNELS), torch.zeros(CHANNELS), group=group)
        full = batch_norm(x.bfloat16().float(), torch.ones(CHANNELS), torch.zeros(CHANNELS), group=group)
        results["bfloat16", name] = rounded, full.bfloat16()
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """name of shards -> what each rank found"""
    return {
        name: results
        for world, names in WORLDS.items()
        for results in [on_processes(world, tmp_path_factory.mktemp(f"ranks{world}"), rank_results, names)]
        for name in names
    }


pytestmark = pytest.mark.slow


def joined(parts, views):
    """The rows of all processes [views·n_r, ...], as one process has them."""
    return torch.cat([torch.cat(rows) for rows in zip(*(part.chunk(views) for part in parts), strict=True)])


@pytest.mark.parametrize(("name", "i"), [*itertools.product(SHARDS, range(len(OPTIONS)))])
@pytest.mark.parametrize(
    "impl",
    ["reference", pytest.param("triton", marks=pytest.mark.skipif(NO_TRITON is not None, reason=str(NO_TRITON)))],
)
def test_batch_norm_is_that_of_all_rows(ranks, impl, name, i):
    views, with_residual, options = OPTIONS[i]
    results, gradients, running = batch_norm_case(SHARDS[name], views, with_residual, options)
    found = [each[impl, name, i] for each in ranks[name]]
    close = {"rtol": 1e-11, "atol": 1e-12} if impl == "reference" else {"rtol": 1e-5, "atol": 2e-5}
    results, gradients, running = ([e.to(found[0][0][0].dtype) for e in each] for each in (results, gradients, running))
    for k, expected in enumerate(results):
        torch.testing.assert_close(joined([each[0][k] for each in found], views), expected, **close)
    for k, expected in enumerate(gradients):
        parts = [each[1][k] for each in found]
        # Of weight and bias every process has its share.
        torch.testing.assert_close(sum(parts) if expected.dim() == 1 else joined(parts, views), expected, **close)
    for k, expected in enumerate(running):
        for each in found:
            assert torch.equal(each[2][k], found[0][2][k])
            torch.testing.assert_close(each[2][k], expected, **close)


@pytest.mark.parametrize("name", SHARDS)
def test_variance_far_from_zero_keeps_its_digits(ranks, name):
    x = (maps(sum(SHARDS[name])) + 1e4).float().double()
    expected = x.var((0, 2, 3))
    for results in ranks[name]:
        # The means are rounded to 1e-3 there.
        torch.testing.assert_close(results["far", name].double(), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", SHARDS)
def test_low_precision_is_rounded_once(ranks, name):
    for results in ranks[name]:
        rounded, expected = results["bfloat16", name]
        assert rounded.dtype == torch.bfloat16 and torch.equal(rounded, expected)
