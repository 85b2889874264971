"""Sums by latent for a processor with a cache: latents in order of how often they fire, few at a time, one pair of each a step.

    out[n] = sum over m with latents[m] = n of values[m] * table[rows[m]]

A scatter-add runs on one core and reads and writes a row of ``out`` for every pair. Here the pairs are sorted by latent
(``segments.by_latent``), and latents by their number of pairs, so that neighbours have about equally many. A group of latents whose sums
fit into the cache is taken to its end before the next: step j gathers pair j of each and adds, an elementwise loop that XLA
spreads over cores. Then the group is written to its place. Every sum is taken in the order of the pairs.

Memory traffic: M rows of ``table`` read, ``out`` written twice (zeros, sums); beside it two sorts of integers, M and N long. Temporary
memory: one group. Range: any shape and dtype; sums are float32 (float64 for float64). NaN and infinities stay with their latent.
"""

import jax
import jax.numpy as jnp
from jax import Array

from . import segments
from .reference import accumulator, zeros
from .segments import Segments

_GROUP = 2**16  # elements of the sums of a group: 256 kB
_UNROLL = 4  # pairs that are added before the sums are written


def segment_sum(pairs: Segments, table: Array, width: int) -> Array:
    """``sum of values * table[rows]`` for each latent, 0 where it has no pair."""
    depth, last = table.shape[1], len(pairs.values) - 1
    dtype = accumulator(pairs.values, table)
    if last < 0 or not width:
        return zeros((width, depth), dtype, *pairs, table)
    # 0, but not for the compiler: it would make the zeros of both gradients once and copy them twice
    nothing = (pairs.values[0] != pairs.values[0]).astype(dtype) * 0
    out = zeros((width, depth), dtype, *pairs, table) + nothing
    counts = pairs.starts[1:] - pairs.starts[:-1]
    latents = _most_first(counts, last + 1)
    size = min(width, max(1, _GROUP // max(1, depth)))
    groups = -(-width // size)
    filling = groups * size - width
    begins = jnp.pad(pairs.starts[latents], (0, filling)).reshape(groups, size)
    counts = jnp.pad(counts[latents], (0, filling)).reshape(groups, size)
    latents = jnp.pad(latents, (0, filling), constant_values=width).reshape(groups, size)
    values = pairs.values.astype(dtype)

    def one_group(g: Array, out: Array) -> Array:
        begin, count = begins[g], counts[g]

        def several(step: Array) -> Array:
            """The sum of the next few pairs of each."""
            total = zeros((size, depth), dtype, out)
            for j in range(_UNROLL):
                place = step * _UNROLL + j
                at = jnp.minimum(begin + place, last)
                term = values[at][:, None] * table[pairs.rows[at]].astype(dtype)
                total = total + jnp.where((place < count)[:, None], term, 0)
            return total

        sums = jax.lax.fori_loop(1, -(-count[0] // _UNROLL), lambda step, sums: sums + several(step), several(jnp.int32(0)))
        return out.at[latents[g]].set(sums, mode="drop", unique_indices=True)

    return jax.lax.fori_loop(0, (counts[:, 0] > 0).sum(dtype=jnp.int32), one_group, out)


def _most_first(counts: Array, total: int) -> Array:
    """Latents by descending number of pairs; of equal ones the lowest first. One packed key sorts faster than a pair of arrays."""
    bits = max(len(counts) - 1, 0).bit_length()
    latents = jnp.arange(len(counts), dtype=jnp.int32)
    if (total + 1) << bits <= 2**32:
        key = jax.lax.sort((total - counts).astype(jnp.uint32) << bits | latents.astype(jnp.uint32))
        return (key & jnp.uint32((1 << bits) - 1)).astype(jnp.int32)
    return jax.lax.sort((-counts, latents), num_keys=1, is_stable=True)[1]


def outer(values: Array, indices: Array, rows: Array, width: int) -> Array:
    """[B, k], [B, k], [B, D] -> [N, D]."""
    return segment_sum(segments.of_rows(values, indices, width), rows, width)


def combine_flat(values: Array, rows: Array, latents: Array, weight: Array, n_rows: int) -> Array:
    """[M], [M], [M], [N, D] -> [n_rows, D]."""
    return segment_sum(segments.by_latent(values, latents, rows, n_rows), weight, n_rows)
