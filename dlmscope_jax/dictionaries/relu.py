"""ReLU dictionaries with an L1 penalty: the classic sparse autoencoder, and the transcoder paper's recipe.

f = ReLU(W_enc (x - shift) + b_enc),   y = W_dec f + b_dec,   loss = error + lambda * mean_b sum_i f_i (|W_dec,i|)
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import jax
from jaxtyping import Array, Bool, Float

from dlmscope_jax.errors import UserError
from dlmscope_jax.kernels.axes import ALONE, Axes

from . import rows
from .base import Dictionary, RowNorm
from .codes import Dense
from .ghost import ghost_residual
from .losses import LossParts, LossSettings, over_norm, squared, total


@dataclass(frozen=True)
class ReLU(Dictionary):
    """The static description of a ReLU dictionary; see ``Dictionary`` for its parameters and common fields.

    Attributes:
      d_in, width, d_out, skip, input_bias, subtract, row_norm: see ``Dictionary``.
      norm_weighted: the penalty weighs each activation by the norm of its decoder row, which is then free (Anthropic, April
        2024); False: rows are held at unit norm.
      error: ``"squared"`` (summed over the width) or ``"over_norm"`` (the transcoder paper's code).
      ghost: adds ghost gradients for dead latents, where ``dead`` is given.

    Raises:
      UserError: sizes that are not positive, a skip without ``d_out``, an error that is not known.
    """

    d_in: int
    width: int
    d_out: int | None = None
    skip: bool = False
    norm_weighted: bool = False
    error: Literal["squared", "over_norm"] = "squared"
    ghost: bool = False
    input_bias: bool = False
    subtract: bool = True
    row_norm: RowNorm = "none"

    KIND: ClassVar[str] = "relu"

    def __post_init__(self):
        self._check(())
        if self.error not in ("squared", "over_norm"):
            raise UserError(f"ReLU: error {self.error!r} is not known: squared or over_norm")

    @property
    def unit_decoder(self) -> bool:
        """Whether training holds decoder rows at unit norm."""
        return not self.norm_weighted

    def _codes(self, params: dict, x: Float[Array, "B D"], train: bool = False, axes: Axes = ALONE) -> Dense:
        return Dense(jax.nn.relu(self._preactivations(params, x, axes)))

    def loss(
        self,
        params: dict,
        x: Float[Array, "B D"],
        target: Float[Array, "B D_out"] | None = None,
        dead: Bool[Array, " N"] | None = None,
        settings: LossSettings = LossSettings(),  # noqa: B008  # frozen
        axes: Axes = ALONE,
    ) -> tuple[Float[Array, ""], LossParts]:
        """The error and ``sparsity`` times the mean L1 norm of a row's activations; see ``Dictionary.loss``.

        With ``ghost``, and where ``dead`` is given, ``aux`` times the ghost gradients' loss, which is as large as the error.
        """
        x, target = self._pair(x, target)
        pre = self._preactivations(params, x, axes)
        codes = Dense(jax.nn.relu(pre))
        residual = target - self._output(params, codes, x, axes)
        weighed = codes.values * rows.row_norms(params["W_dec"]) if self.norm_weighted else codes.values
        measured = {"sparsity": axes.mean_rows(axes.sum_latents(weighed.sum(axis=1).mean()))}
        terms = {"reconstruction": self._error(residual, target, axes), "sparsity": settings.sparsity * measured["sparsity"]}
        if self.ghost and dead is not None:
            entry = rows.typical_entry(self.d_in, self.row_norm)
            measured["ghost"] = self._error(ghost_residual(pre, params["W_dec"], residual, dead, entry, axes), target, axes)
            terms["ghost"] = settings.aux * measured["ghost"]
        return total(terms), self._parts(residual, target, codes, terms, measured, axes=axes)

    def _error(self, residual: Float[Array, "B D_out"], target: Float[Array, "B D_out"], axes: Axes) -> Float[Array, ""]:
        return squared(residual, axes) if self.error == "squared" else over_norm(residual, target, axes)
