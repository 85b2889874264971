"""Transcoders, codes with negative activations and codes of bits, through every analysis."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlmscope_jax.activations import ActivationStore
from dlmscope_jax.analysis import check_match, delta_loss, evaluate, firing, latents_for, steer
from dlmscope_jax.analysis import insertion as at_insertion
from dlmscope_jax.analysis.controls import replacements
from dlmscope_jax.analysis.match import raw, written_site
from dlmscope_jax.dictionaries import BatchTopK, Binary, DictionaryMeta, JumpReLU, ReLU, TopK
from dlmscope_jax.errors import UserError
from dlmscope_jax.models import Edit
from dlmscope_jax.models.edits import InDictionary

READ, WRITTEN = "mlp_in@1", "mlp_out@1"


def transcoder(tiny, k=4, skip=True, seed=3):
    spec = TopK(tiny.width, 32, k, d_out=tiny.width, skip=skip)
    params = spec.init(jax.random.key(seed))
    params |= {"b_dec": jax.random.normal(jax.random.key(9), (tiny.width,)) * 0.1}
    if skip:
        params["W_skip"] = jax.random.normal(jax.random.key(8), (tiny.width, tiny.width)) * 0.1
    return spec, params, DictionaryMeta("tiny", READ, 1, extra={"target": WRITTEN})


def store_of(path, x, y=None, **columns):
    arrays = {READ: x} | ({} if y is None else {WRITTEN: y})
    store = ActivationStore.create(path, {name: value.shape[1] for name, value in arrays.items()}, {}, dtype="float32")
    store.append(arrays, columns)
    return store.finish()


@pytest.mark.slow
def test_a_transcoder_is_inserted_where_it_writes(tiny):
    """The loss is that of the whole model with the edit that reads ``mlp_in`` and replaces ``mlp_out``."""
    model, params = tiny.model("ar")
    blocks = tiny.blocks(5)
    spec, weights, meta = transcoder(tiny)
    result = delta_loss(model, params, (spec, weights, meta), blocks, batch_size=2)
    assert (result["site"], result["target"]) == (READ, WRITTEN)
    edit = Edit("replace_by_dictionary", WRITTEN, InDictionary(spec, weights), read_site=READ)
    logits = model.apply(params, jnp.asarray(blocks.tokens), edits=(edit,)).logits[:, :-1]
    targets = jnp.asarray(blocks.tokens)[:, 1:]
    loss = -jnp.take_along_axis(jax.nn.log_softmax(logits.astype(jnp.float32)), targets[..., None], axis=-1).mean()
    (row,) = (row for row in result["rows"] if row["condition"] == "spliced" and row["rate"] == 0.0)
    assert row["loss"]["value"] == pytest.approx(float(loss), rel=1e-5)
    (clean,) = (row for row in result["rows"] if row["condition"] == "clean" and row["rate"] == 0.0)
    assert abs(clean["loss"]["value"] - float(loss)) > 1e-3


def test_the_controls_of_a_transcoder_stand_in_for_what_it_writes(tiny):
    spec, weights, _ = transcoder(tiny)
    untrained = spec.init(jax.random.key(1))
    read, x = (jax.random.normal(jax.random.key(i), (2, 3, tiny.width)) for i in (5, 6))
    keys = jax.random.split(jax.random.key(7), 2)
    masked = jnp.zeros((2, 3), bool)
    values = replacements(spec, weights, untrained, x, masked, jnp.ones((2, tiny.width)), keys, jnp.ones((2, 3), bool), read)
    made = spec.reconstruct(weights, read)
    np.testing.assert_array_equal(values[0], x)
    np.testing.assert_allclose(values[1], made, rtol=1e-6)
    np.testing.assert_allclose(jnp.linalg.norm(values[4] - x, axis=-1), jnp.linalg.norm(x - made, axis=-1), rtol=1e-5)
    np.testing.assert_allclose(values[5], spec.reconstruct(untrained, read), rtol=1e-6)


def test_the_untrained_transcoder_is_initialised_from_both_ends(tiny, monkeypatch):
    model, params = tiny.model("ar")
    seen = {}
    real = TopK.init

    def init(self, key, sample=None, inputs=None):
        seen.update(sample=sample, inputs=inputs)
        return real(self, key, sample, inputs)

    dictionary = transcoder(tiny)
    monkeypatch.setattr(TopK, "init", init)
    blocks = tiny.blocks(3)
    delta_loss(model, params, dictionary, blocks, batch_size=3)
    taps = at_insertion._taps(model, params, jnp.asarray(blocks.tokens), None, (READ, WRITTEN))
    for name, site in (("inputs", READ), ("sample", WRITTEN)):
        rows = np.asarray(taps[site]).reshape(-1, tiny.width)
        np.testing.assert_allclose(seen[name], rows / np.sqrt(np.square(rows).sum(1).mean()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("spec", [TopK(8, 32, 4, d_out=6), JumpReLU(8, 32), Binary(8, 32), TopK(8, 32, 4, d_out=6, row_norm="unit_rms")])
def test_the_untrained_dictionary_has_the_units_of_the_rows(spec):
    """Rows of another size change what it makes by that factor, as training would begin; a unit encoder on raw rows does not."""
    x = np.random.default_rng(0).normal(size=(300, 8)).astype(np.float32)
    y = np.random.default_rng(1).normal(size=(300, spec.out)).astype(np.float32) if spec.transcoder else x
    key, scales = jax.random.key(0), (50.0, 7.0) if spec.transcoder and spec.row_norm == "none" else (50.0, 50.0)

    def made(scale, out_scale):
        params = at_insertion._untrained(spec, key, y * out_scale, x * scale if spec.transcoder else None)
        return np.asarray(spec.reconstruct(params, x * scale))

    np.testing.assert_allclose(made(*scales), scales[1] * made(1.0, 1.0), rtol=1e-3, atol=1e-3)


@pytest.mark.some(2)
@pytest.mark.parametrize("scale", [1.0, 50.0])
@pytest.mark.parametrize("fields", [{}, {"d_out": 6}, {"row_norm": "layer_norm"}])
def test_the_untrained_batch_topk_has_about_k_active_latents(scale, fields):
    spec = BatchTopK(8, 64, 4, **fields)
    x = scale * np.random.default_rng(0).normal(size=(2000, 8)).astype(np.float32)
    y = np.random.default_rng(1).normal(size=(2000, spec.out)).astype(np.float32)
    params = at_insertion._untrained(spec, jax.random.key(0), y if spec.transcoder else x, x if spec.transcoder else None)
    assert float(spec.encode(params, x).count().mean()) == pytest.approx(4, rel=0.2)


def test_fidelity_of_a_transcoder_is_against_the_rows_that_it_writes(tiny, tmp_path):
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(700, tiny.width)).astype(np.float32) for _ in range(2))
    dictionary = transcoder(tiny)
    store = store_of(tmp_path / "s", x, y, document=np.arange(700, dtype=np.int32) % 40)
    found = evaluate(dictionary, store, batch_size=300)
    made = np.asarray(dictionary[0].reconstruct(dictionary[1], x), np.float64)
    want = 1 - ((y - made) ** 2).sum() / ((y - y.mean(0)) ** 2).sum()
    assert found["sets"]["all"]["explained_variance"] == pytest.approx(want, rel=1e-5)
    assert found["sets"]["all"]["intervals"]["explained_variance"]["value"] == pytest.approx(want, rel=1e-5)
    assert (found["site"], found["target"]) == (READ, WRITTEN)
    with pytest.raises(UserError, match=f"no site {WRITTEN}"):
        evaluate(dictionary, store_of(tmp_path / "half", x))


def test_what_a_card_must_say_of_a_transcoder(tiny):
    spec, params, meta = transcoder(tiny)
    model, _ = tiny.model("ar")
    assert check_match((spec, params, meta), model=model) == ()
    with pytest.raises(UserError, match="does not say what it writes"):
        written_site((spec, params, dataclasses.replace(meta, extra={})))
    with pytest.raises(UserError, match="width 7, but mlp_out@1"):
        check_match((TopK(tiny.width, 32, 4, d_out=7), params, meta), model=model)
    unfolded = dataclasses.replace(meta, scale_folded=False, input_scale=2.0, extra={**meta.extra, "transcoder": {"output_scale": 5.0}})
    x = jax.random.normal(jax.random.key(0), (6, tiny.width))
    np.testing.assert_allclose(
        spec.reconstruct(raw((spec, params, unfolded))[1], x), 5 * spec.reconstruct(params, x / 2), rtol=1e-4, atol=1e-5
    )


def test_a_transcoder_steers_what_it_writes_and_says_what_it_cannot(tiny):
    spec, params, _ = transcoder(tiny)
    edit = steer(spec, params, 3, WRITTEN, 2.0, "unit")
    np.testing.assert_allclose(edit.value, params["W_dec"][3] / jnp.linalg.norm(params["W_dec"][3]), rtol=1e-6)
    with pytest.raises(UserError, match="row_max.*corpus_max"):
        steer(spec, params, 3, WRITTEN, 2.0)


@pytest.mark.parametrize("batch_size", [64, 500])
def test_negative_activations_are_activations(tiny, tmp_path, batch_size):
    spec = TopK(tiny.width, 24, 5, rule="magnitude")
    params = spec.init(jax.random.key(2))
    x = np.random.default_rng(1).normal(size=(300, tiny.width)).astype(np.float32)
    values = np.asarray(spec.dense(spec.encode(params, x)))
    assert (values < 0).any()
    found = firing((spec, params, DictionaryMeta("tiny", READ, 1)), store_of(tmp_path / "s", x), batch_size=batch_size)
    np.testing.assert_array_equal(found.fired, (values != 0).sum(axis=0))
    signed = np.take_along_axis(values, np.abs(values).argmax(axis=0)[None], axis=0)[0]
    np.testing.assert_allclose(found.largest, signed, rtol=1e-6)
    np.testing.assert_allclose(found.total, values.sum(axis=0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [ReLU, BatchTopK])
def test_dense_codes_are_counted_like_sparse_ones(tiny, tmp_path, kind):
    spec = kind(tiny.width, 24, **({"k": 4} if kind is BatchTopK else {}))
    params = spec.init(jax.random.key(2)) | ({"threshold": jnp.float32(0.8)} if kind is BatchTopK else {})
    x = np.random.default_rng(1).normal(size=(300, tiny.width)).astype(np.float32)
    values = np.asarray(spec.dense(spec.encode(params, x)))
    store = store_of(tmp_path / "s", x, document=np.arange(300, dtype=np.int32) % 40)
    meta = DictionaryMeta("tiny", READ, 1)
    found = firing((spec, params, meta), store, batch_size=128)
    np.testing.assert_array_equal(found.fired, (values != 0).sum(axis=0))
    np.testing.assert_allclose(found.largest, values.max(axis=0), rtol=1e-6)
    assert found.usual is None
    l0 = evaluate((spec, params, meta), store)["sets"]["all"]
    assert l0["l0"] == pytest.approx((values != 0).sum(axis=1).mean()) == pytest.approx(l0["intervals"]["l0"]["value"])


def test_of_bits_the_rarer_value_counts(tiny, tmp_path):
    spec = Binary(tiny.width, 24)
    params = spec.init(jax.random.key(2))
    x = (np.random.default_rng(1).normal(size=(300, tiny.width)) + 1).astype(np.float32)
    masked = np.arange(300) % 3 == 0
    x[masked] *= -1
    on = np.asarray(spec.dense(spec.encode(params, x))) > 0
    store = store_of(tmp_path / "s", x, document=np.arange(300, dtype=np.int32) % 40, is_masked=masked)
    meta = DictionaryMeta("tiny", READ, 1)
    found = firing((spec, params, meta), store, batch_size=128)
    usual = on.mean(axis=0) > 0.5
    np.testing.assert_array_equal(found.usual, usual)
    np.testing.assert_array_equal(found.fired, (on != usual).sum(axis=0))
    np.testing.assert_allclose(found.by_state(True), (on != usual)[masked].mean(axis=0))
    np.testing.assert_array_equal(found.largest, (found.fired > 0).astype(np.float32))
    sets = evaluate((spec, params, meta), store, batch_size=128)["sets"]
    for name, chosen in {"all": slice(None), "masked": masked, "visible": ~masked}.items():
        p = on[chosen].mean(axis=0)
        assert sets[name]["intervals"]["l0"]["value"] == pytest.approx(np.minimum(p, 1 - p).sum(), rel=1e-6)
        assert sets[name]["l0"] == pytest.approx(np.minimum(p, 1 - p).sum(), rel=1e-5), name
    assert any((on[masked].mean(axis=0) > 0.5) != usual), "the states differ in what is usual"


def test_codes_of_several_bits_have_sizes(tiny, tmp_path):
    """More than one bit says how much and not only whether: a latent is active where it is not 0, for every figure alike."""
    spec = Binary(tiny.width, 24, bits=3)
    params = spec.init(jax.random.key(2))
    x = (np.random.default_rng(1).normal(size=(300, tiny.width)) + 1).astype(np.float32)
    values = np.asarray(spec.dense(spec.encode(params, x)))
    assert ((values > 0).mean(axis=0) > 0.5).any() and len(np.unique(values)) > 2
    store = store_of(tmp_path / "s", x, document=np.arange(300, dtype=np.int32) % 40)
    meta = DictionaryMeta("tiny", READ, 1)
    found = evaluate((spec, params, meta), store, batch_size=128)["sets"]["all"]
    assert found["l0"] == pytest.approx((values > 0).sum(axis=1).mean()) == pytest.approx(found["intervals"]["l0"]["value"])
    np.testing.assert_allclose(firing((spec, params, meta), store, batch_size=128).largest, values.max(axis=0), rtol=1e-6)


def test_a_look_up_lists_the_largest_in_size(tiny):
    class Words:
        digest = ""

        def encode(self, texts, special):
            return [[5, 6, 7, 8] for _ in texts]

        def pieces(self, ids):
            return [str(i) for i in ids]

    model, params = tiny.model("ar")
    for spec in (TopK(tiny.width, 24, 5, rule="magnitude"), ReLU(tiny.width, 24)):
        weights = spec.init(jax.random.key(2))
        meta = DictionaryMeta("tiny", "resid_post@1", 1)
        found = latents_for(model, params, (spec, weights, meta), "text", top=3, tokenizer=Words())
        x = model.apply(params, jnp.asarray([[5, 6, 7, 8]]), collect=("resid_post@1",)).taps["resid_post"][1][0]
        values = np.asarray(spec.dense(spec.encode(weights, x)))
        for row, listed in zip(values, found["active"], strict=True):
            order = np.argsort(-np.abs(row), kind="stable")[:3]
            assert [i for i, _ in listed] == [i for i in order if row[i] != 0]
            np.testing.assert_allclose([v for _, v in listed], row[[i for i, _ in listed]], atol=1e-4)
        sizes = [abs(latent["max"]) for latent in found["latents"]]
        assert sizes == sorted(sizes, reverse=True)
