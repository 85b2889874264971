"""All implementations of all sparse products against one formula: special shapes, entries that are not finite, equal runs."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_conformance import CASES, FLAT, ROW_SPARSE, TABLES, Case, case, inputs, jitted, wanted

from dlmscope_jax.kernels.sparse_matmul import gather, levels, products

# Pallas kernels run interpreted, which is slow: on few cases here, and in test files of their own
NAMES = [name for name in products.OUTER if not name.startswith("pallas")]
PALLAS = [name for name in products.OUTER if name.startswith("pallas")]
OPS = (*ROW_SPARSE, *FLAT)


@pytest.fixture(autouse=True, scope="module")
def small_chunks():
    """Several chunks of pairs and several groups of latents, the last one filled up."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gather, "_CHUNK", 8)
        patch.setattr(levels, "_GROUP", 16)
        yield


def agrees(got, want, rtol=2e-5, atol=2e-5):
    assert got.dtype == np.float32
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=rtol, atol=atol)


@pytest.mark.some(12)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("op", OPS)
def test_every_case(op, name):
    run = jitted(op, name)
    for label, one in CASES.items():
        args, static = inputs(op, one)
        try:
            agrees(run(*args, **static), wanted(op, one))
        except AssertionError as error:
            raise AssertionError(f"{op}, {name}: {label}: {error}") from None


@pytest.mark.slow
@pytest.mark.parametrize("name", PALLAS)
@pytest.mark.parametrize("op", OPS)
def test_kernels_interpreted(op, name):
    run = jitted(op, name)
    one = case(3, 2, 5, 4, distinct=False)
    args, static = inputs(op, one)
    agrees(run(*args, **static, interpret=True), wanted(op, one))


SHAPE = b, k, n, d = 4, 3, 5, 2
NUMBERS = st.sampled_from([0.0, -0.0, 1.0, -2.5, 0.3, np.inf, -np.inf, np.nan, 1e-30, 1e15])


def entries(count):
    return st.lists(NUMBERS, min_size=count, max_size=count)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, n - 1), min_size=b * k, max_size=b * k), entries(b * k), entries(n * d), entries(b * d))
def test_what_is_not_finite_stays_with_its_pairs(indices, values, weight, rows):
    def array(a, shape):
        return np.array(a, np.float32).reshape(shape)

    one = Case(array(values, (b, k)), np.array(indices, np.int32).reshape(b, k), array(weight, (n, d)), array(rows, (b, d)))
    for op in OPS:
        for name in NAMES:
            if name == "reference":  # a dense product spreads them
                continue
            args, static = inputs(op, one)
            got, want = np.asarray(RUN[op, name](*args, **static), np.float64), wanted(op, one)
            np.testing.assert_array_equal(np.isfinite(got), np.isfinite(want), f"{op}, {name}")
            np.testing.assert_array_equal(got[~np.isfinite(want)], want[~np.isfinite(want)], f"{op}, {name}")


RUN = {(op, name): jitted(op, name) for op in OPS for name in NAMES}


@pytest.mark.some(3)
@pytest.mark.parametrize("op", OPS)
def test_equal_runs_are_equal_in_every_bit(op):
    one = case(60, 5, 9, 7, distinct=False)
    args, static = inputs(op, one)
    for name in NAMES:
        first = np.asarray(RUN[op, name](*args, **static))
        np.testing.assert_array_equal(RUN[op, name](*args, **static), first, f"{op}, {name}")


def test_every_primitive_has_every_implementation():
    assert all(set(table) == set(NAMES + PALLAS) for table in TABLES.values())
