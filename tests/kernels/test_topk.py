"""Conformance: every implementation of topk equals ``jax.lax.top_k`` bit for bit, ties, NaN and signed zeros included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlmscope_jax.errors import UserError
from dlmscope_jax.kernels import topk
from dlmscope_jax.kernels.topk import IMPLEMENTATIONS, default_implementation, grouped

NAMES = sorted(IMPLEMENTATIONS)
# few distinct values, so that rows are full of ties; bit patterns because JSON-like floats lose signs
SPECIAL = np.array([0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 1e-38, 3.5], np.float32)
SHAPES_AND_K = [((3, 97), 4), ((2, 250), 16), ((1, 64), 1)]  # few shapes, few compilations
compiled = jax.jit(topk, static_argnums=(1, 2))
oracle = jax.jit(jax.lax.top_k, static_argnums=1)


def same(x, k, name):
    values, indices = compiled(x, k, name)
    want_values, want_indices = oracle(x, k)
    np.testing.assert_array_equal(np.asarray(indices), np.asarray(want_indices))
    assert values.dtype == x.dtype and indices.dtype == jnp.int32
    np.testing.assert_array_equal(np.signbit(np.asarray(values, np.float32)), np.signbit(np.asarray(want_values, np.float32)))
    np.testing.assert_array_equal(np.asarray(values, np.float32), np.asarray(want_values, np.float32))


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40, deadline=None)
@given(case=st.sampled_from(SHAPES_AND_K), seed=st.integers(0, 2**31), special=st.booleans())
def test_equals_lax_top_k(name, case, seed, special):
    shape, k = case
    rng = np.random.default_rng(seed)
    x = SPECIAL[rng.integers(0, len(SPECIAL), shape)] if special else rng.normal(size=shape).astype(np.float32)
    same(jnp.asarray(x), k, name)


@pytest.mark.parametrize("name", NAMES)
def test_a_row_of_equal_entries_gives_the_lowest_indices(name):
    _, indices = topk(jnp.zeros((2, 100)), 5, name)
    np.testing.assert_array_equal(indices, np.tile(np.arange(5), (2, 1)))


@pytest.mark.parametrize("name", NAMES)
def test_negative_nan_and_padding_rank_last(name):
    row = np.full(66, np.nan, np.float32)
    row = np.copysign(row, -1.0)  # the padding of the grouped form must not come before these
    row[[7, 60]] = [-np.inf, -5.0]
    same(jnp.asarray(row[None]), 8, name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(name, dtype):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 130)), dtype)
    same(x, 7, name)


@pytest.mark.parametrize("name", NAMES)
def test_leading_axes_and_vmap(name):
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 80)), jnp.float32)
    values, indices = topk(x, 4, name)
    assert values.shape == indices.shape == (2, 3, 4)
    mapped, _ = jax.vmap(lambda row: topk(row, 4, name))(x)
    np.testing.assert_array_equal(values, mapped)
    one, _ = topk(x[0, 0], 4, name)
    np.testing.assert_array_equal(one, values[0, 0])


@pytest.mark.parametrize("name", NAMES)
def test_derivative_in_both_modes(name):
    rng = np.random.default_rng(2)
    x, w, t = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 90), (2, 6), (2, 90)))

    def f(x, implementation):
        return (topk(x, 6, implementation)[0] * w).sum()

    _, indices = jax.lax.top_k(x, 6)
    want = np.zeros(x.shape, np.float32)
    np.put_along_axis(want, np.asarray(indices), np.asarray(w), axis=1)
    np.testing.assert_array_equal(jax.grad(f)(x, name), want)
    _, change = jax.jvp(lambda x: f(x, name), (x,), (t,))
    np.testing.assert_allclose(change, (want * np.asarray(t)).sum(), rtol=1e-5)


def test_no_retrace_for_new_values():
    count = 0

    @jax.jit
    def f(x):
        nonlocal count
        count += 1
        return topk(x, 3)

    for seed in range(3):
        f(jnp.asarray(np.random.default_rng(seed).normal(size=(2, 40)), jnp.float32))
    assert count == 1


def test_defaults():
    assert default_implementation(16384, 32, "cpu") == "grouped"
    assert default_implementation(2048, 32, "cpu") == "reference"
    assert default_implementation(16384, 8192, "cpu") == "reference"
    assert default_implementation(16384, 32, "gpu") == "reference"


def test_group_size_is_near_the_optimum():
    assert [grouped.group_size(n, k) for n, k in ((16384, 32), (64, 16), (100, 100))] == [16, 2, 1]


@pytest.mark.parametrize(
    ("x", "k", "name", "says"),
    [
        (np.zeros((2, 5), np.float32), 6, None, "between 1 and the 5"),
        (np.zeros((2, 5), np.float32), 0, None, "k = 0"),
        (np.zeros((2, 5), np.int32), 2, None, "floating"),
        (np.float32(1), 1, None, "at least one axis"),
        (np.zeros((2, 5), np.float32), 2, "radix", "'radix' is not known"),
        (np.zeros((2, 5), np.float32), 4, "grouped", "use 'reference'"),
    ],
)
def test_mistakes(x, k, name, says):
    with pytest.raises(UserError, match=says):
        topk(jnp.asarray(x), k, name)
