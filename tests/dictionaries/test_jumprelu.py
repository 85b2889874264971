"""JumpReLU: the straight-through rules against closed forms, smoothed functions and populations; losses against plain autodiff."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlmscope_jax.dictionaries import JumpReLU, LossSettings
from dlmscope_jax.dictionaries.jumprelu import jump, step
from dlmscope_jax.errors import UserError

from . import toy

D, N, B, OUT = 6, 20, 40, 5
VARIANTS = {
    "autoencoder": {},
    "not subtracted": {"subtract": False},
    "skip transcoder": {"d_out": OUT, "skip": True},
    "input bias": {"d_out": OUT, "input_bias": True},
    "normalised": {"row_norm": "layer_norm"},
}


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def random_params(spec, seed=0):
    params = {name: draw(seed + i, *shape) for i, (name, shape) in enumerate(sorted(spec.shapes().items()))}
    return params | {"threshold": 0.3 * jnp.abs(params["threshold"])}


def close(got, want, rtol=3e-5, atol=3e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), got, want)


X, TARGET = draw(90, B, D), draw(91, B, OUT)


def pullback(function, z, theta):
    """Gradients in z and theta of the entries' sum, weighted by a fixed cotangent."""
    cotangent = jnp.asarray(np.random.default_rng(7).normal(size=z.shape), z.dtype)
    return cotangent, jax.vjp(function, z, theta)[1](cotangent)


# --- the two rules


@pytest.mark.parametrize("to_input", [False, True])
def test_rules_equal_their_closed_forms(to_input):
    window, theta = 0.5, jnp.array([0.1, 0.4, 1.0])
    z = draw(1, 200, 3)
    kernel = (np.abs(np.asarray(z - theta)) < window / 2).astype(np.float64)
    above = (np.asarray(z) > np.asarray(theta)).astype(np.float64)

    np.testing.assert_array_equal(step(z, theta, window), above)
    np.testing.assert_array_equal(jump(z, theta, window, to_input), np.asarray(z) * above.astype(np.float32))

    c, (to_z, to_theta) = pullback(lambda z, t: step(z, t, window), z, theta)
    np.testing.assert_array_equal(to_z, np.zeros_like(z))
    close(to_theta, -(c * kernel).sum(axis=0) / window)

    c, (to_z, to_theta) = pullback(lambda z, t: jump(z, t, window, to_input), z, theta)
    through = np.asarray(theta) / window * kernel
    close(to_z, c * (above + (through if to_input else 0.0)))
    close(to_theta, -(c * through).sum(axis=0))


def test_rules_equal_finite_differences_of_the_smoothed_functions():
    """In float64: 1[z > t] smoothed by the kernel is a ramp, and z 1[z > t] = ReLU(z - t0) + t0 1[z > t] at t = t0."""
    window, h = 0.5, 1e-6
    with jax.enable_x64(True):
        theta = jnp.array([0.1, 0.4, 1.0], jnp.float64)
        z = jnp.asarray(np.random.default_rng(1).normal(size=(100, 3)), jnp.float64)

        def ramp(z, t):
            return np.clip((z - t) / window + 0.5, 0.0, 1.0)

        def smooth(z, t):
            return np.maximum(z - np.asarray(theta), 0.0) + np.asarray(theta) * ramp(z, t)

        a, t = np.asarray(z), np.asarray(theta)
        for function, definition in ((lambda z, t: step(z, t, window), ramp), (lambda z, t: jump(z, t, window, True), smooth)):
            c, (to_z, to_theta) = pullback(function, z, theta)
            assert to_theta.dtype == jnp.float64
            wanted = (np.asarray(c) * (definition(a, t + h) - definition(a, t - h)) / (2 * h)).sum(axis=0)
            np.testing.assert_allclose(to_theta, wanted, rtol=1e-6)
        wanted = np.asarray(c) * (smooth(a + h, t) - smooth(a - h, t)) / (2 * h)
        np.testing.assert_allclose(to_z, wanted, rtol=1e-6, atol=1e-9)


def test_rules_estimate_the_derivatives_of_the_expectations():
    """Over many standard normal z, what they say of E[1[z > t]] and E[z 1[z > t]] is what calculus says. Half a window would be half."""
    window, theta = 0.1, jnp.array([0.2, 0.7, 1.5])
    z = jnp.asarray(np.random.default_rng(0).normal(size=(400_000, 3)), jnp.float32)
    t = np.asarray(theta, np.float64)
    density = np.exp(-(t**2) / 2) / np.sqrt(2 * np.pi)
    tail = (np.asarray(z) > np.asarray(theta)).mean(axis=0)
    np.testing.assert_allclose(jax.grad(lambda t: step(z, t, window).mean(axis=0).sum())(theta), -density, rtol=0.03)
    np.testing.assert_allclose(jax.grad(lambda t: jump(z, t, window, False).mean(axis=0).sum())(theta), -t * density, rtol=0.03)
    shifted = jax.grad(lambda shift: jump(z + shift, theta, window, True).mean(axis=0).sum())(jnp.zeros(3))
    np.testing.assert_allclose(shifted, tail + t * density, rtol=0.03)


def test_both_halves_of_the_window_speak():
    """The published fault: a step of the value after the jump sees no z below theta (reference/sae_libraries.md 1, defect 6)."""
    spec = JumpReLU(1, 1, bandwidth=0.2, subtract=False)
    params = {"W_enc": jnp.ones((1, 1)), "W_dec": jnp.ones((1, 1)), "b_enc": jnp.zeros(1), "b_dec": jnp.zeros(1), "threshold": jnp.ones(1)}

    def slope(z):
        settings = LossSettings(sparsity=1.0)
        term = jax.grad(lambda p: spec.loss(p, jnp.full((1, 1), z), settings=settings)[0] - spec.loss(p, jnp.full((1, 1), z))[0])
        return float(term(params)["threshold"][0])

    for z, wanted in ((0.88, 0.0), (0.92, -5.0), (1.08, -5.0), (1.12, 0.0)):
        np.testing.assert_allclose(slope(z), wanted, rtol=1e-6, err_msg=str(z))


# --- losses


def plain_loss(spec, params, x, target, settings, c=4.0):
    """The losses by autodiff of surrogates that have the right values and slopes."""
    stop = jax.lax.stop_gradient
    if spec.row_norm == "layer_norm":
        x = (x - x.mean(axis=1, keepdims=True)) / (x.std(axis=1, keepdims=True, ddof=1) + 1e-5)
        target = x if target is None else target
    target = x if target is None else target
    shift = 0.0 if not (spec.input_bias or (spec.d_out is None and spec.subtract)) else params["b_in" if spec.input_bias else "b_dec"]
    z, theta, w = (x - shift) @ params["W_enc"].T + params["b_enc"], params["threshold"], spec.window
    on = stop((z > theta).astype(jnp.float32))
    kernel = stop((jnp.abs(z - theta) < w / 2).astype(jnp.float32)) / w
    moved = -(theta - stop(theta)) + ((z - stop(z)) if spec.penalty == "tanh" else 0.0)
    f = z * on + stop(theta) * kernel * moved
    y = f @ params["W_dec"] + params["b_dec"] + (x @ params["W_skip"].T if spec.skip else 0.0)
    norms = jnp.linalg.norm(params["W_dec"], axis=1)
    l0 = (on - kernel * (theta - stop(theta))).sum(axis=1).mean()
    entry = 1.0 if spec.row_norm != "none" else spec.out**-0.5
    penalty = {
        "step": l0,
        "target": (l0 / settings.target_l0 - 1) ** 2,
        "tanh": jnp.tanh(c * f * norms / entry).sum(axis=1).mean(),
    }[spec.penalty]
    terms = {"reconstruction": ((target - y) ** 2).sum(axis=1).mean(), "sparsity": settings.sparsity * penalty}
    if spec.penalty == "tanh":
        terms["preactivation"] = settings.preactivation * (jnp.maximum(theta - z, 0.0) * norms).sum(axis=1).mean()
    return sum(terms.values()), terms


@pytest.mark.some(5)
@pytest.mark.parametrize("penalty", ["step", "target", "tanh"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_gradient_equal_plain_autodiff(penalty, variant):
    spec = JumpReLU(D, N, penalty=penalty, bandwidth=0.2, **VARIANTS[variant])
    params, settings = random_params(spec), LossSettings(sparsity=0.7, preactivation=0.3, target_l0=4.0)
    target = TARGET if spec.transcoder else None
    (loss, parts), gradient = jax.jit(jax.value_and_grad(spec.loss, has_aux=True))(params, X, target, None, settings)
    (want, terms), want_gradient = jax.value_and_grad(lambda p: plain_loss(spec, p, X, target, settings), has_aux=True)(params)
    close(loss, want)
    close(parts.terms, terms)
    close(sum(parts.terms.values()), loss, rtol=1e-6)
    close(gradient, want_gradient, rtol=3e-4, atol=3e-5)
    assert float(jnp.abs(gradient["threshold"]).max()) > 1e-3
    assert float(parts.l0) == float((spec.encode(params, X).values != 0).sum(axis=1).mean())


@pytest.mark.parametrize("penalty", ["step", "target", "tanh"])
def test_what_the_penalty_moves(penalty):
    """L0 moves thresholds alone; tanh moves encoder, decoder and thresholds."""
    spec = JumpReLU(D, N, penalty=penalty, bandwidth=0.2)
    params, settings = random_params(spec), LossSettings(sparsity=1.0, target_l0=4.0)
    with_penalty = jax.grad(lambda p: spec.loss(p, X, settings=settings)[0])(params)
    without = jax.grad(lambda p: spec.loss(p, X, settings=LossSettings(target_l0=4.0))[0])(params)
    moved = {n for n in params if float(jnp.abs(with_penalty[n] - without[n]).max()) > 1e-4}
    assert moved == ({"W_enc", "W_dec", "b_enc", "b_dec", "threshold"} if penalty == "tanh" else {"threshold"})


def test_the_target_penalty_pushes_l0_from_both_sides():
    spec, params = JumpReLU(D, N, penalty="target", bandwidth=0.2), random_params(JumpReLU(D, N))
    l0 = float(spec.loss(params, X, settings=LossSettings(target_l0=1.0))[1].l0)

    def slope(target):
        def penalty(p, weight):
            return spec.loss(p, X, settings=LossSettings(sparsity=weight, target_l0=target))[0]

        return (jax.grad(penalty)(params, 1.0)["threshold"] - jax.grad(penalty)(params, 0.0)["threshold"]).sum()

    assert slope(l0 / 2) < -0.01 and slope(l0 * 2) > 0.01


@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if variant != "normalised"])  # there its 1e-5 has a scale
def test_fold_keeps_the_latents_and_unfold_undoes_it(variant):
    spec = JumpReLU(D, N, **VARIANTS[variant])
    params, scale, out_scale = random_params(spec), 7.3, 0.4 if spec.transcoder else None
    folded = spec.fold(params, scale, out_scale)
    before, after = spec.encode(params, X), spec.encode(folded, X * scale)
    np.testing.assert_array_equal(before.values != 0, after.values != 0)
    assert 0.1 < float((before.values != 0).mean()) < 0.9
    close(spec.reconstruct(folded, X * scale), spec.reconstruct(params, X) * (out_scale or scale), rtol=1e-4, atol=1e-4)
    close(spec.unfold(folded, scale, out_scale), params)


def test_training_and_inference_encode_the_same():
    spec, params = JumpReLU(D, N), random_params(JumpReLU(D, N))
    np.testing.assert_array_equal(spec.encode(params, X, train=True).values, spec.encode(params, X).values)


def test_a_threshold_below_zero_lets_nothing_negative_through():
    """Files of others may have one."""
    spec = JumpReLU(D, N)
    params = random_params(spec) | {"threshold": jnp.full(N, -1.0)}
    codes = spec.encode(params, X)
    assert float(codes.values.min()) == 0.0
    pre = (X - params["b_dec"]) @ params["W_enc"].T + params["b_enc"]
    close(codes.values, jnp.maximum(pre, 0.0))


# --- units, start, constraints


def test_the_window_is_in_units_of_the_data():
    """The same rows seen at norm 1 and, through ``unit_rms``, at norm sqrt(d): the same latents, the same penalty."""
    plain, normed = (JumpReLU(D, N, bandwidth=0.3, row_norm=norm) for norm in ("none", "unit_rms"))
    x = X / jnp.linalg.norm(X, axis=1, keepdims=True)
    params = random_params(plain)
    scaled = params | {name: params[name] * D**0.5 for name in ("b_enc", "b_dec", "threshold")}
    np.testing.assert_allclose(normed.window, plain.window * D**0.5)
    close(normed.encode(scaled, x).values, plain.encode(params, x).values * D**0.5)

    def penalty(spec, p):
        return jax.grad(lambda p: spec.loss(p, x, settings=LossSettings(sparsity=1.0))[0] - spec.loss(p, x)[0])(p)["threshold"]

    assert float(jnp.abs(penalty(plain, params)).max()) > 0.05
    close(penalty(normed, scaled) * D**0.5, penalty(plain, params), rtol=1e-4, atol=1e-4)


def test_published_windows_and_thresholds():
    """DeepMind at d = 2304 in rows of norm 1: window and threshold 1e-3; Anthropic in rows of norm sqrt(d): window 2, threshold .1."""
    np.testing.assert_allclose(JumpReLU(2304, 2).window, 1e-3, rtol=0.05)
    given = JumpReLU(64, 4, bandwidth=1e-3)
    np.testing.assert_allclose(given.window, 1e-3)
    np.testing.assert_allclose(given.init(jax.random.key(0))["threshold"], np.full(4, 1e-3, np.float32))
    tanh = JumpReLU(64, 4, penalty="tanh", row_norm="unit_rms")
    np.testing.assert_allclose(tanh.window, 2.0)
    np.testing.assert_allclose(tanh.init(jax.random.key(0))["threshold"], np.full(4, 0.1, np.float32))
    np.testing.assert_allclose(JumpReLU(64, 4, penalty="tanh").window, 2.0 / 8.0)


@pytest.mark.parametrize("bandwidth", [0.0, -1.0, 2.0, float("nan")])
def test_a_bandwidth_in_other_units_is_refused(bandwidth):
    with pytest.raises(UserError, match="JumpReLU: bandwidth = .* at most 1, the norm of a row") as error:
        JumpReLU(16, 32, bandwidth=bandwidth)
    assert "\n" not in str(error.value)


def test_rows_in_unknown_units_need_a_bandwidth_of_their_own():
    from dlmscope_jax.training import TrainSpec

    with pytest.raises(UserError, match="TrainSpec: normalize='none' leaves JumpReLU's window without a unit: use 'rms'"):
        TrainSpec(JumpReLU(4, 8), 10, normalize="none")
    TrainSpec(JumpReLU(4, 8, bandwidth=0.1), 10, normalize="none")
    TrainSpec(JumpReLU(4, 8, row_norm="unit_rms"), 10, normalize="none")


def test_other_refusals():
    with pytest.raises(UserError, match="penalty 'l1' is not known: step, target or tanh"):
        JumpReLU(4, 8, penalty="l1")
    with pytest.raises(UserError, match="needs a target_l0 above 0"):
        JumpReLU(D, N, penalty="target").loss(random_params(JumpReLU(D, N)), X)


def test_constrain():
    for penalty, unit in (("step", True), ("tanh", False)):
        spec = JumpReLU(D, N, penalty=penalty)
        params = random_params(spec) | {"threshold": draw(3, N)}
        held = spec.constrain(params)
        np.testing.assert_array_equal(held["threshold"], np.maximum(params["threshold"], 0.0))
        norms = np.linalg.norm(held["W_dec"], axis=1)
        assert np.allclose(norms, 1.0, atol=1e-5) == unit
        same = spec.project_gradient(params, params)["W_dec"]
        assert np.allclose(same, params["W_dec"]) != unit


# --- does it learn


@pytest.mark.standard_promotion
def test_l0_reaches_its_target_and_thresholds_move():
    """reference/sae_libraries.md 5, row 5: thresholds that hardly move. Here L0 goes from half of the width to what was asked for."""
    spec, truth = JumpReLU(toy.D, 64, penalty="target"), toy.directions()
    begin = toy.start(spec)
    assert float(spec.loss(begin, jnp.asarray(truth), settings=LossSettings(target_l0=2.0))[1].l0) > 15
    for target in (2.0, 4.0):
        params, l0, explained, alive = toy.fit(spec, LossSettings(sparsity=0.1, target_l0=target))
        assert abs(l0 - target) < 0.05 * target and explained > 0.95
        if target == toy.ACTIVE:
            assert toy.found(params, alive, truth) >= 0.9
            assert float(params["threshold"].mean()) > 10 * spec.window


@pytest.mark.standard_promotion
@pytest.mark.slow
@pytest.mark.parametrize("penalty, sparsity", [("step", 0.02), ("tanh", 0.03)])
def test_it_finds_the_features(penalty, sparsity):
    spec = JumpReLU(toy.D, 64, penalty=penalty)
    params, l0, explained, alive = toy.fit(spec, LossSettings(sparsity=sparsity, preactivation=1e-6))
    assert toy.found(params, alive, toy.directions()) >= 0.9
    assert abs(l0 - toy.ACTIVE) < 0.5 and explained > 0.9
