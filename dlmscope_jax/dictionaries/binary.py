"""Binary autoencoders: 1-bit latents by a straight-through step, trained towards little entropy.

a = W_enc x + b_enc,   B = 1[a > 0],   y = W_dec B + b_dec        (Cho et al. 2025, arXiv 2509.20997, and its released code)

An always-on bit has no entropy, as an always-off one has none: what counts as an event is a bit's rarer value.

Entropy and covariance are of the whole batch and all latents, over however many devices they are divided. For the covariance the
codes of all latents reach every device, as bits (``kernels.covariance``): 1/8 byte a latent and row.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dlmscope_jax import kernels
from dlmscope_jax.errors import UserError
from dlmscope_jax.kernels.axes import ALONE, Axes

from .base import Dictionary, RowNorm
from .codes import Bits, Dense
from .entropy import batch_entropy
from .losses import LossParts, LossSettings, squared, total


@dataclass(frozen=True)
class Binary(Dictionary):
    """The static description of a binary autoencoder; see ``Dictionary`` for common fields.

    The paper and the code that was released with it disagree. ``follows`` says whose word counts:

    |                       | ``"code"``                                  | ``"paper"``                                             |
    |-----------------------|---------------------------------------------|---------------------------------------------------------|
    | a bit at exactly 0    | 0                                           | 1                                                       |
    | encoder bias          | yes; without one, bits cannot be thresholds | none                                                    |
    | reconstruction        | mean over rows and width                    | sum over the width, mean over rows: d_out times as large |

    The weights of entropy and covariance are relative to that reconstruction.

    Attributes:
      d_in, width, d_out, skip, input_bias, subtract, row_norm: see ``Dictionary``.
      estimator: the gradient of the step: ``"identity"`` (which the released code comes to), ``"sigmoid"``, ``"rectangle"``,
        ``"g_times_1mg"`` (the released code's letter) or ``"x_times_1mx"`` (the paper's letter); formulas: ``kernels.binarise``.
      temperature: of ``"sigmoid"``; the full width of ``"rectangle"``.
      bits: q; above 1, what is decoded is one of 2^q - 1 levels of the pre-activation in (0, 1], with the gradient of the step, while
        support, entropy and covariance stay those of the 1-bit code. The paper's "more-bit decoding" has no published formula: this is
        our reading of it. One bit is stored as ``Bits``, more as ``Dense``.
      follows: see above.

    Raises:
      UserError: sizes that are not positive, a skip without ``d_out``, an estimator that is not known, a temperature that is not
        above 0, more than 16 bits.
    """

    d_in: int
    width: int
    d_out: int | None = None
    skip: bool = False
    estimator: Literal["identity", "sigmoid", "rectangle", "g_times_1mg", "x_times_1mx"] = "identity"
    temperature: float = 1.0
    bits: int = 1
    follows: Literal["code", "paper"] = "code"
    input_bias: bool = False
    subtract: bool = False
    row_norm: RowNorm = "none"

    KIND: ClassVar[str] = "binary"
    UNIT_DECODER: ClassVar[bool] = False

    def __post_init__(self):
        self._check(("bits",))
        if self.estimator not in kernels.ESTIMATORS:
            raise UserError(f"Binary: estimator {self.estimator!r} is not known: one of {', '.join(kernels.ESTIMATORS)}")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise UserError(f"Binary: temperature = {self.temperature!r} must be above 0")
        if self.bits > 16:
            raise UserError(f"Binary: bits = {self.bits} must be at most 16")
        if self.follows not in ("code", "paper"):
            raise UserError(f"Binary: follows = {self.follows!r} must be 'code' or 'paper'")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every parameter; no ``b_enc`` where it follows the paper."""
        return {name: shape for name, shape in super().shapes().items() if name != "b_enc" or self.follows == "code"}

    def init(
        self, key: Array, sample: Float[Array, "S D_out"] | None = None, inputs: Float[Array, "S D"] | None = None
    ) -> dict[str, Array]:
        """Fresh parameters as the released code has them, torch's ``nn.Linear``: uniform within 1 / sqrt(fan-in), biases too.

        The samples are checked and, as there, not used; a skip and an input bias start at zero.

        Raises:
          UserError: samples of another width.
        """
        self._check_samples(sample, inputs)
        bounds = {"W_enc": self.d_in, "b_enc": self.d_in, "W_dec": self.width, "b_dec": self.width}
        params = {}
        for i, (name, shape) in enumerate(self.shapes().items()):
            bound = bounds[name] ** -0.5 if name in bounds else 0.0
            params[name] = jax.random.uniform(jax.random.fold_in(key, i), shape, jnp.float32, -bound, bound)
        return params

    def encode(self, params: dict, x: Float[Array, "*batch D"], train: bool = False) -> Bits | Dense:
        """The code of each row: ``Bits``, without gradient; with ``train=True``, or more than one bit, ``Dense``, with the estimator's.

        Raises:
          UserError: rows of another width.
        """
        return super().encode(params, x, train)  # type: ignore[return-value]

    def _codes(self, params: dict, x: Float[Array, "B D"], train: bool = False, axes: Axes = ALONE) -> Bits | Dense:
        support, values = self._step(params, x, axes)
        return Bits(support > 0) if self.bits == 1 and not train else Dense(values)

    def _step(self, params: dict, x: Float[Array, "B D"], axes: Axes) -> tuple[Float[Array, "B N"], Float[Array, "B N"]]:
        """The bits and what is decoded of them, float32, with one gradient."""
        pre = self._preactivations(params, x, axes)
        return kernels.binarise(pre, self.estimator, self.temperature, self.follows == "paper", self.bits)

    def _preactivations(self, params: dict, x: Float[Array, "B D"], axes: Axes = ALONE) -> Float[Array, "B N"]:
        bias = params["b_enc"] if self.follows == "code" else jnp.zeros(self.here(axes), jnp.float32)
        return super()._preactivations({**params, "b_enc": bias}, x, axes)

    def loss(
        self,
        params: dict,
        x: Float[Array, "B D"],
        target: Float[Array, "B D_out"] | None = None,
        dead: Bool[Array, " N"] | None = None,
        settings: LossSettings = LossSettings(),  # noqa: B008  # frozen
        axes: Axes = ALONE,
    ) -> tuple[Float[Array, ""], LossParts]:
        """Reconstruction + ``settings.entropy`` * H + ``settings.covariance`` * Q; see ``Dictionary.loss``.

        H is the sum over latents of the batch's marginal entropy in bits, Q the sum over pairs of distinct latents, each counted twice,
        of the absolute unbiased covariance over the batch. Of independent bits, Q is sampling noise: about 0.8 p (1 - p) N^2 / sqrt(B),
        so its weight goes with width and batch. A batch of one row has H = Q = 0. ``dead`` is not used. The parts' ``fired`` and
        ``l0`` count each bit's rarer value in the batch, since an always-on bit is as dead as an always-off one.
        """
        x, target = self._pair(x, target)
        support, values = self._step(params, x, axes)
        residual = target - self._output(params, Dense(values), x, axes)
        measured = {"entropy": batch_entropy(support, axes), "covariance": kernels.offdiagonal_covariance(support, axes=axes)}
        error = squared(residual, axes) / (self.out if self.follows == "code" else 1)
        terms = {"reconstruction": error}
        terms |= {"entropy": settings.entropy * measured["entropy"], "covariance": settings.covariance * measured["covariance"]}
        parts = self._parts(residual, target, Dense(support), terms, measured, axes=axes)
        rows = len(x) * axes.row_parts
        rarer = jnp.minimum(parts.fired, rows - parts.fired)
        return total(terms), replace(parts, fired=rarer, l0=axes.sum_latents(rarer.sum().astype(jnp.float32)) / rows)

    def fold(self, params: dict, scale: float | Array, out_scale: float | Array | None = None) -> dict:
        """See ``Dictionary.fold``; bits have no scale, so the encoder takes the input's and the decoder the output's."""
        if self.row_norm != "none":
            return super().fold(params, scale, out_scale)
        out_scale = self._out_scale(scale, out_scale)
        factors = {"W_enc": 1 / scale, "W_dec": out_scale, "b_dec": out_scale, "b_in": scale, "W_skip": out_scale / scale}
        return {name: value * factors.get(name, 1.0) for name, value in params.items()}
