"""Top-k of rows for NVIDIA GPUs: one pass over the data, then work on a sixteenth of it. Pallas, Triton backend.

Algorithm, for rows of N entries as integer keys in the total order of the floats:

1. ``_maxima``: the maximum of every g neighbouring entries. The only kernel that reads the whole row.
2. ``_select`` on the N / g maxima: the k groups with the largest ones, of equal maxima those of the lowest index. Each of the k largest
   entries is in one of them, also where entries tie. Above 16,384 maxima, steps 1 and 2 are repeated on the maxima.
3. ``_select`` on the g k entries of those groups, which it gathers: the k largest, of equal ones those of the lowest index.
4. ``_order``: an entry's place is the number of entries that beat it; k^2 comparisons. Above k = 256 ``lax.top_k`` orders the k winners.

``_select`` holds its M entries in registers, one row a program. The k-th largest key is built bit by bit from the top; a bit is one
count over the registers, and the search ends early once exactly k keys are left. One prefix sum, in which the keys above the k-th and those
equal to it are counted in the two halves of a word, gives every winner its place: no atomics, nothing depends on timing.

Memory traffic of a row, in entries: N read, N / g written and read, g k gathered (64 bytes at a time at g = 16, float32), and a few
times k. At N = 16384, k = 32, g = 16: 1.2 N. None of it depends on the data; the number of counts in steps 2 and 3 does, and is
at most 32 (16 in half precision).

Range: float32, bfloat16, float16; k up to 1,024; N up to 2^22; any number of rows. Outside of it, ``refuses`` says why.

XLA cannot divide a kernel: rows that ``jit`` holds on several devices are gathered to each of them first (67 MB from each of two at the
first shape below, compiled for two H200), where the other implementations move [B, k]. Inside ``shard_map`` nothing is moved.

Not measured: no such device was at hand. Held against ``lax.top_k`` in Pallas' interpreter and compiled ahead of time for an H200
(jax 0.10.2; the first row on 0.11.2 too). No kernel of these two programs spills registers, and what is read in order is read 16
bytes a load. Temporary memory:

| B, N, k, dtype               | ``lax.top_k``            | here           |
|------------------------------|--------------------------|----------------|
| 2048, 16384, 32, float32     | sort of 16384, 268 MB    | no sort, 8 MB  |
| 8192, 131072, 64, bfloat16   | sort of 131072, 6,443 MB | no sort, 67 MB |
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from dlmscope_jax.compat import result, triton_params

from .. import keys
from ..dispatch import Problem

_MOST = 16384  # entries of a row that a program holds in registers: 32 a thread with 16 warps
_DIRECT = 4096  # rows up to here are selected from without maxima
_TILE = 16384  # bytes that a program of the first pass reads: 8 loads of 16 bytes under way for each thread
_COMPARED = 256  # winners up to here are ordered by comparing each with each
_MOST_K, _MOST_WIDTH = 1024, 2**22


def refuses(problem: Problem, platform: str) -> str | None:
    """Why this kernel cannot do a problem, as a clause; None if it can."""
    if platform != "cuda":
        return f"is a kernel for NVIDIA GPUs, this is {platform}"
    if problem.k > _MOST_K or problem.width > _MOST_WIDTH:
        return f"takes k up to {_MOST_K} and rows up to {_MOST_WIDTH}, got k = {problem.k} of {problem.width}"
    if problem.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"takes float32, bfloat16 and float16, got {problem.dtype}"
    return None


def topk(x: Array, k: int, interpret: bool = False) -> tuple[Array, Array]:
    """[B, N] -> values and indices [B, k], in the order of ``lax.top_k``."""
    key, index = _chosen(x, k, interpret)
    if k <= _COMPARED:
        key, index = _order(key, index, interpret)
    else:
        key, place = jax.lax.top_k(key, k)
        index = jnp.take_along_axis(index, place, axis=1)
    return keys.unsortable(key, x.dtype), index


def group_size(width: int, k: int) -> int:
    """g of the file's first lines; 1 where a row is selected from directly."""
    if width <= _DIRECT:
        return 1
    fitting = [g for g in (8, 16, 32) if g * _slots(k) <= min(_MOST, width // 2)]
    return min(fitting, key=lambda g: width // g + g * _slots(k), default=1)


def _slots(n: int) -> int:
    """The power of two that holds n; Triton's arrays are such."""
    return 1 << (n - 1).bit_length()


def _chosen(x: Array, k: int, interpret: bool) -> tuple[Array, Array]:
    """Keys and indices [B, k] of the k largest of each row, by ascending index. ``x`` holds floats, or keys already."""
    g = group_size(x.shape[1], k)
    if g == 1:
        return _select(x, None, 1, k, interpret)
    _, groups = _chosen(_maxima(x, g, interpret), k, interpret)
    return _select(x, groups, g, k, interpret)


def _key(x: Array) -> Array:
    return keys.signed(x) if jnp.issubdtype(x.dtype, jnp.floating) else x


def _maxima(x: Array, g: int, interpret: bool) -> Array:
    """[B, N] -> the largest key of each g entries, [B, ceil(N / g)]."""
    b, n = x.shape
    tile = _TILE // x.dtype.itemsize
    m, per_tile = -(-n // g), tile // g
    dtype = keys.SIGNED[x.dtype.itemsize]
    lowest = jnp.iinfo(dtype).min

    def kernel(x_ref, out_ref):
        row, first = pl.program_id(0), pl.program_id(1) * per_tile
        group = first + jnp.arange(per_tile, dtype=jnp.int32)
        at = group[:, None] * g + jnp.arange(g, dtype=jnp.int32)[None, :]
        whole = n % tile == 0  # then nothing is masked, and loads are as wide as they can be
        key = _key(plt.load(x_ref.at[row, at], mask=None if whole else at < n))
        if not whole:
            key = jnp.where(at < n, key, lowest)
        plt.store(out_ref.at[row, group], key.max(axis=1), mask=None if whole else group < m)

    return pl.pallas_call(
        kernel,
        grid=(b, pl.cdiv(n, tile)),
        out_shape=result((b, m), dtype, x),
        compiler_params=triton_params(4, 1),
        interpret=interpret,
        name="topk_maxima",
    )(x)


def _bound(key: Array, k: int, bits: int) -> Array:
    """The k-th largest of signed keys, or a smaller number that exactly k of them reach."""

    def unfinished(state):
        bit, _, reached = state
        return (bit >= 0) & (reached != k)

    def step(state):
        bit, bound, _ = state
        higher = bound + (jnp.int32(1) << bit)  # wraps round to 0 at the sign bit
        reached = (key >= higher).astype(jnp.int32).sum()
        return bit - 1, jnp.where(reached >= k, higher, bound), reached

    start = jnp.int32(bits - 1), jnp.int32(-(2 ** (bits - 1))), jnp.int32(key.size)
    return jax.lax.while_loop(unfinished, step, start)[1]


def _places(key: Array, bound: Array, k: int) -> tuple[Array, Array]:
    """Which keys are the k largest, of equal ones the first, and their places among them; k for the others."""
    above = (key > bound).astype(jnp.int32)
    equal = (key == bound).astype(jnp.int32)
    wanted = k - above.sum()  # of those equal to the bound; all of them where exactly k reach it
    own = above + (equal << 16)  # both are counted in one sum, in the halves of a word
    before = jnp.cumsum(own, axis=0) - own
    before_equal = before >> 16
    kept = (above > 0) | ((equal > 0) & (before_equal < wanted))
    return kept, jnp.where(kept, (before & 0xFFFF) + jnp.minimum(before_equal, wanted), k)


def _select(x: Array, groups: Array | None, g: int, k: int, interpret: bool) -> tuple[Array, Array]:
    """Keys and indices [B, k] of the k largest among the entries of the groups [B, k] of g, or among all; by ascending index."""
    b, n = x.shape
    entries = n if groups is None else k * g
    held = _slots(entries)
    dtype = keys.SIGNED[x.dtype.itemsize]
    lowest = jnp.iinfo(dtype).min

    def kernel(x_ref, *refs):
        *group_ref, key_ref, index_ref = refs
        row = pl.program_id(0)
        place = jnp.arange(held, dtype=jnp.int32)
        there = place < entries
        index = place
        if group_ref:
            index = plt.load(group_ref[0].at[row, jax.lax.div(place, g)], mask=there, other=0) * g + jax.lax.rem(place, g)
            there &= index < n
        x_here = plt.load(x_ref.at[row, index], mask=there)
        # what is not there ranks last: its key is the lowest, and its place is behind every entry with that key
        key = jnp.where(there, _key(x_here).astype(jnp.int32), lowest)
        bound = _bound(key, k, keys.bits(x.dtype))
        kept, to = _places(key, bound, k)
        plt.store(key_ref.at[row, to], key.astype(dtype), mask=kept)
        plt.store(index_ref.at[row, to], index, mask=kept)

    arguments = (x,) if groups is None else (x, groups)
    return pl.pallas_call(
        kernel,
        grid=(b,),
        out_shape=(result((b, k), dtype, x), result((b, k), jnp.int32, x)),
        compiler_params=triton_params(max(1, min(16, held // 512)), 1),
        interpret=interpret,
        name="topk_select",
    )(*arguments)


def _order(key: Array, index: Array, interpret: bool) -> tuple[Array, Array]:
    """Keys descending and their indices; equal keys stay in the order in which they come."""
    b, k = key.shape
    held = _slots(k)
    columns = min(held, 32)

    def kernel(key_ref, index_ref, key_out, index_out):
        row = pl.program_id(0)
        mine = jnp.arange(held, dtype=jnp.int32)
        here = plt.load(key_ref.at[row, mine], mask=mine < k).astype(jnp.int32)

        def count(block, rank):
            theirs = block * columns + jnp.arange(columns, dtype=jnp.int32)
            there = plt.load(key_ref.at[row, theirs], mask=theirs < k).astype(jnp.int32)
            earlier = theirs[None, :] < mine[:, None]
            beats = (there[None, :] > here[:, None]) | ((there[None, :] == here[:, None]) & earlier)
            return rank + (beats & (theirs < k)[None, :]).astype(jnp.int32).sum(axis=1)

        rank = jax.lax.fori_loop(0, held // columns, count, jnp.zeros(held, jnp.int32))
        to = jnp.where(mine < k, rank, k)
        plt.store(key_out.at[row, to], here.astype(key.dtype), mask=mine < k)
        plt.store(index_out.at[row, to], plt.load(index_ref.at[row, mine], mask=mine < k), mask=mine < k)

    return pl.pallas_call(
        kernel,
        grid=(b,),
        out_shape=(result((b, k), key.dtype, key), result((b, k), jnp.int32, key)),
        compiler_params=triton_params(max(1, min(8, held * columns // 512)), 1),
        interpret=interpret,
        name="topk_order",
    )(key, index)
