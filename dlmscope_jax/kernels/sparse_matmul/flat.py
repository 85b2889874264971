"""Products of flat-sparse codes (BatchTopK, Matryoshka): M pairs (row, latent) of a batch, in any order.

``combine`` and ``dots`` exist twice, as for row-sparse codes: ``gather`` takes a chunk of pairs at a time, so that the temporary is
[chunk, D] and never [M, D], and adds it to the result by a scatter; ``reference`` writes the code out and multiplies matrices. On CPU both
add in a fixed order.

Record (medians of CPU time on a busy machine, float32, jax 0.10.2, 2-core CPU, B = N = 2048, D = 192, M = k B pairs in row order; ``outer``
is ``combine`` with rows and latents exchanged, the gradient of the matrix):

| primitive | k = 32: gather / reference | k = 128    | k = 256    |
|-----------|------------------------|------------|------------|
| combine   | 3 / 18 ms              | 12 / 18 ms | 24 / 19 ms |
| outer     | 3 / 19 ms              | 11 / 21 ms | 18 / 24 ms |
| dots      | 3 / 19 ms              | 12 / 19 ms | 22 / 19 ms |

The sums cross near N / k = 8: ``gather`` on CPU from there. Chunks of 1024, 2048 and 4096 pairs differ by less than the noise, 256 and
16384 take three times as long; pairs in random order cost 0 to 35 % more; a segment sum of all pairs at once takes 32 ms in place of
3. Nothing has been measured on accelerators, where a scatter adds in no fixed order; the ratio of row-sparse codes is taken.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dlmscope_jax.errors import UserError
from dlmscope_jax.kernels import sparse_matmul

_HIGHEST = jax.lax.Precision.HIGHEST
_CHUNK = 2048
_GATHER_FROM_RATIO_CPU = 8


def _chunks(*arrays: Array) -> tuple[int, list[Array]]:
    """[M] arrays as [n, chunk], padded with zeros (value 0 at row 0 and latent 0 adds nothing)."""
    size = min(_CHUNK, arrays[0].shape[0])
    n = -(-arrays[0].shape[0] // size)
    return n, [jnp.pad(a, (0, n * size - a.shape[0])).reshape(n, size) for a in arrays]


def _combine_gather(values: Array, rows: Array, latents: Array, weight: Array, n_rows: int) -> Array:
    n, (v, r, i) = _chunks(values, rows, latents)

    def add(j, out):
        return out.at[r[j]].add(v[j][:, None] * weight[i[j]])

    return jax.lax.fori_loop(0, n, add, jnp.zeros((n_rows, weight.shape[1]), jnp.result_type(values, weight)))


def _combine_dense(values: Array, rows: Array, latents: Array, weight: Array, n_rows: int) -> Array:
    code = jnp.zeros((n_rows, weight.shape[0]), values.dtype).at[rows, latents].add(values)
    return jnp.matmul(code, weight, precision=_HIGHEST)


def _dots_gather(left: Array, rows: Array, latents: Array, weight: Array) -> Array:
    _, (r, i) = _chunks(rows, latents)
    ones = jnp.ones(weight.shape[1], weight.dtype)  # on CPU a product with ones sums rows twice as fast as a sum does

    def chunk(pair):
        return jnp.matmul(left[pair[0]] * weight[pair[1]], ones, precision=_HIGHEST)

    return jax.lax.map(chunk, (r, i)).reshape(-1)[: rows.shape[0]]


def _dots_dense(left: Array, rows: Array, latents: Array, weight: Array) -> Array:
    return jnp.matmul(left, weight.T, precision=_HIGHEST)[rows, latents]


IMPLEMENTATIONS = {"gather": (_combine_gather, _dots_gather), "reference": (_combine_dense, _dots_dense)}


def combine(values: Array, rows: Array, latents: Array, weight: Array, n_rows: int, implementation: str = "gather") -> Array:
    """``out[rows[m]] += values[m] * weight[latents[m]]``: [M], [M], [M], [N, D] -> [n_rows, D]."""
    return IMPLEMENTATIONS[implementation][0](values, rows, latents, weight, n_rows)


def dots(left: Array, rows: Array, latents: Array, weight: Array, implementation: str = "gather") -> Array:
    """``left[rows[m]] . weight[latents[m]]``: [B, D], [M], [M], [N, D] -> [M]."""
    return IMPLEMENTATIONS[implementation][1](left, rows, latents, weight)


def default_implementation(width: int, pairs: int, n_rows: int, platform: str) -> str:
    """The implementation taken when none is named, for ``pairs`` entries of a code [n_rows, width] on ``platform``."""
    if platform == "cpu":
        return "gather" if width * n_rows >= pairs * _GATHER_FROM_RATIO_CPU else "reference"
    return sparse_matmul.default_implementation(width, -(-pairs // n_rows), platform)


def _named(implementation: str | None, width: int, pairs: int, n_rows: int) -> str:
    name = implementation or default_implementation(width, pairs, n_rows, jax.default_backend())
    if name not in IMPLEMENTATIONS:
        raise UserError(f"flat sparse product: implementation {name!r} is not known: one of {', '.join(IMPLEMENTATIONS)}")
    return name


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _decode(values: Array, rows: Array, latents: Array, weight: Array, n_rows: int, name: str) -> Array:
    return combine(values, rows, latents, weight, n_rows, name)


def _decode_forward(values, rows, latents, weight, n_rows, name):
    return _decode(values, rows, latents, weight, n_rows, name), (values, rows, latents, weight)


def _decode_backward(n_rows, name, saved, cotangent):
    values, rows, latents, weight = saved
    d_weight = combine(values, latents, rows, cotangent, weight.shape[0], name)
    return dots(cotangent, rows, latents, weight, name), None, None, d_weight


_decode.defvjp(_decode_forward, _decode_backward)


def decode_flat(
    values: Float[Array, " M"],
    rows: Int[Array, " M"],
    latents: Int[Array, " M"],
    weight: Float[Array, "N D"],
    n_rows: int,
    implementation: str | None = None,
) -> Float[Array, "B D"]:
    """``out[b] = sum over m with rows[m] = b of values[m] * weight[latents[m]]``, differentiable (reverse) in values and weight.

    Args:
      n_rows: B; a row without a pair is 0.
      implementation: ``"gather"`` or ``"reference"``; None picks by platform and N B / M.

    Raises:
      UserError: an implementation that is unknown.
    """
    return _decode(values, rows, latents, weight, n_rows, _named(implementation, weight.shape[0], values.shape[0], n_rows))


def decode_prefixes(
    values: Float[Array, " M"],
    rows: Int[Array, " M"],
    latents: Int[Array, " M"],
    weight: Float[Array, "N D"],
    n_rows: int,
    prefixes: tuple[int, ...],
) -> Float[Array, "G B D"]:
    """What each prefix of the latents decodes to: out[g] is ``decode_flat`` of the pairs with ``latents < prefixes[g]``.

    One pass: every pair is added to the accumulator of the first prefix that holds it, and the G accumulators are summed up
    afterwards. The gradient takes one pass as well. Always by ``gather``.

    Args:
      prefixes: ascending, the last one N.
    """
    first = jnp.searchsorted(jnp.array(prefixes, latents.dtype), latents, side="right").astype(rows.dtype)
    parts = decode_flat(values, first * n_rows + rows, latents, weight, len(prefixes) * n_rows, "gather")
    upto = [parts[:n_rows]]
    for g in range(1, len(prefixes)):
        upto.append(upto[-1] + parts[g * n_rows : (g + 1) * n_rows])
    return jnp.stack(upto)


@partial(jax.custom_vjp, nondiff_argnums=(7,))
def _attach(values, rows, latents, x, weight, bias, shift, name):
    return values


def _attach_forward(values, rows, latents, x, weight, bias, shift, name):
    return values, (rows, latents, x, weight, bias, shift)


def _attach_backward(name, saved, cotangent):
    rows, latents, x, weight, bias, shift = saved
    d_bias = jnp.zeros_like(bias).at[latents].add(cotangent)
    d_weight = combine(cotangent, latents, rows, x if shift is None else x - shift, weight.shape[0], name)
    d_x = combine(cotangent, rows, latents, weight, x.shape[0], name)
    d_shift = None if shift is None else -jnp.matmul(d_bias, weight, precision=_HIGHEST)
    return jnp.zeros_like(cotangent), None, None, d_x, d_weight, d_bias, d_shift


_attach.defvjp(_attach_forward, _attach_backward)


def with_flat_encoder_gradient(
    values: Float[Array, " M"],
    rows: Int[Array, " M"],
    latents: Int[Array, " M"],
    x: Float[Array, "B D"],
    weight: Float[Array, "N D"],
    bias: Float[Array, " N"],
    shift: Float[Array, " D"] | None = None,
    implementation: str | None = None,
) -> Float[Array, " M"]:
    """As ``with_encoder_gradient``, for the pre-activations of the pairs (rows[m], latents[m])."""
    return _attach(values, rows, latents, x, weight, bias, shift, _named(implementation, weight.shape[0], values.shape[0], x.shape[0]))
