"""Sums by latent for a processor with a cache: pieces of the latents' runs, longest first, some at a time, a few pairs of each a step.

    out[n] = sum over m with latents[m] = n of values[m] * table[rows[m]]

A scatter-add runs on one core and reads and writes a row of ``out`` for every pair. Here the pairs are sorted by latent
(``segments.by_latent``), the run of each latent is cut into pieces of at most 32 pairs, and pieces are put in order of their length, so
that neighbours are about equally long. A group of pieces whose sums fit into the cache is taken to its end before the next: step j
gathers the next four pairs of each and adds them, an elementwise loop that XLA spreads over cores. Then the group is added to ``out``,
by a scatter in which a latent may occur more than once: sums are taken in a fixed order on a CPU, on accelerators where no latent has
more than two pieces.

Memory traffic: M rows of ``table`` read, ``out`` written, and one row of it read and written for each piece, of which there are
M / 32 + min(M, N) at most; beside it two sorts of integers, M and that many. Temporary memory: one group. Range: any shape and dtype;
sums are float32 (float64 for float64); pieces are sorted by one 32-bit key of length and number, which is enough for 2^26 of them.
NaN and infinities stay with their latent. Measurement: README.md.
"""

import jax
import jax.numpy as jnp
from jax import Array

from . import segments
from .reference import accumulator, zeros
from .segments import Segments

_PIECE = 32  # pairs
_GROUP = 2**15  # elements of the sums of a group: 128 kB
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
    latents, begins, counts = _pieces(pairs.starts, last + 1)
    size = min(len(latents), max(1, _GROUP // max(1, depth)))
    filling = -len(latents) % size
    latents = jnp.pad(latents, (0, filling), constant_values=width).reshape(-1, size)
    begins, counts = (jnp.pad(a, (0, filling)).reshape(-1, size) for a in (begins, counts))
    values = pairs.values.astype(dtype)

    def one_group(g: Array, out: Array) -> Array:
        begin, count = begins[g], counts[g]

        def several(step: Array) -> Array:
            """The sums of the next few pairs of each piece."""
            total = zeros((size, depth), dtype, out)
            for j in range(_UNROLL):
                place = step * _UNROLL + j
                at = jnp.minimum(begin + place, last)
                term = values[at][:, None] * table[pairs.rows[at]].astype(dtype)
                total = total + jnp.where((place < count)[:, None], term, 0)
            return total

        sums = jax.lax.fori_loop(1, -(-count[0] // _UNROLL), lambda step, sums: sums + several(step), several(jnp.int32(0)))
        return out.at[latents[g]].add(sums, mode="drop")

    return jax.lax.fori_loop(0, (counts[:, 0] > 0).sum(dtype=jnp.int32), one_group, out)


def _pieces(starts: Array, total: int) -> tuple[Array, Array, Array]:
    """Latent, first pair and number of pairs of each piece, longest first; latents are the number of latents where there is no piece."""
    width = len(starts) - 1
    counts = starts[1:] - starts[:-1]
    of_latent = -(-counts // _PIECE)
    piece = jnp.arange(total // _PIECE + min(total, width), dtype=jnp.int32)
    latents = jnp.repeat(jnp.arange(width, dtype=jnp.int32), of_latent, total_repeat_length=len(piece))
    before = (piece - (jnp.cumsum(of_latent) - of_latent)[latents]) * _PIECE
    lengths = jnp.clip(counts[latents] - before, 0, _PIECE)
    bits = max(len(piece) - 1, 0).bit_length()
    key = jax.lax.sort((_PIECE - lengths).astype(jnp.uint32) << bits | piece.astype(jnp.uint32))
    order = (key & jnp.uint32((1 << bits) - 1)).astype(jnp.int32)
    lengths = lengths[order]
    return jnp.where(lengths > 0, latents[order], width), (starts[latents] + before)[order], lengths


def outer(values: Array, indices: Array, rows: Array, width: int) -> Array:
    """[B, k], [B, k], [B, D] -> [N, D]."""
    return segment_sum(segments.of_rows(values, indices, width), rows, width)


def combine_flat(values: Array, rows: Array, latents: Array, weight: Array, n_rows: int) -> Array:
    """[M], [M], [M], [N, D] -> [n_rows, D]."""
    return segment_sum(segments.by_latent(values, latents, rows, n_rows), weight, n_rows)
