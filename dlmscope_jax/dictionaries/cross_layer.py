"""Cross-layer transcoders: a latent reads one layer, and writes into that layer and into all above it.

    a^l = act(W_enc^l x^l + b_enc^l),    y^m = sum_{l <= m} W_dec^{l -> m} a^l + b_dec^m

(Anthropic, "Circuit Tracing", 2025; reference/transcoders.md 1.8.) What the residual stream carries through several layers takes one
latent here, where transcoders of single layers need one in each.

A row has the layers side by side, ``[..., layers * d]``, and so have the latents. All that works on rows and latents therefore works
as for other dictionaries: ``d_in``, ``width`` and ``d_out`` count all layers together.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dlmscope_jax.errors import UserError
from dlmscope_jax.kernels.axes import ALONE, Axes

from . import rows
from .base import Dictionary
from .codes import Codes, Dense
from .jumprelu import jump
from .losses import LossParts, LossSettings, squared, total

_HIGHEST = jax.lax.Precision.HIGHEST
_SATURATION = 4.0  # c of the penalty, as in JumpReLU


@dataclass(frozen=True)
class CrossLayer(Dictionary):
    """The static description of a cross-layer transcoder; see ``Dictionary`` for the contract.

    Parameters, with N = width / layers latents in each layer, numbered layer by layer: ``W_enc [width, d_in / layers]``,
    ``b_enc [width]``, ``b_dec [d_out]``, for each layer l ``W_dec_l [N, layers - l, d_out / layers]`` (what a latent writes into layers
    l, l + 1, ...), and for JumpReLU ``threshold [width]``. Nothing is subtracted from the rows, and there is no skip.

    Attributes:
      d_in, width, d_out: entries of the rows that it reads, latents, entries of the rows that it writes: of all layers together.
      layers: how many there are.
      activation: ``"jumprelu"`` (as JumpReLU with the tanh penalty: its estimator reaches all parameters) or ``"relu"``.
      bandwidth: of JumpReLU's rectangle kernel, 1 is the root mean square norm of one layer's rows; None: 2 / sqrt(d_in / layers).

    Raises:
      UserError: sizes that are not positive or no multiples of ``layers``, an activation that is not known, a bandwidth outside of (0, 1].
    """

    d_in: int
    width: int
    layers: int
    d_out: int
    activation: Literal["jumprelu", "relu"] = "jumprelu"
    bandwidth: float | None = None

    KIND: ClassVar[str] = "cross_layer"
    UNIT_DECODER: ClassVar[bool] = False
    # common fields that it has not got
    skip = False
    input_bias = False
    subtract = False
    row_norm = "none"

    def __post_init__(self):
        self._check(("layers",))
        for field in ("d_in", "width", "d_out"):
            value = getattr(self, field)
            if value is None or value % self.layers:
                raise UserError(
                    f"CrossLayer: {field} = {value!r} counts all {self.layers} layers together: give a multiple of {self.layers}"
                )
        if self.activation not in ("jumprelu", "relu"):
            raise UserError(f"CrossLayer: activation {self.activation!r} is not known: jumprelu or relu")
        if self.bandwidth is not None and not 0 < self.bandwidth <= 1:
            raise UserError(f"CrossLayer: bandwidth = {self.bandwidth!r} must be above 0 and at most 1, the norm of one layer's row")

    # --- sizes and parameters

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Of one layer: entries read, latents, entries written."""
        return self.d_in // self.layers, self.width // self.layers, self.d_out // self.layers

    @property
    def window(self) -> float:
        """The bandwidth in units of the pre-activations."""
        d = self.sizes[0]
        return (2.0 if self.bandwidth is None else self.bandwidth * d**0.5) * rows.typical_entry(d, "none")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every parameter."""
        d, n, out = self.sizes
        shapes: dict[str, tuple[int, ...]] = {"W_enc": (self.width, d), "b_enc": (self.width,), "b_dec": (self.d_out,)}
        shapes |= {f"W_dec_{layer}": (n, self.layers - layer, out) for layer in range(self.layers)}
        return shapes | ({"threshold": (self.width,)} if self.activation == "jumprelu" else {})

    def axes(self) -> dict[str, tuple[str, ...]]:
        """What the dimensions of every parameter are. Latents are numbered layer by layer, so no mesh divides them (training.state)."""
        decoders = {f"W_dec_{layer}": ("latent", "layer", "entry") for layer in range(self.layers)}
        return super().axes() | decoders | ({"threshold": ("latent",)} if self.activation == "jumprelu" else {})

    def init(
        self, key: Array, sample: Float[Array, "S D_out"] | None = None, inputs: Float[Array, "S D"] | None = None
    ) -> dict[str, Array]:
        """As ``Dictionary.init``, layer by layer; what a latent writes has norm 1 over all its layers together."""
        self._check_samples(sample, inputs)
        d, n, out = self.sizes
        for_encoder, *for_decoders = jax.random.split(key, 1 + self.layers)
        w_enc = rows.unit_rows(jax.random.normal(for_encoder, (self.width, d), jnp.float32))
        params = {"W_enc": w_enc, "b_enc": jnp.zeros(self.width, jnp.float32), "b_dec": jnp.zeros(self.d_out, jnp.float32)}
        for layer, drawn in enumerate(for_decoders):
            flat = rows.unit_rows(jax.random.normal(drawn, (n, (self.layers - layer) * out), jnp.float32))
            params[f"W_dec_{layer}"] = flat.reshape(n, self.layers - layer, out)
        if sample is not None:
            params["b_dec"] = self._centres(sample).reshape(-1)
        if inputs is not None:
            centred = jnp.einsum("lnd,ld->ln", w_enc.reshape(self.layers, n, d), self._centres(inputs), precision=_HIGHEST)
            params["b_enc"] = -centred.reshape(-1)
        if self.activation == "jumprelu":
            params["threshold"] = jnp.full(self.width, self.window / 20, jnp.float32)
        return params

    def _centres(self, sample: Float[Array, "S D"]) -> Float[Array, "L d"]:
        """The geometric median of each layer's rows."""
        layered = jnp.asarray(sample, jnp.float32).reshape(sample.shape[0], self.layers, -1)
        return jnp.stack([rows.geometric_median(layered[:, layer]) for layer in range(self.layers)])

    # --- rows to codes and back

    def _preactivations(self, params: dict, x: Float[Array, "B D"], axes: Axes = ALONE) -> Float[Array, "B N"]:
        d, n, _ = self.sizes
        read = jnp.einsum("bld,lnd->bln", x.reshape(-1, self.layers, d), params["W_enc"].reshape(self.layers, n, d), precision=_HIGHEST)
        return read.reshape(-1, self.width) + params["b_enc"]

    def _activate(self, params: dict, pre: Float[Array, "B N"]) -> Dense:
        return Dense(jax.nn.relu(pre) if self.activation == "relu" else jump(pre, params["threshold"], self.window, True))

    def _codes(self, params: dict, x: Float[Array, "B D"], train: bool = False, axes: Axes = ALONE) -> Dense:
        return self._activate(params, self._preactivations(params, x))

    def _combine(self, params: dict, codes: Codes) -> Float[Array, "*batch D_out"]:
        _, n, out = self.sizes
        dense = codes.dense(self.width)
        by_layer = dense.reshape(*dense.shape[:-1], self.layers, n)
        y = jnp.zeros((*dense.shape[:-1], self.layers, out), jnp.float32)
        for layer in range(self.layers):
            written = jnp.einsum("...n,nmd->...md", by_layer[..., layer, :], params[f"W_dec_{layer}"], precision=_HIGHEST)
            y = y.at[..., layer:, :].add(written)
        return y.reshape(*dense.shape[:-1], self.d_out)

    def direction(self, params: dict, i: Array | int) -> Float[Array, " D_out"]:
        """What one unit of latent ``i`` (a Python or traced integer) adds to the output: zero below its layer."""
        _, n, out = self.sizes
        each = [jnp.pad(params[f"W_dec_{layer}"][i % n].reshape(-1), (layer * out, 0)) for layer in range(self.layers)]
        return jnp.stack(each)[i // n]

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
        """The mean over rows of sum_l |y^l - target^l|^2, and ``sparsity`` times that of sum_i tanh(c |W_dec,i| a_i / e).

        |W_dec,i| is the norm of all that latent i writes, c is 4, and e the root mean square of an entry of the target, which makes c the
        published one. JumpReLU adds ``preactivation`` times sum_i ReLU(theta_i - z_i) |W_dec,i|, which pulls back latents that do not fire.
        ``dead`` is not used; see ``Dictionary.loss`` for the rest.
        """
        x, target = self._pair(x, target)
        pre = self._preactivations(params, x)
        codes, norms = self._activate(params, pre), self._norms(params)
        residual = target - self._output(params, codes, x, axes)
        entry = rows.typical_entry(self.sizes[2], "none")
        measured = {"sparsity": jnp.tanh(_SATURATION / entry * codes.values * norms).sum(axis=1).mean()}
        measured = axes.mean_rows(measured)
        terms = {"reconstruction": squared(residual, axes), "sparsity": settings.sparsity * measured["sparsity"]}
        if self.activation == "jumprelu":
            measured["preactivation"] = axes.mean_rows((jax.nn.relu(params["threshold"] - pre) * norms).sum(axis=1).mean())
            terms["preactivation"] = settings.preactivation * measured["preactivation"]
        return total(terms), self._parts(residual, target, codes, terms, measured, axes=axes)

    def _norms(self, params: dict) -> Float[Array, " N"]:
        """Of each latent, the norm of what it writes into all layers."""
        n = self.sizes[1]
        return jnp.concatenate([rows.row_norms(params[f"W_dec_{layer}"].reshape(n, -1)) for layer in range(self.layers)])

    def bounded(self, params: dict) -> dict:
        """Thresholds at least 0."""
        return {**params, "threshold": jnp.maximum(params["threshold"], 0.0)} if self.activation == "jumprelu" else params

    # --- units

    def fold(self, params: dict, scale: float | Array, out_scale: float | Array | None = None) -> dict:
        """Parameters trained on ``x^l / scale_l`` and ``target^m / out_scale_m`` as parameters that act on raw rows.

        Layers differ in norm, so each has a scale of its own. Activations and thresholds stay what they are: encoders are divided by the
        scale of what they read, decoders and biases multiplied by that of what they write.

        Args:
          scale, out_scale: positive, one number for all layers or [layers]; ``out_scale`` None: ``scale``.
        """
        _, n, out = self.sizes
        read = jnp.broadcast_to(jnp.asarray(scale, jnp.float32), (self.layers,))
        written = jnp.broadcast_to(jnp.asarray(scale if out_scale is None else out_scale, jnp.float32), (self.layers,))
        decoders = {f"W_dec_{layer}": params[f"W_dec_{layer}"] * written[layer:, None] for layer in range(self.layers)}
        encoder, bias = params["W_enc"] / jnp.repeat(read, n)[:, None], params["b_dec"] * jnp.repeat(written, out)
        return {**params, "W_enc": encoder, "b_dec": bias, **decoders}
