"""Held-out fidelity on a real store against float64 arithmetic on the same rows."""

import dataclasses
import json

import numpy as np
import pytest

from dlmscope_jax.activations import ActivationStore
from dlmscope_jax.analysis import evaluate
from dlmscope_jax.dictionaries import DictionaryMeta
from dlmscope_jax.errors import UserError

SITE = "resid_post@1"


def rows_of(tiny, n=1500, seed=0):
    """Rows with a large common mean, as activations have; masked ones around another centre."""
    rng = np.random.default_rng(seed)
    masked = rng.random(n) < 0.4
    x = rng.normal(size=(n, tiny.width)) + 5.0 + masked[:, None] * rng.normal(size=tiny.width) * 2
    columns = {
        "is_masked": masked,
        "rate": rng.uniform(0.05, 1.0, n).astype(np.float32),
        "position": rng.integers(0, 12, n).astype(np.int32),
        "document": np.sort(rng.integers(0, 50, n)).astype(np.int32),
    }
    return x.astype(np.float32), columns


def make_store(path, x, columns, **meta):
    store = ActivationStore.create(path, {SITE: x.shape[1]}, meta, dtype="float32")
    store.append({SITE: x}, columns)
    return store.finish()


def by_hand(spec, weights, x):
    codes = spec.encode(weights, x)
    y, x = np.asarray(spec.decode(weights, codes), np.float64), x.astype(np.float64)
    active = np.asarray(codes.values) > 0
    fired = np.zeros(spec.width, int)
    np.add.at(fired, np.asarray(codes.indices)[active], 1)
    return {
        "explained_variance": 1 - ((x - y) ** 2).sum() / ((x - x.mean(0)) ** 2).sum(),
        "l0": active.sum() / len(x),
        "cosine": ((x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)).mean(),
        "dead_share": (fired == 0).mean(),
        "dense_share_10pct": (fired / len(x) > 0.1).mean(),
    }


def test_every_set_equals_float64(tiny, tmp_path):
    x, columns = rows_of(tiny)
    dictionary = tiny.topk(SITE)
    result = evaluate(dictionary, make_store(tmp_path / "s", x, columns), batch_size=400)
    masked = columns["is_masked"]
    for name, chosen in {"all": np.ones(len(x), bool), "masked": masked, "visible": ~masked}.items():
        got, want = result["sets"][name], by_hand(*dictionary[:2], x[chosen])
        assert got["rows"] == chosen.sum()
        for key, number in want.items():
            assert got[key] == pytest.approx(number, rel=1e-4), (name, key)
        for key in ("explained_variance", "l0", "cosine"):
            interval = got["intervals"][key]
            assert interval["value"] == pytest.approx(want[key], rel=1e-4)
            assert interval["units"] == 50 and interval["low"] <= interval["value"] <= interval["high"]
    for entry in result["sets"]["all"]["by_rate"]:
        inside = (columns["rate"] >= np.float32(entry["low"])) & (columns["rate"] < np.float32(entry["high"]))
        assert entry["rows"] == inside.sum()
        assert entry["explained_variance"] == pytest.approx(by_hand(*dictionary[:2], x[inside])["explained_variance"], rel=1e-4)
    assert result["own"] == "all" and not result["enough_rows"]
    json.dumps(result, allow_nan=False)


def test_batches_do_not_matter_and_progress_counts_rows(tiny, tmp_path):
    x, columns = rows_of(tiny, 700)
    store, seen = make_store(tmp_path / "s", x, columns), []
    a = evaluate(tiny.topk(SITE), store, batch_size=400, progress=seen.append)
    b = evaluate(tiny.topk(SITE), store, batch_size=256)
    assert sum(seen) == 700
    for key in ("explained_variance", "cosine", "l0"):
        assert a["sets"]["masked"][key] == pytest.approx(b["sets"]["masked"][key], rel=1e-5)
        assert a["sets"]["all"]["intervals"][key]["low"] == pytest.approx(b["sets"]["all"]["intervals"][key]["low"], rel=1e-5)


def test_a_store_that_knows_less_and_few_documents(tiny, tmp_path):
    x, columns = rows_of(tiny, 400)
    bare = evaluate(tiny.topk(SITE), make_store(tmp_path / "bare", x, {}), batch_size=400)
    assert list(bare["sets"]) == ["all"] and bare["sets"]["all"]["intervals"] == {}
    few = evaluate(tiny.topk(SITE), make_store(tmp_path / "few", x, {"document": columns["document"] // 10}), batch_size=400)
    interval = few["sets"]["all"]["intervals"]["explained_variance"]
    assert interval["low"] is None and "5 units" in interval["note"]


def test_the_interval_resamples_documents(tiny, tmp_path):
    """Two kinds of documents, one of which the dictionary knows nothing of: the interval is as wide as that lottery."""
    spec, weights, card = tiny.topk(SITE, k=4, width=32)
    rng = np.random.default_rng(0)
    codes = rng.uniform(2, 3, size=(4000, 1)) * np.asarray(weights["W_dec"])[rng.integers(0, 32, 4000)] + np.asarray(weights["b_dec"])
    document = np.arange(4000) // 100
    x = np.where((document % 2 == 0)[:, None], codes, rng.normal(size=(4000, tiny.width)) * 3).astype(np.float32)
    whole = evaluate((spec, weights, card), make_store(tmp_path / "a", x, {"document": document.astype(np.int32)}), batch_size=4000)
    split = evaluate((spec, weights, card), make_store(tmp_path / "b", x, {"document": np.arange(4000).astype(np.int32)}), batch_size=4000)
    width = lambda r: np.diff([r["sets"]["all"]["intervals"]["explained_variance"][key] for key in ("low", "high")])[0]  # noqa: E731
    assert width(whole) > 1.1 * width(split)


def test_parameters_on_scaled_rows_are_folded(tiny, tmp_path):
    x, columns = rows_of(tiny, 400)
    store = make_store(tmp_path / "s", x * 7, columns)
    spec, weights, _ = tiny.topk(SITE)
    meta = DictionaryMeta("tiny", SITE, 1, select="masked", input_scale=7.0, scale_folded=False)
    scaled = evaluate((spec, weights, meta), store, batch_size=400)
    folded = evaluate((spec, spec.fold(weights, 7.0), dataclasses.replace(meta, scale_folded=True)), store, batch_size=400)
    assert scaled["sets"] == folded["sets"] and scaled["own"] == "masked"
    assert scaled["sets"]["all"]["explained_variance"] == pytest.approx(by_hand(spec, weights, x)["explained_variance"], rel=1e-4)


def test_mismatches(tiny, tmp_path):
    x, columns = rows_of(tiny, 300)
    store = make_store(tmp_path / "s", x, {"position": columns["position"]}, model_identity="abc", tokenizer="f" * 64)
    with pytest.raises(UserError, match="no site resid_post@2"):
        evaluate(tiny.topk("resid_post@2"), store)
    with pytest.raises(UserError, match="written by abc"):
        evaluate(tiny.topk(SITE, model_identity="xyz"), store)
    with pytest.raises(UserError, match="tokenizer eeeeeeeeeeee is not the store's ffffffffffff"):
        evaluate(tiny.topk(SITE, tokenizer="e" * 64), store)
    assert "abc" in evaluate(tiny.topk(SITE, model_identity="xyz"), store, force=True, batch_size=300)["forced"][0]
    assert evaluate(tiny.topk(SITE, model_identity="abc", tokenizer="f" * 64), store, batch_size=300)["forced"] == []
    folded = make_store(tmp_path / "folded", x, {}, weight_processing="folded")
    with pytest.raises(UserError, match="trained on raw weights, the store holds activations of folded ones"):
        evaluate(tiny.topk(SITE, weight_processing="raw"), folded)
    for known, place in (("folded", folded), (None, folded), ("folded", store)):  # what one side does not say is not compared
        assert evaluate(tiny.topk(SITE, weight_processing=known), place, batch_size=300)["forced"] == []
    with pytest.raises(UserError, match="masked rows"):
        evaluate(tiny.topk(SITE, select="masked"), store)
    other = ActivationStore.create(tmp_path / "wide", {SITE: 8}, {}, dtype="float32")
    other.append({SITE: np.zeros((4, 8), np.float32)}, {})
    with pytest.raises(UserError, match="width 16"):
        evaluate(tiny.topk(SITE), other.finish())
