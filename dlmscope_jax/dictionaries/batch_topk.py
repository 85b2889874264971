"""BatchTopK dictionaries: k latents a row on average, chosen over the whole batch; a threshold takes its place afterwards.

train: the k B largest pre-activations of all rows, cut at 0;   otherwise: f = z * (z > theta)      (Bussmann et al. 2024, arXiv 2412.06410)
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dlmscope_jax import kernels
from dlmscope_jax.kernels.topk.batch import among_largest

from .auxk import WithAuxK
from .base import RowNorm
from .codes import Dense, FlatSparse
from .losses import LossParts, LossSettings, squared, total

# The running threshold looks back over about 100 steps. The least kept value of one batch is a quantile of B N numbers, known to
# a fraction of a percent at usual sizes, so there is little noise to average away; what matters is that it follows the weights, to
# their end. Over 1000 steps, as in dictionary_learning, it would describe a dictionary that no longer exists.
_RATE = 0.01


@dataclass(frozen=True)
class BatchTopK(WithAuxK):
    """The static description of a BatchTopK dictionary; see ``Dictionary`` for common fields.

    Parameters: those of ``Dictionary`` and the scalar ``threshold``, a running mean of the least activation that a batch kept
    (0: none measured yet).

    Attributes:
      k: active latents a row, on average over a training batch.
      k_aux: dead latents that one row's auxiliary reconstruction uses; None: d_in / 2.
      selection: what factors the product has from which latents are chosen, ``"float32"`` or ``"bfloat16"``; values are float32 either way.

    Raises:
      UserError: sizes that are not positive, k or k_aux above the width, a skip without ``d_out``.
    """

    d_in: int
    width: int
    k: int
    d_out: int | None = None
    skip: bool = False
    k_aux: int | None = None
    selection: kernels.Selection = "float32"
    input_bias: bool = False
    subtract: bool = True
    row_norm: RowNorm = "none"

    KIND: ClassVar[str] = "batch_topk"
    STATISTICS: ClassVar[tuple[str, ...]] = ("threshold",)

    def __post_init__(self):
        self._check_k()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every parameter."""
        return super().shapes() | {"threshold": ()}

    def init(
        self, key: Array, sample: Float[Array, "S D_out"] | None = None, inputs: Float[Array, "S D"] | None = None
    ) -> dict[str, Array]:
        """As ``Dictionary.init``; the threshold starts at 0, not measured."""
        return super().init(key, sample, inputs) | {"threshold": jnp.zeros((), jnp.float32)}

    def _activation_units(self) -> tuple[str, ...]:
        return ("b_enc", "threshold")

    def _codes(self, params: dict, x: Float[Array, "B D"], train: bool = False) -> Dense | FlatSparse:
        if train:
            return self._batch_codes(params, x)
        pre = self._preactivations(params, x)
        return Dense(jnp.where(pre > params["threshold"], jax.nn.relu(pre), 0.0))

    def _batch_codes(self, params: dict, x: Float[Array, "B D"], k: int | Int[Array, ""] | None = None) -> FlatSparse:
        """The k B largest pre-activations of the batch, negative ones cut to zero, in order of rows; ties to the first row, then latent.

        With a ``k`` of its own, which may be traced, the rest of the places for the dictionary's k hold zeros.
        """
        n_rows = x.shape[0]
        encoder = params["W_enc"], params["b_enc"], self._shift(params)
        chosen, rows, latents = kernels.encode_topk_batch(x, *encoder, self.k * n_rows, selection=self.selection)
        values = jax.nn.relu(chosen)
        if k is not None:
            values = jnp.where(among_largest(chosen, k * n_rows), values, 0.0)
        return FlatSparse(values, rows, latents, (n_rows,))

    def loss(
        self,
        params: dict,
        x: Float[Array, "B D"],
        target: Float[Array, "B D_out"] | None = None,
        dead: Bool[Array, " N"] | None = None,
        settings: LossSettings = LossSettings(),  # noqa: B008  # frozen
    ) -> tuple[Float[Array, ""], LossParts]:
        """Mean squared error, summed over the width, of the batch's k B largest activations, plus AuxK as in ``TopK.loss``.

        ``LossParts.statistics["threshold"]`` is the least positive activation that was kept, 0 where there was none.
        """
        x, target = self._pair(x, target)
        codes = self._batch_codes(params, x, settings.k)
        reconstruction, residual, measured = self._reconstruction(params, codes, x, target)
        terms = {"reconstruction": reconstruction}
        if dead is not None:
            measured["aux"], terms["aux"] = self._aux(params, x, residual, dead, settings)
        least = jnp.where(codes.values > 0, codes.values, jnp.inf).min()
        statistics = {"threshold": jnp.where(jnp.isfinite(least), least, 0.0)}
        return total(terms), self._parts(residual, target, codes, terms, measured, statistics)

    def _reconstruction(
        self, params: dict, codes: FlatSparse, x: Float[Array, "B D"], target: Float[Array, "B D_out"]
    ) -> tuple[Float[Array, ""], Float[Array, "B D_out"], dict[str, Array]]:
        """The reconstruction term, the residual of the whole dictionary, and what else was measured."""
        residual = target - self._output(params, codes, x)
        return squared(residual), residual, {}

    def update_statistics(self, params: dict, statistics: dict[str, Array]) -> dict:
        """Parameters with ``threshold`` moved 1 % of the way to the batch's; the first batch sets it, one of 0 changes nothing."""
        running, batch = params["threshold"], statistics["threshold"]
        moved = jnp.where(running > 0, running + _RATE * (batch - running), batch)
        return {**params, "threshold": jnp.where(batch > 0, moved, running)}
