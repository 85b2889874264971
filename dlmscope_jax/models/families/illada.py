"""iLLaDA 8B, model type ``illada``: Llama's layout, bidirectional, position i predicts token i.

The mask token stands neither in the config nor in the tokenizer's settings; it is token 5.
"""

from collections.abc import Collection
from typing import Any

from ..config import DiffusionSpec, ModelConfig
from . import llama
from .reading import Keys, Tensor, checked

MASK_ID = 5


def read(keys: Keys) -> tuple[ModelConfig, DiffusionSpec]:
    """Reads a ``config.json`` of model type ``illada``; its heads share the network's width.

    Raises:
      UserError: for biases, layer norms, or heads of another width.
    """
    keys.expect("attention_bias", False)
    keys.expect("mlp_bias", False)
    keys.expect("layer_norm_eps", None)  # set, it would switch to layer norms
    for dropout in ("resid_pdrop", "embd_pdrop"):
        keys.take(dropout, default=None)
    keys.take("rope_theta", "rope_parameters")  # no default is known
    keys.expect("head_dim", keys.head_dim(["hidden_size"], ["num_attention_heads"]))
    config = llama.read_llama_like(keys, "illada", qkv_bias=False, default_theta=10000.0, attention="bidirectional")
    return checked(keys, config, DiffusionSpec(mask_id=keys.take("mask_token_id", default=MASK_ID, kind=int), shift=False))


def tensors(config: ModelConfig, names: Collection[str] = frozenset()) -> dict[tuple[str, ...], Tensor]:
    """Our paths -> tensor names."""
    return llama.tensors(config)


def write(config: ModelConfig, diffusion: DiffusionSpec | None) -> dict[str, Any]:
    """The ``config.json`` of such a model; it also says the mask token."""
    kind = {"architectures": ["ILLaDAForCausalLM"], "model_type": "illada", "mask_token_id": diffusion.mask_id}
    return llama.write(config, None) | kind
