"""The kernels for TPU, in Pallas' interpreter: top-k against ``lax.top_k`` bit for bit, sparse products against dense ones,
the row-local update against its reference.

And lowered for a TPU at the sizes that they are made for. ``test_aot_tpu.py`` compiles them.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from dlmscope_jax.compat import lower_for
from dlmscope_jax.kernels.dispatch import Problem
from dlmscope_jax.kernels.row_update import pallas_tpu as update
from dlmscope_jax.kernels.row_update import reference as update_reference
from dlmscope_jax.kernels.sparse_matmul import pallas_tpu as sparse
from dlmscope_jax.kernels.sparse_matmul import reference
from dlmscope_jax.kernels.topk import pallas_tpu as selection

SPECIAL = np.array([0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, -np.nan, 1e-38, 3.5], np.float32)
# two tiles and no full block of rows; results in two pieces of 128 lanes, one maximum an entry; half precision, one maximum for two entries
CASES = [((3, 16500), 100, "float32"), ((9, 250), 130, "float32"), ((2, 300), 11, "bfloat16")]
SHAPE = jax.ShapeDtypeStruct


@pytest.fixture(scope="module")
def compiled():
    return jax.jit(partial(selection.topk, interpret=True), static_argnums=1), jax.jit(jax.lax.top_k, static_argnums=1)


def rows_of(shape, k):
    """What bisection, ties and the cutting off of ties by index have to deal with, by name."""
    rng = np.random.default_rng(0)
    least = np.full(shape, -1, np.int32).view(np.float32)  # of all keys: no bound is below it
    few = rng.random(shape) < 0.7 * k / shape[1]
    return {
        "normal": rng.normal(size=shape),
        "special": SPECIAL[rng.integers(0, len(SPECIAL), shape)],
        "zeros of both signs": SPECIAL[rng.integers(0, 2, shape)],
        "descending": np.broadcast_to(-np.arange(shape[1]), shape),
        "ascending": np.broadcast_to(np.arange(shape[1]), shape),
        "few above many that are equal": np.where(few, rng.normal(size=shape) + 9, 0),
        "few above the least": np.where(few, 1, least),
        "the least": least,
        "greatest": np.full(shape, 2**31 - 1, np.int32).view(np.float32),
    }


@pytest.mark.some(1)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_topk_equals_lax_top_k(compiled, case):
    shape, k, dtype = case
    for kind, rows in rows_of(shape, k).items():
        x = jnp.asarray(np.asarray(rows, np.float32), dtype)
        (values, indices), (want_values, want_indices) = (f(x, k) for f in compiled)
        np.testing.assert_array_equal(indices, want_indices, err_msg=kind)
        assert values.dtype == x.dtype and indices.dtype == jnp.int32
        unsigned = np.uint16 if x.dtype.itemsize == 2 else np.uint32
        np.testing.assert_array_equal(np.asarray(values).view(unsigned), np.asarray(want_values).view(unsigned), err_msg=kind)


def test_room_for_candidates_and_the_size_of_groups():
    assert [selection.slots(k) for k in (1, 32, 64, 112, 113, 1024)] == [32, 64, 96, 128, 256, 1152]
    assert [selection.group_size(n, k) for n, k in ((131072, 64), (16384, 1024), (300, 11), (250, 130))] == [16, 2, 2, 1]


# The interpreter that knows copies and semaphores: a copy happens when it is waited for, so that what is read before is not there.
INTERPRET = pltpu.InterpretParams(dma_execution_mode="on_wait")
B, K, N, D = 11, 4, 17, 200  # two pieces of 128, three groups of eight runs


@pytest.fixture(autouse=True)
def small_limits(monkeypatch):
    """So that several chunks and several turns of the ring occur."""
    for name, value in (("_CHUNK_BITS", 4), ("_CHUNK", 16), ("_AHEAD", 4), ("_BLOCK_BYTES", 8 * 2 * 128 * 4)):
        monkeypatch.setattr(sparse, name, value)


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    rows = rng.integers(0, B, 40)
    rows[rows == 3] = 4  # row 3 has no pair
    return {
        "weight": draw(N, D), "x": draw(B, D), "values": draw(B, K), "flat": draw(40), "rows": jnp.asarray(rows, jnp.int32),
        # half of it at one latent, nothing at the last
        "indices": jnp.asarray(np.minimum(rng.integers(0, 2 * N, (B, K)), N - 2), jnp.int32),
        "latents": jnp.asarray(rng.integers(0, N, 40), jnp.int32),
    }  # fmt: skip


ARGUMENTS = {
    "combine": ("values", "indices", "weight"),
    "dots": ("x", "indices", "weight"),
    "outer": ("values", "indices", "x", N),
    "combine_flat": ("flat", "rows", "latents", "weight", B),
    "dots_flat": ("x", "rows", "latents", "weight"),
}


@pytest.mark.some(3)
@pytest.mark.parametrize(("op", "dtype"), [*((op, "float32") for op in ARGUMENTS), ("dots", "bfloat16"), ("outer", "bfloat16")])
def test_sparse_products(case, op, dtype):
    cast = {name: a.astype(dtype) if name in ("weight", "x") else a for name, a in case.items()}
    arguments = [cast.get(name, name) for name in ARGUMENTS[op]]
    got, want = getattr(sparse, op)(*arguments, interpret=INTERPRET), getattr(reference, op)(*arguments)
    assert got.shape == want.shape and got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


def test_foreign_rows_do_not_enter(case):
    """NaN in rows that nothing chose, and in one that a single latent did, whatever runs share a group or a tile."""
    table = case["x"].at[5].set(jnp.nan)
    indices = case["indices"].at[5].set(9)
    out = np.asarray(sparse.outer(case["values"], indices, table, N, interpret=INTERPRET))
    assert np.isnan(out[9]).all() and not np.isnan(np.delete(out, 9, axis=0)).any()


def update_arguments(width, depth, dtype):
    matrix, moment = SHAPE((width, depth), "float32"), SHAPE((width, depth), dtype)
    return matrix, moment, moment, matrix, SHAPE((), "float32"), SHAPE((), "int32"), SHAPE((), "float32"), SHAPE((), "bool")


ADAM = {"b1": 0.9, "b2": 0.99, "eps": 1e-6}


@pytest.mark.parametrize(("dtype", "unit"), [("float32", True), ("bfloat16", True), ("float32", False)])
def test_row_update(monkeypatch, dtype, unit):
    """Three blocks of 16 rows, the last one not full; then a gradient that is not kept."""
    monkeypatch.setattr(update, "_BLOCK", 16 * 150)
    rng = np.random.default_rng(1)
    weight, mu, gradient = (jnp.asarray(rng.normal(size=(41, 150)), jnp.float32) for _ in range(3))
    moments = mu.astype(dtype), jnp.square(mu).astype(dtype)
    scalars = [jnp.asarray(0.1, jnp.float32), jnp.asarray(3), jnp.asarray(0.5, jnp.float32)]
    run = jax.jit(partial(update.row_update, unit=unit, interpret=True, **ADAM))
    found = run(weight, *moments, gradient, *scalars, jnp.asarray(True))
    want = update_reference.row_update(weight, *moments, gradient, *scalars, jnp.asarray(True), unit=unit, **ADAM)
    for a, b in zip(found, want, strict=True):
        assert a.dtype == b.dtype
        # of two moments that differ in the last bit one may be rounded up and the other not
        near = 2**-7 if b.dtype == jnp.bfloat16 else 2e-5
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=near, atol=1e-6)
        assert near < 1e-4 or (a == b).mean() > 0.99
    for a, b in zip(run(weight, *moments, gradient * jnp.nan, *scalars, jnp.asarray(False)), (weight, *moments), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


@pytest.mark.parametrize(("rows", "width", "depth", "k"), [(2048, 16411, 768, 32), (2048, 131072, 4096, 64)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lowers_for_a_tpu(monkeypatch, rows, width, depth, k, dtype):
    monkeypatch.undo()
    weight, x = SHAPE((width, depth), dtype), SHAPE((rows, depth), dtype)
    values, indices = SHAPE((rows, k), "float32"), SHAPE((rows, k), "int32")
    problem = Problem(rows, width, k, depth, jnp.dtype(dtype))
    assert selection.refuses(problem, "tpu") is None and sparse.refuses(problem, "tpu") is None
    for fn, arguments in (
        (partial(selection.topk, k=k), (SHAPE((rows, width), dtype),)),
        (sparse.combine, (values, indices, weight)),
        (sparse.dots, (x, indices, weight)),
        (partial(sparse.outer, width=width), (values, indices, x)),
        (partial(update.row_update, unit=True, **ADAM), update_arguments(width, depth, dtype)),
    ):
        assert lower_for("tpu", fn, *arguments).as_text().count("tpu_custom_call") == 1


def test_refusals():
    fits = Problem(2048, 16384, 32, 768, jnp.float32)
    assert "TPU" in selection.refuses(fits, "cpu") and "TPU" in sparse.refuses(fits, "cuda") and "TPU" in update.refuses(fits, "cpu")
    for module, problem, says in (
        (selection, Problem(8, 16384, 1025), "k <= 1024"),
        (selection, Problem(8, 2**20 + 1, 32), "at most 1048576"),
        (selection, Problem(8, 16384, 32, 0, jnp.float64), "float64"),
        (sparse, Problem(8, 16384, 32, 20000), "at most 16384"),
        (sparse, Problem(8, 16384, 32, 64, jnp.float16), "float16"),
        (update, Problem(1, 16384, 1, 20000), "up to 16384"),
        (sparse, Problem(2**17, 16384, 64, 64), "at most 4194304 pairs"),
    ):
        assert says in module.refuses(problem, "tpu")
