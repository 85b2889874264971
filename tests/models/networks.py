"""Random parameters for one tiny network of each kind: all switches of a configuration, each at least once."""

import jax
import jax.numpy as jnp
from tiny import TINY

from dlmscope_jax.models import ModelConfig, Transformer, init_params

_FAMILIES = {"llama": "llama", "gpt2": "gpt2", "neox": "gpt_neox", "gemma2": "gemma2", "qwen3": "qwen3", "mdlm": "mdlm", "dream": "dream"}
NETWORKS: dict[str, ModelConfig] = {name: TINY[family][0] for name, family in (_FAMILIES | {"blocks": "fast_dllm_qwen"}).items()}


def random_network(config: ModelConfig, dtype: jnp.dtype = jnp.float32, seed: int = 0) -> tuple[Transformer, dict]:
    """A model and parameters whose norms and biases are away from one and zero, so that a forgotten one is noticed."""
    model = Transformer(config, None, dtype)
    leaves, tree = jax.tree.flatten(init_params(model, jax.random.key(seed)))
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    return model, jax.tree.unflatten(tree, [x + 0.2 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])
