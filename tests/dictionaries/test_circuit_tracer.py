"""circuit-tracer's sets, read and written, against a forward pass written from their semantics."""

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import yaml

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

from . import written
from .written import D, N, X

K = 5
CONFIG = {
    "model_name": "Qwen/Qwen3-0.6B",
    "model_kind": "transcoder_set",
    "feature_input_hook": "mlp.hook_in",
    "feature_output_hook": "mlp.hook_out",
}
META = DictionaryMeta(
    model="Qwen/Qwen3-0.6B",
    site="mlp_in@1",
    layer=1,
    corruption="rate U[0, 1]",
    input_scale=2.5,
    extra={"target": "mlp_out@1", "note": "kept"},
)


def weights(kind="relu", skip=False, seed=0):
    w = written.random(seed, W_enc=(N, D), W_dec=(N, D), b_enc=(N,), b_dec=(D,))
    w |= written.random(seed + 1, W_skip=(D, D)) if skip else {}
    jump = {"activation_function.threshold": np.random.default_rng(seed).uniform(0.1, 1, N).astype(np.float32)}
    return w | (jump if kind == "jump_relu" else {})


def write(folder, layers, **config):
    folder.mkdir(parents=True, exist_ok=True)
    for layer, w in layers.items():
        safetensors.numpy.save_file(w, str(folder / f"layer_{layer}.safetensors"))
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG | config))
    return folder


def forward(w, kind):
    """Top-k keeps negative values; nothing is subtracted; the skip is x @ W_skip.T."""
    w, x = written.float64(w), X.astype(np.float64)
    pre = x @ w["W_enc"].T + w["b_enc"]
    if kind == "topk":
        f = written.largest(pre, K)
    elif kind == "jump_relu":
        f = pre * (pre > w["activation_function.threshold"])
    else:
        f = np.maximum(pre, 0.0)
    return f, f @ w["W_dec"] + w["b_dec"] + (x @ w["W_skip"].T if "W_skip" in w else 0.0)


def config_of(folder):
    return yaml.safe_load((folder / "config.yaml").read_text())


@pytest.mark.parametrize("skip", [False, True], ids=["plain", "skip"])
@pytest.mark.parametrize("kind", ["relu", "jump_relu", "topk"])
def test_forward(tmp_path, kind, skip):
    w = weights(kind, skip)
    if kind == "topk":
        w["b_enc"] -= 4.0  # so that some of the k are negative
    folder = write(tmp_path / "set", {0: weights(kind, skip, seed=7), 3: w}, **({"activation": "topk", "k": K} if kind == "topk" else {}))
    loaded = load_dictionary(folder, "layer_3.safetensors")
    spec, _, meta = loaded
    assert type(spec) is {"relu": ReLU, "jump_relu": JumpReLU, "topk": TopK}[kind] and spec.d_out == D and spec.skip == skip
    assert (meta.model, meta.site, meta.layer, meta.extra["target"]) == ("Qwen/Qwen3-0.6B", "mlp_in@3", 3, "mlp_out@3")
    want = forward(w, kind)
    assert (want[0] < 0).any() == (kind == "topk")
    written.agree(loaded, *want)
    written.survives(loaded, tmp_path / "ours", *want)
    again = written.survives(loaded, tmp_path / "again", *want, format="circuit_tracer")
    assert again[0] == spec and again[2] == meta
    named = {"topk": {"activation": "topk", "k": K}, "relu": {"activation": "relu"}, "jump_relu": {"activation": "jump_relu"}}[kind]
    assert config_of(tmp_path / "again").items() >= named.items()


def test_what_is_on_disk(tmp_path):
    """Exactly the names, shapes and layout that the library's strict loader wants: no k (defect 11), decoder rows contiguous."""
    w = weights(skip=True)
    params = {name: jnp.asarray(value) for name, value in w.items()}
    save_dictionary(tmp_path, TopK(D, N, K, d_out=D, skip=True, rule="raw"), params, META, format="circuit_tracer")
    assert {path.name for path in tmp_path.iterdir()} == {"layer_1.safetensors", "config.yaml"}
    with safetensors.safe_open(str(tmp_path / "layer_1.safetensors"), framework="numpy") as file:
        assert set(file.keys()) == {"W_enc", "W_dec", "b_enc", "b_dec", "W_skip"}
        assert file.get_slice("W_dec").get_shape() == [N, D]
        np.testing.assert_array_equal(file.get_slice("W_dec")[3:5], w["W_dec"][3:5])
    want = CONFIG | {"feature_output_hook": "hook_mlp_out", "activation": "topk", "k": K}
    assert config_of(tmp_path) == want


def test_the_card_survives(tmp_path):
    params = {name: jnp.asarray(value) for name, value in weights().items()}
    save_dictionary(tmp_path, ReLU(D, N, d_out=D), params, META, format="circuit_tracer")
    meta = load_dictionary(tmp_path)[2]
    assert (meta.corruption, meta.input_scale, meta.extra["note"]) == ("rate U[0, 1]", 2.5, "kept")
    assert (meta.site, meta.extra["target"], meta.extra["format"]) == ("mlp_in@1", "mlp_out@1", "circuit_tracer")


def test_an_input_bias_goes_into_the_encoder(tmp_path):
    w = weights() | written.random(3, b_in=(D,))
    spec, params = ReLU(D, N, d_out=D, input_bias=True), {name: jnp.asarray(value) for name, value in w.items()}
    save_dictionary(tmp_path, spec, params, META, format="circuit_tracer")
    loaded = load_dictionary(tmp_path)
    assert loaded[0] == ReLU(D, N, d_out=D)
    w["b_enc"] = np.asarray(w["b_enc"] - w["W_enc"].astype(np.float64) @ w["b_in"])
    written.agree(loaded, *forward(w, "relu"))


@pytest.mark.parametrize("threshold", [0.8, -1.0])
@pytest.mark.parametrize("kind", ["batch_topk", "matryoshka", "jumprelu"])
def test_thresholds(tmp_path, kind, threshold):
    """One threshold becomes one for each latent; a negative one acts like 0 here and must not let negative values through there."""
    w = weights()
    made = {"batch_topk": lambda: BatchTopK(D, N, K, d_out=D), "jumprelu": lambda: JumpReLU(D, N, d_out=D)}
    made["matryoshka"] = lambda: Matryoshka(D, N, K, d_out=D)
    spec = made[kind]()
    params = {name: jnp.asarray(value) for name, value in w.items()}
    params["threshold"] = jnp.full((N,) if kind == "jumprelu" else (), threshold, jnp.float32)
    save_dictionary(tmp_path, spec, params, META, format="circuit_tracer")
    loaded = load_dictionary(tmp_path)
    assert loaded[0] == JumpReLU(D, N, d_out=D)
    with safetensors.safe_open(str(tmp_path / "layer_1.safetensors"), framework="numpy") as file:
        there = file.get_tensor("activation_function.threshold")
    want = forward(w | {"activation_function.threshold": there}, "jump_relu")
    written.agree(loaded, *want)
    codes = spec.encode(params, jnp.asarray(X))
    np.testing.assert_allclose(spec.dense(codes), want[0], atol=1e-5)


def test_one_call_adds_one_layer(tmp_path):
    spec = ReLU(D, N, d_out=D)
    for layer in (0, 1, 2, 1):
        params = {name: jnp.asarray(value) for name, value in weights(seed=10 + layer).items()}
        meta = DictionaryMeta(model="m", site=f"mlp_in@{layer}", layer=layer, extra={"target": f"mlp_out@{layer}"})
        save_dictionary(tmp_path, spec, params, meta, format="circuit_tracer")
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == [f"layer_{i}.safetensors" for i in range(3)]
    for layer in range(3):
        written.agree(load_dictionary(tmp_path, f"layer_{layer}.safetensors"), *forward(weights(seed=10 + layer), "relu"))
        written.agree(load_dictionary(tmp_path / f"layer_{layer}.safetensors"), *forward(weights(seed=10 + layer), "relu"))
    with pytest.raises(UserError, match="holds 3 dictionaries; give one of its files: layer_0.safetensors, layer_1"):
        load_dictionary(tmp_path)


def test_a_set_of_others_keeps_what_it_says(tmp_path):
    """Keys that are not ours stay, so does another name of the same hook; where no activation is named, the weights say it."""
    write(tmp_path, {0: weights("jump_relu"), 2: weights()}, scan="somebody/scan")
    before = config_of(tmp_path)
    params = {name: jnp.asarray(value) for name, value in weights(seed=4).items()}
    save_dictionary(tmp_path, ReLU(D, N, d_out=D), params, META, format="circuit_tracer")
    assert config_of(tmp_path) == before
    written.agree(load_dictionary(tmp_path, "layer_1.safetensors"), *forward(weights(seed=4), "relu"))
    written.agree(load_dictionary(tmp_path, "layer_0.safetensors"), *forward(weights("jump_relu"), "jump_relu"))
    with pytest.raises(UserError, match="its layers have activation None, this one has 'topk'"):
        save_dictionary(tmp_path, TopK(D, N, K, d_out=D, rule="raw"), params, META, format="circuit_tracer")


def test_replacing_the_only_layer_starts_the_set_anew(tmp_path):
    params = {name: jnp.asarray(value) for name, value in weights().items()}
    save_dictionary(tmp_path, TopK(D, N, K, d_out=D, rule="raw"), params, META, format="circuit_tracer")
    save_dictionary(tmp_path, ReLU(D, N, d_out=D), params, META, format="circuit_tracer")
    assert "k" not in config_of(tmp_path)
    written.agree(load_dictionary(tmp_path), *forward(weights(), "relu"))


@pytest.mark.parametrize(
    ("spec", "change", "says"),
    [
        (ReLU(D, N + 1, d_out=D), {}, "has 20 latents of width 6, this layer 21 of 6"),
        (TopK(D, N, K, d_out=D, rule="raw"), {}, "activation 'relu', this one has 'topk'"),
        (ReLU(D, N, d_out=D), {"model": "other"}, "model_name 'm', this one has 'other'"),
        (ReLU(D, N, d_out=D), {"site": "resid_mid@1"}, "feature_input_hook 'mlp.hook_in', this one has 'hook_resid_mid'"),
        (ReLU(D, N, d_out=D), {"weight_processing": "folded"}, "this one has 'ln2.hook_normalized'"),
    ],
)
def test_a_layer_that_does_not_fit_the_set(tmp_path, spec, change, says):
    meta = {"model": "m", "site": "mlp_in@0", "layer": 0, "extra": {"target": "mlp_out@0"}}
    params = {name: jnp.asarray(value) for name, value in weights().items()}
    save_dictionary(tmp_path, ReLU(D, N, d_out=D), params, DictionaryMeta(**meta), format="circuit_tracer")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    new = meta | {"site": "mlp_in@1", "layer": 1, "extra": {"target": "mlp_out@1"}} | change
    params = {name: jnp.zeros(shape) for name, shape in spec.shapes().items()}
    with pytest.raises(UserError, match=says):
        save_dictionary(tmp_path, spec, params, DictionaryMeta(**new), format="circuit_tracer")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("spec", "change", "says"),
    [
        (ReLU(D, N), {}, "holds transcoders from d to d"),
        (ReLU(D, N, d_out=D + 1), {}, "holds transcoders from d to d"),
        (ReLU(D, N, d_out=D, row_norm="layer_norm"), {}, "without row_norm"),
        (TopK(D, N, K, d_out=D), {}, "no TopK with rule='positive'"),
        (Gated(D, N, d_out=D), {}, "no Gated"),
        (Binary(D, N, d_out=D), {}, "no Binary"),
        (ReLU(D, N, d_out=D), {"site": "resid_post@1"}, "this one reads resid_post@1"),
        (ReLU(D, N, d_out=D), {"site": "resid_mid@1", "weight_processing": "folded"}, "reads resid_mid@1 .folded."),
        (ReLU(D, N, d_out=D), {"extra": {}}, "writes None"),
        (ReLU(D, N, d_out=D), {"extra": {"target": "mlp_out@2"}}, "writes mlp_out@2"),
        (ReLU(D, N, d_out=D), {"layer": 2}, "reads mlp_in@1"),
        (ReLU(D, N, d_out=D), {"scale_folded": False, "input_scale": 2.0}, "fold it first"),
    ],
)
def test_what_cannot_be_said(tmp_path, spec, change, says):
    meta = {"model": "m", "site": "mlp_in@1", "layer": 1, "extra": {"target": "mlp_out@1"}} | change
    params = {name: jnp.zeros(shape) for name, shape in spec.shapes().items()}
    with pytest.raises(UserError, match=says):
        save_dictionary(tmp_path, spec, params, DictionaryMeta(**meta), format="circuit_tracer")
    assert not list(tmp_path.iterdir())


def test_a_k_in_the_weights_is_read(tmp_path):
    """The library's own to_safetensors writes one."""
    w = weights()
    folder = write(tmp_path / "a", {0: w | {"k": np.array(K)}})
    written.agree(load_dictionary(folder), *forward(w, "topk"))
    with pytest.raises(UserError, match=f"k is 7 here and {K}.0 in layer_0.safetensors"):
        load_dictionary(write(tmp_path / "b", {0: w | {"k": np.array(K)}}, activation="topk", k=7))


def test_hooks(tmp_path):
    folder = write(tmp_path / "a", {2: weights()}, feature_input_hook="ln2.hook_normalized", feature_output_hook="hook_mlp_out")
    meta = load_dictionary(folder)[2]
    assert (meta.site, meta.weight_processing, meta.extra["target"]) == ("mlp_in@2", "folded", "mlp_out@2")
    meta = load_dictionary(write(tmp_path / "b", {2: weights()}, feature_input_hook="hook_resid_mid"))[2]
    assert (meta.site, meta.weight_processing) == ("resid_mid@2", "raw")
    meta = load_dictionary(write(tmp_path / "c", {2: weights()}, model_name="google/gemma-2-2b"))[2]
    assert meta.extra["target"] == "mlp_raw@2"  # before the norm that Gemma has there
    meta = load_dictionary(write(tmp_path / "d", {2: weights()}, feature_input_hook="hook_strange"))[2]
    assert (meta.site, meta.layer) == ("blocks.2.hook_strange", 2)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_kind": "crosscoder"}, "model_kind 'crosscoder' is not read"),
        ({"activation": "gelu"}, "activation 'gelu' is not read"),
        ({"activation": "topk"}, "topk needs one whole number"),
        ({"activation": "topk", "k": True}, "topk needs one whole number"),
        ({"activation": "topk", "k": 2.5}, "topk needs one whole number"),
        ({"activation": "topk", "k": float("inf")}, "topk needs one whole number"),
        ({"activation": "topk", "k": N + 1}, "more than the 20 latents"),
        ({"activation": "jump_relu"}, "threshold is missing"),
    ],
)
def test_refused(tmp_path, config, says):
    with pytest.raises(UserError, match=says):
        load_dictionary(write(tmp_path / "set", {0: weights()}, **config))


def test_negative_thresholds_are_refused(tmp_path):
    w = weights("jump_relu")
    w["activation_function.threshold"][0] = -0.5
    with pytest.raises(UserError, match="negative thresholds"):
        load_dictionary(write(tmp_path, {0: w}))


def test_weights_elsewhere(tmp_path):
    write(tmp_path, {}, transcoders=["hf://someone/set/layer_0.safetensors"])
    with pytest.raises(UserError, match="its weights lie at hf://someone/set/layer_0.safetensors"):
        load_dictionary(tmp_path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: [", "not YAML"),
        ("- 1", "should be a mapping"),
        ("!!python/object/apply:os.system ['touch ran']", "not YAML"),
        ("a: &a [1, 1]\nb: [*a, *a]\nmodel_kind: transcoder_set", "YAML aliases"),
        ("[" * 1200, "not YAML"),
        ("#" * 2**19, "longer than any"),
        ("model_name: m\n1: 2\nk: !!int '9'\nactivation: {a: b}", "is not read"),
    ],
)
def test_strange_configurations(tmp_path, monkeypatch, text, says):
    monkeypatch.chdir(tmp_path)
    folder = write(tmp_path / "set", {0: weights()})
    (folder / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=says):
        load_dictionary(folder)
    assert not (tmp_path / "ran").exists()
