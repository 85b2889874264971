"""Sparse products against plain dense autodiff: values, gradients, and that nothing of width N hides in the gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlmscope_jax.errors import UserError
from dlmscope_jax.kernels import decode, preactivations, topk, with_encoder_gradient
from dlmscope_jax.kernels.dispatch import Problem, ran
from dlmscope_jax.kernels.sparse_matmul import gather, products

NAMES = ["reference", "gather", "segments"]
B, D, N, K = 7, 5, 24, 4


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    return {"x": draw(B, D), "weight": draw(N, D), "bias": draw(N), "shift": draw(D), "target": draw(B, D), "out": draw(N, D)}


def close(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), got, want)


@pytest.mark.parametrize("name", NAMES)
def test_decode_and_its_gradient(case, name):
    values, indices = topk(case["target"] @ case["weight"].T, K)
    indices = indices.at[0, 1].set(indices[0, 0])  # a repeated index adds

    def dense(values, weight):
        code = (jax.nn.one_hot(indices, N) * values[..., None]).sum(axis=1)
        return ((code @ weight - case["target"]) ** 2).sum()

    def sparse(values, weight):
        return ((decode(values, indices, weight, name) - case["target"]) ** 2).sum()

    close(sparse(values, case["out"]), dense(values, case["out"]))
    close(jax.grad(sparse, (0, 1))(values, case["out"]), jax.grad(dense, (0, 1))(values, case["out"]))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("subtract", [True, False])
def test_encoder_gradient(case, name, subtract):
    shift = case["shift"] if subtract else None
    cotangent = jnp.asarray(np.random.default_rng(1).normal(size=(B, K)), jnp.float32)

    def dense(x, weight, bias, shift):
        pre = (x if shift is None else x - shift) @ weight.T + bias
        return (jax.lax.top_k(pre, K)[0] * cotangent).sum()

    def sparse(x, weight, bias, shift):
        pre = jax.lax.stop_gradient(preactivations(x, weight, bias, shift))
        values, indices = topk(pre, K)
        return (with_encoder_gradient(values, indices, x, weight, bias, shift, name) * cotangent).sum()

    arguments = (case["x"], case["weight"], case["bias"], shift)
    wanted = (0, 1, 2, 3) if subtract else (0, 1, 2)
    close(sparse(*arguments), dense(*arguments))
    close(jax.grad(sparse, wanted)(*arguments), jax.grad(dense, wanted)(*arguments))


def test_the_sparse_gradient_has_no_dense_code(case, monkeypatch):
    """A cotangent [B, N], or a gathered [B, k, D], would show as an array of that shape in the compiled program."""
    monkeypatch.setattr(gather, "_GATHERED", 2 * K * D)
    jax.clear_caches()

    def loss(weight, out):
        pre = jax.lax.stop_gradient(preactivations(case["x"], weight, case["bias"], case["shift"]))
        values, indices = topk(pre, K)
        values = with_encoder_gradient(values, indices, case["x"], weight, case["bias"], case["shift"], "gather")
        return (decode(values, indices, out, "gather") ** 2).sum()

    text = jax.jit(jax.grad(loss, (0, 1))).lower(case["weight"], case["out"]).as_text(dialect="hlo")
    made = [line for line in text.splitlines() if " dot(" in line and f"= f32[{B},{N}]" in line]
    assert len(made) == 1  # the encoder's forward product and nothing else
    assert f"f32[{B},{K},{D}]" not in text and f"f32[2,{K},{D}]" in text


def test_a_cpu_sums_by_latent_in_levels_where_the_sum_is_larger_than_its_cache():
    shapes = [jax.ShapeDtypeStruct(s, t) for s, t in (((3, 4), jnp.float32), ((3, 4), jnp.int32), ((3, 512), jnp.float32))]
    for width, name in ((16384, "outer.levels"), (16383, "outer.gather")):
        assert ran(lambda v, i, r, width=width: products.outer(v, i, r, width), *shapes, platform="cpu") == {name}


@pytest.mark.parametrize(
    ("width", "k", "want"),
    [
        (
            2048,
            32,
            {"cpu": {"combine.gather", "dots.gather", "outer.gather"}, "tpu": {"combine.reference", "dots.reference", "outer.reference"}},
        ),
        (2048, 512, {"cpu": {"combine.reference", "dots.reference", "outer.reference"}}),
        (
            16384,
            64,
            {"cuda": {"combine.gather", "dots.gather", "outer.segments"}, "tpu": {"combine.gather", "dots.gather", "outer.segments"}},
        ),
    ],
)
def test_what_runs_follows_the_ratio(width, k, want):
    shapes = [jax.ShapeDtypeStruct(s, t) for s, t in (((3, k), jnp.float32), ((3, k), jnp.int32), ((width, 2), jnp.float32))]

    def gradient(values, indices, weight):
        return jax.value_and_grad(lambda v, w: (decode(v, indices, w) ** 2).sum(), (0, 1))(values, weight)

    for platform, names in want.items():
        assert ran(gradient, *shapes, platform=platform) == names


def test_the_rule_of_balance():
    assert products.sparse_wins(Problem(1, 2048, 256), "cpu") and not products.sparse_wins(Problem(1, 2048, 257), "cpu")
    assert products.sparse_wins(Problem(1, 131072, 64), "cuda") and not products.sparse_wins(Problem(1, 16384, 80), "cuda")


def test_a_name_works_or_raises(case):
    code = jnp.zeros((B, K)), jnp.zeros((B, K), jnp.int32), case["weight"]
    with pytest.raises(UserError, match="combine: implementation 'triton' is not known"):
        decode(*code, "triton")
