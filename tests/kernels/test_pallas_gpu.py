"""The kernels for NVIDIA GPUs, in Pallas' interpreter: top-k against ``lax.top_k`` bit for bit, sparse products against dense ones.

And lowered for CUDA at the sizes that they are made for. ``test_aot_cuda.py`` compiles them.
"""

from contextlib import contextmanager
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlmscope_jax.compat import lower_for
from dlmscope_jax.errors import UserError
from dlmscope_jax.kernels import topk
from dlmscope_jax.kernels.dispatch import Problem
from dlmscope_jax.kernels.row_update import IMPLEMENTATIONS as UPDATES
from dlmscope_jax.kernels.row_update import pallas_gpu as update
from dlmscope_jax.kernels.row_update import reference as update_reference
from dlmscope_jax.kernels.sparse_matmul import pallas_gpu as sparse
from dlmscope_jax.kernels.sparse_matmul import products, reference
from dlmscope_jax.kernels.topk import pallas_gpu as selection

SPECIAL = np.array([0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, -np.nan, 1e-38, 3.5], np.float32)
# rows selected from directly; maxima of maxima; half precision with a tail; all of a row; one of a row
CASES = [((3, 97), 4, "float32"), ((2, 700), 3, "float32"), ((2, 333), 9, "bfloat16"), ((1, 33), 33, "float32"), ((2, 300), 1, "float16")]
SHAPE = jax.ShapeDtypeStruct


@contextmanager
def small_limits():
    """Limits at which every way through the kernels is taken by small arrays."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("_DIRECT", 64), ("_TILE", 512), ("_COMPARED", 8)):
            patch.setattr(selection, name, value)
        patch.setattr(sparse, "_LONG", 16)
        yield


@pytest.fixture(scope="module")
def compiled():
    return jax.jit(partial(selection.topk, interpret=True), static_argnums=1), jax.jit(jax.lax.top_k, static_argnums=1)


def same(compiled, x, k):
    with small_limits():
        (values, indices), (want_values, want_indices) = (f(x, k) for f in compiled)
    np.testing.assert_array_equal(indices, want_indices)
    assert values.dtype == x.dtype and indices.dtype == jnp.int32
    unsigned = np.uint16 if x.dtype.itemsize == 2 else np.uint32
    np.testing.assert_array_equal(np.asarray(values).view(unsigned), np.asarray(want_values).view(unsigned))


@settings(max_examples=60, deadline=None)
@given(
    case=st.sampled_from(CASES), seed=st.integers(0, 2**31), kind=st.sampled_from(["normal", "special", "equal", "descending", "ascending"])
)
def test_topk_equals_lax_top_k(compiled, case, seed, kind):
    shape, k, dtype = case
    rng = np.random.default_rng(seed)
    x = {
        "normal": lambda: rng.normal(size=shape),
        "special": lambda: SPECIAL[rng.integers(0, len(SPECIAL), shape)],
        "equal": lambda: np.full(shape, SPECIAL[seed % len(SPECIAL)]),
        "descending": lambda: np.broadcast_to(-np.arange(shape[1]) // 2, shape),  # all winners in the first groups
        "ascending": lambda: np.broadcast_to(np.arange(shape[1]), shape),  # and in the last, which may not be whole
    }[kind]()
    same(compiled, jnp.asarray(x, jnp.float32).astype(dtype), k)


def test_padding_ranks_behind_the_lowest_key_there_is(compiled):
    row = np.full((2, 700), -1, np.int32).view(np.float32)  # the NaN of all ones
    row[1, [3, 690]] = [-np.inf, -5.0]
    same(compiled, jnp.asarray(row), 3)


@pytest.mark.parametrize("k", [1, 7, 40, 64])
def test_every_winner_has_a_place_of_its_own(k):
    """The interpreter writes in order and drops what is outside; a GPU does neither."""
    for top in (2, 9, 1000):  # from many ties to few
        key = jnp.asarray(np.random.default_rng(top).integers(0, top, 64), jnp.int32)
        kept, to = selection._places(key, selection._bound(key, k, 32), k)
        np.testing.assert_array_equal(np.asarray(to)[np.asarray(kept)], np.arange(k))
        assert (np.asarray(to)[~np.asarray(kept)] == k).all()
        best = np.sort(np.argsort(-np.asarray(key), kind="stable")[:k])
        np.testing.assert_array_equal(np.flatnonzero(kept), best)


def test_what_a_row_is_cut_into():
    assert [selection.group_size(n, k) for n, k in [(4096, 32), (16384, 32), (131072, 64), (16384, 1024)]] == [1, 16, 32, 8]
    for n in (4097, 16384, 65537, 2**20, 2**22):
        for k in (1, 32, 100, 1024):
            held = n if (g := selection.group_size(n, k)) == 1 else g * k
            assert held <= selection._MOST, (n, k, g)


@pytest.mark.parametrize(
    ("problem", "platform", "why"),
    [
        (Problem(8, 4096, 32), "cpu", "is a kernel for NVIDIA GPUs, this is cpu"),
        (Problem(8, 2**23, 32), "cuda", "rows up to"),
        (Problem(8, 4096, 1025), "cuda", "k up to 1024"),
        (Problem(8, 4096, 32, 0, jnp.float64), "cuda", "got float64"),
    ],
    ids=str,
)
def test_topk_says_what_it_cannot_do(problem, platform, why):
    assert why in selection.refuses(problem, platform)


def test_both_accept_what_they_are_made_for():
    for dtype in (jnp.float32, jnp.bfloat16):
        problem = Problem(8192, 131072, 64, 4096, dtype)
        assert selection.refuses(problem, "cuda") is None and sparse.refuses(problem, "cuda") is None
    assert "this is tpu" in sparse.refuses(problem, "tpu")
    assert "got float64" in sparse.refuses(Problem(8, 64, 4, 8, jnp.float64), "cuda")


B, D, N, K = 5, 11, 24, 11


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def case(request):
    """A code whose latent 7 is in every place of three rows, so that its run is long; latent 0 is nowhere and its row is NaN."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    indices = rng.integers(1, N, (B, K)).astype(np.int32)
    indices[:3] = 7
    code = {"values": draw(B, K), "indices": jnp.asarray(indices)}
    return code | {"weight": draw(N, D).astype(request.param), "x": draw(B, D).astype(request.param)}


def flat(case):
    """The same code in another order."""
    order = np.random.default_rng(1).permutation(B * K)
    rows = jnp.repeat(jnp.arange(B, dtype=jnp.int32), K)
    return case["values"].reshape(-1)[order], rows[order], case["indices"].reshape(-1)[order]


def close(got, want):
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)


def test_combine_and_dots(case):
    values, indices, weight = case["values"], case["indices"], case["weight"]
    poisoned = weight.at[0].set(jnp.nan)
    close(sparse.combine(values, indices, poisoned, interpret=True), reference.combine(values, indices, weight))
    close(sparse.dots(case["x"], indices, poisoned, interpret=True), reference.dots(case["x"], indices, weight))


def test_flat_products(case):
    values, rows, latents = flat(case)
    weight = case["weight"]
    poisoned = weight.at[0].set(jnp.nan)
    close(sparse.combine_flat(values, rows, latents, poisoned, B, interpret=True), reference.combine_flat(values, rows, latents, weight, B))
    close(sparse.dots_flat(case["x"], rows, latents, poisoned, interpret=True), reference.dots_flat(case["x"], rows, latents, weight))


def test_outer_adds_long_runs_part_by_part(case):
    values, indices, x = case["values"], case["indices"], case["x"]
    run = jax.jit(partial(sparse.outer, width=N, interpret=True))
    with small_limits():
        got = run(values, indices, x)
    close(got, reference.outer(values, indices, x, N))
    np.testing.assert_array_equal(got[0], 0)
    np.testing.assert_array_equal(got, run(values, indices, x))


def test_the_parts_of_long_runs():
    length = np.array([3, 40, 0, 16, 17])
    starts = jnp.asarray(np.concatenate([[0], np.cumsum(length)]), jnp.int32)
    with small_limits():
        parts = sparse._parts(starts[:-1], starts[1:], sparse._most_parts(int(length.sum())))
    np.testing.assert_array_equal(parts.first, [3, 19, 35, 59, 75, 0, 0, 0, 0])
    np.testing.assert_array_equal(parts.last, [19, 35, 43, 75, 76, 0, 0, 0, 0])
    np.testing.assert_array_equal(parts.latent, [1, 5, 5, 4, 5, 5, 5, 5, 5])
    np.testing.assert_array_equal(parts.count[:5], [3, 3, 3, 2, 2])


@pytest.mark.parametrize("runs", [1, 30])
def test_there_are_parts_enough(runs):
    """Most parts for their pairs have the runs that are one pair too long for one program."""
    starts = jnp.arange(runs + 1, dtype=jnp.int32) * 17
    with small_limits():
        parts = sparse._parts(starts[:-1], starts[1:], sparse._most_parts(17 * runs))
    assert int((parts.last - parts.first).sum()) == 17 * runs
    np.testing.assert_array_equal(np.unique(parts.latent), np.arange(runs + 1))


ADAM = {"b1": 0.9, "b2": 0.999, "eps": 1e-8}


@pytest.mark.parametrize(
    ("moments", "unit", "keep"),
    [("float32", True, True), ("float32", True, False), ("bfloat16", True, True), ("bfloat16", False, True)],
    ids=str,
)
def test_row_update(moments, unit, keep):
    """A row of zeros among them, and rows that are no power of two; bfloat16 moments are rounded by the place among all elements."""
    rng = np.random.default_rng(0)
    draw = lambda: jnp.asarray(rng.normal(size=(4, 37)), jnp.float32)  # noqa: E731
    weight, gradient = draw().at[2].set(0), draw()
    arrays = weight, (0.1 * draw()).astype(moments), jnp.square(draw()).astype(moments), gradient
    arguments = *arrays, jnp.float32(0.01), jnp.int32(3), jnp.float32(0.7), jnp.asarray(keep)
    got = jax.jit(partial(update.row_update, interpret=True, unit=unit, **ADAM))(*arguments)
    want = jax.jit(partial(update_reference.row_update, unit=unit, **ADAM))(*arguments)
    for new, expected in zip(got, want, strict=True):
        assert new.dtype == expected.dtype
        np.testing.assert_allclose(np.asarray(new, np.float32), np.asarray(expected, np.float32), rtol=2e-6, atol=1e-7)
    assert keep or all((new == old).all() for new, old in zip(got, arrays, strict=False))


def test_row_update_says_what_it_cannot_do():
    assert update.refuses(Problem(1, 131072, 1, 8192, jnp.bfloat16), "cuda") is None
    assert "this is cpu" in update.refuses(Problem(1, 64, 1, 8), "cpu")
    assert "rows of up to 8192" in update.refuses(Problem(1, 64, 1, 8193), "cuda")


def test_they_are_in_the_tables_and_never_replaced():
    for table in (products.COMBINE, products.DOTS, products.OUTER, products.COMBINE_FLAT, products.DOTS_FLAT, UPDATES):
        assert "this is cpu" in table["pallas_gpu"].refuses(Problem(8, 64, 4, 8), "cpu")
        assert table["pallas_gpu"].refuses(Problem(8, 64, 4, 8), "cuda") is None
    with pytest.raises(UserError, match="topk: 'pallas_gpu' is a kernel for NVIDIA GPUs, this is cpu: use 'reference'"):
        topk(jnp.zeros((2, 64)), 3, "pallas_gpu")


SIZES = [(2048, 768, 16384, 32, "float32"), (8192, 4096, 131072, 64, "bfloat16")]


@pytest.mark.parametrize(("b", "d", "n", "k", "dtype"), SIZES)
def test_lowers_for_cuda(b, d, n, k, dtype):
    values, indices = SHAPE((b, k), jnp.float32), SHAPE((b, k), jnp.int32)
    weight, x = SHAPE((n, d), dtype), SHAPE((b, d), dtype)
    matrix, moment, number = SHAPE((n, d), jnp.float32), SHAPE((n, d), dtype), SHAPE((), jnp.float32)
    programs = {
        "row_update": (
            partial(update.row_update, unit=True, **ADAM),
            matrix,
            moment,
            moment,
            matrix,
            number,
            SHAPE((), jnp.int32),
            number,
            SHAPE((), bool),
        ),
        "topk": (lambda x: selection.topk(x, k), SHAPE((b, n), dtype)),
        "combine": (sparse.combine, values, indices, weight),
        "dots": (sparse.dots, x, indices, weight),
        "outer": (lambda *code: sparse.outer(*code, n), values, indices, x),
    }
    for name, (fn, *arguments) in programs.items():
        text = lower_for("cuda", fn, *arguments).as_text()
        assert text.count("__gpu$xla.gpu.triton") == {"topk": 4, "outer": 2}.get(name, 1), name
        assert f"{b}x{k}x{d}x" not in text and "top_k" not in text, name
