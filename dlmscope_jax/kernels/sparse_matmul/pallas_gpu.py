"""Products of sparse codes with a dictionary for NVIDIA GPUs: gathers of rows, added in registers. Pallas, Triton backend.

Algorithm. A program owns one row of the result and 512 columns of it (``dots``: 8 places of the code and all columns). It reads 8
indices, loads those 8 rows of the dictionary at once, so that 8 long reads are under way together, and adds them to 8 float32
accumulators side by side, which are added up in the end. ``combine`` and ``dots`` take the rows of a row-sparse code as they are;
``outer`` and ``combine_flat`` first sort the pairs (``by_latent``), and then a program owns a latent and walks over its pairs.

Some latents fire on almost every row. A run of more than 512 pairs is cut into parts of 512, each the work of a program that writes
its sum to a row of its own, and a second kernel adds the parts of a run in order. Parts are counted from the start of the run, so no sum
depends on timing: there are no atomics, and results are equal in every bit from run to run.

Memory traffic: one row of the dictionary for each pair, k D a row of the batch; the result once; [2 M / 512, D] float32 for the parts. Rows
that the L2 cache holds (B D of ``outer``, often) come from there. No [B, k, D] array, and none of the shape of the code written out.

Range: dictionaries and rows in float32, bfloat16 or float16, any sizes; sums are float32. A NaN stays with the rows that it belongs to.

XLA cannot divide a kernel: what ``jit`` holds on several devices is gathered first. Inside ``shard_map`` nothing is moved.

Not measured: no such device was at hand. Held against the dense products in Pallas' interpreter and compiled ahead of time for an H200.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from dlmscope_jax.compat import result, triton_params

from ..dispatch import Problem
from .segments import Segments, by_latent

_ROWS = 8  # rows that a program reads side by side
_COLUMNS = 512  # 4 warps hold 8 times as many accumulators in 32 registers a thread
_LONG = 512  # pairs of a run that one program adds up


def refuses(problem: Problem, platform: str) -> str | None:
    """Why these kernels cannot do a problem, as a clause; None if they can."""
    if platform != "cuda":
        return f"is a kernel for NVIDIA GPUs, this is {platform}"
    if problem.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"takes float32, bfloat16 and float16, got {problem.dtype}"
    return None


def combine(values: Array, indices: Array, weight: Array, interpret: bool = False) -> Array:
    """[B, k], [B, k], [N, D] -> [B, D]."""
    (b, k), d = indices.shape, weight.shape[1]
    columns = _columns(d)

    def kernel(values_ref, indices_ref, weight_ref, out_ref):
        row = pl.program_id(0)
        column = pl.program_id(1) * columns + _range(columns)

        def add(step, total):
            place = step * _ROWS + _range(_ROWS)
            there = place < k
            chosen = plt.load(indices_ref.at[row, place], mask=there, other=0)
            value = plt.load(values_ref.at[row, place], mask=there, other=0)
            return total + _float(value)[:, None] * _rows(weight_ref, chosen, column, there, d)

        total = lax.fori_loop(0, pl.cdiv(k, _ROWS), add, jnp.zeros((_ROWS, columns), jnp.float32))
        plt.store(out_ref.at[row, column], total.sum(axis=0), mask=column < d)

    return pl.pallas_call(
        kernel,
        grid=(b, pl.cdiv(d, columns)),
        out_shape=result((b, d), jnp.float32, values, indices, weight),
        compiler_params=triton_params(4, 1),
        interpret=interpret,
        name="sparse_combine",
    )(values, indices, weight)


def dots(rows: Array, indices: Array, weight: Array, interpret: bool = False) -> Array:
    """[B, D], [B, k], [N, D] -> [B, k]."""
    (b, k), d = indices.shape, weight.shape[1]
    columns = _columns(d)

    def kernel(rows_ref, indices_ref, weight_ref, out_ref):
        row = pl.program_id(0)
        place = pl.program_id(1) * _ROWS + _range(_ROWS)
        there = place < k
        chosen = plt.load(indices_ref.at[row, place], mask=there, other=0)

        def add(step, total):
            column = step * columns + _range(columns)
            left = _float(plt.load(rows_ref.at[row, column], mask=column < d, other=0))
            return total + left[None, :] * _rows(weight_ref, chosen, column, there, d)

        total = lax.fori_loop(0, pl.cdiv(d, columns), add, jnp.zeros((_ROWS, columns), jnp.float32))
        plt.store(out_ref.at[row, place], total.sum(axis=1), mask=there)

    return pl.pallas_call(
        kernel,
        grid=(b, pl.cdiv(k, _ROWS)),
        out_shape=result((b, k), jnp.float32, rows, indices, weight),
        compiler_params=triton_params(4, 1),
        interpret=interpret,
        name="sparse_dots",
    )(rows, indices, weight)


def dots_flat(left: Array, rows: Array, latents: Array, weight: Array, interpret: bool = False) -> Array:
    """[B, D], [M], [M], [N, D] -> [M]."""
    m, d = rows.shape[0], weight.shape[1]
    columns = _columns(d)

    def kernel(left_ref, rows_ref, latents_ref, weight_ref, out_ref):
        pair = pl.program_id(0) * _ROWS + _range(_ROWS)
        there = pair < m
        row = plt.load(rows_ref.at[pair], mask=there, other=0)
        latent = plt.load(latents_ref.at[pair], mask=there, other=0)

        def add(step, total):
            column = step * columns + _range(columns)
            return total + _rows(left_ref, row, column, there, d) * _rows(weight_ref, latent, column, there, d)

        total = lax.fori_loop(0, pl.cdiv(d, columns), add, jnp.zeros((_ROWS, columns), jnp.float32))
        plt.store(out_ref.at[pair], total.sum(axis=1), mask=there)

    return pl.pallas_call(
        kernel,
        grid=(pl.cdiv(m, _ROWS),),
        out_shape=result((m,), jnp.float32, left, rows, latents, weight),
        compiler_params=triton_params(4, 1),
        interpret=interpret,
        name="sparse_dots_flat",
    )(left, rows, latents, weight)


def outer(values: Array, indices: Array, rows: Array, width: int, interpret: bool = False) -> Array:
    """[B, k], [B, k], [B, D] -> [N, D]."""
    row = jnp.repeat(jnp.arange(indices.shape[0], dtype=jnp.int32), indices.shape[1])
    return segment_sum(by_latent(values.reshape(-1), row, indices.reshape(-1), width), rows, width, interpret)


def combine_flat(values: Array, rows: Array, latents: Array, weight: Array, n_rows: int, interpret: bool = False) -> Array:
    """[M], [M], [M], [N, D] -> [n_rows, D]: here the runs are those of the rows."""
    return segment_sum(by_latent(values, latents, rows, n_rows), weight, n_rows, interpret)


def segment_sum(segments: Segments, table: Array, width: int, interpret: bool = False) -> Array:
    """``sum of values * table[rows]`` for each latent, 0 where it has no pair: [N, D]."""
    m, d = segments.rows.shape[0], table.shape[1]
    columns, parts = _columns(d), _most_parts(m)
    first, last = segments.starts[:-1], segments.starts[1:]
    cut = _parts(first, last, parts)

    def kernel(values_ref, rows_ref, table_ref, first_ref, last_ref, out_ref, part_ref):
        # the first programs are latents, the others parts of the long runs; a latent whose run is long writes nothing
        program = pl.program_id(0)
        column = pl.program_id(1) * columns + _range(columns)
        begin, end = plt.load(first_ref.at[program]), plt.load(last_ref.at[program])
        is_part = program >= width
        short = ~is_part & (end - begin <= _LONG)
        end = jnp.where(short | is_part, end, begin)

        def add(step, total):
            pair = begin + step * _ROWS + _range(_ROWS)
            there = pair < end
            row = plt.load(rows_ref.at[pair], mask=there, other=0)
            value = plt.load(values_ref.at[pair], mask=there, other=0)
            return total + _float(value)[:, None] * _rows(table_ref, row, column, there, d)

        total = lax.fori_loop(0, lax.div(end - begin + (_ROWS - 1), _ROWS), add, jnp.zeros((_ROWS, columns), jnp.float32)).sum(axis=0)
        at = column < d
        plt.store(out_ref.at[jnp.where(short, program, width), column], total, mask=at & short)
        plt.store(part_ref.at[jnp.where(is_part, program - width, parts), column], total, mask=at & is_part)

    like = (segments.values, segments.rows, table)
    out, sums = pl.pallas_call(
        kernel,
        grid=(width + parts, pl.cdiv(d, columns)),
        out_shape=(result((width, d), jnp.float32, *like), result((max(1, parts), d), jnp.float32, *like)),
        compiler_params=triton_params(4, 1),
        interpret=interpret,
        name="sparse_segment_sum",
    )(segments.values, segments.rows, table, jnp.append(first, cut.first), jnp.append(last, cut.last))
    return _add_parts(out, sums, cut, interpret) if parts else out


class _Parts(NamedTuple):
    """The parts of the long runs, in order; [P] each.

    Attributes:
      first, last: which pairs; none for a part that is not needed.
      latent: whose run begins with this part; N where none does.
      count: the parts of that run.
    """

    first: Array
    last: Array
    latent: Array
    count: Array


def _most_parts(pairs: int) -> int:
    """Parts there can be: a run of more than _LONG pairs has fewer than twice its pairs / _LONG."""
    return 2 * pairs // _LONG


def _parts(first: Array, last: Array, parts: int) -> _Parts:
    width, length = first.shape[0], last - first
    needed = jnp.where(length > _LONG, -(-length // _LONG), 0)
    upto = jnp.cumsum(needed)
    part = jnp.arange(parts, dtype=jnp.int32)
    latent = jnp.minimum(jnp.searchsorted(upto, part, side="right"), width - 1)
    within = part - (upto - needed)[latent]
    wanted = within < needed[latent]
    begin = first[latent] + _LONG * within
    end = jnp.minimum(begin + _LONG, last[latent])
    owner = jnp.where(wanted & (within == 0), latent, width)
    return _Parts(jnp.where(wanted, begin, 0), jnp.where(wanted, end, 0), owner, needed[latent])


def _add_parts(out: Array, sums: Array, cut: _Parts, interpret: bool) -> Array:
    """``out`` [N, D] with the sums of the parts of each long run, added in order."""
    (width, d), columns = out.shape, _columns(out.shape[1])

    def kernel(_, sums_ref, latent_ref, count_ref, out_ref):
        program = pl.program_id(0)
        column = pl.program_id(1) * columns + _range(columns)
        latent, at = plt.load(latent_ref.at[program]), column < d
        count = jnp.where(latent < width, plt.load(count_ref.at[program]), 0)

        def add(i, total):
            return total + plt.load(sums_ref.at[program + i, column], mask=at, other=0)

        total = lax.fori_loop(0, count, add, jnp.zeros(columns, jnp.float32))
        plt.store(out_ref.at[latent, column], total, mask=at & (latent < width))

    return pl.pallas_call(
        kernel,
        grid=(cut.latent.shape[0], pl.cdiv(d, columns)),
        out_shape=result(out.shape, out.dtype, out),
        input_output_aliases={0: 0},
        compiler_params=triton_params(4, 1),
        interpret=interpret,
        name="sparse_add_parts",
    )(out, sums, cut.latent, cut.count)


def _columns(depth: int) -> int:
    """How many columns a program owns: a power of two, as Triton's arrays are."""
    return min(_COLUMNS, 1 << (depth - 1).bit_length())


def _range(n: int) -> Array:
    return jnp.arange(n, dtype=jnp.int32)


def _float(x: Array) -> Array:
    return x.astype(jnp.float32)


def _rows(ref: Any, row: Array, column: Array, there: Array, depth: int) -> Array:
    """Rows [R] and columns [C] of a matrix of ``depth`` columns, [R, C] float32; 0 where a row is not wanted or the matrix ends."""
    shape = (row.shape[0], column.shape[0])
    row, mask = jnp.broadcast_to(row[:, None], shape), there[:, None] & (column < depth)[None, :]
    return _float(plt.load(ref.at[row, jnp.broadcast_to(column[None, :], shape)], mask=mask, other=0))
