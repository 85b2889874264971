"""Products of sparse codes with a dictionary for TPU: rows fetched one by one, many under way at once. Pallas, Mosaic backend.

Algorithm. The pairs (value, row) of a code are one stream, cut into runs: those of a row of the batch for ``combine`` and ``dots``, those
of a latent for ``outer``. A program owns a block of runs; the programs follow each other on a core, and the stream goes on over their
borders: pairs come to scalar memory in chunks of 1024, one chunk ahead, and while a pair is worked on, the copies of the 15 rows after it
are under way from HBM. A row is fetched as a tile [D / 128, 128] so that it lies together in HBM and fills vectors; sums are made in
vectors, in the order of the pairs, so results are equal in every bit from run to run. ``dots`` keeps 128 sums of lanes, and a transposed
tile turns them into 128 numbers.

Memory traffic: one row of the table for each pair, the result once; the rows of ``dots`` once. The table is laid out as tiles by XLA
before the kernel, which reads and writes it once more. No [B, k, D] array, and none of the shape of the code written out.

Range: table and rows in float32 or bfloat16, D <= 16384, N and B any, up to 4 M pairs for ``dots``. Sums are float32.

Not measured: no such device was at hand. A pair costs a copy of its own and some tens of scalar operations whatever D is, so this can
win only where N / k is large and D is too. Not the default anywhere; the results are checked in interpret mode, and libtpu compiles
it for v5e and v6e.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dlmscope_jax.compat import result

from ..dispatch import Problem
from .segments import Segments, by_latent

_LANES = 128
_CHUNK_BITS = 10  # pairs of a chunk, as a power of two
_CHUNK = 1 << _CHUNK_BITS
_CHUNKS = 4  # chunks in scalar memory: that of the pair, that of the row asked for, the one that comes; a power of two
_AHEAD = 16  # places for rows, that of the pair among them
_MOST_DEPTH, _MOST_DOTS = 16384, 2**22
_BLOCK_BYTES = 2**21  # of the result or the rows that a program owns


def refuses(problem: Problem, platform: str) -> str | None:
    """Why these kernels cannot do a problem, as a clause; None if they can."""
    if platform != "tpu":
        return f"is a kernel for TPU, this is {platform}"
    if problem.dtype not in (jnp.float32, jnp.bfloat16):
        return f"takes float32 and bfloat16, got {problem.dtype}"
    if problem.depth > _MOST_DEPTH:
        return f"takes rows of at most {_MOST_DEPTH} entries, got {problem.depth}"
    if problem.rows * problem.k > _MOST_DOTS:
        return f"takes at most {_MOST_DOTS} pairs, got {problem.rows * problem.k}"
    return None


def combine(values: Array, indices: Array, weight: Array, *, interpret: bool = False) -> Array:
    """[B, k], [B, k], [N, D] -> [B, D]."""
    starts = _even(*indices.shape)
    return _sums(values.reshape(-1), indices.reshape(-1), starts, weight, interpret)


def dots(rows: Array, indices: Array, weight: Array, *, interpret: bool = False) -> Array:
    """[B, D], [B, k], [N, D] -> [B, k]."""
    starts = _even(*indices.shape)
    return _dots(rows, indices.reshape(-1), starts, weight, interpret).reshape(indices.shape)


def dots_flat(left: Array, rows: Array, latents: Array, weight: Array, *, interpret: bool = False) -> Array:
    """[B, D], [M], [M], [N, D] -> [M]: the pairs are sorted by row, and the results put back."""
    place = jnp.arange(rows.shape[0], dtype=jnp.int32)
    by_row = by_latent(place, latents, rows, left.shape[0])
    return (
        jnp.zeros(rows.shape, jnp.float32)
        .at[by_row.values]
        .set(_dots(left, by_row.rows, by_row.starts, weight, interpret), unique_indices=True)
    )


def outer(values: Array, indices: Array, rows: Array, width: int, *, interpret: bool = False) -> Array:
    """[B, k], [B, k], [B, D] -> [N, D]."""
    row = jnp.repeat(jnp.arange(indices.shape[0], dtype=jnp.int32), indices.shape[1])
    return segment_sum(by_latent(values.reshape(-1), row, indices.reshape(-1), width), rows, width, interpret=interpret)


def combine_flat(values: Array, rows: Array, latents: Array, weight: Array, n_rows: int, *, interpret: bool = False) -> Array:
    """[M], [M], [M], [N, D] -> [n_rows, D]: here the runs are those of the rows."""
    return segment_sum(by_latent(values, latents, rows, n_rows), weight, n_rows, interpret=interpret)


def segment_sum(segments: Segments, table: Array, width: int, *, interpret: bool = False) -> Array:
    """``sum of values * table[rows]`` for each latent, 0 where it has no pair: [N, D]."""
    return _sums(segments.values, segments.rows, segments.starts, table, interpret)


def _even(n_rows: int, k: int) -> Array:
    """The starts of runs of k pairs."""
    return jnp.arange(n_rows + 1, dtype=jnp.int32) * k


def _sums(values: Array, columns: Array, starts: Array, table: Array, interpret: bool) -> Array:
    """``out[s] = sum over m from starts[s] to starts[s + 1] - 1 of values[m] * table[columns[m]]``."""
    runs, depth = starts.shape[0] - 1, table.shape[1]
    if not columns.shape[0]:
        return jnp.zeros((runs, depth), jnp.float32)
    tiles, pieces = _as_tiles(table)
    stride = -(-pieces // 8) * 8  # sublanes that a run takes among the eight that are written together
    block = _block(runs, pieces)

    def kernel(starts_ref, columns_hbm, values_hbm, table_hbm, out_ref, columns_ref, values_ref, ring, finished, chunk_sem, row_sem):
        starts_of = starts_ref.at[0, 0]
        row = _stream((columns_hbm, values_hbm), (columns_ref, values_ref), table_hbm, ring, chunk_sem, row_sem, starts_of)

        def one(run, carry):
            def add(m, total):
                return total + _at(values_ref, m) * row(m)

            total = lax.fori_loop(starts_of[run], starts_of[run + 1], add, jnp.zeros((pieces, _LANES), jnp.float32))
            finished[pl.ds(pl.multiple_of((run & 7) * stride, 8), pieces), :] = total

            @pl.when(run & 7 == 7)
            def _():
                for piece in range(pieces):
                    lanes = slice(piece * _LANES, (piece + 1) * _LANES)
                    out_ref[pl.ds(pl.multiple_of(run - 7, 8), 8), lanes] = finished[pl.ds(piece, 8, stride=stride), :]

            return carry

        lax.fori_loop(0, block, one, 0)

    out = pl.pallas_call(
        kernel,
        grid=(pl.cdiv(runs, block),),
        in_specs=[_starts_spec(block), *[pl.BlockSpec(memory_space=pl.ANY)] * 3],
        out_specs=pl.BlockSpec((block, pieces * _LANES), lambda i: (i, 0)),
        out_shape=result((runs, pieces * _LANES), jnp.float32, values, columns, table),
        scratch_shapes=[
            pltpu.SMEM((_CHUNKS, 1, _CHUNK), jnp.int32),
            pltpu.SMEM((_CHUNKS, 1, _CHUNK), jnp.float32),
            pltpu.VMEM((_AHEAD, pieces, _LANES), table.dtype),
            pltpu.VMEM((8 * stride, _LANES), jnp.float32),
            pltpu.SemaphoreType.DMA((_CHUNKS,)),
            pltpu.SemaphoreType.DMA((_AHEAD,)),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=32 * 2**20),
        interpret=interpret,
        name="sparse_sums",
    )(_by_block(starts, block), _chunked(columns.astype(jnp.int32)), _chunked(values.astype(jnp.float32)), tiles)
    return out[:, :depth]


def _dots(left: Array, columns: Array, starts: Array, table: Array, interpret: bool) -> Array:
    """``out[m] = <left[s], table[columns[m]]>`` for m from starts[s] to starts[s + 1] - 1."""
    runs, count = left.shape[0], columns.shape[0]
    if not count:
        return jnp.zeros((0,), jnp.float32)
    (tiles, pieces), (left, _) = _as_tiles(table), _as_tiles(left)
    block, lines = _block(runs, pieces), -(-count // (8 * _LANES)) * 8

    def kernel(starts_ref, columns_hbm, left_ref, table_hbm, out_ref, columns_ref, ring, partial, chunk_sem, row_sem):
        starts_of = starts_ref.at[0, 0]
        row = _stream((columns_hbm,), (columns_ref,), table_hbm, ring, chunk_sem, row_sem, starts_of)
        total = starts_of[block + 1]

        def run(s, carry):
            here = left_ref[s].astype(jnp.float32)

            def one(m, carry):
                partial[pl.ds(m & (_LANES - 1), 1), :] = (here * row(m)).sum(axis=0, keepdims=True)

                @pl.when((m & (_LANES - 1) == _LANES - 1) | (m + 1 == total))
                def _():
                    out_ref[pl.ds(m >> 7, 1), :] = partial[...].T.sum(axis=0, keepdims=True)

                return carry

            return lax.fori_loop(starts_of[s], starts_of[s + 1], one, carry)

        lax.fori_loop(0, block, run, 0)

    out = pl.pallas_call(
        kernel,
        grid=(pl.cdiv(runs, block),),
        in_specs=[
            _starts_spec(block),
            pl.BlockSpec(memory_space=pl.ANY),
            pl.BlockSpec((block, pieces, _LANES), lambda i: (i, 0, 0)),
            pl.BlockSpec(memory_space=pl.ANY),
        ],
        out_specs=pl.BlockSpec((lines, _LANES), lambda i: (0, 0)),
        out_shape=result((lines, _LANES), jnp.float32, left, columns, table),
        scratch_shapes=[
            pltpu.SMEM((_CHUNKS, 1, _CHUNK), jnp.int32),
            pltpu.VMEM((_AHEAD, pieces, _LANES), table.dtype),
            pltpu.VMEM((_LANES, _LANES), jnp.float32),
            pltpu.SemaphoreType.DMA((_CHUNKS,)),
            pltpu.SemaphoreType.DMA((_AHEAD,)),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=64 * 2**20),
        interpret=interpret,
        name="sparse_dots",
    )(_by_block(starts, block), _chunked(columns.astype(jnp.int32)), left, tiles)
    return out.reshape(-1)[:count]


def _as_tiles(table: Array) -> tuple[Array, int]:
    """[N, D] -> [N, pieces, 128], the last piece filled with zeros."""
    pieces = -(-table.shape[1] // _LANES)
    table = jnp.pad(table, ((0, 0), (0, pieces * _LANES - table.shape[1])))
    return table.reshape(-1, pieces, _LANES), pieces


def _block(runs: int, pieces: int) -> int:
    """Runs of a program: as many as 2 MiB of float32 rows hold, a multiple of 8, 512 at most."""
    return min(max(8, _BLOCK_BYTES // (pieces * _LANES * 4) // 8 * 8), 512, -(-runs // 8) * 8)


def _by_block(starts: Array, block: int) -> Array:
    """[runs + 1] -> [blocks, 1, block + 2]: where the runs of a block start, where its last one ends, and where the last of all does."""
    blocks = -(-(starts.shape[0] - 1) // block)
    starts = starts.astype(jnp.int32)
    padded = jnp.pad(starts, (0, blocks * block + 1 - starts.shape[0]), mode="edge")
    first = padded[:-1].reshape(blocks, block)
    end = padded[block::block, None]
    return jnp.concatenate([first, end, jnp.broadcast_to(starts[-1], end.shape)], axis=1)[:, None, :]


def _starts_spec(block: int) -> pl.BlockSpec:
    return pl.BlockSpec((1, 1, block + 2), lambda i: (i, 0, 0), memory_space=pltpu.SMEM)


def _chunked(a: Array) -> Array:
    """[M] -> [chunks, 1, chunk]."""
    return jnp.pad(a, (0, -a.shape[0] % _CHUNK)).reshape(-1, 1, _CHUNK)


def _at(ref: Any, m: Array) -> Array:
    """Pair m of what is in scalar memory."""
    return ref[(m >> _CHUNK_BITS) & (_CHUNKS - 1), 0, m & (_CHUNK - 1)]


def _stream(
    pairs_hbm: tuple, pairs_ref: tuple, table_hbm: Any, ring: Any, chunk_sem: Any, row_sem: Any, starts_of: Any
) -> Callable[[Array], Array]:
    """Begins the stream in the first program; returns how to take the row of pair m: every m once, in order, from 0 to the end.

    Taking a row asks for the one that goes where the row before it was, so that nothing is overwritten while it is read.
    """
    total = starts_of[starts_of.shape[0] - 1]

    def chunk(q):
        slot = q & (_CHUNKS - 1)
        return [pltpu.make_async_copy(hbm.at[q], ref.at[slot], chunk_sem.at[slot]) for hbm, ref in zip(pairs_hbm, pairs_ref, strict=True)]

    def fetch(m):
        slot = m & (_AHEAD - 1)
        return pltpu.make_async_copy(table_hbm.at[_at(pairs_ref[0], m)], ring.at[slot], row_sem.at[slot])

    @pl.when(pl.program_id(0) == 0)
    def _():
        for copy in chunk(0):
            copy.start()
        for copy in chunk(0):
            copy.wait()

        @pl.when(total > _CHUNK)
        def _():
            for copy in chunk(1):
                copy.start()

        def ask(m, carry):
            fetch(m).start()
            return carry

        lax.fori_loop(0, jnp.minimum(total, _AHEAD - 1), ask, 0)

    def row(m):
        ahead = m + _AHEAD - 1

        @pl.when((ahead < total) & (ahead & (_CHUNK - 1) == 0))
        def _():
            q = ahead >> _CHUNK_BITS
            for copy in chunk(q):
                copy.wait()

            @pl.when((q + 1) << _CHUNK_BITS < total)
            def _():
                for copy in chunk(q + 1):
                    copy.start()

        @pl.when(ahead < total)
        def _():
            fetch(ahead).start()

        slot = m & (_AHEAD - 1)
        pltpu.make_async_copy(table_hbm.at[0], ring.at[slot], row_sem.at[slot]).wait()
        return ring[slot].astype(jnp.float32)

    return row
