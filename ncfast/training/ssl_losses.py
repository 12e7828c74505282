"""Self-supervised losses in plain PyTorch: NT-Xent, BYOL, SimSiam, SIGReg and VISReg.

Those of `ncfast.ops` (Barlow Twins, VICReg, VIbCReg) have kernels; these take less time than the projector before them.
Each takes the projections of two views, [N, D] of any float dtype, and returns a scalar in float32 (float64 for float64
input), whatever the autocast state. Views that are not alike, or have too few rows, raise ValueError.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ncfast.ops.gram import check_views
from ncfast.ops.vicreg_loss import variance_hinge


def ntxent_loss(za: Tensor, zb: Tensor, *, temperature: float = 0.5) -> Tensor:
    """NT-Xent, the loss of SimCLR (Chen et al., arXiv 2002.05709, eq. 1), mean over the 2N rows.

        l_i = -log [exp(cos(z_i, z_j) / temperature) / Σ_{k≠i} exp(cos(z_i, z_k) / temperature)]

    z_j is the other view of z_i, and k runs over all other rows of both views.

    Args:
        za, zb: [N, D], N >= 2: a single series has nothing to be told from.
    """
    with torch.autocast(za.device.type, enabled=False):
        za, zb = check_views("ntxent_loss", za, zb)
        N = len(za)
        z = F.normalize(torch.cat([za, zb]), dim=1)
        rows = torch.arange(2 * N, device=z.device)
        logits = (z @ z.T / temperature).masked_fill(rows[:, None] == rows, float("-inf"))
        return F.cross_entropy(logits, (rows + N) % (2 * N))


def byol_loss(pa: Tensor, pb: Tensor, target_a: Tensor, target_b: Tensor) -> Tensor:
    """BYOL (Grill et al., arXiv 2006.07733, eq. 2 and its symmetric twin): 0 to 8.

        L = mean [2 - 2 cos(pa, target_b)] + mean [2 - 2 cos(pb, target_a)]

    Args:
        pa, pb: predictions from the views, [N, D], N >= 1.
        target_a, target_b: target projections of the views, as those; without gradient.
    """
    return 4 + 4 * simsiam_loss(pa, pb, target_a, target_b)


def simsiam_loss(pa: Tensor, pb: Tensor, za: Tensor, zb: Tensor) -> Tensor:
    """SimSiam (Chen & He, arXiv 2011.10566, eq. 1 to 4): -1 to 1.

        L = -½ mean cos(pa, stopgrad(zb)) - ½ mean cos(pb, stopgrad(za))

    Args:
        pa, pb: predictions from the views, [N, D], N >= 1.
        za, zb: projections of the views, as those; no gradient goes through them.
    """
    with torch.autocast(pa.device.type, enabled=False):
        pa, zb = check_views("simsiam_loss", pa, zb.detach(), least=1)
        pb, za = check_views("simsiam_loss", pb, za.detach(), least=1)
        return -(F.cosine_similarity(pa, zb).mean() + F.cosine_similarity(pb, za).mean()) / 2


def sigreg_loss(za: Tensor, zb: Tensor, directions: Tensor, *, lambd: float = 0.05) -> Tensor:
    """LeJEPA (Balestriero & LeCun, arXiv 2511.08544, algorithms 1 and 2): prediction and SIGReg.

        L = (1 - lambd) · mean_v MSE(z_v, (za + zb) / 2) + lambd · mean_v epps_pulley(z_v @ directions)

    Args:
        za, zb: [N, D], N >= 2.
        directions: [D, K], see `random_directions`.
    """
    with torch.autocast(za.device.type, enabled=False):
        za, zb = check_views("sigreg_loss", za, zb)
        sketched = torch.cat(
            [za @ directions, zb @ directions], 1
        )  # all 2K are alike many rows: one mean for both views
        return (1 - lambd) * F.mse_loss(za, zb) / 4 + lambd * epps_pulley(sketched)


def epps_pulley(x: Tensor) -> Tensor:
    """Mean over K of the Epps-Pulley statistics of N values each against N(0, 1).  x [N, K] -> scalar.

        T = N ∫ |mean_n exp(i t x_n) - exp(-t²/2)|² exp(-t²/2) dt

    By the trapezoidal rule with 17 knots on [-5, 5], as in the paper. T of normal values is 1.06 on average.
    """
    # The integrand is even: knots at t >= 0 alone, those above 0 counting twice, and the last one half of that.
    # (A number put into an element, weight[0] = ..., would be copied from the host, which a CUDA graph cannot.)
    t = torch.linspace(0, 5, 9, dtype=x.dtype, device=x.device)
    weight = 5 / 8 * (1 + ((t > 0) & (t < 5)).to(t))
    normal = torch.exp(-t.square() / 2)
    angles = x[:, :, None] * t  # [N, K, 9]
    distance = (angles.cos().mean(0) - normal).square() + angles.sin().mean(0).square()  # [K, 9]
    return len(x) * (distance @ (weight * normal)).mean()


def visreg_loss(
    za: Tensor, zb: Tensor, directions: Tensor, *, sim: float = 1.0, var: float = 1.0, sliced: float = 1.0
) -> Tensor:
    """Variance, invariance and a sliced Wasserstein distance to the normal distribution (VISReg, arXiv 2606.02572).

        L = sim · MSE(za, zb) + Σ_v [var · v(z_v) + sliced · sliced_wasserstein(z_v @ directions)]

    v is the hinge of VICReg, mean_i relu(1 - sqrt(var_i + 1e-4)). The weights of the terms are ours.

    Args:
        za, zb: [N, D], N >= 2.
        directions: [D, K], see `random_directions`.
    """
    with torch.autocast(za.device.type, enabled=False):
        za, zb = check_views("visreg_loss", za, zb)
        regular = sum(var * variance_hinge(z, 1e-4) + sliced * sliced_wasserstein(z @ directions) for z in (za, zb))
        return sim * F.mse_loss(za, zb) + regular


def sliced_wasserstein(x: Tensor) -> Tensor:
    """Mean over K of the squared Wasserstein-2 distances of N values each to N(0, 1).  x [N, K] -> scalar.

    Sorted, the values are held against the quantiles of (n + ½) / N.
    """
    N = len(x)
    shares = (torch.arange(N, dtype=torch.float64, device=x.device) + 0.5) / N
    quantiles = math.sqrt(2) * torch.erfinv(2 * shares - 1)
    return (x.sort(0).values - quantiles[:, None].to(x.dtype)).square().mean()


def random_directions(like: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """Unit vectors, uniform on the sphere, as columns: like [N, D] -> [D, count], float32 (float64 for float64)."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    drawn = torch.randn(like.shape[1], count, generator=generator, dtype=dtype, device=like.device)
    return F.normalize(drawn, dim=0)
