"""Every class of dictionary_learning against a forward pass written from its semantics in NumPy float64, in both directions."""

import json
from collections import OrderedDict
from dataclasses import replace
from itertools import accumulate

import jax.numpy as jnp
import numpy as np
import pytest

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
from dlmscope_jax.dictionaries.formats import torch_pickle
from dlmscope_jax.errors import UserError

D, N, K = 6, 20, 3
X = np.random.default_rng(5).normal(size=(9, D)).astype(np.float32) * 2 + 0.5
META = DictionaryMeta(model="gpt2", site="mlp_out@3", layer=3, corruption="rate U[0, 1]", select="masked", input_scale=2.5, seed=1, steps=9)
GROUPS = (5, 7, 8)
LINEAR = {"encoder.weight": (N, D), "encoder.bias": (N,), "decoder.weight": (D, N)}
PLAIN = {"W_enc": (D, N), "b_enc": (N,), "W_dec": (N, D), "b_dec": (D,)}
GATED = {"decoder_bias": (D,), "encoder.weight": (N, D), "r_mag": (N,), "gate_bias": (N,), "mag_bias": (N,), "decoder.weight": (D, N)}
SHAPES = {
    "AutoEncoder": {"bias": (D,)} | LINEAR,
    "AutoEncoderNew": LINEAR | {"decoder.bias": (D,)},
    "GatedAutoEncoder": GATED,
    "AutoEncoderTopK": {"b_dec": (D,)} | LINEAR,
    "BatchTopKSAE": {"b_dec": (D,)} | LINEAR,
    "JumpReluAutoEncoder": PLAIN | {"threshold": (N,)},
    "MatryoshkaBatchTopKSAE": PLAIN,
}
KINDS = {"AutoEncoder": ReLU, "AutoEncoderNew": ReLU, "GatedAutoEncoder": Gated, "AutoEncoderTopK": TopK, "BatchTopKSAE": BatchTopK}
KINDS |= {"JumpReluAutoEncoder": JumpReLU, "MatryoshkaBatchTopKSAE": Matryoshka}
SELECTING = ("AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE")


def state(name, threshold=0.7, seed=0):
    """Random weights under the class's names and in its layouts."""
    rng = np.random.default_rng(seed)
    out = OrderedDict((key, rng.normal(size=shape).astype(np.float32)) for key, shape in SHAPES[name].items())
    if name == "JumpReluAutoEncoder":
        out["threshold"] = np.abs(out["threshold"])
    if name in SELECTING:
        out |= {"k": np.array(K, np.int32), "threshold": np.array(threshold, np.float32)}
    if name == "MatryoshkaBatchTopKSAE":
        out["group_sizes"] = np.array(GROUPS, np.int64)
    return out


def config(name, **more):
    trainer = {"trainer_class": "SomeTrainer", "dict_class": name, "activation_dim": D, "dict_size": N, "steps": 500, "seed": 7}
    trainer |= {"layer": 4, "lm_name": "EleutherAI/pythia-70m-deduped", "submodule_name": None} | ({"k": K} if name in SELECTING else {})
    return {"trainer": trainer | more, "buffer": {"d_submodule": D}}


def write(folder, cfg, contents):
    folder.mkdir(parents=True, exist_ok=True)
    torch_pickle.save(folder / "ae.pt", contents)
    (folder / "config.json").write_text(json.dumps(cfg))
    return folder


def forward(name, found, x):
    """dictionary_learning: what each class computes by default."""
    t, x = {key: np.asarray(value).astype(np.float64) for key, value in found.items()}, x.astype(np.float64)
    relu = lambda a: np.maximum(a, 0)  # noqa: E731
    if name == "AutoEncoder":
        acts = relu((x - t["bias"]) @ t["encoder.weight"].T + t["encoder.bias"])
        return acts, acts @ t["decoder.weight"].T + t["bias"]
    if name == "AutoEncoderNew":
        acts = relu(x @ t["encoder.weight"].T + t["encoder.bias"])
        return acts, acts @ t["decoder.weight"].T + t["decoder.bias"]
    if name == "GatedAutoEncoder":
        product = (x - t["decoder_bias"]) @ t["encoder.weight"].T
        acts = (product + t["gate_bias"] > 0) * relu(np.exp(t["r_mag"]) * product + t["mag_bias"])
        return acts, acts @ t["decoder.weight"].T + t["decoder_bias"]
    if name == "JumpReluAutoEncoder":
        pre = x @ t["W_enc"] + t["b_enc"]
        acts = relu(pre * (pre > t["threshold"]))
        return acts, acts @ t["W_dec"] + t["b_dec"]
    if name == "MatryoshkaBatchTopKSAE":
        acts = relu((x - t["b_dec"]) @ t["W_enc"] + t["b_enc"])
        acts = acts * (acts > t["threshold"])
        return acts, acts @ t["W_dec"] + t["b_dec"]
    acts = relu((x - t["b_dec"]) @ t["encoder.weight"].T + t["encoder.bias"])
    if name == "BatchTopKSAE":
        acts = acts * (acts > t["threshold"])
    else:
        acts = np.where(acts >= np.sort(acts, axis=1)[:, [-K]], acts, 0)
    return acts, acts @ t["decoder.weight"].T + t["b_dec"]


def same_function(loaded, acts, y, x=X):
    spec, params, _ = loaded
    assert all(value.dtype == jnp.float32 for value in params.values())
    codes = spec.encode(params, jnp.asarray(x))
    assert (acts != 0).any() and (acts == 0).any()
    np.testing.assert_allclose(spec.dense(codes), acts, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(spec.decode(params, codes), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "threshold"), [(name, 0.7) for name in SHAPES] + [(name, t) for name in SELECTING for t in (0.0, -1.0)])
def test_each_class(tmp_path, name, threshold):
    """Read, written again and read again, it computes what the class does by default, a threshold of -1 included."""
    found = state(name, threshold)
    acts, y = forward(name, found, X)
    loaded = spec, _, meta = load_dictionary(write(tmp_path / "theirs", config(name), found))
    assert type(spec) is KINDS[name] and (spec.d_in, spec.width) == (D, N)
    same_function(loaded, acts, y)
    assert (meta.model, meta.site, meta.layer, meta.seed, meta.steps) == ("EleutherAI/pythia-70m-deduped", "resid_post@4", 4, 7, 500)
    unset = threshold < 0 and name != "AutoEncoderTopK"
    assert meta.extra.get("threshold", threshold) == pytest.approx(threshold) and ("reading" in meta.extra) == (unset and name in SELECTING)
    save_dictionary(tmp_path / "ours", *loaded, format="dictionary_learning")
    again = load_dictionary(tmp_path / "ours")
    same_function(again, acts, y)
    assert again[0] == spec
    if threshold:  # 0 means here that none was measured
        assert again[2].extra.get("threshold") == meta.extra.get("threshold")


@pytest.mark.parametrize("name", SHAPES)
def test_a_file_saved_during_training(tmp_path, name):
    """Biases and thresholds are not yet in units of the rows; on raw rows it must do what it does in training on rows / scale."""
    scale, found = 3.5, state(name)
    contents = {"step": 100, "ae": found, "optimizer": {"state": {}}, "config": {}, "norm_factor": scale}
    acts, y = forward(name, found, X)
    spec, params, meta = load_dictionary(write(tmp_path, config(name), contents))
    same_function((spec, params, meta), acts * scale, y * scale, X * np.float32(scale))
    assert meta.input_scale == scale and meta.scale_folded and meta.steps == 100
    if name in SELECTING:
        assert meta.extra["threshold"] == pytest.approx(0.7 * scale)


def test_a_threshold_that_was_never_measured_stays_so_when_folded(tmp_path):
    found = state("BatchTopKSAE", -1.0)
    contents = {"step": 100, "ae": found, "norm_factor": 2.0}
    _, params, meta = load_dictionary(write(tmp_path, config("BatchTopKSAE"), contents))
    assert float(params["threshold"]) == 0.0 and meta.extra["threshold"] == -1.0


def test_a_checkpoint_beside_the_finished_file(tmp_path):
    write(tmp_path / "trainer_0", config("BatchTopKSAE"), state("BatchTopKSAE"))
    earlier = state("BatchTopKSAE", seed=9)
    (tmp_path / "trainer_0" / "checkpoints").mkdir()
    torch_pickle.save(tmp_path / "trainer_0" / "checkpoints" / "ae_100.pt", earlier)
    same_function(load_dictionary(tmp_path / "trainer_0" / "checkpoints" / "ae_100.pt"), *forward("BatchTopKSAE", earlier, X))
    same_function(load_dictionary(tmp_path / "trainer_0" / "ae.pt"), *forward("BatchTopKSAE", state("BatchTopKSAE"), X))


def test_decoder_norms_are_free_where_training_left_them_so(tmp_path):
    for trainer, weighted in (("StandardTrainerAprilUpdate", True), ("StandardTrainer", False)):
        loaded = load_dictionary(write(tmp_path / trainer, config("AutoEncoder", trainer_class=trainer), state("AutoEncoder")))
        assert loaded[0] == ReLU(D, N, norm_weighted=weighted)
        save_dictionary(tmp_path / trainer / "again", *loaded, format="dictionary_learning")
        assert json.loads((tmp_path / trainer / "again" / "config.json").read_text())["trainer"]["trainer_class"] == trainer


def test_matryoshka_groups(tmp_path):
    spec = load_dictionary(write(tmp_path, config("MatryoshkaBatchTopKSAE"), state("MatryoshkaBatchTopKSAE")))[0]
    assert spec.prefixes == tuple(accumulate(GROUPS)) and spec.k == K
    for sizes, says in (
        (np.array([5, 7], np.int64), "must ascend to the width 20"),
        (np.array([25, -5], np.int64), "must ascend"),
        (np.ones(3, np.float32), "holds float32, should hold whole numbers"),
        (np.ones((2, 2), np.int64), "should be a short list"),
    ):
        write(tmp_path, config("MatryoshkaBatchTopKSAE"), state("MatryoshkaBatchTopKSAE") | {"group_sizes": sizes})
        with pytest.raises(UserError, match=says):
            load_dictionary(tmp_path)


@pytest.mark.parametrize(
    ("submodule", "site"),
    [
        ("resid_post_layer_9", "resid_post@9"),
        ("mlp_out_layer_9", "mlp_out@9"),
        ("gpt_neox.layers.9", "resid_post@9"),
        ("model.layers.9.mlp", "mlp_out@9"),
        ("blocks.9.hook_resid_mid", "resid_mid@9"),
        ("something", "resid_post@4"),
    ],
)
def test_submodules(tmp_path, submodule, site):
    meta = load_dictionary(write(tmp_path, config("AutoEncoder", submodule_name=submodule), state("AutoEncoder")))[2]
    assert (meta.site, meta.layer) == (site, int(site[-1]))


@pytest.mark.parametrize("name", [n for n in SHAPES if n != "AutoEncoderTopK"])
def test_other_tensors_are_refused(tmp_path, name):
    first = next(iter(SHAPES[name]))
    found = state(name)
    for change, says in (
        ({first: np.zeros(3, np.float32)}, r"\[3\], should be|is missing or is not a matrix"),
        ({first: np.full(SHAPES[name][first], np.nan, np.float32)}, f"{first} holds NaN"),
        ({"more": np.zeros(2, np.float32)}, "more is unexpected"),
    ):
        write(tmp_path, config(name), found | change)
        with pytest.raises(UserError, match=says):
            load_dictionary(tmp_path)
    write(tmp_path, config(name), OrderedDict((key, value) for key, value in found.items() if key != first))
    with pytest.raises(UserError, match="is missing"):
        load_dictionary(tmp_path)


def params_of(spec, seed=3):
    rng = np.random.default_rng(seed)
    out = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in spec.shapes().items()}
    return out | ({"threshold": jnp.abs(out["threshold"])} if "threshold" in out else {})


OURS = [
    (ReLU(D, N), "AutoEncoder"),
    (ReLU(D, N, norm_weighted=True), "AutoEncoder"),
    (ReLU(D, N, subtract=False), "AutoEncoderNew"),
    (Gated(D, N), "GatedAutoEncoder"),
    (Gated(D, N, subtract=False), "GatedAutoEncoder"),
    (TopK(D, N, K), "AutoEncoderTopK"),
    (TopK(D, N, K, subtract=False), "AutoEncoderTopK"),
    (BatchTopK(D, N, K), "BatchTopKSAE"),
    (BatchTopK(D, N, K, subtract=False), "BatchTopKSAE"),
    (Matryoshka(D, N, K, prefixes=(5, N)), "MatryoshkaBatchTopKSAE"),
    (Matryoshka(D, 64, K), "MatryoshkaBatchTopKSAE"),
    (JumpReLU(D, N), "JumpReluAutoEncoder"),
    (JumpReLU(D, N, subtract=False), "JumpReluAutoEncoder"),
]


@pytest.mark.parametrize(("spec", "name"), OURS, ids=[f"{type(s).__name__}-{i}" for i, (s, _) in enumerate(OURS)])
def test_what_is_written(tmp_path, spec, name):
    """The files on disk, read without our reader of the format, compute what the dictionary does."""
    params = params_of(spec)
    save_dictionary(tmp_path, spec, params, META, format="dictionary_learning")
    cfg = json.loads((tmp_path / "config.json").read_text())
    with torch_pickle.TorchFile(tmp_path / "ae.pt") as file:
        found = {key: file.read(value, key) for key, value in file.contents.items()}
    assert cfg["trainer"]["dict_class"] == name and found.keys() == state(name).keys()
    if isinstance(spec, Matryoshka):
        assert found["group_sizes"].dtype == np.int64 and tuple(accumulate(found["group_sizes"].tolist())) == spec.nested
    same_function((spec, params, META), *forward(name, found, X))
    got = load_dictionary(tmp_path)
    same_function(got, *forward(name, found, X))
    assert replace(got[2], extra={}) == META


@pytest.mark.parametrize("kind", [BatchTopK, Matryoshka])
def test_an_unmeasured_threshold_is_written_as_unset(tmp_path, kind):
    spec = kind(D, N, K)
    save_dictionary(tmp_path, spec, params_of(spec) | {"threshold": jnp.zeros(())}, META, format="dictionary_learning")
    with torch_pickle.TorchFile(tmp_path / "ae.pt") as file:
        assert float(file.read(file.contents["threshold"])) == -1.0


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (ReLU(D, N, d_out=D), "a transcoder"),
        (TopK(D, N, K, rule="magnitude"), "rule 'magnitude'"),
        (JumpReLU(D, N, row_norm="layer_norm"), "row_norm='layer_norm'"),
        (Binary(D, N), "a Binary dictionary"),
    ],
)
def test_what_cannot_be_written(tmp_path, spec, says):
    with pytest.raises(UserError, match=f"the dictionary_learning format cannot say .*{says}"):
        save_dictionary(tmp_path / "a", spec, params_of(spec), META, format="dictionary_learning")
    assert not (tmp_path / "a").exists()


def test_a_dictionary_goes_through_every_format(tmp_path):
    """One that all formats can say comes back with the same function, the last as the first."""
    name, found = "AutoEncoderTopK", state("AutoEncoderTopK")
    acts, y = forward(name, found, X)
    loaded = load_dictionary(write(tmp_path / "theirs", config(name), found))
    for format in ("saelens", "sparsify", "dlmscope", "dictionary_learning", "sparsify", "saelens"):
        folder = tmp_path / format / str(len(list(tmp_path.iterdir())))
        save_dictionary(folder, *loaded, format=format)
        loaded = load_dictionary(folder)
        same_function(loaded, acts, y)
        assert (loaded[2].site, loaded[2].model, loaded[2].seed) == ("resid_post@4", "EleutherAI/pythia-70m-deduped", 7)
