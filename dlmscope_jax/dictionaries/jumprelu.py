"""JumpReLU dictionaries: a threshold for every latent, learned through a straight-through estimator.

f = z * (z > theta),   z = W_enc (x - shift) + b_enc,   theta >= 0        (Rajamanoharan et al. 2024, arXiv 2407.14435)

The step has no gradient in theta. Its expectation over the data has one, minus the density of z at theta, and the estimator is a
kernel estimate of it: every z within half a window of theta, on *either* side, counts. So the step is taken of z and never of f, whose
lower half of the window is gone (reference/sae_libraries.md 1, defect 6), and z is taken before any ReLU, which would pile up all
negative z at 0, inside the window of a small theta.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dlmscope_jax.errors import UserError
from dlmscope_jax.kernels.axes import ALONE, Axes

from . import rows
from .base import Dictionary, RowNorm
from .codes import Dense
from .losses import LossParts, LossSettings, squared, total

_SATURATION = 4.0  # c of the tanh penalty


def _inside(z: Array, theta: Array, window: float) -> Array:
    """The rectangle kernel: 1 within half a window of theta."""
    return (jnp.abs(z - theta) < window / 2).astype(z.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def step(z: Float[Array, "B N"], theta: Float[Array, " N"], window: float) -> Float[Array, "B N"]:
    """``1[z > theta]`` with ``d/d theta = -K((z - theta) / window) / window`` and none in z."""
    return (z > theta).astype(z.dtype)


def _step_forward(z, theta, window):
    return step(z, theta, window), (z, theta)


def _step_backward(window, saved, cotangent):
    z, theta = saved
    return jnp.zeros_like(cotangent), -(cotangent * _inside(z, theta, window)).sum(axis=0) / window


step.defvjp(_step_forward, _step_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def jump(z: Float[Array, "B N"], theta: Float[Array, " N"], window: float, to_input: bool) -> Float[Array, "B N"]:
    """``ReLU(z) 1[z > theta]`` with ``d/d theta = -(theta / window) K((z - theta) / window)`` and ``d/dz = 1[z > theta]``.

    ``to_input`` adds ``(theta / window) K`` to ``d/dz``, the same estimate of what moving z does, so that it reaches all parameters.
    """
    return jnp.where(z > theta, jax.nn.relu(z), jnp.zeros_like(z))


def _jump_forward(z, theta, window, to_input):
    return jump(z, theta, window, to_input), (z, theta)


def _jump_backward(window, to_input, saved, cotangent):
    z, theta = saved
    through = theta / window * _inside(z, theta, window) * cotangent
    straight = jnp.where((z > theta) & (z > 0), cotangent, jnp.zeros_like(cotangent))
    return straight + through if to_input else straight, -through.sum(axis=0)


jump.defvjp(_jump_forward, _jump_backward)


@dataclass(frozen=True)
class JumpReLU(Dictionary):
    """The static description of a JumpReLU dictionary; see ``Dictionary`` for common fields.

    Parameters: those of ``Dictionary`` and ``threshold [N]``, theta itself (not its logarithm, which hardly moves under Adam).

    Attributes:
      d_in, width, d_out, skip, input_bias, subtract, row_norm: see ``Dictionary``.
      penalty: ``"step"`` (L0), ``"target"`` ((L0 / L0* - 1)^2) or ``"tanh"`` (sum_i tanh(4 f_i |W_dec,i| / e), e the root mean square of an
        entry of the target; Anthropic, January 2025: free decoder norms, the estimator reaches all parameters, a pre-activation loss).
      bandwidth: width of the rectangle kernel, in units of the data: 1 is the root mean square norm of the rows that are encoded.
        None: 0.05 / sqrt(d_in), for ``"tanh"`` 2 / sqrt(d_in). These are the published 1e-3 (rows of norm 1, d_in = 2304), and 0.05
        and 2 (rows of norm sqrt(d_in)): the same shares of a pre-activation, which for a unit encoder row is of size 1 / sqrt(d_in).

    Raises:
      UserError: sizes that are not positive, a skip without ``d_out``, a penalty that is not known, a bandwidth that is not above 0, or
        above 1, which is one in other units.
    """

    d_in: int
    width: int
    d_out: int | None = None
    skip: bool = False
    penalty: Literal["step", "target", "tanh"] = "step"
    bandwidth: float | None = None
    input_bias: bool = False
    subtract: bool = True
    row_norm: RowNorm = "none"

    KIND: ClassVar[str] = "jumprelu"

    def __post_init__(self):
        self._check(())
        if self.penalty not in ("step", "target", "tanh"):
            raise UserError(f"JumpReLU: penalty {self.penalty!r} is not known: step, target or tanh")
        if self.bandwidth is not None and not 0 < self.bandwidth <= 1:
            raise UserError(
                f"JumpReLU: bandwidth = {self.bandwidth!r} must be above 0 and at most 1, the norm of a row: "
                f"divide one that is meant for rows of norm sqrt(d_in) by sqrt(d_in) = {self.d_in**0.5:.4g}"
            )

    @property
    def unit_decoder(self) -> bool:
        """Whether training holds decoder rows at unit norm."""
        return self.penalty != "tanh"

    @property
    def window(self) -> float:
        """The bandwidth in units of the pre-activations."""
        in_entries = (2.0 if self.penalty == "tanh" else 0.05) if self.bandwidth is None else self.bandwidth * self.d_in**0.5
        return in_entries * rows.typical_entry(self.d_in, self.row_norm)

    @property
    def first_threshold(self) -> float:
        """Where a threshold starts; see ``init``."""
        return self.window / (20.0 if self.penalty == "tanh" else 1.0)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every parameter."""
        return super().shapes() | {"threshold": (self.width,)}

    def axes(self) -> dict[str, tuple[str, ...]]:
        """What the dimensions of every parameter are."""
        return super().axes() | {"threshold": ("latent",)}

    def init(
        self, key: Array, sample: Float[Array, "S D_out"] | None = None, inputs: Float[Array, "S D"] | None = None
    ) -> dict[str, Array]:
        """As ``Dictionary.init``; thresholds start one window above 0, for ``"tanh"`` a twentieth of one (the papers' own ratios).

        At one window, the factor theta / window of the reconstruction's gradient is 1 and the whole window lies above 0, so that from
        the first step both losses speak to theta with the same voice. Nearly half of the latents are active then, none is dead.
        """
        params = super().init(key, sample, inputs)
        return params | {"threshold": jnp.full(self.width, self.first_threshold, jnp.float32)}

    def _activation_units(self) -> tuple[str, ...]:
        return ("b_enc", "threshold")

    def _codes(self, params: dict, x: Float[Array, "B D"], train: bool = False, axes: Axes = ALONE) -> Dense:
        return self._jump(params, self._preactivations(params, x, axes))

    def _jump(self, params: dict, pre: Float[Array, "B N"]) -> Dense:
        return Dense(jump(pre, params["threshold"], self.window, self.penalty == "tanh"))

    def loss(
        self,
        params: dict,
        x: Float[Array, "B D"],
        target: Float[Array, "B D_out"] | None = None,
        dead: Any = None,
        settings: LossSettings = LossSettings(),  # noqa: B008  # frozen
        axes: Axes = ALONE,
    ) -> tuple[Float[Array, ""], LossParts]:
        """Mean squared error, summed over the width, and ``sparsity`` times the penalty; see ``Dictionary.loss``.

        ``"tanh"`` adds ``preactivation`` times ``mean_b sum_i ReLU(theta_i - z_i) |W_dec,i|``, which pulls back latents that do not fire.
        ``dead`` is not used.

        Raises:
          UserError: the penalty ``"target"`` without a ``target_l0`` above 0.
        """
        x, target = self._pair(x, target)
        pre = self._preactivations(params, x, axes)
        codes = self._jump(params, pre)
        residual = target - self._output(params, codes, x, axes)
        measured = {"sparsity": self._penalty(params, pre, codes, settings, axes)}
        terms = {"reconstruction": squared(residual, axes), "sparsity": settings.sparsity * measured["sparsity"]}
        if self.penalty == "tanh":
            below = jax.nn.relu(params["threshold"] - pre) * rows.row_norms(params["W_dec"])
            measured["preactivation"] = axes.mean_rows(axes.sum_latents(below.sum(axis=1).mean()))
            terms["preactivation"] = settings.preactivation * measured["preactivation"]
        return total(terms), self._parts(residual, target, codes, terms, measured, axes=axes)

    def _penalty(self, params: dict, pre: Float[Array, "B N"], codes: Dense, settings: LossSettings, axes: Axes) -> Float[Array, ""]:
        if self.penalty == "tanh":
            entry = rows.typical_entry(self.out, self.row_norm)
            saturated = jnp.tanh(_SATURATION / entry * codes.values * rows.row_norms(params["W_dec"]))
            return axes.mean_rows(axes.sum_latents(saturated.sum(axis=1).mean()))
        l0 = axes.mean_rows(axes.sum_latents(step(pre, params["threshold"], self.window).sum(axis=1).mean()))
        if self.penalty == "step":
            return l0
        if isinstance(settings.target_l0, int | float) and settings.target_l0 <= 0:
            raise UserError(f"JumpReLU: the penalty 'target' needs a target_l0 above 0 in its settings, got {settings.target_l0!r}")
        return jnp.square(l0 / settings.target_l0 - 1.0)

    def bounded(self, params: dict) -> dict:
        """Thresholds at least 0."""
        return {**params, "threshold": jnp.maximum(params["threshold"], 0.0)}
