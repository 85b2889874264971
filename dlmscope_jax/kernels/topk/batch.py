"""The largest entries of a whole batch: BatchTopK's selection, exact, in a few passes over the pre-activations.

A sort or a heap pays for the k B entries that it returns; ``lax.top_k`` on the flattened batch takes five times as long as the
encoder's matrix product. Here the value at rank k B is looked for by counting. Two probes from a sample enclose it, halving
goes on until few entries are between, and those are finished by themselves. A pass compares every entry with one bound, packs
the answers into one bit an entry and counts bits. The bits of the last pass say which entries are kept, and entry j of the
result is found by its rank among them, so that beside the pre-activations nothing is larger than the bits. A sample that
misleads, or any other data, costs passes (at most one a bit of the dtype) and no exactness.

Record (medians of CPU time on a busy machine, float32, jax 0.10.2, 2-core CPU, normal pre-activations whose scale differs by latent):

| B, N, k         | topk_batch | lax.top_k, flattened | grouped, flattened | top 4 k of each row first |
|-----------------|------------|----------------------|--------------------|---------------------------|
| 2048, 2048, 32  | 11 ms      | 81 ms                | 76 ms              | 92 ms (not exact alone)   |
| 2048, 4096, 32  | 21 ms      |                      |                    |                           |
| 512, 16384, 64  | 19 ms      |                      |                    |                           |

Temporary memory of the first: 2.3 MB beside 16 MB of pre-activations. The encoder's product from D = 192 takes 17 ms there.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dlmscope_jax.errors import UserError
from dlmscope_jax.kernels import keys

from . import marks
from .threshold import Bracket, enclose

_SAMPLE = 16384  # entries looked at for the first guess
_FEW = 16384  # entries that are taken out and finished by themselves


def topk_batch(pre: Float[Array, "B N"], count: int) -> tuple[Float[Array, " M"], Int[Array, " M"], Int[Array, " M"]]:
    """The ``count`` largest entries of a matrix: ``(values, rows, latents)``, each [count], in row-major order.

    Of equal values, 0.0 and -0.0 among them, those that come first in row-major order are kept; NaN counts as +inf. No derivative.

    Args:
      pre: floating point.
      count: static, 1 <= count <= B * N.

    Raises:
      UserError: a count outside 1..B N, something else than a floating matrix, more than 2^31 - 1 entries.
    """
    if pre.ndim != 2 or not jnp.issubdtype(pre.dtype, jnp.floating):
        raise UserError(f"topk_batch: needs a floating matrix, got {pre.dtype}{list(pre.shape)}")
    if not 1 <= count <= pre.size < 2**31:
        raise UserError(f"topk_batch: count = {count} must lie between 1 and the {pre.size} entries, and those below 2^31")
    pre = jax.lax.stop_gradient(pre)
    flat = marks.places(_chosen(pre.reshape(-1), jnp.int32(count)), count)
    rows, latents = jnp.divmod(flat, jnp.int32(pre.shape[1]))
    return pre[rows, latents], rows, latents


def among_largest(values: Float[Array, " M"], count: int | Int[Array, ""]) -> Bool[Array, " M"]:
    """Whether each entry is among the ``count`` largest, from 1, which may be traced; ties to the lowest index, all for count >= M."""
    count = jnp.clip(jnp.asarray(count, jnp.int32), 1, values.shape[0])
    return marks.unpack(_chosen(jax.lax.stop_gradient(values), count), values.shape[0])


def _at_least(x: Array, bound: Array) -> Array:
    """``x >= bound`` as bits (``marks.py``).

    The bound is a key, the comparison one of floats: an array of keys would be as large as the pre-activations. NaN counts as +inf,
    and nothing reaches a bound above +inf.
    """
    value = keys.unsortable(bound, x.dtype)
    return marks.pack(~(x < value) & ~jnp.isnan(value))


def _narrow(x: Array, rank: Array, bracket: Bracket, few: int, probes: tuple[Array, ...] = ()) -> Bracket:
    return enclose(lambda bound: marks.total(_at_least(x, bound)), rank, bracket, rank, few, probes)


def _whole(x: Array) -> Bracket:
    """The bracket that encloses every rank of ``x``."""
    low, high = keys.sortable(jnp.array([-jnp.inf, jnp.inf], x.dtype))
    some = keys.sortable(x[0])
    zero = some - some  # varies over the mesh axes that the entries vary over, as a loop needs it
    none = zero.astype(jnp.int32)
    return Bracket(low + zero, high + zero, x.shape[0] + none, none)


def _probes(x: Array, rank: Array) -> tuple[Array, ...]:
    """Two keys that probably enclose the one of this rank: those of the ranks 3 standard errors away in a sample."""
    stride = x.shape[0] // _SAMPLE | 1  # odd, so that the sample does not keep to some of 2^m latents
    sample = x[::stride]
    at = rank.astype(jnp.float32) * (sample.shape[0] / x.shape[0])
    margin = 3.0 * jnp.sqrt(at) + 1.0
    ranks = (jnp.clip(r.astype(jnp.int32), 1, sample.shape[0]) for r in (at + margin, at - margin))
    return tuple(_narrow(sample, r, _whole(sample), 0).low for r in ranks)


def _chosen(x: Array, count: Array) -> Array:
    """The ``count`` largest entries as bits; of equal ones the first."""
    if x.shape[0] <= 4 * _FEW:
        low, high, _, n_high = _narrow(x, count, _whole(x), 0)
    else:
        low, high, n_low, n_high = _narrow(x, count, _whole(x), _FEW, _probes(x, count))
        between = _at_least(x, low) & ~_at_least(x, high + 1)
        few = jnp.where(jnp.arange(_FEW, dtype=jnp.int32) < n_low - n_high, x[marks.places(between, _FEW)], -jnp.inf)
        # More than _FEW are between only if all are equal or all are kept: nothing is left to narrow.
        low, high, _, above = _narrow(few, count - n_high, Bracket(low, high, n_low - n_high, n_low - n_low), 0)
        n_high = n_high + above
    above = _at_least(x, high + 1)
    level = _at_least(x, low) & ~above  # equal entries, or exactly as many as are missing
    return above | marks.first(level, count - n_high)
