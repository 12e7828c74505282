"""NC-VQVAE time-series generation (arXiv 2408.16613)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ncfast.version import __version__

if TYPE_CHECKING:
    from ncfast import data as data
    from ncfast import evaluation as evaluation
    from ncfast import nn as nn
    from ncfast import ops as ops
    from ncfast.errors import UserError
    from ncfast.jobs.reader import Generated, open_generated
    from ncfast.ncvqvae import NCVQVAE, load
    from ncfast.nn.vector_quantize import VectorQuantize
    from ncfast.ops import nearest_code
    from ncfast.training.fit import fit

__all__ = [
    "NCVQVAE",
    "Generated",
    "UserError",
    "VectorQuantize",
    "__version__",
    "fit",
    "load",
    "nearest_code",
    "open_generated",
]

# Imported when they are asked for: torch alone takes seconds, which `--help` need not.
_MODULES = {
    "NCVQVAE": "ncfast.ncvqvae",
    "Generated": "ncfast.jobs.reader",
    "UserError": "ncfast.errors",
    "VectorQuantize": "ncfast.nn.vector_quantize",
    "fit": "ncfast.training.fit",
    "load": "ncfast.ncvqvae",
    "nearest_code": "ncfast.ops",
    "open_generated": "ncfast.jobs.reader",
}
_ROOMS = ("data", "evaluation", "nn", "ops")


if not TYPE_CHECKING:  # to type checkers, a name that is not listed above is a mistake

    def __getattr__(name: str) -> Any:
        if name in _ROOMS:
            return import_module(f"ncfast.{name}")
        if name not in _MODULES:
            raise AttributeError(f"module 'ncfast' has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(_MODULES[name]), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS})
