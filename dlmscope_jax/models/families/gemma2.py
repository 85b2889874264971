"""Gemma-2, model type ``gemma2``: four norms a layer, soft-capped scores and logits, a window in every other layer.

Norms multiply by ``1 + weight``. Two of a layer's four norm what attention and MLP give before it is added: ``attn_out`` and
``mlp_out`` are normed, ``attn_raw`` and ``mlp_raw`` are not. The embedding, which is also the head, is read times ``sqrt(D)``,
a factor rounded to the compute dtype.
"""

from collections.abc import Collection
from typing import Any

from dlmscope_jax.errors import UserError

from ..config import DiffusionSpec, ModelConfig
from .llama import write_llama_like
from .reading import Keys, Tensor, block_tensors, checked

_LAYERS = {"sliding_attention": True, "full_attention": False}


def read(keys: Keys) -> tuple[ModelConfig, None]:
    """Reads a ``config.json`` of model type ``gemma2``; a missing key means what the published class takes for it.

    Raises:
      UserError: for a switch or a kind of layer that this network does not have.
    """
    keys.expect("hidden_activation", "gelu_pytorch_tanh")
    keys.take("hidden_act", default=None)  # stands in older files too and is not asked
    keys.take("cache_implementation", default=None)
    keys.expect("attention_bias", False)
    keys.expect("use_bidirectional_attention", False)
    theta, scaling = keys.rope(10000.0)
    n_layers, n_heads = keys.size("num_hidden_layers"), keys.size("num_attention_heads")
    window, windowed = _windows(keys, n_layers)
    config = ModelConfig(
        family="gemma2",
        vocab_size=keys.size("vocab_size"),
        d_model=keys.size("hidden_size"),
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=keys.size("num_key_value_heads", default=4),
        head_dim=keys.size("head_dim", default=256),
        d_mlp=keys.size("intermediate_size"),
        norm_eps=keys.take("rms_norm_eps", default=1e-6, kind=float),
        rope_theta=theta,
        rope_scaling=scaling,
        max_positions=keys.size("max_position_embeddings", default=8192),
        attention="causal",
        tied_head=keys.take("tie_word_embeddings", default=True, kind=bool),
        **keys.ids(),
        norm_offset=True,
        post_norms=True,
        activation="gelu_tanh",
        scaled_embedding=True,
        attention_scale=keys.size("query_pre_attn_scalar", default=256, kind=float) ** -0.5,
        attention_softcap=_or_none(keys, "attn_logit_softcapping", 50.0, float),
        logit_softcap=_or_none(keys, "final_logit_softcapping", 30.0, float),
        window=window,
        windowed=windowed,
    )
    return checked(keys, config, None)


def _or_none(keys: Keys, name: str, default: Any, kind: type) -> Any:
    """A key that ``null`` switches off, and that has a default where it is missing."""
    return keys.size(name, default=None if name in keys.mapping else default, kind=kind)


def _windows(keys: Keys, n_layers: int) -> tuple[int | None, tuple[bool, ...]]:
    """The window and the layers that have it: the even ones where ``layer_types`` does not say."""
    window = _or_none(keys, "sliding_window", 4096, int)
    alternating = ["full_attention" if i % 2 else "sliding_attention" for i in range(n_layers)]
    types = keys.take("layer_types", default=alternating, kind=list)
    if unknown := sorted({str(t) for t in types} - set(_LAYERS)):
        raise UserError(f"{keys.where}: layer_types holds {', '.join(map(repr, unknown))}; supported: {', '.join(map(repr, _LAYERS))}")
    if len(types) != n_layers:
        raise UserError(f"{keys.where}: layer_types has {len(types)} entries for {n_layers} layers")
    windowed = tuple(_LAYERS[t] for t in types)
    return (window, windowed) if window is not None and any(windowed) else (None, ())


def tensors(config: ModelConfig, names: Collection[str] = frozenset()) -> dict[tuple[str, ...], Tensor]:
    """Our paths -> tensor names; ``post_attention_layernorm`` norms the attention's output, unlike Llama's of that name."""
    block = {
        "attn_norm": "input_layernorm.weight",
        "q": "self_attn.q_proj.weight",
        "k": "self_attn.k_proj.weight",
        "v": "self_attn.v_proj.weight",
        "o": "self_attn.o_proj.weight",
        "attn_post_norm": "post_attention_layernorm.weight",
        "mlp_norm": "pre_feedforward_layernorm.weight",
        "gate": "mlp.gate_proj.weight",
        "up": "mlp.up_proj.weight",
        "down": "mlp.down_proj.weight",
        "mlp_post_norm": "post_feedforward_layernorm.weight",
    }
    table = block_tensors("model.layers.{layer}", block)
    table |= {("embed",): Tensor("model.embed_tokens.weight"), ("final_norm",): Tensor("model.norm.weight")}
    return table if config.tied_head else table | {("head",): Tensor("lm_head.weight")}


def write(config: ModelConfig, diffusion: DiffusionSpec | None) -> dict[str, Any]:
    """The ``config.json`` of such a model."""
    names = {windowed: name for name, windowed in _LAYERS.items()}
    windowed = config.windowed or (False,) * config.n_layers
    scalar = round((config.attention_scale or config.head_dim**-0.5) ** -2, 6)
    return write_llama_like(config) | {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "attention_bias": False,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": int(scalar) if scalar.is_integer() else scalar,
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.logit_softcap,
        "sliding_window": config.window,
        "layer_types": [names[w] for w in windowed],
    }
