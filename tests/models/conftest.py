"""Tiny random models of each family."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from tiny import TINY

from dlmscope_jax.models import Transformer, init_params


def tiny(family: str, dtype=jnp.float32) -> Transformer:
    """A small model of a family."""
    return Transformer(*TINY[family], dtype)


def random_params(model: Transformer, seed: int = 0) -> dict:
    """Parameters with norms and biases away from one and zero, so that a forgotten one is noticed."""
    params = init_params(model, jax.random.key(seed))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    return jax.tree.unflatten(tree, [x + 0.3 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])


@pytest.fixture(params=["llama", "qwen2", "dream", "llada"])
def family(request) -> str:
    """The Llama-like families; all of them are in ``TINY``."""
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
