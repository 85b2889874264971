"""Exact top-k by the value at rank k: found by counting, then the entries from it on are taken out in the order of their index.

Algorithm. On keys in the total order of the floats (``kernels/keys.py``), the value at rank k is the largest key t that k or more
entries reach. ``kth`` finds t four bits at a time, from the highest: fifteen bounds are counted in one pass, and how many of them k or
more entries reach is the digit. Of the entries equal to t as many are kept as are missing, those of the lowest index. The winners are
found by their rank among the chosen (``marks.py``) and only they are sorted. ``enclose`` halves instead, and ends as soon as
few enough entries are left, which is what ``grouped`` and ``batch`` need.

Traffic of a row of N: 8 N read in float32, 4 N in half precision, and one more N for the marks; nothing of length N is sorted or
written, whatever k is.

Range: any k and N, any float dtype, any platform. Across shards (``batch_threshold``) a digit is one ``psum`` of fifteen counts.

Measurement: README.md.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dlmscope_jax.errors import UserError
from dlmscope_jax.kernels import keys

from . import marks, reference

_DIGIT = 4


def topk(x: Array, k: int) -> tuple[Array, Array]:
    """[B, N] -> values and indices [B, k], in the order of ``lax.top_k``."""
    rows = x.shape[0]

    def count(bounds):
        entries, bounds = jax.lax.optimization_barrier((x, bounds))  # else all keys are made and written before the loop
        return marks.count(keys.sortable(entries) >= bounds[:, :, None])

    key, above = kth(count, jnp.full(rows, k, jnp.int32), x.dtype)
    words = marks.pack(keys.sortable(x) > key[:, None])
    level = marks.pack(keys.sortable(x) == key[:, None])
    places = marks.places(words | marks.first(level, k - above), k)
    values, order = reference.topk(jnp.take_along_axis(x, places, axis=1), k)
    return values, jnp.take_along_axis(places, order, axis=1)


def kth(count: Callable[[Array], Array], rank: Int[Array, "*rows"], dtype) -> tuple[Int[Array, "*rows"], Int[Array, "*rows"]]:
    """The key at each ``rank``, from 1, and how many entries are above it.

    Args:
      count: from bounds [15, *rows], ascending, to how many entries of each row reach each. Summed over shards, it makes the rank one
        over all of them.
      rank: at most the entries that there are.
      dtype: of the floats.
    """
    unsigned = keys.UNSIGNED[jnp.dtype(dtype).itemsize]
    digits = jnp.arange(1, 1 << _DIGIT, dtype=unsigned).reshape(-1, *[1] * rank.ndim)
    steps = keys.bits(dtype) // _DIGIT

    def step(i, state):
        key, above = state
        shift = (_DIGIT * (steps - 1 - i)).astype(unsigned)
        reached = count(key | digits << shift)
        enough = reached >= rank
        above = jnp.maximum(above, jnp.where(enough, 0, reached).max(axis=0))
        return key | enough.sum(axis=0, dtype=unsigned) << shift, above

    # the first step is outside of the loop, so that what it carries varies over the same mesh axes as the counts
    return jax.lax.fori_loop(1, steps, step, step(jnp.int32(0), (jnp.zeros(rank.shape, unsigned), jnp.zeros_like(rank))))


class Bracket(NamedTuple):
    """Keys around the one of a rank: ``rank`` or more entries are >= low and fewer are > high.

    Attributes:
      low, high: the keys; equal ones are that of the rank itself.
      n_low, n_high: how many entries are >= low and > high.
    """

    low: Array
    high: Array
    n_low: Array
    n_high: Array


def enclose(
    count: Callable[[Array], Array], rank: Array, bracket: Bracket, fits: Array | int, few: int = 0, probes: tuple[Array, ...] = ()
) -> Bracket:
    """Narrows the bracket of each row until ``fits`` entries or fewer are >= low, ``few`` or fewer are between, or low is high.

    Args:
      count: from one bound a row to how many entries reach it.
      rank: from 1.
      bracket: that holds already.
      fits: at least ``rank``.
      probes: bounds to try first, where they are inside of the bracket.
    """

    def unfinished(state):
        _, b = state
        return jnp.any((b.n_low > fits) & (b.high > b.low) & (b.n_low - b.n_high > few))

    def step(state):
        i, b = state
        gap = b.high - b.low
        probe = b.low + gap // 2 + gap % 2
        if probes:
            given = jnp.stack(probes)[jnp.minimum(i, len(probes) - 1)]
            probe = jnp.where((i < len(probes)) & (given > b.low) & (given <= b.high), given, probe)
        n = count(probe)
        up = n >= rank
        low, high = jnp.where(up, probe, b.low), jnp.where(up, b.high, probe - 1)
        return i + 1, Bracket(low, high, jnp.where(up, n, b.n_low), jnp.where(up, b.n_high, n))

    return jax.lax.while_loop(unfinished, step, (jnp.int32(0), bracket))[1]


def batch_key(pre: Float[Array, "*shape"]) -> Int[Array, "*shape"]:
    """Unsigned keys in the order of ``topk_batch``: NaN counts as +inf and -0.0 as 0.0."""
    value = jnp.where(jnp.isnan(pre), jnp.inf, pre).astype(pre.dtype)
    return keys.sortable(jnp.where(value == 0, jnp.zeros((), pre.dtype), value))


def batch_threshold(
    pre: Float[Array, "B N"], count: int | Int[Array, ""], axis_names: tuple[str, ...] = ()
) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """The key at rank ``count`` of a whole batch, which may lie on many devices, and how many of the entries equal to it are kept.

    The batch's ``count`` largest entries are those with ``batch_key(pre) > key`` and ``ties`` of those with ``batch_key(pre) == key``.
    A digit of four bits takes one ``psum`` of 15 counts: 8 collectives of 60 bytes in float32, 4 in half precision. No derivative.
    A device says no more than that it has ``count`` of them, so that all entries together may be more than an int32 counts.

    Args:
      pre: this device's part, of fewer than 2^31 entries.
      count: from 1, may be traced; at most the entries on all devices, and, times the number of devices, below 2^31.
      axis_names: the mesh axes that divide the batch, inside ``jax.shard_map``.

    Returns:
      key, unsigned, and ties, from 1; the same on every device.

    Raises:
      UserError: a count below 1, something else than floats.
    """
    if (isinstance(count, int) and count < 1) or not jnp.issubdtype(pre.dtype, jnp.floating):
        raise UserError(f"batch_threshold: needs floats and a count from 1, got {pre.dtype} and {count}")
    pre, rank = jax.lax.stop_gradient(pre).reshape(-1), jnp.asarray(count, jnp.int32)

    def reached(bounds):
        entries, bounds = jax.lax.optimization_barrier((pre, bounds))  # as in ``topk``
        here = marks.count(batch_key(entries) >= bounds[:, None])
        return jax.lax.psum(jnp.minimum(here, rank), axis_names) if axis_names else here

    key, above = kth(reached, rank, pre.dtype)
    return key, rank - above


def ties_here(
    level: Int[Array, " B"], ties: Int[Array, ""], row_axes: tuple[str, ...] = (), latent_axes: tuple[str, ...] = ()
) -> Int[Array, " B"]:
    """How many of its entries that equal the threshold each row of this shard keeps, the lowest in row-major order of the whole batch.

    Args:
      level: how many entries of each row here equal the threshold.
      ties: how many are kept in the whole batch, from ``batch_threshold``.
      row_axes, latent_axes: the mesh axes that divide rows and latents, major first; shards in the order of their entries.
    """
    level = jnp.minimum(level, ties)  # more are not asked for; sums over a row, and over the batch, stay within an int32
    before, whole = jnp.zeros_like(level), level
    if latent_axes:
        shards = jax.lax.all_gather(level, latent_axes)
        earlier = jnp.arange(shards.shape[0], dtype=jnp.int32) < jax.lax.axis_index(latent_axes)
        before, whole = (a.sum(axis=0, dtype=level.dtype) for a in (jnp.where(earlier[:, None], shards, 0), shards))
    before = before + jnp.cumsum(whole, dtype=level.dtype) - whole
    if row_axes:
        shards = jax.lax.all_gather(whole.sum(dtype=level.dtype), row_axes)
        earlier = jnp.arange(shards.shape[0], dtype=jnp.int32) < jax.lax.axis_index(row_axes)
        before = before + jnp.where(earlier, shards, 0).sum(dtype=level.dtype)
    return jnp.clip(ties - before, 0, level)
