"""Folded weights: the same probabilities, and the activations that TransformerLens would show."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import NETWORKS, random_network

from dlmscope_jax.errors import UserError
from dlmscope_jax.models import process_weights, save_model, sites_of
from dlmscope_jax.models.sharding import AXES

FOLDED = [name for name in NETWORKS if name != "mdlm"]
LAYERED = ["gpt2", "neox"]
DEFAULT = (*LAYERED, "gemma2")  # biases, parallel residual, norms after; the others are made of the same parts
MARKED = [name if name in DEFAULT else pytest.param(name, marks=pytest.mark.slow) for name in FOLDED]
TOKENS = jax.random.randint(jax.random.key(7), (2, 9), 4, 97)
close = functools.partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-5)


@functools.cache
def pair_of(name):
    """The raw model and the folded one, each with its parameters, logits and all taps."""
    found = []
    raw = random_network(NETWORKS[name])
    for model, params in (raw, process_weights(*raw)):
        collect = tuple(f"{s}@{i}" for s in sites_of(model.config) for i in range(3)) + ("final_norm",)
        out = jax.jit(lambda p, model=model, collect=collect: model.apply(p, TOKENS, collect=collect))(params)
        found.append((model, params, out.logits, {name: {i: np.asarray(x) for i, x in at.items()} for name, at in out.taps.items()}))
    return found


def centred(x, axis=-1):
    return x - x.mean(axis=axis, keepdims=True)


@pytest.mark.some(2)
@pytest.mark.parametrize("name", MARKED)
def test_probabilities_stay_and_logits_are_centred(name):
    (raw, _, logits, _), (model, _, folded, _) = pair_of(name)
    assert (raw.config.weight_processing, model.config.weight_processing) == ("raw", "folded")
    close(jax.nn.log_softmax(folded), jax.nn.log_softmax(logits))
    if raw.config.logit_softcap is None:
        close(folded, centred(logits))
        assert np.abs(np.mean(logits, -1)).max() > 1e-2
    else:  # capped logits are no longer free up to a constant
        close(folded, logits)


@pytest.mark.parametrize("name", FOLDED)
def test_patterns_stay(name):
    (_, _, _, raw), (_, _, _, folded) = pair_of(name)
    for layer in range(3):
        close(folded["attn_pattern"][layer], raw["attn_pattern"][layer])


@pytest.mark.parametrize("name", LAYERED)
def test_the_stream_loses_its_mean(name):
    (raw_model, _, _, raw), (_, _, _, folded) = pair_of(name)
    for layer in range(3):
        for site in ("resid_pre", "attn_out", "mlp_out", "resid_post") + (() if raw_model.config.parallel else ("resid_mid",)):
            close(folded[site][layer], centred(raw[site][layer]))
            assert np.abs(raw[site][layer].mean(-1)).max() > 1e-2
        close(folded["mlp_act"][layer], raw["mlp_act"][layer])


@pytest.mark.parametrize("name", FOLDED)
def test_what_norms_give_is_normed_and_nothing_more(name):
    """``blocks.L.ln1.hook_normalized`` and ``blocks.L.ln2.hook_normalized`` from the raw model's residual stream."""
    (raw_model, _, _, raw), (_, _, _, folded) = pair_of(name)
    config = raw_model.config

    def normed(x):
        x = centred(x) if config.norm == "layer" else x
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps)

    for layer in range(3):
        close(folded["attn_in"][layer], normed(raw["resid_pre"][layer]))
        close(folded["mlp_in"][layer], normed(raw["resid_pre" if config.parallel else "resid_mid"][layer]))
        close(folded["mlp_norm_scale"][layer], raw["mlp_norm_scale"][layer])
    close(folded["final_norm"][3], normed(raw["resid_post"][2]))


@pytest.mark.parametrize("name", FOLDED)
def test_norms_without_means_leave_the_stream(name):
    (raw_model, _, _, raw), (_, _, _, folded) = pair_of(name)
    if raw_model.config.norm == "rms":
        for layer in range(3):
            for site in ("resid_pre", "attn_out", "mlp_out", "resid_post"):
                close(folded[site][layer], raw[site][layer], atol=2e-5)


@pytest.mark.parametrize("name", FOLDED)
def test_values_have_no_bias(name):
    (raw_model, raw_params, _, raw), (model, params, _, folded) = pair_of(name)
    blocks, heads = raw_params["params"]["blocks"], (raw_model.config.n_kv_heads, raw_model.config.head_dim)
    for layer in range(3):
        constant = np.zeros(heads)
        if raw_model.config.norm_bias:
            constant = constant + (np.asarray(blocks["attn_norm_bias"][layer]) @ np.asarray(blocks["v"][layer])).reshape(heads)
        if raw_model.config.qkv_bias:
            constant = constant + np.asarray(blocks["v_bias"][layer]).reshape(heads)
        close(folded["v"][layer], raw["v"][layer] - constant)
        close(folded["q"][layer], raw["q"][layer])
        close(folded["k"][layer], raw["k"][layer])
    if model.config.qkv_bias:
        assert not params["params"]["blocks"]["v_bias"].any() and model.config.out_bias


@pytest.mark.parametrize("name", FOLDED)
def test_the_weights_themselves(name):
    (_, raw, _, _), (model, params, _, _) = pair_of(name)
    config, tree = model.config, params["params"]
    blocks = tree["blocks"]
    assert not config.tied_head and "head" in tree
    for norm, place in (("attn_norm", blocks), ("mlp_norm", blocks), ("final_norm", tree)):
        assert (place[norm] == (0.0 if config.norm_offset else 1.0)).all()
        assert not config.norm_bias or not place[f"{norm}_bias"].any()
    if config.norm == "layer":
        close(np.mean(blocks["q"], axis=1), 0, atol=1e-6)
        close(np.mean(blocks["up"], axis=1), 0, atol=1e-6)
        close(np.mean(tree["head"], axis=1), 0, atol=1e-6)
        writers = [tree[name] for name in ("embed", "positions") if name in tree]
        for writer in (*writers, *(blocks[name] for name in ("o", "o_bias", "down", "down_bias"))):
            close(np.mean(writer, axis=-1), 0, atol=1e-6)
    if config.logit_softcap is None:
        close(np.mean(tree["head"], axis=0), 0, atol=1e-6)
    for kept in ("q_norm", "k_norm", "attn_post_norm", "mlp_post_norm"):
        if kept in blocks:
            np.testing.assert_array_equal(blocks[kept], raw["params"]["blocks"][kept])


@pytest.mark.some(2)
@pytest.mark.parametrize("name", MARKED)
def test_the_folded_network_is_a_network(name):
    """Its parameters are those that its configuration asks for, in the raw ones' dtype, and can be laid out on a mesh."""
    model, params = process_weights(*random_network(NETWORKS[name], jnp.bfloat16))
    wanted = jax.eval_shape(lambda: model.init(jax.random.key(0), TOKENS))
    assert jax.tree.structure(wanted) == jax.tree.structure(params)
    assert jax.tree.map(lambda a: a.shape, wanted) == jax.tree.map(lambda a: a.shape, params)
    assert {path[-1].key for path, _ in jax.tree.leaves_with_path(params)} <= set(AXES)
    assert model.dtype == jnp.bfloat16
    halves = jax.tree.map(lambda a: a.astype(jnp.bfloat16), random_network(NETWORKS[name])[1])
    assert {a.dtype for a in jax.tree.leaves(process_weights(random_network(NETWORKS[name])[0], halves)[1])} == {jnp.dtype(jnp.bfloat16)}


def test_parameters_given_stay_as_they_are_and_folding_twice_is_folding_once():
    model, params = random_network(NETWORKS["gpt2"])
    before = jax.tree.map(np.array, params)
    once = process_weights(model, params)
    jax.tree.map(np.testing.assert_array_equal, params, before)
    assert process_weights(*once) == once


def test_not_everything_has_biases_after_folding():
    """Layer norms without biases make none; a gated network gets them in all three maps of its MLP."""
    plain = dataclasses.replace(NETWORKS["gpt2"], norm_bias=False, qkv_bias=False, out_bias=False, mlp_bias=False)
    model, params = process_weights(*random_network(plain))
    assert not [name for name in params["params"]["blocks"] if name.endswith("bias")] and "head_bias" not in params["params"]
    gated = dataclasses.replace(NETWORKS["gpt2"], gated=True, mlp_bias=False, activation="silu", n_kv_heads=2, norm_eps=1e-3)
    raw, weights = random_network(gated)
    model, params = process_weights(raw, weights)
    assert {"gate_bias", "up_bias", "down_bias", "o_bias"} <= set(params["params"]["blocks"])
    close(jax.nn.log_softmax(model.apply(params, TOKENS).logits), jax.nn.log_softmax(raw.apply(weights, TOKENS).logits))


def test_folded_weights_are_not_saved(tmp_path):
    """A folder could not say that they are folded, and most families have no names for the biases that folding makes."""
    with pytest.raises(UserError, match="fold them after loading") as caught:
        save_model(tmp_path / "folded", *pair_of("llama")[1][:2])
    assert "\n" not in str(caught.value) and not (tmp_path / "folded").exists()


def test_a_condition_cannot_be_folded():
    with pytest.raises(UserError, match="adaLN") as caught:
        process_weights(*random_network(NETWORKS["mdlm"]))
    assert "\n" not in str(caught.value)


def reference(tree, config):
    """log-probabilities of GPT-2-like and NeoX-like networks in the parameters' own precision, in NumPy."""
    tokens, blocks = np.asarray(TOKENS), tree["blocks"]
    n, h, t = config.n_heads, config.head_dim, tokens.shape[1]
    bias = lambda place, name: place[name] if name in place else 0.0  # noqa: E731
    activation = {
        "gelu": lambda x: x * (1 + np.vectorize(math.erf)(x / np.sqrt(2))) / 2,
        "gelu_tanh": lambda x: x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2,
    }[config.activation]

    def norm(x, weight, offset):
        x = centred(x)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * weight + offset

    def rotated(x):
        half = config.rotary_dim // 2
        angle = np.arange(t)[:, None] * config.rope_theta ** (-np.arange(half) / half)
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        a, b = x[..., :half], x[..., half : 2 * half]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin, x[..., 2 * half :]], axis=-1)

    x = tree["embed"][tokens] + (tree["positions"][:t] if config.positions == "learned" else 0.0)
    for layer in range(config.n_layers):
        at = {name: value[layer] for name, value in blocks.items()}
        read = norm(x, at["attn_norm"], at["attn_norm_bias"])
        q, k, v = ((read @ at[i] + bias(at, f"{i}_bias")).reshape(2, t, n, h) for i in "qkv")
        if config.positions == "rotary":
            q, k = rotated(q), rotated(k)
        scores = np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(h)
        scores = np.where(np.tril(np.ones((t, t), bool)), scores, -np.inf)
        pattern = np.exp(scores - scores.max(-1, keepdims=True))
        pattern = pattern / pattern.sum(-1, keepdims=True)
        attended = np.einsum("bnts,bsnh->btnh", pattern, v).reshape(2, t, n * h) @ at["o"] + bias(at, "o_bias")
        middle = x if config.parallel else x + attended
        read = norm(middle, at["mlp_norm"], at["mlp_norm_bias"])
        mlp = activation(read @ at["up"] + at["up_bias"]) @ at["down"] + at["down_bias"]
        x = middle + mlp + (attended if config.parallel else 0.0)
    head = tree["embed"] if config.tied_head else tree["head"]
    logits = norm(x, tree["final_norm"], tree["final_norm_bias"]) @ head.T + bias(tree, "head_bias")
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.parametrize("name", LAYERED)
def test_folding_is_exact_in_float64(name):
    model, params = random_network(NETWORKS[name])
    wide = lambda tree: jax.tree.map(lambda a: np.asarray(a, np.float64), tree)  # noqa: E731
    with jax.enable_x64(True):
        folded, exact = process_weights(model, wide(params))
        exact = wide(exact)
    expected = reference(wide(params)["params"], model.config)
    np.testing.assert_allclose(reference(exact["params"], folded.config), expected, atol=1e-11)
    close(jax.nn.log_softmax(model.apply(params, TOKENS).logits), expected)  # the reference is the network
    close(jax.nn.log_softmax(folded.apply(process_weights(model, params)[1], TOKENS).logits), expected)
