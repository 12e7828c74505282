"""NT-Xent, BYOL, SimSiam, SIGReg and VISReg against loops in float64, and what each is for."""

import math
from statistics import NormalDist

import numpy as np
import pytest
import safetensors.torch
import torch
from runs import SMALL, waves

from ncfast.config import METHODS, make_config
from ncfast.data.sources import from_arrays
from ncfast.engine.logging import RunLog
from ncfast.nn.projector import pool
from ncfast.training import fit
from ncfast.training.self_supervision import SSL_LOSSES, SSL_WEIGHTS, TARGET_DECAY, WITHOUT_LOSS, SelfSupervision
from ncfast.training.ssl_losses import (
    byol_loss,
    epps_pulley,
    ntxent_loss,
    random_directions,
    sigreg_loss,
    simsiam_loss,
    sliced_wasserstein,
    visreg_loss,
)

CPU = torch.device("cpu")
NEW = ("ntxent", "byol", "simsiam", "sigreg", "visreg")


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def cosine(p, q):
    return float(np.dot(p, q) / math.sqrt(np.dot(p, p) * np.dot(q, q)))


def ntxent_oracle(za, zb, temperature):
    rows, N = [*za, *zb], len(za)
    total = 0.0
    for i in range(2 * N):
        others = [math.exp(cosine(rows[i], rows[k]) / temperature) for k in range(2 * N) if k != i]
        total -= math.log(math.exp(cosine(rows[i], rows[(i + N) % (2 * N)]) / temperature) / sum(others))
    return total / (2 * N)


def byol_oracle(pa, pb, ta, tb):
    squares = [
        np.square(p / np.linalg.norm(p) - t / np.linalg.norm(t)).sum()
        for prediction, target in ((pa, tb), (pb, ta))
        for p, t in zip(prediction, target, strict=True)
    ]
    return sum(squares) / len(pa)


def simsiam_oracle(pa, pb, za, zb):
    cosines = [cosine(p, z) for p, z in zip(pa, zb, strict=True)] + [cosine(p, z) for p, z in zip(pb, za, strict=True)]
    return -sum(cosines) / len(cosines)


def epps_pulley_oracle(x):
    knots = np.linspace(-5, 5, 17)
    total = 0.0
    for column in x.T:
        heights = [
            abs(np.exp(1j * t * column).mean() - math.exp(-t * t / 2)) ** 2 * math.exp(-t * t / 2) for t in knots
        ]
        areas = [(knots[i + 1] - knots[i]) * (heights[i] + heights[i + 1]) / 2 for i in range(16)]
        total += len(x) * sum(areas)
    return total / x.shape[1]


def sigreg_oracle(za, zb, directions, lambd=0.05):
    centre = (za + zb) / 2
    prediction = (np.square(za - centre).mean() + np.square(zb - centre).mean()) / 2
    regular = (epps_pulley_oracle(za @ directions) + epps_pulley_oracle(zb @ directions)) / 2
    return (1 - lambd) * prediction + lambd * regular


def sliced_wasserstein_oracle(x):
    N = len(x)
    quantiles = [NormalDist().inv_cdf((n + 0.5) / N) for n in range(N)]
    return np.mean([(value - q) ** 2 for column in x.T for value, q in zip(sorted(column), quantiles, strict=True)])


def visreg_oracle(za, zb, directions, sim=1.0, var=1.0, sliced=1.0):
    total = sim * np.square(za - zb).mean()
    for z in (za, zb):
        total += var * np.mean([max(0.0, 1 - math.sqrt(column.var(ddof=1) + 1e-4)) for column in z.T])
        total += sliced * sliced_wasserstein_oracle(z @ directions)
    return total


CASES = {  # function, oracle, kinds of arguments (views [N, D] or directions [D, K]), options
    "ntxent": (ntxent_loss, ntxent_oracle, "vv", {"temperature": 0.3}),
    "byol": (byol_loss, byol_oracle, "vvvv", {}),
    "simsiam": (simsiam_loss, simsiam_oracle, "vvvv", {}),
    "sigreg": (sigreg_loss, sigreg_oracle, "vvd", {}),
    "sigreg, another share": (sigreg_loss, sigreg_oracle, "vvd", {"lambd": 0.3}),
    "visreg": (visreg_loss, visreg_oracle, "vvd", {"sim": 2.0, "var": 3.0, "sliced": 0.5}),
}


def arguments_of(kinds, N, D, dtype=torch.float64):
    made = [drawn(N, D, seed=i, dtype=dtype) * 0.8 + 0.1 for i in range(len(kinds))]
    return [
        random_directions(z, 6, torch.Generator().manual_seed(9)) if k == "d" else z
        for k, z in zip(kinds, made, strict=True)
    ]


@pytest.mark.parametrize(("N", "D"), [(2, 1), (3, 5), (63, 7), (16, 129)])
@pytest.mark.parametrize("case", CASES)
def test_losses_are_those_of_loops_in_float64(case, N, D):
    loss, oracle, kinds, options = CASES[case]
    arguments = arguments_of(kinds, N, D)
    expected = oracle(*(each.numpy() for each in arguments), **options)
    assert float(loss(*arguments, **options)) == pytest.approx(expected, rel=1e-10)
    single = loss(*(each.float() for each in arguments), **options)
    assert single.dtype == torch.float32 and float(single) == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_gradients(case):
    loss, _, kinds, options = CASES[case]
    arguments = arguments_of(kinds, 4, 3)
    targets = arguments[2:]  # or directions: without gradient
    views = [z.requires_grad_() for z in arguments[:2]]
    assert torch.autograd.gradcheck(lambda *views: loss(*views, *targets, **options), views)


@pytest.mark.parametrize("loss", [byol_loss, simsiam_loss])
def test_no_gradient_goes_through_targets(loss):
    arguments = [each.requires_grad_() for each in arguments_of("vvvv", 4, 3)]
    gradients = torch.autograd.grad(loss(*arguments), arguments, allow_unused=True)
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients[:2])
    assert gradients[2:] == (None, None)


@pytest.mark.parametrize("case", CASES)
def test_losses_are_float32_under_autocast(case):
    loss, _, kinds, options = CASES[case]
    arguments = arguments_of(kinds, 32, 8, torch.float32)
    expected = loss(*arguments, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss(*arguments, **options), expected)
    rounded = [each if kind == "d" else each.bfloat16() for kind, each in zip(kinds, arguments, strict=True)]
    assert loss(*rounded, **options).dtype == torch.float32


@pytest.mark.parametrize("case", CASES)
def test_swapping_the_views_changes_nothing(case):
    loss, _, kinds, options = CASES[case]
    a, b, *more = arguments_of(kinds, 9, 4)
    swapped = [b, a, *(more[::-1] if kinds == "vvvv" else more)]
    assert float(loss(*swapped, **options)) == pytest.approx(float(loss(a, b, *more, **options)), rel=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_too_few_rows_and_unlike_views_are_refused(case):
    loss, _, kinds, options = CASES[case]
    least = 1 if kinds == "vvvv" else 2
    with pytest.raises(ValueError, match=f"N >= {least} samples"):
        loss(*arguments_of(kinds, least - 1, 3), **options)
    a, b, *more = arguments_of(kinds, 4, 3)
    with pytest.raises(ValueError, match="alike"):
        if kinds == "vvvv":
            loss(a, b, more[0], more[1][:3])
        else:
            loss(a, b[:3], *more, **options)


def test_ntxent_knows_pairs_and_scale_does_not_matter():
    a = drawn(16, 8)
    alike, apart = ntxent_loss(a, a), ntxent_loss(a, a.roll(1, 0))
    collapsed = ntxent_loss(torch.ones(16, 8), torch.ones(16, 8))
    assert alike < collapsed < apart and float(collapsed) == pytest.approx(math.log(31))
    torch.testing.assert_close(ntxent_loss(3 * a, 0.5 * a), alike)


def test_byol_and_simsiam_at_their_ends():
    a = drawn(5, 4)
    assert float(byol_loss(a, a, a, a)) == pytest.approx(0, abs=1e-12)
    assert float(byol_loss(a, a, -a, -a)) == pytest.approx(8)
    assert float(simsiam_loss(a, 2 * a, a, a)) == pytest.approx(-1)


@pytest.mark.parametrize("loss", [sigreg_loss, visreg_loss])
def test_collapse_costs_more_than_normal_samples(loss):
    normal = drawn(256, 16)
    directions = random_directions(normal, 64, torch.Generator().manual_seed(1))
    least = loss(normal, normal, directions)
    line = normal[:, :1].expand(-1, 16)  # one dimension left
    for other in (torch.zeros_like(normal), line, 3 * normal, 0.3 * normal, normal + 1):
        assert loss(other, other, directions) > 1.02 * least


def test_epps_pulley_of_normal_samples_and_of_none_that_differ():
    # E|mean exp(itx) - φ|² = (1 - φ²) / N, so that E T = ∫ (1 - exp(-t²)) exp(-t²/2) dt.
    expected = math.sqrt(2 * math.pi) * (1 - 1 / math.sqrt(3))
    assert float(epps_pulley(drawn(100, 4000))) == pytest.approx(expected, rel=0.05)
    # Of N zeros N ∫ (1 - φ)² φ dt.
    zeros = math.sqrt(2 * math.pi) * (1 - math.sqrt(2) + 1 / math.sqrt(3))
    assert float(epps_pulley(torch.zeros(100, 2).double())) == pytest.approx(100 * zeros, rel=1e-3)


def test_sliced_wasserstein_of_the_quantiles_in_any_order_is_zero():
    N = 37
    quantiles = torch.tensor([NormalDist().inv_cdf((n + 0.5) / N) for n in range(N)], dtype=torch.float64)
    orders = [torch.randperm(N, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    x = torch.stack([quantiles[order] for order in orders], 1)
    assert float(sliced_wasserstein(x)) < 1e-20
    assert float(sliced_wasserstein(x + 0.5)) == pytest.approx(0.25)


def test_directions_are_of_length_one_and_the_generators():
    z = torch.zeros(3, 5)
    first = random_directions(z, 200, torch.Generator().manual_seed(4))
    assert first.shape == (5, 200) and first.dtype == torch.float32
    torch.testing.assert_close(first.norm(dim=0), torch.ones(200))
    assert torch.equal(first, random_directions(z, 200, torch.Generator().manual_seed(4)))
    assert first.mean(1).abs().max() < 0.15  # no side is preferred


def head_of(ssl, **more):
    torch.manual_seed(0)
    return SelfSupervision(make_config(ssl=ssl, **{"dim": 8, "projector_dim": 16, **more}))


def grids(count=2):
    return [drawn(6, 8, 5, 4, seed=i, dtype=torch.float32) for i in range(count)]


def test_every_method_has_a_loss_a_weight_and_a_name():
    assert SSL_LOSSES.keys() == SSL_WEIGHTS.keys() == METHODS.keys() - set(WITHOUT_LOSS)


@pytest.mark.parametrize(
    ("ssl", "widths"),
    [
        ("barlow", [16, 16, 16, 16]),
        ("ntxent", [16, 16, 128]),
        ("byol", [16, 16, 256]),
        ("simsiam", [16, 16, 16, 16]),
        ("sigreg", [16, 16, 16, 128]),
        ("visreg", [16, 16, 16, 128]),
    ],
)
def test_projectors_have_the_papers_shapes(ssl, widths):
    head = head_of(ssl)
    linears = head.projector.linears
    assert [linears[0].in_features, *(linear.out_features for linear in linears)] == widths
    # Behind it a centring loss or a predictor's batch norm would take the last bias away.
    biased = ssl in ("ntxent", "sigreg", "visreg")
    assert [linear.bias is not None for linear in linears] == [False] * (len(linears) - 1) + [biased]
    if ssl in ("byol", "simsiam"):
        hidden = {"byol": 16, "simsiam": 4}[ssl]
        assert [(x.in_features, x.out_features) for x in head.predictor.linears] == [
            (widths[-1], hidden),
            (hidden, widths[-1]),
        ]


@pytest.mark.parametrize("ssl", NEW)
def test_ssl_weight_is_a_factor_and_half_precision_trains(ssl):
    a, b = grids()
    losses = [head_of(ssl, ssl_weight=weight)(a, b, None, torch.Generator().manual_seed(2)) for weight in (1.0, 0.25)]
    torch.testing.assert_close(losses[1], 0.25 * losses[0])
    head = head_of(ssl)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = head(a, b)
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in head.parameters())


def test_only_the_sketched_losses_draw():
    a, b = grids()
    for ssl in SSL_LOSSES:
        generator = torch.Generator().manual_seed(2)
        before = generator.get_state()
        loss = head_of(ssl)(a, b, None, generator)
        assert torch.equal(before, generator.get_state()) == (ssl not in ("sigreg", "visreg")), ssl
        again = head_of(ssl)(a, b, None, torch.Generator().manual_seed(2))
        assert torch.equal(loss, again), ssl


def test_the_target_of_byol_is_the_moving_average_of_the_projector():
    head = head_of("byol")
    optimizer = torch.optim.SGD(head.parameters(), 0.5)
    online = dict(head.projector.named_parameters())
    target = dict(head.target.named_buffers())
    assert not list(head.target.parameters())
    expected = {name: parameter.detach().clone() for name, parameter in online.items()}
    a, b = grids()
    for step in range(4):
        for name, parameter in online.items():
            expected[name].lerp_(parameter.detach(), 1 - TARGET_DECAY)
        head.zero_grad()
        head(a, b).backward()
        for name, value in expected.items():
            assert torch.equal(target[name], value), (step, name)
            if step == 0:
                assert torch.equal(value, online[name])
        optimizer.step()
    old = 1.0 - TARGET_DECAY
    assert old == pytest.approx(0.01) and not torch.equal(target["linears.0.weight"], online["linears.0.weight"])
    # The target is state, and what comes after does not depend on whether it was written and read in between.
    other = head_of("byol")
    other.load_state_dict(head.state_dict())
    assert torch.equal(other(a, b), head(a, b))
    assert torch.equal(other.target.linears[0].weight, head.target.linears[0].weight)


def test_byol_holds_predictions_against_the_target_of_the_other_view():
    head = head_of("byol", ssl_weight=1.0)
    with torch.no_grad():
        for buffer in head.target.buffers():
            buffer.mul_(2)  # unlike the projector
    head.eval()  # the target stays
    a, b = map(pool, grids())
    expected = byol_oracle(
        *(each.detach().numpy() for each in (*head.predictor(*head.projector(a, b)), *head.target(a, b)))
    )
    assert head(*grids()).item() == pytest.approx(expected, rel=1e-5)


class Stopped(Exception):
    pass


@pytest.mark.parametrize("ssl", ["byol", "simsiam", "sigreg"])
def test_a_resumed_run_ends_with_the_same_bits(ssl, tmp_path, monkeypatch):
    """Of BYOL's target, too: stopped as epoch 3 is logged, it goes on from the state of epoch 2."""
    dataset = from_arrays(*waves(20))
    config = fit.resolve_config(make_config(ssl=ssl, stage1_epochs=5, stage2_epochs=1, **SMALL), dataset, CPU)
    options = {"device": CPU, "checkpoint_every": 1, "quiet": True}
    fit.train(config, dataset, out=tmp_path / "whole", **options)
    original = RunLog.write

    def write(log, stage, epoch, *values):
        original(log, stage, epoch, *values)
        if (stage, epoch) == (1, 3):
            raise Stopped

    with monkeypatch.context() as patched, pytest.raises(Stopped):
        patched.setattr(RunLog, "write", write)
        fit.train(config, dataset, out=tmp_path / "parts", **options)
    state = torch.load(tmp_path / "parts" / "state.pt", weights_only=True)
    assert state["epoch"] == 2 and any(name.startswith("ssl.target.") for name in state["modules"]) == (ssl == "byol")
    fit.train(config, dataset, out=tmp_path / "parts", resume=True, **options)
    whole, parts = (safetensors.torch.load_file(tmp_path / name / "stage1.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
