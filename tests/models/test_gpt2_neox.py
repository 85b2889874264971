"""GPT-2, DiffuGPT and GPT-NeoX: mask tokens that stand in no file, both names of a head, switches that are refused."""

import dataclasses
import json

import pytest
from published_configs import PUBLISHED
from tiny import TINY

from dlmscope_jax.errors import UserError
from dlmscope_jax.models import DiffusionSpec, read_model
from dlmscope_jax.models.families import family_of

SMALL = PUBLISHED["gpt2"].keys | {"architectures": ["DiscreteDiffusionModel"]}
MEDIUM = PUBLISHED["gpt2-medium"].keys | {"architectures": ["DiscreteDiffusionModel"]}


def read(folder, keys):
    (folder / "config.json").write_text(json.dumps(keys))
    model = read_model(folder)
    return model.config, model.diffusion


@pytest.mark.parametrize(
    ("keys", "vocab", "mask"),
    [
        (SMALL, 50257, 10541),  # a word of GPT-2's own
        (MEDIUM | {"vocab_size": 50258}, 50258, 50257),  # a token more
        (MEDIUM, 50258, 50257),  # the same, where the config still has GPT-2's number
        (SMALL | {"n_embd": 1536, "mask_token_id": 50260}, 50261, 50260),
    ],
)
def test_diffugpt(keys, vocab, mask, tmp_path):
    gpt2 = read(tmp_path, {k: v for k, v in keys.items() if k not in ("mask_token_id", "architectures")})
    assert gpt2[1] is None
    wanted = dataclasses.replace(gpt2[0], family="diffugpt", attention="bidirectional", vocab_size=vocab)
    found = read(tmp_path, keys)
    assert found == (wanted, DiffusionSpec(mask, shift=True))
    assert read(tmp_path, family_of("diffugpt", "").write(*found)) == found


def test_another_diffugpt_must_say_its_mask_token(tmp_path):
    with pytest.raises(UserError, match="'mask_token_id' is missing: n_embd 1280 is not that of a released DiffuGPT"):
        read(tmp_path, SMALL | {"n_embd": 1280, "n_head": 20})


def test_the_mask_of_a_diffugpt_is_a_token(tmp_path):
    with pytest.raises(UserError, match="mask_token_id -1 is not one of the tokens 0 to 50256$"):
        read(tmp_path, SMALL | {"mask_token_id": -1})


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention is True"),
        ("gpt2", {"activation_function": "relu"}, "activation_function is 'relu'; supported: 'gelu_new'"),
        ("gpt2", {"n_head": 7}, "n_embd 768 is not divisible by n_head 7"),
        ("gpt2", {"n_layer": None}, "'n_layer' is missing"),
        ("pythia-70m", {"hidden_act": "silu"}, "hidden_act is 'silu'"),
        ("pythia-70m", {"num_attention_heads": 7}, "hidden_size 512 is not divisible by num_attention_heads 7"),
        ("pythia-70m", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear'"),
        (
            "pythia-70m",
            {"rope_scaling": {"type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                              "original_max_position_embeddings": 16}},
            "rotary scaling is not supported",
        ),
        ("pythia-70m", {"use_parallel_residual": "yes"}, "use_parallel_residual is 'yes'"),
    ],
)  # fmt: skip
def test_another_network_is_refused(name, changes, words, tmp_path):
    with pytest.raises(UserError, match=words):
        read(tmp_path, PUBLISHED[name].keys | changes)


def test_what_a_missing_key_means(tmp_path):
    pythia = {k: v for k, v in PUBLISHED["pythia-70m"].keys.items() if not k.startswith("rotary_") and k != "use_parallel_residual"}
    config, _ = read(tmp_path, pythia)
    assert (config.rotary_dim, config.rope_theta, config.parallel) == (16, 10000.0, True)
    config, _ = read(tmp_path, {k: v for k, v in PUBLISHED["gpt2"].keys.items() if k not in ("activation_function", "n_positions")})
    assert (config.activation, config.max_positions, config.d_mlp) == ("gelu_tanh", 1024, 3072)
    assert read(tmp_path, PUBLISHED["gpt2"].keys | {"n_inner": 100})[0].d_mlp == 100


def test_names_of_tensors():
    config, _ = TINY["gpt2"]
    gpt2, neox = family_of("gpt2", ""), family_of("gpt_neox", "")
    assert gpt2.tensors(config)["blocks", "q"].name == "h.{layer}.attn.c_attn.weight"
    assert gpt2.tensors(config, {"transformer.wte.weight"})["blocks", "q"].name == "transformer.h.{layer}.attn.c_attn.weight"
    config, _ = TINY["gpt_neox"]
    assert neox.tensors(config)[("head",)].name == "embed_out.weight"
    assert neox.tensors(config, {"lm_head.weight"})[("head",)].name == "lm_head.weight"
