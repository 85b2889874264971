"""circuit-tracer's cross-layer transcoders, read and written, against a forward pass written from their semantics."""

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import yaml

from dlmscope_jax.dictionaries import CrossLayer, DictionaryMeta, ReLU, load_dictionary, save_dictionary
from dlmscope_jax.errors import UserError

from . import written

L, D, N = 3, 6, 8
X = (np.random.default_rng(5).normal(size=(9, L * D)) + 0.2).astype(np.float32)
CONFIG = {
    "model_name": "google/gemma-3-270m",
    "model_kind": "cross_layer_transcoder",
    "feature_input_hook": "hook_resid_mid",
    "feature_output_hook": "hook_mlp_out",
}
META = DictionaryMeta(
    model="m", site="mlp_in@0+mlp_in@1+mlp_in@2", layer=0, corruption="none", extra={"target": "mlp_out@0+mlp_out@1+mlp_out@2"}
)


def weights(activation="relu", layers=L):
    found = {}
    for i in range(layers):
        found |= written.random(i, **{f"W_enc_{i}": (N, D), f"b_enc_{i}": (N,), f"b_dec_{i}": (D,), f"W_dec_{i}": (N, layers - i, D)})
        if activation == "jumprelu":
            found[f"threshold_{i}"] = np.random.default_rng(i).uniform(0.1, 1, N).astype(np.float32)
    return found


def write(folder, w, layers=L, **config):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(layers):
        mine = {name: value for name, value in w.items() if name.endswith(f"_{i}")}
        decoder = {f"W_dec_{i}": mine.pop(f"W_dec_{i}")}
        safetensors.numpy.save_file(mine, str(folder / f"W_enc_{i}.safetensors"))
        safetensors.numpy.save_file(decoder, str(folder / f"W_dec_{i}.safetensors"))
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG | config))
    return folder


def forward(w):
    """Layer by layer in float64; nothing is subtracted."""
    w, x = written.float64(w), X.astype(np.float64).reshape(-1, L, D)
    f, y = [], [w[f"b_dec_{m}"] for m in range(L)]
    for i in range(L):
        pre = x[:, i] @ w[f"W_enc_{i}"].T + w[f"b_enc_{i}"]
        f.append(pre * (pre > w.get(f"threshold_{i}", 0.0)))
        for m in range(i, L):
            y[m] = y[m] + f[i] @ w[f"W_dec_{i}"][:, m - i, :]
    return np.concatenate(f, axis=1), np.concatenate(y, axis=1)


def params_of(spec):
    return {name: jnp.asarray(value) for name, value in written.random(3, **spec.shapes()).items()}


@pytest.mark.parametrize("activation", ["relu", "jumprelu"])
def test_forward(tmp_path, activation):
    w = weights(activation)
    folder = write(tmp_path / "clt", w)
    loaded = load_dictionary(folder)
    spec, _, meta = loaded
    assert spec == CrossLayer(L * D, L * N, L, L * D, activation)
    assert (meta.model, meta.layer, meta.weight_processing) == ("google/gemma-3-270m", 0, "raw")
    assert (meta.site, meta.target) == ("resid_mid@0+resid_mid@1+resid_mid@2", "mlp_out@0+mlp_out@1+mlp_out@2")
    written.agree(loaded, *forward(w), x=X)
    save_dictionary(tmp_path / "again", *loaded, format="circuit_tracer_clt")
    again = load_dictionary(tmp_path / "again")
    assert again[0] == spec and again[2] == meta
    written.agree(again, *forward(w), x=X)
    assert load_dictionary(folder / "W_enc_1.safetensors")[0] == spec  # one file stands for all
    assert yaml.safe_load((tmp_path / "again" / "config.yaml").read_text()) == CONFIG


def test_what_is_on_disk(tmp_path):
    """Exactly the names, shapes and layout that the library reads, decoder rows contiguous; no threshold below 0; the card beside it."""
    spec = CrossLayer(L * D, L * N, L, L * D)
    params = params_of(spec)
    assert bool((params["threshold"] < 0).any())
    save_dictionary(tmp_path, spec, params, META, format="circuit_tracer_clt")
    names = {f"W_{side}_{i}.safetensors" for side in ("enc", "dec") for i in range(L)}
    assert {path.name for path in tmp_path.iterdir()} == names | {"config.yaml"}
    for i in range(L):
        encoder = safetensors.numpy.load_file(tmp_path / f"W_enc_{i}.safetensors")
        decoder = safetensors.numpy.load_file(tmp_path / f"W_dec_{i}.safetensors")
        assert {name: value.shape for name, value in (encoder | decoder).items()} == {
            f"W_enc_{i}": (N, D), f"b_enc_{i}": (N,), f"b_dec_{i}": (D,), f"threshold_{i}": (N,), f"W_dec_{i}": (N, L - i, D)
        }  # fmt: skip
        np.testing.assert_array_equal(decoder[f"W_dec_{i}"], params[f"W_dec_{i}"])
        np.testing.assert_array_equal(encoder[f"W_enc_{i}"], params["W_enc"][i * N : (i + 1) * N])
        np.testing.assert_array_equal(encoder[f"threshold_{i}"], np.maximum(params["threshold"][i * N : (i + 1) * N], 0))
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert config == CONFIG | {"model_name": "m", "feature_input_hook": "mlp.hook_in"}
    meta = load_dictionary(tmp_path)[2]
    assert (meta.corruption, meta.site, meta.target) == ("none", META.site, META.target)


def test_a_taller_one_is_replaced(tmp_path):
    write(tmp_path, weights(layers=4), layers=4)
    spec = CrossLayer(L * D, L * N, L, L * D, "relu")
    save_dictionary(tmp_path, spec, params_of(spec), META, format="circuit_tracer_clt")
    assert load_dictionary(tmp_path)[0] == spec
    assert len(list(tmp_path.glob("*.safetensors"))) == 2 * L


def test_sets_and_cross_layer_transcoders_do_not_share_a_folder(tmp_path):
    spec = CrossLayer(L * D, L * N, L, L * D)
    single = DictionaryMeta(model="m", site="mlp_in@0", layer=0, extra={"target": "mlp_out@0"})
    save_dictionary(tmp_path / "a", spec, params_of(spec), META, format="circuit_tracer_clt")
    with pytest.raises(UserError, match="holds a cross-layer transcoder"):
        save_dictionary(tmp_path / "a", ReLU(D, N, d_out=D), params_of(ReLU(D, N, d_out=D)), single, format="circuit_tracer")
    save_dictionary(tmp_path / "b", ReLU(D, N, d_out=D), params_of(ReLU(D, N, d_out=D)), single, format="circuit_tracer")
    with pytest.raises(UserError, match="holds circuit-tracer's per-layer transcoders"):
        save_dictionary(tmp_path / "b", spec, params_of(spec), META, format="circuit_tracer_clt")


@pytest.mark.parametrize(
    ("spec", "change", "says"),
    [
        (ReLU(D, N, d_out=D), {}, "not this ReLU with d_in=6, d_out=6"),
        (CrossLayer(L * D, L * N, L, L * 5), {}, "not this CrossLayer with d_in=18, d_out=15"),
        (CrossLayer(L * D, L * N, L, L * D), {"site": "mlp_in@1+mlp_in@2+mlp_in@3"}, "this one reads mlp_in@1"),
        (CrossLayer(L * D, L * N, L, L * D), {"site": "resid_post@0+resid_post@1+resid_post@2"}, "this one reads resid_post"),
        (CrossLayer(L * D, L * N, L, L * D), {"extra": {}}, "writes None"),
        (CrossLayer(L * D, L * N, L, L * D), {"scale_folded": False, "input_scale": 2.0}, "fold it first"),
    ],
)
def test_what_cannot_be_said(tmp_path, spec, change, says):
    meta = {"model": "m", "site": META.site, "layer": 0, "extra": {"target": META.target}} | change
    with pytest.raises(UserError, match=says):
        save_dictionary(tmp_path, spec, params_of(spec), DictionaryMeta(**meta), format="circuit_tracer_clt")
    assert not list(tmp_path.iterdir())


def test_refused(tmp_path):
    def without(name):
        return {key: value for key, value in weights("jumprelu").items() if key != name}

    for i, (w, says) in enumerate(
        (
            (without("b_enc_1"), "b_enc_1 is missing; should hold W_enc_1 [8, 6], b_enc_1 [8], b_dec_1 [6], threshold_1 [8]"),
            (without("threshold_0"), "W_enc_1.safetensors: threshold_1 is unexpected"),
            (weights() | {"W_dec_1": np.zeros((N, L, D), np.float32)}, "W_dec_1 is [8, 3, 6]; should hold W_dec_1 [8, 2, 6]"),
            (weights() | {"W_skip_0": np.zeros((D, D), np.float32)}, "W_enc_0.safetensors: has a skip connection"),
            (weights() | {"threshold_0": -np.ones(N, np.float32)} | {f"threshold_{j}": np.ones(N, np.float32) for j in (1, 2)}, "negative"),
            (weights() | {"W_dec_2": np.full((N, 1, D), np.nan, np.float32)}, "W_dec_2 holds NaN"),
        )
    ):
        with pytest.raises(UserError) as caught:
            load_dictionary(write(tmp_path / str(i), w))
        assert says in str(caught.value) and "\n" not in str(caught.value)
    folder = write(tmp_path / "gap", weights())
    (folder / "W_dec_1.safetensors").unlink()
    with pytest.raises(UserError, match="W_dec_1.safetensors: no such file"):
        load_dictionary(folder)
    (folder / "W_enc_1.safetensors").unlink()
    with pytest.raises(UserError, match="should hold W_enc_0.safetensors and those of all layers above it"):
        load_dictionary(folder)
