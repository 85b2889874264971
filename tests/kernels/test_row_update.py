"""The row-local update: every implementation against the equations in float64, and against doing each part by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlmscope_jax.errors import UserError
from dlmscope_jax.kernels import dispatch, row_update, squared_norm, tangential
from dlmscope_jax.kernels.row_update import IMPLEMENTATIONS, default_implementation, strips
from dlmscope_jax.kernels.row_update.rounding import round_fairly

B1, B2, EPS = 0.9, 0.99, 1e-6
ADAM = {"b1": B1, "b2": B2, "eps": EPS}
CPU = ["reference", "strips"]


def problem(n, d, seed=0):
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(n, d))
    weight /= np.linalg.norm(weight, axis=1, keepdims=True)
    return weight, rng.normal(size=(n, d)) * 0.1, np.square(rng.normal(size=(n, d))) * 0.01, rng.normal(size=(n, d))


def by_hand(weight, mu, nu, gradient, rate, count, scale, unit):
    """The equations, float64, one row at a time."""
    weight, mu, nu = weight.copy(), mu.copy(), nu.copy()
    for i, g in enumerate(gradient):
        w = weight[i]
        if unit:
            u = w / np.linalg.norm(w)
            g = g - (g @ u) * u
        g = g * scale
        mu[i] = B1 * mu[i] + (1 - B1) * g
        nu[i] = B2 * nu[i] + (1 - B2) * g * g
        weight[i] = w - rate * (mu[i] / (1 - B1**count)) / (np.sqrt(nu[i] / (1 - B2**count)) + EPS)
        if unit:
            weight[i] /= np.linalg.norm(weight[i])
    return weight, mu, nu


def narrow(arrays):
    return [jnp.asarray(a, jnp.float32) for a in arrays]


@pytest.fixture
def small_blocks(monkeypatch):
    """Strips of a few rows, so that small matrices have many, whole ones and others."""
    monkeypatch.setattr(strips, "_BLOCK", 40)
    jax.clear_caches()
    dispatch._program.cache_clear()
    yield
    jax.clear_caches()
    dispatch._program.cache_clear()


@pytest.mark.some(8)
@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("n,d", [(1, 1), (3, 7), (16, 10), (17, 10), (50, 8), (33, 41)])
@pytest.mark.parametrize("name", CPU)
def test_equations(small_blocks, name, n, d, unit):
    arrays = problem(n, d)
    found = row_update(*narrow(arrays), rate=0.03, count=3, scale=0.7, unit=unit, implementation=name, **ADAM)
    for a, b in zip(found, by_hand(*arrays, 0.03, 3, 0.7, unit), strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", CPU)
def test_three_steps_and_one_that_is_not_kept(small_blocks, name):
    arrays = problem(23, 9)
    state, want = narrow(arrays[:3]), arrays[:3]
    for count in (1, 2, 3):
        gradient = problem(23, 9, seed=count)[3]
        spoilt = row_update(*state, jnp.full((23, 9), jnp.nan), rate=0.1, count=count, keep=False, unit=True, implementation=name, **ADAM)
        for a, b in zip(spoilt, state, strict=True):
            np.testing.assert_array_equal(a, b)
        state = row_update(*state, jnp.asarray(gradient, jnp.float32), rate=0.1, count=count, unit=True, implementation=name, **ADAM)
        want = by_hand(*want, gradient, 0.1, count, 1.0, True)
    for a, b in zip(state, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=5e-6)


@pytest.mark.parametrize("name", CPU)
def test_bfloat16_moments_are_those_of_float32_rounded_fairly(small_blocks, name):
    weight, mu, nu, gradient = narrow(problem(19, 11))
    low = mu.astype(jnp.bfloat16), nu.astype(jnp.bfloat16)
    exact = row_update(
        weight, *(m.astype(jnp.float32) for m in low), gradient, rate=0.1, count=5, unit=True, implementation="reference", **ADAM
    )
    found = row_update(weight, *low, gradient, rate=0.1, count=5, unit=True, implementation=name, **ADAM)
    for a, b in zip(found[1:], exact[1:], strict=True):
        rounded = round_fairly(b, jnp.int32(5))
        assert a.dtype == jnp.bfloat16
        # of two numbers that differ in the last bit one may be rounded up and the other not
        np.testing.assert_allclose(a.astype(jnp.float32), rounded.astype(jnp.float32), rtol=2**-7)
        assert (a == rounded).mean() > 0.99
    # strips read the moments back as they are kept
    np.testing.assert_allclose(found[0], exact[0], atol=1e-6 if name == "reference" else 0.1 * 2**-6)


def test_rounding_of_a_strip_is_that_of_the_whole():
    x = jax.random.normal(jax.random.key(0), (12, 5))
    whole = round_fairly(x, jnp.int32(3))
    np.testing.assert_array_equal(round_fairly(x[4:7], jnp.int32(3), 20).astype(jnp.float32), whole[4:7].astype(jnp.float32))
    assert (round_fairly(x[4:7], jnp.int32(3)) != whole[4:7]).any()


def test_rounding_is_fair():
    values = jnp.asarray([1.001, -1.001, 3e-8, 1.0, 0.0, -2.5, 1e30], jnp.float32)
    steps = jnp.arange(1, 2**12 + 1)
    rounded = np.asarray(jax.vmap(lambda step: round_fairly(values, step))(steps), np.float64)
    np.testing.assert_allclose(rounded.mean(0), np.asarray(values, np.float64), rtol=1e-5)
    exact = np.asarray([3, 4, 5])
    assert (rounded[:, exact] == np.asarray(values)[exact]).all()
    spacing = np.unique(rounded[:, 0])
    assert len(spacing) == 2 and (np.diff(spacing) == 2**-7).all()


def test_norm_is_that_of_the_gradient_without_its_part_along_the_rows():
    weight, _, _, gradient = narrow(problem(21, 6))
    weight = weight * jnp.linspace(0.5, 2, 21)[:, None]
    np.testing.assert_allclose(squared_norm(gradient, weight), np.square(tangential(gradient, weight)).sum(), rtol=1e-5)
    np.testing.assert_allclose(squared_norm(gradient), np.square(gradient).sum(), rtol=1e-5)
    assert abs((tangential(gradient, weight) * weight).sum(axis=1)).max() < 1e-5
    assert squared_norm(weight, weight) <= 1e-4  # all of it lies along the rows; never below 0, whose root is NaN
    assert squared_norm(weight, weight) >= 0


def test_a_zero_row_stays_finite():
    weight, mu, nu, gradient = narrow(problem(3, 4))
    found = row_update(weight.at[1].set(0), mu, nu, gradient, rate=0.1, count=1, unit=True, **ADAM)
    assert all(jnp.isfinite(a).all() for a in found)


def test_strips_update_in_place_and_hold_nothing_large():
    """Of the three arrays that are given none is copied, whatever the number of strips."""
    width, depth = 64 * strips.block_rows(512), 512
    array, scalar = jax.ShapeDtypeStruct((width, depth), jnp.float32), jax.ShapeDtypeStruct((), jnp.float32)

    def update(state, gradient, rate):
        return row_update(*state, gradient, rate=rate, count=1, unit=True, implementation="strips", **ADAM)

    compiled = jax.jit(update, donate_argnums=0).lower((array,) * 3, array, scalar).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= 3 * width * depth * 4
    assert memory.temp_size_in_bytes < 0.1 * width * depth * 4
    assert f"f32[{width},{depth}]{{1,0}} copy(" not in compiled.as_text()


def test_what_runs():
    large, small = (dispatch.Problem(1, width, 1, 768) for width in (16384, 256))
    assert default_implementation(large, "cpu") == "strips" and default_implementation(small, "cpu") == "reference"
    assert default_implementation(large, "tpu") == default_implementation(large, "cuda") == "reference"
    arrays = [jax.ShapeDtypeStruct((16384, 768), jnp.float32)] * 4
    fn = lambda *arrays: row_update(*arrays, rate=0.1, count=1, **ADAM)  # noqa: E731
    assert dispatch.ran(fn, *arrays) == {"row_update.strips"}
    assert dispatch.ran(fn, *arrays, platform="tpu") == {"row_update.reference"}


def test_mistakes():
    weight, mu, nu, gradient = narrow(problem(3, 4))
    with pytest.raises(UserError, match=r"one shape \[N, D\]"):
        row_update(weight, mu, nu, gradient[:2], rate=0.1, count=1, **ADAM)
    with pytest.raises(UserError, match=r"one shape \[N, D\]"):
        row_update(*(a[0] for a in (weight, mu, nu, gradient)), rate=0.1, count=1, **ADAM)
    with pytest.raises(UserError, match="'stripes' is not known: one of reference, strips"):
        row_update(weight, mu, nu, gradient, rate=0.1, count=1, implementation="stripes", **ADAM)
    assert set(CPU) <= set(IMPLEMENTATIONS)
