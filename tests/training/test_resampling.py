"""Dead latents that begin again."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlmscope_jax.dictionaries import Gated, JumpReLU, LossSettings, ReLU, TopK
from dlmscope_jax.training import init_state, make_step, resampling

from .conftest import small_spec, sparse_rows

ROWS, _ = sparse_rows(4_000)
resample = jax.jit(resampling.resample, static_argnums=0)


def under_way(**changes):
    """A state after a few steps, with moments that are not zero."""
    spec = small_spec(**changes)
    step, state = make_step(spec), init_state(spec, sample=ROWS[:256])
    for i in range(3):
        state, _ = step(state, ROWS[64 * i : 64 * (i + 1)])
    return spec, jax.device_get(state)


def test_a_latent_that_begins_again():
    spec, state = under_way()
    x = ROWS[:256] / state.input_scale
    dead = np.arange(64) % 3 == 0
    params, opt_state = resample(spec.dictionary, jax.random.key(0), state.params, state.opt_state, x, None, jnp.asarray(dead))
    rows = (x - state.params["b_dec"]) / np.linalg.norm(x - state.params["b_dec"], axis=1, keepdims=True)
    cosines = np.asarray(params["W_dec"])[dead] @ rows.T
    assert (cosines.max(axis=1) > 1 - 1e-5).all()  # each is one of the rows
    live = np.linalg.norm(state.params["W_enc"][~dead], axis=1).mean()
    np.testing.assert_allclose(params["W_enc"][dead], 0.2 * live * np.asarray(params["W_dec"])[dead], atol=1e-6)
    assert (np.asarray(params["b_enc"])[dead] == 0).all()
    moments = ("mu", "nu")
    for name in ("W_enc", "W_dec", "b_enc"):
        for moment in moments:
            before, after = (np.asarray(getattr(s, moment)[name]) for s in (state.opt_state, opt_state))
            assert (after[dead] == 0).all() and (before[dead] != 0).any()
            np.testing.assert_array_equal(after[~dead], before[~dead])
        np.testing.assert_array_equal(np.asarray(params[name])[~dead], state.params[name][~dead])
    np.testing.assert_array_equal(params["b_dec"], state.params["b_dec"])
    np.testing.assert_array_equal(opt_state.mu["b_dec"], state.opt_state.mu["b_dec"])
    assert int(opt_state.count) == int(state.opt_state.count)


def test_a_threshold_that_learned_to_shut_a_latent_begins_again():
    dictionary = JumpReLU(16, 64)
    params = dictionary.init(jax.random.key(0)) | {"threshold": jnp.full(64, 9.0)}
    moments = {"mu": jax.tree.map(jnp.ones_like, params)}
    dead = np.arange(64) % 3 == 0
    params, moments = resample(dictionary, jax.random.key(0), params, moments, ROWS[:256] / 10.0, None, jnp.asarray(dead))
    np.testing.assert_array_equal(params["threshold"], np.where(dead, np.float32(dictionary.first_threshold), np.float32(9.0)))
    np.testing.assert_array_equal(moments["mu"]["threshold"], ~dead)


def test_bad_rows_are_drawn_more_often_as_the_square_of_their_loss():
    spec, state = under_way()
    few = np.array(ROWS[:4] / state.input_scale)
    _, _, error = jax.jit(spec.dictionary.row_errors)(state.params, few)
    expected = np.square(np.asarray(error, np.float64))
    centred = few - state.params["b_dec"]
    found = np.zeros(4)
    dead = jnp.ones(64, bool)
    unit = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    for i in range(40):
        params, _ = resample(spec.dictionary, jax.random.key(i), state.params, state.opt_state, few, None, dead)
        found += np.bincount((np.asarray(params["W_dec"]) @ unit.T).argmax(1), minlength=4)
    np.testing.assert_allclose(found / found.sum(), expected / expected.sum(), atol=0.04)


def test_transcoders_take_both_directions():
    spec = small_spec(dictionary=TopK(16, 64, 4, d_out=8, input_bias=True), target="y", site="x")
    targets = ROWS[:256] @ np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    state = init_state(spec, sample=ROWS[:256], targets=targets)
    x, y = ROWS[:64] / state.input_scale, targets[:64] / state.output_scale
    params, _ = resample(spec.dictionary, jax.random.key(1), state.params, state.opt_state, x, y, jnp.ones(64, bool))
    unit = lambda rows: rows / np.linalg.norm(rows, axis=1, keepdims=True)  # noqa: E731
    reads = (unit(np.asarray(params["W_enc"])) @ unit(x - state.params["b_in"]).T).argmax(1)
    writes = (np.asarray(params["W_dec"]) @ unit(y - state.params["b_dec"]).T).argmax(1)
    np.testing.assert_array_equal(reads, writes)
    np.testing.assert_allclose(np.linalg.norm(params["W_enc"], axis=1), 0.2, rtol=1e-5)  # none is live


@pytest.mark.parametrize("kind", [TopK, Gated])
def test_where_nothing_is_subtracted_the_biases_take_the_mean_off(kind):
    """Rows far from the origin: the latents begin again as those that subtract the mean would, not as the mean's direction."""
    far = (ROWS[:256] + 500.0).astype(np.float32)
    sizes = {"d_in": 16, "width": 64, "d_out": 8} | ({"k": 4} if kind is TopK else {})
    spec = small_spec(dictionary=kind(**sizes), target="y", site="x")
    targets = ROWS[:256] @ np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    state = init_state(spec, sample=far, targets=targets)
    x, y = far / state.input_scale, targets / state.output_scale
    params, _ = resample(spec.dictionary, jax.random.key(1), state.params, state.opt_state, x, y, jnp.ones(64, bool))
    centred = x - x.mean(0)
    cosines = np.asarray(params["W_enc"]) / 0.2 @ (centred / np.linalg.norm(centred, axis=1, keepdims=True)).T
    assert (cosines.max(axis=1) > 1 - 1e-3).all()
    for name in ("b_enc",) if kind is TopK else ("b_gate", "b_mag"):
        pre = x @ np.asarray(params["W_enc"]).T + np.asarray(params[name])
        np.testing.assert_allclose(pre.mean(0), 0, atol=1e-5)
    assert kind is TopK or (np.asarray(params["r_mag"]) == 0).all()


@pytest.mark.some(2)
@pytest.mark.parametrize("optimizer", ["adam", "adam_bf16", "lion", "signum", "muon"])
def test_every_optimiser_forgets(optimizer):
    spec, state = under_way(optimizer=optimizer)
    dead = np.arange(64) < 10
    x = ROWS[:64] / state.input_scale
    _, after = resample(spec.dictionary, jax.random.key(0), state.params, state.opt_state, x, None, jnp.asarray(dead))
    touched = 0
    for (path, leaf), old in zip(jax.tree_util.tree_leaves_with_path(after), jax.tree.leaves(state.opt_state), strict=True):
        leaf, old = np.asarray(leaf, np.float32), np.asarray(old, np.float32)
        if leaf.shape[:1] == (64,):
            assert (leaf[dead] == 0).all(), path
            np.testing.assert_array_equal(leaf[~dead], old[~dead])
            touched += 1
        else:
            np.testing.assert_array_equal(leaf, old)
    assert touched >= 3


def killed_and_trained(**changes):
    """A training in which every other latent is pushed far below zero at first; metrics, and which of them fire at the end."""
    settings = LossSettings(aux=0.0, sparsity=0.02)
    spec = small_spec(dictionary=ReLU(16, 64), steps=200, dead_rows=256, settings=settings, sparsity_warmup=0, **changes)
    step, state = make_step(spec), init_state(spec, sample=ROWS[:256])
    killed = np.arange(64) % 2 == 0
    state = dataclasses.replace(state, params={**state.params, "b_enc": state.params["b_enc"] - 3.0 * jnp.asarray(killed, jnp.float32)})
    history = []
    for i in range(40):
        state, metrics = step(state, ROWS[np.random.default_rng(i).integers(4_000, size=64)])
        history.append({name: float(total) for name, (total, _) in metrics.items()})
    fired = np.asarray(spec.dictionary.encode(state.params, ROWS / state.input_scale).fired(64))
    return history, (fired[killed] > 0).mean()


def test_it_happens_at_its_steps_and_revives():
    history, share = killed_and_trained(resample_every=10)
    resampled, dead = ([line[name] for line in history] for name in ("resampled", "dead"))
    assert {i for i, count in enumerate(resampled) if count} <= {9, 19, 29, 39}
    assert resampled[9] >= 32
    assert dead[8] >= 0.5 and dead[10] == 0.0
    assert share > 0.9
    history, share = killed_and_trained()
    assert share == 0.0 and "resampled" not in history[0]


def test_without_it_nothing_of_it_is_in_the_program():
    plain, resampled = small_spec(), small_spec(resample_every=5)
    text = lambda spec: make_step(spec).lower(init_state(spec), ROWS[:64]).as_text()  # noqa: E731
    assert "threefry" not in text(plain) and "threefry" in text(resampled)


def test_a_step_that_is_not_due_is_the_plain_step():
    plain, resampled = small_spec(dead_rows=1), small_spec(dead_rows=1, resample_every=1_000)
    states = []
    for spec in (plain, resampled):
        step, state = make_step(spec), init_state(spec, sample=ROWS[:256])
        for i in range(2):
            state, _ = step(state, ROWS[64 * i : 64 * (i + 1)])
        states.append(jax.device_get(state.params))
    for name, value in states[0].items():
        np.testing.assert_allclose(states[1][name], value, atol=1e-6, err_msg=name)
