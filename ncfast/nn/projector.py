"""The projector between pooled latents and the SSL loss."""

import torch
from torch import Tensor, nn

from ncfast.nn.encoder_decoder import count_batches, normalised
from ncfast.ops import iter_norm


class IterNorm(nn.Module):
    """`ops.iter_norm` of the batch, then a learned scale and shift. No running statistics: it only ever trains."""

    def __init__(self, dim: int, groups: int = 64) -> None:
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:  # [N, dim]
        return iter_norm(x, groups=self.groups) * self.weight + self.bias


class Projector(nn.Module):
    """Linear, BatchNorm, ReLU, `layers` - 1 times, and a last Linear [, IterNorm], on both views at once.

    Both views share each matrix product; every normalisation takes its statistics from one view at a time, so the
    result is that of two separate calls, view b first (the authors' order, which the running statistics remember).
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        *,
        out_dim: int | None = None,
        layers: int = 3,
        bias: bool = False,
        whiten: bool = False,
        groups: int = 64,
    ) -> None:
        """
        Args:
            dim: width of the layers before the last.
            out_dim: width of the last; None: as the others.
            bias: of the last layer.
        """
        super().__init__()
        out_dim = dim if out_dim is None else out_dim
        widths = [in_dim, *[dim] * (layers - 1), out_dim]
        # Without bias: the norms, and after the last layer some of the losses, take away what all rows have in common,
        # so that its gradient would be zero.
        self.linears = nn.ModuleList(
            [nn.Linear(widths[i], widths[i + 1], bias=bias and i == layers - 1) for i in range(layers)]
        )
        self.norms = nn.ModuleList([nn.BatchNorm1d(dim) for _ in range(layers - 1)])
        self.whiten = IterNorm(out_dim, min(groups, out_dim)) if whiten else nn.Identity()

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled latents of the two views, [N, in_dim] each -> projections [N, out_dim] each."""
        x = torch.cat([b, a])
        fused = x.is_cuda and b.shape == a.shape and self.training
        if fused:
            count_batches(self, 2)
        for linear, norm in zip(self.linears, self.norms, strict=False):
            x = linear(x)
            if fused:
                x = normalised(norm, x[:, :, None, None], slope=0.0, views=2).flatten(1)
            else:
                x = torch.cat([norm(view) for view in x.split([len(b), len(a)])]).relu()
        b, a = self.linears[-1](x).split([len(b), len(a)])
        return self.whiten(a), self.whiten(b)


def pool(z: Tensor) -> Tensor:
    """Global average and maximum: z [B, D, H, W] -> [B, 2D]."""
    # Quantised vectors repeat, so the maximum is often shared: max pooling would send its whole gradient to the first,
    # always; amax shares it out.
    return torch.cat([z.mean((2, 3)), z.amax((2, 3))], dim=1)
