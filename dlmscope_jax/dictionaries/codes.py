"""What a dictionary's encoder returns: pytrees that say which latents are active and how strongly.

All kinds answer the same questions (``latent``, ``count``, ``fired``, ``largest``), so a caller does not care which one it
holds. A latent is active where its activation is not 0.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from dlmscope_jax.kernels.sparse_matmul.reference import scatter


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

    def count(self) -> Int[Array, "*batch"]:
        """How many latents are active in each row."""
        return (self.values != 0).sum(axis=-1, dtype=jnp.int32)

    def fired(self, width: int, valid: Bool[Array, "*batch"] | None = None) -> Int[Array, " N"]:
        """In how many of the ``valid`` rows (None: of all) each of the ``width`` latents is active."""
        on = self.values != 0 if valid is None else (self.values != 0) & valid[..., None]
        return jnp.zeros(width, jnp.int32).at[self.indices.reshape(-1)].add(on.reshape(-1).astype(jnp.int32))

    def largest(self) -> Float[Array, "*batch"]:
        """The largest activation of each row, 0 where the active ones are negative: the others have 0."""
        return jnp.maximum(self.values.max(axis=-1), 0)

    def dense(self, width: int) -> Float[Array, "*batch N"]:
        """All ``width`` activations written out."""
        lead, k = self.values.shape[:-1], self.values.shape[-1]
        return scatter(self.values.reshape(-1, k), self.indices.reshape(-1, k), width).reshape(*lead, width)


@struct.dataclass
class FlatSparse:
    """A fixed number of activations for a whole batch: entry j is latent ``latents[j]`` of row ``rows[j]``, in any order.

    Attributes:
      values: [M], zero where fewer than M are active.
      rows, latents: [M]; no pair occurs twice.
      shape: the batch's leading axes; rows are counted over all of them.
    """

    values: Float[Array, " M"]
    rows: Int[Array, " M"]
    latents: Int[Array, " M"]
    shape: tuple[int, ...] = struct.field(pytree_node=False)

    @property
    def n_rows(self) -> int:
        """Rows of the batch."""
        return math.prod(self.shape)

    def latent(self, i: Any) -> Float[Array, "*batch"]:
        """As for ``RowSparse``."""
        kept = jnp.where(self.latents == i, self.values, jnp.zeros_like(self.values))
        return jnp.zeros(self.n_rows, self.values.dtype).at[self.rows].add(kept).reshape(self.shape)

    def count(self) -> Int[Array, "*batch"]:
        """As for ``RowSparse``."""
        on = (self.values != 0).astype(jnp.int32)
        return jnp.zeros(self.n_rows, jnp.int32).at[self.rows].add(on).reshape(self.shape)

    def fired(self, width: int, valid: Bool[Array, "*batch"] | None = None) -> Int[Array, " N"]:
        """As for ``RowSparse``."""
        on = self.values != 0 if valid is None else (self.values != 0) & valid.reshape(-1)[self.rows]
        return jnp.zeros(width, jnp.int32).at[self.latents].add(on.astype(jnp.int32))

    def largest(self) -> Float[Array, "*batch"]:
        """As for ``RowSparse``; 0 in rows without an active latent."""
        return jnp.zeros(self.n_rows, self.values.dtype).at[self.rows].max(self.values).reshape(self.shape)

    def dense(self, width: int) -> Float[Array, "*batch N"]:
        """As for ``RowSparse``."""
        return jnp.zeros((self.n_rows, width), self.values.dtype).at[self.rows, self.latents].add(self.values).reshape(*self.shape, width)


@struct.dataclass
class Dense:
    """Every latent's activation written out: values [..., N]."""

    values: Float[Array, "*batch N"]

    def latent(self, i: Any) -> Float[Array, "*batch"]:
        """The activation of latent ``i`` in every row."""
        return self.values[..., i]

    def count(self) -> Int[Array, "*batch"]:
        """How many latents are active in each row."""
        return (self.values != 0).sum(axis=-1, dtype=jnp.int32)

    def fired(self, width: int, valid: Bool[Array, "*batch"] | None = None) -> Int[Array, " N"]:
        """As for ``RowSparse``."""
        on = self.values != 0 if valid is None else (self.values != 0) & valid[..., None]
        return on.reshape(-1, width).sum(axis=0, dtype=jnp.int32)

    def largest(self) -> Float[Array, "*batch"]:
        """The largest activation of each row."""
        return self.values.max(axis=-1)

    def dense(self, width: int) -> Float[Array, "*batch N"]:
        """The values as they are."""
        return self.values


@struct.dataclass
class Bits:
    """Codes of one bit a latent: values [..., N] bool. An activation is 0 or 1."""

    values: Bool[Array, "*batch N"]

    def latent(self, i: Any) -> Float[Array, "*batch"]:
        """As for ``Dense``, float32."""
        return self.values[..., i].astype(jnp.float32)

    def count(self) -> Int[Array, "*batch"]:
        """How many bits are 1 in each row."""
        return self.values.sum(axis=-1, dtype=jnp.int32)

    def fired(self, width: int, valid: Bool[Array, "*batch"] | None = None) -> Int[Array, " N"]:
        """As for ``RowSparse``."""
        on = self.values if valid is None else self.values & valid[..., None]
        return on.reshape(-1, width).sum(axis=0, dtype=jnp.int32)

    def largest(self) -> Float[Array, "*batch"]:
        """1 in rows with a bit that is 1."""
        return self.values.any(axis=-1).astype(jnp.float32)

    def dense(self, width: int) -> Float[Array, "*batch N"]:
        """The bits as float32."""
        return self.values.astype(jnp.float32)


Codes = RowSparse | FlatSparse | Dense | Bits


def take_rows(codes: RowSparse | Dense | Bits, shape: tuple[int, ...]) -> RowSparse | Dense | Bits:
    """The same codes with other leading axes."""
    return jax.tree.map(lambda leaf: leaf.reshape(*shape, leaf.shape[-1]), codes)
