"""Modules, imported when they are asked for: `ncfast.nn.ssl_losses`, `ncfast.nn.vector_quantize`, ..."""

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    try:
        return import_module(f"ncfast.nn.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"ncfast.nn.{name}":
            raise
        raise AttributeError(f"module 'ncfast.nn' has no attribute {name!r}") from None
