"""Binary autoencoders: 1-bit latents by a straight-through step, trained towards little entropy.

a = W_enc x + b_enc,   B = 1[a > 0],   y = W_dec B + b_dec        (Cho et al. 2025, arXiv 2509.20997, and its released code)
"""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from .base import Dictionary, RowNorm
from .codes import Dense


@dataclass(frozen=True)
class Binary(Dictionary):
    """The static description of a binary autoencoder; see ``Dictionary`` for common fields.

    Raises:
      UserError: sizes that are not positive, a skip without ``d_out``.
    """

    d_in: int
    width: int
    d_out: int | None = None
    skip: bool = False
    input_bias: bool = False
    subtract: bool = False
    row_norm: RowNorm = "none"

    KIND: ClassVar[str] = "binary"
    UNIT_DECODER: ClassVar[bool] = False

    def __post_init__(self):
        self._check(())

    def _codes(self, params: dict, x: Float[Array, "B D"], train: bool = False) -> Dense:
        return Dense((self._preactivations(params, x) > 0).astype(jnp.float32))

    def fold(self, params: dict, scale: float | Array, out_scale: float | Array | None = None) -> dict:
        """See ``Dictionary.fold``; bits have no scale, so the encoder takes the input's and the decoder the output's."""
        out_scale = scale if out_scale is None else out_scale
        factors = {"W_enc": 1 / scale, "W_dec": out_scale, "b_dec": out_scale, "b_in": scale, "W_skip": out_scale / scale}
        return {name: value * factors.get(name, 1.0) for name, value in params.items()}
