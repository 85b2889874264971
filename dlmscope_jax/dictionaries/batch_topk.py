"""BatchTopK dictionaries: k latents a row on average, chosen over the whole batch; a threshold takes its place afterwards.

train: the k B largest of ReLU(pre) over all rows;   otherwise: f = z * (z > theta)      (Bussmann et al. 2024, arXiv 2412.06410)
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dlmscope_jax import kernels
from dlmscope_jax.errors import UserError

from .base import Dictionary, RowNorm
from .codes import Dense, FlatSparse


@dataclass(frozen=True)
class BatchTopK(Dictionary):
    """The static description of a BatchTopK dictionary; see ``Dictionary`` for common fields.

    Parameters: those of ``Dictionary`` and the scalar ``threshold``, a running mean of the least activation that a batch kept
    (0: none measured yet).

    Attributes:
      k: active latents a row, on average over a training batch.
      k_aux: dead latents that one row's auxiliary reconstruction uses; None: d_in / 2.

    Raises:
      UserError: sizes that are not positive, k or k_aux above the width, a skip without ``d_out``.
    """

    d_in: int
    width: int
    k: int
    d_out: int | None = None
    skip: bool = False
    k_aux: int | None = None
    input_bias: bool = False
    subtract: bool = True
    row_norm: RowNorm = "none"

    KIND: ClassVar[str] = "batch_topk"
    STATISTICS: ClassVar[tuple[str, ...]] = ("threshold",)

    def __post_init__(self):
        name = type(self).__name__
        self._check(("k",), ("k_aux",))
        if self.k > self.width:
            raise UserError(f"{name}: k = {self.k} is more than the {self.width} latents: k must be at most width")
        if self.k_aux is not None and self.k_aux > self.width:
            raise UserError(f"{name}: k_aux = {self.k_aux} is more than the {self.width} latents: k_aux must be at most width")

    @property
    def aux_count(self) -> int:
        """k_aux as it applies."""
        return min(self.width, max(1, self.d_in // 2)) if self.k_aux is None else self.k_aux

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every parameter."""
        return super().shapes() | {"threshold": ()}

    def _activation_units(self) -> tuple[str, ...]:
        return ("b_enc", "threshold")

    def _codes(self, params: dict, x: Float[Array, "B D"], train: bool = False) -> Dense | FlatSparse:
        if train:
            return self._batch_codes(params, x)
        pre = self._preactivations(params, x)
        return Dense(jnp.where(pre > params["threshold"], jax.nn.relu(pre), 0.0))

    def _batch_codes(self, params: dict, x: Float[Array, "B D"]) -> FlatSparse:
        """The k B largest pre-activations of the batch, largest first, negative ones cut to zero."""
        pre = jax.lax.stop_gradient(self._preactivations(params, x))
        values, flat = kernels.topk(pre.reshape(1, -1), self.k * pre.shape[0])
        rows, latents = jnp.divmod(flat[0], self.width)
        shift = self._shift(params)
        values = kernels.with_flat_encoder_gradient(values[0], rows, latents, x, params["W_enc"], params["b_enc"], shift)
        return FlatSparse(jax.nn.relu(values), rows, latents, (pre.shape[0],))
