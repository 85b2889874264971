"""What all dictionaries share: sizes, parameters, rows in and out, decoding, folding.

    f = activation(W_enc (norm(x) - shift) + b_enc),    y = unnorm(W_dec f + b_dec [+ W_skip x])

An autoencoder's ``shift`` is ``b_dec``; a transcoder's is 0, because ``b_dec`` lives in the output space, or a bias of its
own, ``b_in`` (``input_bias=True``, the transcoder paper's recipe).
"""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dlmscope_jax import kernels
from dlmscope_jax.errors import UserError
from dlmscope_jax.kernels.axes import ALONE, Axes

from . import rows
from .codes import Bits, Codes, Dense, FlatSparse, take_rows
from .losses import LossParts, LossSettings, explained

RowNorm = Literal["none", "layer_norm", "unit_rms"]
_HIGHEST = jax.lax.Precision.HIGHEST
_AXES: dict[str, tuple[str, ...]] = {
    "W_enc": ("latent", "entry"),
    "W_dec": ("latent", "entry"),
    "b_enc": ("latent",),
    "b_dec": ("entry",),
    "W_skip": ("entry", "entry"),
    "b_in": ("entry",),
}


class Dictionary:
    """The contract of all dictionaries and what they have in common; each architecture is a frozen dataclass of this kind.

    Common fields, last in every architecture:
      d_out: width of the rows that it writes, for a transcoder; None for an autoencoder.
      skip: whether a transcoder has a linear path beside the latents.
      input_bias: whether a transcoder subtracts a bias ``b_in`` of its own before encoding.
      subtract: whether an autoencoder subtracts ``b_dec`` before encoding (files of others may not).
      row_norm: what is done to each row before encoding and undone on the output: ``"layer_norm"`` (mean off, divided by the
        unbiased standard deviation + 1e-5; undone without the 1e-5, as OpenAI and SAELens do), ``"unit_rms"`` (norm sqrt(d_in)).
    """

    d_in: int
    width: int
    d_out: int | None
    skip: bool
    input_bias: bool
    subtract: bool
    row_norm: RowNorm

    KIND: ClassVar[str]  # its name in files and configurations
    STATISTICS: ClassVar[tuple[str, ...]] = ()  # parameters that are measured in training and not learned
    UNIT_DECODER: ClassVar[bool] = True

    def _check(self, positive: tuple[str, ...], optional: tuple[str, ...] = ()) -> None:
        """Raises for numbers that are not positive integers and for a skip or input bias without ``d_out``."""
        name = type(self).__name__
        for field in ("d_in", "width", *positive, "d_out", *optional):
            value = getattr(self, field)
            if value is None and (field in optional or field == "d_out"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"{name}: {field} = {value!r} must be a positive integer")
        for field in ("skip", "input_bias"):
            if getattr(self, field) and self.d_out is None:
                raise UserError(f"{name}: {field}=True belongs to a transcoder: give d_out as well")
        if self.row_norm not in ("none", "layer_norm", "unit_rms"):
            raise UserError(f"{name}: row_norm {self.row_norm!r} is not known: none, layer_norm or unit_rms")

    # --- sizes and parameters

    @property
    def out(self) -> int:
        """Width of the rows that it writes."""
        return self.d_in if self.d_out is None else self.d_out

    @property
    def transcoder(self) -> bool:
        """Whether what it writes is something else than what it reads."""
        return self.d_out is not None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every parameter, float32, one latent a row."""
        shapes: dict[str, tuple[int, ...]] = {"W_enc": (self.width, self.d_in), "W_dec": (self.width, self.out)}
        shapes |= {"b_enc": (self.width,), "b_dec": (self.out,)}
        shapes |= {"W_skip": (self.out, self.d_in)} if self.skip else {}
        return shapes | ({"b_in": (self.d_in,)} if self.input_bias else {})

    def axes(self) -> dict[str, tuple[str, ...]]:
        """What the dimensions of every parameter are, which says how it is divided over devices (``distributed.RULES``)."""
        return {name: _AXES[name] for name in self.shapes() if name in _AXES}

    def here(self, axes: Axes) -> int:
        """How many of the latents one device holds."""
        return self.width // axes.latent_parts

    def init(
        self, key: Array, sample: Float[Array, "S D_out"] | None = None, inputs: Float[Array, "S D"] | None = None
    ) -> dict[str, Array]:
        """Fresh parameters: random unit decoder rows, encoder equal to them (autoencoder), biases and skip zero.

        Args:
          key: a JAX random key.
          sample: rows of the *output* (for an autoencoder the input) in training units; ``b_dec`` starts at their geometric median.
          inputs: for a transcoder, rows of the input; pre-activations start centred on them (``b_in``, or else ``b_enc``). With
            ``row_norm`` they are the inputs that belong to ``sample``, which is in their units.

        Raises:
          UserError: samples of another width.
        """
        self._check_samples(sample, inputs)
        if self.row_norm != "none" and sample is not None and not self.transcoder:
            sample = rows.normalise(jnp.asarray(sample, jnp.float32), self.row_norm)[0]
        if self.row_norm != "none" and self.transcoder and inputs is not None:
            inputs, scale, offset = rows.normalise(jnp.asarray(inputs, jnp.float32), self.row_norm)
            sample = None if sample is None else rows.in_units_of(jnp.asarray(sample, jnp.float32), scale, offset)
        for_decoder, for_encoder = jax.random.split(key)
        w_dec = rows.unit_rows(jax.random.normal(for_decoder, (self.width, self.out), jnp.float32))
        # A transcoder's two spaces differ, so its encoder gets directions of its own.
        w_enc = w_dec if not self.transcoder else rows.unit_rows(jax.random.normal(for_encoder, (self.width, self.d_in), jnp.float32))
        b_dec = jnp.zeros(self.out, jnp.float32) if sample is None else rows.geometric_median(jnp.asarray(sample, jnp.float32))
        # A buffer of its own: a training step donates its state, and two leaves must not share one.
        params = {"W_enc": w_enc.copy(), "W_dec": w_dec, "b_enc": jnp.zeros(self.width, jnp.float32), "b_dec": b_dec}
        if self.skip:
            params["W_skip"] = jnp.zeros((self.out, self.d_in), jnp.float32)
        if self.transcoder and (self.input_bias or inputs is not None):
            centre = jnp.zeros(self.d_in, jnp.float32) if inputs is None else rows.geometric_median(jnp.asarray(inputs, jnp.float32))
            if self.input_bias:
                params["b_in"] = centre
            else:
                params["b_enc"] = -jnp.matmul(w_enc, centre, precision=_HIGHEST)
        return params

    def _check_samples(self, sample: Array | None, inputs: Array | None) -> None:
        """Raises for samples of another width."""
        for name, given, width in (("sample", sample, self.out), ("inputs", inputs, self.d_in)):
            if given is not None and (given.ndim != 2 or given.shape[1] != width):
                raise UserError(f"{type(self).__name__}.init: the {name} must be [rows, {width}], got {list(given.shape)}")

    # --- rows to codes and back

    def encode(self, params: dict, x: Float[Array, "*batch D"], train: bool = False) -> Codes:
        """The activations of each row.

        Args:
          x: rows [..., d_in], any float dtype; computed in float32 at the highest precision.
          train: what training computes, where that differs (BatchTopK and Matryoshka select over the whole batch).

        Raises:
          UserError: rows of another width.
        """
        flat = rows.normalise(self._rows(x, self.d_in, "encode"), self.row_norm)[0]
        codes = self._codes(params, flat, train)
        lead = x.shape[:-1]
        return dataclasses.replace(codes, shape=lead) if isinstance(codes, FlatSparse) else take_rows(codes, lead)

    def _codes(self, params: dict, x: Float[Array, "B D"], train: bool, axes: Axes = ALONE) -> Codes:
        """The activations of normalised rows, with their gradient; of divided latents those that are here, counted from 0."""
        raise NotImplementedError

    def _shift(self, params: dict, axes: Axes = ALONE) -> Float[Array, " D"] | None:
        """What is subtracted before encoding."""
        name = self._shift_name()
        return None if name is None else axes.shared(params[name])

    @property
    def centred(self) -> bool:
        """Whether something is subtracted before encoding."""
        return self._shift_name() is not None

    def _shift_name(self) -> str | None:
        """The parameter that is subtracted before encoding."""
        if self.transcoder:
            return "b_in" if self.input_bias else None
        return "b_dec" if self.subtract else None

    def _preactivations(self, params: dict, x: Float[Array, "B D"], axes: Axes = ALONE) -> Float[Array, "B N"]:
        return kernels.preactivations(axes.shared(x), params["W_enc"], params["b_enc"], self._shift(params, axes))

    def decode(self, params: dict, codes: Codes, x: Float[Array, "*batch D"] | None = None) -> Float[Array, "*batch D_out"]:
        """The reconstruction ``W_dec f + b_dec`` (plus ``W_skip x``), float32.

        Raises:
          UserError: a skip transcoder, or one that normalises rows, without ``x``.
        """
        if x is None and (self.skip or self.row_norm != "none"):
            why = "a skip transcoder" if self.skip else f"a dictionary with row_norm={self.row_norm!r}"
            raise UserError(f"{type(self).__name__}.decode: {why} needs the input as well: decode(params, codes, x=x)")
        y = self._combine(params, codes) + params["b_dec"]
        if x is None or (not self.skip and self.row_norm == "none"):
            return y
        flat, scale, offset = rows.normalise(self._rows(x, self.d_in, "decode"), self.row_norm)
        if self.skip:
            y = y + jnp.matmul(flat, params["W_skip"].T, precision=_HIGHEST).reshape(*x.shape[:-1], self.out)
        return y if self.row_norm == "none" else (y.reshape(-1, self.out) * scale + offset).reshape(y.shape)

    def _combine(self, params: dict, codes: Codes) -> Float[Array, "*batch D_out"]:
        weight = params["W_dec"]
        if isinstance(codes, Dense | Bits):
            return jnp.matmul(codes.values.astype(jnp.float32), weight, precision=_HIGHEST)
        if isinstance(codes, FlatSparse):
            flat = kernels.decode_flat(codes.values, codes.rows, codes.latents, weight, codes.n_rows)
            return flat.reshape(*codes.shape, weight.shape[1])
        lead, k = codes.values.shape[:-1], codes.values.shape[-1]
        return kernels.decode(codes.values.reshape(-1, k), codes.indices.reshape(-1, k), weight).reshape(*lead, weight.shape[1])

    def reconstruct(self, params: dict, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D_out"]:
        """``decode(encode(x))``."""
        return self.decode(params, self.encode(params, x), x=x)

    def dense(self, codes: Codes) -> Float[Array, "*batch N"]:
        """All N activations of every row."""
        return codes.dense(self.width)

    def direction(self, params: dict, i: Array | int) -> Float[Array, " D_out"]:
        """The decoder row of latent ``i``: what one unit of its activation adds to the output."""
        return params["W_dec"][i]

    # --- training

    def loss(
        self,
        params: dict,
        x: Float[Array, "B D"],
        target: Float[Array, "B D_out"] | None = None,
        dead: Any = None,
        settings: LossSettings = LossSettings(),  # noqa: B008  # frozen
        axes: Axes = ALONE,
    ) -> tuple[Float[Array, ""], LossParts]:
        """The training loss and what it consists of; differentiate the first result, report the second.

        Where ``axes`` divide the batch or the latents, rows, ``dead`` and parameters are those that are here, and the results those of
        the whole: the same everywhere, but for ``fired``, which is of the latents that are here. The gradient is what the rows that
        are here contribute; their sum over ``axes.rows`` is that of the batch.

        Args:
          x: rows in training units (divided by the input scale).
          target: what to reconstruct; an autoencoder's default is ``x``, a transcoder must be given it.
          dead: [N] bool, which latents count as dead; None: no auxiliary loss.
          settings: weights of the terms, and k where it is annealed.
          axes: the mesh axes that divide rows and latents.

        Raises:
          UserError: shapes that do not fit, a transcoder without target.
        """
        raise NotImplementedError

    def _pair(self, x: Array, target: Array | None) -> tuple[Float[Array, "B D"], Float[Array, "B D_out"]]:
        """Input and target of a loss, checked, float32 and normalised."""
        x = self._rows(x, self.d_in, "loss")
        if target is None:
            if self.transcoder:
                raise UserError(f"{type(self).__name__}.loss: a transcoder needs the rows that it should produce: give target")
            x = rows.normalise(x, self.row_norm)[0]
            return x, x
        target = self._rows(target, self.out, "loss (target)")
        flat, scale, offset = rows.normalise(x, self.row_norm)
        return flat, target if self.row_norm == "none" else rows.in_units_of(target, scale, offset)

    def row_errors(
        self, params: dict, x: Float[Array, "B D"], target: Float[Array, "B D_out"] | None = None, axes: Axes = ALONE
    ) -> tuple[Float[Array, "B D"], Float[Array, "B D_out"], Float[Array, " B"]]:
        """What resampling asks for: inputs and targets less the biases, normalised, and each row's squared error in training."""
        x, target = self._pair(x, target)
        error = jnp.square(target - self._output(params, self._codes(params, x, True, axes), x, axes)).sum(axis=1)
        shift = self._shift(params)
        return x if shift is None else x - shift, target - params["b_dec"], error

    def _output(self, params: dict, codes: Codes, x: Float[Array, "B D"], axes: Axes = ALONE) -> Float[Array, "B D_out"]:
        """The reconstruction of normalised rows, not yet undone: what a loss compares."""
        return axes.sum_latents(self._combine(params, codes)) + self._without_latents(params, x)

    def _without_latents(self, params: dict, x: Float[Array, "B D"]) -> Float[Array, "*B D_out"]:
        """The part of ``_output`` that no latent adds: ``b_dec`` (plus ``W_skip x``)."""
        return params["b_dec"] + jnp.matmul(x, params["W_skip"].T, precision=_HIGHEST) if self.skip else params["b_dec"]

    def _parts(
        self,
        residual: Float[Array, "B D_out"],
        target: Float[Array, "B D_out"],
        codes: Codes,
        terms: dict[str, Array],
        measured: dict[str, Array] | None = None,
        statistics: dict[str, Array] | None = None,
        axes: Axes = ALONE,
    ) -> LossParts:
        residual, target, codes = jax.lax.stop_gradient((residual, target, codes))
        parts = LossParts(
            terms=terms,
            measured=measured or {},
            explained_variance=explained(residual, target, axes),
            l0=axes.mean_rows(axes.sum_latents(codes.count().astype(jnp.float32).mean())),
            fired=axes.sum_rows(codes.fired(self.here(axes))),
            statistics=statistics or {},
        )
        return jax.lax.stop_gradient(parts)

    def project_gradient(self, params: dict, gradients: dict) -> dict:
        """Gradients without their part along the decoder rows, where those are held at unit norm; apply before the optimiser."""
        return rows.project_gradient(params, gradients) if self.unit_decoder else gradients

    @property
    def unit_decoder(self) -> bool:
        """Whether training holds decoder rows at unit norm."""
        return self.UNIT_DECODER

    def constrain(self, params: dict) -> dict:
        """Parameters put back to where they must lie (unit decoder rows, ``bounded``); apply after the optimiser."""
        return self.bounded(rows.renormalise(params) if self.unit_decoder else params)

    def bounded(self, params: dict) -> dict:
        """What ``constrain`` does beside unit decoder rows, which the optimiser may have seen to already."""
        return params

    def update_statistics(self, params: dict, statistics: dict[str, Array]) -> dict:
        """Parameters with those that are measured and not learned moved towards a batch's ``LossParts.statistics``."""
        return params

    # --- units

    def fold(self, params: dict, scale: float | Array, out_scale: float | Array | None = None) -> dict:
        """Parameters trained on ``x / scale`` (and ``target / out_scale``) as parameters that act on raw rows.

        The activations used here commute with a positive factor, so the folded dictionary chooses the same latents, its activations
        are ``out_scale`` times as large, and its decoder rows keep their norm. For an autoencoder only biases and thresholds
        change. A dictionary that normalises each row is left as it is: the norm takes any scale away.

        Args:
          scale: the positive number that inputs were divided by.
          out_scale: the same for a transcoder's target; None: ``scale``, which an autoencoder's always is.

        Raises:
          UserError: an autoencoder with two scales; a transcoder that normalises each row, whose output scale cannot be put anywhere.
        """
        out_scale = self._out_scale(scale, out_scale)
        if self.row_norm != "none":
            if self.transcoder:
                raise UserError(f"{type(self).__name__}.fold: a transcoder with row_norm={self.row_norm!r} has no place for a scale")
            return dict(params)
        ratio = out_scale / scale
        factors = {"b_dec": out_scale, "b_in": scale, **dict.fromkeys(self._activation_units(), out_scale)}
        if self.transcoder:
            factors |= {"W_enc": ratio, "W_skip": ratio}
        return {name: value * factors[name] if name in factors else value for name, value in params.items()}

    def _out_scale(self, scale: float | Array, out_scale: float | Array | None) -> float | Array:
        """What targets were divided by."""
        if out_scale is None:
            return scale
        if not self.transcoder and out_scale is not scale and out_scale != scale:
            name = type(self).__name__
            raise UserError(
                f"{name}.fold: out_scale = {out_scale} belongs to a transcoder; an autoencoder's output has its input's scale {scale}"
            )
        return out_scale

    def _activation_units(self) -> tuple[str, ...]:
        """Parameters in units of the activations."""
        return ("b_enc",)

    def unfold(self, params: dict, scale: float | Array, out_scale: float | Array | None = None) -> dict:
        """The inverse of ``fold``: parameters that act on raw rows as parameters for ``x / scale``."""
        return self.fold(params, 1.0 / scale, None if out_scale is None else 1.0 / out_scale)

    def _rows(self, x: Array, width: int, where: str) -> Float[Array, "B D"]:
        if x.ndim == 0 or x.shape[-1] != width:
            raise UserError(f"{type(self).__name__}.{where}: rows must have {width} entries, got an array of shape {list(x.shape)}")
        return x.reshape(-1, width).astype(jnp.float32)
