"""The self-supervised losses of `--ssl`, each with its weight, on projected latents (NC-VQVAE, section 3).

A new loss takes a row in both tables here, its name in `config.Config.ssl`, and an operation in `ops`.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ncfast.config import Config
from ncfast.nn.projector import Projector, pool
from ncfast.ops import barlow_twins_loss, vibcreg_loss, vicreg_loss

SSL_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "barlow": barlow_twins_loss,
    "vicreg": vicreg_loss,
    "vibcreg": vibcreg_loss,
}
SSL_WEIGHTS = {"barlow": 1.0, "vicreg": 0.01, "vibcreg": 0.01}
WITHOUT_LOSS = ("none", "views")  # values of --ssl


class SelfSupervision(nn.Module):
    """weight · L(P(pool(z_a)), P(pool(z_b))): the projector P trains with stage 1 and is then thrown away."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.projector = Projector(2 * config.dim, config.projector_dim, whiten=config.ssl == "vibcreg")
        self.loss = SSL_LOSSES[config.ssl]
        self.weight = SSL_WEIGHTS[config.ssl] if config.ssl_weight is None else config.ssl_weight

    def forward(self, z_a: Tensor, z_b: Tensor, gather: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Latent grids of the two views, [B, D, H, W'] each -> scalar.

        gather: of a batch over several processes, own rows [n_r, ...] -> those of all [B, ...], with a gradient. What
            comes after pooling, projector and loss, each process computes from all rows: the projector is too small to
            be worth sharing out, and its gradients, 138 MB at the paper's width, too large to be worth sending.
        """
        a, b = pool(z_a), pool(z_b)
        if gather is not None:
            a, b = gather(torch.cat([a, b], 1)).chunk(2, 1)
        return self.weight * self.loss(*self.projector(a, b))
