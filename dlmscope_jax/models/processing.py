"""A model's weights in another form: norms folded into what reads them, a residual stream without its mean.

TransformerLens changes the weights of the models that it loads (``fold_ln``, ``center_writing_weights``,
``fold_value_biases``, ``center_unembed``; versions 1 and 2 by default). Probabilities stay as they are; activations do not, so
a dictionary that was trained on such activations, like the transcoders of Dunefsky et al. 2024 for GPT-2 and Pythia, is
only right on a model that was changed in the same way. The sites ``attn_in`` and ``mlp_in`` of a folded model are
``blocks.L.ln1.hook_normalized`` and ``blocks.L.ln2.hook_normalized``: ``(x - mean) / scale`` and nothing more.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dlmscope_jax.errors import UserError

from .config import ModelConfig
from .transformer import Transformer

_READERS = {"attn_norm": ("q", "k", "v"), "mlp_norm": ("gate", "up")}
_WRITERS = ("o", "o_bias", "down", "down_bias")


def process_weights(model: Transformer, params: dict) -> tuple[Transformer, dict]:
    """The same model with folded weights, as TransformerLens would hold it.

    1. The weight and bias of every norm before attention, MLP and head go into the maps that read it; the norm's own become
       1 (0 where it multiplies by ``1 + weight``) and 0. Norms of heads (qk-norm) and of outputs (Gemma-2) stay as they are.
       A tied head becomes a matrix of its own.
    2. Where norms remove the mean (``norm="layer"``), it need not be there: what reads the residual stream loses its mean
       over D in each column, what writes to it (embeddings, output projections, their biases) its mean over D.
    3. The values' bias, of which every position receives exactly one, moves through the output projection into its bias.
    4. The head's rows lose their mean over the vocabulary, and so does its bias: logits change by a constant at each
       position. Not where logits are capped, which that would change.

    Numbers are computed in float32 or wider and rounded once to the parameters' dtype: fold in float32, in which the folded
    model's log-probabilities agree with the raw one's to about 1e-5.

    Args:
      model: the language model.
      params: its parameters, on one device or sharded.

    Returns:
      The model with ``config.weight_processing == "folded"``, with biases where folding made some, and new parameters. A
      folded model is returned as it is.

    Raises:
      UserError: for a model whose norms are shifted and scaled by a condition (MDLM), of which TransformerLens knows none.
    """
    config = model.config
    if config.weight_processing == "folded":
        return model, params
    if config.cond_dim is not None:
        raise UserError(
            f"process_weights: the norms of {config.family} follow a condition vector (adaLN); only its raw weights can be used"
        )
    made = config.norm_bias
    folded = dataclasses.replace(
        config,
        qkv_bias=config.qkv_bias or made,
        out_bias=config.out_bias or config.qkv_bias or made,
        mlp_bias=config.mlp_bias or made,
        head_bias=config.head_bias or made,
        tied_head=False,
        weight_processing="folded",
    )
    return model.clone(config=folded), {"params": jax.jit(_folded, static_argnums=(1, 2))(params["params"], config, folded)}


def _folded(tree: dict, config: ModelConfig, folded: ModelConfig) -> dict:
    dtype = tree["embed"].dtype
    tree = jax.tree.map(lambda a: a.astype(max(a.dtype, jnp.dtype("float32"), key=lambda kind: kind.itemsize)), tree)
    blocks = tree["blocks"]
    head, head_bias = _read(tree, "final_norm", tree["embed" if config.tied_head else "head"].T, tree.get("head_bias"), config)
    if config.logit_softcap is None:
        head, head_bias = _centred(head), _centred(head_bias)
    for norm, readers in _READERS.items():
        for name in readers:
            if name in blocks:
                blocks[name], blocks[f"{name}_bias"] = _read(blocks, norm, blocks[name], blocks.get(f"{name}_bias"), config)
    blocks["o_bias"] = blocks.get("o_bias", 0.0) + _through_heads(blocks["v_bias"], blocks["o"], config)
    blocks["v_bias"] = jnp.zeros_like(blocks["v_bias"])
    blocks.setdefault("down_bias", jnp.zeros_like(blocks["o_bias"]))
    for place, name in ((blocks, "attn_norm"), (blocks, "mlp_norm"), (tree, "final_norm")):
        place[name] = jnp.full_like(place[name], 0.0 if config.norm_offset else 1.0)
        if config.norm_bias:
            place[f"{name}_bias"] = jnp.zeros_like(place[f"{name}_bias"])
    if config.norm == "layer":
        blocks |= {name: _centred(blocks[name]) for name in _WRITERS}
        tree |= {name: _centred(tree[name]) for name in ("embed", "positions") if name in tree}
    tree |= {"head": head.T, "head_bias": head_bias}
    return jax.tree.map(lambda a: a.astype(dtype), {**_present(tree, folded), "blocks": _present(blocks, folded)})


def _read(
    place: dict, norm: str, matrix: Float[Array, "*L D O"], bias: Float[Array, "*L O"] | None, config: ModelConfig
) -> tuple[Float[Array, "*L D O"], Float[Array, "*L O"]]:
    """A map that reads a norm, with that norm's weight and bias in it."""
    gain = place[norm] + (1.0 if config.norm_offset else 0.0)
    bias = jnp.zeros((*matrix.shape[:-2], matrix.shape[-1]), matrix.dtype) if bias is None else bias
    if config.norm_bias:
        bias = bias + jnp.einsum("...d,...do->...o", place[f"{norm}_bias"], matrix, precision=jax.lax.Precision.HIGHEST)
    matrix = gain[..., None] * matrix
    return (_centred(matrix, axis=-2) if config.norm == "layer" else matrix), bias


def _through_heads(bias: Float[Array, "L KH"], out: Float[Array, "L NH D"], config: ModelConfig) -> Float[Array, "L D"]:
    """What the values' bias adds to the residual stream: every query head of a group passes its key head's bias on."""
    group = (config.n_kv_heads, config.n_heads // config.n_kv_heads, config.head_dim)
    return jnp.einsum(
        "lkh,lkghd->ld",
        bias.reshape(-1, config.n_kv_heads, config.head_dim),
        out.reshape(-1, *group, out.shape[-1]),
        precision=jax.lax.Precision.HIGHEST,
    )


def _centred(x: Float[Array, "*n D"], axis: int = -1) -> Float[Array, "*n D"]:
    return x - x.mean(axis=axis, keepdims=True)


def _present(place: dict, config: ModelConfig) -> dict:
    """Without the biases that stayed zero because nothing had one, in a model that has no place for them."""
    has = {"q_bias": "qkv", "k_bias": "qkv", "v_bias": "qkv", "o_bias": "out", "head_bias": "head"}
    has |= dict.fromkeys(("gate_bias", "up_bias", "down_bias"), "mlp")
    return {name: value for name, value in place.items() if name not in has or getattr(config, f"{has[name]}_bias")}
