"""The language model: a pure function of parameters, tokens, sites to collect and edits."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from dlmscope_jax.errors import UserError

from .config import DiffusionSpec, ModelConfig
from .edits import Edit
from .layers import Block, attention_mask_of, precision_of, rms_norm, rope_tables
from .sites import FINAL_NORM, parse_site, site_width


@struct.dataclass
class ModelOutput:
    """What one forward pass returns.

    Attributes:
      logits: [B, T, V] raw, as the original forward returns them (a shifted model's are not yet shifted);
        [B, M, V] where positions were asked for; None where no logits were.
      taps: ``{"resid_post": {5: [B, T, D]}}``, values after the edits at that site.
    """

    logits: Any
    taps: dict[str, dict[int, Array]]


class Transformer(nn.Module):
    """A Llama-like language model, causal or bidirectional.

    ``model.apply(params, tokens, ...)`` is pure; ``params`` is ``{"params": {...}}`` with the weights of the blocks
    stacked on a leading layer axis. The layers run as one ``scan``, up to the last one that the call needs.

    Attributes:
      config: the shape of the network.
      diffusion: what makes it a masked diffusion model, None for an autoregressive one.
      dtype: the dtype of the computation; norms, rotary tables and softmax are in float32.
    """

    config: ModelConfig
    diffusion: DiffusionSpec | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        attention_mask: Bool[Array, "B T"] | None = None,
        position_ids: Int[Array, "B T"] | None = None,
        logits: bool | Int[Array, "B M"] = True,
        collect: tuple[str, ...] = (),
        edits: tuple[Edit, ...] = (),
    ) -> ModelOutput:
        """Runs the model.

        Args:
          tokens: token ids.
          attention_mask: True at real tokens; padding is not attended to, and what it computes means nothing.
          position_ids: rotary positions, default ``0..T-1`` (only differences matter).
          logits: True for all positions, False for none (then nothing past the last tap is computed), or the
            positions to score.
          collect: sites to return, ``("resid_post@5", "final_norm")``; static.
          edits: changes to apply; their values, layers, masks and strengths never retrace.

        Raises:
          UserError: for a site that this model does not have, or more tokens than its context.
        """
        cfg = self.config
        embed = self.param("embed", nn.initializers.normal(1.0 if not cfg.tied_head else 0.02), (cfg.vocab_size, cfg.d_model), jnp.float32)
        blocks = self.param("blocks", self._init_blocks)
        final_norm = self.param("final_norm", nn.initializers.ones, (cfg.d_model,), jnp.float32)
        head = embed if cfg.tied_head else self.param("head", nn.initializers.normal(0.02), (cfg.vocab_size, cfg.d_model), jnp.float32)

        sites = [parse_site(site, cfg) for site in collect]
        whole = logits is not False or any(name == FINAL_NORM for name, _ in sites)
        n_run = cfg.n_layers if whole else max((layer + 1 for _, layer in sites), default=0)

        batch, length = tokens.shape
        if length > cfg.max_positions:
            raise UserError(f"{length} tokens are more than this model's context of {cfg.max_positions}: use shorter blocks")
        if position_ids is None:
            position_ids = jnp.broadcast_to(jnp.arange(length), (batch, length))
        cos, sin = rope_tables(position_ids, cfg)
        mask = attention_mask_of(cfg, length, attention_mask)
        wanted = {name: sorted({layer for n, layer in sites if n == name}) for name, _ in sites if name != FINAL_NORM}
        buffers = {
            name: jnp.zeros((len(layers) + 1, batch, length, site_width(f"{name}@0", cfg)), self.dtype) for name, layers in wanted.items()
        }
        slot = lambda layers, i: layers.index(i) if i in layers else len(layers)  # noqa: E731
        slots = {name: jnp.array([slot(layers, i) for i in range(cfg.n_layers)]) for name, layers in wanted.items()}
        block = Block(cfg, self.dtype, parent=None)

        def run(carry: tuple, step: tuple) -> tuple:
            (x, taps), (layer, weights) = carry, step
            if weights is None:  # a prefix of the layers: slicing the stack would copy it
                weights = jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, layer, 0, keepdims=False), blocks)
            return block.apply({"params": weights}, x, layer, cos, sin, mask, edits, taps, slots), None

        x = embed.astype(self.dtype)[tokens]
        if n_run:
            steps = (jnp.arange(n_run), blocks if n_run == cfg.n_layers else None)
            (x, buffers), _ = jax.lax.scan(run, (x, buffers), steps)
        taps = {name: {layer: buffers[name][i] for i, layer in enumerate(layers)} for name, layers in wanted.items()}
        scores = None
        if whole:
            hidden = rms_norm(x, final_norm, cfg.norm_eps)
            if any(name == FINAL_NORM for name, _ in sites):
                taps[FINAL_NORM] = {cfg.n_layers: hidden}
            if logits is not False:
                if logits is not True:
                    hidden = jnp.take_along_axis(hidden, jnp.asarray(logits)[:, :, None], axis=1)
                scores = unembed_with(head, hidden, self.dtype)
        return ModelOutput(logits=scores, taps=taps)

    def _init_blocks(self, key: Array) -> dict[str, Array]:
        cfg = self.config
        block, x = Block(cfg, jnp.float32, parent=None), jnp.zeros((1, 1, cfg.d_model))
        table = jnp.zeros((1, 1, cfg.head_dim))
        init = lambda k: block.init(k, x, jnp.int32(0), table, table, None, (), {}, {})["params"]  # noqa: E731
        return jax.vmap(init)(jax.random.split(key, cfg.n_layers))

    def head_matrix(self, params: dict) -> Float[Array, "D V"]:
        """The output head's matrix, the transposed embedding where they are tied."""
        tree = params["params"]
        return tree["embed" if self.config.tied_head else "head"].T

    def unembed(self, params: dict, hidden: Float[Array, "*n D"]) -> Float[Array, "*n V"]:
        """Raw logits of what the head reads (the site ``final_norm``)."""
        return unembed_with(self.head_matrix(params).T, hidden, self.dtype)


def unembed_with(head: Float[Array, "V D"], hidden: Float[Array, "*n D"], dtype: jnp.dtype) -> Float[Array, "*n V"]:
    """Logits in the compute dtype, as the original implementations return them."""
    return jnp.einsum("...d,vd->...v", hidden.astype(dtype), head.astype(dtype), precision=precision_of(dtype))


def init_params(model: Transformer, key: Array) -> dict:
    """Random parameters in float32: ``{"params": {...}}``, linear maps normal with variance 1 / fan-in."""
    return model.init(key, jnp.zeros((1, 1), jnp.int32))


def logit_lens(model: Transformer, params: dict, resid: Float[Array, "*n D"], norm: str = "final") -> Float[Array, "*n V"]:
    """What the output head says about a residual vector (nostalgebraist 2020).

    Args:
      resid: residual activations, or a direction such as a decoder row.
      norm: ``"final"`` applies the last norm, ``"frozen"`` only its weight (a direction has no scale of its own),
        ``"none"`` nothing.

    Raises:
      UserError: for another ``norm``.
    """
    weight = params["params"]["final_norm"]
    if norm not in ("final", "frozen", "none"):
        raise UserError(f"logit_lens: norm {norm!r} is not known: 'final', 'frozen' or 'none'")
    resid = resid.astype(jnp.float32)
    if norm == "final":
        resid = rms_norm(resid, weight, model.config.norm_eps)
    elif norm == "frozen":
        resid = resid * weight
    return model.unembed(params, resid)
