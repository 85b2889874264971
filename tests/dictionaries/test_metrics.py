"""Streaming fidelity against NumPy in float64 over all rows at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlmscope_jax.dictionaries import Binary, Dense, StreamingFidelity, TopK
from dlmscope_jax.dictionaries.metrics import Sum
from dlmscope_jax.errors import UserError

D, N, K, ROWS, BATCH = 6, 40, 3, 300, 64
SPEC = TopK(D, N, K)


@pytest.fixture(scope="module")
def stream():
    """Rows with a mean far above their spread, norms in known ranges, rates, positions, and a padded last batch."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(ROWS, D)) + np.array([50.0, -20, 0, 0, 5, 0])).astype(np.float32)
    x[::37] *= 40  # far above 10 times the median norm
    return {
        "x": x,
        "rate": rng.choice([0.05, 0.1, 0.55, 1.0, np.nan], ROWS).astype(np.float32),
        "position": rng.integers(0, 5, ROWS).astype(np.int32),
    }


@pytest.fixture(scope="module")
def params():
    p = SPEC.init(jax.random.key(0))
    return {**p, "b_dec": jnp.asarray([50.0, -20, 0, 0, 5, 0]), "b_enc": p["b_enc"].at[jnp.array([0, 9])].set(-1e9)}


def run(stream, params, batch=BATCH):
    state = StreamingFidelity.init(N, D)
    for start in range(0, ROWS, batch):
        part = {name: column[start : start + batch] for name, column in stream.items()}
        valid = np.arange(batch) < len(part["x"])
        arrays = {}
        for name, column in part.items():  # padding must not count whatever it holds
            filler = np.nan if column.dtype == np.float32 else 0
            padded = np.full((batch, *column.shape[1:]), filler, column.dtype)
            padded[: len(column)] = column
            arrays[name] = jnp.asarray(padded)
        state = state.update(SPEC, params, arrays["x"], rate=arrays["rate"], position=arrays["position"], valid=jnp.asarray(valid))
    return state


def explained(x, y, mean=None):
    mean = x.mean(axis=0) if mean is None else mean
    return 1 - ((x - y) ** 2).sum() / ((x - mean) ** 2).sum()


def test_equals_numpy_in_float64(stream, params):
    state = run(stream, params)
    got = state.finish()
    x = stream["x"].astype(np.float64)
    codes = SPEC.encode(params, jnp.asarray(stream["x"]))
    y = np.asarray(SPEC.decode(params, codes), np.float64)
    active = np.asarray(SPEC.dense(codes)) > 0
    relative = np.linalg.norm(x - y, axis=1) / np.linalg.norm(x, axis=1)

    assert got["rows"] == ROWS
    np.testing.assert_allclose(got["explained_variance"], explained(x, y), rtol=2e-5)
    np.testing.assert_allclose(got["l0"], active.sum(axis=1).mean(), rtol=1e-6)
    cosine = (x * y).sum(axis=1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
    np.testing.assert_allclose(got["cosine"], cosine.mean(), rtol=1e-5)
    for name, q in (("q25", 0.25), ("median", 0.5), ("q75", 0.75)):
        np.testing.assert_allclose(got["relative_error"][name], np.quantile(relative, q), rtol=0.03)

    np.testing.assert_array_equal(state.fired, active.sum(axis=0))
    density = active.mean(axis=0)
    np.testing.assert_allclose(state.density(), density)
    assert got["dead"] == (density == 0).sum() > 0
    np.testing.assert_allclose(got["dead_share"], (density == 0).mean())
    np.testing.assert_allclose(got["dense_share_1pct"], (density > 0.01).mean())
    np.testing.assert_allclose(got["dense_share_10pct"], (density > 0.10).mean())

    # filtered: no position 0, no row above 10 times the median norm
    inner = stream["position"] != 0
    norm = np.linalg.norm(x, axis=1)
    kept = inner & (norm < 10 * np.median(norm[inner]))
    assert inner.sum() > kept.sum() == got["filtered"]["rows"]
    np.testing.assert_allclose(got["filtered"]["explained_variance"], explained(x[kept], y[kept]), rtol=2e-4)
    np.testing.assert_allclose(got["filtered"]["norm_median"], np.median(norm[inner]), rtol=0.04)
    assert norm[kept].max() < got["filtered"]["norm_limit"] < norm[inner & ~kept].min()

    # by rate: bins are closed below, the last one above too; rows without a rate are in no bin but in the total
    bins = {0.0: stream["rate"] == np.float32(0.05), 0.1: stream["rate"] == np.float32(0.1), 0.5: stream["rate"] == np.float32(0.55)}
    bins[0.9] = stream["rate"] == 1.0
    assert [b["low"] for b in got["by_rate"]] == list(bins)
    for entry, rows in zip(got["by_rate"], bins.values(), strict=True):
        assert entry["rows"] == rows.sum()
        np.testing.assert_allclose(entry["explained_variance"], explained(x[rows], y[rows]), rtol=1e-3)
        np.testing.assert_allclose(entry["explained_variance_global_mean"], explained(x[rows], y[rows], x.mean(axis=0)), rtol=1e-3)
        np.testing.assert_allclose(entry["relative_error"]["median"], np.median(relative[rows]), rtol=0.05)


def test_does_not_depend_on_how_rows_are_batched(stream, params):
    one, two = run(stream, params).finish(), run(stream, params, batch=ROWS).finish()
    np.testing.assert_allclose(one["explained_variance"], two["explained_variance"], rtol=1e-5)
    assert one["dead"] == two["dead"] and one["filtered"]["rows"] == two["filtered"]["rows"]


def test_a_constant_offset_of_the_reconstruction_counts_as_error():
    """Variance of the error, as dictionary_learning and DLM-Scope compute it, would say 1."""
    x = jnp.asarray(np.random.default_rng(1).normal(size=(50, D)), jnp.float32)
    result = StreamingFidelity.init(0, D).add(x, x + 1.0).finish()
    want = explained(np.asarray(x, np.float64), np.asarray(x + 1.0, np.float64))
    assert want < 0.2
    np.testing.assert_allclose(result["explained_variance"], want, rtol=1e-5)


def test_controls_have_no_codes():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(50, D)), jnp.float32)
    result = StreamingFidelity.init(0, D).add(x, jnp.zeros_like(x)).finish()
    assert result["l0"] is result["dead"] is result["dead_share"] is None
    assert result["cosine"] == 0.0 and result["by_rate"] == []


def test_of_bits_the_rarer_value_counts(stream):
    """METHODS.md, "Dictionaries": a bit that is 1 on 99 % of the rows has a density of 1 %, and one that never changes is dead."""
    spec = Binary(D, N)
    drawn = np.random.default_rng(3)
    p = {name: jnp.asarray(drawn.normal(size=shape), jnp.float32) for name, shape in spec.shapes().items()}
    centre = p["W_enc"] @ jnp.asarray([50.0, -20, 0, 0, 5, 0])
    p["b_enc"] = (jnp.asarray(drawn.normal(size=N) * 3, jnp.float32) - centre).at[:4].set(jnp.asarray([1e9, 1e9, -1e9, 1e9]))
    x, valid = jnp.asarray(stream["x"]), np.arange(ROWS) < 250
    state = StreamingFidelity.init(N, D)
    for rows in (slice(0, 100), slice(100, ROWS)):
        state = state.update(spec, p, x[rows], valid=jnp.asarray(valid[rows]))
    got = state.finish()
    ones = (np.asarray(x)[valid] @ np.asarray(p["W_enc"]).T + np.asarray(p["b_enc"]) > 0).mean(axis=0)
    rarer = np.minimum(ones, 1 - ones)
    assert (ones > 0.9).sum() > (ones == 1).sum() > 3 and (rarer > 0.1).any()
    np.testing.assert_allclose(state.density(), rarer, atol=1e-12)
    np.testing.assert_allclose(got["l0"], rarer.sum(), rtol=1e-9)
    assert got["dead"] == (rarer == 0).sum() >= 4
    np.testing.assert_allclose([got["dense_share_1pct"], got["dense_share_10pct"]], [(rarer > 0.01).mean(), (rarer > 0.1).mean()])
    live = ones[rarer > 0]
    plug_in = -(live * np.log2(live) + (1 - live) * np.log2(1 - live)).sum()
    np.testing.assert_allclose(got["marginal_entropy"]["plug_in"], plug_in, rtol=1e-9)
    # the same ones as ordinary activations
    codes = Dense(spec.encode(p, x).dense(N))
    plain = StreamingFidelity.init(N, D).add(x, x, codes, valid=jnp.asarray(valid)).finish()
    np.testing.assert_allclose(plain["l0"], ones.sum(), rtol=1e-6)
    assert "marginal_entropy" not in plain and plain["dead"] == (ones == 0).sum() < got["dead"]


def test_nothing_seen():
    result = StreamingFidelity.init(N, D).finish()
    assert result["rows"] == 0 and result["explained_variance"] is None and result["filtered"]["rows"] == 0


def test_is_a_pytree_that_scans(stream, params):
    x = jnp.asarray(stream["x"][:256]).reshape(4, 64, D)
    state, _ = jax.lax.scan(lambda s, rows: (s.update(SPEC, params, rows), None), StreamingFidelity.init(N, D), x)
    y = np.asarray(SPEC.reconstruct(params, x.reshape(-1, D)), np.float64)
    np.testing.assert_allclose(state.finish()["explained_variance"], explained(stream["x"][:256].astype(np.float64), y), rtol=2e-5)


def test_sums_keep_what_float32_loses():
    def add(total, _):
        return total.add(jnp.float32(1e-4)), None

    total, _ = jax.jit(lambda: jax.lax.scan(add, Sum.zeros().add(jnp.float32(1e6)), None, length=100_000))()
    # float32 alone would stay at 1e6: its step there is 0.06
    np.testing.assert_allclose(total.float64() - 1e6, 100_000 * np.float64(np.float32(1e-4)), rtol=1e-5)


def test_mistakes():
    with pytest.raises(UserError, match="ascending"):
        StreamingFidelity.init(4, D, rate_edges=(0.5, 0.1))
    with pytest.raises(UserError, match=r"rows must be \[rows, 6\]"):
        StreamingFidelity.init(4, D).add(jnp.zeros((3, 5)), jnp.zeros((3, 5)))
