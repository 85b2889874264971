"""Encoding for the winners alone: pre-activations, the selection of k latents a row, and the gradient at the selected ones.

    values, indices = topk_k(W (x - shift) + bias)

The [B, N] pre-activations are made without gradient; backwards nothing of that size arises (``sparse_matmul``).

With ``selection="bfloat16"`` the product that selects has bf16 factors, twice to eight times as fast where there are units for it, and
the k winners' values are computed again in float32, as row dots. Which latents win may then differ where two pre-activations are
within a bf16 rounding of each other (1 part in 256 of |x| |w|); the values that the loss sees are those of float32 either way.

Traffic: as ``preactivations``, and for bf16 another k rows of [D] for each row of x. Measurements: README.md of ``sparse_matmul``.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dlmscope_jax.errors import UserError

from . import sparse_matmul
from .preactivations import preactivations
from .topk import topk

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
    """The k largest pre-activations of each row and their latents, with the encoder's gradient at them.

    In float32 they come as ``lax.top_k`` orders them, ties to the lowest index. With bf16 that is the order of the rounded
    pre-activations, by which they were chosen; their values, recomputed, may be out of order by a rounding.

    Args:
      k: static, 1 <= k <= N.
      selection: the dtype of the product that selects.
      implementation: of the selection, as for ``topk``; None picks by platform and shape.

    Raises:
      UserError: a selection that is unknown; what ``topk`` raises.
    """
    check_selection("encode_topk", selection)
    fixed = jax.lax.stop_gradient((x, weight, bias, shift))
    if selection == "float32":
        values, indices = topk(preactivations(*fixed), k, implementation)
    else:
        _, indices = topk(rounded_preactivations(*fixed), k, implementation)
        rows = fixed[0] if shift is None else fixed[0] - fixed[3]
        values = sparse_matmul.dots(rows, indices, fixed[1]) + fixed[2][indices]
    return sparse_matmul.with_encoder_gradient(values, indices, x, weight, bias, shift), indices


def check_selection(what: str, selection: str) -> None:
    """Raises for a selection that is unknown."""
    if selection not in SELECTIONS:
        raise UserError(f"{what}: selection {selection!r} is not known: one of {', '.join(SELECTIONS)}")


def rounded_preactivations(x: Array, weight: Array, bias: Array, shift: Array | None) -> Float[Array, "B N"]:
    """``preactivations`` with both factors of the product rounded to bf16; added in float32. Not differentiable."""
    rows = (x if shift is None else x - shift).astype(jnp.bfloat16)
    axes = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(rows, weight.astype(jnp.bfloat16), axes, preferred_element_type=jnp.float32) + bias
