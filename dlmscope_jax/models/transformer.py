"""The language model: a pure function of parameters, tokens, sites to collect and edits."""

from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from dlmscope_jax.distributed import row_parts, row_sharding
from dlmscope_jax.errors import UserError

from .attention import Visibility
from .block import Block, Cache, Context
from .config import DiffusionSpec, ModelConfig
from .edits import Edit, check_edits
from .head import Head, final_norm, head_of, sigma_condition
from .layers import rope_tables
from .sites import FINAL_NORM, FINAL_SCALE, FINAL_SITES, parse_site, site_shape

_CUTTING = ("dynamic_slice", "squeeze", "convert_element_type")  # how one layer's weights come out of the stack

SIGMA_WIDTH = 256  # of MDLM's embedding of the noise level


@struct.dataclass
class ModelOutput:
    """What one forward pass returns.

    Attributes:
      logits: [B, T, V] raw, as the original forward returns them (a shifted model's are not yet shifted);
        [B, M, V] where positions were asked for; None where no logits were.
      taps: ``{"resid_post": {5: [B, T, D]}}``, values after the edits at that site.
      cache: the cache with this call's keys and values in it, where one was given.
    """

    logits: Any
    taps: dict[str, dict[int, Array]]
    cache: Cache | None = None


class Transformer(nn.Module):
    """A language model, causal, bidirectional or block-causal.

    ``model.apply(params, tokens, ...)`` is pure; ``params`` is ``{"params": {...}}`` with the weights of the blocks
    stacked on a leading layer axis. The layers run as one ``scan``, up to the last one that the call needs.

    Attributes:
      config: the shape of the network.
      diffusion: what makes it a masked diffusion model, None for an autoregressive one.
      dtype: the dtype of the computation; norms, rotary tables and softmax are in float32.
      mesh: the devices that the parameters lie on, None for one: the batch stays divided over its axes ``data`` and
        ``replica``, and kernels that no compiler can divide know how to.
      trains: whether the gradient of all weights will be taken, for which a CPU has a faster form of the linear maps;
        it has no forward-mode derivative.
    """

    config: ModelConfig
    diffusion: DiffusionSpec | None = None
    dtype: jnp.dtype = jnp.float32
    mesh: Mesh | None = None
    trains: bool = False

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        attention_mask: Bool[Array, "B T"] | None = None,
        position_ids: Int[Array, "B T"] | None = None,
        logits: bool | Int[Array, "B M"] = True,
        collect: tuple[str, ...] = (),
        edits: tuple[Edit, ...] = (),
        cache: Cache | None = None,
        start: Int[Array, " B"] | None = None,
    ) -> ModelOutput:
        """Runs the model.

        Args:
          tokens: token ids.
          attention_mask: True at real tokens; padding is not attended to, and what it computes means nothing.
          position_ids: position of each token, default ``0..T-1`` (from ``start`` on with a cache). Rotary positions
            matter by their differences; learned ones and the blocks of block-causal attention by their values.
          logits: True for all positions, False for none (then nothing past the last tap is computed), or the
            positions to score.
          collect: sites to return, ``("resid_post@5", "final_norm")``; static.
          edits: changes to apply; their values, layers, masks and strengths never retrace.
          cache: keys and values of other tokens (``init_cache``). The tokens are written at columns ``start`` and up
            and attend to everything that is written and that the attention rule lets them see, by position.
          start: [B] first column of each row's tokens in the cache.

        Raises:
          UserError: for a site that this model does not have, more tokens than its context or than fit in the cache,
            or only one of cache and start.
        """
        cfg = self.config
        tree = self._parameters()
        sites = [parse_site(site, cfg) for site in collect]
        edits = tuple(edits)
        check_edits(edits, cfg)
        whole = logits is not False or any(name in FINAL_SITES for name, _ in sites)
        n_run = cfg.n_layers if whole else max((layer + 1 for _, layer in sites), default=0)

        batch, length = tokens.shape
        if length > cfg.max_positions:
            raise UserError(f"{length} tokens are more than this model's context of {cfg.max_positions}: use shorter blocks")
        columns = None
        if (cache is None) != (start is None):
            raise UserError("a cache needs start, the column of each row's first token, and start needs a cache")
        if cache is not None:
            if length > cache.k.shape[2]:
                raise UserError(f"{length} tokens do not fit in a cache of {cache.k.shape[2]}")
            columns = start[:, None] + jnp.arange(length)
        indexed = position_ids is None
        if position_ids is None:
            position_ids = columns if columns is not None else jnp.arange(length)[None]
        position_ids = jnp.broadcast_to(position_ids, (batch, length))
        see, cache = self._visibility(position_ids, attention_mask, cache, columns, indexed)
        wanted = {name: sorted({layer for n, layer in sites if n == name}) for name, _ in sites if name not in FINAL_SITES}
        slot = lambda layers, i: layers.index(i) if i in layers else len(layers)  # noqa: E731
        context = Context(
            see=see,
            rotary=rope_tables(position_ids, cfg) if cfg.positions == "rotary" else None,
            condition=None if cfg.cond_dim is None else sigma_condition(tree),
            columns=columns,
            edits=edits,
            slots={name: jnp.array([slot(layers, i) for i in range(cfg.n_layers)]) for name, layers in wanted.items()},
        )
        buffers = {name: self._buffer(name, len(layers) + 1, batch, length, see.key.shape[1]) for name, layers in wanted.items()}
        block, blocks = Block(cfg, self.dtype, self.mesh, self.trains, parent=None), tree["blocks"]
        windows = jnp.array([cfg.window if on else 2**30 for on in cfg.windowed]) if any(cfg.windowed) else None

        def run(carry: tuple, step: tuple) -> tuple:
            (x, taps, cache), (layer, weights) = carry, step
            if weights is None:  # a prefix of the layers: slicing the stack would copy it
                weights = jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, layer, 0, keepdims=False), blocks)
            here = context if windows is None else replace(context, see=replace(see, window=windows[layer]))
            x, taps, cache = block.apply({"params": weights}, self._divided(x), layer, here, taps, cache)
            return (self._divided(x), taps, cache), None

        x = self._embed(tree, tokens, position_ids)
        if n_run == cfg.n_layers:
            (x, buffers, cache), _ = jax.lax.scan(run, (x, buffers, cache), (jnp.arange(n_run), blocks))
        elif n_run:
            # a backward pass cuts the weights out of the stack again; saved, they would be a second copy of it
            part = jax.checkpoint(run, policy=lambda primitive, *_, **__: primitive.name not in _CUTTING, prevent_cse=False)
            (x, buffers, cache), _ = jax.lax.scan(part, (x, buffers, cache), (jnp.arange(n_run), None))
        taps = {name: {layer: buffers[name][i] for i, layer in enumerate(layers)} for name, layers in wanted.items()}
        scores = None
        if whole:

            def site(name: str, value: Array) -> Array:
                for edit in edits:
                    value = edit.apply(value, value) if edit.site == name else value
                if (name, cfg.n_layers) in sites:
                    taps[name] = {cfg.n_layers: value}
                return value

            hidden = site(FINAL_NORM, final_norm(tree, cfg, x, lambda scale: site(FINAL_SCALE, scale)))
            if logits is not False:
                if logits is not True:
                    hidden = jnp.take_along_axis(hidden, jnp.asarray(logits)[:, :, None], axis=1)
                scores = head_of(tree, cfg).logits(hidden, self.dtype)
        return ModelOutput(logits=scores, taps=taps, cache=cache)

    def _parameters(self) -> dict[str, Any]:
        """All parameters; flax makes them on init and checks their shapes on apply."""
        cfg, normal, zeros = self.config, nn.initializers.normal, nn.initializers.zeros
        made: dict[str, Any] = {}

        def make(name: str, init: Any, *shape: int) -> None:
            made[name] = self.param(name, init, shape, jnp.float32)

        make("embed", normal(1.0 if not cfg.tied_head else 0.02), cfg.vocab_size, cfg.d_model)
        if cfg.positions == "learned":
            make("positions", normal(0.02), cfg.max_positions, cfg.d_model)
        made["blocks"] = self.param("blocks", self._init_blocks)
        make("final_norm", zeros if cfg.norm_offset else nn.initializers.ones, cfg.d_model)
        if cfg.norm_bias:
            make("final_norm_bias", zeros, cfg.d_model)
        if not cfg.tied_head:
            make("head", normal(0.02), cfg.vocab_size, cfg.d_model)
        if cfg.head_bias:
            make("head_bias", zeros, cfg.vocab_size)
        if (width := cfg.cond_dim) is not None:
            for name, into, out in (
                ("sigma_in", SIGMA_WIDTH, width),
                ("sigma_out", width, width),
                ("final_adaln", width, 2 * cfg.d_model),
            ):
                make(name, normal(0.02), into, out)
                make(f"{name}_bias", zeros, out)
        return made

    def _init_blocks(self, key: Array) -> dict[str, Array]:
        cfg = self.config
        block, one = Block(cfg, jnp.float32, parent=None), jnp.zeros((1, 1), jnp.int32)
        rotary = rope_tables(one, cfg) if cfg.positions == "rotary" else None
        condition = None if cfg.cond_dim is None else jnp.zeros(cfg.cond_dim)
        context = Context(Visibility(one, one), rotary, condition)
        init = lambda k: block.init(k, jnp.zeros((1, 1, cfg.d_model)), jnp.int32(0), context, {})["params"]  # noqa: E731
        return jax.vmap(init)(jax.random.split(key, cfg.n_layers))

    def _divided(self, x: Array) -> Array:
        """The batch over the mesh's rows: left alone, the compiler may follow the weights' sharding instead and copy the batch."""
        if self.mesh is None or x.shape[0] % row_parts(self.mesh):
            return x
        return jax.lax.with_sharding_constraint(x, row_sharding(self.mesh))

    def _embed(self, tree: dict, tokens: Array, position_ids: Array) -> Array:
        x = tree["embed"].astype(self.dtype)[tokens]
        if self.config.scaled_embedding:
            x = x * jnp.asarray(self.config.d_model**0.5, self.dtype)
        return x + tree["positions"].astype(self.dtype)[position_ids] if self.config.positions == "learned" else x

    def _visibility(
        self, position_ids: Array, keep: Array | None, cache: Cache | None, columns: Array | None, indexed: bool
    ) -> tuple[Visibility, Cache | None]:
        """Which keys are seen, and the cache with the new tokens' positions written."""
        cfg = self.config
        rule: dict[str, Any] = {"rule": cfg.attention, "block_length": cfg.block_length}
        if cache is not None:
            written = position_ids if keep is None else jnp.where(keep, position_ids, -1)
            position = cache.position.at[jnp.arange(len(columns))[:, None], columns].set(written.astype(jnp.int32))
            return Visibility(position_ids, position, padded=True, **rule), replace(cache, position=position)
        # causal order is the order of the tokens, whatever their position ids
        own = cfg.attention == "block_causal" and not indexed
        query = position_ids if own else jnp.arange(position_ids.shape[1])[None]
        key = query if keep is None else jnp.where(keep.astype(bool), query, -1)
        return Visibility(query, key, padded=keep is not None, indexed=not own, **rule), None

    def _buffer(self, name: str, rows: int, batch: int, length: int, keys: int) -> Array:
        if name == "attn_pattern":
            return jnp.zeros((rows, batch, self.config.n_heads, length, keys), self.dtype)
        dtype = jnp.float32 if name.endswith("_scale") else self.dtype
        return jnp.zeros((rows, batch, length, *site_shape(name, self.config)), dtype)

    def init_cache(self, batch: int, length: int, dtype: jnp.dtype | None = None) -> Cache:
        """An empty cache for ``length`` tokens of each of ``batch`` rows, in the compute dtype by default."""
        cfg = self.config
        shape = (cfg.n_layers, batch, length, cfg.n_kv_heads, cfg.head_dim)
        empty = jnp.zeros(shape, dtype or self.dtype)
        return Cache(k=empty, v=empty, position=jnp.full((batch, length), -1, jnp.int32))

    def output_head(self, params: dict) -> Head:
        """The output head."""
        return head_of(params["params"], self.config)

    def unembed(self, params: dict, hidden: Float[Array, "*n D"]) -> Float[Array, "*n V"]:
        """Raw logits of what the head reads (the site ``final_norm``)."""
        return self.output_head(params).logits(hidden, self.dtype)


def init_params(model: Transformer, key: Array) -> dict:
    """Random parameters in float32: ``{"params": {...}}``, linear maps normal with variance 1 / fan-in."""
    return model.init(key, jnp.zeros((1, 1), jnp.int32))
