"""Attention: which keys each query sees, the pattern, and the mix of values."""

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int


@struct.dataclass
class Visibility:
    """Which keys each query sees, as positions: no array of size [T, S] exists until it is asked for.

    Attributes:
      query: [B or 1, T] position of each query.
      key: [B or 1, S] position of each key; -1 hides it (padding, or a cache entry that is not written yet).
      window: None, or how many of the last keys a query sees, itself included; data, so that layers may differ.
      rule: ``"causal"``, ``"bidirectional"`` or ``"block_causal"`` (its own block and those before).
      block_length: tokens of a block, for ``"block_causal"``.
      padded: whether ``key`` may hold -1.
    """

    query: Int[Array, "#B T"]
    key: Int[Array, "#B S"]
    window: Int[Array, ""] | None = None
    rule: str = struct.field(pytree_node=False, default="bidirectional")
    block_length: int | None = struct.field(pytree_node=False, default=None)
    padded: bool = struct.field(pytree_node=False, default=False)

    def mask(self) -> Bool[Array, "#B 1 T S"] | None:
        """True where a query sees a key; None where every query sees every key."""
        query, key = self.query[:, None, :, None], self.key[:, None, None, :]
        seen = None
        if self.rule == "causal":
            seen = key <= query
        elif self.rule == "block_causal":
            seen = key // self.block_length <= query // self.block_length
        if self.window is not None:
            near = query - key < self.window
            seen = near if seen is None else seen & near
        if self.padded:
            seen = key >= 0 if seen is None else seen & (key >= 0)
        return seen


def attention_pattern(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    see: Visibility,
    scale: float,
    softcap: float | None,
    precision: jax.lax.Precision | None,
) -> Float[Array, "B N T S"]:
    """How much each query takes from each key; scores and softmax in float32, the pattern in q's dtype.

    Args:
      q, k: rotated heads; each of the K key heads serves N / K query heads.
      see: which keys each query sees.
      scale: multiplies the scores.
      softcap: c of ``c tanh(score / c)``, None for none.
      precision: of the product.
    """
    batch, length, n_heads, width = q.shape
    grouped = q.reshape(batch, length, k.shape[2], n_heads // k.shape[2], width)
    scores = jnp.einsum("btkgh,bskh->bkgts", grouped, k, precision=precision, preferred_element_type=jnp.float32) * scale
    scores = scores.reshape(batch, n_heads, length, k.shape[1])
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if (mask := see.mask()) is not None:
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    return jax.nn.softmax(scores, axis=-1).astype(q.dtype)


def mix(pattern: Float[Array, "B N T S"], v: Float[Array, "B S K H"], precision: jax.lax.Precision | None) -> Float[Array, "B T N H"]:
    """What each query takes: the values weighted by its pattern."""
    batch, n_heads, length, keys = pattern.shape
    grouped = pattern.reshape(batch, v.shape[2], n_heads // v.shape[2], length, keys)
    return jnp.einsum("bkgts,bskh->btkgh", grouped, v, precision=precision).reshape(batch, length, n_heads, v.shape[3])


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    see: Visibility,
    scale: float,
    softcap: float | None,
    precision: jax.lax.Precision | None,
    mesh: Mesh | None = None,
) -> Float[Array, "B T N H"]:
    """``mix(attention_pattern(q, k), v)`` without keeping the pattern.

    On a CPU the sequences of a batch go one after the other, so that the scores of one stay in cache (2 cores, 32 x 256
    tokens, 3 heads of 64: 21 ms against 83 ms for the whole batch at once); elsewhere the batch is one product.
    """
    batch = q.shape[0]

    def whole(q: Array, k: Array, v: Array, see: Visibility) -> Array:
        return mix(attention_pattern(q, k, see, scale, softcap, precision), v, precision)

    def one_by_one(q: Array, k: Array, v: Array, see: Visibility) -> Array:
        rows = lambda positions: jnp.broadcast_to(positions, (batch, positions.shape[1]))  # noqa: E731

        def one(item: tuple) -> Array:
            q, k, v, query, key = jax.tree.map(lambda a: a[None], item)
            return whole(q, k, v, see.replace(query=query, key=key))[0]

        return jax.lax.map(jax.checkpoint(one), (q, k, v, rows(see.query), rows(see.key)))

    return jax.lax.platform_dependent(q, k, v, see, cpu=one_by_one, default=whole)
