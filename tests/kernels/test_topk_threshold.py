"""Marks, the value at a rank, and the threshold of a batch that lies on several devices, ties across them included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import rows
from hypothesis import given, settings
from hypothesis import strategies as st

from dlmscope_jax.errors import UserError
from dlmscope_jax.kernels import keys
from dlmscope_jax.kernels.topk import marks
from dlmscope_jax.kernels.topk.threshold import Bracket, batch_key, batch_threshold, enclose, kth

threshold = jax.jit(batch_threshold, static_argnums=1)


@jax.jit
def all_of_marks(on):
    words, n = marks.pack(on), on.shape[1]
    first = marks.first(words, jnp.full(on.shape[0], 9, jnp.int32))
    return marks.unpack(words, n), marks.count(on), marks.places(words, 9), marks.unpack(first, n)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**31), st.sampled_from([(3, 70), (2, 32)]), st.sampled_from([0.0, 0.02, 0.5, 1.0]))
def test_marks(seed, shape, share):
    on = np.random.default_rng(seed).random(shape) < share
    same, count, places, kept = all_of_marks(jnp.asarray(on))
    np.testing.assert_array_equal(same, on)
    np.testing.assert_array_equal(count, on.sum(axis=1))
    for row, place, few in zip(on, places, kept, strict=True):
        there = np.flatnonzero(row)[:9]
        np.testing.assert_array_equal(place[: len(there)], there)
        np.testing.assert_array_equal(np.flatnonzero(few), there)


@pytest.mark.parametrize("n", [32 * 40, 32 * 256 + 1, 32 * 300])  # one comparison, several, and a search
def test_marks_of_long_rows(n):
    on = np.random.default_rng(0).random((2, n)) < 0.1
    on[1, :-40] = False
    places = jax.jit(lambda on: marks.places(marks.pack(on), 100))(on)
    np.testing.assert_array_equal(places[0], np.flatnonzero(on[0])[:100])
    there = np.flatnonzero(on[1])
    np.testing.assert_array_equal(places[1, : len(there)], there)
    assert (0 <= np.asarray(places)).all() and (np.asarray(places) < n + 32).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("kind", ["normal", "special", "one value"])
def test_the_key_at_a_rank(kind, dtype):
    x = jnp.asarray(rows(kind, (4, 90))).astype(dtype)
    key = keys.sortable(x)
    ordered = np.sort(np.asarray(key), axis=1)[:, ::-1]
    rank = np.array([1, 2, 45, 90])
    found, above = jax.jit(lambda r: kth(lambda b: marks.count(key >= b[:, :, None]), r, dtype))(jnp.asarray(rank, jnp.int32))
    np.testing.assert_array_equal(found, ordered[range(4), rank - 1])
    np.testing.assert_array_equal(above, (np.asarray(key) > np.asarray(found)[:, None]).sum(axis=1))


@pytest.mark.parametrize("kind", ["normal", "special", "one value"])
def test_a_bracket_keeps_its_promise(kind):
    key = keys.sortable(jnp.asarray(rows(kind, (5, 200))))
    rank = jnp.array([1, 3, 50, 199, 200])

    def count(bound):
        return marks.count(key >= bound[:, None])

    for fits in (rank, rank + 20):
        begin = Bracket(key.min(axis=1), key.max(axis=1), jnp.full(5, 200), jnp.zeros(5, jnp.int32))
        low, high, n_low, n_high = jax.jit(lambda fits, begin=begin: enclose(count, rank, begin, fits))(fits)
        np.testing.assert_array_equal(n_low, count(low))
        np.testing.assert_array_equal(n_high, (np.asarray(key) > np.asarray(high)[:, None]).sum(axis=1))
        assert (n_low >= rank).all() and (n_high < rank).all() and ((n_low <= fits) | (low == high)).all()


def test_keys_are_in_the_total_order_and_come_back():
    x = jnp.asarray(np.array([-np.nan, -np.inf, -2.0, -1e-45, -0.0, 0.0, 1e-45, 2.0, np.inf, np.nan], np.float32))
    for key in (keys.sortable(x), keys.signed(x)):
        assert (np.diff(np.asarray(key).astype(np.int64)) > 0).all()
        np.testing.assert_array_equal(np.asarray(keys.unsortable(key, jnp.float32)).view(np.int32), np.asarray(x).view(np.int32))
    half = jnp.asarray([-1.5, -0.0, 0.0, 3.0], jnp.bfloat16)
    assert keys.sortable(half).dtype == jnp.uint16 and (np.diff(np.asarray(keys.signed(half)).astype(np.int32)) > 0).all()


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.sampled_from([1, 7, 60]), st.sampled_from(["normal", "special", "two values", "one value"]))
def test_the_threshold_of_a_batch(seed, count, kind):
    pre = rows(kind, (4, 15), seed)
    key, ties = threshold(jnp.asarray(pre), count)
    ours = np.asarray(batch_key(jnp.asarray(pre)))
    assert (ours > np.asarray(key)).sum() + int(ties) == count
    assert 1 <= int(ties) <= (ours == np.asarray(key)).sum()


def test_keys_of_a_batch_hold_nan_for_inf_and_both_zeros_for_one():
    key = batch_key(jnp.asarray(np.array([np.nan, -np.nan, np.inf, 0.0, -0.0, -np.inf], np.float32)))
    assert key[0] == key[1] == key[2] > key[3] == key[4] > key[5]


def test_a_threshold_needs_floats_and_a_count():
    with pytest.raises(UserError, match="batch_threshold: needs floats and a count from 1, got float32 and 0"):
        batch_threshold(jnp.zeros((2, 3)), 0)


def test_no_copy_of_the_batch_is_made():
    a, b = jnp.ones((256, 8)), jnp.ones((1024, 8))
    held = jax.jit(lambda a, b: batch_threshold(a @ b.T, 500)).lower(a, b).compile().memory_analysis().temp_size_in_bytes
    assert held < 1.6 * 256 * 1024 * 4, held  # the product and the bits of 15 comparisons


SHARDED = """
    import jax, jax.numpy as jnp, numpy as np, sys
    from functools import partial
    from jax.sharding import Mesh, PartitionSpec as P
    sys.path.insert(0, "tests/kernels")
    from conformance import rows
    from programs import collectives
    from dlmscope_jax.kernels import topk, topk_batch
    from dlmscope_jax.kernels.topk.threshold import batch_key, batch_threshold, ties_here

    mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "model"))
    axes = {"data": (("data",), ()), "model": ((), ("model",)), "both": (("data",), ("model",))}

    @partial(jax.jit, static_argnums=(1, 2))
    def chosen(pre, count, over):
        row_axes, latent_axes = axes[over]
        spec = P(row_axes or None, latent_axes or None)

        @partial(jax.shard_map, mesh=mesh, in_specs=spec, out_specs=spec)
        def run(pre):
            key, ties = batch_threshold(pre, count, row_axes + latent_axes)
            own = batch_key(pre)
            level = own == key
            kept = ties_here(level.sum(axis=1, dtype=jnp.int32), ties, row_axes, latent_axes)
            return (own > key) | level & (jnp.cumsum(level, axis=1) <= kept[:, None])

        return run(pre)

    for over in axes:
        for kind in ("normal", "special", "two values", "one value"):
            pre = jnp.asarray(rows(kind, (6, 38)))
            for count in (1, 40, 227) if over == "both" else (40,):
                _, at_rows, latents = topk_batch(pre, count)
                want = np.zeros(pre.shape, bool)
                want[at_rows, latents] = True
                np.testing.assert_array_equal(chosen(pre, count, over), want, err_msg=f"{over} {kind} {count}")

    x = jnp.asarray(rows("normal", (4, 1100)))
    for run in (lambda x: topk(x, 8, "grouped"), lambda x: topk(x, 8, "threshold"), lambda x: topk_batch(x, 30)):
        mapped = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=P("data"), out_specs=P("data")))(x)
        parts = [jax.jit(run)(part) for part in jnp.split(x, 2)]
        jax.tree.map(np.testing.assert_array_equal, mapped, jax.tree.map(lambda *both: jnp.concatenate(both), *parts))

    def alone(pre):
        over = partial(jax.shard_map, mesh=mesh, in_specs=P("data", "model"), out_specs=P())
        return over(lambda part: batch_threshold(part, 40, ("data", "model")))(pre)

    moved = collectives(jax.jit(alone).lower(pre).compile().as_text())
    print({c.op for c in moved}, sum(c.trips for c in moved), sum(c.operand_bytes * c.trips for c in moved))
"""


@pytest.mark.slow
def test_across_shards_with_one_sum_a_digit(run_with_devices):
    """Rows divided, latents divided, and both: the same entries as on one device; selections of rows and batches work on a shard."""
    assert run_with_devices(SHARDED, 4).split("\n")[-2] == "{'all-reduce'} 8 480"
