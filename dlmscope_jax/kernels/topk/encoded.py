"""The k largest pre-activations of rows, straight from the encoder: a product and a selection.

``separate`` makes all pre-activations [B, N] and selects from them. ``by_rows`` does the same with some rows at a time. ``tiled`` makes
them for some latents at a time, selects from those, and merges with the k best so far, which come first and so win ties, as their
index is lower: the same k at the end, for any data.
A product may differ in its last bits with the shape it is computed in; the selection is exact for the products that are made.

Traffic: ``separate`` writes B N pre-activations and reads them (``topk``'s README); ``tiled`` keeps a tile of 2^24 entries at most, in
float32 64 MiB, and reads the rows once a tile. Both read the weights once; ``by_rows`` reads them once for every 2^23 pre-activations,
which on a CPU costs less than memory of the size of all of them, handed out anew by the system in every step.

Range: all do everything that ``topk`` does. The default is ``separate`` until the pre-activations pass 1 GiB, ``tiled`` from there on;
on a CPU ``by_rows`` from 2^24 pre-activations on.

Measurement: README.md.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dlmscope_jax.errors import UserError
from dlmscope_jax.kernels import dispatch
from dlmscope_jax.kernels.dispatch import Implementation, Problem
from dlmscope_jax.kernels.preactivations import preactivations

from . import topk

_TILE_ENTRIES = 2**24
_ROWS_ENTRIES = 2**23
_LEAST_ROWS = 64  # of a part: the weights are read once a part
_LARGE = 2**30  # bytes of pre-activations


def product(x: Array, weight: Array, bias: Array, shift: Array | None, dtype) -> Array:
    """Pre-activations in ``dtype``: float32 at the highest precision, or of factors rounded to ``dtype`` and added in float32."""
    if dtype == jnp.float32:
        return preactivations(x, weight, bias, shift)
    rows = x if shift is None else x.astype(jnp.float32) - shift.astype(jnp.float32)
    out = jax.lax.dot_general(rows.astype(dtype), weight.astype(dtype), (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    return (out + bias.astype(jnp.float32)).astype(dtype)


def separate(x: Array, weight: Array, bias: Array, shift: Array | None, *, k: int, dtype) -> tuple[Array, Array]:
    return topk(product(x, weight, bias, shift, dtype), k)


def by_rows(x: Array, weight: Array, bias: Array, shift: Array | None, *, k: int, dtype) -> tuple[Array, Array]:
    rows, parts = x.shape[0], max(1, -(-x.shape[0] * weight.shape[0] // _ROWS_ENTRIES))
    size = max(1, -(-rows // parts))
    filling = -rows % size
    x = jnp.pad(x, ((0, filling), (0, 0))) if filling else x
    found = jax.lax.map(lambda some: separate(some, weight, bias, shift, k=k, dtype=dtype), x.reshape(-1, size, x.shape[1]))
    values, indices = (a.reshape(-1, k)[:rows] for a in found)
    return values, indices


def tile_width(rows: int, width: int, k: int) -> int:
    """Latents in a tile: tiles of nearly the same width that hold ``_TILE_ENTRIES`` at most, and k latents at least."""
    most = max(k, _TILE_ENTRIES // max(1, rows))
    return max(k, -(-width // -(-width // most)))


def tiled(x: Array, weight: Array, bias: Array, shift: Array | None, *, k: int, dtype) -> tuple[Array, Array]:
    width, tile = weight.shape[0], tile_width(x.shape[0], weight.shape[0], k)

    def best(start, size):
        some, its_bias = (jax.lax.dynamic_slice_in_dim(a, start, size) for a in (weight, bias))
        values, indices = topk(product(x, some, its_bias, shift, dtype), min(k, size))
        return values, indices + start

    def merge(state, start, size):
        values, indices = (jnp.concatenate(pair, axis=1) for pair in zip(state, best(start, size), strict=True))
        values, places = topk(values, k)
        return values, jnp.take_along_axis(indices, places, axis=1)

    whole = width // tile
    state = jax.lax.fori_loop(1, whole, lambda i, state: merge(state, i * tile, tile), best(jnp.int32(0), tile))
    return merge(state, jnp.int32(whole * tile), width - whole * tile) if width % tile else state


IMPLEMENTATIONS = {"separate": Implementation(separate), "by_rows": Implementation(by_rows), "tiled": Implementation(tiled)}


def default(problem: Problem, platform: str) -> str:
    """The implementation that ``select_encoded`` takes when none is named."""
    entries = problem.rows * problem.width
    if platform == "cpu":
        return "by_rows" if entries >= 2 * _ROWS_ENTRIES and problem.width <= _ROWS_ENTRIES // _LEAST_ROWS else _by_size(entries, problem)
    return _by_size(entries, problem)


def _by_size(entries: int, problem: Problem) -> str:
    return "tiled" if entries * problem.dtype.itemsize > _LARGE else "separate"


def select_encoded(
    x: Float[Array, "B D"],
    weight: Float[Array, "N D"],
    bias: Float[Array, " N"],
    shift: Float[Array, " D"] | None,
    k: int,
    *,
    dtype=jnp.float32,
    implementation: str | None = None,
) -> tuple[Float[Array, "B k"], Int[Array, "B k"]]:
    """The ``k`` largest entries of ``(x - shift) @ weight.T + bias`` in each row, as ``topk`` orders them; no derivative.

    Args:
      x: rows.
      weight, bias, shift: of the encoder, one latent a row of the weight.
      k: static, 1 <= k <= N.
      dtype: float32, or bfloat16 or float16, to which factors and sums are rounded for the selection; sums are made in float32.
      implementation: ``"separate"``, ``"by_rows"`` or ``"tiled"``; None picks by the size of the pre-activations.

    Returns:
      values in ``dtype`` and indices, int32.

    Raises:
      UserError: k outside 1..N, another dtype, an implementation that is unknown.
    """
    dtype = jnp.dtype(dtype)
    if dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise UserError(f"select_encoded: dtype must be float32, bfloat16 or float16, got {dtype}")
    if not 1 <= k <= weight.shape[0]:
        raise UserError(f"select_encoded: k = {k} must lie between 1 and the {weight.shape[0]} latents")
    problem = Problem(x.shape[0], weight.shape[0], k, x.shape[1], dtype)
    x, weight, bias, shift = jax.lax.stop_gradient((x, weight, bias, shift))
    return dispatch.run("select_encoded", IMPLEMENTATIONS, default, problem, implementation, x, weight, bias, shift, k=k, dtype=dtype)
