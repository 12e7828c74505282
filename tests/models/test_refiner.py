"""The refiner: its noise, its steps, and a case whose flow is known."""

import torch
from torch.nn import functional as F

from ncfast.models.refiner import Refiner, noise_of
from ncfast.training.stage3 import stage3_losses


def test_noise_is_normal_and_independent():
    tokens = torch.randint(0, 128, (2000, 27), generator=torch.Generator().manual_seed(0))
    noise = noise_of(tokens, 2, 50)
    assert noise.shape == (2000, 2, 50) and noise.dtype == torch.float32
    N = noise.numel()
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(noise.double().pow(power).mean() - expected) < 4 * (variance / N) ** 0.5
    for a, b in (
        (noise[..., 1:], noise[..., :-1]),  # in time
        (noise[:, 0], noise[:, 1]),  # of the channels
        (noise[1:], noise[:-1]),  # of series
    ):
        assert abs((a * b).double().mean()) < 4 / a.numel() ** 0.5


def test_noise_depends_on_all_tokens_and_their_places_alone():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 128, (40, 9), generator=generator)
    noise, order = noise_of(tokens, 1, 30), torch.randperm(40, generator=generator)
    assert torch.equal(noise_of(tokens[order], 1, 30), noise[order])
    assert torch.equal(noise_of(tokens[3:4], 1, 30), noise[3:4])
    others = [tokens[:1].roll(k, 1) for k in range(9)]  # the same tokens elsewhere
    others += [tokens[:1] + F.one_hot(torch.tensor([k]), 9) for k in range(9)]  # one more
    # Whose sums weighted by place and by its square are those of `tokens`.
    others += [tokens[:1] + F.pad(torch.tensor([[1, -3, 3, -1]]), (k, 5 - k)) for k in range(6)]
    found = noise_of(torch.cat(others), 1, 30)[:, 0]
    assert len(found.unique(dim=0)) == len(others)
    apart = found - found.mean(0)
    correlation = F.normalize(apart, dim=1) @ F.normalize(apart, dim=1).T
    assert (correlation - torch.eye(len(found))).abs().max() < 0.9


class Known(Refiner):
    """With a velocity that is given."""

    def __init__(self, velocity):
        super().__init__(1, 4)
        self.velocity = velocity
        self.sigma.fill_(0.5)

    def forward(self, x, t, x_hat):
        return self.velocity((x - x_hat) / self.sigma, t[:, None, None])


def test_refining_is_eulers_method():
    generator = torch.Generator().manual_seed(0)
    x_hat, noise = (torch.randn(3, 1, 20, generator=generator) for _ in range(2))

    def refined(velocity, steps):
        return (Known(velocity).refine(x_hat, noise, steps) - x_hat) / 0.5

    torch.testing.assert_close(refined(lambda z, t: 0 * z + 3, 4), noise + 3)
    torch.testing.assert_close(refined(lambda z, t: 0 * z + t, 4), noise + (0 + 1 + 2 + 3) / 16)
    torch.testing.assert_close(refined(lambda z, t: -2 * z, 5), noise * (1 - 2 / 5) ** 5)
    # Straight at 7: the last step, at t = 7/8, arrives.
    torch.testing.assert_close(refined(lambda z, t: (7 - z) / (1 - t), 8), torch.full_like(noise, 7))


def test_it_starts_as_noise_of_the_size_of_what_is_missing():
    refiner = Refiner(2, 4)
    refiner.sigma.copy_(torch.tensor([[2.0], [0.1]]))
    x_hat, noise = torch.randn(3, 2, 20), torch.randn(3, 2, 20)
    torch.testing.assert_close(refiner.refine(x_hat, noise, 5), x_hat + refiner.sigma * noise)


def test_losses_of_the_rows_and_of_what_was_observed():
    torch.manual_seed(0)
    refiner = Refiner(1, 4)
    torch.nn.init.normal_(refiner.last.weight)
    x, x_hat, seen = torch.randn(6, 1, 20), torch.randn(6, 1, 20), torch.rand(6, 1, 20) < 0.7

    def loss(**more):
        return stage3_losses(refiner, x, x_hat, torch.Generator().manual_seed(3), **more)["loss"]

    generator = torch.Generator().manual_seed(3)
    t, noise = torch.rand(6, generator=generator), torch.randn(x.shape, generator=generator)
    at = t[:, None, None] * x + (1 - t[:, None, None]) * (x_hat + noise)
    error = refiner(at, t, x_hat) - (x - x_hat - noise)
    torch.testing.assert_close(loss(), error.square().mean())
    torch.testing.assert_close(loss(observed=seen), (error.square() * seen).mean())
    parts = [loss(local_slice=slice(*own)) for own in ((0, 4), (4, 6), (6, 6))]
    assert parts[2] == 0
    torch.testing.assert_close((4 * parts[0] + 2 * parts[1]) / 6, loss())


def test_a_flow_between_normal_distributions_is_learned():
    """x = x_hat + 3 e, e standard normal and white: of the mixture z = (1 - t) noise + t e, the expected e - noise is
    (2 t - 1) z / ((1 - t)^2 + t^2)."""
    torch.manual_seed(0)
    refiner = Refiner(1, 16)
    refiner.sigma.fill_(3.0)
    optimiser = torch.optim.AdamW(refiner.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(1)

    def batch(rows):
        x_hat = torch.randn(rows, 1, 1, generator=generator).expand(-1, 1, 24)
        return x_hat + 3 * torch.randn(rows, 1, 24, generator=generator), x_hat

    steps = 160
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = 5e-3 * (1 - step / steps)
        optimiser.zero_grad()
        stage3_losses(refiner, *batch(64), generator)["loss"].backward()
        optimiser.step()
    with torch.no_grad():
        x, x_hat = batch(500)
        t = torch.rand(500, generator=generator)
        noise, at = torch.randn(x.shape, generator=generator), t[:, None, None]
        z = (1 - at) * noise + at * (x - x_hat) / 3
        exact = (2 * at - 1) / ((1 - at) ** 2 + at**2) * z
        error = refiner(x_hat + 3 * z, t, x_hat) - exact
        assert error.square().mean() < 0.1 * exact.square().mean()
        made = (refiner.refine(x_hat, noise, 16) - x_hat) / 3
        assert abs(made.std() - 1) < 0.1 and abs(made.mean()) < 0.1
