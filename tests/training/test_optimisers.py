"""Every optimiser's first steps against closed forms in float64, or against optax itself with the rate inside."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dlmscope_jax.dictionaries import TopK
from dlmscope_jax.training import TrainSpec, final_params, init_state, make_step
from dlmscope_jax.training.averaging import corrected, follow
from dlmscope_jax.training.optimisers import make_optimiser

from .conftest import small_spec, sparse_rows

RNG = np.random.default_rng(0)
PARAMS = {"W_enc": RNG.normal(size=(6, 4)), "W_dec": RNG.normal(size=(6, 4)), "b_enc": RNG.normal(size=6)}
PARAMS["W_dec_0"] = RNG.normal(size=(6, 2, 4))  # a cross-layer transcoder's
GRADIENTS = [{name: RNG.normal(size=value.shape) * 10.0 ** -(i + 1) for name, value in PARAMS.items()} for i in range(2)]
RATES = (0.01, 0.03)
EPS = 1e-6


def narrow(tree):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)


class Free:
    """A dictionary without constraints, or with one of its own."""

    unit_decoder = False

    def __init__(self, constrain=lambda params: params):
        self.constrain = self.bounded = constrain

    def project_gradient(self, params, gradients):
        return gradients


def two_steps(name, betas=(0.9, 0.99), constrain=lambda params: params):
    optimiser = make_optimiser(name, betas, EPS, Free(constrain))
    params = narrow(PARAMS)
    state = optimiser.init(params)
    for gradients, rate in zip(GRADIENTS, RATES, strict=True):
        params, state = optimiser.update(narrow(gradients), state, params, jnp.float32(rate), jnp.float32(1), jnp.bool_(True))
    return params, state, optimiser


def by_hand(direction):
    """Parameters after steps along ``direction(t, gradient, memory) -> update``, float64."""
    found = {}
    for name, value in PARAMS.items():
        value, memory = value.copy(), {}
        for t, (gradients, rate) in enumerate(zip(GRADIENTS, RATES, strict=True), 1):
            value -= rate * direction(t, gradients[name], memory)
        found[name] = value
    return found


def adam(t, g, m, b1=0.9, b2=0.99):
    m["mu"] = b1 * m.get("mu", 0) + (1 - b1) * g
    m["nu"] = b2 * m.get("nu", 0) + (1 - b2) * g**2
    return m["mu"] / (1 - b1**t) / (np.sqrt(m["nu"] / (1 - b2**t)) + EPS)


def nesterov_adam(t, g, m, b1=0.9, b2=0.99):
    adam(t, g, m, b1, b2)
    first = b1 * m["mu"] / (1 - b1 ** (t + 1)) + (1 - b1) * g / (1 - b1**t)
    return first / (np.sqrt(m["nu"] / (1 - b2**t)) + EPS)


def lion(t, g, m, b1=0.9, b2=0.99):
    update = np.sign(b1 * m.get("mu", 0) + (1 - b1) * g)
    m["mu"] = b2 * m.get("mu", 0) + (1 - b2) * g
    return update


def signum(t, g, m, b1=0.9):
    m["mu"] = b1 * m.get("mu", 0) + (1 - b1) * g
    return np.sign(m["mu"])


@pytest.mark.parametrize(("name", "direction", "tolerance"), [
    ("adam", adam, 1e-6), ("adam_bf16", adam, 2e-4), ("lion", lion, 1e-6), ("signum", signum, 1e-6),
])  # fmt: skip
def test_first_two_steps(name, direction, tolerance):
    params, _, _ = two_steps(name)
    for key, value in by_hand(direction).items():
        np.testing.assert_allclose(params[key], value, rtol=0, atol=tolerance, err_msg=key)


def test_muon_turns_matrices_and_leaves_vectors_to_adam():
    params, _, _ = two_steps("muon")
    np.testing.assert_allclose(params["b_enc"], by_hand(nesterov_adam)["b_enc"], atol=1e-6)
    transform = optax.contrib.muon(lambda count: jnp.asarray(RATES)[count], adam_b1=0.9, adam_b2=0.99, eps=EPS, consistent_rms=0.2)
    direct = narrow(PARAMS)
    state = transform.init(direct)
    with jax.default_matmul_precision("highest"):
        for gradients in GRADIENTS:
            updates, state = transform.update(narrow(gradients), state, direct)
            direct = optax.apply_updates(direct, updates)
    for key, value in direct.items():
        np.testing.assert_allclose(params[key], value, atol=1e-6, err_msg=key)
    moved = np.asarray(params["W_enc"]) - PARAMS["W_enc"]
    singular = np.linalg.svd(moved, compute_uv=False)
    assert singular.max() / singular.min() < 3  # all directions move about equally far; the gradients' own ratio is larger
    assert np.linalg.svd(GRADIENTS[0]["W_enc"], compute_uv=False)[[0, -1]] @ [1, -3] > 0


def test_schedule_free_is_an_average_of_steps():
    """z_t = z_(t-1) - rate * g / (sqrt(nu / (1 - b2^t)) + eps), x_t a mean of z weighted by rate^2, gradients at b1 x + (1 - b1) z."""
    b1, b2 = 0.9, 0.99
    params, state, optimiser = two_steps("schedule_free", (b1, b2))
    for key, value in PARAMS.items():
        z, x, nu, weights, largest = value.copy(), value.copy(), 0.0, 0.0, 0.0
        for t, (gradients, rate) in enumerate(zip(GRADIENTS, RATES, strict=True), 1):
            g = gradients[key]
            nu = b2 * nu + (1 - b2) * g**2
            z = z - rate * g / (np.sqrt(nu / (1 - b2**t)) + EPS)
            largest = max(largest, rate)
            weights += largest**2
            x = x + (z - x) * largest**2 / weights
        np.testing.assert_allclose(state.z[key], z, atol=2e-6)
        np.testing.assert_allclose(params[key], b1 * x + (1 - b1) * z, atol=2e-6)
        np.testing.assert_allclose(optimiser.weights(state, params)[key], x, atol=2e-6)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("adam_bf16", "lion", "signum", "schedule_free")]


@pytest.mark.parametrize("name", ["adam", "muon", *SLOW])
def test_all_of_them_learn_and_hold_the_decoder(name):
    rows, _ = sparse_rows(4_000)
    fields = {"steps": 80, "batch_size": 256, "lr": 2e-3, "warmup_steps": 4, "schedule": "constant", "dead_rows": 2_000}
    spec = TrainSpec(TopK(16, 64, 4), optimizer=name, **fields)
    step, state = make_step(spec), init_state(spec, sample=rows[:512])
    losses = []
    for i in range(80):
        state, metrics = step(state, rows[np.random.default_rng(i).integers(4_000, size=256)])
        losses.append(float(metrics["reconstruction"][0]))
    assert np.mean(losses[-5:]) < 0.6 * losses[0]
    final = final_params(spec, state)
    np.testing.assert_allclose(np.linalg.norm(final["W_dec"], axis=1), 1, atol=1e-5)
    _, parts = spec.dictionary.loss(final, rows / state.input_scale)
    assert float(parts.terms["reconstruction"]) < 0.6 * losses[0]
    if name == "adam_bf16":
        assert {leaf.dtype for leaf in jax.tree.leaves((state.opt_state.mu, state.opt_state.nu))} == {jnp.dtype("bfloat16")}
        assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}


def test_bfloat16_moments_fall_again():
    """Rounded to nearest, a second moment with beta 0.999 would stand still for ever."""
    optimiser = make_optimiser("adam_bf16", (0.9, 0.999), 1e-8, Free())
    params, scalars = {"w": jnp.zeros(64)}, (jnp.float32(1e-3), jnp.float32(1), jnp.bool_(True))
    state = optimiser.init(params)._replace(nu={"w": jnp.full(64, 1.1, jnp.bfloat16)})
    update = jax.jit(lambda state: optimiser.update({"w": jnp.zeros(64)}, state, params, *scalars)[1])
    for _ in range(1_000):
        state = update(state)
    np.testing.assert_allclose(np.asarray(state.nu["w"], np.float64), float(jnp.bfloat16(1.1)) * 0.999**1_000, rtol=0.05)
    assert float(jnp.bfloat16(0.999 * float(jnp.bfloat16(1.1)))) == float(jnp.bfloat16(1.1))  # what nearest would do


@pytest.mark.some(3)
@pytest.mark.parametrize("name", ["adam", "adam_bf16", "lion", "signum", "muon", "schedule_free"])
def test_a_batch_that_is_not_kept_changes_nothing(name):
    spec = small_spec().dictionary
    params = spec.init(jax.random.key(0))
    optimiser = make_optimiser(name, (0.9, 0.99), EPS, spec)
    state = optimiser.init(params)
    scalars = jnp.float32(0.1), jnp.float32(1.0)
    gradients = jax.tree.map(lambda p: jnp.cos(jnp.arange(p.size, dtype=jnp.float32)).reshape(p.shape), params)
    params, state = optimiser.update(gradients, state, params, *scalars, jnp.bool_(True))
    spoilt = jax.tree.map(lambda g: g * jnp.nan, gradients)
    chex.assert_trees_all_equal(optimiser.update(spoilt, state, params, *scalars, jnp.bool_(False)), (params, state))
    moved, _ = optimiser.update(gradients, state, params, *scalars, jnp.bool_(True))
    assert all((moved[key] != params[key]).any() for key in params)


def test_average_of_the_weights():
    decay, average = 0.8, {"w": jnp.zeros(3)}
    series = np.random.default_rng(0).normal(size=(5, 3))
    np.testing.assert_array_equal(corrected(average, {"w": jnp.ones(3)}, jnp.float32(decay), jnp.int32(0))["w"], 1)
    for weights in series:
        average = follow(average, {"w": jnp.asarray(weights, jnp.float32)}, jnp.float32(decay))
    share = decay ** np.arange(5)[::-1]
    found = corrected(average, {"w": jnp.ones(3)}, jnp.float32(decay), jnp.int32(5))["w"]
    np.testing.assert_allclose(found, share @ series / share.sum(), rtol=1e-5)


def test_the_average_is_what_a_training_ends_with():
    spec = small_spec(ema=0.7)
    rows, _ = sparse_rows(64 * 6)
    step, state = make_step(spec), init_state(spec, sample=rows)
    series = []
    for i in range(6):
        batch = rows[64 * i : 64 * (i + 1)].copy()
        batch[0, 0] = np.nan if i == 2 else batch[0, 0]
        state, _ = step(state, batch)
        if i != 2:  # a bad batch is no update
            series.append(jax.device_get(state.params))
    share = 0.7 ** np.arange(5)[::-1]
    mean = {name: sum(s * p[name].astype(np.float64) for s, p in zip(share, series, strict=True)) / share.sum() for name in series[0]}
    mean["W_dec"] /= np.linalg.norm(mean["W_dec"], axis=1, keepdims=True)
    final = final_params(spec, state)
    for name, value in mean.items():
        np.testing.assert_allclose(final[name], value, atol=1e-6, err_msg=name)
    assert np.abs(final["W_enc"] - state.params["W_enc"]).max() > 1e-3
