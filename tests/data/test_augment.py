"""Views: values against plain NumPy, one series at a time; then the draws, and what a CUDA graph needs."""

import numpy as np
import pytest
import torch

from ncfast.data import augment
from ncfast.data.augment import OPERATIONS, RECIPES, Augment
from ncfast.errors import UserError

NAMES = [*OPERATIONS, *RECIPES]
LENGTHS = [8, 9, 31, 64, 500]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(B, C, L, dtype=torch.float64):
    return torch.randn(B, C, L, generator=seeded(99), dtype=dtype)


def resample(series, size):  # numpy [L] -> [size]
    n = len(series)
    return np.interp(np.linspace(0, n - 1, size), np.arange(n), series)


@pytest.mark.parametrize("L", LENGTHS)
def test_window_warp_equals_two_resamplings(L):
    x = batch(40, 2, L)
    w = round(0.4 * L)
    start = torch.randint(0, L - w + 1, (40,), generator=seeded(1))
    start[:2] = torch.tensor([0, L - w])
    scale = 0.9 + 1.1 * torch.rand(40, generator=seeded(2))
    scale[:3] = torch.tensor([1.0, 2.0, 0.9])
    got = augment.window_warp(x, start, scale)
    for b in range(40):
        s, m = int(start[b]), int(w * float(scale[b]))
        for c in range(2):
            series = x[b, c].numpy()
            warped = np.concatenate([series[:s], resample(series[s : s + w], m), series[s + w :]])
            np.testing.assert_allclose(got[b, c].numpy(), resample(warped, L), rtol=0, atol=1e-12)


def test_window_warp_in_float32_keeps_its_place_in_long_series():
    # On a ramp the value is the position: an error of position would show as such.
    L = 20_000
    x = torch.arange(L, dtype=torch.float64).expand(4, 1, L)
    start, scale = torch.tensor([0, 5, 9000, 11999]), torch.tensor([0.9, 1.3, 1.7, 1.999])
    exact = augment.window_warp(x, start, scale)
    torch.testing.assert_close(augment.window_warp(x.float(), start, scale).double(), exact, rtol=3e-7, atol=1e-6)


def test_window_warp_by_one_changes_nothing():
    x = batch(3, 1, 50)
    assert torch.equal(augment.window_warp(x, torch.tensor([0, 7, 30]), torch.ones(3)), x)


@pytest.mark.parametrize("L", LENGTHS)
def test_slice_and_shuffle_equals_concatenated_slices(L):
    x = batch(60, 2, L)
    cuts = torch.randint(0, L, (60, 3), generator=seeded(1))
    cuts[:4] = torch.tensor([[0, 0, 0], [L - 1, 3, 3], [3, 0, L - 1], [L, L, 0]])
    order = torch.rand(60, 4, generator=seeded(2)).argsort(1)
    got = augment.slice_and_shuffle(x, cuts, order)
    for b in range(60):
        segments = np.split(x[b].numpy(), sorted(cuts[b].tolist()), axis=1)
        np.testing.assert_array_equal(got[b].numpy(), np.concatenate([segments[i] for i in order[b]], axis=1))


def test_random_slice_and_shuffle_permutes_the_samples_of_every_series():
    x = batch(256, 1, 37)
    y = Augment("slice")(x, seeded())
    assert torch.equal(y.sort(-1).values, x.sort(-1).values)
    assert (y != x).any(-1).float().mean() > 0.9  # 1 of 24 orders is the identity


@pytest.mark.parametrize("L", LENGTHS)
def test_crop_equals_resampled_window(L):
    x = batch(20, 2, L)
    w = L - round(0.4 * L)
    start = torch.randint(0, L - w + 1, (20,), generator=seeded(1))
    start[:2] = torch.tensor([0, L - w])
    got = augment.crop(x, start)
    for b in range(20):
        window = x[b, :, start[b] : start[b] + w].numpy()
        expected = np.stack([resample(channel, L) for channel in window])
        np.testing.assert_allclose(got[b].numpy(), expected, rtol=0, atol=1e-12)


def test_noise_window_touches_the_window_only():
    x, noise = batch(3, 2, 20), torch.full((3, 2, 20), 5.0, dtype=torch.float64)
    y = augment.noise_window(x, noise, torch.tensor([0, 4, 12]))
    for b, start in enumerate([0, 4, 12]):
        expected = x[b].clone()
        expected[:, start : start + 8] += 5
        assert torch.equal(y[b], expected)


def test_slope_flip_and_amplitude_by_hand():
    x = torch.tensor([[[1.0, 2, 4]], [[3.0, 5, 9]]])
    assert augment.slope(x, torch.tensor([0.5, -1])).tolist() == [[[1, 2.5, 5]], [[3, 4, 7]]]
    assert augment.flip(x, torch.tensor([True, False])).tolist() == [[[4, 2, 1]], [[3, 5, 9]]]
    assert augment.amplitude_resize(x, torch.tensor([2.0, -1])).tolist() == [[[2, 4, 8]], [[-3, -5, -9]]]


@pytest.mark.parametrize("K", [2, 3, 4, 6])
def test_magnitude_warp_is_the_natural_cubic_spline_through_the_knots(K):
    L = 60 * (K - 1) + 1
    knots = torch.randn(5, K, generator=seeded(), dtype=torch.float64)
    curve = augment.magnitude_warp(torch.ones(5, 2, L, dtype=torch.float64), knots)
    assert torch.equal(curve[:, 0], curve[:, 1])
    curve = curve[:, 0]
    torch.testing.assert_close(curve[:, ::60], knots)
    # A cubic between knots, one curvature on both sides of a knot, none at the ends.
    second = curve.diff(n=2, dim=1)  # [5, L - 2], the curvature at t = 1 .. L - 2 where a cubic surrounds t
    third = second.unfold(1, 59, 60).diff(dim=2)  # [5, K - 1, 58]
    torch.testing.assert_close(third, third[:, :, :1].expand_as(third), rtol=0, atol=1e-12)
    third = third[:, :, 0]
    after, before = second[:, ::60] - third, second[:, 58::60] + third  # at the first and the last knot of every piece
    torch.testing.assert_close(before[:, :-1], after[:, 1:], rtol=0, atol=1e-12)
    assert after[:, 0].abs().max() < 1e-12 and before[:, -1].abs().max() < 1e-12


def test_magnitude_warp_equals_scipy():
    interpolate = pytest.importorskip("scipy.interpolate")
    knots = torch.randn(3, 4, generator=seeded(), dtype=torch.float64)
    curve = augment.magnitude_warp(torch.ones(3, 1, 97, dtype=torch.float64), knots)[:, 0]
    spline = interpolate.CubicSpline(np.linspace(0, 96, 4), knots.numpy(), axis=1, bc_type="natural")
    np.testing.assert_allclose(curve.numpy(), spline(np.arange(97)), rtol=0, atol=1e-12)


def test_draws_of_the_window(monkeypatch):
    drawn = {}
    monkeypatch.setattr(augment, "window_warp", lambda x, start, scale, window: drawn.update(start=start, scale=scale))
    augment.random_window_warp(torch.zeros(20_000, 1, 50), seeded())
    start, scale = drawn["start"], drawn["scale"]
    assert (start.min(), start.max()) == (0, 29)  # [0, L - w), w = 20
    assert (start.bincount() - 20_000 / 30).abs().max() < 5 * (20_000 / 30) ** 0.5
    assert scale.min() >= 0.9 and scale.max() < 2.0
    assert abs(scale.mean() - 1.45) < 0.01 and abs(scale.std() - 1.1 / 12**0.5) < 0.01
    assert abs(torch.corrcoef(torch.stack([start.float(), scale]))[0, 1]) < 0.03


def test_draws_of_the_slices(monkeypatch):
    drawn = {}
    monkeypatch.setattr(augment, "slice_and_shuffle", lambda x, cuts, order: drawn.update(cuts=cuts, order=order))
    augment.random_slice_and_shuffle(torch.zeros(24_000, 1, 10), seeded())
    cuts, order = drawn["cuts"], drawn["order"]
    assert (cuts.flatten().bincount() - 7200).abs().max() < 5 * 7200**0.5
    assert len(cuts.flatten().bincount()) == 10
    code = (order * torch.tensor([64, 16, 4, 1])).sum(1)
    counts = code.unique(return_counts=True)[1]
    assert len(counts) == 24 and (counts - 1000).abs().max() < 5 * 1000**0.5


def test_moments_of_noise_amplitude_slope_and_flip():
    ones = torch.ones(4000, 1, 16)
    noise = Augment("gauss")(ones, seeded()) - 1
    assert abs(noise.mean()) < 1e-3 and abs(noise.std() - 0.05) < 1e-3
    factor = Augment("amplitude_resize")(ones, seeded())[:, 0, 0]
    assert abs(factor.mean() - 1) < 0.02 and abs(factor.std() - 0.2) < 0.01
    rate = Augment("slope")(ones, seeded())[:, 0].diff(dim=1)[:, 0]
    assert rate.abs().max() <= 0.005 + 1e-6 and abs(rate.std() - 0.01 / 12**0.5) < 2e-4
    ramp = torch.arange(16.0).expand(4000, 1, 16)
    assert abs((Augment("flip")(ramp, seeded())[:, 0, 0] == 15).float().mean() - 0.5) < 0.05
    noise = Augment("noise_window")(ones, seeded())[:, 0] - 1
    assert ((noise != 0).sum(1) == 6).all() and abs(noise[noise != 0].std() - 0.05) < 1e-3
    start = (noise != 0).float().argmax(1)
    assert (start.min(), start.max()) == (0, 9)
    knots = Augment("magnitude_warp")(ones, seeded())[:, 0, [0, 5, 10, 15]]
    assert (knots.mean(0) - 1).abs().max() < 0.02 and (knots.std(0) - 0.2).abs().max() < 0.01
    assert torch.corrcoef(knots.T).triu(1).abs().max() < 0.06
    first = Augment("random_crop")(ramp, seeded())[:, 0, 0]
    assert first.unique().tolist() == list(range(7))  # windows of 10 among 16 samples


@pytest.mark.parametrize("name", [n for n in OPERATIONS if n not in ("gaussian_noise", "noise_window")])
def test_channels_move_together(name):
    x = batch(16, 1, 33).expand(-1, 3, -1)
    y = Augment([name])(x, seeded())
    assert torch.equal(y[:, 0], y[:, 1]) and torch.equal(y[:, 0], y[:, 2])
    assert not torch.equal(y, x)


@pytest.mark.parametrize("name", ["gaussian_noise", "noise_window"])
def test_noise_is_independent_in_every_channel(name):
    noise = Augment([name])(torch.zeros(500, 2, 40), seeded())
    assert torch.equal(noise[:, 0] != 0, noise[:, 1] != 0)  # one window for both
    assert abs(torch.corrcoef(noise.transpose(0, 1).flatten(1))[0, 1]) < 0.05


@pytest.mark.parametrize("name", NAMES)
def test_seed_shape_dtype_and_input(name):
    for B, C, L, dtype in [
        (4, 1, 8, torch.float32),
        (3, 2, 9, torch.float64),
        (5, 1, 127, torch.bfloat16),
        (0, 1, 16, torch.float32),
    ]:
        x = batch(B, C, L, dtype)
        before = x.clone()
        view = Augment([name])
        y = view(x, seeded(3))
        assert y.shape == x.shape and y.dtype == dtype and y.isfinite().all()
        assert torch.equal(x, before)
        assert torch.equal(y, view(x, seeded(3)))
        if L > 100:
            assert not torch.equal(y, view(x, seeded(4)))


@pytest.mark.parametrize("name", NAMES)
def test_no_read_back(name):
    # A meta tensor has no values, so a step that reads one fails.
    x = torch.empty(4, 2, 33, device="meta")
    assert Augment([name])(x).shape == x.shape


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_one_graph():
    view = Augment(list(OPERATIONS))
    x = batch(4, 2, 33, torch.float32)
    torch.manual_seed(5)
    expected = view(x)
    torch.manual_seed(5)
    assert torch.equal(torch.compile(view.__call__, fullgraph=True, backend="eager")(x), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_cuda_graph(name):
    view = Augment([name])
    x = batch(64, 2, 100, torch.float32).cuda()
    view(x)
    graph = torch.cuda.CUDAGraph()
    generator = torch.Generator("cuda").manual_seed(3)
    graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        y = view(x, generator)
    graph.replay()
    first = y.clone()
    graph.replay()
    assert y.isfinite().all() and not torch.equal(y, first)
    torch.testing.assert_close(first, view(x, torch.Generator("cuda").manual_seed(3)))


def test_operations_run_in_order():
    assert Augment(["warp", "gauss"]).operations == ("window_warp", "amplitude_resize", "gaussian_noise")
    assert Augment("slice").operations == ("slice_and_shuffle",)
    x = batch(4, 1, 32)
    generator = seeded(7)
    by_hand = augment.random_amplitude_resize(augment.random_window_warp(x, generator), generator)
    assert torch.equal(Augment("warp")(x, seeded(7)), by_hand)
    assert Augment([])(x) is x


@pytest.mark.parametrize("name", list(OPERATIONS))
def test_what_was_observed_moves_with_the_samples(name):
    """A series of its own places, 0 where not observed: the view is observed where it shows observed places alone."""
    x = torch.rand(64, 2, 50, generator=torch.Generator().manual_seed(1)) + 1
    observed = torch.rand(64, 2, 50, generator=torch.Generator().manual_seed(2)) < 0.8
    augment = Augment(name)
    plain = augment(x, torch.Generator().manual_seed(0))
    view, seen = augment.with_observed(x, observed, torch.Generator().manual_seed(0))
    torch.testing.assert_close(view, plain)
    other, also = augment.with_observed(torch.where(observed, x, 77.0), observed, torch.Generator().manual_seed(0))
    assert torch.equal(seen, also)
    torch.testing.assert_close(view[seen], other[seen], rtol=1e-3, atol=1e-3)
    assert 0.3 < seen.float().mean() <= 0.9
    if name not in ("window_warp", "random_crop"):  # which put samples between samples
        assert seen.sum() == observed.sum()


def test_a_strength_scales_the_operation():
    x = batch(16, 1, 40)
    for name, arguments in (
        ("window_warp", {"scale": (0.95, 1.5)}),
        ("amplitude_resize", {"std": 0.1}),
        ("slice_and_shuffle", {"num_cuts": 2}),  # of 1.5, rounded
        ("gaussian_noise", {"std": 0.025}),
        ("flip", {"probability": 0.25}),
        ("slope", {"rate": 0.0025}),
        ("noise_window", {"std": 0.025}),
        ("magnitude_warp", {"std": 0.1}),
        ("random_crop", {"fraction": 0.2}),
    ):
        view = Augment(f"{name}:0.5")
        assert view.operations == (f"{name}:0.5",)
        torch.testing.assert_close(view(x, seeded()), OPERATIONS[name](x, seeded(), **arguments))
        assert torch.equal(Augment(f"{name}:1.0")(x, seeded()), OPERATIONS[name](x, seeded()))  # the paper's
        assert Augment(f"{name}:2")(x, seeded()).isfinite().all()
    assert Augment(["warp:2", "gauss"]).operations == ("window_warp:2", "amplitude_resize:2", "gaussian_noise")
    assert torch.equal(Augment("flip:2")(x, seeded()), x.flip(-1))
    x = batch(4, 1, 8)
    for name in OPERATIONS:
        assert Augment(f"{name}:2")(x, seeded()).shape == x.shape


def test_refusals():
    for text in ("warp:", "warp:x", "warp:0", "warp:-1", "warp:2.1", "warp:nan"):
        with pytest.raises(UserError, match=rf"strength is above 0 and at most 2, such as warp:0.5; got '{text}'"):
            Augment(text)
    with pytest.raises(
        UserError, match=r"no augmentation 'window_wrap' \(did you mean 'window_warp'\?\).*gauss, slice"
    ):
        Augment(["gauss", "window_wrap"])
    with pytest.raises(UserError, match="no augmentation 'jitter': recipes"):
        Augment("jitter")
    for x in (torch.zeros(4, 32), torch.zeros(4, 1, 7), torch.zeros(4, 1, 32, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"\[B, C, L\] with L >= 8; got"):
            Augment("gauss")(x)
