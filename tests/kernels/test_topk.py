"""Top-k of rows: every implementation gives exactly what ``jax.lax.top_k`` gives, ties, NaN and signed zeros included."""

from functools import partial

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import check_topk, rows
from hypothesis import given, settings
from hypothesis import strategies as st

from dlmscope_jax.errors import UserError
from dlmscope_jax.kernels import topk
from dlmscope_jax.kernels.dispatch import PLATFORMS, Problem, ran
from dlmscope_jax.kernels.topk import IMPLEMENTATIONS, default, grouped

NAMES = sorted(conformance.TOPK)
HERE = [name for name in NAMES if name not in conformance.INTERPRETED]
COMPILED = {name: jax.jit(run, static_argnums=1) for name, run in conformance.TOPK.items()}


def supported(name, n_rows, width, k, dtype=jnp.float32):
    platform = {"pallas_tpu": "tpu", "pallas_gpu": "cuda"}.get(name, "cpu")
    if IMPLEMENTATIONS[name].refuses(Problem(n_rows, width, k, dtype=dtype), platform):
        pytest.skip("says that it cannot")


def test_every_implementation_is_held_against_the_definition():
    assert set(conformance.TOPK) == set(IMPLEMENTATIONS)


@pytest.mark.some(4)
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=15, deadline=None)
@given(case=st.sampled_from([(3, 97, 4), (2, 250, 16)]), seed=st.integers(0, 2**31), kind=st.sampled_from(conformance.KINDS))
def test_equals_lax_top_k(name, case, seed, kind):
    n_rows, width, k = case  # few shapes, few compilations
    check_topk(COMPILED[name], jnp.asarray(rows(kind, (n_rows, width), seed)), k)


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize(("n_rows", "width", "k"), [(4, 1100, 32), (2, 4099, 300)])
def test_rows_of_many_groups(name, n_rows, width, k):
    """Shapes at which ``grouped`` searches maxima of maxima, and has more words than it compares with at once."""
    for kind in conformance.KINDS:
        check_topk(COMPILED[name], jnp.asarray(rows(kind, (n_rows, width))), k)


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(name, dtype):
    for kind in ("normal", "special", "one value", "lowest"):
        check_topk(COMPILED[name], jnp.asarray(rows(kind, (3, 130))).astype(dtype), 7)


@pytest.mark.parametrize("name", HERE)
def test_double_precision(name):
    """And with it jax's own integers are 64 bits wide, which no loop here may carry."""
    with jax.enable_x64(True):
        x = jnp.asarray(rows("special", (3, 130)), jnp.float64).at[:, ::3].add(1e-12)
        values, indices = COMPILED[name](x, 7)
        want_values, want = jax.lax.top_k(x, 7)
        np.testing.assert_array_equal(indices, want)
        np.testing.assert_array_equal(np.asarray(values).view(np.int64), np.asarray(want_values).view(np.int64))
        assert indices.dtype == jnp.int32


@pytest.mark.some(10)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("n_rows", "width", "k"), [(2, 1, 1), (1, 200, 1), (2, 33, 33), (1, 70, 69)])
def test_one_winner_and_all_of_them(name, n_rows, width, k):
    supported(name, n_rows, width, k)
    for kind in ("normal", "special"):
        check_topk(COMPILED[name], jnp.asarray(rows(kind, (n_rows, width))), k)


@pytest.mark.parametrize("name", HERE)
def test_a_long_row(name):
    """2^18 entries, of which the winners are few, late and tied."""
    x = rows("normal", (1, 2**18 + 1))
    x[:, -5000:] = np.round(4 + x[:, -5000:])
    check_topk(COMPILED[name], jnp.asarray(x), 1024)


@pytest.mark.parametrize("name", HERE)
def test_every_run_gives_the_same(name):
    x = jnp.asarray(rows("two values", (4, 1100)))
    first = COMPILED[name](x, 32)
    for _ in range(3):
        jax.tree.map(np.testing.assert_array_equal, COMPILED[name](x, 32), first)


@pytest.mark.parametrize("name", HERE)
def test_leading_axes_and_vmap(name):
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 80)), jnp.float32)
    values, indices = topk(x, 4, name)
    assert values.shape == indices.shape == (2, 3, 4)
    mapped, _ = jax.vmap(lambda row: topk(row, 4, name))(x)
    np.testing.assert_array_equal(values, mapped)
    one, _ = topk(x[0, 0], 4, "reference")
    np.testing.assert_array_equal(one, values[0, 0])


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("width", [500, 16384])
def test_no_rows(name, width):
    values, indices = jax.eval_shape(lambda x: topk(x, 8, name), jax.ShapeDtypeStruct((0, width), jnp.float32))
    assert values.shape == indices.shape == (0, 8)


@pytest.mark.parametrize("name", HERE)
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


@pytest.mark.parametrize(
    ("width", "k", "cpu", "tpu", "cuda"),
    [
        (128, 4, "reference", "reference", "reference"),
        (16384, 32, "grouped", "grouped", "grouped"),
        (16381, 32, "reference", "grouped", "grouped"),
        (16384, 8192, "reference", "threshold", "threshold"),
    ],
)
def test_defaults(width, k, cpu, tpu, cuda):
    x = jax.ShapeDtypeStruct((64, width), jnp.float32)
    for platform, name in zip(PLATFORMS, (cpu, tpu, cuda), strict=True):
        assert ran(partial(topk, k=k), x, platform=platform) == {f"topk.{name}"}


@pytest.mark.parametrize("platform", PLATFORMS)
def test_no_default_is_refused_and_none_on_an_accelerator_sorts_a_long_row(platform):
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64):
        for width in (1, 5, 300, 1024, 4096, 16384, 2**20, 2**23):
            for k in {1, min(32, width), min(1024, width), width // 4 or 1, width}:
                problem = Problem(8, width, k, dtype=dtype)
                name = default(problem, platform)
                assert IMPLEMENTATIONS[name].refuses(problem, platform) is None
                assert platform == "cpu" or width <= 256 or name != "reference"


def test_sizes_of_groups():
    assert [grouped.group_size(n, k) for n, k in ((16384, 32), (2048, 32), (64, 16), (100, 100), (2**20, 32))] == [16, 8, 1, 1, 32]
    for k in range(1, 1025):  # candidates are fewer than entries, so that the last sort is no longer than the row
        assert grouped.slots(k) <= 4 * k or k < 6


@pytest.mark.parametrize(
    ("x", "k", "name", "says"),
    [
        (np.zeros((2, 5), np.float32), 6, None, "between 1 and the 5"),
        (np.zeros((2, 5), np.float32), 0, None, "k = 0"),
        (np.zeros((2, 5), np.int32), 2, None, "floating"),
        (np.float32(1), 1, None, "at least one axis"),
        (np.zeros((2, 5), np.float32), 2, "radix", "'radix' is not known"),
        (np.zeros((2, 5), np.float32), 4, "grouped", "needs at least 16 entries .* use 'reference' or 'threshold'"),
        (np.zeros((2, 500), np.float32), 4, "pallas_tpu", "'pallas_tpu' .* use 'reference' or 'grouped' or 'threshold'"),
    ],
)
def test_mistakes(x, k, name, says):
    with pytest.raises(UserError, match=says):
        topk(jnp.asarray(x), k, name)
