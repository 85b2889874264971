"""Names of the places inside a model where activations are read and edited.

A site is ``name@layer`` (``resid_post@5`` is the output of block 5, layers count from 0), ``final_norm``, what the
output head reads, or ``final_norm_scale``. TransformerLens names, module paths of the original implementations and the
folder names of the released DLM-Scope dictionaries are accepted as aliases, from the one table below.

What is added to the residual stream is ``attn_out`` and ``mlp_out``. Where a model norms (Gemma-2) or gates (MDLM) it
first, ``attn_raw`` and ``mlp_raw`` are what the projections gave. Every norm is ``(x - mean) / scale``, then its affine
part; its scale is a site, so that it can be held fixed. Per-head sites are ``[B, T, heads, H]``, ``attn_pattern`` is
``[B, heads, query, key]``, scales are ``[B, T, 1]`` (of heads ``[B, T, heads, 1]``), all others ``[B, T, width]``.
"""

import math
import re
from collections.abc import Callable

from jaxtyping import Array, Float

from dlmscope_jax.errors import UserError

from .config import ModelConfig

_D = lambda c: (c.d_model,)  # noqa: E731
_ONE = lambda c: (1,)  # noqa: E731
_Q = lambda c: (c.n_heads, c.head_dim)  # noqa: E731
_KV = lambda c: (c.n_kv_heads, c.head_dim)  # noqa: E731

# name -> shape of one token's entry, in the order in which a block computes them
BLOCK_SITES: dict[str, Callable[[ModelConfig], tuple[int, ...]]] = {
    "resid_pre": _D,  # input of the block
    "attn_norm_scale": _ONE,
    "attn_in": _D,  # what the query, key and value projections read
    "q": _Q,  # outputs of the projections, before qk-norm and rotation
    "k": _KV,
    "v": _KV,
    "q_norm_scale": lambda c: (c.n_heads, 1),
    "k_norm_scale": lambda c: (c.n_kv_heads, 1),
    "attn_pattern": lambda c: (),  # depends on the number of keys; made only when it is collected or edited
    "z": _Q,  # the values that each head mixed, what the output projection reads
    "attn_raw": _D,
    "attn_post_norm_scale": _ONE,
    "attn_out": _D,
    "resid_mid": _D,  # after the attention is added
    "mlp_norm_scale": _ONE,
    "mlp_in": _D,  # what the MLP reads
    "mlp_act": lambda c: (c.d_mlp,),  # what the down projection reads
    "mlp_raw": _D,
    "mlp_post_norm_scale": _ONE,
    "mlp_out": _D,
    "resid_post": _D,  # output of the block
}
FINAL_NORM, FINAL_SCALE = "final_norm", "final_norm_scale"
FINAL_SITES = {FINAL_SCALE: _ONE, FINAL_NORM: _D}  # both past the last block

# sites that only some models have
_WHERE: dict[str, Callable[[ModelConfig], bool]] = {
    "q_norm_scale": lambda c: c.qk_norm,
    "k_norm_scale": lambda c: c.qk_norm,
    "attn_raw": lambda c: c.added_apart,
    "mlp_raw": lambda c: c.added_apart,
    "attn_post_norm_scale": lambda c: c.post_norms,
    "mlp_post_norm_scale": lambda c: c.post_norms,
    "resid_mid": lambda c: not c.parallel,
}

# module paths that mean something else where the outputs of attention and MLP are normed before they are added (Gemma-2)
_POST_NORM_ALIASES = [
    (re.compile(r"(?:model\.)?layers\.(\d+)\.self_attn(?:\.o_proj)?"), "attn_raw"),
    (re.compile(r"(?:model\.)?layers\.(\d+)\.post_attention_layernorm"), "attn_out"),
    (re.compile(r"(?:model\.)?layers\.(\d+)\.pre_feedforward_layernorm"), "mlp_in"),
    (re.compile(r"(?:model\.)?layers\.(\d+)\.mlp(?:\.down_proj)?"), "mlp_raw"),
    (re.compile(r"(?:model\.)?layers\.(\d+)\.post_feedforward_layernorm"), "mlp_out"),
]
_ALIASES = [
    (re.compile(r"blocks\.(\d+)\.hook_(resid_pre|attn_out|resid_mid|mlp_out|resid_post)"), None),
    (re.compile(r"blocks\.(\d+)\.hook_mlp_in"), "resid_mid"),  # a copy of the residual stream there, before the norm
    (re.compile(r"blocks\.(\d+)\.attn\.hook_(q|k|v|z)"), None),
    (re.compile(r"blocks\.(\d+)\.attn\.hook_pattern"), "attn_pattern"),
    (re.compile(r"blocks\.(\d+)\.ln1\.hook_scale"), "attn_norm_scale"),
    (re.compile(r"blocks\.(\d+)\.ln2\.hook_scale"), "mlp_norm_scale"),
    (re.compile(r"ln_final\.hook_scale"), FINAL_SCALE),
    # the same numbers as the two sites only in a model whose weights are folded, where TransformerLens writes them
    (re.compile(r"blocks\.(\d+)\.ln1\.hook_normalized"), "attn_in"),
    (re.compile(r"blocks\.(\d+)\.ln2\.hook_normalized"), "mlp_in"),
    (re.compile(r"blocks\.(\d+)\.mlp\.hook_post"), "mlp_act"),
    (re.compile(r"(?:model\.)?(?:transformer\.)?(?:layers|blocks)\.(\d+)"), "resid_post"),
    (re.compile(r"(?:model\.)?layers\.(\d+)\.input_layernorm"), "attn_in"),
    (re.compile(r"(?:model\.)?layers\.(\d+)\.self_attn(?:\.o_proj)?"), "attn_out"),
    (re.compile(r"(?:model\.)?layers\.(\d+)\.post_attention_layernorm"), "mlp_in"),
    (re.compile(r"(?:model\.)?layers\.(\d+)\.mlp(?:\.down_proj)?"), "mlp_out"),
    (re.compile(r"(?:model\.)?transformer\.blocks\.(\d+)\.attn_norm"), "attn_in"),
    (re.compile(r"(?:model\.)?transformer\.blocks\.(\d+)\.attn_out"), "attn_out"),
    (re.compile(r"(?:model\.)?transformer\.blocks\.(\d+)\.ff_norm"), "mlp_in"),
    (re.compile(r"(?:model\.)?transformer\.blocks\.(\d+)\.ff_out"), "mlp_out"),
    (re.compile(r"(?:transformer\.)?h\.(\d+)"), "resid_post"),
    (re.compile(r"(?:transformer\.)?h\.(\d+)\.ln_1"), "attn_in"),
    (re.compile(r"(?:transformer\.)?h\.(\d+)\.ln_2"), "mlp_in"),
    (re.compile(r"(?:transformer\.)?h\.(\d+)\.attn(?:\.c_proj)?"), "attn_out"),
    (re.compile(r"(?:transformer\.)?h\.(\d+)\.mlp(?:\.c_proj)?"), "mlp_out"),
    (re.compile(r"(?:gpt_neox\.)?layers\.(\d+)\.attention(?:\.dense)?"), "attn_out"),
    (re.compile(r"gpt_neox\.layers\.(\d+)"), "resid_post"),
    (re.compile(r"gpt_neox\.layers\.(\d+)\.input_layernorm"), "attn_in"),
    (re.compile(r"gpt_neox\.layers\.(\d+)\.mlp(?:\.dense_4h_to_h)?"), "mlp_out"),
    (re.compile(r"gpt_neox\.layers\.(\d+)\.post_attention_layernorm"), "mlp_in"),
    # MDLM: outputs of projections before they are gated; its norms' outputs are no sites, being shifted and scaled next
    (re.compile(r"backbone\.blocks\.(\d+)"), "resid_post"),
    (re.compile(r"backbone\.blocks\.(\d+)\.attn_out"), "attn_raw"),
    (re.compile(r"backbone\.blocks\.(\d+)\.mlp\.1"), "mlp_act"),
    (re.compile(r"backbone\.blocks\.(\d+)\.mlp(?:\.2)?"), "mlp_raw"),
    (re.compile(r"(resid_post|mlp_out|attn_out)_layer_(\d+)"), None),
]  # fmt: skip


def ambiguous(site: str) -> str | None:
    """The two meanings of a module path that depends on whether outputs are normed before they are added; None for others."""
    for pattern, other in _POST_NORM_ALIASES:
        if match := pattern.fullmatch(site):
            usual = [name for p, name in _ALIASES if p.fullmatch(site) and name != other]
            return f"{usual[0]}@{match[1]} or {other}@{match[1]}" if usual else None
    return None


def sites_of(config: ModelConfig) -> tuple[str, ...]:
    """Names of the sites that each block of this model has, in the order in which it computes them."""
    return tuple(name for name in BLOCK_SITES if _WHERE.get(name, lambda c: True)(config))


def parse_site(site: str, config: ModelConfig | None = None) -> tuple[str, int]:
    """Splits a site into its name and its layer.

    Args:
      site: ``"resid_post@5"``, ``"final_norm"`` or an alias such as ``"blocks.5.hook_resid_post"``.
      config: the model, to check the site against; None checks the name alone, and takes module paths as Llama has them.

    Returns:
      The name and the 0-based layer; the layer of ``final_norm`` and its scale is the number of layers (-1 without a
      config).

    Raises:
      UserError: for a name or a layer that the model does not have.
    """
    name, at, layer = site.partition("@")
    if not at:
        for pattern, fixed in [*(_POST_NORM_ALIASES if config and config.post_norms else ()), *_ALIASES]:
            if match := pattern.fullmatch(site):
                digits, words = [g for g in match.groups() if g.isdigit()], [g for g in match.groups() if not g.isdigit()]
                name, layer = fixed or words[0], (digits or [""])[0]
                break
    if name in FINAL_SITES and not layer:
        return name, config.n_layers if config else -1
    if name not in BLOCK_SITES or not layer.isdigit():
        known = ", ".join(sites_of(config) if config else BLOCK_SITES)
        raise UserError(f"site {site!r} is not known: write NAME@LAYER with NAME one of {known}, or {' or '.join(FINAL_SITES)}")
    if config is not None and name not in sites_of(config):
        raise UserError(f"site {site!r}: this model ({config.family}) has no {name}; it has {', '.join(sites_of(config))}")
    if config is not None and int(layer) >= config.n_layers:
        raise UserError(f"site {site!r}: this model has layers 0 to {config.n_layers - 1}")
    return name, int(layer)


def canonical_site(site: str, config: ModelConfig | None = None) -> str:
    """The one spelling of a site: ``"blocks.5.hook_resid_post"`` becomes ``"resid_post@5"``; arguments as in ``parse_site``."""
    name, layer = parse_site(site, config)
    return name if name in FINAL_SITES else f"{name}@{layer}"


def site_shape(name: str, config: ModelConfig) -> tuple[int, ...]:
    """Shape of one token's entry at a site: ``(D,)``, ``(N, H)`` for a per-head site, ``(1,)`` for a norm's scale."""
    return FINAL_SITES[name](config) if name in FINAL_SITES else BLOCK_SITES[name](config)


def site_rows(tap: Float[Array, "B T *_"]) -> Float[Array, "B T W"]:
    """What was collected at a site as rows of ``site_width`` entries: the heads of a per-head site one after the other."""
    return tap.reshape(*tap.shape[:2], -1)


def site_width(site: str, config: ModelConfig) -> int:
    """Number of entries of one activation row at ``site``; the heads of a per-head site stand one after the other.

    Raises:
      UserError: for ``attn_pattern``, whose rows are as long as the text.
    """
    name, _ = parse_site(site, config)
    if name == "attn_pattern":
        raise UserError(f"site {site!r} has no fixed width: its rows are as long as the text; collect it from model.apply")
    return math.prod(site_shape(name, config))
