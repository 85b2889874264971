"""``config.json`` of published models as their hub folders spell it, what they mean, and how many parameters that is.

Sizes and ids are those of the model cards and the original classes; counts are the published ones where the hub shows them.
"""

import dataclasses
from typing import Any, NamedTuple

from dlmscope_jax.models import DiffusionSpec, ModelConfig, RopeScaling


class Published(NamedTuple):
    """One model: its file, what it says, and the number of its parameters."""

    keys: dict[str, Any]
    config: ModelConfig
    parameters: int
    diffusion: DiffusionSpec | None = None


def _llama_keys(model_type: str, d: int, layers: int, heads: int, kv: int, mlp: int, vocab: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": model_type, "hidden_size": d, "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv,
        "intermediate_size": mlp, "vocab_size": vocab, "hidden_act": "silu", "initializer_range": 0.02, "attention_dropout": 0.0,
        "torch_dtype": "bfloat16", "use_cache": True,
    } | more  # fmt: skip


def _llama(family: str, d: int, layers: int, heads: int, kv: int, mlp: int, vocab: int, **more: Any) -> ModelConfig:
    facts = {
        "vocab_size": vocab, "d_model": d, "n_layers": layers, "n_heads": heads, "n_kv_heads": kv, "head_dim": d // heads, "d_mlp": mlp,
        "norm_eps": 1e-6, "rope_theta": 1e6, "attention": "causal",
    }  # fmt: skip
    return ModelConfig(family=family, **(facts | more))


QWEN = {"rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "use_sliding_window": False}
QWEN2 = QWEN | {"architectures": ["Qwen2ForCausalLM"], "use_mrope": False, "transformers_version": "4.40.1"}
QWEN3 = QWEN | {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "head_dim": 128, "rope_scaling": None, "sliding_window": None,
    "bos_token_id": 151643, "eos_token_id": 151645, "max_position_embeddings": 40960, "transformers_version": "4.51.0",
}  # fmt: skip
DREAM = QWEN | {
    "architectures": ["DreamModel"], "auto_map": {"AutoModel": "modeling_dream.DreamModel"},
    "bos_token_id": 151643, "eos_token_id": 151643, "pad_token_id": 151643, "mask_token_id": 151666, "max_position_embeddings": 131072,
    "max_window_layers": 28, "rope_scaling": None, "sliding_window": None, "tie_word_embeddings": False, "use_mrope": False,
    "transformers_version": "4.46.2",
}  # fmt: skip
LLAMA3 = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "bos_token_id": 128000, "eos_token_id": 128001, "pretraining_tp": 1,
    "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
}  # fmt: skip
LLADA = {
    "model_type": "llada", "architectures": ["LLaDAModelLM"],
    "auto_map": {"AutoConfig": "configuration_llada.LLaDAConfig", "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM"},
    "activation_type": "silu", "alibi": False, "alibi_bias_max": 8.0, "attention_dropout": 0.0, "attention_layer_norm": False,
    "attention_layer_norm_with_affine": True, "bias_for_layer_norm": False, "block_group_size": 1, "block_type": "llama", "d_model": 4096,
    "embedding_dropout": 0.0, "embedding_size": 126464, "eos_token_id": 126081, "flash_attention": False, "include_bias": False,
    "include_qkv_bias": False, "init_cutoff_factor": None, "init_device": "meta", "init_fn": "mitchell", "init_std": 0.02,
    "input_emb_norm": False, "layer_norm_type": "rms", "layer_norm_with_affine": True, "mask_token_id": 126336, "max_sequence_length": 4096,
    "mlp_hidden_size": 12288, "mlp_ratio": 4, "multi_query_attention": None, "n_heads": 32, "n_kv_heads": 32, "n_layers": 32,
    "pad_token_id": 126081, "precision": "amp_bf16", "residual_dropout": 0.0, "rms_norm_eps": 1e-05, "rope": True,
    "rope_full_precision": True, "rope_theta": 500000.0, "scale_logits": False, "transformers_version": "4.46.3", "use_cache": False,
    "vocab_size": 126464, "weight_tying": False,
}  # fmt: skip
GEMMA2 = {
    "model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "attn_logit_softcapping": 50.0, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": 1, "final_logit_softcapping": 30.0,
    "head_dim": 256, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "initializer_range": 0.02,
    "max_position_embeddings": 8192, "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_theta": 10000.0,
    "sliding_window": 4096, "torch_dtype": "float32", "transformers_version": "4.42.4", "use_cache": True, "vocab_size": 256000,
}  # fmt: skip
GPT2 = {
    "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new", "attn_pdrop": 0.1, "bos_token_id": 50256,
    "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "n_ctx": 1024, "n_positions": 1024,
    "resid_pdrop": 0.1, "summary_activation": None, "summary_first_dropout": 0.1, "summary_proj_to_labels": True,
    "summary_type": "cls_index", "summary_use_proj": True, "vocab_size": 50257,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
}  # fmt: skip
NEOX = {
    "model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"], "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "gelu",
    "initializer_range": 0.02, "layer_norm_eps": 1e-05, "max_position_embeddings": 2048, "rotary_emb_base": 10000, "rotary_pct": 0.25,
    "tie_word_embeddings": False, "torch_dtype": "float16", "transformers_version": "4.24.0", "use_cache": True,
    "use_parallel_residual": True, "vocab_size": 50304,
}  # fmt: skip
MDLM = {
    "model_type": "mdlm", "architectures": ["MDLM"], "auto_map": {"AutoConfig": "configuration_mdlm.MDLMConfig"}, "cond_dim": 128,
    "dropout": 0.1, "hidden_dim": 768, "model_length": 1024, "n_blocks": 12, "n_heads": 12, "return_dict": False,
    "time_conditioning": False, "torch_dtype": "float32", "transformers_version": "4.38.2", "vocab_size": 50258,
}  # fmt: skip

_7B = (3584, 28, 28, 4, 18944, 152064)
_DREAM = {"max_positions": 131072, "attention": "bidirectional", "qkv_bias": True, "bos_id": 151643, "eos_id": 151643, "pad_id": 151643}
_LLAMA3 = {"norm_eps": 1e-5, "rope_theta": 5e5, "bos_id": 128000, "eos_id": 128001}
_STRETCH = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"}
_QWEN3 = {"head_dim": 128, "qk_norm": True, "max_positions": 40960, "bos_id": 151643, "eos_id": 151645}


def _qwen2(parameters: int, shape: tuple[int, ...], context: int, tied: bool, eos: int = 151643) -> Published:
    keys = _llama_keys("qwen2", *shape, **QWEN2, bos_token_id=151643, eos_token_id=eos, max_position_embeddings=context,
        tie_word_embeddings=tied, sliding_window=context, max_window_layers=shape[1])  # fmt: skip
    facts = {"max_positions": context, "qkv_bias": True, "tied_head": tied, "bos_id": 151643, "eos_id": eos}
    return Published(keys, _llama("qwen2", *shape, **facts), parameters)


def _a2d_qwen2() -> Published:
    base = _qwen2(494_032_768, (896, 24, 14, 2, 4864, 151936), 32768, True, eos=151645)
    keys = base.keys | {"model_type": "a2d-qwen2", "architectures": ["A2DQwen2LMHeadModel"], "layer_types": ["full_attention"] * 24}
    config = dataclasses.replace(base.config, family="a2d-qwen2", attention="bidirectional")
    return Published(keys, config, base.parameters, DiffusionSpec(151665, shift=False))


def _dream(changes: dict[str, int], facts: dict[str, int]) -> Published:
    keys = _llama_keys("Dream", *_7B, **(DREAM | changes))
    return Published(keys, _llama("dream", *_7B, **(_DREAM | facts)), 7_615_616_512, DiffusionSpec(151666, shift=True))


def _llama32(parameters: int, shape: tuple[int, ...], head_dim: int) -> Published:
    more = LLAMA3 | {"max_position_embeddings": 131072, "tie_word_embeddings": True, "mlp_bias": False, "head_dim": head_dim}
    keys = _llama_keys("llama", *shape, **more, rope_scaling=_STRETCH | {"factor": 32.0}, transformers_version="4.45.0.dev0")
    facts = _LLAMA3 | {"max_positions": 131072, "tied_head": True, "head_dim": head_dim, "rope_scaling": RopeScaling(32.0, 1.0, 4.0, 8192)}
    return Published(keys, _llama("llama", *shape, **facts), parameters)


def _gemma2(parameters: int, d: int, layers: int, heads: int, kv: int, mlp: int, head_dim: int = 256, scalar: int = 256) -> Published:
    sizes = {
        "hidden_size": d, "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv, "intermediate_size": mlp,
        "head_dim": head_dim, "query_pre_attn_scalar": scalar,
    }  # fmt: skip
    config = _llama(
        "gemma2", d, layers, heads, kv, mlp, 256000, head_dim=head_dim, rope_theta=10000.0, max_positions=8192, tied_head=True, bos_id=2,
        eos_id=1, pad_id=0, norm_offset=True, post_norms=True, activation="gelu_tanh", scaled_embedding=True, attention_scale=scalar**-0.5,
        attention_softcap=50.0, logit_softcap=30.0, window=4096, windowed=(True, False) * (layers // 2),
    )  # fmt: skip
    return Published(GEMMA2 | sizes, config, parameters)


def _gpt2(parameters: int, d: int, layers: int, heads: int, **more: Any) -> Published:
    config = ModelConfig(
        family="gpt2", vocab_size=50257, d_model=d, n_layers=layers, n_heads=heads, n_kv_heads=heads, head_dim=64, d_mlp=4 * d,
        norm_eps=1e-5, rope_theta=10000.0, max_positions=1024, attention="causal", qkv_bias=True, tied_head=True, bos_id=50256,
        eos_id=50256, norm="layer", norm_bias=True, positions="learned", gated=False, activation="gelu_tanh", out_bias=True, mlp_bias=True,
    )  # fmt: skip
    return Published(GPT2 | {"n_embd": d, "n_layer": layers, "n_head": heads} | more, config, parameters)


def _pythia(parameters: int, d: int, layers: int, heads: int, vocab: int = 50304) -> Published:
    keys = {"hidden_size": d, "intermediate_size": 4 * d, "num_hidden_layers": layers, "num_attention_heads": heads, "vocab_size": vocab}
    config = ModelConfig(
        family="gpt_neox", vocab_size=vocab, d_model=d, n_layers=layers, n_heads=heads, n_kv_heads=heads, head_dim=d // heads, d_mlp=4 * d,
        norm_eps=1e-5, rope_theta=10000.0, max_positions=2048, attention="causal", qkv_bias=True, bos_id=0, eos_id=0, norm="layer",
        norm_bias=True, rotary_dim=d // heads // 4, parallel=True, gated=False, activation="gelu", out_bias=True, mlp_bias=True,
    )  # fmt: skip
    return Published(NEOX | keys, config, parameters)


def _llada() -> Published:
    config = _llama(
        "llada", 4096, 32, 32, 32, 12288, 126464, norm_eps=1e-5, rope_theta=5e5, max_positions=4096, attention="bidirectional",
        rope_float32=True, eos_id=126081, pad_id=126081,
    )  # fmt: skip
    return Published(LLADA, config, 8_015_581_184, DiffusionSpec(126336, shift=False))


def _illada() -> Published:
    shape = (4096, 32, 32, 8, 14336, 155136)
    keys = _llama_keys(
        "illada", *shape, architectures=["ILLaDAForCausalLM"], attention_bias=False, mlp_bias=False, layer_norm_eps=None, resid_pdrop=0.0,
        rms_norm_eps=1e-5, rope_theta=500000.0, rope_scaling=None, max_position_embeddings=8192, tie_word_embeddings=True, bos_token_id=0,
        pad_token_id=1, eos_token_id=2,
    )  # fmt: skip
    facts = {"norm_eps": 1e-5, "rope_theta": 5e5, "max_positions": 8192, "attention": "bidirectional", "tied_head": True}
    config = _llama("illada", *shape, **facts, bos_id=0, eos_id=2, pad_id=1)
    return Published(keys, config, 7_615_025_152, DiffusionSpec(5, shift=False))


def _qwen3_like(name: str, parameters: int, shape: tuple[int, ...], tied: bool, keys: dict, facts: dict, spec: Any = None) -> Published:
    keys = _llama_keys(name, *shape, **(QWEN3 | {"tie_word_embeddings": tied, "max_window_layers": shape[1]} | keys))
    return Published(keys, _llama(name, *shape, **(_QWEN3 | {"tied_head": tied} | facts)), parameters, spec)


def _fast_dllm(parameters: int, shape: tuple[int, ...], tied: bool) -> Published:
    keys = _llama_keys(
        "Fast_dLLM_Qwen", *shape, **QWEN, architectures=["Fast_dLLM_QwenForCausalLM"], bd_size=32, bos_token_id=151643, eos_token_id=151645,
        pad_token_id=151645, layer_types=["full_attention"] * shape[1], max_position_embeddings=32768, max_window_layers=shape[1],
        rope_scaling=None, sliding_window=None, tie_word_embeddings=tied, transformers_version="4.53.1",
    )  # fmt: skip
    facts = {"max_positions": 32768, "qkv_bias": True, "tied_head": tied, "attention": "block_causal", "block_length": 32}
    config = _llama("fast_dllm_qwen", *shape, **facts, bos_id=151643, eos_id=151645, pad_id=151645)
    return Published(keys, config, parameters, DiffusionSpec(151665, shift=True))


def _mdlm() -> Published:
    config = ModelConfig(
        family="mdlm", vocab_size=50258, d_model=768, n_layers=12, n_heads=12, n_kv_heads=12, head_dim=64, d_mlp=3072, norm_eps=1e-5,
        rope_theta=10000.0, max_positions=1024, attention="bidirectional", bos_id=50256, eos_id=50256, norm="layer", gated=False,
        activation="gelu_tanh", mlp_bias=True, head_bias=True, cond_dim=128,
    )  # fmt: skip
    return Published(MDLM, config, 169_627_218, DiffusionSpec(50257, shift=False))


_8B = (4096, 32, 32, 8, 14336, 128256)
_QWEN3_SMALL, _QWEN3_4B = (1024, 28, 16, 8, 3072, 151936), (2560, 36, 32, 8, 9728, 151936)
_SDAR = {"architectures": ["SDARForCausalLM"], "block_size": 4, "mask_token_id": 151669, "fuse_cross_entropy": True, "pad_token_id": 151643}

PUBLISHED = {
    "Dream-v0-Base-7B": _dream({}, {}),
    "Dream-Coder-v0-Instruct-7B": _dream({"bos_token_id": 151665}, {"bos_id": 151665}),
    "DiffuCoder-7B-Base": _dream({"pad_token_id": 151667}, {"pad_id": 151667}),
    "LLaDA-8B-Instruct": _llada(),
    "iLLaDA-8B-Base": _illada(),
    "mdlm-owt": _mdlm(),
    "SDAR-4B-Chat": _qwen3_like(
        "sdar", 4_411_424_256, _QWEN3_4B, False, _SDAR | {"max_position_embeddings": 32768},
        {"max_positions": 32768, "pad_id": 151643, "attention": "block_causal", "block_length": 4}, DiffusionSpec(151669, shift=False),
    ),
    "Fast_dLLM_v2_1.5B": _fast_dllm(1_543_714_304, (1536, 28, 12, 2, 8960, 151936), True),
    "Fast_dLLM_v2_7B": _fast_dllm(7_615_616_512, _7B, False),
    "Qwen3-0.6B-diffusion-mdlm-v0.1": _qwen3_like(
        "a2d-qwen3", 596_049_920, _QWEN3_SMALL, True, {"architectures": ["A2DQwen3LMHeadModel"]}, {"attention": "bidirectional"},
        DiffusionSpec(151669, shift=False),
    ),
    "Qwen2.5-Coder-0.5B-Instruct-diffusion-mdlm-v0.1": _a2d_qwen2(),
    "Qwen3-0.6B": _qwen3_like("qwen3", 596_049_920, _QWEN3_SMALL, True, {}, {}),
    "Qwen3-4B": _qwen3_like("qwen3", 4_022_468_096, _QWEN3_4B, True, {}, {}),
    "Qwen3-8B": _qwen3_like("qwen3", 8_190_735_360, (4096, 36, 32, 8, 12288, 151936), False, {}, {}),
    "Qwen2.5-0.5B": _qwen2(494_032_768, (896, 24, 14, 2, 4864, 151936), 32768, True),
    "Qwen2.5-1.5B": _qwen2(1_543_714_304, (1536, 28, 12, 2, 8960, 151936), 131072, True),
    "Qwen2.5-3B": _qwen2(3_085_938_688, (2048, 36, 16, 2, 11008, 151936), 32768, True),
    "Qwen2.5-7B": _qwen2(7_615_616_512, _7B, 131072, False),
    "Qwen2.5-7B-Instruct": _qwen2(7_615_616_512, _7B, 32768, False, eos=151645),
    "Meta-Llama-3-8B": Published(
        _llama_keys("llama", *_8B, **LLAMA3, max_position_embeddings=8192, rope_scaling=None, tie_word_embeddings=False),
        _llama("llama", *_8B, **_LLAMA3, max_positions=8192), 8_030_261_248,
    ),
    "Llama-3.1-8B": Published(
        _llama_keys("llama", *_8B, **LLAMA3, max_position_embeddings=131072, mlp_bias=False, tie_word_embeddings=False,
            rope_scaling=_STRETCH | {"factor": 8.0}),
        _llama("llama", *_8B, **_LLAMA3, max_positions=131072, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192)), 8_030_261_248,
    ),
    "Llama-3.2-1B": _llama32(1_235_814_400, (2048, 16, 32, 8, 8192, 128256), 64),
    "Llama-3.2-3B": _llama32(3_212_749_824, (3072, 28, 24, 8, 8192, 128256), 128),
    "gemma-2-2b": _gemma2(2_614_341_888, 2304, 26, 8, 4, 9216),
    "gemma-2-9b": _gemma2(9_241_705_984, 3584, 42, 16, 8, 14336),
    "gemma-2-27b": _gemma2(27_227_128_320, 4608, 46, 32, 16, 36864, head_dim=128, scalar=144),
    "gpt2": _gpt2(124_439_808, 768, 12, 12),
    "gpt2-medium": _gpt2(354_823_168, 1024, 24, 16, n_special=0, predict_special_tokens=True),
    "gpt2-large": _gpt2(774_030_080, 1280, 36, 20),
    "gpt2-xl": _gpt2(1_557_611_200, 1600, 48, 25, output_past=True),
    "pythia-70m": _pythia(70_426_624, 512, 6, 8),
    "pythia-160m": _pythia(162_322_944, 768, 12, 12),
    "pythia-410m": _pythia(405_334_016, 1024, 24, 16),
    "pythia-1b": _pythia(1_011_781_632, 2048, 16, 8),
    "pythia-1.4b": _pythia(1_414_647_808, 2048, 24, 16),
    "pythia-2.8b": _pythia(2_775_208_960, 2560, 32, 32),
    "pythia-6.9b": _pythia(6_857_302_016, 4096, 32, 32, vocab=50432),
    "pythia-12b": _pythia(11_846_072_320, 5120, 36, 40, vocab=50688),
}  # fmt: skip
