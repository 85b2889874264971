"""sparsify's files against a forward pass written from its semantics in NumPy float64, in both directions."""

import json
from dataclasses import replace

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from dlmscope_jax.dictionaries import BatchTopK, DictionaryMeta, ReLU, TopK, load_dictionary, save_dictionary
from dlmscope_jax.errors import UserError

D, N, K = 6, 24, 4
X = np.random.default_rng(5).normal(size=(9, D)).astype(np.float32) * 2 + 0.5
META = DictionaryMeta(model="gpt2", site="mlp_out@3", layer=3, corruption="rate U[0, 1]", select="masked", input_scale=2.5, seed=1, steps=9)


def tensors(skip=False, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"encoder.weight": (N, D), "encoder.bias": (N,), "W_dec": (N, D), "b_dec": (D,)} | ({"W_skip": (D, D)} if skip else {})
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def config(**more):
    plain = {"activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "num_latents": N, "k": K, "multi_topk": False}
    return plain | {"skip_connection": False, "transcode": False, "d_in": D} | more


def write(folder, cfg, found):
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(found, str(folder / "sae.safetensors"))
    (folder / "cfg.json").write_text(json.dumps(cfg))
    return folder


def forward(cfg, found, x):
    """sparsify: activations and output."""
    t, x = {name: value.astype(np.float64) for name, value in found.items()}, x.astype(np.float64)
    pre = (x if cfg["transcode"] else x - t["b_dec"]) @ t["encoder.weight"].T + t["encoder.bias"]
    post = pre if cfg.get("signed") else np.maximum(pre, 0)
    acts = np.zeros_like(post)
    for row, values in zip(acts, post, strict=True):
        if cfg["activation"] == "groupmax":
            size = N // cfg["k"]
            chosen = np.array([start + values[start : start + size].argmax() for start in range(0, N, size)])
        else:
            chosen = np.argsort(-np.abs(values), kind="stable")[: cfg["k"]]
        row[chosen] = values[chosen]
    y = acts @ t["W_dec"] + t["b_dec"]
    return acts, y + x @ t["W_skip"].T if "W_skip" in t else y


def same_function(loaded, acts, y):
    spec, params, _ = loaded
    assert all(value.dtype == jnp.float32 for value in params.values())
    codes = spec.encode(params, jnp.asarray(X))
    assert (acts != 0).any() and (acts == 0).any()
    np.testing.assert_allclose(spec.dense(codes), acts, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(spec.decode(params, codes, x=jnp.asarray(X)), y, rtol=1e-5, atol=1e-5)


CASES = [
    ({}, TopK(D, N, K)),
    ({"multi_topk": True}, TopK(D, N, K, multi_topk=True)),
    ({"activation": "groupmax"}, TopK(D, N, K, rule="groups")),
    ({"num_latents": 0, "expansion_factor": N // D}, TopK(D, N, K)),
    ({"transcode": True}, TopK(D, N, K, d_out=D)),
    ({"transcode": True, "skip_connection": True}, TopK(D, N, K, d_out=D, skip=True)),
    ({"transcode": True, "skip_connection": True, "activation": "groupmax"}, TopK(D, N, K, d_out=D, skip=True, rule="groups")),
    ({"skip_connection": True}, TopK(D, N, K, d_out=D, skip=True, input_bias=True)),
]


@pytest.mark.parametrize(("more", "spec"), CASES, ids=["-".join(more) or "plain" for more, _ in CASES])
def test_each_configuration(tmp_path, more, spec):
    """Read, written again and read again, it computes what sparsify does."""
    cfg, found = config(**more), tensors(more.get("skip_connection", False))
    acts, y = forward(cfg, found, X)
    loaded = load_dictionary(write(tmp_path / "theirs" / "layers.3.mlp", cfg, found))
    assert loaded[0] == spec
    same_function(loaded, acts, y)
    save_dictionary(tmp_path / "ours", *loaded, format="sparsify")
    again = load_dictionary(tmp_path / "ours")
    same_function(again, acts, y)
    assert (again[2].site, again[2].layer) == (loaded[2].site, 3)


def test_signed_configurations_of_old(tmp_path):
    cfg = config(signed=True)
    loaded = load_dictionary(write(tmp_path / "layers.3", cfg, tensors()))
    acts, y = forward(cfg, tensors(), X)
    assert loaded[0].rule == "magnitude" and (acts < 0).any()
    same_function(loaded, acts, y)
    same_function(load_dictionary(write(tmp_path / "layers.4", config(signed=False), tensors())), *forward(config(), tensors(), X))


def test_defaults_of_a_short_configuration(tmp_path):
    rng = np.random.default_rng(1)
    found = tensors() | {"encoder.weight": rng.normal(size=(32 * D, D)).astype(np.float32), "encoder.bias": np.zeros(32 * D, np.float32)}
    found["W_dec"] = rng.normal(size=(32 * D, D)).astype(np.float32)
    assert load_dictionary(write(tmp_path, {"d_in": D}, found))[0] == TopK(D, 32 * D, 32)


def test_a_run_with_several_hookpoints_and_seeds(tmp_path):
    run = {"sae": {"k": 32}, "model": "EleutherAI/pythia-160m", "dataset": "EleutherAI/SmolLM2-135M-10B", "ctx_len": 2048}
    (tmp_path / "config.json").write_text(json.dumps(run))
    write(tmp_path / "layers.5", config(), tensors())
    write(tmp_path / "gpt_neox.layers.6.mlp", config(transcode=True), tensors())
    write(tmp_path / "h.7.attn" / "seed1", config(), tensors())
    meta = load_dictionary(tmp_path, "layers.5")[2]
    assert (meta.model, meta.site, meta.layer, meta.extra["run"]) == ("EleutherAI/pythia-160m", "resid_post@5", 5, run)
    meta = load_dictionary(tmp_path / "gpt_neox.layers.6.mlp")[2]
    assert (meta.model, meta.site, meta.layer, meta.extra["target"]) == ("EleutherAI/pythia-160m", "mlp_in@6", 6, "mlp_out@6")
    meta = load_dictionary(tmp_path / "h.7.attn" / "seed1" / "sae.safetensors")[2]
    assert (meta.site, meta.layer) == ("attn_out@7", 7)
    with pytest.raises(UserError, match="give one of its subfolders: .*layers.5"):
        load_dictionary(tmp_path)
    (tmp_path / "config.json").write_text("{")  # somebody else's
    assert load_dictionary(tmp_path, "layers.5")[2].model == "unknown"


def test_stored_types(tmp_path):
    given = {name: value.astype(ml_dtypes.bfloat16) for name, value in tensors().items()}
    exact = {name: value.astype(np.float32) for name, value in given.items()}
    same_function(load_dictionary(write(tmp_path, config(), given)), *forward(config(), exact, X))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"d_in": 7}, "d_in is 7, but sae.safetensors has 6"),
        ({"d_in": "6"}, "d_in is '6', should be a whole number"),
        ({"num_latents": 25}, "says 25 latents, but sae.safetensors has 24"),
        ({"num_latents": 0}, "says 192 latents, but sae.safetensors has 24"),
        ({"k": 2.5}, "k is 2.5, should be a whole number"),
        ({"k": 25}, "k = 25 is more than the 24 latents"),
        ({"activation": "jumprelu"}, "activation 'jumprelu' is not read"),
        ({"activation": "groupmax", "signed": True}, "'groupmax' with signed is not read"),
        ({"activation": "groupmax", "k": 5}, "k = 5 must divide width = 24"),
        ({"skip_connection": True}, "W_skip is missing"),
    ],
)
def test_what_is_refused(tmp_path, change, says):
    with pytest.raises(UserError, match=says) as error:
        load_dictionary(write(tmp_path, config() | change, tensors()))
    assert "\n" not in str(error.value)


def test_damaged_tensors(tmp_path):
    for change, says in (
        ({"W_skip": np.zeros((D, D), np.float32)}, "W_skip is unexpected"),
        ({"W_dec": np.zeros((D, N), np.float32)}, r"W_dec is \[6, 24\], should be \[24, 6\]"),  # never transposed by guessing
        ({"b_dec": np.full(D, np.nan, np.float32)}, "b_dec holds NaN"),
    ):
        with pytest.raises(UserError, match=says):
            load_dictionary(write(tmp_path, config(), tensors() | change))


def params_of(spec, seed=3):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in spec.shapes().items()}


OURS = [
    TopK(D, N, K),
    TopK(D, N, K, multi_topk=True),
    TopK(D, N, K, subtract=False),
    TopK(D, N, K, rule="groups"),
    TopK(D, N, K, d_out=D),
    TopK(D, N, K, d_out=D, skip=True),
    TopK(D, N, K, d_out=D, input_bias=True),
    TopK(D, N, K, d_out=D, skip=True, input_bias=True),
]


@pytest.mark.parametrize("spec", OURS, ids=range(len(OURS)))
def test_what_is_written(tmp_path, spec):
    """The files on disk, read without our reader, compute what the dictionary does."""
    params = params_of(spec)
    save_dictionary(tmp_path, spec, params, META, format="sparsify")
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    found = safetensors.numpy.load_file(str(tmp_path / "sae.safetensors"))
    assert cfg["transcode"] == spec.transcoder and found.keys() == tensors(spec.skip).keys()
    same_function((spec, params, META), *forward(cfg, found, X))
    got = load_dictionary(tmp_path)
    same_function(got, *forward(cfg, found, X))
    assert cfg["multi_topk"] is False  # the library's forward would return what 4 k latents reconstruct
    assert replace(got[2], extra={}) == META


def test_a_card_that_is_none(tmp_path):
    write(tmp_path, config(), tensors())
    for card, says in (("{", "its dlmscope card is not JSON"), ('{"model": 3}', "dlmscope: ")):
        safetensors.numpy.save_file(tensors(), str(tmp_path / "sae.safetensors"), metadata={"dlmscope": card})
        with pytest.raises(UserError, match=says):
            load_dictionary(tmp_path)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (BatchTopK(D, N, K), "a BatchTopK dictionary"),
        (ReLU(D, N), "a ReLU dictionary"),
        (TopK(D, N, K, rule="raw"), "rule 'raw'"),
        (TopK(D, N, K, rule="magnitude"), "rule 'magnitude'"),
        (TopK(D, N, K, d_out=D + 1), "a transcoder from 6 to 7"),
        (TopK(D, N, K, row_norm="unit_rms"), "row_norm='unit_rms'"),
    ],
)
def test_what_cannot_be_written(tmp_path, spec, says):
    with pytest.raises(UserError, match=f"the sparsify format cannot say .*{says}"):
        save_dictionary(tmp_path / "a", spec, params_of(spec), META, format="sparsify")
    with pytest.raises(UserError, match="fold it first"):
        save_dictionary(tmp_path / "a", TopK(D, N, K), params_of(TopK(D, N, K)), replace(META, scale_folded=False), format="sparsify")
    assert not (tmp_path / "a").exists()
