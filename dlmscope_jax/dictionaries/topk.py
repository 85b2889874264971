"""TopK dictionaries: sparse autoencoders and transcoders that keep the k largest latents of a row.

    f = ReLU(topk_k(W_enc (x - b_dec) + b_enc)),   y = W_dec f + b_dec        (Gao et al. 2024, arXiv 2406.04093)

The other ``rule``s are those of files that others wrote.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dlmscope_jax import kernels
from dlmscope_jax.errors import UserError
from dlmscope_jax.kernels.axes import ALONE, Axes
from dlmscope_jax.kernels.sparse_matmul import sharded
from dlmscope_jax.kernels.topk.sharded import among_shards

from .auxk import WithAuxK
from .base import RowNorm
from .codes import RowSparse
from .losses import LossParts, LossSettings, squared, total

RULES = ("positive", "raw", "magnitude", "groups")


@dataclass(frozen=True)
class TopK(WithAuxK):
    """The static description of a TopK dictionary; its methods are pure functions of a parameter dict.

    Parameters, float32, one latent a row: ``W_enc [N, d_in]``, ``W_dec [N, d_out]``, ``b_enc [N]``, ``b_dec [d_out]``,
    and ``W_skip [d_out, d_in]`` for a skip transcoder.

    Attributes:
      d_in: width of the rows that it reads.
      width: number of latents, N.
      k: active latents a row.
      d_out, skip, input_bias, subtract, row_norm: see ``Dictionary``.
      k_aux: dead latents that one row's auxiliary reconstruction uses; None: d_in / 2.
      rule: which latents are kept: ``"positive"``, the k largest, negative ones cut to zero; ``"raw"``, negative ones kept
        (circuit-tracer); ``"magnitude"``, the k largest in size, with their sign (SAELens' abstopk); ``"groups"``, the largest of each of
        k runs of N / k neighbours, negative ones cut to zero (sparsify's groupmax).
      multi_topk: adds 1/8 of the reconstruction error of 4 k latents (Multi-TopK), which keeps a dictionary usable at a larger k.
      selection: what factors the product has from which latents are chosen, ``"float32"`` or ``"bfloat16"``; values are float32 either way.
        Not with the rules ``"magnitude"`` and ``"groups"``.

    Raises:
      UserError: sizes that are not positive, k or k_aux above the width, a skip without ``d_out``.
    """

    d_in: int
    width: int
    k: int
    d_out: int | None = None
    skip: bool = False
    k_aux: int | None = None
    rule: Literal["positive", "raw", "magnitude", "groups"] = "positive"
    multi_topk: bool = False
    selection: kernels.Selection = "float32"
    input_bias: bool = False
    subtract: bool = True
    row_norm: RowNorm = "none"

    KIND: ClassVar[str] = "topk"

    def __post_init__(self):
        self._check_k()
        if self.rule not in RULES:
            raise UserError(f"TopK: rule {self.rule!r} is not known: one of {', '.join(RULES)}")
        if self.rule == "groups" and self.width % self.k:
            raise UserError(f"TopK: rule 'groups' cuts the latents into k equal runs: k = {self.k} must divide width = {self.width}")
        if self.multi_topk and self.rule != "positive":
            raise UserError(f"TopK: multi_topk goes with the rule 'positive', not {self.rule!r}")
        if self.selection != "float32" and self.rule in ("magnitude", "groups"):
            raise UserError(f"TopK: selection {self.selection!r} goes with the rules 'positive' and 'raw', not {self.rule!r}")

    def _codes(self, params: dict, x: Float[Array, "B D"], train: bool = False, axes: Axes = ALONE) -> RowSparse:
        return self._keep(params, x, self.k, axes=axes)

    def _keep(self, params: dict, x: Float[Array, "B D"], k: int, now: int | Int[Array, ""] | None = None, axes: Axes = ALONE) -> RowSparse:
        """The k latents of each row, largest first, ties to the lowest index; the gradient is that of their pre-activations.

        Of these only the first ``now`` where it is given, which may be traced; the values of the others are 0. Where latents are divided,
        those that are here and among the k of the whole row.
        """
        if axes.latents is not None:
            return self._keep_here(params, x, k, now, axes)
        encoder = params["W_enc"], params["b_enc"], self._shift(params)
        if self.rule in ("positive", "raw"):
            values, indices = kernels.encode_topk(x, *encoder, k, selection=self.selection)
        else:
            values, indices = self._by_another_rule(jax.lax.stop_gradient(kernels.preactivations(x, *encoder)), k)
            values = kernels.with_encoder_gradient(values, indices, x, *encoder)
        codes = RowSparse(jax.nn.relu(values) if self.rule in ("positive", "groups") else values, indices)
        return _first(codes, now)

    def _keep_here(self, params: dict, x: Float[Array, "B D"], k: int, now: int | Int[Array, ""] | None, axes: Axes) -> RowSparse:
        """``_keep`` where latents are divided."""
        axis, weight, bias = str(axes.latents), params["W_enc"], params["b_enc"]
        if self.rule in ("positive", "raw"):
            shift = self._shift(params)  # which passes through ``shared`` there
            values, indices = sharded.encode_topk(x, weight, bias, shift, k, axis, selection=self.selection, now=now)
            return RowSparse(jax.nn.relu(values) if self.rule == "positive" else values, indices)
        encoder = axes.shared(x), weight, bias, self._shift(params, axes)
        pre = jax.lax.stop_gradient(kernels.preactivations(*encoder))
        if self.rule == "groups":
            if k % axes.latent_parts:
                raise UserError(
                    f"TopK: rule 'groups' keeps each of its k = {k} runs of latents on one device: k must be a multiple of the mesh's "
                    f"{axis} = {axes.latent_parts}"
                )
            values, indices = self._by_another_rule(pre, k // axes.latent_parts)
            return RowSparse(jax.nn.relu(kernels.with_encoder_gradient(values, indices, *encoder)), indices)
        values, indices = self._by_another_rule(pre, min(k, pre.shape[1]))
        won = among_shards(jnp.abs(values), k, axis, now)
        return RowSparse(jnp.where(won, kernels.with_encoder_gradient(values, indices, *encoder), 0.0), indices)

    def _by_another_rule(self, pre: Float[Array, "B N"], k: int) -> tuple[Float[Array, "B k"], Int[Array, "B k"]]:
        """Values and indices that the rules "groups" and "magnitude" keep."""
        if self.rule == "groups":
            runs = pre.reshape(len(pre), k, -1)
            return runs.max(axis=2), runs.argmax(axis=2).astype(jnp.int32) + jnp.arange(k, dtype=jnp.int32) * runs.shape[2]
        indices = kernels.topk(jnp.abs(pre), k)[1]
        return jnp.take_along_axis(pre, indices, axis=1), indices

    def loss(
        self,
        params: dict,
        x: Float[Array, "B D"],
        target: Float[Array, "B D_out"] | None = None,
        dead: Bool[Array, " N"] | None = None,
        settings: LossSettings = LossSettings(),  # noqa: B008  # frozen
        axes: Axes = ALONE,
    ) -> tuple[Float[Array, ""], LossParts]:
        """Mean squared error, summed over the width, plus AuxK and Multi-TopK; see ``Dictionary.loss``.

        AuxK (METHODS.md): of the latents in ``dead`` the k_aux largest raw pre-activations of each row reconstruct the
        residual, which is held constant, without ReLU and without bias. Its weight is ``aux * min(1, n_dead / k_aux)``.

        ``settings.k`` takes the place of k, also in Multi-TopK's 4 k.

        Raises:
          UserError: as ``Dictionary.loss``; ``settings.k`` with the rule ``"groups"``, whose runs depend on k.
        """
        if settings.k is not None and self.rule == "groups":
            raise UserError("TopK.loss: settings.k does not go with the rule 'groups': another k cuts the latents into other runs")
        x, target = self._pair(x, target)
        k, many = settings.k, None
        if self.multi_topk:
            many = self._keep(params, x, min(self.width, 4 * self.k), None if k is None else 4 * k, axes)
        if many is None or axes.latents is not None:
            codes = self._keep(params, x, self.k, k, axes)
        else:
            codes = _first(RowSparse(many.values[:, : self.k], many.indices[:, : self.k]), k)
        residual = target - self._output(params, codes, x, axes)
        terms, measured = {"reconstruction": squared(residual, axes)}, {}
        if dead is not None:
            measured["aux"], terms["aux"] = self._aux(params, x, residual, dead, settings, axes)
        if many is not None:
            measured["multi_topk"] = squared(target - self._output(params, many, x, axes), axes)
            terms["multi_topk"] = measured["multi_topk"] / 8.0
        return total(terms), self._parts(residual, target, codes, terms, measured, axes=axes)


def _first(codes: RowSparse, k: int | Int[Array, ""] | None) -> RowSparse:
    """The first k entries of each row, which are the largest ones; the others are 0. None: as they are."""
    return codes if k is None else RowSparse(jnp.where(jnp.arange(codes.values.shape[1]) < k, codes.values, 0.0), codes.indices)
