"""Sums by latent in a fixed order: the pairs of a sparse code sorted by latent, then added run by run.

    out[n] = sum over m with latents[m] = n of values[m] * table[rows[m]]

A scatter-add gives the same on a CPU, one row after the other; accelerators add with atomics, in no fixed order. Here the sorted pairs
are cut into blocks of b neighbours, and all blocks walk over their pairs side by side: step j adds pair j of every block to the
block's accumulator, begins it anew where the latent changes, and writes it to ``out`` where the run of its latent ends. In one step
no two blocks write the same latent, so the scatter has unique indices. What a block holds at its end, the sum of a run that may go
on, is one row a block: a problem of the same kind with M / b pairs, solved in the same way. Zeros are not multiplied with foreign
rows anywhere, so that NaN and infinities stay with their latent.

Memory traffic: M rows of ``table`` read, the accumulators [M / b, D] read and written b times, ``out`` written once and each latent's row
touched once more for each block that holds a part of it; beside it one sort of M integers. Temporary memory: [M / b, D], at most the
size of ``table`` (b is M / B or more). Range: any dtype of values and table; sums are float32 (float64 for float64).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .reference import accumulator, zeros

_LEAST_BLOCK = 16


class Segments(NamedTuple):
    """The M pairs of a code in ascending order of latent, those of one latent in the order they were given in.

    Attributes:
      values, rows, latents: [M].
      starts: [N + 1]; the pairs of latent n are ``starts[n]`` to ``starts[n + 1] - 1``.
    """

    values: Float[Array, " M"]
    rows: Int[Array, " M"]
    latents: Int[Array, " M"]
    starts: Int[Array, " N+1"]


def by_latent(values: Float[Array, " M"], rows: Int[Array, " M"], latents: Int[Array, " M"], width: int) -> Segments:
    """The pairs sorted by latent, stable.

    Latent and position are packed into one 32-bit key where they fit, which sorts faster than a pair of arrays; rows and values
    follow by the permutation.

    Args:
      width: N; latents lie in 0..N - 1.
    """
    order, latents = _sorted(latents, width)
    starts = jnp.searchsorted(latents, jnp.arange(width + 1, dtype=jnp.int32)).astype(jnp.int32)
    return Segments(values[order], rows[order], latents, starts)


def _sorted(latents: Array, width: int) -> tuple[Array, Array]:
    """The permutation that sorts, and what it makes."""
    count = latents.shape[0]
    bits = max(count - 1, 0).bit_length()
    position = jnp.arange(count, dtype=jnp.uint32)
    if width << bits <= 2**32:
        key = jax.lax.sort(latents.astype(jnp.uint32) << bits | position)
        return (key & jnp.uint32((1 << bits) - 1)).astype(jnp.int32), (key >> bits).astype(jnp.int32)
    latents, order = jax.lax.sort((latents.astype(jnp.int32), position.astype(jnp.int32)), num_keys=1, is_stable=True)
    return order, latents


def segment_sum(segments: Segments, table: Float[Array, "B D"], width: int) -> Float[Array, "N D"]:
    """``sum of values * table[rows]`` for each latent, 0 where it has no pair; equal in every bit from run to run."""
    dtype = accumulator(segments.values, table)
    out = zeros((width, table.shape[1]), dtype, *segments, table)
    values = segments.values.astype(dtype)
    block = max(_LEAST_BLOCK, -(-len(values) // max(1, table.shape[0])))
    return _add_runs(out, values, segments.rows, segments.latents, table, block)


def outer(values: Array, indices: Array, rows: Array, width: int) -> Array:
    """[B, k], [B, k], [B, D] -> [N, D]."""
    return segment_sum(of_rows(values, indices, width), rows, width)


def combine_flat(values: Array, rows: Array, latents: Array, weight: Array, n_rows: int) -> Array:
    """[M], [M], [M], [N, D] -> [n_rows, D]: here the runs are those of the rows."""
    return segment_sum(by_latent(values, latents, rows, n_rows), weight, n_rows)


def sums_flat(values: Array, latents: Array, width: int) -> Array:
    """[M], [M] -> [N]: the sum of each latent's values.

    Neighbours 1, 2, 4, ... apart are added while they belong to one latent, after which the last pair of a run holds its sum.
    """
    order, latents = _sorted(latents, width)
    place = jnp.arange(len(latents), dtype=jnp.int32)

    def add(j, total):
        before = place - (1 << j)
        same = (before >= 0) & (latents[before] == latents)
        return total + jnp.where(same, total[before], 0)

    total = jax.lax.fori_loop(0, max(len(latents) - 1, 0).bit_length(), add, values[order].astype(accumulator(values)))
    last = jnp.append(latents[:-1] != latents[1:], True)
    nowhere = width + place
    out = zeros((width,), total.dtype, total)
    return out.at[jnp.where(last, latents, nowhere)].set(total, mode="drop", unique_indices=True) if len(latents) else out


def of_rows(values: Array, indices: Array, width: int) -> Segments:
    """The pairs of a row-sparse code, sorted."""
    rows = jnp.repeat(jnp.arange(indices.shape[0], dtype=jnp.int32), indices.shape[1])
    return by_latent(values.reshape(-1), rows, indices.reshape(-1), width)


def _add_runs(out: Array, values: Array | None, rows: Array | None, latents: Array, table: Array, block: int) -> Array:
    """``out`` plus the sums of the runs; without values and rows the pairs are 1 and the rows of ``table`` themselves."""
    width, count = out.shape[0], latents.shape[0]
    if count <= 1:
        return out.at[latents].add(_scaled(table, values, rows, out.dtype)) if count else out
    block = min(block, count)
    blocks = -(-count // block)

    def columns(a, fill):
        """[M] -> [block, blocks], column i the pairs of block i."""
        return jnp.pad(a, (0, blocks * block - count), constant_values=fill).reshape(blocks, block).T

    latents = columns(latents, width)  # the filling is a run of its own, and is written nowhere
    rows = columns(jnp.arange(count, dtype=jnp.int32) if rows is None else rows, 0)
    values = None if values is None else columns(values, 0)
    ends = latents[:-1] != latents[1:]
    nowhere = width + jnp.arange(blocks, dtype=jnp.int32)
    places = jnp.where(ends & (latents[:-1] < width), latents[:-1], nowhere)

    def at(j, sums):
        return sums + _scaled(table, None if values is None else values[j], rows[j], out.dtype)

    def step(j, state):
        out, sums = state
        sums = at(j, sums)
        out = out.at[places[j]].add(sums, mode="drop", unique_indices=True)
        return out, jnp.where(ends[j][:, None], 0, sums)

    sums = zeros((blocks, table.shape[1]), out.dtype, out)
    out, sums = jax.lax.fori_loop(0, block - 1, step, (out, sums))
    sums = at(block - 1, sums)
    last = latents[-1]  # that of the last block may be filling
    if blocks == 1:
        return out.at[last].add(sums, mode="drop")
    return _add_runs(out, None, None, last, sums, _LEAST_BLOCK)


def _scaled(table: Array, values: Array | None, rows: Array | None, dtype: jnp.dtype) -> Array:
    taken = (table if rows is None else table[rows]).astype(dtype)
    return taken if values is None else values[:, None] * taken
