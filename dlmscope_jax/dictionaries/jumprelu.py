"""JumpReLU dictionaries: a threshold for every latent, learned through a straight-through estimator.

f = z * (z > theta),   z = ReLU(W_enc (x - shift) + b_enc)        (Rajamanoharan et al. 2024, arXiv 2407.14435)
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dlmscope_jax.errors import UserError

from .base import Dictionary, RowNorm
from .codes import Dense


@dataclass(frozen=True)
class JumpReLU(Dictionary):
    """The static description of a JumpReLU dictionary; see ``Dictionary`` for common fields.

    Parameters: those of ``Dictionary`` and ``threshold [N]``, theta itself (not its logarithm, which hardly moves under Adam).

    Attributes:
      d_in, width, d_out, skip, input_bias, subtract, row_norm: see ``Dictionary``.
      penalty: ``"step"`` (lambda * L0), ``"target"`` (lambda * (L0 / L0* - 1)^2) or ``"tanh"`` (lambda * sum tanh(4 z |W_dec,i|),
        Anthropic, January 2025, with free decoder norms, straight-through gradients to all parameters and a pre-activation loss).
      bandwidth: width of the rectangle kernel, in units of the data (rows whose mean squared norm is 1).

    Raises:
      UserError: sizes that are not positive, a skip without ``d_out``, a penalty that is not known, a bandwidth that is not above 0.
    """

    d_in: int
    width: int
    d_out: int | None = None
    skip: bool = False
    penalty: Literal["step", "target", "tanh"] = "step"
    bandwidth: float = 1e-3
    input_bias: bool = False
    subtract: bool = True
    row_norm: RowNorm = "none"

    KIND: ClassVar[str] = "jumprelu"

    def __post_init__(self):
        self._check(())
        if self.penalty not in ("step", "target", "tanh"):
            raise UserError(f"JumpReLU: penalty {self.penalty!r} is not known: step, target or tanh")
        if not self.bandwidth > 0:
            raise UserError(f"JumpReLU: bandwidth = {self.bandwidth!r} must be above 0")

    @property
    def unit_decoder(self) -> bool:
        """Whether training holds decoder rows at unit norm."""
        return self.penalty != "tanh"

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every parameter."""
        return super().shapes() | {"threshold": (self.width,)}

    def _activation_units(self) -> tuple[str, ...]:
        return ("b_enc", "threshold")

    def _codes(self, params: dict, x: Float[Array, "B D"], train: bool = False) -> Dense:
        pre = self._preactivations(params, x)
        return Dense(jnp.where(pre > params["threshold"], jax.nn.relu(pre), 0.0))
