"""Products of row-sparse codes with a dictionary whose latents are divided over devices.

Each shard holds some rows of the dictionary and, for every row of the batch, its own winners: values and indices among its own
latents (``topk.sharded.among_shards``). It decodes these, and one sum over the shards gives [B, D]. Backwards nothing has to move:
the cotangent of the sum is the same on every shard, and row dots and weight gradients are local.

What is the same on every shard (rows of the batch, the pre-encoder bias) passes through ``shared`` (``kernels/axes.py``) before it
meets what is divided. Then its gradient is the sum over the shards; where nobody asks for that gradient the sum is not in the program.

Traffic between devices: forward the [B, D] sum; backward [D] for the pre-encoder bias, [B, D] for the gradient of the rows where
it is wanted. A shard reads the dictionary rows of all its candidates, of those that lost as well, with the value 0.

Range: that of ``kernels.decode`` and ``kernels.encode_topk``; inside ``jax.shard_map`` with ``check_vma`` on or
off (compiled for TPUs with it off). Not measured: no two devices were at hand.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dlmscope_jax import kernels
from dlmscope_jax.kernels.axes import shared, summed
from dlmscope_jax.kernels.encode import Selection, at_selected, check_selection
from dlmscope_jax.kernels.topk.encoded import select_encoded
from dlmscope_jax.kernels.topk.sharded import among_shards


def encode_topk(
    x: Float[Array, "B D"],
    weight: Float[Array, "n D"],
    bias: Float[Array, " n"],
    shift: Float[Array, " D"] | None,
    k: int,
    axis: str,
    *,
    selection: Selection = "float32",
    now: int | Int[Array, ""] | None = None,
) -> tuple[Float[Array, "B c"], Int[Array, "B c"]]:
    """This shard's part of the k largest entries of each row of ``(x - shift) @ weight.T + bias``, over the latents of all shards.

    Args:
      x, shift: the same on every shard; the gradient of each is the sum over the shards.
      weight, bias: of this shard's n latents.
      k: static, at most the latents of all shards.
      selection: as for ``kernels.encode_topk``.
      now: how many of the k are kept, may be traced; None: all.

    Returns:
      values [B, min(k, n)], 0 where a candidate lost, and indices among this shard's latents, distinct within a row. The gradient
      is that of the pre-activations that won.

    Raises:
      UserError: k outside 1..latents of all shards.
    """
    check_selection("encode_topk", selection)
    encoder = shared(x, axis), weight, bias, None if shift is None else shared(shift, axis)
    ranked, indices = select_encoded(*encoder, min(k, weight.shape[0]), dtype=selection)
    values = at_selected(ranked, indices, *encoder, selection)
    return jnp.where(among_shards(ranked, k, axis, now), values, 0.0), indices


def decode(values: Float[Array, "B c"], indices: Int[Array, "B c"], weight: Float[Array, "n D"], axis: str) -> Float[Array, "B D"]:
    """``kernels.decode`` summed over the shards: each has its own latents' values, indices and weight rows.

    Differentiable (reverse mode) in ``values`` and ``weight``; the cotangent must be the same on every shard.
    """
    return summed(kernels.decode(values, indices, weight), axis)
