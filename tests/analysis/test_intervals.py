"""The bootstrap against cases whose answer is known, and its coverage on simulated documents."""

import json

import numpy as np
import pytest

from dlmscope_jax.analysis.intervals import bootstrap, sum_by
from dlmscope_jax.errors import UserError


def test_value_is_the_ratio_of_sums_not_the_mean_of_ratios():
    top, bottom = np.array([1.0, 30.0] * 20), np.array([1.0, 10.0] * 20)
    assert bootstrap(top, bottom).value == pytest.approx(31 / 11)


def test_proportional_units_have_an_interval_of_no_width():
    bottom = np.arange(1.0, 51.0)
    got = bootstrap(2.5 * bottom, bottom)
    assert got.value == pytest.approx(2.5) and got.low == pytest.approx(2.5) and got.high == pytest.approx(2.5)


def test_mean_of_many_units_matches_the_normal_closed_form():
    x = np.random.default_rng(3).normal(5.0, 2.0, size=4000)
    got = bootstrap(x)
    half = 1.96 * x.std() / np.sqrt(len(x))
    assert got.low == pytest.approx(x.mean() - half, abs=0.06 * half * 2)
    assert got.high == pytest.approx(x.mean() + half, abs=0.06 * half * 2)


def test_two_valued_units_match_binomial_quantiles():
    # 50 units, half of them 1: the bootstrap mean is Binomial(50, .5) / 50, whose 2.5 % and 97.5 % quantiles are 18 and 32
    x = np.array([0.0, 1.0] * 25)
    got = bootstrap(x, np.ones(50), draws=20_000)
    assert got.low == pytest.approx(18 / 50) and got.high == pytest.approx(32 / 50)
    assert got.units == 50


def test_coverage_over_simulated_documents():
    rng, hits, n = np.random.default_rng(0), 0, 200
    for trial in range(n):
        length = rng.integers(5, 60, size=60)
        level = rng.normal(0.3, 0.5, size=60)  # documents differ; tokens within one share their level
        top = level * length
        got = bootstrap(top, length.astype(float), draws=400, seed=trial)
        hits += got.low <= 0.3 <= got.high
    assert 0.88 <= hits / n <= 0.99


def test_resampling_tokens_would_be_too_narrow():
    rng = np.random.default_rng(1)
    level, length = rng.normal(0.0, 1.0, size=50), 200
    tokens = np.repeat(level, length)
    by_document, by_token = bootstrap(level * length, np.full(50, float(length))), bootstrap(tokens)
    assert (by_document.high - by_document.low) > 5 * (by_token.high - by_token.low)


def test_fewer_than_thirty_units_have_no_interval_and_say_so():
    got = bootstrap(np.ones(29), np.ones(29))
    assert got.value == 1.0 and got.low is None and got.high is None and "29 units" in got.note
    assert bootstrap(np.ones(30), np.ones(30)).low == 1.0


def test_units_without_scored_tokens_are_not_counted():
    top, bottom = np.ones(40), np.ones(40)
    top[:15], bottom[:15] = 0, 0
    got = bootstrap(top, bottom)
    assert got.units == 25 and got.low is None


def test_offset_and_sign_give_one_minus_the_ratio():
    rng = np.random.default_rng(2)
    error, total = rng.uniform(0, 1, 80), rng.uniform(2, 3, 80)
    plain, flipped = bootstrap(error, total), bootstrap(error, total, offset=1.0, sign=-1.0)
    assert flipped.value == pytest.approx(1 - plain.value)
    assert flipped.low == pytest.approx(1 - plain.high) and flipped.high == pytest.approx(1 - plain.low)


def test_a_denominator_around_zero_gives_no_interval():
    rng = np.random.default_rng(4)
    got = bootstrap(np.ones(100), rng.normal(0, 1, 100))
    assert got.low is None and "denominator" in got.note
    assert bootstrap(np.ones(40), np.zeros(40)).value is None


def test_pairing_and_seed():
    rng = np.random.default_rng(5)
    clean = rng.normal(3, 1, 100)
    spliced = clean + 0.1 + rng.normal(0, 0.01, 100)
    paired = bootstrap(spliced - clean)
    assert 0.09 < paired.low < 0.1 < paired.high < 0.11
    assert bootstrap(clean, seed=7) == bootstrap(clean, seed=7) != bootstrap(clean, seed=8)
    json.dumps(paired.to_json(), allow_nan=False)


def test_chunks_of_draws_do_not_change_the_answer(monkeypatch):
    x = np.random.default_rng(6).normal(size=64)
    whole = bootstrap(x)
    monkeypatch.setattr("dlmscope_jax.analysis.intervals._CHUNK", 64 * 7)
    assert bootstrap(x).low == pytest.approx(whole.low, abs=1e-12)


def test_shapes_are_checked_and_sum_by_skips_padding():
    with pytest.raises(UserError, match="one value a unit"):
        bootstrap(np.ones(3), np.ones(4))
    assert sum_by(np.array([0, 2, 2, -1]), np.array([1.0, 2.0, 3.0, 100.0]), 3).tolist() == [1.0, 0.0, 5.0]
