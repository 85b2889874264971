"""Feature records from a real harvest, against brute force over the same rows."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlmscope_jax.activations import ActivationStore, Corruption, harvest
from dlmscope_jax.analysis import (
    Firing,
    collect_records,
    find_latents,
    firing,
    latents_for,
    read_records,
    records_from_result,
    records_to_result,
    stratified,
)
from dlmscope_jax.diffusion import corrupt
from dlmscope_jax.errors import UserError

SITE = "resid_post@1"


class Words:
    """A tokenizer whose token i reads " w<i>"."""

    digest = "d" * 64

    def encode(self, texts, special=False):
        return [[0] * special + [int(word[1:]) for word in text.split()] for text in texts]

    def pieces(self, ids):
        return [f" w{i}" for i in ids]


@pytest.fixture(scope="module")
def case(tiny, tmp_path_factory):
    model, params = tiny.model("dlm")
    blocks = tiny.blocks(40, documents_per_block=2, pad=3)
    meta = {"model": "tiny", "tokenizer": Words.digest}
    store = harvest(model, params, blocks, tmp_path_factory.mktemp("rows") / "s", [SITE], Corruption("rate"), dtype="float32", meta=meta)
    dictionary = tiny.topk(SITE, k=3)
    spec, weights, _ = dictionary
    dense = np.asarray(spec.dense(spec.encode(weights, store.read(SITE))))
    return types.SimpleNamespace(model=model, params=params, blocks=blocks, store=store, dictionary=dictionary, dense=dense)


def test_densities_of_all_latents(case):
    counted = firing(case.dictionary, case.store, batch_size=100)
    active, masked, rate = case.dense > 0, case.store.column("is_masked"), case.store.column("rate")
    np.testing.assert_array_equal(counted.fired, active.sum(axis=0))
    np.testing.assert_allclose(counted.density, active.mean(axis=0))
    np.testing.assert_allclose(counted.by_state(True), active[masked].mean(axis=0))
    np.testing.assert_allclose(counted.by_state(False), active[~masked].mean(axis=0))
    np.testing.assert_allclose(counted.largest, case.dense.max(axis=0), rtol=1e-5)
    np.testing.assert_allclose(counted.total, case.dense.sum(axis=0), rtol=1e-4)
    assert counted.dead_share == (active.sum(axis=0) == 0).mean() and counted.n_rows == case.store.rows
    latent = int(active.sum(axis=0).argmax())
    bins = counted.by_rate(latent)
    assert sum(b["rows"] for b in bins) == case.store.rows
    assert sum(b["rows"] * b["density"] for b in bins) == pytest.approx(active[:, latent].sum())
    for b in bins:
        inside = (rate >= np.float32(b["low"])) & (rate < np.float32(b["high"]) if b["high"] < 1 else rate <= 1)
        assert b["rows"] == inside.sum() and b["density"] == pytest.approx(active[inside, latent].mean())


@pytest.mark.parametrize("select", ["masked", "visible", "predicting"])
def test_a_dictionary_of_one_kind_of_rows_is_read_on_them(case, select):
    spec, weights, card = case.dictionary
    dictionary = (spec, weights, dataclasses.replace(card, select=select))
    counted = firing(dictionary, case.store, batch_size=256)
    masked = case.store.column("is_masked")
    own = ~masked if select == "visible" else case.store.column("predicts_masked") if select == "predicting" else masked
    np.testing.assert_allclose(counted.density, (case.dense > 0)[own].mean(axis=0))
    np.testing.assert_allclose(counted.largest, case.dense[own].max(axis=0), rtol=1e-5)
    assert counted.select == select and counted.n_rows == own.sum()
    np.testing.assert_allclose(counted.by_state(False), (case.dense > 0)[~masked].mean(axis=0))  # over all visible rows
    latents = np.argsort(-counted.density)[:3]
    found = collect_records(case.model, case.params, dictionary, case.store, latents=latents, counted=counted, batch_size=128)
    for record in found:
        assert record.windows and all(w.is_masked[w.peak] == (select != "visible") for w in record.windows)
        assert record.windows[0].activations[record.windows[0].peak] == pytest.approx(case.dense[own, record.latent].max(), rel=1e-4)


def made_up(fired):
    fired = np.asarray(fired)
    counts = np.zeros((11, 2, 2, len(fired)), np.int64)
    counts[0, 0, 1] = fired
    rows = np.zeros((11, 2, 2), np.int64)
    rows[0, 0, 1] = 10_000
    return Firing(counts, rows, np.ones(len(fired)), np.ones(len(fired)), "all")


def test_latents_are_stratified_by_density_and_seeded():
    fired = np.random.default_rng(0).permutation(np.concatenate([np.zeros(100, int), np.arange(1, 401)]))
    counted = made_up(fired)
    chosen = stratified(counted, 50, seed=3)
    assert len(set(chosen.tolist())) == 50 and (fired[chosen] > 0).all()
    tenths = (fired[chosen] - 1) // 40  # the living have every count from 1 to 400 once
    assert np.bincount(tenths).tolist() == [5] * 10
    np.testing.assert_array_equal(counted.deciles()[chosen], tenths)
    np.testing.assert_array_equal(chosen, stratified(counted, 50, seed=3))
    assert set(chosen.tolist()) != set(stratified(counted, 50, seed=4).tolist())
    assert set(chosen.tolist()) != set(np.argsort(-fired)[:50].tolist())  # not the top 50
    assert len(stratified(made_up([0, 0, 5, 6, 7]), 50, 0)) == 3
    assert counted.dead_share == 0.2 and set(counted.deciles()[fired == 0].tolist()) == {-1}


@pytest.fixture(scope="module")
def records(case):
    options = {"documents": case.blocks.names, "radius": 3, "top": 4, "per_decile": 2, "batch_size": 128}
    return collect_records(case.model, case.params, case.dictionary, case.store, Words(), **options)


def test_windows_show_what_the_store_holds(case, records):
    columns = {name: case.store.column(name) for name in ("block", "position", "token", "original", "is_masked", "rate", "document")}
    masks = 0
    for record in records:
        values = case.dense[:, record.latent]
        for window in record.windows:
            rate = np.isclose(columns["rate"], window.rate, atol=1e-4)
            rows = np.flatnonzero(rate & (columns["position"] == window.position) & (values > 0))
            (row,) = [r for r in rows if case.blocks.names[columns["document"][r]] == window.document]
            inside = np.flatnonzero((columns["block"] == columns["block"][row]) & (np.abs(columns["position"] - window.position) <= 3))
            assert inside[window.peak] == row and window.activations[window.peak] > 0
            assert window.tokens == tuple(columns["token"][inside]) and window.original == tuple(columns["original"][inside])
            assert window.is_masked == tuple(columns["is_masked"][inside].astype(int))
            np.testing.assert_allclose(window.activations, values[inside], rtol=1e-4)
            for token, original, hidden in zip(window.tokens, window.original, window.is_masked, strict=True):
                assert (token == 3) == bool(hidden) and (hidden or token == original)
            masks += sum(window.is_masked)
    assert masks > 50


def test_top_and_sampled_windows(case, records):
    for record in records:
        values = np.sort(case.dense[:, record.latent])[::-1]
        tops = [w for w in record.windows if w.group == "top"]
        peaks = [w.activations[w.peak] for w in tops]
        assert peaks == sorted(peaks, reverse=True) and len(tops) <= 4
        assert peaks[0] == pytest.approx(record.max_activation, rel=1e-4) == pytest.approx(values[0], rel=1e-4)
        assert len({(w.document, w.rate, w.position) for w in record.windows}) == len(record.windows)  # no row twice
        fired = values[values > 0][::-1]
        parts = np.array_split(fired, 10)
        for w in record.windows:
            if w.group == "sampled":
                part = parts[w.decile]
                assert part[0] * 0.9999 <= w.activations[w.peak] <= part[-1] * 1.0001
        for a in tops:
            for b in tops:
                assert a is b or a.rate != b.rate or a.document[:4] != b.document[:4] or abs(a.position - b.position) > 3


def test_statistics_of_a_record(case, records, tiny):
    spec, weights, _ = case.dictionary
    alive = (case.dense > 0).any(axis=0).sum()
    assert len(records) == min(50, alive)
    original = case.store.column("original")
    for record in records[:6]:
        values = case.dense[:, record.latent]
        assert record.density == pytest.approx((values > 0).mean())
        assert record.mean_activation == pytest.approx(values[values > 0].mean(), rel=1e-4)
        direction = np.asarray(weights["W_dec"][record.latent])
        tree = case.params["params"]
        lens = np.asarray(tree["head"]) @ (direction * np.asarray(tree["final_norm"]))
        assert [t for t, _ in record.logit_lens["top"]] == np.argsort(-lens, kind="stable")[:10].tolist()
        assert record.logit_lens["bottom"][0][1] == pytest.approx(lens.min(), abs=1e-3)
        cosines = np.asarray(weights["W_dec"]) @ direction
        cosines[record.latent] = -2
        assert record.neighbours[0][0] == cosines.argmax()
        for token, z, count in record.enriched:
            assert z > 0 and count == ((original == token) & (values > 0)).sum()


def test_enrichment_finds_the_token_of_a_latent(case, tiny):
    """A latent made to fire on one token alone: that token leads, by the formula of Monroe et al."""
    spec, weights, card = case.dictionary
    original, masked = case.store.column("original"), case.store.column("is_masked")
    x = case.store.read(SITE)
    probe = np.linalg.lstsq(np.c_[x, np.ones(len(x))], (original == 9) & ~masked, rcond=None)[0]  # a linear probe for visible tokens 9
    bias = 1000 * (probe[-1] - 0.4) + 1000 * probe[:-1] @ np.asarray(weights["b_dec"])
    weights = {**weights, "W_enc": weights["W_enc"].at[0].set(1000 * probe[:-1]), "b_enc": weights["b_enc"].at[0].set(bias)}
    (record,) = collect_records(case.model, case.params, (spec, weights, card), case.store, Words(), latents=[0], batch_size=256)
    token, z, count = record.enriched[0]
    fired = np.asarray(spec.encode(weights, x).latent(0)) > 0
    assert token == 9 and count == (fired & (original == 9)).sum()
    background = np.bincount(original) / len(original)
    a, b = count + 1000 * background[9], ((original == 9) & ~fired).sum() + 1000 * background[9]
    na, nb = fired.sum() + 1000, (~fired).sum() + 1000
    assert z == pytest.approx((np.log(a / (na - a)) - np.log(b / (nb - b))) / np.sqrt(1 / a + 1 / b), abs=0.01)
    assert find_latents([record], "w9")[0]["why"][0].startswith("enriched")


def test_the_same_seed_gives_the_same_records(case, records):
    options = {"documents": case.blocks.names, "radius": 3, "top": 4, "per_decile": 2, "batch_size": 128}
    again = collect_records(case.model, case.params, case.dictionary, case.store, Words(), **options)
    assert again == records
    other = collect_records(case.model, case.params, case.dictionary, case.store, Words(), **options, seed=1)
    assert [r.windows for r in other] != [r.windows for r in records]


def test_rows_in_any_order_give_the_same_windows(case, records, tmp_path):
    order = np.random.default_rng(0).permutation(case.store.rows)
    shuffled = ActivationStore.create(tmp_path / "s", {SITE: 16}, case.store.meta, dtype="float32")
    shuffled.append({SITE: case.store.read(SITE)[order]}, {name: case.store.column(name)[order] for name in case.store.columns})
    got = collect_records(
        case.model, case.params, case.dictionary, shuffled.finish(), Words(), documents=case.blocks.names, radius=3, top=4, batch_size=128
    )
    for a, b in zip(got, records, strict=True):
        assert [w for w in a.windows if w.group == "top"] == [w for w in b.windows if w.group == "top"]


def test_records_as_json(records, tmp_path):
    result = records_to_result(records, dead_share=0.25, mask_id=3, side="test", seed=0)
    path = tmp_path / "features.json"
    path.write_text(json.dumps(result, allow_nan=False))
    assert read_records(path) == records
    assert result["dead_share"] == 0.25 and result["records"][0]["windows"][0]["group"] == "top" and result["pieces"]["9"] == " w9"
    with pytest.raises(UserError, match="version 7"):
        records_from_result({**result, "version": 7})
    with pytest.raises(UserError, match="not a feature record"):
        records_from_result({**result, "records": [{**result["records"][0], "colour": "red"}]})
    with pytest.raises(UserError, match="no such file"):
        read_records(tmp_path / "nothing.json")


def test_find_latents(records):
    some = records[0]
    token = some.windows[0].original[some.windows[0].peak]
    found = find_latents(records, f"W{token}")  # case does not matter
    assert some.latent in [f["latent"] for f in found] and [f["score"] for f in found] == sorted((f["score"] for f in found), reverse=True)
    assert find_latents(records, "zebra") == []
    told = [dataclasses.replace(records[3], description="Stripes of a zebra"), *records[4:]]
    (only,) = find_latents(told, "zebra")
    assert only["latent"] == records[3].latent and "description" in only["why"][0]
    with pytest.raises(UserError, match="query is empty"):
        find_latents(records, "  ")
    with pytest.raises(UserError, match="ids only"):
        find_latents([dataclasses.replace(some, pieces={})], "w9")


def test_latents_for_a_text(case):
    spec, weights, _ = case.dictionary
    text = "w5 w9 w9 w14 w20"
    for rate in (0.0, 0.4):
        got = latents_for(case.model, case.params, case.dictionary, text, rate, seed=2, top=2, tokenizer=Words())
        tokens, is_masked = jnp.asarray([[0, 5, 9, 9, 14, 20]]), np.zeros((1, 6), bool)
        if rate:
            tokens, is_masked = corrupt(jax.random.key(2), tokens, rate, case.model.diffusion, exact=True)
            assert sum(got["is_masked"]) == 2
        assert got["tokens"] == tokens[0].tolist() and got["is_masked"] == np.asarray(is_masked)[0].astype(int).tolist()
        x = case.model.apply(case.params, tokens, logits=False, collect=(SITE,)).taps["resid_post"][1][0]
        dense = np.asarray(spec.dense(spec.encode(weights, x)))
        for row, active in zip(dense, got["active"], strict=True):
            order = [int(i) for i in np.argsort(-row, kind="stable")[:2] if row[i] > 0]
            assert [i for i, _ in active] == order
            np.testing.assert_allclose([v for _, v in active], row[order], rtol=1e-3)
        first = got["latents"][0]
        assert first["max"] == pytest.approx(dense.max(), rel=1e-3) and dense[first["position"]].argmax() == first["latent"]
        json.dumps(got, allow_nan=False)
    assert got["original_pieces"][2] == " w9"


def test_mistakes(case, tiny, tmp_path):
    ar, ar_params = tiny.model("ar")
    with pytest.raises(UserError, match="0 for an autoregressive"):
        latents_for(ar, ar_params, case.dictionary, "w5", rate=0.5, tokenizer=Words())
    with pytest.raises(UserError, match="tokenizer"):
        wrong = (*case.dictionary[:2], dataclasses.replace(case.dictionary[2], tokenizer="e" * 64))
        latents_for(case.model, case.params, wrong, "w5", tokenizer=Words())
    with pytest.raises(UserError, match="no tokenizer for 'tiny'"):
        latents_for(case.model, case.params, case.dictionary, "w5")
    with pytest.raises(UserError, match="this dictionary has 0 to 31"):
        collect_records(case.model, case.params, case.dictionary, case.store, latents=[99], batch_size=256)
    bare = ActivationStore.create(tmp_path / "bare", {SITE: 16}, {}, dtype="float32")
    bare.append({SITE: np.ones((4, 16), np.float32)}, {"position": np.arange(4)})
    with pytest.raises(UserError, match="lacks token, original, block"):
        collect_records(case.model, case.params, case.dictionary, bare.finish())
    other = {"params": {**case.params["params"], "embed": case.params["params"]["embed"] * 2}}
    owned = (*case.dictionary[:2], dataclasses.replace(case.dictionary[2], model_identity="somebody else"))
    with pytest.raises(UserError, match="somebody else"):
        collect_records(case.model, other, owned, case.store)
