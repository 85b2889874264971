"""Encoding with the gradient at the winners, selected in float32 and in bf16, in rows and over the batch; and what of it is compiled."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlmscope_jax.errors import UserError
from dlmscope_jax.kernels import SELECTIONS, encode_topk, encode_topk_batch, preactivations

B, D, N, K = 6, 16, 40, 4
_RNG = np.random.default_rng(0)
X, W, BIAS, SHIFT, C = (jnp.asarray(_RNG.normal(size=s), jnp.float32) for s in ((B, D), (N, D), (N,), (D,), (B, K)))


def close(got, want, rtol=2e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-5), got, want)


@pytest.mark.parametrize("shift", [None, SHIFT])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_values_are_float32_at_the_winners_and_so_is_the_gradient(selection, shift):
    def dense(x, weight, bias, shift, indices):
        pre = (x if shift is None else x - shift) @ weight.T + bias
        return jnp.take_along_axis(pre, indices, axis=1)

    values, indices = encode_topk(X, W, BIAS, shift, K, selection=selection)
    close(values, dense(X, W, BIAS, shift, indices))
    wanted = (0, 1, 2) if shift is None else (0, 1, 2, 3)
    got = jax.grad(lambda *a: (encode_topk(*a, K, selection=selection)[0] * C).sum(), wanted)(X, W, BIAS, shift)
    close(got, jax.grad(lambda *a: (dense(*a, indices) * C).sum(), wanted)(X, W, BIAS, shift))


def test_float32_selects_as_top_k_does():
    tied = W.at[7].set(W[3])
    values, indices = encode_topk(X, tied, jnp.zeros(N), SHIFT, K)
    want = jax.lax.top_k(preactivations(X, tied, jnp.zeros(N), SHIFT), K)
    close(values, want[0])
    np.testing.assert_array_equal(indices, want[1])


def test_bf16_selects_by_rounded_factors():
    """Two latents that a bf16 weight does not tell apart: float32 takes the larger, bf16 the first."""
    weight = jnp.zeros((3, 2)).at[1, 0].set(1.0).at[2, 0].set(1.001)
    x = jnp.array([[1.0, 0.0]])
    assert encode_topk(x, weight, jnp.zeros(3), None, 1)[1].item() == 2
    values, indices = encode_topk(x, weight, jnp.zeros(3), None, 1, selection="bfloat16")
    assert (indices.item(), values.item()) == (1, 1.0)
    values, rows, latents = encode_topk_batch(x, weight, jnp.zeros(3), None, 1, selection="bfloat16")
    assert (values.item(), rows.item(), latents.item()) == (1.0, 0, 1)


@pytest.mark.parametrize("shift", [None, SHIFT])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_over_the_batch(selection, shift):
    def dense(x, weight, bias, shift, rows, latents):
        return ((x if shift is None else x - shift) @ weight.T + bias)[rows, latents]

    values, rows, latents = encode_topk_batch(X, W, BIAS, shift, B * K, selection=selection)
    close(values, dense(X, W, BIAS, shift, rows, latents))
    assert len(set(zip(rows.tolist(), latents.tolist(), strict=True))) == B * K
    wanted = (0, 1, 2) if shift is None else (0, 1, 2, 3)
    cotangent = C.reshape(-1)
    got = jax.grad(lambda *a: (encode_topk_batch(*a, B * K, selection=selection)[0] * cotangent).sum(), wanted)(X, W, BIAS, shift)
    close(got, jax.grad(lambda *a: (dense(*a, rows, latents) * cotangent).sum(), wanted)(X, W, BIAS, shift))


def compiled(wanted):
    """How many matrix products and which primitives the compiled gradient with respect to these arguments holds."""
    n = 64  # N / k is 16: sparse products

    def loss(x, weight, bias, shift):
        return (encode_topk(x, weight, bias, shift, K)[0] ** 2).sum()

    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((B, D), (n, D), (n,), (D,))]
    text = jax.jit(jax.grad(loss, wanted)).lower(*shapes).compile().as_text()
    return len(re.findall(r"= f32\[\S+ dot\(", text)), set(re.findall(r"dlmscope\.(\w+)\.", text)) & {"combine", "dots", "outer", "sums"}


def test_nothing_is_computed_for_the_input_unless_it_is_asked_for():
    """The encoder's product, and the batch sum's for the shift; only the gradient of the input takes rows of the weight together."""
    assert compiled((1, 2, 3)) == (2, {"outer", "sums"})
    assert compiled((1, 2)) == (1, {"outer", "sums"})
    assert compiled((0, 1, 2, 3)) == (2, {"combine", "outer", "sums"})


def test_the_gradient_of_the_preactivations_takes_the_batch_sum_for_the_shift():
    cotangent = jnp.asarray(_RNG.normal(size=(B, N)), jnp.float32)

    def ours(*a):
        return (preactivations(*a) * cotangent).sum()

    def dense(x, weight, bias, shift):
        return (((x - shift) @ weight.T + bias) * cotangent).sum()

    close(jax.grad(ours, (0, 1, 2, 3))(X, W, BIAS, SHIFT), jax.grad(dense, (0, 1, 2, 3))(X, W, BIAS, SHIFT))
    text = jax.jit(jax.grad(ours, (1, 2, 3))).lower(X, W, BIAS, SHIFT).compile().as_text()
    assert f"f32[{B},{D}]{{1,0}} dot(" not in text  # what autodiff would sum over the batch afterwards


def test_preactivations_of_half_precision_are_those_of_the_same_numbers_in_float32():
    half = [a.astype(jnp.bfloat16) for a in (X, W, BIAS, SHIFT)]
    got = preactivations(*half)
    assert got.dtype == jnp.float32
    close(got, preactivations(*(a.astype(jnp.float32) for a in half)))


def test_mistakes():
    with pytest.raises(UserError, match="selection 'float16' is not known: one of float32, bfloat16"):
        encode_topk(X, W, BIAS, None, K, selection="float16")
    with pytest.raises(UserError, match="selection 'half' is not known"):
        encode_topk_batch(X, W, BIAS, None, K, selection="half")
