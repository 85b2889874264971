"""Every published ``config.json`` is read to the same network, as the hub spells it and as transformers 5 rewrites it."""

import copy
import dataclasses
import json
import math

import jax
import pytest
from published_configs import PUBLISHED

from dlmscope_jax.errors import UserError
from dlmscope_jax.models import Transformer, init_params, read_model
from dlmscope_jax.models.families import family_of

IN_TRANSFORMERS = ("llama", "qwen2", "qwen3", "gemma2", "gpt2", "gpt_neox")
REWRITTEN = [name for name, model in PUBLISHED.items() if model.keys["model_type"] in IN_TRANSFORMERS]


def read(folder, keys):
    (folder / "config.json").write_text(json.dumps(keys))
    model = read_model(folder)
    return model.config, model.diffusion


@pytest.mark.parametrize("name", PUBLISHED)
def test_hub_spelling(name, tmp_path):
    model = PUBLISHED[name]
    assert read(tmp_path, model.keys) == (model.config, model.diffusion)


@pytest.mark.parametrize("name", PUBLISHED)
def test_number_of_parameters(name):
    model = PUBLISHED[name]
    shapes = jax.eval_shape(lambda: init_params(Transformer(model.config, model.diffusion), jax.random.key(0)))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == model.parameters


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_parameter_has_a_tensor(name):
    model = PUBLISHED[name]
    shapes = jax.eval_shape(lambda: init_params(Transformer(model.config, model.diffusion), jax.random.key(0)))["params"]
    paths = {tuple(p.key for p in path) for path, _ in jax.tree.leaves_with_path(shapes)}
    assert paths == set(family_of(model.config.family, name).tensors(model.config))


@pytest.mark.parametrize("name", REWRITTEN)
def test_transformers_spelling(name, tmp_path):
    """Nested ``rope_parameters``, ``dtype``, ``layer_types`` and a hundred defaults: in full, and as it saves them."""
    from transformers import AutoConfig

    model = PUBLISHED[name]
    kind = model.keys["model_type"]
    rewritten = AutoConfig.for_model(kind, **{k: v for k, v in copy.deepcopy(model.keys).items() if k != "model_type"})
    assert read(tmp_path, rewritten.to_dict())[0] == model.config
    rewritten.save_pretrained(tmp_path)
    assert "rope_theta" not in json.loads((tmp_path / "config.json").read_text())
    assert read_model(tmp_path).config == model.config


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_written_is_read_back(name, tmp_path):
    model = PUBLISHED[name]
    written = family_of(model.config.family, name).write(model.config, model.diffusion)
    assert written["model_type"] == model.keys["model_type"]
    assert read(tmp_path, written) == (model.config, model.diffusion)


@pytest.mark.parametrize("name", ["SDAR-4B-Chat", "Fast_dLLM_v2_7B", "Qwen3-0.6B-diffusion-mdlm-v0.1", "iLLaDA-8B-Base", "mdlm-owt"])
def test_what_files_may_leave_out_is_written(name, tmp_path):
    """Block lengths and mask tokens other than the released models'."""
    model = PUBLISHED[name]
    blocks = None if model.config.block_length is None else 16
    config, diffusion = dataclasses.replace(model.config, block_length=blocks), dataclasses.replace(model.diffusion, mask_id=77)
    assert read(tmp_path, family_of(config.family, name).write(config, diffusion)) == (config, diffusion)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_key_that_nobody_knows_is_refused(name, tmp_path):
    with pytest.raises(UserError, match="attention_sinks"):
        read(tmp_path, PUBLISHED[name].keys | {"attention_sinks": 4})


@pytest.mark.parametrize(
    ("name", "changes", "word"),
    [
        ("gemma-2-2b", {"hidden_activation": "gelu"}, "hidden_activation is 'gelu'"),
        ("gemma-2-2b", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma-2-2b", {"layer_types": ["full_attention"] * 25}, "25 entries for 26 layers"),
        ("gemma-2-2b", {"layer_types": ["chunked_attention"] * 26}, "'chunked_attention'"),
        ("Qwen3-0.6B", {"attention_bias": True}, "attention_bias is True"),
        ("Qwen3-0.6B", {"use_sliding_window": True}, "use_sliding_window is True"),
        ("Qwen3-0.6B", {"layer_types": ["sliding_attention"] * 28}, "'sliding_attention'"),
        ("SDAR-4B-Chat", {"block_size": 0}, "block_size is 0"),
        ("Fast_dLLM_v2_7B", {"layer_types": ["sliding_attention"] * 28}, "'sliding_attention'"),
        ("Fast_dLLM_v2_7B", {"bd_size": "32"}, "bd_size is '32'"),
        ("mdlm-owt", {"time_conditioning": True}, "time_conditioning is True"),
        ("mdlm-owt", {"cond_dim": None}, "'cond_dim' is missing"),
        ("mdlm-owt", {"n_heads": 7}, "not divisible by n_heads 7"),
        ("iLLaDA-8B-Base", {"layer_norm_eps": 1e-5}, "layer_norm_eps"),
        ("iLLaDA-8B-Base", {"rope_theta": None}, "'rope_theta' is missing"),
        ("Dream-v0-Base-7B", {"mask_token_id": None}, "'mask_token_id' is missing"),
        ("Dream-v0-Base-7B", {"use_mrope": True}, "use_mrope"),
        ("Meta-Llama-3-8B", {"layer_types": ["sliding_attention"] * 32}, "'sliding_attention'"),
        ("Meta-Llama-3-8B", {"pruned_heads": {"0": [1]}}, "pruned_heads is {'0': \\[1\\]}"),
        ("gpt2", {"pruned_heads": {"0": [1]}}, "pruned_heads"),
        ("gpt2", {"layer_types": ["sliding_attention"] * 12}, "layer_types"),
        ("Meta-Llama-3-8B", {"num_key_value_heads": 5}, "32 query heads cannot share 5 key and value heads evenly"),
        ("Meta-Llama-3-8B", {"num_attention_heads": 24}, "hidden_size 4096 is not divisible by num_attention_heads 24"),
        ("Qwen3-0.6B", {"head_dim": 127}, "127 of the 127 dims"),
        ("gemma-2-2b", {"num_key_value_heads": 3}, "8 query heads cannot share 3"),
        ("gemma-2-2b", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0, which is not positive"),
        ("gemma-2-2b", {"query_pre_attn_scalar": -256}, "query_pre_attn_scalar is -256"),
        ("gemma-2-2b", {"attn_logit_softcapping": 0.0}, "attn_logit_softcapping is 0.0, which is not positive"),
        ("LLaDA-8B-Instruct", {"n_kv_heads": 5}, "32 query heads cannot share 5"),
        ("LLaDA-8B-Instruct", {"n_heads": 30}, "d_model 4096 is not divisible by n_heads 30"),
        ("iLLaDA-8B-Base", {"head_dim": 64}, "head_dim is 64; supported: 128"),
        ("Qwen3-0.6B", {"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
    ],
)
def test_another_network_is_refused(name, changes, word, tmp_path):
    with pytest.raises(UserError, match=word) as caught:
        read(tmp_path, PUBLISHED[name].keys | changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [name for name, model in PUBLISHED.items() if model.diffusion])
def test_the_mask_is_one_of_the_tokens(name, tmp_path):
    """In every family; the last token will do."""
    model = PUBLISHED[name]
    vocab = model.config.vocab_size
    for mask in (-1, vocab):
        with pytest.raises(UserError, match=f"mask_token_id {mask} is not one of the tokens 0 to {vocab - 1}$"):
            read(tmp_path, model.keys | {"mask_token_id": mask})
    assert read(tmp_path, model.keys | {"mask_token_id": vocab - 1})[1].mask_id == vocab - 1


STRETCH = PUBLISHED["Llama-3.1-8B"].keys["rope_scaling"]


@pytest.mark.parametrize(
    ("name", "rope", "words"),
    [
        ("Qwen3-0.6B", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters: partial_rotary_factor is 0.5; supported"),
        ("Qwen3-0.6B", {"rope_parameters": {"rope_type": "default", "factor": 2.0}}, "rope_parameters: unknown keys factor"),
        ("gemma-2-2b", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_parameters: unknown keys full_attention"),
        ("Llama-3.1-8B", {"rope_scaling": {"factor": 4}}, "rope_scaling: unknown keys factor"),
        ("Llama-3.1-8B", {"rope_scaling": STRETCH | {"attention_factor": 2.0, "foo": 1}}, "unknown keys attention_factor, foo"),
        ("Llama-3.1-8B", {"rope_scaling": STRETCH | {"prefix": 1}}, "unknown keys prefix"),  # inert elsewhere
        ("Llama-3.1-8B", {"rope_scaling": STRETCH | {"factor": 0.0}}, "rope_scaling: factor is 0.0, which is not positive"),
        ("Llama-3.1-8B", {"rope_parameters": {"rope_theta": 1e4}}, "rope_parameters is .*, but rope_scaling is .*"),
        ("Qwen3-0.6B", {"rope_parameters": {"rope_theta": 1e4}}, "rope_theta is 1000000.0, but rope_theta is 10000.0"),
        ("pythia-70m", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "rotary_pct is 0.25, but partial_rotary_factor is 0.5"),
        ("pythia-70m", {"rope_parameters": {"foo": 0.5}}, "rope_parameters: unknown keys foo"),
        ("pythia-70m", {"rotary_pct": 0.21}, "13 of the 64 dims of a head"),
        ("pythia-70m", {"rotary_pct": 2.0}, "128 of the 64 dims of a head"),
        ("pythia-70m", {"rotary_pct": 0.01}, "0 of the 64 dims of a head"),
    ],
)
def test_another_rotation_is_refused(name, rope, words, tmp_path):
    with pytest.raises(UserError, match=words):
        read(tmp_path, PUBLISHED[name].keys | rope)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("Qwen3-0.6B", {"rope_theta": None, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default", "partial_rotary_factor": 1.0}}),
        ("Llama-3.1-8B", {"rope_scaling": None, "rope_parameters": STRETCH | {"rope_theta": 5e5}, "rope_theta": None}),
        ("Llama-3.1-8B", {"rope_scaling": STRETCH | {"type": "llama3"}}),  # transformers 5 writes both
        ("pythia-70m", {"rotary_pct": None, "rope_parameters": {"partial_rotary_factor": 0.25}}),
        ("pythia-70m", {"partial_rotary_factor": 0.25}),  # versions between wrote both
        ("gpt2", {"pruned_heads": {}}),
        ("Meta-Llama-3-8B", {"layer_types": ["full_attention"] * 32}),
        ("iLLaDA-8B-Base", {"head_dim": 128}),
        ("Qwen3-0.6B", {"eos_token_id": [151645, 151643]}),
    ],
)
def test_the_same_network_in_other_words(name, changes, tmp_path):
    assert read(tmp_path, PUBLISHED[name].keys | changes)[0] == PUBLISHED[name].config


@pytest.mark.parametrize("key", ["activation_type", "block_type", "layer_norm_type", "rope", "weight_tying"])
def test_llada_says_what_its_class_would_take_otherwise(key, tmp_path):
    """The defaults of the original class are another network's: layer norms, a tied head, no positions."""
    with pytest.raises(UserError, match=f"key '{key}' is missing"):
        read(tmp_path, {k: v for k, v in PUBLISHED["LLaDA-8B-Instruct"].keys.items() if k != key})


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("gemma-2-2b", ("attn_logit_softcapping", "final_logit_softcapping", "sliding_window", "head_dim", "query_pre_attn_scalar")),
        ("Qwen3-8B", ("head_dim", "tie_word_embeddings", "rms_norm_eps")),
        ("SDAR-4B-Chat", ("block_size", "mask_token_id", "head_dim")),
        ("Fast_dLLM_v2_7B", ("bd_size", "layer_types")),
    ],
)
def test_missing_keys_mean_the_published_default(name, missing, tmp_path):
    model = PUBLISHED[name]
    keys = {k: v for k, v in model.keys.items() if k not in missing}
    assert read(tmp_path, keys) == (model.config, model.diffusion)


def test_null_switches_a_soft_cap_or_a_window_off(tmp_path):
    nothing = {"attn_logit_softcapping": None, "final_logit_softcapping": None, "sliding_window": None}
    config, _ = read(tmp_path, PUBLISHED["gemma-2-2b"].keys | nothing)
    assert (config.attention_softcap, config.logit_softcap, config.window, config.windowed) == (None, None, None, ())


def test_layer_types_say_which_layers_have_the_window(tmp_path):
    types = ["full_attention"] * 20 + ["sliding_attention"] * 6
    config, _ = read(tmp_path, PUBLISHED["gemma-2-2b"].keys | {"layer_types": types})
    assert config.windowed == (False,) * 20 + (True,) * 6
