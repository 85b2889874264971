"""Folders of dictionaries: round trips, the released layout against an independent torch forward, damage, contradictions."""

import json
import os
import sys
from collections import OrderedDict

import jax.numpy as jnp
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
from dlmscope_jax.dictionaries.files import write_whole
from dlmscope_jax.dictionaries.formats import torch_pickle
from dlmscope_jax.dictionaries.meta import meta_from_mapping, meta_to_mapping
from dlmscope_jax.errors import UserError

D, N, K = 6, 20, 3
SPEC = TopK(D, N, K)
META = DictionaryMeta(
    model="pocket-dlm",
    site="resid_post@3",
    layer=3,
    model_identity="abc",
    weight_processing="folded",
    corruption="rate U[0.05, 1.0]",
    tokenizer="0" * 64,
    select="masked",
    input_scale=12.5,
    seed=1,
    steps=400,
    extra={"note": [1, {"a": None}]},
)
TRAINER = {"trainer_class": "TopKTrainer", "dict_class": "AutoEncoderTopK", "activation_dim": D, "dict_size": N, "k": K, "steps": 73242}
TRAINER |= {"layer": 10, "lm_name": "Dream-org/Dream-v0-Base-7B", "submodule_name": "resid_post_layer_10", "seed": 3407, "device": "cuda:0"}
BUFFER = {"d_submodule": D, "refresh_batch_size": 8, "dlm_mask_policy": "mask", "dlm_t_min": 0.05, "dlm_t_max": 0.5}


def random_params(spec, seed=0):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in spec.shapes().items()}


PARAMS = random_params(SPEC)
X = np.random.default_rng(5).normal(size=(9, D)).astype(np.float32)


def same(got, want):
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].dtype == jnp.float32
        np.testing.assert_array_equal(got[name], want[name])


def state_dict(**more):
    arrays = {name: np.asarray(value) for name, value in PARAMS.items()}
    state = OrderedDict([("b_dec", arrays["b_dec"]), ("k", np.array(K, np.int32)), ("threshold", np.array(0.25, np.float32))])
    state |= {"decoder.weight": np.ascontiguousarray(arrays["W_dec"].T), "encoder.weight": arrays["W_enc"], "encoder.bias": arrays["b_enc"]}
    return state | more


def released(folder, contents=None, trainer=TRAINER, buffer=BUFFER):
    """The layout of the released DLM-Scope SAEs: resid_post_layer_L/trainer_i/{ae.pt, config.json}."""
    at = folder / "resid_post_layer_10" / "trainer_1"
    at.mkdir(parents=True, exist_ok=True)
    torch_pickle.save(at / "ae.pt", state_dict() if contents is None else contents)
    (at / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": buffer}))
    return at


def forward(arrays, x, k):
    """dictionary_learning's AutoEncoderTopK, written from its training semantics in NumPy float64."""
    pre = np.maximum((x - arrays["b_dec"]) @ arrays["encoder.weight"].astype(np.float64).T + arrays["encoder.bias"], 0)
    code = np.zeros_like(pre)
    for row, values in zip(code, pre, strict=True):
        kept = np.argsort(-values, kind="stable")[:k]
        row[kept] = values[kept]
    return code, code @ arrays["decoder.weight"].T + arrays["b_dec"]


KINDS = [
    SPEC,
    TopK(D, N, K, k_aux=5),
    TopK(D, N, K, d_out=4, skip=True),
    BatchTopK(D, N, K),
    Matryoshka(D, N, K, prefixes=(5, N)),
    JumpReLU(D, N, row_norm="layer_norm"),
    ReLU(D, N, d_out=4, input_bias=True),
    Gated(D, N),
    Binary(D, N),
]


@pytest.mark.parametrize("spec", KINDS, ids=[f"{spec.KIND}-{i}" for i, spec in enumerate(KINDS)])
def test_native_round_trip(tmp_path, spec):
    params = random_params(spec)
    save_dictionary(tmp_path / "a" / "b", spec, params, META)
    got_spec, got_params, got_meta = load_dictionary(tmp_path / "a", "b")
    assert got_spec == spec and got_meta == META
    same(got_params, params)
    assert sorted(os.listdir(tmp_path / "a" / "b")) == ["config.json", "weights.safetensors"]


def test_native_replaces_an_older_one_and_leaves_other_files(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    save_dictionary(tmp_path, SPEC, PARAMS, META)
    newer = random_params(SPEC, 9)
    save_dictionary(tmp_path, SPEC, newer, META)
    same(load_dictionary(tmp_path)[1], newer)
    assert (tmp_path / "metrics.jsonl").exists()


def test_native_notices_damage(tmp_path):
    save_dictionary(tmp_path, SPEC, PARAMS, META)
    weights = tmp_path / "weights.safetensors"
    whole = weights.read_bytes()
    flipped = bytearray(whole)
    flipped[-5] ^= 1
    for damaged in (bytes(flipped), whole[:-8], b""):
        weights.write_bytes(damaged)
        with pytest.raises(UserError, match="SHA-256"):
            load_dictionary(tmp_path)
    weights.unlink()
    with pytest.raises(UserError, match="missing beside config.json"):
        load_dictionary(tmp_path)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_would_fail_without_a_word_is_refused(tmp_path, value):
    for name in PARAMS:
        save_dictionary(tmp_path, SPEC, PARAMS | {name: PARAMS[name].at[(1,) * PARAMS[name].ndim].set(value)}, META)
        with pytest.raises(UserError, match=f"{name} holds NaN or infinity"):
            load_dictionary(tmp_path)


def test_a_latent_may_never_fire(tmp_path):
    spec = JumpReLU(6, 20)
    params = random_params(spec)
    save_dictionary(tmp_path, spec, params | {"threshold": params["threshold"].at[3].set(jnp.inf)}, META)
    got, loaded, _ = load_dictionary(tmp_path)
    assert not bool(got.dense(got.encode(loaded, jnp.ones((5, 6))))[:, 3].any())
    save_dictionary(tmp_path, spec, params | {"threshold": params["threshold"].at[3].set(jnp.nan)}, META)
    with pytest.raises(UserError, match="threshold holds NaN"):
        load_dictionary(tmp_path)


def edited(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.update(extra=1), "unknown key 'extra'"),
        (lambda c: c.pop("meta"), "missing key 'meta'"),
        (lambda c: c.update(version=2), "version 2"),
        (lambda c: c.update(kind="softmax"), "kind 'softmax'"),
        (lambda c: c["dictionary"].update(wdith=3), "wdith: no such field; did you mean 'width'"),
        (lambda c: c["dictionary"].update(k=99), "k = 99 is more than the 20 latents"),
        (lambda c: c["dictionary"].update(width=21), r"W_enc is \[20, 6\], should be \[21, 6\]; W_dec is"),
        (lambda c: c["dictionary"].update(d_out=6, skip=True), "W_skip is missing"),
        (lambda c: c["meta"].update(layer="3"), "layer: '3' is a text, should be a whole number"),
        (lambda c: c["meta"].update(select="most"), "select: 'most', should be one of"),
        (lambda c: c["meta"].update(sit="x"), "sit: no such field"),
        (lambda c: c["meta"].pop("model"), "model: missing"),
    ],
)
def test_native_is_strict(tmp_path, change, says):
    save_dictionary(tmp_path, SPEC, PARAMS, META)
    edited(tmp_path, change)
    with pytest.raises(UserError, match=says):
        load_dictionary(tmp_path)


def test_native_refuses_parameters_that_do_not_fit(tmp_path):
    with pytest.raises(UserError, match=r"b_enc is missing; more is unexpected; b_dec is \[3\], should be \[6\]"):
        bad = {**{n: v for n, v in PARAMS.items() if n != "b_enc"}, "b_dec": jnp.zeros(3), "more": jnp.zeros(1)}
        save_dictionary(tmp_path / "new", SPEC, bad, META)
    assert not (tmp_path / "new").exists()


def test_released_layout_equals_the_training_forward(tmp_path):
    released(tmp_path)
    spec, params, meta = load_dictionary(tmp_path, "resid_post_layer_10/trainer_1")
    assert spec == SPEC
    same(params, PARAMS)
    code, y = forward(state_dict(), X, K)
    codes = spec.encode(params, jnp.asarray(X))
    np.testing.assert_allclose(spec.dense(codes), code, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(spec.decode(params, codes), y, rtol=1e-4, atol=1e-5)
    assert (meta.model, meta.site, meta.layer, meta.select) == ("Dream-org/Dream-v0-Base-7B", "resid_post@10", 10, "masked")
    assert meta.corruption == "batch_rate U[0.05, 0.5], one rate a batch of 8"
    assert meta.input_scale is None and meta.scale_folded and meta.seed == 3407 and meta.steps == 73242
    assert meta.extra["threshold"] == 0.25


def test_a_file_saved_during_training_is_folded(tmp_path):
    """Its biases are not yet multiplied by the scale; on raw rows it must do what it does in training on rows / scale."""
    scale = 7.5
    contents = {"step": 1000, "ae": state_dict(), "optimizer": {"state": {0: {"exp_avg": np.zeros(4, np.float32)}}}, "config": {"k": K}}
    released(tmp_path, {**contents, "norm_factor": scale})
    spec, params, meta = load_dictionary(tmp_path / "resid_post_layer_10" / "trainer_1")
    code, y = forward(state_dict(), X, K)
    codes = spec.encode(params, jnp.asarray(X * scale))
    np.testing.assert_allclose(spec.dense(codes), code * scale, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(spec.decode(params, codes), y * scale, rtol=1e-4, atol=1e-4)
    assert meta.input_scale == scale and meta.scale_folded and meta.steps == 1000 and meta.extra["threshold"] == 0.25 * scale

    released(tmp_path, {**contents, "norm_factor": np.array(scale, np.float32)})  # a tensor says the same
    same(load_dictionary(tmp_path / "resid_post_layer_10" / "trainer_1")[1], params)
    for bad in ({}, {"norm_factor": 0.0}, {"norm_factor": None}, {"norm_factor": float("nan")}):
        released(tmp_path, contents | bad)
        with pytest.raises(UserError, match="norm_factor"):
            load_dictionary(tmp_path / "resid_post_layer_10" / "trainer_1")


def test_dictionary_learning_round_trip(tmp_path):
    save_dictionary(tmp_path / "trainer_0", SPEC, PARAMS, META, format="dictionary_learning")
    spec, params, meta = load_dictionary(tmp_path / "trainer_0")
    assert spec == SPEC and (meta.site, meta.layer, meta.model, meta.steps) == ("resid_post@3", 3, "pocket-dlm", 400)
    same(params, PARAMS)
    # once more through the format: what it can say does not change
    save_dictionary(tmp_path / "trainer_1", spec, params, meta, format="dictionary_learning")
    assert (tmp_path / "trainer_0" / "ae.pt").read_bytes() == (tmp_path / "trainer_1" / "ae.pt").read_bytes()


def test_torch_opens_what_is_written_and_agrees(tmp_path):
    torch = pytest.importorskip("torch")
    save_dictionary(tmp_path, SPEC, PARAMS, META, format="dictionary_learning")
    state = torch.load(tmp_path / "ae.pt", weights_only=True)
    assert state["k"].dtype == torch.int32 and int(state["k"]) == K and float(state["threshold"]) == -1.0
    encoder, decoder = torch.nn.Linear(D, N), torch.nn.Linear(N, D, bias=False)
    encoder.load_state_dict({"weight": state["encoder.weight"], "bias": state["encoder.bias"]})
    decoder.load_state_dict({"weight": state["decoder.weight"]})
    x = torch.tensor(X)
    post = torch.relu(encoder(x - state["b_dec"]))
    kept = post.topk(K, dim=-1, sorted=False)
    y = decoder(torch.zeros_like(post).scatter(-1, kept.indices, kept.values)) + state["b_dec"]
    np.testing.assert_allclose(SPEC.reconstruct(PARAMS, jnp.asarray(X)), y.detach().numpy(), rtol=1e-4, atol=1e-5)


def test_a_real_file_of_torch(tmp_path):
    torch = pytest.importorskip("torch")
    at = released(tmp_path)
    state = OrderedDict((name, torch.tensor(np.asarray(value))) for name, value in state_dict().items())
    state["decoder.weight"] = torch.tensor(np.asarray(PARAMS["W_dec"])).T  # a view, as torch often saves them
    state["encoder.bias"] = state["encoder.bias"].bfloat16()
    torch.save(state, at / "ae.pt")
    _, params, _ = load_dictionary(at)
    same(params, {**PARAMS, "b_enc": PARAMS["b_enc"].astype(jnp.bfloat16).astype(jnp.float32)})


def without(mapping, key):
    return {k: v for k, v in mapping.items() if k != key}


@pytest.mark.parametrize(
    ("contents", "trainer", "says"),
    [
        (None, {**TRAINER, "k": 5}, "k is 5 in config.json and 3 in ae.pt"),
        (without(state_dict(), "k"), without(TRAINER, "k"), "says what k is"),
        (state_dict(k=float("inf")), TRAINER, "k is 3 in config.json and inf in ae.pt"),
        (state_dict(threshold=np.array(np.nan, np.float32)), TRAINER, "threshold holds NaN"),
        (None, {**TRAINER, "dict_size": 21}, "dict_size is 21, but ae.pt has 20"),
        (None, {**TRAINER, "activation_dim": 7}, "activation_dim is 7, but ae.pt has 6"),
        (None, {**TRAINER, "dict_class": "IdentityDict"}, "'IdentityDict' is not read: those are AutoEncoder, "),
        (None, {**TRAINER, "dict_class": "GatedAutoEncoder"}, "b_gate is missing"),
        (None, without(TRAINER, "dict_class"), "dict_class None"),
        (without(state_dict(), "b_dec"), TRAINER, "b_dec is missing"),
        (without(state_dict(), "encoder.weight"), TRAINER, "encoder.weight is missing"),
        (state_dict(more=np.zeros(2, np.float32)), TRAINER, "more is unexpected"),
        (state_dict(b_dec=np.zeros(5, np.float32)), TRAINER, r"b_dec is \[5\], should be \[6\]"),
        (state_dict(b_dec=np.zeros(6, np.int64)), TRAINER, "b_dec holds int64"),
        (state_dict(b_dec="x"), TRAINER, "b_dec: is not a tensor"),
        ([1, 2], TRAINER, "holds no state dict"),
    ],
)
def test_released_layout_is_strict(tmp_path, contents, trainer, says):
    at = tmp_path / "resid_post_layer_10" / "trainer_1"
    released(tmp_path, contents, trainer)
    with pytest.raises(UserError, match=says):
        load_dictionary(at)


def test_layer_from_the_folder_or_not_at_all(tmp_path):
    bare = without(without(TRAINER, "layer"), "submodule_name")
    at = released(tmp_path, trainer=bare)
    assert load_dictionary(at)[2].site == "resid_post@10"
    moved = at.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="neither layer nor submodule_name"):
        load_dictionary(moved)
    (moved / "config.json").write_text(json.dumps({"trainer": {**bare, "layer": 4}}))
    meta = load_dictionary(moved)[2]
    assert meta.site == "resid_post@4" and meta.select is None and meta.corruption is None


def test_a_malicious_file_runs_nothing(tmp_path):
    import pickle
    import zipfile

    class Runs:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    at = released(tmp_path)
    with zipfile.ZipFile(at / "ae.pt", "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps({"encoder.weight": Runs()}, protocol=2))
    with pytest.raises(UserError, match="asks for posix.system"):
        load_dictionary(at)
    assert not (tmp_path / "ran").exists()


def test_what_the_released_format_cannot_say(tmp_path):
    coder = TopK(D, N, K, d_out=4)
    with pytest.raises(UserError, match="autoencoders only"):
        save_dictionary(tmp_path, coder, random_params(coder), META, format="dictionary_learning")
    unfolded = DictionaryMeta(model="m", site="resid_post@0", layer=0, input_scale=2.0, scale_folded=False)
    with pytest.raises(UserError, match="fold it first"):
        save_dictionary(tmp_path, SPEC, PARAMS, unfolded, format="dictionary_learning")
    with pytest.raises(UserError, match="format 'sae' is not known"):
        save_dictionary(tmp_path, SPEC, PARAMS, META, format="sae")
    assert not list(tmp_path.iterdir())


def test_where_there_is_no_dictionary(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        load_dictionary(tmp_path / "none" / "of" / "it")
    with pytest.raises(UserError, match="holds no dictionary"):
        load_dictionary(tmp_path)
    released(tmp_path)
    with pytest.raises(UserError, match="give one of its subfolders: resid_post_layer_10/trainer_1"):
        load_dictionary(tmp_path)
    with pytest.raises(UserError, match="no such folder; give one of its subfolders"):
        load_dictionary(tmp_path, "resid_post_layer_11/trainer_1")
    (tmp_path / "config.json").write_text('{"architecture": "topk"}')
    with pytest.raises(UserError, match="not a dictionary format that is read"):
        load_dictionary(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        load_dictionary(tmp_path)


def test_a_hub_id_without_network_is_one_line():
    with pytest.raises(UserError, match="somebody/some-dictionaries: no such folder, and the hub did not give it"):
        load_dictionary("somebody/some-dictionaries", "resid_post_layer_1/trainer_0")


def repository(tmp_path, monkeypatch, *folders):
    """A hub of one repository: what is asked of it is matched as the hub client does, copied, and remembered."""
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    source, cache, asked = tmp_path / "repository", tmp_path / "cache", []
    for name in ("README.md", "model.safetensors", "optimizer_0.pt", "state.pt", "training_data.npz", "config.yaml.bak"):
        for folder in ("", *folders):
            (source / folder).mkdir(parents=True, exist_ok=True)
            (source / folder / name).write_text("large")

    def snapshot_download(name, allow_patterns):
        assert name == "somebody/saes"
        asked.extend(allow_patterns)
        here = [str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()]
        for file in filter_repo_objects(here, allow_patterns=allow_patterns):
            (cache / file).parent.mkdir(parents=True, exist_ok=True)
            (cache / file).write_bytes((source / file).read_bytes())
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return source, cache, asked


FORMATS = ["dlmscope", "saelens", "sparsify", "dictionary_learning"]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("subfolder", [None, "resid_post_layer_3/trainer_0"])
def test_the_hub_is_asked_for_files_of_known_formats_only(tmp_path, monkeypatch, format, subfolder):
    source, cache, _ = repository(tmp_path, monkeypatch, "resid_post_layer_3/trainer_0", "resid_post_layer_3/trainer_1")
    save_dictionary(source / (subfolder or ""), SPEC, PARAMS, META, format=format)
    spec, params, meta = load_dictionary("somebody/saes", subfolder)
    assert spec == SPEC and meta.site == "resid_post@3"
    same(params, PARAMS)
    written = {path.name for path in (source / (subfolder or "")).iterdir() if path.name not in {p.name for p in source.iterdir()}}
    fetched = {str(path.relative_to(cache)) for path in cache.rglob("*") if path.is_file()}
    if subfolder:
        assert fetched == {f"{subfolder}/{name}" for name in written}
    assert not any(name.endswith((".md", ".bak", "model.safetensors", "state.pt", "optimizer_0.pt")) for name in fetched)


def test_a_file_on_the_hub_comes_with_its_configuration_alone(tmp_path, monkeypatch):
    source, cache, _ = repository(tmp_path, monkeypatch, "a/b")
    save_dictionary(source / "a" / "b", SPEC, PARAMS, META, format="dictionary_learning")
    (source / "a" / "b" / "checkpoints").mkdir()
    torch_pickle.save(source / "a" / "b" / "checkpoints" / "ae_10.pt", state_dict())
    (source / "a" / "b" / "checkpoints" / "sae.safetensors").write_text("of another dictionary, and large")
    same(load_dictionary("somebody/saes", "a/b/checkpoints/ae_10.pt")[1], PARAMS)
    assert {str(p.relative_to(cache)) for p in cache.rglob("*") if p.is_file()} == {"a/b/checkpoints/ae_10.pt", "a/b/config.json"}
    with pytest.raises(UserError, match="no such folder"):
        load_dictionary("somebody/saes", "a/c")


def test_what_lies_above_a_hookpoint_comes_with_it(tmp_path, monkeypatch):
    source, cache, asked = repository(tmp_path, monkeypatch)
    (source / "config.json").write_text(json.dumps({"sae": {}, "model": "EleutherAI/pythia-70m"}))
    save_dictionary(source / "layers.3", SPEC, PARAMS, META, format="sparsify")
    weights = str(source / "layers.3" / "sae.safetensors")
    safetensors.numpy.save_file(safetensors.numpy.load_file(weights), weights)  # without our card
    meta = load_dictionary("somebody/saes", "layers.3")[2]
    assert (meta.model, meta.site) == ("EleutherAI/pythia-70m", "resid_post@3")
    assert not any(pattern.startswith("..") or pattern.startswith("/") for pattern in asked)


@pytest.mark.parametrize("format", FORMATS)
def test_what_a_format_has_no_field_for_comes_back(tmp_path, format):
    save_dictionary(tmp_path, SPEC, PARAMS, META, format=format)
    meta = load_dictionary(tmp_path)[2]
    assert meta.extra["note"] == META.extra["note"]
    assert (meta.corruption, meta.select, meta.tokenizer, meta.input_scale) == ("rate U[0.05, 1.0]", "masked", "0" * 64, 12.5)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("other", FORMATS)
def test_one_folder_holds_one_dictionary(tmp_path, format, other):
    """The older one would be found instead, or be mixed with the new one."""
    save_dictionary(tmp_path, SPEC, PARAMS, META, format=other)
    if format == other:
        save_dictionary(tmp_path, SPEC, random_params(SPEC, 9), META, format=format)
        same(load_dictionary(tmp_path)[1], random_params(SPEC, 9))
    else:
        with pytest.raises(UserError, match=f"holds a dictionary of the {other} format"):
            save_dictionary(tmp_path, SPEC, PARAMS, META, format=format)


ODD = [None, [], {}, "x", "", -1, 0, 2**70, 10**400, 0.5, True, float("inf"), float("nan"), [[1]], {"a": 1}, "x" * 9999]


def everywhere(value, odd):
    """``value`` with each of its entries, at any depth, replaced by ``odd`` in turn."""
    if isinstance(value, dict):
        for key in value:
            yield {**value, key: odd}
            yield from ({**value, key: inner} for inner in everywhere(value[key], odd))


@pytest.mark.parametrize("format", FORMATS)
def test_odd_values_in_a_configuration_end_in_one_line(tmp_path, format):
    """Whatever stands in it, a configuration is read or refused; nothing else happens."""
    save_dictionary(tmp_path, SPEC, PARAMS, META, format=format)
    path = next(tmp_path.glob("*.json"))
    whole, refused = json.loads(path.read_text()), 0
    for odd in ODD:
        for config in [*everywhere(whole, odd), odd]:
            path.write_text(json.dumps(config))
            try:
                load_dictionary(tmp_path)
            except UserError as error:
                refused += 1
                assert "\n" not in str(error) and len(str(error)) < 1200
    assert refused > len(ODD)


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_of_weights_may_be_named(tmp_path, format):
    save_dictionary(tmp_path / "a", SPEC, PARAMS, META, format=format)
    weights = next(path for path in (tmp_path / "a").iterdir() if path.suffix != ".json")
    same(load_dictionary(weights)[1], PARAMS)
    same(load_dictionary(tmp_path, f"a/{weights.name}")[1], PARAMS)


def test_another_file_in_the_folder_is_not_taken_for_it(tmp_path):
    save_dictionary(tmp_path, SPEC, PARAMS, META)
    torch_pickle.save(tmp_path / "notes.pt", {"a": np.zeros(3, np.float32)})
    with pytest.raises(UserError, match="notes.pt"):
        load_dictionary(tmp_path / "notes.pt")


def test_a_local_folder_never_touches_the_hub(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    released(tmp_path)
    load_dictionary(tmp_path, "resid_post_layer_10/trainer_1")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def full(temporary):
        temporary.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="cannot be written: No space left"):
        write_whole(path, full)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.bin"]


def test_meta():
    assert meta_from_mapping(meta_to_mapping(META)) == META
    with pytest.raises(UserError, match="extra must hold JSON"):
        DictionaryMeta(model="m", site="resid_post@0", layer=0, extra={"a": object()})
    with pytest.raises(UserError, match="input_scale is missing"):
        DictionaryMeta(model="m", site="resid_post@0", layer=0, scale_folded=False)
    with pytest.raises(UserError, match="should be a mapping"):
        meta_from_mapping({"model": "m", "site": "resid_post@0", "layer": 0, "extra": 3})
