"""The SSL losses as modules, for code that builds its loss from a configuration and prints it with the model."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ncfast.ops import barlow_twins_loss, vibcreg_loss, vicreg_loss


class SSLLoss(nn.Module):
    """A loss of two views with its keyword arguments, kept as attributes."""

    function: Callable[..., Tensor]

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.option_names = tuple(options)
        for name, value in options.items():
            setattr(self, name, value)

    def forward(self, za: Tensor, zb: Tensor) -> Tensor:  # [N, D] each -> scalar
        return self.function(za, zb, **{name: getattr(self, name) for name in self.option_names})

    def extra_repr(self) -> str:
        options = ((name, getattr(self, name)) for name in self.option_names)
        # What is None follows the convention; a process group has no words of its own.
        return ", ".join(
            f"{name}={value!r}" if name != "group" else f"group of {value.size()}"
            for name, value in options
            if value is not None
        )


class BarlowTwinsLoss(SSLLoss):
    """`ops.barlow_twins_loss`; arguments, shapes and errors as there."""

    function = staticmethod(barlow_twins_loss)

    def __init__(
        self,
        *,
        lambd: float | None = None,
        ddof: int | None = None,
        eps: float | None = None,
        eps_std: float | None = None,
        scale: float | None = None,
        convention: str = "ncvqvae",
        route: str = "auto",
        impl: str = "auto",
        group: torch.distributed.ProcessGroup | None = None,
        gradient: str = "true",
    ) -> None:
        super().__init__(
            lambd=lambd,
            ddof=ddof,
            eps=eps,
            eps_std=eps_std,
            scale=scale,
            convention=convention,
            route=route,
            impl=impl,
            group=group,
            gradient=gradient,
        )


class VICRegLoss(SSLLoss):
    """`ops.vicreg_loss`; arguments, shapes and errors as there."""

    function = staticmethod(vicreg_loss)

    def __init__(
        self,
        *,
        sim: float | None = None,
        var: float | None = None,
        cov: float | None = None,
        eps: float | None = None,
        var_reduction: str | None = None,
        convention: str = "ncvqvae",
        route: str = "auto",
        impl: str = "auto",
        group: torch.distributed.ProcessGroup | None = None,
        gradient: str = "true",
    ) -> None:
        super().__init__(
            sim=sim,
            var=var,
            cov=cov,
            eps=eps,
            var_reduction=var_reduction,
            convention=convention,
            route=route,
            impl=impl,
            group=group,
            gradient=gradient,
        )


class VIbCRegLoss(VICRegLoss):
    """`ops.vibcreg_loss`; arguments, shapes and errors as there."""

    function = staticmethod(vibcreg_loss)
