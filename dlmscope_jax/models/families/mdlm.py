"""MDLM (``kuleshov-group/mdlm-owt``), model type ``mdlm``: a bidirectional transformer with adaptive norms (DiT).

The network can hear how noisy its input is: a condition vector c = silu(MLP(sinusoids of sigma)) shifts and scales what each
norm gives and gates what attention and MLP add. The released models were trained with sigma = 0 always, so that c is one
constant vector; it is computed here as it is there, not folded into the weights. ``attn_in`` and ``mlp_in`` are what is left
after shift and scale; ``attn_raw`` and ``mlp_raw`` are outputs of the projections, ``attn_out`` and ``mlp_out`` the same gated.

Two facts stand in no file: the vocabulary is GPT-2's with the mask appended as the last token, and position i predicts token i.
The released weights are float32 and their code runs the products in bfloat16 while embedding, norms, modulation and residual
stream stay in float32; dtype ``"float32"`` is closest to it, ``"bfloat16"`` also rounds the residual stream.
"""

from collections.abc import Collection
from typing import Any

from ..config import DiffusionSpec, ModelConfig
from .reading import Fused, Keys, Tensor, checked, id_keys

IGNORED = ("rotary_emb.inv_freq",)
MLP_RATIO = 4
WITH_GPT2_TOKENS, END_OF_TEXT = 50258, 50256  # the released models' vocabulary, and its token between documents


def read(keys: Keys) -> tuple[ModelConfig, DiffusionSpec]:
    """Reads a ``config.json`` of model type ``mdlm``.

    Raises:
      UserError: for a model that is told the noise level, whose condition is not constant.
    """
    keys.expect("time_conditioning", False)
    for inert in ("dropout", "tie_word_embeddings"):  # the head has a matrix of its own whatever that key says
        keys.take(inert, default=None)
    d_model, n_heads, vocab = keys.size("hidden_dim"), keys.size("n_heads"), keys.size("vocab_size")
    end = END_OF_TEXT if vocab == WITH_GPT2_TOKENS else None
    ids = keys.ids()
    config = ModelConfig(
        family="mdlm",
        vocab_size=vocab,
        d_model=d_model,
        n_layers=keys.size("n_blocks"),
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=keys.head_dim(["hidden_dim"], ["n_heads"]),
        d_mlp=MLP_RATIO * d_model,
        norm_eps=1e-5,
        rope_theta=10000.0,
        max_positions=keys.size("model_length", default=1024),
        attention="bidirectional",
        bos_id=end if ids["bos_id"] is None else ids["bos_id"],
        eos_id=end if ids["eos_id"] is None else ids["eos_id"],
        pad_id=ids["pad_id"],
        norm="layer",
        gated=False,
        activation="gelu_tanh",
        mlp_bias=True,
        head_bias=True,
        cond_dim=keys.size("cond_dim"),
    )
    return checked(keys, config, DiffusionSpec(mask_id=keys.take("mask_token_id", default=vocab - 1, kind=int), shift=False))


def tensors(config: ModelConfig, names: Collection[str] = frozenset()) -> dict[tuple[str, ...], Tensor]:
    """Our paths -> tensor names; queries, keys and values share a tensor, one after the other."""
    block, out, sigma = "backbone.blocks.{layer}", "backbone.output_layer", "backbone.sigma_map.mlp"
    qkv = {("blocks", p): Tensor(f"{block}.attn_qkv.weight", True, Fused(i, 3, config.d_model)) for i, p in enumerate("qkv")}
    return qkv | {
        ("embed",): Tensor("backbone.vocab_embed.embedding"),
        ("sigma_in",): Tensor(f"{sigma}.0.weight", transposed=True),
        ("sigma_in_bias",): Tensor(f"{sigma}.0.bias"),
        ("sigma_out",): Tensor(f"{sigma}.2.weight", transposed=True),
        ("sigma_out_bias",): Tensor(f"{sigma}.2.bias"),
        ("blocks", "adaln"): Tensor(f"{block}.adaLN_modulation.weight", transposed=True),
        ("blocks", "adaln_bias"): Tensor(f"{block}.adaLN_modulation.bias"),
        ("blocks", "attn_norm"): Tensor(f"{block}.norm1.weight"),
        ("blocks", "o"): Tensor(f"{block}.attn_out.weight", transposed=True),
        ("blocks", "mlp_norm"): Tensor(f"{block}.norm2.weight"),
        ("blocks", "up"): Tensor(f"{block}.mlp.0.weight", transposed=True),
        ("blocks", "up_bias"): Tensor(f"{block}.mlp.0.bias"),
        ("blocks", "down"): Tensor(f"{block}.mlp.2.weight", transposed=True),
        ("blocks", "down_bias"): Tensor(f"{block}.mlp.2.bias"),
        ("final_norm",): Tensor(f"{out}.norm_final.weight"),
        ("final_adaln",): Tensor(f"{out}.adaLN_modulation.weight", transposed=True),
        ("final_adaln_bias",): Tensor(f"{out}.adaLN_modulation.bias"),
        ("head",): Tensor(f"{out}.linear.weight"),
        ("head_bias",): Tensor(f"{out}.linear.bias"),
    }


def write(config: ModelConfig, diffusion: DiffusionSpec | None) -> dict[str, Any]:
    """The ``config.json`` of such a model; it also says the mask token."""
    return {
        "architectures": ["MDLM"],
        "model_type": "mdlm",
        "vocab_size": config.vocab_size,
        "model_length": config.max_positions,
        "hidden_dim": config.d_model,
        "cond_dim": config.cond_dim,
        "n_blocks": config.n_layers,
        "n_heads": config.n_heads,
        "time_conditioning": False,
        "mask_token_id": diffusion.mask_id,
        **id_keys(config),
    }
