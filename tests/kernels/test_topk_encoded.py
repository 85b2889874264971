"""Product and selection in one: tiles give what the whole gives, ties included, and hold no [B, N]."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlmscope_jax.errors import UserError
from dlmscope_jax.kernels.dispatch import Problem, ran
from dlmscope_jax.kernels.topk import encoded
from dlmscope_jax.kernels.topk.encoded import default, select_encoded

B, D, N = 6, 8, 300
NAMES = sorted(encoded.IMPLEMENTATIONS)


def integers(top=2):
    """Whole numbers: products are exact in any order and dtype, and many are equal."""
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.integers(-top, top + 1, shape), jnp.float32) for shape in ((B, D), (N, D), (N,), (D,)))


@pytest.mark.parametrize("width", [64, 100, 299])  # the last tile is narrower than the others, as wide, a single latent
@pytest.mark.parametrize(("k", "dtype"), [(1, jnp.float32), (50, jnp.bfloat16), (50, jnp.float32)])
def test_tiles_give_what_the_definition_gives(monkeypatch, width, k, dtype):
    monkeypatch.setattr(encoded, "tile_width", lambda rows, n, k: width)
    x, weight, bias, some = integers()
    for shift in (some, None) if dtype == jnp.float32 else (some,):
        want_values, want = jax.lax.top_k((x if shift is None else x - shift) @ weight.T + bias, k)
        values, indices = jax.jit(partial(encoded.tiled, k=k, dtype=dtype))(x, weight, bias, shift)
        np.testing.assert_array_equal(indices, want)
        np.testing.assert_array_equal(values, want_values.astype(dtype))
        assert values.dtype == dtype and indices.dtype == jnp.int32


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("k", [20, N])
def test_each_implementation_by_name(monkeypatch, name, k):
    monkeypatch.setattr(encoded, "_TILE_ENTRIES", 64 * B)  # several tiles, of k latents at least
    monkeypatch.setattr(encoded, "_ROWS_ENTRIES", 3 * N)
    x, weight, bias, shift = integers()
    run = partial(select_encoded, k=k, implementation=name)
    values, indices = run(x, weight, bias, shift)
    want_values, want = jax.lax.top_k((x - shift) @ weight.T + bias, k)
    np.testing.assert_array_equal(indices, want)
    np.testing.assert_array_equal(values, want_values)
    assert f"select_encoded.{name}" in ran(run, x, weight, bias, shift)


@pytest.mark.parametrize("name", NAMES)
def test_bf16_rounds_factors_and_results_and_adds_in_float32(name):
    rng = np.random.default_rng(1)
    x, weight = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((B, 256), (N, 256)))
    values, indices = select_encoded(x, weight, jnp.zeros(N), None, 10, dtype="bfloat16", implementation=name)
    exact = np.asarray(x.astype(jnp.bfloat16), np.float64) @ np.asarray(weight.astype(jnp.bfloat16), np.float64).T
    chosen = np.take_along_axis(exact, np.asarray(indices), axis=1)
    np.testing.assert_allclose(np.asarray(values, np.float64), chosen, rtol=2**-8, atol=1e-6)  # half a step of bf16 and a little


@pytest.mark.parametrize("rows", [1, 5, 6])  # one part, two of which the last is filled up, two
def test_some_rows_at_a_time(monkeypatch, rows):
    monkeypatch.setattr(encoded, "_ROWS_ENTRIES", 3 * N)
    x, weight, bias, shift = integers()
    values, indices = jax.jit(partial(encoded.by_rows, k=7, dtype=jnp.dtype("float32")))(x[:rows], weight, bias, shift)
    want_values, want = jax.lax.top_k((x[:rows] - shift) @ weight.T + bias, 7)
    np.testing.assert_array_equal(indices, want)
    np.testing.assert_array_equal(values, want_values)


def test_neither_tiles_nor_rows_hold_all_preactivations(monkeypatch):
    monkeypatch.setattr(encoded, "_TILE_ENTRIES", 2**14)
    monkeypatch.setattr(encoded, "_ROWS_ENTRIES", 2**16)
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((64, 8), (8192, 8), (8192,))]

    def held(run):
        program = jax.jit(lambda x, w, b: run(x, w, b, None, k=4, dtype=jnp.dtype("float32"))).lower(*shapes).compile()
        return program.memory_analysis().temp_size_in_bytes

    whole = 64 * 8192 * 4
    assert held(encoded.separate) > whole and held(encoded.tiled) < whole / 5 and held(encoded.by_rows) < whole / 4


def test_no_rows():
    x, *encoder = integers()
    for name in NAMES:
        values, indices = jax.eval_shape(lambda x, name=name: select_encoded(x, *encoder, 5, implementation=name), x[:0])
        assert values.shape == indices.shape == (0, 5)


def test_no_derivative():
    x, weight, bias, shift = integers()
    gradient = jax.grad(lambda x: select_encoded(x, weight, bias, shift, 5)[0].sum())(x)
    np.testing.assert_array_equal(gradient, 0.0)


def test_the_default_goes_by_memory():
    assert default(Problem(256, 16384, 32), "cpu") == default(Problem(2048, 16384, 32), "cuda") == "separate"
    assert default(Problem(2048, 16384, 32), "cpu") == default(Problem(1024, 131072, 32), "cpu") == "by_rows"
    assert default(Problem(1024, 2**20, 32), "cpu") == "tiled"  # few rows at a time would read the weights too often
    assert default(Problem(8192, 65536, 64), "cuda") == "tiled"
    assert default(Problem(8192, 65536, 64, dtype=jnp.bfloat16), "cuda") == "separate"


def test_widths_of_tiles():
    assert encoded.tile_width(2048, 16384, 32) == 8192
    assert encoded.tile_width(2048, 20000, 32) == 6667  # three of nearly the same width
    assert encoded.tile_width(2**24, 1000, 32) >= 32


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"k": 301}, "k = 301 must lie between 1 and the 300 latents"),
        ({"k": 3, "dtype": "int8"}, "dtype must be float32, bfloat16 or float16, got int8"),
        ({"k": 3, "implementation": "fused"}, "'fused' is not known: one of separate"),
    ],
)
def test_mistakes(given, says):
    with pytest.raises(UserError, match=says):
        select_encoded(*integers(), **given)
