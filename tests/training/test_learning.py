"""What training must achieve: dead latents come back, known directions are found."""

import functools

import jax
import numpy as np

from dlmscope_jax.dictionaries import LossSettings, TopK
from dlmscope_jax.training import TrainSpec, init_state, make_step

from .conftest import sparse_rows

D, N, BATCH = 16, 64, 256


def batches(rows, start, count):
    for step in range(start, start + count):
        yield rows[np.random.default_rng([0, step]).integers(len(rows), size=BATCH)]


@functools.cache
def settings():
    rows, directions = sparse_rows(40_000, D, features=32, active=2)
    spec = TrainSpec(TopK(D, N, 2), steps=10_000, batch_size=BATCH, lr=5e-3, warmup_steps=10, dead_rows=10 * BATCH)
    return rows, directions, spec


def with_half_of_the_latents_dead(spec, rows):
    """A short training, after which the biases of every other latent are pushed far below zero."""
    step, state = make_step(spec), init_state(spec, sample=rows[:2048])
    for batch in batches(rows, 0, 50):
        state, _ = step(state, batch)
    killed = np.arange(N) % 2 == 0
    bias = np.asarray(state.params["b_enc"]) - 2.0 * killed  # in units of the rows' root mean squared norm
    return state.replace(params={**state.params, "b_enc": jax.numpy.asarray(bias)}), killed


def fired_again(alpha, n_rows):
    """Share of killed latents that fired at least once in ``n_rows`` rows of further training."""
    rows, _, spec = settings()
    spec = TrainSpec(**{**spec.__dict__, "settings": LossSettings(aux=alpha)})
    state, killed = with_half_of_the_latents_dead(spec, rows)
    pre = np.asarray(spec.dictionary.encode(state.params, rows[:4096] / state.input_scale).indices)
    assert not np.isin(pre, np.flatnonzero(killed)).any()  # they are dead indeed
    step, steps = make_step(spec), n_rows // BATCH
    since = np.full(N, np.iinfo(np.int32).max)
    for batch in batches(rows, 50, steps):
        state, metrics = step(state, batch)
        since = np.minimum(since, np.asarray(state.rows_since_fired))
    return (since[killed] == 0).mean(), metrics


def test_auxk_revives_dead_latents():
    n_rows = 160 * BATCH  # 40,960; the bias of a dead latent starts two root mean squared norms below zero
    share, _ = fired_again(1 / 32, n_rows)
    assert share >= 0.8
    control, metrics = fired_again(0.0, n_rows)
    assert control <= 0.1
    assert float(metrics["dead"][0]) > 0.45


def test_known_directions_are_found():
    rows, directions, spec = settings()
    step, state = make_step(spec), init_state(spec, sample=rows[:2048])
    closest = lambda: (directions @ np.asarray(state.params["W_dec"]).T).max(axis=1)  # noqa: E731
    assert closest().mean() < 0.7
    for batch in batches(rows, 0, 400):
        state, _ = step(state, batch)
    assert closest().mean() > 0.97
    assert (closest() > 0.9).all()
