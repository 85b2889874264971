"""Sums by latent in a fixed order: against NumPy in float64, for pairs of many shapes, and what stays with its latent."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlmscope_jax.kernels.sparse_matmul import levels
from dlmscope_jax.kernels.sparse_matmul.segments import by_latent, segment_sum, sums_flat

# rows, depth, latents, pairs: one row, one latent, one pair, none, more pairs than blocks of the first level, keys beyond 32 bits
SHAPES = [(7, 5, 24, 40), (3, 1, 1, 50), (50, 3, 2, 700), (1, 4, 9, 1), (5, 2, 3, 0), (100, 3, 40, 1000), (2, 3, 2**20, 5000)]


def pairs(shape, seed=0):
    """Values, rows, latents and a table; some latents are frequent, and pairs repeat."""
    n_rows, depth, width, count = shape
    rng = np.random.default_rng(seed)
    latents = np.minimum(rng.integers(0, width, count), rng.integers(0, width, count)).astype(np.int32)
    rows = rng.integers(0, n_rows, count).astype(np.int32)
    return rng.normal(size=count).astype(np.float32), rows, latents, rng.normal(size=(n_rows, depth)).astype(np.float32)


def sums(values, rows, latents, table, width):
    return segment_sum(by_latent(values, rows, latents, width), table, width)


@pytest.mark.parametrize("shape", SHAPES)
def test_pairs_are_sorted_and_stay_in_order(shape):
    values, rows, latents, _ = pairs(shape)
    got = by_latent(values, rows, latents, shape[2])
    order = np.argsort(latents, kind="stable")
    np.testing.assert_array_equal(got.latents, latents[order])
    np.testing.assert_array_equal(got.rows, rows[order])
    np.testing.assert_array_equal(got.values, values[order])
    np.testing.assert_array_equal(got.starts, np.searchsorted(latents[order], np.arange(shape[2] + 1)))


@pytest.mark.some(5)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_sums_equal_those_in_float64(shape, dtype):
    values, rows, latents, table = pairs(shape)
    table = jnp.asarray(table, dtype)
    got = jax.jit(sums, static_argnums=4)(values, rows, latents, table, shape[2])
    want = np.zeros((shape[2], shape[1]))
    np.add.at(want, latents, values[:, None].astype(float) * np.asarray(table, float)[rows])
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[2], SHAPES[4], SHAPES[6]])
def test_sums_of_pieces_equal_those_in_float64(shape):
    values, rows, latents, table = pairs(shape)
    if len(values):
        values[0] = np.inf
    got = jax.jit(levels.segment_sum, static_argnums=2)(by_latent(*map(jnp.asarray, (values, rows, latents)), shape[2]), table, shape[2])
    want = np.zeros((shape[2], shape[1]))
    np.add.at(want, latents, values[:, None].astype(float) * table[rows])
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("counts", [(96, 0, 1, 32, 33, 0), (0, 0, 0), (64,), (0, 31), (1, 2, 1)])
def test_pieces_hold_every_pair_once_and_the_longest_come_first(counts):
    """Whole pieces, a rest, latents without a pair, at the end as well; what is left of the list has length 0 and no latent."""
    starts = np.cumsum([0, *counts]).astype(np.int32)
    latents, begins, lengths = map(np.asarray, levels._pieces(jnp.asarray(starts), int(starts[-1])))
    assert (np.diff(lengths) <= 0).all() and lengths.max(initial=0) <= levels._PIECE
    there = lengths > 0
    assert (latents[~there] == len(counts)).all()
    pieces = zip(latents[there], begins[there], lengths[there], strict=True)
    held = [(latent, m) for latent, begin, n in pieces for m in range(begin, begin + n)]
    assert sorted(held) == [(n, m) for n in range(len(counts)) for m in range(starts[n], starts[n + 1])]


def test_what_is_not_finite_stays_with_its_latent():
    shape = (40, 3, 12, 300)
    values, rows, latents, table = pairs(shape)
    rows[latents == 5] = 0
    rows[latents != 5] = np.maximum(rows[latents != 5], 2)
    values[np.flatnonzero(latents == 7)[0]] = np.inf
    table[0], table[1] = np.nan, np.inf  # row 1 belongs to no pair
    got = np.asarray(sums(values, rows, latents, jnp.asarray(table), 12))
    assert np.isnan(got[5]).all() and np.isinf(got[7]).all()
    assert np.isfinite(np.delete(got, [5, 7], axis=0)).all()


def test_one_latent_over_many_blocks_is_added_in_a_fixed_order():
    values, rows, latents, table = pairs((30, 4, 3, 3000))
    run = jax.jit(sums, static_argnums=4)
    first = run(values, rows, latents, table, 3)
    np.testing.assert_array_equal(run(values, rows, latents, table, 3), first)
    assert "unique_indices=True" in str(jax.make_jaxpr(sums, static_argnums=4)(values, rows, latents, table, 3))


def test_no_array_of_all_pairs_by_the_depth_arises():
    values, rows, latents, table = pairs((100, 3, 40, 1000))
    text = str(jax.make_jaxpr(sums, static_argnums=4)(values, rows, latents, table, 40))
    assert "f32[1000,3]" not in text and "f32[100,40]" not in text


@pytest.mark.parametrize("shape", SHAPES)
def test_sums_of_values_alone(shape):
    values, _, latents, _ = pairs(shape)
    if len(values):
        values[0] = np.nan
    want = np.zeros(shape[2])
    np.add.at(want, latents, values.astype(float))
    np.testing.assert_allclose(sums_flat(values, latents, shape[2]), want, rtol=1e-5, atol=1e-5)
