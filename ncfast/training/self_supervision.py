"""The self-supervised losses of `--ssl`, each with its weight, on projected latents (NC-VQVAE, section 3).

A new loss takes a row in the tables here and its name in `config.Config.ssl`.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ncfast.config import Config
from ncfast.nn.projector import Projector, pool
from ncfast.ops import barlow_twins_loss, vibcreg_loss, vicreg_loss
from ncfast.training.ssl_losses import (
    byol_loss,
    ntxent_loss,
    random_directions,
    sigreg_loss,
    simsiam_loss,
    visreg_loss,
)

SSL_LOSSES: dict[str, Callable[..., Tensor]] = {
    "barlow": barlow_twins_loss,
    "vicreg": vicreg_loss,
    "vibcreg": vibcreg_loss,
    "ntxent": ntxent_loss,
    "byol": byol_loss,
    "simsiam": simsiam_loss,
    "sigreg": sigreg_loss,
    "visreg": visreg_loss,
}
# The first three are the authors'; the others were chosen on held-out series (docs/experiments.md).
SSL_WEIGHTS = {
    "barlow": 1.0,
    "vicreg": 0.01,
    "vibcreg": 0.01,
    "ntxent": 0.1,
    "byol": 1.0,
    "simsiam": 1.0,
    "sigreg": 1.0,
    "visreg": 0.1,
}
# Arguments of `Projector` where it is not the authors'. The last layer has a bias unless its gradient is zero: losses
# that centre their rows take it away, and so does the predictor's batch norm. Output widths and depths are the papers';
# SimSiam's batch norm of the output, which its table 3 finds to matter little, is left out.
PROJECTORS: dict[str, dict[str, Any]] = {
    "vibcreg": {"whiten": True},
    "ntxent": {"layers": 2, "out_dim": 128, "bias": True},
    "byol": {"layers": 2, "out_dim": 256},
    "sigreg": {"out_dim": 128, "bias": True},
    "visreg": {"out_dim": 128, "bias": True},
}
SKETCHED = ("sigreg", "visreg")  # their losses look along random directions
DIRECTIONS = 256  # of a step
# Width of the predictor's hidden layer as a share of the projector's: a bottleneck of a quarter in SimSiam.
PREDICTORS = {"byol": 1.0, "simsiam": 0.25}
TARGET_DECAY = 0.99  # of BYOL's target
WITHOUT_LOSS = ("none", "views")  # values of --ssl


class SelfSupervision(nn.Module):
    """weight · L(P(pool(z_a)), P(pool(z_b))): the projector P trains with stage 1 and is then thrown away.

    BYOL and SimSiam have a predictor behind the projector. BYOL's target is a moving average of the projector alone:
    an average of the encoder too would have to encode both views again, twice the work of stage 1, and here the
    reconstruction already keeps the encoder from collapsing. Its decay is constant, since a training of 2000 steps is
    short against the papers' of 0.996 and more.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.method = config.ssl
        self.projector = Projector(2 * config.dim, config.projector_dim, **PROJECTORS.get(config.ssl, {}))
        self.loss = SSL_LOSSES[config.ssl]
        self.weight = SSL_WEIGHTS[config.ssl] if config.ssl_weight is None else config.ssl_weight
        if config.ssl in PREDICTORS:
            width = self.projector.linears[-1].out_features
            hidden = max(1, int(PREDICTORS[config.ssl] * config.projector_dim))
            self.predictor = Projector(width, hidden, out_dim=width, layers=2, bias=True)
        if config.ssl == "byol":
            self.target = without_parameters(copy.deepcopy(self.projector))

    def forward(
        self,
        z_a: Tensor,
        z_b: Tensor,
        gather: Callable[[Tensor], Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Latent grids of the two views, [B, D, H, W'] each -> scalar.

        gather: of a batch over several processes, own rows [n_r, ...] -> those of all [B, ...], with a gradient. What
            comes after pooling, projector and loss, each process computes from all rows: the projector is too small to
            be worth sharing out, and its gradients, 138 MB at the paper's width, too large to be worth sending.
        generator: on their device, the same on every process; only the losses of `SKETCHED` draw from it.
        """
        a, b = pool(torch.cat([z_a, z_b])).chunk(2)
        if gather is not None:
            a, b = gather(torch.cat([a, b], 1)).chunk(2, 1)
        return self.weight * self.projected_loss(a, b, generator)

    def projected_loss(self, a: Tensor, b: Tensor, generator: torch.Generator | None) -> Tensor:
        """Pooled latents of all rows, [N, 2D] each -> L, without its weight."""
        views = self.projector(a, b)
        if self.method in SKETCHED:
            return self.loss(*views, random_directions(views[0], DIRECTIONS, generator))
        if self.method not in PREDICTORS:
            return self.loss(*views)
        targets = views
        if self.method == "byol":
            with torch.no_grad():
                if self.training:
                    self.update_target()
                targets = self.target(a, b)
        return self.loss(*self.predictor(*views), *targets)

    def update_target(self) -> None:
        """target <- decay · target + (1 - decay) · projector: with the weights that the last step has left."""
        # Before a step's forward pass in place of after the step before it, which is the same: at first both are alike.
        averages = dict(self.target.named_buffers())
        for name, parameter in self.projector.named_parameters():
            averages[name].lerp_(parameter, 1 - TARGET_DECAY)


def without_parameters(module: nn.Module) -> nn.Module:
    """Its parameters as buffers: part of its state, with nothing for an optimiser."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            delattr(part, name)
            part.register_buffer(name, parameter.detach())
    return module
