"""The largest entries of a whole batch against numpy's stable sort: ties, signs, infinities, counts that may be traced."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlmscope_jax.errors import UserError
from dlmscope_jax.kernels.topk import batch
from dlmscope_jax.kernels.topk.batch import among_largest, topk_batch

compiled = jax.jit(topk_batch, static_argnums=1)
FEW_VALUES = np.array([0.0, -0.0, 1.0, -1.0, 2.5, -3.0, np.inf, -np.inf, 1e30], np.float32)


def definition(pre, count):
    """Positions of the ``count`` largest entries in row-major order; of equal ones the first."""
    return np.sort(np.argsort(-pre.reshape(-1), kind="stable")[:count])


def check(pre, count):
    values, rows, latents = compiled(jnp.asarray(pre), count)
    flat = definition(pre, count)
    np.testing.assert_array_equal(np.asarray(rows) * pre.shape[1] + np.asarray(latents), flat)
    np.testing.assert_array_equal(values, pre.reshape(-1)[flat])


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.sampled_from([(5, 13, 20), (1, 64, 64), (3, 32, 1)]), st.booleans())
def test_equals_the_definition(seed, shape_and_count, tied):
    rng = np.random.default_rng(seed)
    rows, width, count = shape_and_count
    check(rng.choice(FEW_VALUES, (rows, width)) if tied else rng.normal(size=(rows, width)).astype(np.float32), count)


def large(name):
    """70 rows of 1100: past the size from which a sample guesses and few entries are taken out."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(70, 1100)).astype(np.float32)
    if name == "negative":
        return -np.abs(x) - 1
    if name == "few positive":
        return np.where(rng.random(x.shape) < 0.002, np.abs(x), -np.abs(x)).astype(np.float32)
    if name == "two values":
        return np.sign(x)
    if name == "one value":
        return np.full_like(x, 2.0)
    if name == "one row holds all":
        return x + np.where(np.arange(70) == 33, 100.0, 0.0)[:, None].astype(np.float32)
    if name == "misleading sample":
        x[:] = -(x**2)
        stride = x.size // batch._SAMPLE | 1
        x.reshape(-1)[::stride] = 50.0 + rng.random(len(x.reshape(-1)[::stride]))
    return x


NAMES = ["normal", "negative", "few positive", "two values", "one value", "one row holds all", "misleading sample"]


@pytest.mark.some(7)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("count", [1, 1400, 40_000])
def test_large_batches(name, count):
    pre = large(name)
    assert pre.size > 4 * batch._FEW  # else the path for large batches is not the one that runs
    check(pre, count)


def test_all_entries_and_half_precision():
    pre = np.random.default_rng(2).normal(size=(4, 9)).astype(np.float32)
    check(pre, 36)
    half = jnp.asarray(pre, jnp.bfloat16)
    values, rows, latents = compiled(half, 7)
    assert values.dtype == jnp.bfloat16
    np.testing.assert_array_equal(rows * 9 + latents, definition(np.asarray(half, np.float32), 7))


@pytest.mark.parametrize("pre", [np.random.default_rng(5).normal(size=(4, 9)), large("normal").astype(np.float64)], ids=["small", "large"])
def test_double_precision(pre):
    """And with it jax's own integers are 64 bits wide, which no loop here may carry."""
    with jax.enable_x64(True):
        check(pre + 1e-12 * np.arange(pre.size).reshape(pre.shape), 7)


def test_under_vmap_it_selects_from_each_batch():
    pre = np.random.default_rng(3).normal(size=(3, 6, 50)).astype(np.float32)
    _, rows, latents = jax.jit(jax.vmap(lambda p: topk_batch(p, 18)))(jnp.asarray(pre))
    for i in range(3):
        np.testing.assert_array_equal(rows[i] * 50 + latents[i], definition(pre[i], 18))


def test_nan_counts_as_the_largest():
    pre = np.zeros((2, 40), np.float32)
    pre[1, 3] = np.nan
    pre[0, 5] = np.inf
    _, rows, latents = compiled(jnp.asarray(pre), 2)
    assert set(zip(rows.tolist(), latents.tolist(), strict=True)) == {(1, 3), (0, 5)}


def test_among_largest_takes_a_traced_count():
    values = np.random.default_rng(4).choice(FEW_VALUES, 75)
    f = jax.jit(among_largest)
    for count in (1, 2, 30, 74, 75, 200):
        mask = np.zeros(75, bool)
        mask[np.argsort(-values, kind="stable")[:count]] = True
        np.testing.assert_array_equal(f(jnp.asarray(values), jnp.int32(count)), mask)
    assert f._cache_size() == 1


def test_no_copy_of_the_batch_is_made():
    """Keys, sorts or masks of [B, N] would double what a step holds; the bits are a 32nd of it."""
    a, b = jnp.ones((256, 8)), jnp.ones((1024, 8))
    program = jax.jit(lambda a, b: topk_batch(a @ b.T, 2048)).lower(a, b).compile()
    held = program.memory_analysis().temp_size_in_bytes
    assert held < 1.5 * 256 * 1024 * 4, held


@pytest.mark.parametrize(("shape", "count"), [((2, 3), 0), ((2, 3), 7)])
def test_a_count_that_does_not_fit(shape, count):
    with pytest.raises(UserError, match=f"count = {count} must lie between 1 and the 6 entries"):
        topk_batch(jnp.zeros(shape), count)
    with pytest.raises(UserError, match="needs a floating matrix"):
        topk_batch(jnp.zeros(4), 1)
