"""Gated dictionaries: one path decides which latents are active, another how strongly.

pi = W_enc (x - shift) + b_gate,   f = (pi > 0) * ReLU(exp(r_mag) * W_enc (x - shift) + b_mag)
                                                                 (Rajamanoharan et al. 2024, arXiv 2404.16014)

The step has no gradient. What trains the gate is that ReLU(pi) is penalised and must reconstruct on its own, through a decoder that
is held constant there, so that it serves the real reconstruction alone.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dlmscope_jax import kernels
from dlmscope_jax.kernels.axes import ALONE, Axes

from .base import Dictionary, RowNorm
from .codes import Dense
from .losses import LossParts, LossSettings, squared, total


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

    def axes(self) -> dict[str, tuple[str, ...]]:
        """What the dimensions of every parameter are."""
        return super().axes() | dict.fromkeys(("b_gate", "b_mag", "r_mag"), ("latent",))

    def init(
        self, key: Array, sample: Float[Array, "S D_out"] | None = None, inputs: Float[Array, "S D"] | None = None
    ) -> dict[str, Array]:
        """As ``Dictionary.init``; the two paths start equal."""
        params = super().init(key, sample, inputs)
        bias = params.pop("b_enc")
        return params | {"b_gate": bias, "b_mag": bias.copy(), "r_mag": jnp.zeros_like(bias)}

    def _activation_units(self) -> tuple[str, ...]:
        return ("b_gate", "b_mag")

    def _paths(self, params: dict, x: Float[Array, "B D"], axes: Axes) -> tuple[Float[Array, "B N"], Float[Array, "B N"]]:
        """pi and the pre-activations of the magnitude path."""
        product = kernels.preactivations(axes.shared(x), params["W_enc"], jnp.zeros_like(params["b_gate"]), self._shift(params, axes))
        return product + params["b_gate"], jnp.exp(params["r_mag"]) * product + params["b_mag"]

    def _codes(self, params: dict, x: Float[Array, "B D"], train: bool = False, axes: Axes = ALONE) -> Dense:
        return self._open(*self._paths(params, x, axes))

    def _open(self, gate: Float[Array, "B N"], magnitude: Float[Array, "B N"]) -> Dense:
        return Dense(jnp.where(gate > 0, jax.nn.relu(magnitude), 0.0))

    def loss(
        self,
        params: dict,
        x: Float[Array, "B D"],
        target: Float[Array, "B D_out"] | None = None,
        dead: Any = None,
        settings: LossSettings = LossSettings(),  # noqa: B008  # frozen
        axes: Axes = ALONE,
    ) -> tuple[Float[Array, ""], LossParts]:
        """``|y - y_hat(f)|^2 + sparsity |ReLU(pi)|_1 + |y - y_frozen(ReLU(pi))|^2``, each the mean over rows; see ``Dictionary.loss``.

        The third term holds ``W_dec``, ``b_dec`` and ``W_skip`` of the decoder constant. ``b_dec`` still gets its gradient as
        what an autoencoder's encoder subtracts. ``dead`` is not used.
        """
        x, target = self._pair(x, target)
        gate, magnitude = self._paths(params, x, axes)
        codes, opened = self._open(gate, magnitude), jax.nn.relu(gate)
        residual = target - self._output(params, codes, x, axes)
        measured = {"sparsity": axes.mean_rows(axes.sum_latents(opened.sum(axis=1).mean()))}
        terms = {
            "reconstruction": squared(residual, axes),
            "sparsity": settings.sparsity * measured["sparsity"],
            "gate": squared(target - self._output(jax.lax.stop_gradient(params), Dense(opened), x, axes), axes),
        }
        return total(terms), self._parts(residual, target, codes, terms, measured, axes=axes)
