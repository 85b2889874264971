"""The families of models that can be read and written, by the ``model_type`` of their ``config.json``."""

from types import ModuleType

from dlmscope_jax.errors import UserError

from . import dream, llada, llama, qwen2
from .reading import Fused, Keys, Tensor

FAMILIES: dict[str, ModuleType] = {"Dream": dream, "llada": llada, "llama": llama, "qwen2": qwen2}

__all__ = ["FAMILIES", "Fused", "Keys", "Tensor", "family_of"]


def family_of(model_type: str, where: str) -> ModuleType:
    """The module that reads this kind of model.

    Raises:
      UserError: for a kind that is not supported.
    """
    for name, family in FAMILIES.items():
        if name.lower() == str(model_type).lower():
            return family
    raise UserError(f"{where}: model_type {model_type!r} is not supported; supported: {', '.join(FAMILIES)}")
