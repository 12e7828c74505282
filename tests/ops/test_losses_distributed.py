"""The losses over processes: against one process that has all rows. One gloo process a rank."""

import itertools

import pytest
import torch
import torch.distributed as dist
from processes import once_per_world
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ncfast.ops import barlow_twins_loss, vibcreg_loss, vicreg_loss

LOSSES = {"barlow": barlow_twins_loss, "vicreg": vicreg_loss, "vibcreg": vibcreg_loss}
CONVENTIONS = {
    "barlow": ("ncvqvae", "facebook", "lightly", "solo", "vibcreg"),
    "vicreg": ("ncvqvae", "facebook", "lightly", "solo"),
    "vibcreg": ("ncvqvae", "vibcreg", "solo"),
}
SHARDS = {  # rows of each rank, by the number of ranks
    2: {"even": (4, 4), "uneven": (7, 2), "empty": (0, 5), "one_row_each": (1, 1)},
    4: {"even": (3, 3, 3, 3), "uneven": (1, 6, 2, 5), "empty": (0, 5, 0, 3), "one_row_each": (1, 1, 1, 1)},
}
DIM = 11
CASES = [
    (name, convention, route, gradient)
    for name in LOSSES
    for convention, route, gradient in itertools.product(CONVENTIONS[name], ("gram", "direct"), ("true", "official"))
]


def views(rows, dim=DIM, dtype=torch.float64):
    """Columns of different scale and mean, some on either side of VICReg's hinge."""
    generator = torch.Generator().manual_seed(100 * rows + dim)
    scale = torch.linspace(0.3, 2.0, dim, dtype=torch.float64)
    za = torch.randn(rows, dim, generator=generator, dtype=torch.float64) * scale + 0.5
    zb = za + 0.4 * torch.randn(rows, dim, generator=generator, dtype=torch.float64)
    return za.to(dtype), zb.to(dtype)


def own(tensor, counts, rank):
    return tensor.split(counts)[rank].clone()


def linear(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Linear(6, DIM, dtype=dtype)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operator returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = (t.untyped_storage().nbytes() // t.itemsize for t in tree_leaves(out) if isinstance(t, torch.Tensor))
        self.numel = max(self.numel, *sizes, 0)
        return out


class Messages:
    """(collective, elements a process holds of it afterwards) of each collective that is called."""

    def __enter__(self):
        self.sent, self.originals = [], {}
        for name in ("all_reduce", "all_gather_single", "all_gather_into_tensor"):
            if hasattr(dist, name):
                self.originals[name] = getattr(dist, name)
                setattr(dist, name, self.wrap(name, self.originals[name]))
        return self.sent

    def wrap(self, name, original):
        def call(tensor, *args, **kwargs):
            self.sent.append((name.removesuffix("_into_tensor").removesuffix("_single"), tensor.numel()))
            return original(tensor, *args, **kwargs)

        return call

    def __exit__(self, *_):
        for name, original in self.originals.items():
            setattr(dist, name, original)


def rank_results():
    rank, world, group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
    results = {}

    # Values and gradients, of the rows and of a shared layer.
    for shards, counts in SHARDS[world].items():
        for case in CASES:
            name, convention, route, gradient = case
            options = {"convention": convention, "route": route, "gradient": gradient, "group": group}
            za, zb = (own(z, counts, rank).requires_grad_() for z in views(sum(counts)))
            loss = LOSSES[name](za, zb, **options)
            results[(shards, *case)] = loss.detach(), *torch.autograd.grad(loss, (za, zb))
        for name, gradient in itertools.product(LOSSES, ("true", "official")):
            layer = nn.parallel.DistributedDataParallel(linear())
            xa, xb = (own(x, counts, rank) for x in views(sum(counts), 6))
            both = layer(torch.cat([xa, xb]))
            LOSSES[name](both[: len(xa)], both[len(xa) :], group=group, gradient=gradient).backward()
            results["layer", shards, name, gradient] = [parameter.grad for parameter in layer.parameters()]

    counts = SHARDS[world]["uneven"]
    wide, narrow = [[own(z, counts, rank) for z in views(sum(counts), dim, torch.float32)] for dim in (300, 3)]
    alone = dist.new_group([rank], use_local_synchronization=True)
    for name, loss in LOSSES.items():
        # What is sent, and how large anything becomes.
        for label, z, route in (("gram", wide, "gram"), ("auto_gram", wide, "auto"), ("auto_direct", narrow, "auto")):
            za, zb = (each.clone().requires_grad_() for each in z)
            with Messages() as forward, Largest() as largest:
                value = loss(za, zb, route=route, group=group)
            with Messages() as backward, largest:
                value.backward()
            results["messages", label, name] = forward, backward, largest.numel

        za, zb = (z.clone().requires_grad_() for z in wide)
        value = loss(za, zb, group=group)
        results["float32", name] = value.detach(), *torch.autograd.grad(value, (za, zb))
        for each, dtype in (("half", torch.float16), ("bfloat16", torch.bfloat16)):
            low = [z.to(dtype) for z in wide]
            with torch.autocast("cpu", torch.bfloat16):
                mine = loss(*low, group=group)
            results[each, name] = mine, loss(*(z.float() for z in low), group=group)
        with torch.no_grad():
            results["no_grad", name] = loss(za, zb, group=group), value.detach()
        compiled = torch.compile(loss, backend="eager")
        results["compiled", name] = compiled(za, zb, group=group).detach(), value.detach()

        # A group of one: the plain loss, of more rows than the smallest shard has.
        one = [z.requires_grad_() for z in views(5 + rank)]
        results["alone", name] = [
            (value.detach(), *torch.autograd.grad(value, one))
            for value in (loss(*one, group=alone), loss(*one), loss(*one, group=alone, gradient="official"))
        ]
        # Only one view requires a gradient, and has a constant column.
        za, zb = (own(z, counts, rank) for z in views(sum(counts)))
        za[:, 3] = 0
        results["one_view", name] = torch.autograd.grad(loss(za.requires_grad_(), zb, group=group), za)[0]

        messages = {}
        others = dist.new_group([0])
        z = torch.zeros(4, DIM)
        for label, za, zb, options in (
            ("dims", torch.zeros(4, 3 + rank), torch.zeros(4, 3 + rank), {}),
            ("dtypes", z.double() if rank else z, z.double() if rank else z, {}),
            ("few", torch.zeros(int(rank == 1), 3), torch.zeros(int(rank == 1), 3), {}),
            ("alike", z, z[:3], {}),
            ("gradient", z, z, {"gradient": "correct"}),
            ("route", z, z, {"route": "fft"}),
            ("member", z, z, {"group": others}),
        ):
            try:
                loss(za, zb, **{"group": group, **options})
            except ValueError as error:
                messages[label] = str(error)
        results["errors", name] = messages
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """number of ranks -> what each rank found"""
    return once_per_world(tmp_path_factory, rank_results)


pytestmark = [pytest.mark.slow, pytest.mark.parametrize("world", SHARDS)]


@pytest.mark.parametrize("case", CASES, ids="-".join)
@pytest.mark.parametrize("shards", SHARDS[2])
def test_is_one_process_with_all_rows(ranks, world, shards, case):
    name, convention, _, gradient = case
    counts = SHARDS[world][shards]
    za, zb = (z.requires_grad_() for z in views(sum(counts)))
    expected = LOSSES[name](za, zb, convention=convention, route="direct", impl="reference")
    expected_grads = torch.autograd.grad(expected, (za, zb))
    factor = world if gradient == "true" else 1
    found = [results[(shards, *case)] for results in ranks(world)]
    for loss, *_ in found:
        assert torch.equal(loss, found[0][0])
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-11, atol=1e-13)
    for view, expected_grad in enumerate(expected_grads):
        grad = torch.cat([grads[view] for _, *grads in found])
        assert (grad - factor * expected_grad).norm() <= 1e-10 * factor * expected_grad.norm() + 1e-12


@pytest.mark.parametrize("gradient", ["true", "official"])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("shards", SHARDS[2])
def test_data_parallel_layer_gets_the_gradient_of_all_rows(ranks, world, shards, name, gradient):
    layer = linear()
    xa, xb = views(sum(SHARDS[world][shards]), 6)
    LOSSES[name](layer(xa), layer(xb), route="direct", impl="reference").backward()
    factor = 1 if gradient == "true" else 1 / world
    for results in ranks(world):
        for grad, parameter in zip(results["layer", shards, name, gradient], layer.parameters(), strict=True):
            assert (grad - factor * parameter.grad).norm() <= 1e-10 * layer.weight.grad.norm() + 1e-14


@pytest.mark.parametrize("name", LOSSES)
def test_sends_each_row_once_and_makes_no_matrix_of_dimensions_by_dimensions(ranks, world, name):
    counts, dim = SHARDS[world]["uneven"], 300
    for results in ranks(world):
        for label in ("gram", "auto_gram", "auto_direct"):
            forward, backward, largest = results["messages", label, name]
            width = 3 if label == "auto_direct" else dim
            assert (
                forward == [("all_reduce", 3 * world), ("all_gather", 2 * max(counts) * world * width)]
                and backward == []
            )
            assert label == "auto_direct" or largest < dim**2


@pytest.mark.parametrize("name", LOSSES)
def test_float32_is_as_exact_as_one_process(ranks, world, name):
    za, zb = (z.double().requires_grad_() for z in views(sum(SHARDS[world]["uneven"]), 300, torch.float32))
    expected = LOSSES[name](za, zb, route="direct", impl="reference")
    expected_grads = torch.autograd.grad(expected, (za, zb))
    found = [results["float32", name] for results in ranks(world)]
    for loss, *_ in found:
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-6, atol=0)
    for view, expected_grad in enumerate(expected_grads):
        grad = torch.cat([grads[view] for _, *grads in found])
        assert grad.dtype == torch.float32
        assert (grad - world * expected_grad).norm() <= 1e-5 * world * expected_grad.norm()


@pytest.mark.parametrize("what", ["half", "bfloat16", "no_grad", "compiled"])
@pytest.mark.parametrize("name", LOSSES)
def test_is_the_same_of_low_precision_compiled_and_without_gradient(ranks, world, name, what):
    for results in ranks(world):
        actual, expected = results[what, name]
        assert actual.dtype == torch.float32 and not actual.requires_grad
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", LOSSES)
def test_group_of_one_is_the_plain_loss(ranks, world, name):
    for results in ranks(world):
        alone, plain, official = results["alone", name]
        torch.testing.assert_close(alone, plain, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(official, plain, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_one_view_may_require_gradients_and_have_a_constant_column(ranks, world, name):
    za, zb = views(sum(SHARDS[world]["uneven"]))
    za[:, 3] = 0
    (expected,) = torch.autograd.grad(LOSSES[name](za.requires_grad_(), zb, route="direct"), za)
    grad = torch.cat([results["one_view", name] for results in ranks(world)])
    assert grad.isfinite().all()
    torch.testing.assert_close(grad, world * expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_every_process_refuses_what_does_not_fit(ranks, world, name):
    found = [results["errors", name] for results in ranks(world)]
    for messages in found:
        assert (
            "the same D on every process" in messages["dims"]
            and str([3 + r for r in range(world)]) in (messages["dims"])
        )
        assert "float64 on every process or on none" in messages["dtypes"]
        assert "N >= 2" in messages["few"] and "all processes have 1" in messages["few"]
        assert "alike" in messages["alike"]
        assert "'true' or 'official'; got 'correct'" in messages["gradient"]
        assert "route is" in messages["route"]
    assert all("not in group" in messages["member"] for messages in found[1:])
    assert "member" not in found[0]
