"""Tiny random models of each family, in the layouts in which the originals are published."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from dlmscope_jax.models import DiffusionSpec, ModelConfig, Transformer, init_params

TINY = ModelConfig(
    family="llama", vocab_size=97, d_model=32, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=8, d_mlp=48, norm_eps=1e-5, rope_theta=500.0,
    max_positions=64, attention="causal", bos_id=0, eos_id=1, pad_id=2,
)  # fmt: skip


def tiny(family: str, dtype=jnp.float32) -> Transformer:
    """A small model of a family."""
    if family == "llama":
        return Transformer(TINY, None, dtype)
    if family == "qwen2":
        return Transformer(dataclasses.replace(TINY, family="qwen2", qkv_bias=True, tied_head=True), None, dtype)
    bidirectional = dataclasses.replace(TINY, attention="bidirectional")
    if family == "dream":
        return Transformer(dataclasses.replace(bidirectional, family="dream", qkv_bias=True), DiffusionSpec(3, shift=True), dtype)
    config = dataclasses.replace(bidirectional, family="llada", n_kv_heads=4, rope_float32=True)
    return Transformer(config, DiffusionSpec(3, shift=False), dtype)


def random_params(model: Transformer, seed: int = 0) -> dict:
    """Parameters with norms and biases away from one and zero, so that a forgotten one is noticed."""
    params = init_params(model, jax.random.key(seed))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    return jax.tree.unflatten(tree, [x + 0.3 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])


@pytest.fixture(params=["llama", "qwen2", "dream", "llada"])
def family(request) -> str:
    return request.param


@pytest.fixture
def tokens() -> jax.Array:
    return jax.random.randint(jax.random.key(7), (2, 11), 4, 97)


@pytest.fixture
def tiny_model():
    """``family -> (model, params)``."""
    return lambda family: (tiny(family), random_params(tiny(family)))


class SineDictionary:
    """A dictionary with a sine in its encoder, an operation that no language model here contains."""

    def encode(self, params, x):
        values = jnp.sin(jnp.einsum("...d,nd->...n", x, params["W"]))
        return SimpleNamespace(values=values, latent=lambda i: jnp.take(values, i, axis=-1))

    def decode(self, params, codes, x=None):
        return jnp.einsum("...n,nd->...d", codes.values, params["W"])

    def direction(self, params, i):
        return params["W"][i]


@pytest.fixture
def dictionary():
    """A static description and its parameters, 6 latents of width 32."""
    return SineDictionary(), {"W": jax.random.normal(jax.random.key(11), (6, 32)) / 6}
