"""What a dictionary's encoder returns: pytrees that say which latents are active and how strongly.

Both kinds answer ``latent(i)``, so a caller that needs one latent's activation does not care which kind it holds.
"""

from typing import Any

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int


@struct.dataclass
class RowSparse:
    """The same number k of latents for every row.

    Attributes:
      values: [..., k], zero where fewer than k latents are active.
      indices: [..., k], distinct within a row.
    """

    values: Float[Array, "*batch k"]
    indices: Int[Array, "*batch k"]

    def latent(self, i: Any) -> Float[Array, "*batch"]:
        """The activation of latent ``i`` (a Python or traced integer) in every row, zero where it is not active."""
        return jnp.where(self.indices == i, self.values, jnp.zeros_like(self.values)).sum(axis=-1)


@struct.dataclass
class Dense:
    """Every latent's activation written out: values [..., N]."""

    values: Float[Array, "*batch N"]

    def latent(self, i: Any) -> Float[Array, "*batch"]:
        """The activation of latent ``i`` in every row."""
        return self.values[..., i]
