"""BatchTopK dictionaries: k latents a row on average, chosen over the whole batch; a threshold takes its place afterwards.

train: the k B largest pre-activations of all rows, cut at 0;   otherwise: f = z * (z > theta)      (Bussmann et al. 2024, arXiv 2412.06410)

B is the whole batch, over however many devices it is divided: they keep the same entries as one device would
(``kernels.sparse_matmul.sharded_flat``).
"""

import itertools
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from dlmscope_jax import kernels
from dlmscope_jax.kernels.axes import ALONE, Axes
from dlmscope_jax.kernels.encode import encode_winners
from dlmscope_jax.kernels.sparse_matmul.sharded_flat import Winners, decode_winners, written_out
from dlmscope_jax.kernels.topk.batch import among_largest

from .auxk import WithAuxK
from .base import RowNorm
from .codes import Dense, FlatSparse
from .losses import LossParts, LossSettings, squared, total

# The running threshold looks back over about 100 steps. The least kept value of one batch is a quantile of B N numbers, known to
# a fraction of a percent at usual sizes, so there is little noise to average away; what matters is that it follows the weights, to
# their end. Over 1000 steps, as in dictionary_learning, it would describe a dictionary that no longer exists.
_RATE = 0.01


_Encoder = tuple[Array, Array, Array, Array | None]  # rows, weight, bias, shift


@struct.dataclass
class _Tally:
    """What a loss reports of codes that are nowhere written down: active latents of each row, active rows of each latent."""

    per_row: Int[Array, " B"]
    per_latent: Int[Array, " n"]

    def count(self) -> Int[Array, " B"]:
        return self.per_row

    def fired(self, width: int) -> Int[Array, " n"]:
        return self.per_latent


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
    ROOM: ClassVar[int] = 2  # of divided latents: how many times its mean share of the batch's code a device has room for

    def __post_init__(self):
        self._check_k()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every parameter."""
        return super().shapes() | {"threshold": ()}

    def axes(self) -> dict[str, tuple[str, ...]]:
        """As ``Dictionary.axes``; the threshold is one number."""
        return super().axes() | {"threshold": ()}

    def init(
        self, key: Array, sample: Float[Array, "S D_out"] | None = None, inputs: Float[Array, "S D"] | None = None
    ) -> dict[str, Array]:
        """As ``Dictionary.init``; the threshold starts at 0, not measured."""
        return super().init(key, sample, inputs) | {"threshold": jnp.zeros((), jnp.float32)}

    def _activation_units(self) -> tuple[str, ...]:
        return ("b_enc", "threshold")

    def _codes(self, params: dict, x: Float[Array, "B D"], train: bool = False, axes: Axes = ALONE) -> Dense | FlatSparse:
        if train and axes.alone:
            return self._batch_codes(params, x)
        if train:
            encoder, winners = self._winners(params, x, None, axes)
            return Dense(written_out(*encoder, winners.words))
        pre = self._preactivations(params, x, axes)
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

    def _winners(self, params: dict, x: Float[Array, "B D"], k: int | Int[Array, ""] | None, axes: Axes) -> tuple[_Encoder, Winners]:
        """What the encoder of this device's latents reads, and which of its pre-activations the whole batch keeps."""
        encoder: _Encoder = axes.shared(x), params["W_enc"], params["b_enc"], self._shift(params, axes)
        share = -(-self.k * len(x) // axes.latent_parts)
        count = (self.k if k is None else k) * (len(x) * axes.row_parts)
        return encoder, encode_winners(*encoder, count, self.ROOM * share, axes, selection=self.selection)

    def loss(
        self,
        params: dict,
        x: Float[Array, "B D"],
        target: Float[Array, "B D_out"] | None = None,
        dead: Bool[Array, " N"] | None = None,
        settings: LossSettings = LossSettings(),  # noqa: B008  # frozen
        axes: Axes = ALONE,
    ) -> tuple[Float[Array, ""], LossParts]:
        """Mean squared error, summed over the width, of the batch's k B largest activations, plus AuxK as in ``TopK.loss``.

        ``LossParts.statistics["threshold"]`` is the least positive activation that was kept, 0 where there was none.
        """
        x, target = self._pair(x, target)
        decoded, codes, least = self._decoded(params, x, settings.k, axes)
        reconstruction, residual, measured = self._reconstruction(decoded, self._without_latents(params, x), target, axes)
        terms = {"reconstruction": reconstruction}
        if dead is not None:
            measured["aux"], terms["aux"] = self._aux(params, x, residual, dead, settings, axes)
        statistics = {"threshold": jnp.where(jnp.isfinite(least), least, 0.0)}
        return total(terms), self._parts(residual, target, codes, terms, measured, statistics, axes)  # type: ignore[arg-type]  # _Tally

    def _decoded(
        self, params: dict, x: Float[Array, "B D"], k: int | Int[Array, ""] | None, axes: Axes
    ) -> tuple[Float[Array, "G B D_out"], FlatSparse | _Tally, Float[Array, ""]]:
        """What each prefix of the latents decodes to, the code or what is to be reported of it, and its least positive activation."""
        prefixes = self.nested
        if axes.alone:
            codes = self._batch_codes(params, x, k)
            pairs = codes.values, codes.rows, codes.latents, params["W_dec"], len(x)
            decoded = kernels.decode_prefixes(*pairs, prefixes) if len(prefixes) > 1 else kernels.decode_flat(*pairs)[None]
            return decoded, codes, jnp.where(codes.values > 0, codes.values, jnp.inf).min()
        encoder, winners = self._winners(params, x, k, axes)
        latent = axes.first_latent(self.here(axes)) + jnp.arange(self.here(axes), dtype=jnp.int32)
        group = jnp.searchsorted(jnp.array(prefixes, jnp.int32), latent, side="right").astype(jnp.int32)
        here = decode_winners(*encoder, params["W_dec"], winners, group, len(prefixes))
        decoded = jnp.stack(list(itertools.accumulate(axes.sum_latents(here.parts))))
        return decoded, _Tally(here.count, here.fired), jax.lax.pmin(here.least, axes.every)

    @property
    def nested(self) -> tuple[int, ...]:
        """The prefixes of the latents that must reconstruct on their own: all of them together."""
        return (self.width,)

    def _reconstruction(
        self, decoded: Float[Array, "G B D_out"], rest: Float[Array, "*B D_out"], target: Float[Array, "B D_out"], axes: Axes
    ) -> tuple[Float[Array, ""], Float[Array, "B D_out"], dict[str, Array]]:
        """The reconstruction term, the residual of the whole dictionary, and what else was measured; ``rest`` is what no latent adds."""
        residual = target - (decoded[-1] + rest)
        return squared(residual, axes), residual, {}

    def update_statistics(self, params: dict, statistics: dict[str, Array]) -> dict:
        """Parameters with ``threshold`` moved 1 % of the way to the batch's; the first batch sets it, one of 0 changes nothing."""
        running, batch = params["threshold"], statistics["threshold"]
        moved = jnp.where(running > 0, running + _RATE * (batch - running), batch)
        return {**params, "threshold": jnp.where(batch > 0, moved, running)}
