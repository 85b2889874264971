"""Names of the places inside a model where activations are read and edited.

A site is ``name@layer`` (``resid_post@5`` is the output of block 5, layers count from 0) or ``final_norm``, what the
output head reads. TransformerLens names, module paths of the original implementations and the folder names of the
released DLM-Scope dictionaries are accepted as aliases, from the one table below.
"""

import re

from dlmscope_jax.errors import UserError

from .config import ModelConfig

# name -> the ModelConfig attribute that gives its width
BLOCK_SITES = {
    "resid_pre": "d_model",  # input of the block
    "attn_out": "d_model",  # output of the attention projection, before it is added
    "resid_mid": "d_model",  # after the attention is added
    "mlp_in": "d_model",  # output of the norm before the MLP
    "mlp_act": "d_mlp",  # silu(gate) * up
    "mlp_out": "d_model",  # output of the down projection, before it is added
    "resid_post": "d_model",  # output of the block
}
FINAL_NORM = "final_norm"

_ALIASES = [
    (re.compile(r"blocks\.(\d+)\.hook_(resid_pre|attn_out|resid_mid|mlp_in|mlp_out|resid_post)"), None),
    (re.compile(r"blocks\.(\d+)\.mlp\.hook_post"), "mlp_act"),
    (re.compile(r"(?:model\.)?(?:transformer\.)?(?:layers|blocks)\.(\d+)"), "resid_post"),
    (re.compile(r"(?:model\.)?layers\.(\d+)\.self_attn(?:\.o_proj)?"), "attn_out"),
    (re.compile(r"(?:model\.)?layers\.(\d+)\.post_attention_layernorm"), "mlp_in"),
    (re.compile(r"(?:model\.)?layers\.(\d+)\.mlp(?:\.down_proj)?"), "mlp_out"),
    (re.compile(r"(?:model\.)?transformer\.blocks\.(\d+)\.attn_out"), "attn_out"),
    (re.compile(r"(?:model\.)?transformer\.blocks\.(\d+)\.ff_norm"), "mlp_in"),
    (re.compile(r"(?:model\.)?transformer\.blocks\.(\d+)\.ff_out"), "mlp_out"),
    (re.compile(r"(resid_post|mlp_out|attn_out)_layer_(\d+)"), None),
]


def parse_site(site: str, config: ModelConfig | None = None) -> tuple[str, int]:
    """Splits a site into its name and its layer.

    Args:
      site: ``"resid_post@5"``, ``"final_norm"`` or an alias such as ``"blocks.5.hook_resid_post"``.
      config: the model, to check the layer against; None checks the name alone.

    Returns:
      The name and the 0-based layer; the layer of ``final_norm`` is the number of layers (-1 without a config).

    Raises:
      UserError: for a name or a layer that the model does not have.
    """
    if site == FINAL_NORM:
        return FINAL_NORM, config.n_layers if config else -1
    name, at, layer = site.partition("@")
    if not at:
        for pattern, fixed in _ALIASES:
            if match := pattern.fullmatch(site):
                digits, words = [g for g in match.groups() if g.isdigit()], [g for g in match.groups() if not g.isdigit()]
                name, layer = fixed or words[0], digits[0]
                break
    if name not in BLOCK_SITES or not layer.isdigit():
        raise UserError(f"site {site!r} is not known: write NAME@LAYER with NAME one of {', '.join(BLOCK_SITES)}, or {FINAL_NORM}")
    if config is not None and int(layer) >= config.n_layers:
        raise UserError(f"site {site!r}: this model has layers 0 to {config.n_layers - 1}")
    return name, int(layer)


def canonical_site(site: str) -> str:
    """The one spelling of a site: ``"blocks.5.hook_resid_post"`` becomes ``"resid_post@5"``."""
    name, layer = parse_site(site)
    return name if name == FINAL_NORM else f"{name}@{layer}"


def site_width(site: str, config: ModelConfig) -> int:
    """Number of entries of one activation row at ``site``."""
    name, _ = parse_site(site, config)
    return config.d_model if name == FINAL_NORM else getattr(config, BLOCK_SITES[name])
