"""The step against the whole recipe written a second time, in float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dlmscope_jax.dictionaries import BatchTopK, LossSettings, TopK
from dlmscope_jax.training import TrainSpec, init_state, learning_rate, make_step

from .conftest import assert_same_bits, small_spec, sparse_rows


def reference_step(spec, params, mu, nu, count, since, scale, step, batch):
    """Loss, its gradient, projection, clipping, Adam, renormalisation; float64, by the formulae and not by this package's code."""
    d = spec.dictionary
    x = batch / scale
    n = len(x)
    w_enc, w_dec, b_enc, b_dec = (params[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec"))
    centred = x - b_dec
    pre = centred @ w_enc.T + b_enc
    chosen = np.zeros(pre.shape, bool)
    np.put_along_axis(chosen, np.argsort(-pre, axis=1, kind="stable")[:, : d.k], True, axis=1)
    active = chosen & (pre > 0)
    codes = np.where(active, pre, 0)
    residual = x - codes @ w_dec - b_dec
    reconstruction = (residual**2).sum() / n

    d_out = -2 * residual / n
    g_dec, d_pre, g_bdec = codes.T @ d_out, np.where(active, d_out @ w_dec.T, 0), d_out.sum(0)

    dead = since >= spec.dead_rows
    aux = weight = 0.0
    if dead.any() and spec.settings_used.aux:
        count_aux = d.d_in // 2
        ranked = np.argsort(-np.where(dead, pre, -np.inf), axis=1, kind="stable")[:, :count_aux]
        used = np.zeros(pre.shape, bool)
        np.put_along_axis(used, ranked, True, axis=1)
        used &= dead
        values = np.where(used, pre, 0)
        variation = ((residual - residual.mean(0)) ** 2).sum()
        left = residual - values @ w_dec
        aux, weight = (left**2).sum() / variation, spec.settings_used.aux * min(1, dead.sum() / count_aux)
        d_left = -2 * left / variation * weight
        g_dec = g_dec + values.T @ d_left
        d_pre = d_pre + np.where(used, d_left @ w_dec.T, 0)
    grads = {"W_enc": d_pre.T @ centred, "W_dec": g_dec, "b_enc": d_pre.sum(0), "b_dec": g_bdec - d_pre.sum(0) @ w_enc}

    along = w_dec / np.linalg.norm(w_dec, axis=1, keepdims=True)
    grads["W_dec"] = grads["W_dec"] - (grads["W_dec"] * along).sum(1, keepdims=True) * along
    norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
    b1, b2 = spec.betas_used
    new = {}
    for name, g in grads.items():
        g = g * min(1, spec.clip / norm)
        mu[name] = b1 * mu[name] + (1 - b1) * g
        nu[name] = b2 * nu[name] + (1 - b2) * g**2
        first, second = mu[name] / (1 - b1 ** (count + 1)), nu[name] / (1 - b2 ** (count + 1))
        new[name] = params[name] - spec.lr * first / (np.sqrt(second) + spec.eps_used)  # the step is on the flat part of the schedule
    new["W_dec"] /= np.linalg.norm(new["W_dec"], axis=1, keepdims=True)
    since = np.where(active.any(0), 0, since + n)
    return new, mu, nu, since, {"loss": reconstruction + weight * aux, "aux": aux, "grad_norm": norm, "l0": active.sum() / n}


@pytest.mark.parametrize(("n_dead", "clip"), [(0, 100.0), (5, 0.05), (40, 100.0)], ids=["none-dead", "few-dead-and-clipped", "many-dead"])
def test_one_step_is_the_recipe(n_dead, clip):
    spec = small_spec(dictionary=TopK(16, 64, 4), steps=100, warmup_steps=2, clip=clip)
    rows, _ = sparse_rows(320)
    rng = np.random.default_rng(3)
    state = init_state(spec, sample=rows[:256])
    # moments and biases of a training under way: Adam's very first update is a mere sign
    like = lambda size, positive=False: {  # noqa: E731
        name: (np.abs if positive else np.asarray)(rng.normal(size=p.shape) * size).astype(np.float32) for name, p in state.params.items()
    }
    params = {name: np.asarray(p) + (1e-2 * rng.normal(size=p.shape)).astype(np.float32) for name, p in state.params.items()}
    params["W_dec"] /= np.linalg.norm(params["W_dec"], axis=1, keepdims=True)
    mu, nu = like(1e-2), like(1e-3, positive=True)
    since = np.zeros(64, np.int32)
    since[:n_dead] = 5_000
    state = state.replace(
        step=jnp.int32(7),
        params=jax.tree.map(jnp.asarray, params),
        opt_state=optax.ScaleByAdamState(jnp.int32(5), jax.tree.map(jnp.asarray, mu), jax.tree.map(jnp.asarray, nu)),
        rows_since_fired=jnp.asarray(since),
    )
    wide = lambda tree: {name: np.asarray(leaf, np.float64) for name, leaf in tree.items()}  # noqa: E731
    scale = float(state.input_scale)
    batch = rows[256:]
    expected = reference_step(spec, wide(params), wide(mu), wide(nu), 5, since, scale, 7, batch.astype(np.float64))
    state, metrics = make_step(spec)(state, batch)

    for name, value in expected[0].items():
        np.testing.assert_allclose(state.params[name], value, rtol=0, atol=2e-6, err_msg=name)
        np.testing.assert_allclose(state.opt_state.mu[name], expected[1][name], rtol=0, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(state.opt_state.nu[name], expected[2][name], rtol=0, atol=1e-7, err_msg=name)
    np.testing.assert_array_equal(state.rows_since_fired, expected[3])
    for name, value in expected[4].items():
        total, count = metrics[name]
        np.testing.assert_allclose(total / count, value, rtol=1e-5, atol=1e-7, err_msg=name)
    assert (expected[4]["grad_norm"] > clip) == (n_dead == 5)
    assert int(state.step) == 8 and int(state.opt_state.count) == 6 and int(state.skipped) == 0


def test_scale_and_centre_come_from_the_sample():
    rows, _ = sparse_rows(500)
    rows[7] = np.inf  # a row that is not finite is left out
    state = init_state(small_spec(), sample=rows)
    good = np.delete(rows, 7, axis=0).astype(np.float64)
    scale = np.sqrt((good**2).sum(1).mean())
    np.testing.assert_allclose(state.input_scale, scale, rtol=1e-6)
    centre = np.asarray(state.params["b_dec"], np.float64)
    offsets = good / scale - centre
    # the defining property of a geometric median: unit vectors from it to the rows cancel
    assert np.linalg.norm((offsets / np.linalg.norm(offsets, axis=1, keepdims=True)).mean(0)) < 1e-3
    np.testing.assert_array_equal(state.params["W_enc"], state.params["W_dec"])


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_a_batch_that_is_not_finite_changes_nothing_and_is_reported(bad):
    spec = small_spec()
    rows, _ = sparse_rows(320)
    step = make_step(spec)
    state, _ = step(init_state(spec, sample=rows[:256]), rows[:64])
    before = jax.device_get(state)
    batch = rows[64:128].copy()
    batch[3, 5] = bad
    after, metrics = step(state, batch)
    after = jax.device_get(after)
    assert_same_bits(after, before.replace(step=np.int32(2), skipped=np.int32(1)))
    assert float(metrics["skipped"][0]) == 1
    for name, (total, count) in metrics.items():
        assert np.isfinite(total)
        assert float(count) == (1 if name == "skipped" else 0)


def test_a_batch_that_is_not_finite_changes_no_average_no_statistic_and_begins_nothing_again():
    """In a step that would begin dead latents again, with a moving average and a threshold that is measured."""
    spec = small_spec(dictionary=BatchTopK(16, 64, 4), ema=0.9, resample_every=2, dead_rows=1)
    rows, _ = sparse_rows(320)
    step = make_step(spec)
    state, _ = step(init_state(spec, sample=rows[:256]), rows[:64])
    before = jax.device_get(state)
    assert (before.rows_since_fired >= 1).any()
    after, metrics = step(state, np.where(np.arange(64)[:, None] == 3, np.nan, rows[64:128]))
    assert_same_bits(jax.device_get(after), before.replace(step=np.int32(2), skipped=np.int32(1)))
    assert float(metrics["resampled"][0]) == 0
    again, metrics = step(step(after, rows[128:192])[0], rows[192:256])  # the next one that is due
    assert float(metrics["resampled"][0]) > 0 and float(again.params["threshold"]) != float(before.params["threshold"])


def test_rows_of_any_float_dtype_are_read():
    spec = small_spec()
    rows, _ = sparse_rows(320)
    step = make_step(spec)
    losses = []
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        state, metrics = step(init_state(spec, sample=rows[:256]), jnp.asarray(rows[:64], dtype))
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.params))
        losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
    np.testing.assert_allclose(losses, losses[0], rtol=0.02)
    assert losses[0] != losses[1]


def test_trainings_that_differ_in_numbers_share_one_program():
    rows, _ = sparse_rows(320)
    settings = LossSettings(aux=0.5)
    specs = [
        small_spec(ema=0.9, k_start=8, resample_every=9),
        small_spec(ema=0.5, k_start=8, k_anneal_steps=2, resample_every=3, dictionary=TopK(16, 64, 2), site="resid_post@3", seed=5),
        small_spec(ema=0.9, k_start=8, resample_every=9, lr=1e-3, warmup_steps=3, decay_start=0.5, steps=99, clip=None, settings=settings),
        small_spec(ema=0.9, k_start=8, resample_every=9, dead_rows=64, sparsity_warmup=3, entropy_start=2, init_seed=4),
        small_spec(ema=0.9, k_start=8, resample_every=9, settings=LossSettings(aux=1, sparsity=2)),
    ]
    step = make_step(specs[0])
    for spec in specs:
        assert make_step(spec) is step
        step(init_state(spec, sample=rows[:256]), rows[:64])
        assert step._cache_size() == 1
    assert make_step(small_spec(dictionary=TopK(16, 64, 5))) is not step
    assert make_step(small_spec(optimizer="lion")) is not step


def test_the_state_is_donated():
    spec = small_spec()
    rows, _ = sparse_rows(64)
    state = init_state(spec, sample=rows)
    make_step(spec)(state, rows)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))


def test_schedule():
    spec = small_spec(steps=100, lr=0.5, warmup_steps=None, decay_start=0.8)
    rates = np.array([float(learning_rate(spec, step)) for step in range(101)])
    np.testing.assert_allclose(rates[:6], 0.5 * np.array([0.2, 0.4, 0.6, 0.8, 1.0, 1.0]), rtol=1e-6)  # 5 % of 100 steps
    assert (rates[4:81] == 0.5).all()
    np.testing.assert_allclose(rates[80:], 0.5 * np.linspace(1, 0, 21), atol=1e-7)
    assert float(learning_rate(small_spec(steps=100, lr=0.5, warmup_steps=0, decay_start=1.0), 0)) == 0.5


def test_defaults_that_depend_on_the_rest():
    wide = TrainSpec(TopK(3584, 2**14, 80), steps=73_242)
    assert wide.lr_used == 2e-4 and wide.warmup_used == 1_000
    assert wide.dead_rows_used == 7_499_980  # 5 % of 150 M rows
    assert TrainSpec(TopK(3584, 2**14, 80), steps=244_140).dead_rows_used == 10_000_000
    assert TrainSpec(TopK(8, 2**16, 2), steps=40).lr_used == 1e-4 and TrainSpec(TopK(8, 64, 2), steps=40).warmup_used == 2
    assert TrainSpec(TopK(8, 64, 2), steps=10, batch_size=32).dead_rows_used == 32
