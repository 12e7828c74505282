"""The SSL losses as modules, for code that builds its loss from a configuration and prints it with the model."""

import inspect
from collections.abc import Callable

from torch import Tensor, nn

from ncfast.ops import barlow_twins_loss, vibcreg_loss, vicreg_loss


class SSLLoss(nn.Module):
    """A loss of two views [N, D]. Keyword arguments, kept as attributes, and errors are those of its function."""

    function: Callable[..., Tensor]

    def __init_subclass__(cls) -> None:
        options = [p for p in inspect.signature(cls.function).parameters.values() if p.kind is p.KEYWORD_ONLY]
        cls.__signature__ = inspect.Signature(options)

    def __init__(self, **options: object) -> None:
        super().__init__()
        bound = self.__signature__.bind(**options)
        bound.apply_defaults()
        self.option_names = tuple(bound.arguments)
        for name, value in bound.arguments.items():
            setattr(self, name, value)

    def forward(self, za: Tensor, zb: Tensor) -> Tensor:
        return self.function(za, zb, **{name: getattr(self, name) for name in self.option_names})

    def extra_repr(self) -> str:
        values = ((name, getattr(self, name)) for name in self.option_names)
        return ", ".join(
            f"group of {value.size()}" if name == "group" else f"{name}={value!r}"
            for name, value in values
            if value is not None
        )


class BarlowTwinsLoss(SSLLoss):
    """`ops.barlow_twins_loss`."""

    function = staticmethod(barlow_twins_loss)


class VICRegLoss(SSLLoss):
    """`ops.vicreg_loss`."""

    function = staticmethod(vicreg_loss)


class VIbCRegLoss(SSLLoss):
    """`ops.vibcreg_loss`."""

    function = staticmethod(vibcreg_loss)
