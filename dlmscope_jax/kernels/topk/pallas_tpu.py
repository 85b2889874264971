"""Exact top-k of rows as one Pallas kernel for TPU, without a sort or a gather, which Mosaic does not have.

Algorithm, for a block of 8 rows (16 in bfloat16), all on integer keys in the total order of the floats (``keys.py``):

1. A pass over the row stores the keys in VMEM and the maxima of groups of g entries (same lane, g consecutive vectors).
2. The k-th largest maximum bounds the k-th largest entry from below: it is found by bisection on N / g maxima.
3. Entries above the bound are counted. Were they more than the S slots (k and some room), bisection goes on
   over the entries until they fit; entries equal to the last bound are cut off by index, again by bisection.
4. The entries that are left, k to S of them, are brought together row by row: a matrix product with ones counts them by chunks of
   128 lanes, a product with a triangle sums the counts up, so that slot j knows its chunk; a one-hot product, a byte of the keys at
   a time and therefore exact, fetches the chunk, and another triangle the lane.
5. The slots are put in order by their rank: how many keys are greater, or equal and in an earlier slot.

Memory traffic: every entry is read from HBM once; B k results are written. The keys of a block stay in VMEM, 4 bytes an entry.

Range: 1 <= k <= 1024, N <= 2^20, float32 and bfloat16. Buffers in VMEM, 128 MiB on v5e and v6e, at k = 64: 35 MiB at N = 2^20 in
float32 and 69 in bfloat16 (more than the 64 of v5p and v7x), 5.3 and 9.5 at N = 131072.

A program over several devices that XLA divides by itself cannot hold this kernel, as any of Mosaic: call it inside ``shard_map``, or name
another implementation.

Not measured: no such device was at hand; the results are checked in interpret mode, and libtpu compiles it for v5e and v6e. What
libtpu says of the others on a v5e at B = 2048, N = 16384, k = 32, float32: ``lax.top_k`` keeps a sort of whole rows, ``grouped`` gathers
its candidates and thereby touches 15.5 GB where the rows are 0.13, 21 ms by its own estimate. Of this kernel it makes 503 instruction
bundles a row for steps 4 and 5, waits not counted.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dlmscope_jax.compat import result
from dlmscope_jax.kernels import keys as order
from dlmscope_jax.kernels.dispatch import Problem

_LANES = 128
_TILE = 128 * _LANES  # entries of a row that a grid step brings in; also what a one-hot product fetches from
_BATCH = 16  # vectors of a row in an unrolled step of a pass
_MOST_K, _MOST_WIDTH = 1024, 2**20
_LEAST = -(2**31)


def refuses(problem: Problem, platform: str) -> str | None:
    """Why this cannot be had, or None."""
    if platform != "tpu":
        return "needs a TPU"
    if problem.dtype not in (jnp.float32, jnp.bfloat16):
        return f"needs float32 or bfloat16, not {problem.dtype}"
    if problem.k > _MOST_K:
        return f"needs k <= {_MOST_K}, not {problem.k}"
    if problem.width > _MOST_WIDTH:
        return f"needs rows of at most {_MOST_WIDTH} entries, not {problem.width}"
    return None


def slots(k: int) -> int:
    """Places for candidates: k and an eighth, a multiple of 32, from 128 on one of 128."""
    wanted = k + max(16, k // 8)
    return _ceil(wanted, 32 if wanted <= _LANES else _LANES)


def group_size(width: int, k: int) -> int:
    """Entries under one maximum: 16, or fewer where that would leave less than 8 k maxima."""
    return 2 ** max(0, min(4, math.floor(math.log2(max(1.0, width / (8 * k))))))


def _ceil(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def topk(x: Array, k: int, *, interpret: bool = False) -> tuple[Array, Array]:
    """[B, N] -> values and indices [B, k]; for the range see ``refuses``."""
    n_rows, width = x.shape
    bits = order.bits(x.dtype)
    block = 256 // bits  # rows that fill a tile of this dtype: 8 or 16
    if n_rows < block:
        x = jnp.pad(x, ((0, block - n_rows), (0, 0)))
    tiles = -(-width // _TILE)
    columns = min(_TILE, _ceil(width, _BATCH * _LANES))
    pieces = -(-k // _LANES)
    size, places = group_size(width, k), slots(k)
    chunks = tiles * _TILE // _LANES
    used = _ceil(-(-width // _LANES), _BATCH)  # chunks that hold an entry, and the rest of their batch
    scratch = [
        pltpu.VMEM((chunks * block, _LANES), jnp.int32),  # keys: row r of chunk c at c * block + r
        pltpu.VMEM((chunks // size * block, _LANES), jnp.int32),  # maxima, in the same way
        pltpu.VMEM((3, block, _LANES), jnp.int32),  # what a selected entry fulfils
        pltpu.VMEM((tiles, 8, _LANES), jnp.float32),  # running counts of the selected by chunk
        pltpu.VMEM((places, _LANES), jnp.int32),  # the chunk of every slot
    ]
    held = (chunks + chunks // size) * block * _LANES * 4 + 2 * block * columns * bits // 8

    def kernel(x_ref, key_ref, index_ref, keys, maxima, bounds, running, fetched):
        tile = pl.program_id(1)
        _take_in(x_ref, keys, maxima, tile, width=width, bits=bits, size=size, block=block)

        @pl.when(tile == tiles - 1)
        def _():
            maxima_used = maxima.shape[0] // block if size > 1 else 0
            above, level, before = _thresholds(keys, maxima, used, maxima_used, k=k, places=places, block=block, bits=bits)
            bounds[0], bounds[1], bounds[2] = above, level, before

            def row(r, carry):
                _gather_row(r, keys, bounds, running, fetched, key_ref, index_ref, tiles=tiles, block=block, places=places, bits=bits)
                return carry

            jax.lax.fori_loop(0, block, row, 0)

    shape = result((pieces, x.shape[0], _LANES), jnp.int32, x)
    spec = pl.BlockSpec((pieces, block, _LANES), lambda i, j: (0, i, 0))
    key, index = pl.pallas_call(
        kernel,
        grid=(pl.cdiv(x.shape[0], block), tiles),
        in_specs=[pl.BlockSpec((block, columns), lambda i, j: (i, j))],
        out_specs=[spec, spec],
        out_shape=[shape, shape],
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=max(32 * 2**20, held + 16 * 2**20)
        ),
        interpret=interpret,
        name="topk",
    )(x)
    key, index = (a.swapaxes(0, 1).reshape(x.shape[0], -1)[:n_rows, :k] for a in (key, index))
    return order.unsortable(key.astype(order.SIGNED[bits // 8]), x.dtype), index


def _lane(shape: tuple[int, int]) -> Array:
    return jax.lax.broadcasted_iota(jnp.int32, shape, 1)


def _sublane(shape: tuple[int, int]) -> Array:
    return jax.lax.broadcasted_iota(jnp.int32, shape, 0)


def _take_in(x_ref, keys, maxima, tile, *, width: int, bits: int, size: int, block: int) -> None:
    """Keys and maxima of a tile; what is beyond the row becomes the least key there is, and comes after it by its index."""
    least = jnp.int32(-(2 ** (bits - 1)))
    present = x_ref.shape[1] // _LANES
    for_tile = _TILE // _LANES
    lane = _lane((block, _LANES))

    def batch(i, carry):
        greatest = None
        for j in range(_BATCH):
            c = i * _BATCH + j
            raw = x_ref[:, pl.ds(pl.multiple_of(c * _LANES, _LANES), _LANES)]
            raw = jax.lax.bitcast_convert_type(raw, order.SIGNED[bits // 8]).astype(jnp.int32)
            key = jnp.where(raw < 0, raw ^ jnp.int32(2 ** (bits - 1) - 1), raw)
            key = jnp.where((tile * for_tile + c) * _LANES + lane < width, key, least)
            keys[pl.ds(pl.multiple_of((tile * for_tile + c) * block, block), block), :] = key
            greatest = key if j % size == 0 else jnp.maximum(greatest, key)
            if j % size == size - 1:
                at = tile * (for_tile // size) + i * (_BATCH // size) + j // size
                maxima[pl.ds(pl.multiple_of(at * block, block), block), :] = greatest
        return carry

    jax.lax.fori_loop(0, present // _BATCH, batch, 0)
    if present < for_tile:  # one tile, which the row does not fill
        keys[present * block :, :] = jnp.full(((for_tile - present) * block, _LANES), least)
        rest = maxima.shape[0] - present // size * block
        if rest:
            maxima[present // size * block :, :] = jnp.full((rest, _LANES), least)


def _count(ref, batches, block: int, holds) -> Array:
    """How many entries of every row hold, in all lanes: [block, 128]. ``holds`` takes [8, block, 128] and the number of the first chunk."""

    def step(i, total):
        part = ref[pl.ds(pl.multiple_of(i * 8 * block, 8 * block), 8 * block), :].reshape(8, block, _LANES)
        return total + holds(part, i * 8).astype(jnp.int32).sum(axis=0)

    total = jax.lax.fori_loop(0, batches, step, jnp.zeros((block, _LANES), jnp.int32))
    return jnp.broadcast_to(total.astype(jnp.float32).sum(axis=1, keepdims=True), (block, _LANES)).astype(jnp.int32)


def _above(ref, batches, block: int, bound: Array) -> Array:
    return _count(ref, batches, block, lambda part, _: part > bound[None])


def _narrow(ref, batches, block: int, rank: int, until: int, low: Array, high: Array, n_low: Array, n_high: Array):
    """Bisection: keeps ``rank`` entries or more > low and fewer > high, until at most ``until`` are > low or nothing is between."""

    def middle(low, high):
        return (low & high) + ((low ^ high) >> 1)

    def unfinished(state):
        low, high, n_low, _ = state
        return jnp.any((n_low > until) & (middle(low, high) > low))

    def step(state):
        low, high, n_low, n_high = state
        probe = middle(low, high)
        n = _above(ref, batches, block, probe)
        # a row that has ended stays as it is: its bounds hold the candidates that fit
        up, down = n >= rank, n < rank
        done = n_low <= until
        return (
            jnp.where(up & ~done, probe, low),
            jnp.where(down & ~done, probe, high),
            jnp.where(up & ~done, n, n_low),
            jnp.where(down & ~done, n, n_high),
        )

    return jax.lax.while_loop(unfinished, step, (low, high, n_low, n_high))


def _thresholds(keys, maxima, chunks: int, maxima_chunks: int, *, k: int, places: int, block: int, bits: int):
    """``(above, level, before)``, [block, 128]: k to ``places`` entries of a row are > above, or == level at an index < before."""
    least, greatest = (_LEAST, 2**31 - 1) if bits == 32 else (-(2**15) - 1, 2**15 - 1)
    batches = chunks // 8
    everything = jnp.int32(2**30)
    low = jnp.full((block, _LANES), least, jnp.int32)
    high = jnp.full((block, _LANES), greatest, jnp.int32)
    none = jnp.zeros((block, _LANES), jnp.int32)
    if maxima_chunks:
        n = _above(maxima, maxima_chunks // 8, block, low)
        high_here = jnp.where(n < k, low, high)
        low = _narrow(maxima, maxima_chunks // 8, block, k, (k + places) // 2, low, high_here, jnp.where(n < k, 0, n), none)[0]
    n = _above(keys, batches, block, low)
    # fewer than k entries above the least key of all: that key itself is the level
    floor = n < k
    low, high, n_low, n_high = _narrow(
        keys, batches, block, k, places, low, jnp.where(floor, low, high), jnp.where(floor, everything, n), jnp.where(floor, n, none)
    )
    full = n_low > places

    def unfinished(state):
        start, stop, n = state
        return jnp.any((n > places) & (stop - start > 1))

    def step(state):
        start, stop, n = state
        probe = (start + stop) >> 1

        def holds(part, chunk):
            index = (chunk + jax.lax.broadcasted_iota(jnp.int32, part.shape, 0)) * _LANES + jax.lax.broadcasted_iota(
                jnp.int32, part.shape, 2
            )
            return (part == high[None]) & (index < probe[None])

        reached = n_high + _count(keys, batches, block, holds)
        enough = reached >= k
        return jnp.where(enough, start, probe), jnp.where(enough, probe, stop), jnp.where(enough, reached, n)

    end = jnp.full((block, _LANES), chunks * _LANES, jnp.int32)
    _, stop, _ = jax.lax.while_loop(unfinished, step, (none, end, jnp.where(full, n_low, 0)))
    return jnp.where(full, high, low), high, jnp.where(full, stop, 0)


def _dot(a: Array, b: Array, contract: tuple[int, int] = (1, 0)) -> Array:
    return jax.lax.dot_general(
        a.astype(jnp.bfloat16), b.astype(jnp.bfloat16), (((contract[0],), (contract[1],)), ((), ())), preferred_element_type=jnp.float32
    )


def _gather_row(r, keys, bounds, running, fetched, key_ref, index_ref, *, tiles: int, block: int, places: int, bits: int) -> None:
    """Brings the selected entries of row ``r`` together, puts them in order and writes the first of them."""
    square = (_LANES, _LANES)
    triangle = (_sublane(square) <= _lane(square)).astype(jnp.float32)
    ones = jnp.ones((8, _LANES), jnp.float32)
    above, level, before = (bounds[i, pl.ds(r, 1), :] for i in range(3))

    def piece(t):
        return keys[pl.ds(t * (_LANES * block) + r, _LANES, stride=block), :]  # [chunk, lane]

    def selected(key, index):
        return ((key > above) | ((key == level) & (index < before))).astype(jnp.float32)

    def count(t, total):
        index = (t * _LANES + _sublane(square)) * _LANES + _lane(square)
        by_chunk = _dot(ones, selected(piece(t), index), (1, 1))  # [8, chunk]
        running[t] = total + _dot(by_chunk, triangle)
        return total + _dot(by_chunk, jnp.ones(square, jnp.float32))

    n = jax.lax.fori_loop(0, tiles, count, jnp.zeros((8, _LANES), jnp.float32))[:1]

    # slot j, a sublane each: its chunk, and how many are selected before that chunk
    table = (places, _LANES)
    slot = _sublane(table).astype(jnp.float32)

    def locate(t, state):
        passed = running[t][:1] <= slot
        return state[0] + passed.astype(jnp.float32), jnp.maximum(state[1], jnp.where(passed, running[t][:1], 0.0))

    chunk, base = jax.lax.fori_loop(0, tiles, locate, (jnp.zeros(table, jnp.float32), jnp.zeros(table, jnp.float32)))
    chunk = jnp.broadcast_to(chunk.sum(axis=1, keepdims=True), table).astype(jnp.int32)
    base = jnp.broadcast_to(base.max(axis=1, keepdims=True), table)

    fetched[...] = jnp.zeros(table, jnp.int32)

    def fetch(t, carry):
        hot = (chunk == t * _LANES + _lane(table)).astype(jnp.float32)
        key = piece(t)
        total = fetched[...]
        for shift in range(0, bits, 8):
            byte = key >> shift if shift == bits - 8 else (key >> shift) & 255
            total += _dot(hot, byte.astype(jnp.float32)).astype(jnp.int32) << shift
        fetched[...] = total
        return carry

    jax.lax.fori_loop(0, tiles, fetch, 0)
    here = fetched[...]
    index = chunk * _LANES + _lane(table)
    on = selected(here, index)
    hit = (on > 0) & (_dot(on, triangle) == slot - base + 1)
    lane = jnp.where(hit, _lane(table), 0).astype(jnp.float32).sum(axis=1, keepdims=True).astype(jnp.int32)
    key = jnp.where(hit, here, _LEAST).max(axis=1, keepdims=True)
    key = jnp.where(slot < n, jnp.broadcast_to(key, table), _LEAST)
    index = chunk * _LANES + jnp.broadcast_to(lane, table)
    _in_order(r, key, index, key_ref, index_ref)


def _in_order(r, key: Array, index: Array, key_ref, index_ref) -> None:
    """Writes the greatest keys (the same in all lanes, a slot a sublane) and their indices in descending order; ties by slot."""
    table = key.shape
    rank = jnp.zeros(table, jnp.float32)
    for q in range(-(-table[0] // _LANES)):
        some = key[q * _LANES : (q + 1) * _LANES]
        if len(some) < _LANES:
            some = jnp.concatenate([some, jnp.full((_LANES - len(some), _LANES), _LEAST)])
        other = some.T[:1]  # the keys of 128 slots, a lane each
        earlier = q * _LANES + _lane(table) < _sublane(table)
        rank += ((other > key) | ((other == key) & earlier)).astype(jnp.float32)
    rank = jnp.broadcast_to(rank.sum(axis=1, keepdims=True), table).astype(jnp.int32)
    for s in range(key_ref.shape[0]):
        hit = rank == s * _LANES + _lane(table)
        for value, out in ((key, key_ref), (index, index_ref)):
            out[s, pl.ds(r, 1), :] = jnp.where(hit, value, 0).sum(axis=0, keepdims=True)
