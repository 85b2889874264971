"""Corruption: how many, where, never where protected."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlmscope_jax.diffusion import corrupt, training_rates
from dlmscope_jax.models import DiffusionSpec

SPEC = DiffusionSpec(3, shift=False)


def _tokens(rows, length):
    return jax.random.randint(jax.random.key(9), (rows, length), 4, 50)


def test_bernoulli_has_the_rate_of_its_row():
    rate = jnp.array([0.1, 0.5, 0.9, 0.0, 1.0])
    tokens = _tokens(5, 20_001)
    corrupted, is_masked = jax.jit(corrupt, static_argnums=3)(jax.random.key(0), tokens, rate, SPEC)
    share = np.asarray(is_masked[:, 1:].mean(axis=1))
    spread = np.sqrt(np.asarray(rate * (1 - rate)) / 20_000)
    assert (np.abs(share - np.asarray(rate)) <= 4 * spread).all()
    np.testing.assert_array_equal(corrupted, np.where(is_masked, 3, tokens))
    assert not is_masked[:, 0].any()


def test_exact_counts():
    rng = np.random.default_rng(0)
    protect = rng.random((6, 40)) < 0.3
    tokens = _tokens(6, 40)
    eligible = (~protect & (np.arange(40) > 0)).sum(axis=1)
    for i, rate in enumerate([0.001, 0.25, 0.5, 0.8, 1.0]):
        _, is_masked = corrupt(jax.random.key(i), tokens, rate, SPEC, protect=jnp.asarray(protect), exact=True)
        expected = np.maximum(np.round(np.float32(rate) * eligible.astype(np.float32)), 1)
        np.testing.assert_array_equal(is_masked.sum(axis=1), expected)
        assert not (np.asarray(is_masked) & protect).any() and not is_masked[:, 0].any()


def test_exact_masks_every_position_equally_often():
    draw = jax.vmap(lambda key: corrupt(key, jnp.zeros((1, 9), jnp.int32), 0.25, SPEC, exact=True)[1][0])
    share = np.asarray(draw(jax.random.split(jax.random.key(1), 4000)).mean(axis=0))
    assert share[0] == 0
    assert np.abs(share[1:] - 0.25).max() < 4 * np.sqrt(0.25 * 0.75 / 4000)


@pytest.mark.parametrize("exact", [False, True])
def test_fully_protected_row_stays(exact):
    tokens = _tokens(2, 8)
    protect = jnp.array([[True] * 8, [False] * 8])
    corrupted, is_masked = corrupt(jax.random.key(0), tokens, 1.0, SPEC, protect=protect, exact=exact)
    np.testing.assert_array_equal(corrupted[0], tokens[0])
    assert is_masked[1].sum() == 7


def test_masks_do_not_depend_on_the_tokens():
    first = corrupt(jax.random.key(5), _tokens(3, 16), 0.5, SPEC)[1]
    second = corrupt(jax.random.key(5), _tokens(3, 16) + 1, 0.5, SPEC)[1]
    np.testing.assert_array_equal(first, second)


def test_training_rates_are_spread_over_the_batch():
    rates = np.sort(np.asarray(training_rates(jax.random.key(3), 16, SPEC)))
    assert (rates >= SPEC.eps).all() and (rates <= 1).all()
    np.testing.assert_allclose(np.diff(rates), (1 - SPEC.eps) / 16, atol=1e-6)
    many = np.concatenate([training_rates(jax.random.key(i), 2, SPEC) for i in range(500)])
    assert abs(many.mean() - 0.5005) < 0.03
