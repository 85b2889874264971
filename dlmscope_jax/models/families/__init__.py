"""The families of models that can be read and written, by the ``model_type`` of their ``config.json``."""

from collections.abc import Sequence
from types import ModuleType

from dlmscope_jax.errors import UserError

from . import a2d, diffugpt, dream, fast_dllm_v2, gemma2, gpt2, gpt_neox, illada, llada, llama, mdlm, qwen2, qwen3, sdar
from .reading import Fused, Keys, Tensor

FAMILIES: dict[str, ModuleType] = {
    "Dream": dream,
    "Fast_dLLM_Qwen": fast_dllm_v2,
    "a2d-qwen2": a2d,
    "a2d-qwen3": a2d,
    "diffugpt": diffugpt,
    "gemma2": gemma2,
    "gpt2": gpt2,
    "gpt_neox": gpt_neox,
    "illada": illada,
    "llada": llada,
    "llama": llama,
    "mdlm": mdlm,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "sdar": sdar,
}

__all__ = ["FAMILIES", "Fused", "Keys", "Tensor", "family_of"]


def family_of(model_type: str, where: str, architectures: Sequence[str] | None = None) -> ModuleType:
    """The module that reads this kind of model.

    Args:
      model_type: what ``config.json`` calls it, or the ``family`` of a ``ModelConfig``; case does not matter.
      where: the file, for errors.
      architectures: what else ``config.json`` calls it: DiffuGPT's model type is GPT-2's.

    Raises:
      UserError: for a kind that is not supported.
    """
    if str(model_type).lower() == "gpt2" and diffugpt.ARCHITECTURE in (architectures or ()):
        return diffugpt
    for name, family in FAMILIES.items():
        if name.lower() == str(model_type).lower():
            return family
    raise UserError(f"{where}: model_type {model_type!r} is not supported; supported: {', '.join(FAMILIES)}")
