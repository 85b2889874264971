"""Exact selection over entries that are divided over devices: the k largest of a row in two stages, the largest of a batch by counting.

Algorithm of a row: each shard takes the k largest of its own entries (all of them where it holds fewer), the values of these candidates are
gathered, and the k largest of them are taken again. An entry that is not among the k largest of its shard cannot be among the
k largest of the row. Shards are gathered in the order of their entries and a shard's candidates keep theirs, so ties go to the
lowest index of the whole row, as in ``lax.top_k``. The winners of a shard are the first few of its candidates: who loses is behind.

Traffic: each shard gives [B, min(k, n)] values, for ``topk`` as many int32 indices too; nothing of the width of a row moves.
``among_shards`` moves the values alone and leaves a shard with its own winners, which is what a dictionary needs whose latents
are divided; ``topk`` gives the whole code to every shard.

Range: any k up to the entries of all shards, any float dtype, one mesh axis; inside ``jax.shard_map``, whose ``check_vma`` may be on
except for the results of ``topk``, which are equal on all shards without its knowing.

``batch_winners`` selects over rows and latents together, both of which may be divided: ``threshold.batch_threshold`` finds the value at
the rank by 8 sums of 15 counts, and of the entries equal to it the first in row-major order of the whole batch are kept, for which each
shard says how many it has in every row of its own. 480 bytes, 4 B and 4 are what it gives, whatever the width.

Not measured: no two devices were at hand.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from dlmscope_jax import kernels
from dlmscope_jax.kernels.axes import Axes

from . import marks
from .threshold import batch_key, batch_threshold, ties_here


def among_shards(values: Float[Array, "B c"], k: int, axis: str, now: int | Int[Array, ""] | None = None) -> Bool[Array, "B c"]:
    """Which of this shard's candidates are among the ``k`` largest entries of the row over all shards; no derivative.

    Args:
      values: this shard's ``min(k, n)`` largest of n entries, descending, as ``kernels.topk`` gives them.
      k: how many a row keeps, static; at most the candidates of all shards.
      axis: the mesh axis that divides the row.
      now: how many of the k are meant, may be traced; None: all.

    Returns:
      True for the first candidates of each row and False behind them; k are True over all shards.

    Raises:
      UserError: k outside 1..candidates of all shards.
    """
    mine = values.shape[1]
    _, places = kernels.topk(_gathered(values, axis), k)
    here = places // mine == jax.lax.axis_index(axis)
    won = (here if now is None else here & (jnp.arange(k) < now)).sum(axis=1)
    return jnp.arange(mine) < won[:, None]


def topk(x: Float[Array, "B n"], k: int, axis: str) -> tuple[Float[Array, "B k"], Int[Array, "B k"]]:
    """The ``k`` largest entries of rows divided over ``axis`` and their indices in the whole row; no derivative.

    Args:
      x: this shard's n entries of each row, the same n on every shard.
      k: static, 1 <= k <= n times the shards.

    Returns:
      values and indices as ``kernels.topk`` gives them for the whole row, the same on every shard.

    Raises:
      UserError: k outside 1..entries of a whole row.
    """
    width = x.shape[1]
    values, indices = kernels.topk(jax.lax.stop_gradient(x), min(k, width))
    indices = indices + jax.lax.axis_index(axis) * width
    values, places = kernels.topk(_gathered(values, axis), k)
    return values, jnp.take_along_axis(_gathered(indices, axis), places, axis=1)


def batch_winners(pre: Float[Array, "B n"], count: int | Int[Array, ""], axes: Axes) -> UInt32[Array, "B words"]:
    """Which of this shard's entries are among the ``count`` largest of the whole batch, as ``topk_batch`` chooses; no derivative.

    Args:
      pre: this shard's n entries of its own rows; floating, fewer than 2^31 of them.
      count: from 1, at most the entries of all shards, may be traced; times the shards it must be below 2^31.
      axes: what divides rows and latents.

    Returns:
      one bit an entry (``marks.pack``); ``count`` are set over all shards.

    Raises:
      UserError: a count below 1, something else than floats.
    """
    key, ties = batch_threshold(pre, count, axes.every)
    own = batch_key(jax.lax.stop_gradient(pre))
    level = marks.pack(own == key)
    kept = ties_here(marks.total(level), ties, axes.rows, () if axes.latents is None else (axes.latents,))
    return marks.pack(own > key) | jnp.where(kept[:, None] > 0, marks.first(level, jnp.maximum(kept, 1)), jnp.uint32(0))


def _gathered(candidates: Array, axis: str) -> Array:
    """[B, c] of every shard -> [B, shards * c], in the order of the shards."""
    return jax.lax.all_gather(jax.lax.stop_gradient(candidates), axis, axis=1, tiled=True)
