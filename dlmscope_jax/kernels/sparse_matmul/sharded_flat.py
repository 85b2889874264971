"""BatchTopK over devices: a batch's largest pre-activations, decoded where they are, with rows and latents divided.

A shard holds some rows of the batch and some latents. Which of its entries win is settled between the shards
(``topk.sharded.batch_winners``). How many that are differs from shard to shard and from batch to batch, and shapes must not: they are
taken out into ``room`` places, about twice their mean number. In a batch in which a shard has more of them, all shards write
their codes out and multiply dense matrices, which is exact as well. It is one branch, taken by all alike, and its backward pass
is a branch of its own that computes again what it needs, so that nothing of one way is kept, or filled with zeros, for the other.

Traffic between devices: that of ``batch_winners``, one number that says whether there is room, and what the caller adds up over the
latents: [G, B, D], G the number of prefixes (1 without). A shard makes its [B, n] pre-activations once; where there is no room once more
forward and once backward, with a dense product for each prefix.

Range: float32; inside ``jax.shard_map`` or ``jax.pmap`` with ``check_vma`` off. Not measured: no two devices were at hand.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from dlmscope_jax.kernels.axes import Axes
from dlmscope_jax.kernels.preactivations import preactivations
from dlmscope_jax.kernels.topk import marks

from . import reference
from .gradients import decode_flat, with_flat_encoder_gradient


class Winners(NamedTuple):
    """The entries of a shard that are kept.

    Attributes:
      words: [B, n / 32] which they are, a bit each (``marks.pack``).
      values, rows, latents: [room] the same in row-major order; meaningless from place ``count`` on.
      count: how many there are.
      overflow: whether ``count`` is above the room, here or on another shard.
    """

    words: UInt32[Array, "B words"]
    values: Float[Array, " room"]
    rows: Int[Array, " room"]
    latents: Int[Array, " room"]
    count: Int[Array, ""]
    overflow: Bool[Array, ""]


class Decoded(NamedTuple):
    """What a shard's winners make, negative ones cut to zero.

    Attributes:
      parts: [G, B, D] what the latents of each group decode to: a part of the sum over the shards of latents.
      count: [B] how many of its latents are active in each row.
      fired: [n] in how many of its rows each latent is active.
      least: the least positive value; inf where there is none.
    """

    parts: Float[Array, "G B D"]
    count: Int[Array, " B"]
    fired: Int[Array, " n"]
    least: Float[Array, ""]


def places(words: UInt32[Array, "B words"], width: int, room: int, axes: Axes) -> tuple[Array, Array, Array, Array]:
    """``(rows, latents, count, overflow)`` of a shard's winners; see ``Winners``.

    Args:
      width: n, latents of this shard.
      room: at most B n.
    """
    count = marks.total(words.reshape(-1))
    padded = 32 * words.shape[1]
    j = jnp.arange(room, dtype=jnp.int32)
    flat = jnp.where(j < count, marks.places(words.reshape(-1), room), j)  # what is unused lies apart, and adds zeros
    overflow = count > room
    if axes.every:
        overflow = jax.lax.pmax(overflow.astype(jnp.int32), axes.every) > 0
    return flat // padded, jnp.minimum(flat % padded, width - 1), count, overflow


def decode_winners(
    x: Float[Array, "B D"],
    weight: Float[Array, "n D"],
    bias: Float[Array, " n"],
    shift: Float[Array, " D"] | None,
    decoder: Float[Array, "n D_out"],
    winners: Winners,
    group: Int[Array, " n"] | None = None,
    groups: int = 1,
) -> Decoded:
    """The winners' positive pre-activations times the decoder, by groups of latents.

    Differentiable (reverse mode) in ``x``, the encoder, its ``shift`` and the decoder, through ``parts``; the gradient is that
    of the pre-activations that won.

    Args:
      x, shift: the same on every shard of the latents (``axes.shared``).
      weight, bias, decoder: of this shard's latents.
      group: the group of each latent, 0..groups - 1; None: all are of one.
    """
    group = jnp.zeros(len(weight), jnp.int32) if group is None else group
    parts, *report = _decoded((x, weight, bias, shift, decoder), winners, group, groups)
    return Decoded(parts, *jax.lax.stop_gradient(report))


def _from_pairs(arguments: tuple, winners: Winners, group: Array, groups: int) -> tuple[Array, Array]:
    """The parts from the winners one by one, and their activations."""
    x, weight, bias, shift, decoder = arguments
    chosen = with_flat_encoder_gradient(winners.values, winners.rows, winners.latents, x, weight, bias, shift)
    values = jnp.where(jnp.arange(len(chosen), dtype=jnp.int32) < winners.count, jax.nn.relu(chosen), 0.0)
    rows = group[winners.latents] * len(x) + winners.rows
    return decode_flat(values, rows, winners.latents, decoder, groups * len(x)).reshape(groups, len(x), -1), values


def _from_all(arguments: tuple, winners: Winners, group: Array, groups: int) -> tuple[Array, Array]:
    """The parts from the code written out, and the code."""
    x, weight, bias, shift, decoder = arguments
    code = written_out(x, weight, bias, shift, winners.words)
    if groups == 1:
        return reference.matmul(code, decoder)[None], code
    return jnp.stack([reference.matmul(jnp.where(group == g, code, 0.0), decoder) for g in range(groups)]), code


def written_out(x: Array, weight: Array, bias: Array, shift: Array | None, words: UInt32[Array, "B words"]) -> Float[Array, "B n"]:
    """All activations of this shard's latents, with their gradient: positive pre-activations where they won, else 0."""
    return jnp.where(marks.unpack(words, len(weight)), jax.nn.relu(preactivations(x, weight, bias, shift)), 0.0)


def _tally(values: Array, winners: Winners, n_rows: int, width: int) -> tuple[Array, Array, Array]:
    """Active latents of each row, active rows of each latent, the least positive value; of activations listed or written out."""
    on = (values != 0).astype(jnp.int32)
    least = jnp.where(values > 0, values, jnp.inf).min()
    if values.ndim == 2:
        return on.sum(axis=1, dtype=jnp.int32), on.sum(axis=0, dtype=jnp.int32), least
    return jnp.zeros(n_rows, jnp.int32).at[winners.rows].add(on), jnp.zeros(width, jnp.int32).at[winners.latents].add(on), least


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _decoded(arguments: tuple, winners: Winners, group: Array, groups: int) -> tuple[Array, Array, Array, Array]:
    x, weight = arguments[:2]

    def by(way):
        parts, values = way(arguments, winners, group, groups)
        return parts, *_tally(values, winners, len(x), len(weight))

    return _either(winners, len(x) * len(weight), partial(by, _from_all), partial(by, _from_pairs))


def _forward(arguments, winners, group, groups):
    return _decoded(arguments, winners, group, groups), (arguments, winners, group)


def _backward(groups, saved, cotangents):
    arguments, winners, group = saved

    def back(way):
        return jax.vjp(lambda arguments: way(arguments, winners, group, groups)[0], arguments)[1](cotangents[0])[0]

    x, weight = arguments[:2]
    return _either(winners, len(x) * len(weight), partial(back, _from_all), partial(back, _from_pairs)), None, None


_decoded.defvjp(_forward, _backward)


def _either(winners: Winners, entries: int, written: Callable[[], Any], listed: Callable[[], Any]) -> Any:
    """``written()`` where some shard's winners have no room, else ``listed()``; no choice where there is room for all entries."""
    return listed() if len(winners.values) >= entries else jax.lax.cond(winners.overflow, written, listed)
