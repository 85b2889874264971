"""The step and its made-up gradients against their closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlmscope_jax.errors import UserError
from dlmscope_jax.kernels import ESTIMATORS, binarise

PRE = jnp.asarray([-3.0, -0.6, -0.4, -1e-6, 0.0, 1e-6, 0.4, 0.6, 3.0])


def pulled(estimator, cotangent, temperature=1.0, **options):
    """What a cotangent on the bits becomes."""
    (bits, values), pull = jax.vjp(lambda x: binarise(x, estimator, temperature, **options), PRE)
    return np.asarray(pull((jnp.broadcast_to(jnp.float32(cotangent), PRE.shape), jnp.zeros_like(values)))[0])


def test_the_step_is_exact_and_zero_is_a_switch():
    for at_zero in (False, True):
        bits, values = binarise(PRE, at_zero=at_zero)
        np.testing.assert_array_equal(bits, [0, 0, 0, 0, float(at_zero), 1, 1, 1, 1])
        np.testing.assert_array_equal(values, bits)


@pytest.mark.parametrize(("g", "want"), [(0.3, 0.21), (2.0, -2.0), (1e-6, 1e-6)])
def test_g_times_1mg(g, want):
    np.testing.assert_allclose(pulled("g_times_1mg", g), want, rtol=2e-6)


def test_estimators_equal_their_closed_forms():
    x, g, t = np.asarray(PRE, np.float64), 0.7, 1.6
    s = 1 / (1 + np.exp(-x / t))
    np.testing.assert_array_equal(pulled("identity", g), np.float32(g))
    np.testing.assert_allclose(pulled("sigmoid", g, t), g * s * (1 - s), rtol=1e-6)
    np.testing.assert_allclose(pulled("rectangle", g, t), np.where(np.abs(x) < t / 2, g / t, 0), rtol=1e-6)
    np.testing.assert_allclose(pulled("rectangle", g, 1.0), np.where(np.abs(x) < 0.5, g, 0), rtol=1e-6)
    np.testing.assert_allclose(pulled("x_times_1mx", g), g * x * (1 - x), rtol=1e-6)
    assert pulled("x_times_1mx", g)[[0, -1]].max() < 0  # as the paper has it: pushed the wrong way outside of 0..1


def test_a_flat_sigmoid_does_not_underflow_to_nan():
    slope = jax.grad(lambda x: binarise(x, "sigmoid", 1.0)[0].sum())(jnp.asarray([-200.0, 200.0]))
    np.testing.assert_array_equal(slope, [0.0, 0.0])


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("bits", [1, 3])
def test_both_cotangents_pass_as_one_sum(estimator, bits):
    (code, values), pull = jax.vjp(lambda x: binarise(x, estimator, 0.9, bits=bits), PRE)
    a, b = jnp.full_like(code, 0.3), jnp.full_like(values, 0.4)
    np.testing.assert_allclose(pull((a, b))[0], pulled(estimator, 0.7, 0.9), rtol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 5])
def test_more_bits_quantise_upwards_in_equal_steps(bits):
    x = jnp.linspace(-0.5, 1.5, 401)
    code, values = binarise(x, bits=bits)
    np.testing.assert_array_equal(code, x > 0)
    np.testing.assert_array_equal(values > 0, x > 0)  # the support is the 1-bit code's
    top = 2**bits - 1
    levels = np.unique(np.asarray(values))
    np.testing.assert_allclose(levels, np.arange(top + 1) / top, rtol=1e-6)
    inside = np.asarray((x > 0) & (x <= 1))
    rounded_up = np.asarray(values - x)[inside]
    assert -1e-6 < rounded_up.min() and rounded_up.max() < 1 / top
    np.testing.assert_array_equal(np.asarray(values)[np.asarray(x) > 1], 1.0)


def test_zero_with_more_bits():
    zero = jnp.zeros(1)
    assert float(binarise(zero, bits=2)[1][0]) == 0.0
    np.testing.assert_allclose(binarise(zero, bits=2, at_zero=True)[1], 1 / 3, rtol=1e-6)


def test_unknown_estimator():
    with pytest.raises(UserError, match="'sign' is not known: one of identity, sigmoid"):
        binarise(PRE, "sign")
