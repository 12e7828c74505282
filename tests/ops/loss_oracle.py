"""The SSL losses in float64, with the D x D matrix written out, and how kernels are held against them."""

import importlib

import torch

from ncfast.ops import barlow_twins_loss, vibcreg_loss, vicreg_loss


def off_diagonal(matrix):
    return matrix - torch.diag(matrix.diagonal())


class Oracle:
    """A loss and its gradient in float64, and what the gradient is before a column's own length takes its share off.

    Between two rows, or along one column, a standardised column cannot move but in sign: all of the gradient cancels.
    `uncancelled` is the size that rounding is then to be measured by.
    """

    def __init__(self, name, za, zb, options):
        self.standardised = []
        za, zb = (z.double().requires_grad_() for z in (za, zb))
        self.loss = getattr(self, name)(za, zb, **options)
        grads = torch.autograd.grad(self.loss, (za, zb, *(a for a, _ in self.standardised)))
        self.grads = grads[:2]
        self.uncancelled = [
            (grad / s).norm().item() for grad, (_, s) in zip(grads[2:], self.standardised, strict=True)
        ] or [0, 0]

    def divide(self, z, s):
        self.standardised.append((z / s, s.detach()))
        return self.standardised[-1][0]

    def barlow_twins_loss(self, za, zb, lambd, ddof, eps, eps_std, scale):
        N, D = za.shape
        stds = (z.std(0, correction=ddof) if eps == 0 else (z.var(0, correction=ddof) + eps).sqrt() for z in (za, zb))
        za, zb = (self.divide(z - z.mean(0), std + eps_std) for z, std in zip((za, zb), stds, strict=True))
        c = za.T @ zb / N
        loss = (1 - c.diagonal()).square().sum() + lambd * off_diagonal(c).square().sum()
        return loss * (1 / D if scale is None else scale)

    def with_variance(self, za, zb, sim, var, eps, var_reduction):
        hinges = [torch.relu(1 - (z.var(0) + eps).sqrt()).mean() for z in (za, zb)]
        variance = sum(hinges) / (2 if var_reduction == "mean" else 1)
        return sim * (za - zb).square().mean() + var * variance

    def vicreg_loss(self, za, zb, sim, var, cov, eps, var_reduction):
        N, D = za.shape
        centred = [z - z.mean(0) for z in (za, zb)]
        covariance = sum(off_diagonal(z.T @ z / (N - 1)).square().sum() / D for z in centred)
        return self.with_variance(za, zb, sim, var, eps, var_reduction) + cov * covariance

    def vibcreg_loss(self, za, zb, sim, var, cov, eps, var_reduction):
        unit = [self.divide(z - z.mean(0), (z - z.mean(0)).norm(dim=0).clamp_min(1e-12)) for z in (za, zb)]
        correlation = sum(off_diagonal(z.T @ z).square().mean() for z in unit)
        return self.with_variance(za, zb, sim, var, eps, var_reduction) + cov * correlation


LOSSES = {loss.__name__: loss for loss in (barlow_twins_loss, vicreg_loss, vibcreg_loss)}
# The package has a function of the same name as each module.
CONVENTIONS = {name: importlib.import_module(f"ncfast.ops.{name}").CONVENTIONS for name in LOSSES}
OPTIONS = {
    "barlow_twins_loss": [0.005, 1, 0.0, 1e-8, 0.25],
    "vicreg_loss": [25.0, 25.0, 1.0, 1e-4],
    "vibcreg_loss": [25.0, 25.0, 100.0, 1e-4],
}


def views(N, D, *, offset=0.0, seed=0):
    """Correlated views float32 [N, D], some of whose columns are within VICReg's hinge and some beyond."""
    generator = torch.Generator().manual_seed(seed + 1000 * N + D)
    za = torch.randn(N, D, generator=generator) * (0.5 + torch.rand(D, generator=generator)) + 0.3 + offset
    return za, za + 0.4 * torch.randn(N, D, generator=generator) - 0.1


def check(run, name, za, zb, *, convention="ncvqvae", upstream=1.0, tolerance=1e-5, oracle=None, **options):
    """`run(name, za, zb, ...)` -> loss, gradients, on the CPU."""
    N, D = za.shape
    oracle = oracle or Oracle(name, za, zb, {**CONVENTIONS[name][convention], **options})
    loss, *grads = run(name, za, zb, convention=convention, upstream=upstream, **options)
    torch.testing.assert_close(loss.double(), oracle.loss, rtol=tolerance, atol=1e-7)
    for grad, exact, uncancelled in zip(grads, oracle.grads, oracle.uncancelled, strict=True):
        assert grad.shape == exact.shape
        scale = exact.norm() + (uncancelled if N == 2 or D == 1 else 0)
        assert (grad - upstream * exact).norm() <= abs(upstream) * tolerance * scale
