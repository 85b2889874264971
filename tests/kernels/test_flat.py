"""Products of flat-sparse codes against plain dense autodiff: values, gradients, order, and that no large temporary hides in them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlmscope_jax.errors import UserError
from dlmscope_jax.kernels import decode_flat, decode_prefixes, preactivations, with_flat_encoder_gradient
from dlmscope_jax.kernels.dispatch import Problem, ran
from dlmscope_jax.kernels.sparse_matmul import gather, products

NAMES = ["reference", "gather", "segments"]
B, D, N, M = 7, 5, 24, 40
PREFIXES = (2, 9, 24)


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    pairs = rng.choice(B * N, M, replace=False)  # in no order; row 3 has none
    pairs = pairs[pairs // N != 3]
    rows, latents = jnp.asarray(pairs // N, jnp.int32), jnp.asarray(pairs % N, jnp.int32)
    return {"rows": rows, "latents": latents, "values": draw(len(pairs)), "cotangent": draw(len(pairs))} | {
        "x": draw(B, D), "weight": draw(N, D), "bias": draw(N), "shift": draw(D), "target": draw(B, D), "targets": draw(3, B, D)
    }  # fmt: skip


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(gather, "_CHUNK", 16)  # so that several chunks and a padded one occur


def close(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), got, want)


def dense_code(case, values):
    return jnp.zeros((B, N)).at[case["rows"], case["latents"]].set(values)


@pytest.mark.parametrize("name", NAMES)
def test_decode_and_its_gradient(case, name):
    def dense(values, weight):
        return ((dense_code(case, values) @ weight - case["target"]) ** 2).sum()

    def sparse(values, weight):
        return ((decode_flat(values, case["rows"], case["latents"], weight, B, name) - case["target"]) ** 2).sum()

    close(sparse(case["values"], case["weight"]), dense(case["values"], case["weight"]))
    close(jax.grad(sparse, (0, 1))(case["values"], case["weight"]), jax.grad(dense, (0, 1))(case["values"], case["weight"]))


@pytest.mark.parametrize("name", [None, *NAMES])
def test_prefixes_and_their_gradient(case, name):
    def dense(values, weight):
        code = dense_code(case, values)
        return sum(((code[:, :n] @ weight[:n] - t) ** 2).sum() for n, t in zip(PREFIXES, case["targets"], strict=True))

    def sparse(values, weight):
        return ((decode_prefixes(values, case["rows"], case["latents"], weight, B, PREFIXES, name) - case["targets"]) ** 2).sum()

    close(sparse(case["values"], case["weight"]), dense(case["values"], case["weight"]))
    close(jax.grad(sparse, (0, 1))(case["values"], case["weight"]), jax.grad(dense, (0, 1))(case["values"], case["weight"]))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("subtract", [True, False])
def test_encoder_gradient(case, name, subtract):
    shift = case["shift"] if subtract else None

    def dense(x, weight, bias, shift):
        pre = (x if shift is None else x - shift) @ weight.T + bias
        return (pre[case["rows"], case["latents"]] * case["cotangent"]).sum()

    def sparse(x, weight, bias, shift):
        pre = jax.lax.stop_gradient(preactivations(x, weight, bias, shift))[case["rows"], case["latents"]]
        values = with_flat_encoder_gradient(pre, case["rows"], case["latents"], x, weight, bias, shift, name)
        return (values * case["cotangent"]).sum()

    arguments = (case["x"], case["weight"], case["bias"], shift)
    wanted = (0, 1, 2, 3) if subtract else (0, 1, 2)
    close(sparse(*arguments), dense(*arguments))
    close(jax.grad(sparse, wanted)(*arguments), jax.grad(dense, wanted)(*arguments))


def test_the_order_of_the_pairs_does_not_matter_and_equal_runs_are_equal(case):
    order = np.random.default_rng(5).permutation(len(case["values"]))
    f = jax.jit(lambda v, r, i: decode_flat(v, r, i, case["weight"], B, "gather"))
    plain = f(case["values"], case["rows"], case["latents"])
    close(f(case["values"][order], case["rows"][order], case["latents"][order]), plain)
    np.testing.assert_array_equal(f(case["values"], case["rows"], case["latents"]), plain)
    np.testing.assert_array_equal(plain[3], np.zeros(D))


def test_nothing_of_all_pairs_by_the_width_arises(case):
    """[M, D], [B, N] or [G, M, D] would show in the program of the loss and its gradient."""

    def loss(values, weight):
        one = decode_flat(values, case["rows"], case["latents"], weight, B, "gather")
        return (one**2).sum() + (decode_prefixes(values, case["rows"], case["latents"], weight, B, PREFIXES, "gather") ** 2).sum()

    text = str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(case["values"], case["weight"]))
    assert f"f32[{len(case['values'])},{D}]" not in text and f"f32[{B},{N}]" not in text
    assert "f32[16,5]" in text  # the chunk


def test_an_unknown_implementation(case):
    with pytest.raises(UserError, match="'triton' is not known"):
        decode_flat(case["values"], case["rows"], case["latents"], case["weight"], B, "triton")


def test_what_runs_follows_the_ratio():
    assert products.sparse_wins(Problem(64, 2048, 128), "cpu")
    assert not products.sparse_wins(Problem(64, 2048, 512), "cpu")
    shapes = [jax.ShapeDtypeStruct(s, t) for s, t in (((128,), jnp.float32), ((128,), jnp.int32), ((16384, 2), jnp.float32))]

    def gradient(values, places, weight):
        return jax.value_and_grad(lambda v, w: (decode_flat(v, places, places, w, 2) ** 2).sum(), (0, 1))(values, weight)

    assert ran(gradient, *shapes, platform="cpu") == {"combine_flat.gather", "dots_flat.gather"}
    assert ran(gradient, *shapes, platform="cuda") == {"combine_flat.segments", "dots_flat.gather"}
    assert "prefixes.sparse" in ran(lambda v, i, w: decode_prefixes(v, i, i, w, 2, (5, 16384)), *shapes)
