"""Activations: harvested from a model or brought by the user, stored as rows, read as shuffled batches.

The names load on first use: configurations mention ``Corruption`` without waiting for jax or tensorstore.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .corruption import Corruption
    from .harvesting import harvest, rows_of
    from .reader import BatchIterator
    from .store import COLUMNS, ActivationStore
    from .stream import ActivationStream

__all__ = ["COLUMNS", "ActivationStore", "ActivationStream", "BatchIterator", "Corruption", "harvest", "rows_of"]

_HOMES = {
    "COLUMNS": "store",
    "ActivationStore": "store",
    "ActivationStream": "stream",
    "BatchIterator": "reader",
    "Corruption": "corruption",
    "harvest": "harvesting",
    "rows_of": "harvesting",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    found = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = found
    return found
