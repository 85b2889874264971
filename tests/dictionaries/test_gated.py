"""Gated dictionaries against closed forms written with plain autodiff and against finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlmscope_jax.dictionaries import Gated, LossSettings

from . import toy

D, N, B, OUT = 6, 20, 40, 5
VARIANTS = {
    "autoencoder": {},
    "not subtracted": {"subtract": False},
    "skip transcoder": {"d_out": OUT, "skip": True},
    "input bias": {"d_out": OUT, "input_bias": True},
    "normalised": {"row_norm": "layer_norm"},
}
SETTINGS = LossSettings(sparsity=0.3)


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def random_params(spec, seed=0):
    return {name: 0.5 * draw(seed + i, *shape) for i, (name, shape) in enumerate(sorted(spec.shapes().items()))}


def close(got, want, rtol=3e-5, atol=3e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), got, want)


X, TARGET = draw(90, B, D), draw(91, B, OUT)


def plain_terms(spec, params, x, target, frozen=None):
    """The three terms; ``frozen``: the decoder of the third."""
    if spec.row_norm == "layer_norm":
        x = (x - x.mean(axis=1, keepdims=True)) / (x.std(axis=1, keepdims=True, ddof=1) + 1e-5)
    target = x if target is None else target
    frozen = jax.lax.stop_gradient(params) if frozen is None else frozen
    shift = 0.0 if not (spec.input_bias or (spec.d_out is None and spec.subtract)) else params["b_in" if spec.input_bias else "b_dec"]

    def decode(p, f):
        return f @ p["W_dec"] + p["b_dec"] + (x @ p["W_skip"].T if spec.skip else 0.0)

    product = (x - shift) @ params["W_enc"].T
    pi = product + params["b_gate"]
    f = jax.lax.stop_gradient((pi > 0).astype(x.dtype)) * jax.nn.relu(jnp.exp(params["r_mag"]) * product + params["b_mag"])
    return f, {
        "reconstruction": ((target - decode(params, f)) ** 2).sum(axis=1).mean(),
        "sparsity": 0.3 * jax.nn.relu(pi).sum(axis=1).mean(),
        "gate": ((target - decode(frozen, jax.nn.relu(pi))) ** 2).sum(axis=1).mean(),
    }


@pytest.mark.some(2)
@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_gradient_equal_plain_autodiff(variant):
    spec = Gated(D, N, **VARIANTS[variant])
    params, target = random_params(spec), TARGET if spec.transcoder else None
    (loss, parts), gradient = jax.jit(jax.value_and_grad(spec.loss, has_aux=True))(params, X, target, None, SETTINGS)
    f, terms = plain_terms(spec, params, X, target)
    close(parts.terms, terms)
    close(sum(parts.terms.values()), loss, rtol=1e-6)
    close(gradient, jax.grad(lambda p: sum(plain_terms(spec, p, X, target)[1].values()))(params), rtol=3e-4, atol=3e-5)
    close(spec.encode(params, X).values, f)
    np.testing.assert_array_equal(spec.encode(params, X, train=True).values, spec.encode(params, X).values)
    np.testing.assert_allclose(parts.l0, (f != 0).sum(axis=1).mean(), rtol=1e-6)
    # the two paths disagree somewhere, or this would say little
    product = spec.encode(params | {"b_gate": jnp.full(N, 1e6)}, X).values
    assert 0.02 < float(((product > 0) & (f == 0)).mean())


def test_the_decoder_is_frozen_in_the_third_term():
    """What reaches the decoder is the real reconstruction's gradient and nothing else (SAELens does not detach it)."""
    spec = Gated(D, N, d_out=OUT, skip=True)
    params = random_params(spec)
    gradient = jax.grad(lambda p: spec.loss(p, X, TARGET, settings=SETTINGS)[0])(params)
    only = jax.grad(lambda p: plain_terms(spec, p, X, TARGET)[1]["reconstruction"])(params)
    for name in ("W_dec", "b_dec", "W_skip"):
        close(gradient[name], only[name], rtol=1e-4, atol=1e-5)
    live = jax.grad(lambda p: sum(plain_terms(spec, p, X, TARGET, frozen=p)[1].values()))(params)
    for name in ("W_dec", "b_dec", "W_skip"):
        assert float(jnp.abs(live[name] - only[name]).max()) > 0.1, name


def test_b_dec_of_an_autoencoder_learns_from_the_third_term_as_the_encoders_shift_only():
    spec, params = Gated(D, N), random_params(Gated(D, N))
    gradient = jax.grad(lambda p: spec.loss(p, X, settings=SETTINGS)[0])(params)["b_dec"]
    reconstruction = jax.grad(lambda p: plain_terms(spec, p, X, None)[1]["reconstruction"])(params)["b_dec"]
    pi = (X - params["b_dec"]) @ params["W_enc"].T + params["b_gate"]
    error = jnp.maximum(pi, 0) @ params["W_dec"] + params["b_dec"] - X
    to_pi = jnp.where(pi > 0, 2 * error @ params["W_dec"].T + 0.3, 0.0) / B
    close(gradient - reconstruction, -(to_pi @ params["W_enc"]).sum(axis=0), rtol=1e-4, atol=1e-5)


def test_the_step_has_no_gradient():
    """The gate learns from the second and third terms; r_mag and b_mag from the first."""
    spec, params = Gated(D, N), random_params(Gated(D, N))
    gradient = jax.grad(lambda p: spec.loss(p, X, settings=SETTINGS)[0])(params)
    first = jax.grad(lambda p: plain_terms(spec, p, X, None)[1]["reconstruction"])(params)
    rest = jax.grad(lambda p: sum(v for n, v in plain_terms(spec, p, X, None)[1].items() if n != "reconstruction"))(params)
    assert float(jnp.abs(first["b_gate"]).max()) == float(jnp.abs(rest["r_mag"]).max()) == float(jnp.abs(rest["b_mag"]).max()) == 0.0
    close(gradient["b_gate"], rest["b_gate"], rtol=1e-4, atol=1e-5)
    for name in ("r_mag", "b_mag"):
        close(gradient[name], first[name], rtol=1e-4, atol=1e-5)
        assert float(jnp.abs(gradient[name]).max()) > 1e-2


def test_gradient_agrees_with_finite_differences():
    """Numpy, float64, along a random direction; the frozen decoder and the open gates are held at the start."""
    spec = Gated(D, N)
    params32 = random_params(spec)
    params = {name: np.asarray(value, np.float64) for name, value in params32.items()}
    direction = {name: np.asarray(draw(40 + i, *value.shape), np.float64) for i, (name, value) in enumerate(params.items())}
    gradient = jax.grad(lambda p: spec.loss(p, X, settings=SETTINGS)[0])(params32)
    slope = sum(float((np.asarray(gradient[n], np.float64) * direction[n]).sum()) for n in params)
    x = np.asarray(X, np.float64)
    opened = (x - params["b_dec"]) @ params["W_enc"].T + params["b_gate"] > 0

    def at(h):
        p = {n: params[n] + h * direction[n] for n in params}
        product = (x - p["b_dec"]) @ p["W_enc"].T
        via = np.maximum(product + p["b_gate"], 0)
        f = opened * np.maximum(np.exp(p["r_mag"]) * product + p["b_mag"], 0)
        real = ((x - f @ p["W_dec"] - p["b_dec"]) ** 2).sum()
        return (real + 0.3 * via.sum() + ((x - via @ params["W_dec"] - params["b_dec"]) ** 2).sum()) / B

    np.testing.assert_allclose(slope, (at(1e-6) - at(-1e-6)) / 2e-6, rtol=2e-4)


@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if variant != "normalised"])  # there its 1e-5 has a scale
def test_fold_keeps_the_latents_and_unfold_undoes_it(variant):
    spec = Gated(D, N, **VARIANTS[variant])
    params, scale, out_scale = random_params(spec), 7.3, 0.4 if spec.transcoder else None
    folded = spec.fold(params, scale, out_scale)
    before, after = spec.encode(params, X), spec.encode(folded, X * scale)
    np.testing.assert_array_equal(before.values != 0, after.values != 0)
    close(after.values, before.values * (out_scale or scale), rtol=1e-4, atol=1e-4)
    close(spec.reconstruct(folded, X * scale), spec.reconstruct(params, X) * (out_scale or scale), rtol=1e-4, atol=1e-4)
    close(spec.unfold(folded, scale, out_scale), params)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_paths_start_equal(variant):
    spec = Gated(D, N, **VARIANTS[variant])
    rows = (TARGET, X) if spec.transcoder else (X, None)
    params = spec.init(jax.random.key(0), *rows)
    assert {name: value.shape for name, value in params.items()} == spec.shapes()
    np.testing.assert_array_equal(params["b_gate"], params["b_mag"])
    np.testing.assert_array_equal(params["r_mag"], np.zeros(N))
    assert bool(params["b_gate"].any()) == (spec.transcoder and not spec.input_bias)


@pytest.mark.standard_promotion
def test_it_finds_the_features():
    params, l0, explained, alive = toy.fit(Gated(toy.D, 64), LossSettings(sparsity=0.6))
    assert toy.found(params, alive, toy.directions()) >= 0.9
    assert abs(l0 - toy.ACTIVE) < 0.5 and explained > 0.95
