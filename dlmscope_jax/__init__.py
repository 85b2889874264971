"""Dictionaries for diffusion language models and their autoregressive twins, in JAX.

The names below are imported when they are first used, so that ``import dlmscope_jax`` costs nothing.
"""

import importlib
import sys
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

# public name -> the room that offers it
_ROOMS = {
    "UserError": "errors",
    "Tokenizer": "data",
    "Document": "data",
    "Blocks": "data",
    "builtin_blocks": "data",
    "builtin_documents": "data",
    "encode": "data",
    "load_tokenizer": "data",
    "pack": "data",
    "read_documents": "data",
    "DiffusionSpec": "models",
    "Edit": "models",
    "InDictionary": "models",
    "ModelConfig": "models",
    "Transformer": "models",
    "init_params": "models",
    "load_model": "models",
    "logit_lens": "models",
    "model_identity": "models",
    "process_weights": "models",
    "ARSampler": "diffusion",
    "DiffuGPTSampler": "diffusion",
    "DreamSampler": "diffusion",
    "LLaDASampler": "diffusion",
    "MDLMSampler": "diffusion",
    "ParallelSampler": "diffusion",
    "Collect": "diffusion",
    "Trace": "diffusion",
    "align_logits": "diffusion",
    "corrupt": "diffusion",
    "elbo": "diffusion",
    "generate": "diffusion",
    "token_loss": "diffusion",
    "BatchTopK": "dictionaries",
    "Binary": "dictionaries",
    "Bits": "dictionaries",
    "CrossLayer": "dictionaries",
    "Dense": "dictionaries",
    "DictionaryMeta": "dictionaries",
    "FlatSparse": "dictionaries",
    "Gated": "dictionaries",
    "JumpReLU": "dictionaries",
    "LossSettings": "dictionaries",
    "Matryoshka": "dictionaries",
    "ReLU": "dictionaries",
    "RowSparse": "dictionaries",
    "StreamingFidelity": "dictionaries",
    "TopK": "dictionaries",
    "load_dictionary": "dictionaries",
    "save_dictionary": "dictionaries",
    "ActivationStore": "activations",
    "ActivationStream": "activations",
    "Corruption": "activations",
    "harvest": "activations",
    "Progress": "training",
    "TrainSpec": "training",
    "init_state": "training",
    "make_step": "training",
    "train": "training",
    "FeatureRecord": "analysis",
    "bootstrap": "analysis",
    "collect_records": "analysis",
    "delta_loss": "analysis",
    "evaluate": "analysis",
    "find_latents": "analysis",
    "latents_for": "analysis",
    "steer": "analysis",
    "report": "report",
}
__all__ = sorted(_ROOMS)  # pyright: ignore


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module 'dlmscope_jax' has no attribute {name!r}")
    room = importlib.import_module(f"dlmscope_jax.{_ROOMS[name]}")
    if name == _ROOMS[name]:  # the room is called as its function is; see _Room
        return room
    found = getattr(room, name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted([*globals(), *_ROOMS])


class _Room(ModuleType):
    """A room that can be called by the function of its own name: ``ds.report(run)`` and ``ds.report.read_run`` both work."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **options)


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        if _ROOMS.get(name) == name and type(value) is ModuleType:  # the import system has just loaded that room
            value.__class__ = _Room
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
