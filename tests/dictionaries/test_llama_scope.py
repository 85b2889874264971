"""Llama Scope's three layouts against a forward pass that scales rows at run time, as training did, and what is refused."""

import json

import numpy as np
import pytest
import safetensors.numpy

from dlmscope_jax.dictionaries import JumpReLU, ReLU, TopK, load_dictionary
from dlmscope_jax.errors import UserError

from . import written
from .written import D, N, X

NORM_IN, NORM_OUT, K = 5.0, 13.8125, 4
HOOKS = {"hook_point_in": "blocks.19.hook_resid_post", "hook_point_out": "blocks.19.hook_resid_post"}
TRANSCODER = {"hook_point_in": "blocks.8.ln2.hook_normalized", "hook_point_out": "blocks.8.hook_mlp_out"}


def weights(seed=0):
    w = written.random(seed, W_enc=(N, D), b_enc=(N,), W_dec=(N, D), b_dec=(D,))
    return w | {"threshold": np.random.default_rng(seed).uniform(0.1, 1.0, N).astype(np.float32)}


def config(**more):
    plain = {"d_model": D, "d_sae": N, "act_fn": "jumprelu", "norm_activation": "dataset-wise", "use_decoder_bias": True}
    plain |= {"apply_decoder_bias_to_pre_encoder": False, "sparsity_include_decoder_norm": True, "model_name": "meta-llama/Llama-3.1-8B"}
    return plain | HOOKS | more


def old(folder, w, cfg):
    (folder / "checkpoints").mkdir(parents=True)
    names = {"encoder.weight": w["W_enc"], "encoder.bias": w["b_enc"], "decoder.weight": np.ascontiguousarray(w["W_dec"].T)}
    safetensors.numpy.save_file(names | {"decoder.bias": w["b_dec"]}, str(folder / "checkpoints" / "final.safetensors"))
    (folder / "hyperparams.json").write_text(json.dumps(cfg))
    return folder


def distilled(folder, w, cfg, **more):
    folder.mkdir(parents=True)
    names = {"encoder.weight": w["W_enc"], "encoder.bias": w["b_enc"], "decoder.weight": np.ascontiguousarray(w["W_dec"].T)}
    names |= {"decoder.bias": w["b_dec"], "log_jumprelu_threshold": np.log(w["threshold"])} | more
    safetensors.numpy.save_file(names, str(folder / "sae_weights.safetensors"))
    (folder / "config.json").write_text(json.dumps(cfg))
    return folder


def today(folder, w, cfg, **more):
    folder.mkdir(parents=True)
    names = {"W_E": np.ascontiguousarray(w["W_enc"].T), "b_E": w["b_enc"], "W_D": w["W_dec"]} | more
    names |= {"b_D": w["b_dec"]} if cfg["use_decoder_bias"] else {}
    names |= {"activation_function.log_jumprelu_threshold": np.log(w["threshold"])} if cfg["act_fn"] == "jumprelu" else {}
    safetensors.numpy.save_file(names, str(folder / "sae_weights.safetensors"))
    (folder / "config.json").write_text(json.dumps(cfg))
    return folder


def norms(hooks=HOOKS, read=NORM_IN, write=NORM_IN):
    sides = {hooks["hook_point_in"]: read, hooks["hook_point_out"]: write}
    return {f"dataset_average_activation_norm.{hook}": np.array(norm, np.float32) for hook, norm in sides.items()}


def forward(w, cfg, norm_in=NORM_IN, norm_out=NORM_IN, act="jumprelu", raw_threshold=None):
    """``(activations, output)``: rows are scaled, encoded, chosen, decoded and scaled back, nothing is folded.

    Activations are given as the library's inference has them: of raw rows, and of unit decoder rows where the choice counts norms.
    """
    w, x = written.float64(w), X.astype(np.float64)
    if cfg["norm_activation"] == "token-wise":
        s = np.sqrt(D) / np.linalg.norm(x, axis=1, keepdims=True)
        s_out = s
    else:
        s, s_out = (np.sqrt(D) / norm if norm else 1.0 for norm in (norm_in, norm_out))
    read = x * s - (w["b_dec"] if cfg["apply_decoder_bias_to_pre_encoder"] else 0.0)
    pre = read @ w["W_enc"].T + w["b_enc"]
    norm = np.linalg.norm(w["W_dec"], axis=1) if cfg["sparsity_include_decoder_norm"] else np.ones(N)
    score = pre * norm
    if act == "topk":
        f = np.where(written.largest(np.maximum(score, 0.0), K) > 0, pre, 0.0)
    elif act == "relu":
        f = np.maximum(pre, 0.0)
    else:
        # the one threshold of the first release is compared with activations of raw rows
        raw = score / (s_out if cfg["sparsity_include_decoder_norm"] else s)
        f = np.where((score > w["threshold"]) if raw_threshold is None else (raw > raw_threshold), np.maximum(pre, 0.0), 0.0)
    bias = w["b_dec"] if cfg["use_decoder_bias"] else 0.0
    per_row = cfg["norm_activation"] == "token-wise"
    return f * norm / (1.0 if per_row else s_out), (f @ w["W_dec"] + bias) / s_out


@pytest.mark.parametrize("subtract", [False, True])
@pytest.mark.parametrize("by_norm", [True, False])
def test_first_release(tmp_path, by_norm, subtract):
    w, norm = weights(), {"in": NORM_IN, "out": NORM_IN}
    more = {"sparsity_include_decoder_norm": by_norm, "apply_decoder_bias_to_pre_encoder": subtract}
    cfg = config(jump_relu_threshold=0.7, dataset_average_activation_norm=norm, top_k=50, **more)
    folder = old(tmp_path / "Llama3_1-8B-Base-L19R-8x", w, cfg)
    loaded = load_dictionary(folder)
    assert loaded[0] == JumpReLU(D, N, subtract=subtract)
    assert (loaded[2].site, loaded[2].layer, loaded[2].model) == ("resid_post@19", 19, "meta-llama/Llama-3.1-8B")
    np.testing.assert_allclose(loaded[2].input_scale, NORM_IN / np.sqrt(D), rtol=1e-6)
    want = forward(w, cfg, raw_threshold=0.7)
    assert not np.allclose(want[0] != 0, forward(w, cfg, raw_threshold=0.7 * NORM_IN / np.sqrt(D))[0] != 0)
    written.agree(loaded, *want)
    written.survives(loaded, tmp_path / "ours", *want)
    written.agree(load_dictionary(folder / "checkpoints" / "final.safetensors"), *want)


@pytest.mark.parametrize("by_norm", [True, False])
def test_first_release_transcoder(tmp_path, by_norm):
    """Input and output have a norm each; with the input's alone the output would be off by their ratio."""
    w = weights()
    cfg = config(jump_relu_threshold=0.7, dataset_average_activation_norm={"in": NORM_IN, "out": NORM_OUT}, **TRANSCODER)
    cfg["sparsity_include_decoder_norm"] = by_norm
    loaded = load_dictionary(old(tmp_path / "L8TC", w, cfg))
    assert loaded[0] == JumpReLU(D, N, d_out=D, subtract=False)
    assert (loaded[2].site, loaded[2].extra["target"], loaded[2].weight_processing) == ("mlp_in@8", "mlp_out@8", "folded")
    want = forward(w, cfg, NORM_IN, NORM_OUT, raw_threshold=0.7)
    written.agree(loaded, *want)
    written.survives(loaded, tmp_path / "ours", *want)
    written.survives(loaded, tmp_path / "set", *want, format="circuit_tracer")


def test_first_release_topk_that_became_jumprelu(tmp_path):
    w, norm = weights(), {"in": NORM_IN, "out": NORM_IN}
    cfg = config(act_fn="topk", top_k=K, jump_relu_threshold=0.7, dataset_average_activation_norm=norm)
    written.agree(load_dictionary(old(tmp_path / "a", w, cfg)), *forward(w, cfg, raw_threshold=0.7))
    cfg["jump_relu_threshold"] = 0.0
    loaded = load_dictionary(old(tmp_path / "b", w, cfg))
    assert loaded[0] == TopK(D, N, K, subtract=False)
    written.agree(loaded, *forward(w, cfg, act="topk"))


@pytest.mark.parametrize("by_norm", [True, False])
@pytest.mark.parametrize("side", [None, "in"], ids=["by hook", "by side"])
def test_distilled(tmp_path, by_norm, side):
    w, cfg = weights(), config(sparsity_include_decoder_norm=by_norm)
    found = norms() if side is None else {f"dataset_average_activation_norm.{s}": np.array(NORM_IN, np.float32) for s in ("in", "out")}
    loaded = load_dictionary(distilled(tmp_path / "L5R", w, cfg, **found))
    written.agree(loaded, *forward(w, cfg))
    written.survives(loaded, tmp_path / "ours", *forward(w, cfg))


@pytest.mark.parametrize("by_norm", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("act", ["jumprelu", "topk", "relu"])
def test_today(tmp_path, act, bias, by_norm):
    cfg = config(act_fn=act, top_k=K, use_decoder_bias=bias, sparsity_include_decoder_norm=by_norm, sae_type="sae", expansion_factor=2)
    w = weights()
    loaded = load_dictionary(today(tmp_path / "a", w, cfg, **norms()))
    assert type(loaded[0]) is {"jumprelu": JumpReLU, "topk": TopK, "relu": ReLU}[act]
    written.agree(loaded, *forward(w, cfg, act=act))
    written.survives(loaded, tmp_path / "ours", *forward(w, cfg, act=act))


def test_today_transcoder(tmp_path):
    w, cfg = weights(), config(**TRANSCODER)
    loaded = load_dictionary(today(tmp_path / "a", w, cfg, **norms(TRANSCODER, NORM_IN, NORM_OUT)))
    written.agree(loaded, *forward(w, cfg, NORM_IN, NORM_OUT))


@pytest.mark.parametrize("kind", ["token-wise", "inference"])
def test_other_normalisations(tmp_path, kind):
    w, cfg = weights(), config(norm_activation=kind)
    loaded = load_dictionary(today(tmp_path / "a", w, cfg))
    assert loaded[0].row_norm == ("unit_rms" if kind == "token-wise" else "none")
    written.agree(loaded, *forward(w, cfg, None, None))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"sae_type": "crosscoder"}, "sae_type|'crosscoder' is not read"),
        ({"sae_type": "clt"}, "'clt' is not read"),
        ({"use_glu_encoder": True}, "use_glu_encoder"),
        ({"norm_activation": "batch-wise"}, "'batch-wise' is not read"),
        ({"act_fn": "batchtopk"}, "'batchtopk' is not read"),
        ({"act_fn": "topk", "top_k": None}, "topk with top_k"),
        ({"d_model": D + 1}, "are not the 6 and 20"),
        ({"hook_point_out": ["a", "b"]}, "is not read"),
        ({"hook_point_in": "blocks.19.hook_resid_mid"}, "resid_mid is None"),
        (TRANSCODER | {"apply_decoder_bias_to_pre_encoder": True}, "subtracts its output's bias"),
        (TRANSCODER | {"norm_activation": "token-wise"}, "'token-wise' is not read"),
    ],
)
def test_refused(tmp_path, change, says):
    with pytest.raises(UserError, match=says):
        load_dictionary(today(tmp_path / "a", weights(), config(**change), **norms()))


def test_no_norm_and_no_threshold(tmp_path):
    with pytest.raises(UserError, match="is None"):
        load_dictionary(today(tmp_path / "a", weights(), config()))
    with pytest.raises(UserError, match="is 0.0"):
        load_dictionary(today(tmp_path / "b", weights(), config(), **norms(read=0.0, write=0.0)))
    with pytest.raises(UserError, match="an autoencoder has one mean norm"):
        two = config(jump_relu_threshold=1.0, dataset_average_activation_norm={"in": 1.0, "out": 2.0})
        load_dictionary(old(tmp_path / "d", weights(), two))
    with pytest.raises(UserError, match="jump_relu_threshold is None"):
        load_dictionary(old(tmp_path / "c", weights(), config(dataset_average_activation_norm={"in": 1.0, "out": 1.0})))


def test_a_distributed_checkpoint_is_refused(tmp_path):
    (tmp_path / "sae_weights.dcp").mkdir()
    (tmp_path / "config.json").write_text(json.dumps(config()))
    with pytest.raises(UserError, match="a .dcp checkpoint is not read"):
        load_dictionary(tmp_path)
