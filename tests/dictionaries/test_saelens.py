"""SAELens' files against a forward pass written from its semantics in NumPy float64, in both directions."""

import json
from dataclasses import replace

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from dlmscope_jax.dictionaries import (
    BatchTopK,
    Binary,
    DictionaryMeta,
    Gated,
    JumpReLU,
    Matryoshka,
    ReLU,
    TopK,
    load_dictionary,
    save_dictionary,
)
from dlmscope_jax.errors import UserError

D, N, K, OUT = 6, 20, 3, 4
X = np.random.default_rng(5).normal(size=(9, D)).astype(np.float32) * 2 + 0.5
META = DictionaryMeta(model="gpt2", site="resid_post@3", layer=3, corruption="U[0, 1]", select="masked", input_scale=2.5, seed=1, steps=9)
BIASES = {"standard": ("b_enc",), "gated": ("b_gate", "b_mag", "r_mag")}


def tensors(architecture, seed=0, out=None):
    """Random weights under SAELens' names and in its layouts."""
    rng = np.random.default_rng(seed)
    shapes = {"W_enc": (D, N), "W_dec": (N, out or D), "b_dec": (out or D,)}
    shapes |= dict.fromkeys(BIASES.get(architecture, ("b_enc",)), (N,))
    shapes |= {"W_skip": (out, D)} if "skip" in architecture else {}
    found = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    if "jumprelu" in architecture:
        found["threshold"] = rng.uniform(0.2, 1.5, size=N).astype(np.float32)
    return found


def config(architecture, out=None, **more):
    """A configuration of version 6."""
    transcoder = "transcoder" in architecture
    plain = {"architecture": architecture, "d_in": D, "d_sae": N, "dtype": "float32", "device": "cpu"}
    plain |= {"apply_b_dec_to_input": not transcoder, "normalize_activations": "none", "reshape_activations": "none"}
    plain |= {"d_out": out} if transcoder else {}
    plain |= {"k": K} if "topk" in architecture else {}
    metadata = {"sae_lens_version": "6.1.0", "model_name": "gpt2-small", "hook_name": "blocks.7.hook_resid_pre", "prepend_bos": True}
    return plain | {"metadata": metadata} | more


def write(folder, cfg, found):
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(found, str(folder / "sae_weights.safetensors"))
    (folder / "cfg.json").write_text(json.dumps(cfg))
    return folder


def kept(values, by, k):
    out = np.zeros_like(values)
    for row, value, rank in zip(out, values, by, strict=True):
        chosen = np.argsort(-rank, kind="stable")[:k]
        row[chosen] = value[chosen]
    return out


def forward(cfg, found, x):
    """SAELens: activations and reconstruction."""
    t, x, raw = {name: value.astype(np.float64) for name, value in found.items()}, x.astype(np.float64), x.astype(np.float64)
    kind, norm = cfg["architecture"], cfg["normalize_activations"]
    undo = lambda y: y  # noqa: E731
    if norm == "layer_norm":
        mean, std = x.mean(1, keepdims=True), x.std(1, keepdims=True, ddof=1)
        x, undo = (x - mean) / (std + 1e-5), lambda y: y * std + mean
    if norm == "constant_norm_rescale":
        factor = D**0.5 / np.linalg.norm(x, axis=1, keepdims=True)
        x, undo = x * factor, lambda y: y / factor
    if cfg["apply_b_dec_to_input"]:
        x = x - t["b_dec"]
    norms = np.linalg.norm(t["W_dec"], axis=1) if cfg.get("rescale_acts_by_decoder_norm") else np.ones(N)
    if kind == "gated":
        on = x @ t["W_enc"] + t["b_gate"] > 0
        acts = on * np.maximum(x @ (t["W_enc"] * np.exp(t["r_mag"])) + t["b_mag"], 0)
    else:
        pre = (x @ t["W_enc"] + t["b_enc"]) * norms
        if kind == "topk":
            acts = np.maximum(kept(pre, pre, cfg["k"]), 0)
        elif kind == "abstopk":
            acts = kept(pre, np.abs(pre), cfg["k"])
        elif "jumprelu" in kind:
            acts = np.maximum(pre, 0) * (pre > t["threshold"])
        elif "batchtopk" in kind:
            acts = np.maximum(pre, 0) * (pre > t["topk_threshold"])
        else:
            acts = np.maximum(pre, 0)
    y = undo((acts / norms) @ t["W_dec"] + t["b_dec"])
    return acts, y + raw @ t["W_skip"].T if "W_skip" in t else y


def same_function(loaded, acts, y, x=X):
    spec, params, _ = loaded
    assert all(value.dtype == jnp.float32 for value in params.values())
    codes = spec.encode(params, jnp.asarray(x))
    assert (acts != 0).any() and (acts == 0).any()
    np.testing.assert_allclose(spec.dense(codes), acts, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(spec.decode(params, codes, x=jnp.asarray(x)), y, rtol=1e-5, atol=1e-5)


def case(architecture, kind, out=None, **more):
    label = "-".join([architecture, *map(str, more)])
    return pytest.param(config(architecture, out, **more), tensors(architecture, out=out), kind, id=label)


CASES = [
    case("standard", ReLU),
    case("standard", ReLU, apply_b_dec_to_input=False),
    case("standard", ReLU, normalize_activations="layer_norm"),
    case("standard", ReLU, normalize_activations="constant_norm_rescale", dtype="torch.float32"),
    case("topk", TopK),
    case("topk", TopK, rescale_acts_by_decoder_norm=True),
    case("topk", TopK, normalize_activations="layer_norm", rescale_acts_by_decoder_norm=True, apply_b_dec_to_input=False),
    case("abstopk", TopK),
    case("jumprelu", JumpReLU),
    case("jumprelu", JumpReLU, apply_b_dec_to_input=False, normalize_activations="expected_average_only_in"),
    case("gated", Gated),
    case("gated", Gated, apply_b_dec_to_input=False, normalize_activations="constant_norm_rescale"),
    case("transcoder", ReLU, out=OUT),
    case("skip_transcoder", ReLU, out=OUT),
    case("jumprelu_transcoder", JumpReLU, out=OUT),
    case("jumprelu_skip_transcoder", JumpReLU, out=D),
]


@pytest.mark.parametrize(("cfg", "found", "kind"), CASES)
def test_each_architecture(tmp_path, cfg, found, kind):
    """Read, written again and read again, it computes what SAELens does."""
    acts, y = forward(cfg, found, X)
    spec, params, meta = loaded = load_dictionary(write(tmp_path / "theirs", cfg, found))
    assert type(spec) is kind and spec.transcoder == ("transcoder" in cfg["architecture"])
    same_function(loaded, acts, y)
    assert (meta.model, meta.site, meta.layer, meta.scale_folded) == ("gpt2-small", "resid_pre@7", 7, True)
    save_dictionary(tmp_path / "ours", spec, params, meta, format="saelens")
    again = load_dictionary(tmp_path / "ours")
    assert again[0] == spec and (again[2].model, again[2].site) == (meta.model, meta.site)
    same_function(again, acts, y)
    written = json.loads((tmp_path / "ours" / "cfg.json").read_text())
    assert written["metadata"]["prepend_bos"] is True  # what it said of its training stays


@pytest.mark.parametrize("kind", ["batchtopk", "matryoshka_batchtopk"])
@pytest.mark.parametrize("scale", [None, 0.4])
@pytest.mark.parametrize("rescaled", [True, False])
def test_training_checkpoint_of_batch_topk(tmp_path, kind, scale, rescaled):
    """The exported threshold is the scalar of the checkpoint; rows that training multiplied by a scale are taken raw."""
    cfg = config(kind, k=2.6, rescale_acts_by_decoder_norm=rescaled, training_only=1, matryoshka_widths=[5, 9, N])
    found = tensors(kind) | {"topk_threshold": np.array(0.8, np.float64)}
    if scale:
        cfg["normalize_activations"] = "expected_average_only_in"
    at = write(tmp_path, cfg, found)
    if scale:
        (at / "activation_scaler.json").write_text(json.dumps({"scaling_factor": scale, "has_whitening": False}))
    acts, y = forward(cfg, found, X * (scale or 1))
    unit = (scale or 1) if rescaled else 1  # activations are measured in decoder norms, which the fold divides
    loaded = spec, _, meta = load_dictionary(at)
    same_function(loaded, acts / unit, y / (scale or 1))
    assert spec.k == 3 and type(spec) is (Matryoshka if "matryoshka" in kind else BatchTopK)
    assert not isinstance(spec, Matryoshka) or spec.prefixes == (5, 9, N)
    assert meta.input_scale == (None if scale is None else pytest.approx(1 / scale)) and "reading" not in meta.extra
    save_dictionary(tmp_path / "export", *loaded, format="saelens")
    exported = json.loads((tmp_path / "export" / "cfg.json").read_text())
    assert exported["architecture"] == "jumprelu" and exported["metadata"]["training_architecture"] == kind
    same_function(load_dictionary(tmp_path / "export"), acts / unit, y / (scale or 1))


def test_checkpoint_with_an_input_scale(tmp_path):
    """Other architectures: the same, and activations stay as training had them."""
    cfg, found = config("jumprelu", normalize_activations="expected_average_only_in"), tensors("jumprelu")
    at = write(tmp_path, cfg, found)
    acts, y = forward(cfg, found, X)
    _, _, meta = loaded = load_dictionary(at)  # no scale beside it: an exported file, folded already
    same_function(loaded, acts, y)
    assert "taken as folded" in meta.extra["reading"]
    (at / "activation_scaler.json").write_text('{"scaling_factor": 3.0}')
    acts, y = forward(cfg, found, X * 3)
    same_function(load_dictionary(at), acts, y / 3)
    for bad in ("{", "[]", "{}", '{"scaling_factor": 0}', '{"scaling_factor": "x"}', '{"scaling_factor": NaN}'):
        (at / "activation_scaler.json").write_text(bad)
        with pytest.raises(UserError, match="scaling_factor"):
            load_dictionary(at)
    (at / "activation_scaler.json").write_text('{"scaling_factor": null, "has_whitening": true}')
    with pytest.raises(UserError, match="whitened"):
        load_dictionary(at)


def test_old_checkpoint_with_log_threshold(tmp_path):
    cfg, found = config("jumprelu"), tensors("jumprelu")
    acts, y = forward(cfg, found, X)
    old = {name: value for name, value in found.items() if name != "threshold"} | {"log_threshold": np.log(found["threshold"])}
    same_function(load_dictionary(write(tmp_path, cfg, old)), acts, y)


OLD = {"d_in": D, "d_sae": N, "model_name": "gelu-2l", "hook_point": "blocks.1.hook_mlp_out", "dtype": "torch.float32"}


@pytest.mark.parametrize(
    ("old", "architecture"),
    [
        ({}, "standard"),
        ({"architecture": "jumprelu", "activation_fn_str": "relu"}, "jumprelu"),
        ({"architecture": "standard", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}, "topk"),
        ({"activation_fn": "topk", "activation_fn_kwargs": {"k": K}, "normalize_activations": "layer_norm"}, "topk"),
        ({"normalize_activations": False, "apply_b_dec_to_input": False}, "standard"),
        ({"normalize_activations": True, "sae_lens_version": "5.2.0"}, "standard"),
        ({"normalize_activations": None, "finetuning_scaling_factor": False}, "standard"),
    ],
)
def test_configurations_before_version_6(tmp_path, old, architecture):
    norm = old.get("normalize_activations")
    new = config(architecture, apply_b_dec_to_input=old.get("apply_b_dec_to_input", True))
    new["normalize_activations"] = norm if isinstance(norm, str) else "none"
    found = tensors(architecture)
    loaded = load_dictionary(write(tmp_path, OLD | old, found))
    same_function(loaded, *forward(new, found, X))
    assert (loaded[2].model, loaded[2].site) == ("gelu-2l", "mlp_out@1")
    assert ("reading" in loaded[2].extra) == (norm is True)  # scaled in training, and folded as far as anybody can tell


@pytest.mark.parametrize("name", ["finetuning_scaling_factor", "scaling_factor"])
def test_finetuning_factors_go_into_the_decoder(tmp_path, name):
    found, cfg = tensors("standard"), OLD | {"finetuning_scaling_factor": True}
    factor = np.random.default_rng(2).uniform(0.5, 2, N).astype(np.float32)
    acts, y = forward(config("standard"), found | {"W_dec": found["W_dec"] * factor[:, None]}, X)
    same_function(load_dictionary(write(tmp_path, cfg, found | {name: factor})), acts, y)
    with pytest.raises(UserError, match="says that there is none"):
        load_dictionary(write(tmp_path, OLD, found | {name: factor}))
    with pytest.raises(UserError, match=rf"{name} is \[2\], should be \[20\]"):
        load_dictionary(write(tmp_path, cfg, found | {name: factor[:2]}))
    same_function(load_dictionary(write(tmp_path, OLD, found | {name: np.ones(N, np.float32)})), *forward(config("standard"), found, X))


def test_stored_types(tmp_path):
    found = tensors("standard")
    stored = {"W_enc": ml_dtypes.bfloat16, "W_dec": np.float16, "b_enc": np.float64, "b_dec": ml_dtypes.bfloat16}
    given = {name: value.astype(stored[name]) for name, value in found.items()}
    exact = {name: value.astype(np.float32) for name, value in given.items()}
    same_function(load_dictionary(write(tmp_path, config("standard"), given)), *forward(config("standard"), exact, X))


@pytest.mark.parametrize(
    ("hook", "site", "layer"),
    [
        ("blocks.5.attn.hook_z", "z@5", 5),
        ("blocks.11.hook_resid_mid", "resid_mid@11", 11),
        ("blocks.2.ln2.hook_normalized", "mlp_in@2", 2),
        ("blocks.2.mlp.hook_post", "mlp_act@2", 2),
        ("hook_embed", "hook_embed", -1),
        (None, "unknown", -1),
    ],
)
def test_hooks(tmp_path, hook, site, layer):
    cfg = config("standard", reshape_activations="hook_z" if hook and "hook_z" in hook else "none")
    cfg["metadata"]["hook_name"] = hook
    loaded = load_dictionary(write(tmp_path / "a", cfg, tensors("standard")))
    assert (loaded[2].site, loaded[2].layer) == (site, layer)
    save_dictionary(tmp_path / "b", *loaded, format="saelens")
    written = json.loads((tmp_path / "b" / "cfg.json").read_text())
    assert written["metadata"]["hook_name"] == (hook or "unknown") and written["reshape_activations"] == cfg["reshape_activations"]


def test_what_a_transcoder_writes(tmp_path):
    cfg = config("transcoder", OUT)
    cfg["metadata"] |= {"hook_name": "blocks.2.ln2.hook_normalized", "hook_name_out": "blocks.2.hook_mlp_out"}
    loaded = load_dictionary(write(tmp_path / "a", cfg, tensors("transcoder", out=OUT)))
    assert (loaded[2].site, loaded[2].extra["target"]) == ("mlp_in@2", "mlp_out@2")
    save_dictionary(tmp_path / "b", *loaded, format="saelens")
    assert json.loads((tmp_path / "b" / "cfg.json").read_text())["metadata"]["hook_name_out"] == "blocks.2.hook_mlp_out"
    spec, params, meta = loaded  # as this package's own training says it
    trained = replace(meta, extra={"transcoder": {"target": "mlp_out@2", "folded": True}})
    save_dictionary(tmp_path / "c", spec, params, trained, format="saelens")
    assert json.loads((tmp_path / "c" / "cfg.json").read_text())["metadata"]["hook_name_out"] == "blocks.2.hook_mlp_out"
    assert load_dictionary(tmp_path / "c")[2].target == "mlp_out@2"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"architecture": "matching_pursuit"}, "architecture 'matching_pursuit' is not read"),
        ({"architecture": "temporal"}, "architecture 'temporal' is not read"),
        ({"architecture": ["topk"]}, "is not read"),
        ({"normalize_activations": "covariance_whitening"}, "'covariance_whitening' is not read"),
        ({"normalize_activations": 3}, "normalize_activations 3 is not read"),
        ({"normalize_activations": []}, r"normalize_activations \[\] is not read"),
        ({"activation_fn": "tanh-relu"}, "activation_fn 'tanh-relu' is not read"),
        ({"architecture": "topk", "k": None}, "k is None, should be a positive whole number"),
        ({"architecture": "topk", "k": 2.5}, "k is 2.5, should be a positive whole number"),
        ({"architecture": "batchtopk", "k": float("inf")}, "k is inf, should be a positive number"),
        ({"architecture": "topk", "k": 99}, "k = 99 is more than the 20 latents"),
        ({"d_in": 7}, "d_in is 7, but sae_weights.safetensors has 6"),
        ({"d_sae": 21}, "d_sae is 21, but sae_weights.safetensors has 20"),
        ({"architecture": "gated"}, "b_gate is missing"),
        ({"architecture": "jumprelu"}, "threshold is missing"),
        ({"architecture": "batchtopk", "k": 3}, "threshold is missing"),
        ({"architecture": "transcoder", "normalize_activations": "layer_norm"}, "'layer_norm' of a transcoder is not read"),
        ({"metadata": {"dlmscope": {"model": 3}}}, "dlmscope: "),
    ],
)
def test_what_is_refused(tmp_path, change, says):
    with pytest.raises(UserError, match=says) as error:
        load_dictionary(write(tmp_path, config("standard") | change, tensors("standard")))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        ({"more": np.zeros(3, np.float32)}, "more is unexpected"),
        ({"W_dec": np.zeros((N + 1, D), np.float32)}, r"W_dec is \[21, 6\], should be \[20, 6\]"),
        ({"b_enc": np.zeros(N, np.int32)}, "b_enc holds int32"),
        ({"b_enc": np.full(N, np.nan, np.float32)}, "b_enc holds NaN"),
        ({"W_enc": np.zeros(N, np.float32)}, "W_enc is missing or is not a matrix"),
    ],
)
def test_damaged_tensors(tmp_path, tensor, says):
    at = write(tmp_path, config("standard"), tensors("standard") | tensor)
    with pytest.raises(UserError, match=says):
        load_dictionary(at)


def test_a_cut_file(tmp_path):
    path = write(tmp_path, config("standard"), tensors("standard")) / "sae_weights.safetensors"
    whole = path.read_bytes()
    for damaged in (whole[:-8], b"", b"\xff" * 64):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="not a safetensors file"):
            load_dictionary(tmp_path)


def test_the_file_itself_may_be_named(tmp_path):
    at = write(tmp_path, config("topk"), tensors("topk"))
    same_function(load_dictionary(at / "sae_weights.safetensors"), *forward(config("topk"), tensors("topk"), X))


def params_of(spec, seed=3):
    rng = np.random.default_rng(seed)
    out = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in spec.shapes().items()}
    return out | ({"threshold": jnp.abs(out["threshold"])} if "threshold" in out else {})


OURS = [
    (ReLU(D, N), "standard"),
    (ReLU(D, N, subtract=False, row_norm="layer_norm"), "standard"),
    (TopK(D, N, K), "topk"),
    (TopK(D, N, K, subtract=False, row_norm="unit_rms"), "topk"),
    (TopK(D, N, K, rule="magnitude"), "abstopk"),
    (BatchTopK(D, N, K), "jumprelu"),
    (Matryoshka(D, N, K, prefixes=(4, N)), "jumprelu"),
    (JumpReLU(D, N, subtract=False), "jumprelu"),
    (Gated(D, N), "gated"),
    (ReLU(D, N, d_out=OUT, input_bias=True), "transcoder"),
    (ReLU(D, N, d_out=OUT, skip=True, input_bias=True), "skip_transcoder"),
    (JumpReLU(D, N, d_out=OUT), "jumprelu_transcoder"),
    (BatchTopK(D, N, K, d_out=D, skip=True), "jumprelu_skip_transcoder"),
]


@pytest.mark.parametrize(("spec", "architecture"), OURS, ids=[f"{type(s).__name__}-{a}-{i}" for i, (s, a) in enumerate(OURS)])
def test_what_is_written(tmp_path, spec, architecture):
    """The files on disk, read without our reader, compute what the dictionary does."""
    params = params_of(spec)
    save_dictionary(tmp_path, spec, params, META, format="saelens")
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    found = safetensors.numpy.load_file(str(tmp_path / "sae_weights.safetensors"))
    assert cfg["architecture"] == architecture and found.keys() == tensors(architecture, out=OUT).keys()
    same_function((spec, params, META), *forward(cfg, found, X))
    assert cfg["metadata"]["hook_name"] == "blocks.3.hook_resid_post" and int(cfg["metadata"]["sae_lens_version"].split(".")[0]) >= 6
    got = load_dictionary(tmp_path)
    same_function(got, *forward(cfg, found, X))
    kept = replace(got[2], extra={})
    assert kept == META  # what SAELens has no field for is in the metadata block


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (TopK(D, N, K, rule="raw"), "rule 'raw'"),
        (TopK(D, N, 4, rule="groups"), "rule 'groups'"),
        (TopK(D, N, K, d_out=OUT), "a TopK transcoder"),
        (Gated(D, N, d_out=OUT), "a gated transcoder"),
        (JumpReLU(D, N, d_out=OUT, row_norm="layer_norm"), "row_norm='layer_norm'"),
        (Binary(D, N), "a Binary dictionary"),
    ],
)
def test_what_cannot_be_written(tmp_path, spec, says):
    with pytest.raises(UserError, match=f"the saelens format cannot say .*{says}"):
        save_dictionary(tmp_path / "a", spec, params_of(spec), META, format="saelens")
    assert not (tmp_path / "a").exists()


def test_an_input_scale_is_folded_first(tmp_path):
    unfolded = replace(META, scale_folded=False)
    with pytest.raises(UserError, match="fold it first"):
        save_dictionary(tmp_path / "a", ReLU(D, N), params_of(ReLU(D, N)), unfolded, format="saelens")
    with pytest.raises(UserError, match=r"W_dec is \[20, 6\]"):
        save_dictionary(tmp_path / "a", ReLU(D, N + 1), params_of(ReLU(D, N)), META, format="saelens")
    assert not (tmp_path / "a").exists()
