"""Attention: the pattern, the mix of values, and both at once without ever holding a whole pattern."""

import math
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from .attention_kernels import cudnn, cudnn_supports, splash, splash_supports
from .visibility import Visibility

__all__ = ["Visibility", "attend", "attention_pattern", "mix"]

SCORES = 1024 * 1024  # the most scores of one head and sequence that exist at a time
CPU_QUERIES = 256  # queries that a CPU takes at a time


def attention_pattern(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    see: Visibility,
    scale: float,
    softcap: float | None,
    precision: jax.lax.Precision | None,
) -> Float[Array, "B N T S"]:
    """How much each query takes from each key; scores and softmax in float32, the pattern in q's dtype.

    Args:
      q, k: rotated heads; each of the K key heads serves N / K query heads.
      see: which keys each query sees.
      scale: multiplies the scores.
      softcap: c of ``c tanh(score / c)``, None for none.
      precision: of the product.

    In bfloat16 the pattern is rounded after it is normalised, the weights of ``attend`` before: logits of a pass that makes
    the pattern differ from those of one that does not by as much as either differs from float32.
    """
    scores = _scores(q, k, see, scale, softcap, precision)
    return jax.nn.softmax(scores, axis=-1).astype(q.dtype).reshape(q.shape[0], q.shape[2], q.shape[1], k.shape[1])


def mix(pattern: Float[Array, "B N T S"], v: Float[Array, "B S K H"], precision: jax.lax.Precision | None) -> Float[Array, "B T N H"]:
    """What each query takes: the values weighted by its pattern."""
    batch, n_heads, length, keys = pattern.shape
    grouped = pattern.reshape(batch, v.shape[2], n_heads // v.shape[2], length, keys)
    return jnp.einsum("bkgts,bskh->btkgh", grouped, v, precision=precision).reshape(batch, length, n_heads, v.shape[3])


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    see: Visibility,
    scale: float,
    softcap: float | None,
    precision: jax.lax.Precision | None,
    mesh: Mesh | None = None,
) -> Float[Array, "B T N H"]:
    """``mix(attention_pattern(q, k), v)`` without keeping the pattern: never more than 1,024 x 1,024 scores of one head at a time.

    The platform that the program is lowered for decides: cuDNN's kernel or splash attention where they can do the case
    (``attention_kernels.py``), else the whole batch at once, in chunks of queries above 1,024 tokens. On a CPU the
    sequences go one after the other, in chunks of 256 queries, so that the scores stay near the cores. The backward pass
    computes the scores again.

    Measured in float32 on 2 cores, forward / gradient in ms, before and after (the pattern of a whole sequence, normalised
    and then mixed, against chunks, mixed and then normalised): 12 heads of 64, 4 x 256 tokens 16 / 56 and 10 / 40; 4 x 512
    tokens 74 / 204 and 28 / 150; 2 x 1,024 tokens 350 / 585 and 67 / 321; 14 heads of 64 on 2 key heads, 4 x 256 tokens
    14 / 55 and 7.5 / 36.

    Args:
      q, k, v: heads; each of the K key heads serves N / K query heads.
      see: which keys each query sees.
      scale: multiplies the scores.
      softcap: c of ``c tanh(score / c)``, None for none.
      precision: of the products.
      mesh: the devices that the arrays lie on, axes ``data`` and ``replica`` (batch) and ``model`` (heads); without it a TPU
        program for several devices goes in chunks.
    """
    whole = partial(_attended, scale=scale, softcap=softcap, precision=precision)
    pieces = -(-q.shape[1] * k.shape[1] // SCORES)
    chunked = partial(_by_chunk, whole, math.ceil(q.shape[1] / pieces))
    kernels = {}
    if cudnn_supports(q, k, see, softcap):
        kernels["cuda"] = partial(cudnn, scale=scale)
    if splash_supports(q, k, see, mesh):
        kernels["tpu"] = partial(splash, scale=scale, softcap=softcap, mesh=mesh)

    # without this, a program for one platform would keep zeros for what the others save for their backward pass
    @partial(jax.checkpoint, prevent_cse=False)
    def run(q: Array, k: Array, v: Array, see: Visibility) -> Array:
        by_sequence = partial(_by_sequence, partial(_by_chunk, whole, CPU_QUERIES))
        return jax.lax.platform_dependent(q, k, v, see, cpu=by_sequence, default=chunked, **kernels)

    return run(q, k, v, see)


def _scores(q: Array, k: Array, see: Visibility, scale: float, softcap: float | None, precision: jax.lax.Precision | None) -> Array:
    """[B, K, N / K, T, S] in float32; the lowest finite number where a key is not seen."""
    batch, length, n_heads, width = q.shape
    # heads first: on a CPU the product then reads both sides in order
    grouped = q.reshape(batch, length, k.shape[2], n_heads // k.shape[2], width).transpose(0, 2, 3, 1, 4)
    keys = k.transpose(0, 2, 1, 3)
    scores = jnp.einsum("bkgth,bksh->bkgts", grouped, keys, precision=precision, preferred_element_type=jnp.float32) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if (mask := see.mask()) is not None:
        scores = jnp.where(mask[:, :, None], scores, jnp.finfo(jnp.float32).min)
    return scores


def _attended(
    q: Array, k: Array, v: Array, see: Visibility, scale: float, softcap: float | None, precision: jax.lax.Precision | None
) -> Array:
    """The values weighted by e^(score - largest score), divided by the sum of the weights last: one pass less over the scores."""
    scores = _scores(q, k, see, scale, softcap, precision)
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    values, total = v.transpose(0, 2, 1, 3), jnp.sum(weights, axis=-1)
    mixed = jnp.einsum(
        "bkgts,bksh->bkgth", weights.astype(v.dtype), values, precision=precision, preferred_element_type=jnp.float32
    )  # fmt: skip
    return (mixed / total[..., None]).astype(q.dtype).transpose(0, 3, 1, 2, 4).reshape(q.shape)


def _by_chunk(attended: partial, size: int, q: Array, k: Array, v: Array, see: Visibility) -> Array:
    """The queries ``size`` at a time; the last chunk is filled up with queries that are thrown away."""
    batch, length = q.shape[:2]
    if length <= size:
        return attended(q, k, v, see)
    chunks = -(-length // size)

    def cut(x: Array) -> Array:
        filled = jnp.pad(x, [(0, 0), (0, chunks * size - length)] + [(0, 0)] * (x.ndim - 2))
        return filled.reshape(x.shape[0], chunks, size, *x.shape[2:]).swapaxes(0, 1)

    @partial(jax.checkpoint, prevent_cse=False)
    def one(chunk: tuple[Array, Array]) -> Array:
        return attended(chunk[0], k, v, replace(see, query=chunk[1]))

    out = jax.lax.map(one, (cut(q), cut(see.query)))
    return out.swapaxes(0, 1).reshape(batch, chunks * size, *q.shape[2:])[:, :length]


def _by_sequence(attended: partial, q: Array, k: Array, v: Array, see: Visibility) -> Array:
    """The sequences of the batch one after the other."""
    rows = lambda positions: jnp.broadcast_to(positions, (q.shape[0], positions.shape[1]))  # noqa: E731

    @partial(jax.checkpoint, prevent_cse=False)
    def one(sequence: tuple[Array, ...]) -> Array:
        q, k, v, query, key = (a[None] for a in sequence)
        return attended(q, k, v, replace(see, query=query, key=key))[0]

    return jax.lax.map(one, (q, k, v, rows(see.query), rows(see.key)))
