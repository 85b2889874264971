"""TopK dictionaries: sparse autoencoders and transcoders that keep the k largest latents of a row.

    f = ReLU(topk_k(W_enc (x - b_dec) + b_enc)),   y = W_dec f + b_dec        (Gao et al. 2024, arXiv 2406.04093)

With ``d_out`` it is a transcoder: nothing is subtracted before encoding, because ``b_dec`` lives in the output space;
``skip=True`` adds ``W_skip x`` to the output.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from dlmscope_jax import kernels
from dlmscope_jax.errors import UserError
from dlmscope_jax.kernels.sparse.dense import scatter

from . import auxk, rows
from .codes import Dense, RowSparse


@struct.dataclass
class LossParts:
    """What a training loss consists of; ``loss == reconstruction + aux_weight * aux``.

    Attributes:
      reconstruction: mean over rows of the summed squared error.
      aux: the error of the dead latents' reconstruction of the residual, over the residual's variance; 0 if none is dead.
      aux_weight: alpha * min(1, n_dead / k_aux).
      explained_variance: 1 - squared error / variance of this batch, for progress lines only (no bias correction, no held-out rows).
      l0: mean number of active latents a row.
      n_dead: how many latents the caller called dead.
      fired: [N] int32, in how many rows each latent was active.
    """

    reconstruction: Array
    aux: Array
    aux_weight: Array
    explained_variance: Array
    l0: Array
    n_dead: Array
    fired: Int[Array, " N"]


@dataclass(frozen=True)
class TopK:
    """The static description of a TopK dictionary; its methods are pure functions of a parameter dict.

    Parameters, float32, one latent a row: ``W_enc [N, d_in]``, ``W_dec [N, d_out]``, ``b_enc [N]``, ``b_dec [d_out]``,
    and ``W_skip [d_out, d_in]`` for a skip transcoder.

    Attributes:
      d_in: width of the rows that it reads.
      width: number of latents, N.
      k: active latents a row.
      d_out: width of the rows that it writes, for a transcoder; None for an autoencoder.
      skip: whether a transcoder has a linear path beside the latents.
      k_aux: dead latents that one row's auxiliary reconstruction uses; None: d_in / 2.

    Raises:
      UserError: sizes that are not positive, k or k_aux above the width, a skip without ``d_out``.
    """

    d_in: int
    width: int
    k: int
    d_out: int | None = None
    skip: bool = False
    k_aux: int | None = None

    def __post_init__(self):
        for name in ("d_in", "width", "k", "d_out", "k_aux"):
            value = getattr(self, name)
            if value is None and name in ("d_out", "k_aux"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"TopK: {name} = {value!r} must be a positive integer")
        if self.k > self.width:
            raise UserError(f"TopK: k = {self.k} is more than the {self.width} latents: k must be at most width")
        if self.k_aux is not None and self.k_aux > self.width:
            raise UserError(f"TopK: k_aux = {self.k_aux} is more than the {self.width} latents: k_aux must be at most width")
        if self.skip and self.d_out is None:
            raise UserError("TopK: skip=True belongs to a transcoder: give d_out as well")

    @property
    def out(self) -> int:
        """Width of the rows that it writes."""
        return self.d_in if self.d_out is None else self.d_out

    @property
    def aux_count(self) -> int:
        """k_aux as it applies."""
        return min(self.width, max(1, self.d_in // 2)) if self.k_aux is None else self.k_aux

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every parameter."""
        shapes = {"W_enc": (self.width, self.d_in), "W_dec": (self.width, self.out), "b_enc": (self.width,), "b_dec": (self.out,)}
        return shapes | ({"W_skip": (self.out, self.d_in)} if self.skip else {})

    def init(self, key: Array, sample: Float[Array, "S D"] | None = None) -> dict[str, Array]:
        """Fresh parameters: random unit decoder rows, encoder equal to them (autoencoder), biases and skip zero.

        Args:
          key: a JAX random key.
          sample: rows of the *output* (for an autoencoder the input) in training units; ``b_dec`` starts at their geometric median.

        Raises:
          UserError: a sample of another width.
        """
        if sample is not None and (sample.ndim != 2 or sample.shape[1] != self.out):
            raise UserError(f"TopK.init: the sample must be [rows, {self.out}], got {list(sample.shape)}")
        for_decoder, for_encoder = jax.random.split(key)
        w_dec = rows.unit_rows(jax.random.normal(for_decoder, (self.width, self.out), jnp.float32))
        # A transcoder's two spaces differ, so its encoder gets directions of its own.
        w_enc = w_dec if self.d_out is None else rows.unit_rows(jax.random.normal(for_encoder, (self.width, self.d_in), jnp.float32))
        b_dec = jnp.zeros(self.out, jnp.float32) if sample is None else rows.geometric_median(jnp.asarray(sample, jnp.float32))
        # A buffer of its own: a training step donates its state, and two leaves must not share one.
        params = {"W_enc": w_enc.copy(), "W_dec": w_dec, "b_enc": jnp.zeros(self.width, jnp.float32), "b_dec": b_dec}
        return params | ({"W_skip": jnp.zeros((self.out, self.d_in), jnp.float32)} if self.skip else {})

    def encode(self, params: dict, x: Float[Array, "*batch D"], train: bool = False) -> RowSparse:
        """The k largest pre-activations of each row, negative ones cut to zero; ties go to the lowest index.

        Args:
          x: rows [..., d_in], any float dtype; computed in float32 at the highest precision.
          train: without effect here; part of the interface because other dictionaries encode differently in training.

        Raises:
          UserError: rows of another width.
        """
        flat = self._rows(x, self.d_in, "encode")
        codes = self._encode(params, flat)
        return jax.tree.map(lambda leaf: leaf.reshape(*x.shape[:-1], self.k), codes)

    def _encode(self, params: dict, x: Float[Array, "B D"]) -> RowSparse:
        shift = params["b_dec"] if self.d_out is None else None
        weight, bias = params["W_enc"], params["b_enc"]
        pre = jax.lax.stop_gradient(kernels.preactivations(x, weight, bias, shift))
        values, indices = kernels.topk(pre, self.k)
        values = kernels.with_encoder_gradient(values, indices, x, weight, bias, shift)
        return RowSparse(jax.nn.relu(values), indices)

    def decode(self, params: dict, codes: RowSparse | Dense, x: Float[Array, "*batch D"] | None = None) -> Float[Array, "*batch D_out"]:
        """The reconstruction ``W_dec f + b_dec`` (plus ``W_skip x``), float32.

        Raises:
          UserError: a skip transcoder without ``x``.
        """
        lead, n = codes.values.shape[:-1], codes.values.shape[-1]
        if isinstance(codes, Dense):
            y = jnp.matmul(codes.values, params["W_dec"], precision=jax.lax.Precision.HIGHEST)
        else:
            y = kernels.decode(codes.values.reshape(-1, n), codes.indices.reshape(-1, n), params["W_dec"]).reshape(*lead, self.out)
        y = y + params["b_dec"]
        if self.skip:
            if x is None:
                raise UserError("TopK.decode: a skip transcoder needs the input as well: decode(params, codes, x=x)")
            y = y + jnp.matmul(x.astype(jnp.float32), params["W_skip"].T, precision=jax.lax.Precision.HIGHEST)
        return y

    def reconstruct(self, params: dict, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D_out"]:
        """``decode(encode(x))``."""
        return self.decode(params, self.encode(params, x), x=x)

    def dense(self, codes: RowSparse | Dense) -> Float[Array, "*batch N"]:
        """All N activations of every row."""
        if isinstance(codes, Dense):
            return codes.values
        lead = codes.values.shape[:-1]
        return scatter(codes.values.reshape(-1, self.k), codes.indices.reshape(-1, self.k), self.width).reshape(*lead, self.width)

    def direction(self, params: dict, i: Array | int) -> Float[Array, " D_out"]:
        """The decoder row of latent ``i``: what one unit of its activation adds to the output."""
        return params["W_dec"][i]

    def loss(
        self,
        params: dict,
        x: Float[Array, "B D"],
        target: Float[Array, "B D_out"] | None = None,
        dead: Bool[Array, " N"] | None = None,
        aux_alpha: float | Float[Array, ""] = 1 / 32,
    ) -> tuple[Float[Array, ""], LossParts]:
        """Mean squared error, summed over the width, plus AuxK; differentiate the first result, report the second.

        AuxK (METHODS.md): of the latents in ``dead`` the k_aux largest raw pre-activations of each row reconstruct the
        residual, which is held constant, without ReLU and without bias.

        Args:
          x: rows in training units (divided by the input scale).
          target: what to reconstruct; an autoencoder's default is ``x``, a transcoder must be given it.
          dead: which latents count as dead; None: none.
          aux_alpha: weight of AuxK when at least k_aux latents are dead; a plain 0 leaves it out of the program.

        Raises:
          UserError: shapes that do not fit, a transcoder without target.
        """
        x = self._rows(x, self.d_in, "loss")
        if target is None:
            if self.d_out is not None:
                raise UserError("TopK.loss: a transcoder needs the rows that it should produce: give target")
            target = x
        else:
            target = self._rows(target, self.out, "loss (target)")
        codes = self._encode(params, x)
        residual = target - self.decode(params, codes, x=x)
        n_rows = x.shape[0]
        reconstruction = jnp.square(residual).sum() / n_rows
        aux, weight, n_dead = jnp.float32(0), jnp.float32(0), jnp.int32(0)
        if dead is not None:
            n_dead = dead.sum(dtype=jnp.int32)
            if isinstance(aux_alpha, jax.Array) or aux_alpha != 0:
                aux = auxk.auxiliary_error(params, x, jax.lax.stop_gradient(residual), dead, self.aux_count, self.d_out is None)
                weight = aux_alpha * jnp.minimum(1.0, n_dead.astype(jnp.float32) / self.aux_count)
        active = (codes.values > 0).astype(jnp.int32)
        parts = LossParts(
            reconstruction=reconstruction,
            aux=aux,
            aux_weight=weight,
            explained_variance=1.0 - jnp.square(residual).sum() / jnp.square(target - target.mean(axis=0)).sum(),
            l0=active.sum().astype(jnp.float32) / n_rows,
            n_dead=n_dead,
            fired=jnp.zeros(self.width, jnp.int32).at[codes.indices.reshape(-1)].add(active.reshape(-1)),
        )
        return reconstruction + weight * aux, jax.lax.stop_gradient(parts)

    def project_gradient(self, params: dict, gradients: dict) -> dict:
        """Gradients without their part along the decoder rows; apply before the optimiser."""
        return rows.project_gradient(params, gradients)

    def renormalise(self, params: dict) -> dict:
        """Unit decoder rows; apply after the optimiser."""
        return rows.renormalise(params)

    def fold(self, params: dict, scale: float | Array, out_scale: float | Array | None = None) -> dict:
        """Parameters trained on ``x / scale`` (and ``target / out_scale``) as parameters that act on raw rows.

        ReLU and top-k commute with a positive factor, so the folded dictionary chooses the same latents, its activations
        are ``out_scale`` times as large, and its decoder rows keep their norm. For an autoencoder only biases change.

        Args:
          scale: the positive number that inputs were divided by.
          out_scale: the same for a transcoder's target; None: ``scale``.
        """
        out_scale = scale if out_scale is None else out_scale
        ratio = out_scale / scale
        folded = {**params, "b_enc": params["b_enc"] * out_scale, "b_dec": params["b_dec"] * out_scale}
        if self.d_out is not None:
            folded |= {name: params[name] * ratio for name in ("W_enc", "W_skip") if name in params}
        return folded

    def unfold(self, params: dict, scale: float | Array, out_scale: float | Array | None = None) -> dict:
        """The inverse of ``fold``: parameters that act on raw rows as parameters for ``x / scale``."""
        return self.fold(params, 1.0 / scale, None if out_scale is None else 1.0 / out_scale)

    def _rows(self, x: Array, width: int, where: str) -> Float[Array, "B D"]:
        if x.ndim == 0 or x.shape[-1] != width:
            raise UserError(f"TopK.{where}: rows must have {width} entries, got an array of shape {list(x.shape)}")
        return x.reshape(-1, width).astype(jnp.float32)
