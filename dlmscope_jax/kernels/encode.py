"""Encoding for the winners alone: pre-activations, the selection of k latents a row, and the gradient at the selected ones.

    values, indices = topk_k(W (x - shift) + bias)

The pre-activations are made without gradient, and backwards nothing of the size [B, N] arises (``sparse_matmul``).

With ``selection="bfloat16"`` the product that selects has bf16 factors, twice to eight times as fast where there are units for it, and
the values of the winners are computed again in float32, as row dots. Which latents win may then differ where two pre-activations
are within a rounding of each other; the values that the loss sees are those of float32 either way.

Traffic: that of ``topk.encoded``, and for bf16 another k rows of the dictionary for each row of x. Measurements: the READMEs there.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dlmscope_jax.errors import UserError

from .axes import Axes
from .preactivations import preactivations
from .sparse_matmul import dots, dots_flat, with_encoder_gradient, with_flat_encoder_gradient
from .sparse_matmul.sharded_flat import Winners, places
from .topk.batch import topk_batch
from .topk.encoded import select_encoded
from .topk.sharded import batch_winners

Selection = Literal["float32", "bfloat16"]
SELECTIONS: tuple[Selection, ...] = ("float32", "bfloat16")


def encode_topk(
    x: Float[Array, "B D"],
    weight: Float[Array, "N D"],
    bias: Float[Array, " N"],
    shift: Float[Array, " D"] | None,
    k: int,
    *,
    selection: Selection = "float32",
    implementation: str | None = None,
) -> tuple[Float[Array, "B k"], Int[Array, "B k"]]:
    """The k largest pre-activations of each row and their latents, with the encoder's gradient at them (reverse mode).

    In float32 they come as ``lax.top_k`` orders them, ties to the lowest index. With bf16 they come in the order of the rounded
    pre-activations, by which they were chosen; their values, computed again, may be out of order by a rounding.

    Args:
      k: static, 1 <= k <= N.
      selection: what the pre-activations that are compared are rounded to.
      implementation: of the selection, as for ``topk.encoded.select_encoded``.

    Raises:
      UserError: a selection that is unknown; what ``select_encoded`` raises.
    """
    check_selection("encode_topk", selection)
    values, indices = select_encoded(x, weight, bias, shift, k, dtype=selection, implementation=implementation)
    return at_selected(values, indices, x, weight, bias, shift, selection), indices


def at_selected(
    values: Float[Array, "B k"],
    indices: Int[Array, "B k"],
    x: Float[Array, "B D"],
    weight: Float[Array, "N D"],
    bias: Float[Array, " N"],
    shift: Float[Array, " D"] | None,
    selection: Selection,
) -> Float[Array, "B k"]:
    """The pre-activations ``values`` by which latents were selected, in float32 and with the encoder's gradient."""
    if selection != "float32":
        x_, weight_, bias_, shift_ = jax.lax.stop_gradient((x, weight, bias, shift))
        values = dots(x_ if shift_ is None else x_ - shift_, indices, weight_) + bias_[indices]
    return with_encoder_gradient(values, indices, x, weight, bias, shift)


def encode_topk_batch(
    x: Float[Array, "B D"],
    weight: Float[Array, "N D"],
    bias: Float[Array, " N"],
    shift: Float[Array, " D"] | None,
    count: int,
    *,
    selection: Selection = "float32",
) -> tuple[Float[Array, " M"], Int[Array, " M"], Int[Array, " M"]]:
    """The ``count`` largest pre-activations of all rows, ``(values, rows, latents)`` as ``topk_batch`` orders them, with their gradient.

    With bf16 only the factors are rounded. The sums that are compared are float32: rounded ones would tie by the thousand at the
    least that is kept, and ties go to the first rows.

    Args:
      count: static, 1 <= count <= B N.
      selection: what the factors of the product that selects are rounded to.

    Raises:
      UserError: a selection that is unknown; what ``topk_batch`` raises.
    """
    check_selection("encode_topk_batch", selection)
    x_, weight_, bias_, shift_ = jax.lax.stop_gradient((x, weight, bias, shift))
    if selection == "float32":
        values, rows, latents = topk_batch(preactivations(x_, weight_, bias_, shift_), count)
    else:
        shifted = x_ if shift_ is None else x_ - shift_
        _, rows, latents = topk_batch(_of_rounded(shifted, weight_) + bias_, count)
        values = dots_flat(shifted, rows, latents, weight_) + bias_[latents]
    return with_flat_encoder_gradient(values, rows, latents, x, weight, bias, shift), rows, latents


def encode_winners(
    x: Float[Array, "B D"],
    weight: Float[Array, "n D"],
    bias: Float[Array, " n"],
    shift: Float[Array, " D"] | None,
    count: int | Int[Array, ""],
    room: int,
    axes: Axes,
    *,
    selection: Selection = "float32",
) -> Winners:
    """This shard's part of what ``encode_topk_batch`` selects from all rows and latents, without gradient: ``decode_winners`` has it.

    Args:
      x: this shard's rows.
      weight, bias: of this shard's latents.
      count: how many are selected from the whole batch, from 1; may be traced.
      room: static; in a batch in which this shard has more of them, they are not listed.
      axes: what divides rows and latents.
      selection: as for ``encode_topk_batch``.

    Raises:
      UserError: a selection that is unknown.
    """
    check_selection("encode_winners", selection)
    x, weight, bias, shift = jax.lax.stop_gradient((x, weight, bias, shift))
    shifted = x if shift is None else x - shift
    pre = preactivations(x, weight, bias, shift) if selection == "float32" else _of_rounded(shifted, weight) + bias
    words = batch_winners(pre, count, axes)
    rows, latents, here, overflow = places(words, len(weight), min(room, pre.size), axes)
    values = pre[rows, latents] if selection == "float32" else dots_flat(shifted, rows, latents, weight) + bias[latents]
    return Winners(words, values, rows, latents, here, overflow)


def check_selection(what: str, selection: str) -> None:
    """Raises for a selection that is unknown."""
    if selection not in SELECTIONS:
        raise UserError(f"{what}: selection {selection!r} is not known: one of {', '.join(SELECTIONS)}")


def _of_rounded(rows: Array, weight: Array) -> Array:
    """``rows @ weight.T`` of factors rounded to bf16, added in float32."""
    axes = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(rows.astype(jnp.bfloat16), weight.astype(jnp.bfloat16), axes, preferred_element_type=jnp.float32)
