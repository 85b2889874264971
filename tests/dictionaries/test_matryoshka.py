"""Matryoshka dictionaries against the dense definition: every prefix decodes the same batch code, and AuxK weighs what it does in TopK."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlmscope_jax.dictionaries import BatchTopK, LossSettings, Matryoshka
from dlmscope_jax.errors import UserError

D, N, K, B = 6, 20, 3, 11
PREFIXES = (2, 7, 20)
SPEC = Matryoshka(D, N, K, k_aux=4, prefixes=PREFIXES)
VARIANTS = {
    "autoencoder": SPEC,
    "transcoder": dataclasses.replace(SPEC, d_out=4),
    "skip": dataclasses.replace(SPEC, d_out=4, skip=True, input_bias=True),
}


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def random_params(spec, seed=0):
    params = {name: draw(seed + i, *shape) for i, (name, shape) in enumerate(sorted(spec.shapes().items()))}
    return params | {"threshold": jnp.float32(1.7), "b_enc": params["b_enc"].at[:2].add(4.0)}  # so that the first prefix has latents


PARAMS, X, TARGET = random_params(SPEC), draw(9, B, D), draw(8, B, 4)


def close(got, want, rtol=3e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=4e-6), got, want)


def dense_errors(spec, params, x, target):
    """The residual of every prefix, with every latent written out."""
    name = spec._shift_name()
    pre = (x if name is None else x - params[name]) @ params["W_enc"].T + params["b_enc"]
    order = jnp.argsort(-jax.lax.stop_gradient(pre).reshape(-1), stable=True)[: spec.k * len(x)]
    code = jnp.maximum(pre, 0.0) * jnp.zeros(pre.size).at[order].set(1.0).reshape(pre.shape)
    rest = params["b_dec"] + (x @ params["W_skip"].T if spec.skip else 0.0)
    return pre, [target - rest - code[:, :n] @ params["W_dec"][:n] for n in spec.nested]


def dense_loss(spec, params, x, target, dead=None, alpha=0.0):
    pre, errors = dense_errors(spec, params, x, target)
    loss = sum((error**2).sum(axis=1).mean() for error in errors) / len(errors)
    if dead is None:
        return loss
    residual, n_dead = jax.lax.stop_gradient(errors[-1]), int(dead.sum())
    chosen = jax.lax.top_k(jnp.where(dead, pre, -jnp.inf), min(spec.k_aux, n_dead))[1]
    estimate = (pre * jax.nn.one_hot(chosen, spec.width).sum(axis=1)) @ params["W_dec"]
    relative = ((residual - estimate) ** 2).sum() / ((residual - residual.mean(axis=0)) ** 2).sum()
    return loss + alpha * min(1.0, n_dead / spec.k_aux) * relative


def pair(spec):
    return (X, X) if spec.d_out is None else (X, TARGET)


@pytest.mark.some(3)
@pytest.mark.parametrize("n_dead", [None, 2, 9])
@pytest.mark.parametrize("spec", VARIANTS.values(), ids=VARIANTS)
def test_loss_and_gradient_equal_the_definition(spec, n_dead):
    params, (x, target) = random_params(spec), pair(spec)
    dead = None if n_dead is None else jnp.zeros(N, bool).at[jnp.arange(n_dead) * 2].set(True)
    settings = LossSettings(aux=0.7)
    run = jax.jit(jax.value_and_grad(lambda p: spec.loss(p, x, target=target, dead=dead, settings=settings), has_aux=True))
    (loss, parts), gradient = run(params)
    want, want_gradient = jax.value_and_grad(lambda p: dense_loss(spec, p, x, target, dead, 0.7))(params)
    close(loss, want)
    close(gradient, want_gradient, rtol=3e-4)
    close(sum(parts.terms.values()), loss)
    _, errors = dense_errors(spec, params, x, target)
    for n, error in zip(PREFIXES, errors, strict=True):
        close(parts.measured[f"prefix_{n}"], (error**2).sum() / B)
    # explained variance is that of the whole dictionary
    close(parts.explained_variance, 1 - (errors[-1] ** 2).sum() / ((target - target.mean(axis=0)) ** 2).sum(), rtol=1e-4)


def test_gradient_agrees_with_finite_differences():
    params = {name: np.asarray(value, np.float64) for name, value in PARAMS.items()}
    direction = {name: np.asarray(draw(40, *value.shape), np.float64) for name, value in params.items()}
    gradient = jax.grad(lambda p: SPEC.loss(p, X)[0])(PARAMS)
    slope = sum(float((np.asarray(gradient[n], np.float64) * direction[n]).sum()) for n in params)
    mask = np.asarray(SPEC.dense(SPEC.encode(PARAMS, X, train=True))) > 0

    def at(step):  # numpy float64, the selection held where it is
        p = {n: params[n] + step * direction[n] for n in params}
        x = np.asarray(X, np.float64)
        code = ((x - p["b_dec"]) @ p["W_enc"].T + p["b_enc"]) * mask
        return np.mean([((x - code[:, :n] @ p["W_dec"][:n] - p["b_dec"]) ** 2).sum() / B for n in PREFIXES])

    np.testing.assert_allclose(slope, (at(1e-5) - at(-1e-5)) / 2e-5, rtol=1e-4)


def test_one_prefix_is_batch_topk_and_auxk_weighs_the_same():
    """dictionary_learning's reconstruction is 1/G of this mean, so its AuxK is G times as strong."""
    plain, whole = BatchTopK(D, N, K, k_aux=4), dataclasses.replace(SPEC, prefixes=(N,))
    dead = jnp.zeros(N, bool).at[jnp.array([2, 15])].set(True)
    loss, parts = plain.loss(PARAMS, X, dead=dead)
    other, other_parts = whole.loss(PARAMS, X, dead=dead)
    close(other, loss)
    _, nested = SPEC.loss(PARAMS, X, dead=dead)
    for name in ("terms", "measured"):
        close(getattr(nested, name)["aux"], getattr(parts, name)["aux"])
    close(parts.statistics, nested.statistics)
    # equal errors give the same reconstruction, whatever their number: a mean, taken once
    blank = PARAMS | {"W_dec": jnp.zeros((N, D))}
    close(SPEC.loss(blank, X)[1].terms["reconstruction"], plain.loss(blank, X)[1].terms["reconstruction"])


def test_a_latent_learns_from_every_prefix_that_holds_it():
    """With equal residuals, the gradient of an early row counts all G prefixes, that of a late row only the last."""
    params = PARAMS | {"W_dec": jnp.zeros((N, D))}
    gradient = jax.grad(lambda p: SPEC.loss(p, X)[0])(params)["W_dec"]
    plain = jax.grad(lambda p: BatchTopK(D, N, K, k_aux=4).loss(p, X)[0])(params)["W_dec"]
    share = jnp.array([3 / 3] * 2 + [2 / 3] * 5 + [1 / 3] * 13)
    close(gradient, share[:, None] * plain)
    assert float(jnp.abs(plain[:2]).max()) > 0 and float(jnp.abs(plain[7:]).max()) > 0


def test_a_smaller_k_now_is_that_dictionary():
    small = dataclasses.replace(SPEC, k=2)
    (loss, _), gradient = jax.value_and_grad(SPEC.loss, has_aux=True)(PARAMS, X, settings=LossSettings(k=jnp.int32(2)))
    (want, _), want_gradient = jax.value_and_grad(small.loss, has_aux=True)(PARAMS, X)
    close(loss, want, rtol=1e-6)
    close(gradient, want_gradient, rtol=1e-5)


def test_the_code_is_decoded_once():
    """No [B, N] product but the encoder's, no [M, D] array, and as many scatters of rows for five prefixes as for two."""
    b, n = 64, 512

    def program(spec):
        params = random_params(spec)
        gradient = jax.jit(jax.grad(lambda p: spec.loss(p, draw(1, b, D))[0]))
        return gradient.lower(params).as_text(dialect="hlo")

    many = program(Matryoshka(D, n, 4, prefixes=(16, 48, 112, 240, 512)))
    few = program(Matryoshka(D, n, 4, prefixes=(16, 512)))
    assert len([line for line in many.splitlines() if " dot(" in line and f"= f32[{b},{n}]" in line]) == 1
    assert many.count(" scatter(") == few.count(" scatter(")
    # the accumulators are there, and a code of G b rows is not
    assert f"f32[{5 * b},{D}]" in many and f"f32[{5 * b},{n}]" not in many


def test_default_prefixes():
    assert Matryoshka(64, 2048, 4).nested == (64, 192, 448, 960, 2048)
    assert Matryoshka(4, 8, 2).nested[-1] == 8
    assert SPEC.nested == PREFIXES


@pytest.mark.parametrize("prefixes", [(2, 7), (7, 2, 20), (2, 2, 20), (0, 20), (20, 21)])
def test_prefixes_must_ascend_to_the_width(prefixes):
    with pytest.raises(UserError, match="must ascend to the width 20"):
        Matryoshka(D, N, K, prefixes=prefixes)
