"""Gated dictionaries: one path decides which latents are active, another how strongly.

pi = W_enc (x - shift) + b_gate,   f = (pi > 0) * ReLU(exp(r_mag) * W_enc (x - shift) + b_mag)
                                                                 (Rajamanoharan et al. 2024, arXiv 2404.16014)
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dlmscope_jax import kernels

from .base import Dictionary, RowNorm
from .codes import Dense


@dataclass(frozen=True)
class Gated(Dictionary):
    """The static description of a gated dictionary; see ``Dictionary`` for common fields.

    Parameters: those of ``Dictionary`` with ``b_gate``, ``b_mag`` and ``r_mag`` [N] in place of ``b_enc``.

    Raises:
      UserError: sizes that are not positive, a skip without ``d_out``.
    """

    d_in: int
    width: int
    d_out: int | None = None
    skip: bool = False
    input_bias: bool = False
    subtract: bool = True
    row_norm: RowNorm = "none"

    KIND: ClassVar[str] = "gated"

    def __post_init__(self):
        self._check(())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every parameter."""
        shared = {name: shape for name, shape in super().shapes().items() if name != "b_enc"}
        return shared | dict.fromkeys(("b_gate", "b_mag", "r_mag"), (self.width,))

    def _activation_units(self) -> tuple[str, ...]:
        return ("b_gate", "b_mag")

    def _paths(self, params: dict, x: Float[Array, "B D"]) -> tuple[Float[Array, "B N"], Float[Array, "B N"]]:
        """pi and the pre-activations of the magnitude path."""
        product = kernels.preactivations(x, params["W_enc"], jnp.zeros_like(params["b_gate"]), self._shift(params))
        return product + params["b_gate"], jnp.exp(params["r_mag"]) * product + params["b_mag"]

    def _codes(self, params: dict, x: Float[Array, "B D"], train: bool = False) -> Dense:
        gate, magnitude = self._paths(params, x)
        return Dense(jnp.where(gate > 0, jax.nn.relu(magnitude), 0.0))
