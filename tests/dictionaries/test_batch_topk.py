"""BatchTopK dictionaries against the definition: numpy's selection, plain autodiff on dense arrays, a training run."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dlmscope_jax.dictionaries import BatchTopK, Dense, FlatSparse, LossSettings
from dlmscope_jax.errors import UserError
from dlmscope_jax.kernels.topk import batch

D, N, K, B = 6, 20, 2, 11  # N / k is 10: the products gather; tests/dictionaries/test_matryoshka.py has the dense ones
SPEC = BatchTopK(D, N, K, k_aux=4)
VARIANTS = {
    "autoencoder": SPEC,
    "not subtracted": dataclasses.replace(SPEC, subtract=False),
    "transcoder": dataclasses.replace(SPEC, d_out=4),
    "skip": dataclasses.replace(SPEC, d_out=4, skip=True),
    "input bias": dataclasses.replace(SPEC, d_out=4, input_bias=True),
}


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def random_params(spec, seed=0):
    params = {name: draw(seed + i, *shape) for i, (name, shape) in enumerate(sorted(spec.shapes().items()))}
    return params | {"threshold": jnp.float32(1.7)}


PARAMS, X, TARGET = random_params(SPEC), draw(9, B, D), draw(8, B, 4)


def close(got, want, rtol=3e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=4e-6), got, want)


def kept(pre, count):
    """Which entries of [B, N] are among the ``count`` largest of all, by a stable sort: of equal ones the first row, then latent."""
    order = jnp.argsort(-jax.lax.stop_gradient(pre).reshape(-1), stable=True)[:count]
    return jnp.zeros(pre.size).at[order].set(1.0).reshape(pre.shape)


def preactivations(spec, params, x):
    name = spec._shift_name()
    return (x if name is None else x - params[name]) @ params["W_enc"].T + params["b_enc"]


def dense_loss(spec, params, x, target, dead=None, alpha=0.0, k=None):
    """The loss with every latent written out; AuxK as METHODS.md defines it."""
    pre = preactivations(spec, params, x)
    code = jnp.maximum(pre, 0.0) * kept(pre, (spec.k if k is None else k) * len(x))
    error = target - code @ params["W_dec"] - params["b_dec"] - (x @ params["W_skip"].T if spec.skip else 0.0)
    loss = (error**2).sum(axis=1).mean()
    return loss if dead is None else loss + alpha * auxiliary(spec, params, x, error, dead)


def auxiliary(spec, params, x, error, dead):
    residual, pre, n_dead = jax.lax.stop_gradient(error), preactivations(spec, params, x), int(dead.sum())
    if n_dead == 0:
        return 0.0
    chosen = jax.lax.top_k(jnp.where(dead, pre, -jnp.inf), min(spec.k_aux, n_dead))[1]
    estimate = (pre * jax.nn.one_hot(chosen, spec.width).sum(axis=1)) @ params["W_dec"]
    return min(1.0, n_dead / spec.k_aux) * ((residual - estimate) ** 2).sum() / ((residual - residual.mean(axis=0)) ** 2).sum()


def pair(spec):
    return (X, X) if spec.d_out is None else (X, TARGET)


@pytest.mark.parametrize("spec", VARIANTS.values(), ids=VARIANTS)
def test_encoding_a_batch_equals_the_definition(spec):
    params = random_params(spec)
    codes = spec.encode(params, X, train=True)
    pre = np.asarray(preactivations(spec, params, X))
    mask = np.zeros(pre.size, bool)
    mask[np.argsort(-pre.reshape(-1), kind="stable")[: K * B]] = True
    want = np.maximum(pre, 0) * mask.reshape(pre.shape)
    assert isinstance(codes, FlatSparse) and codes.values.shape == (K * B,)
    close(spec.dense(codes), want)
    np.testing.assert_array_equal(codes.count(), (want > 0).sum(axis=1))
    assert len(set(np.asarray(codes.count()).tolist())) > 1  # k is an average, not a number of every row


def test_ties_go_to_the_lowest_position_of_the_batch():
    params = PARAMS | {"W_enc": jnp.zeros((N, D)), "b_enc": jnp.ones(N)}
    codes = SPEC.encode(params, X, train=True)
    np.testing.assert_array_equal(codes.rows * N + codes.latents, np.arange(K * B))


def test_negative_preactivations_are_cut_after_the_selection():
    """With 5 positive entries of 22 kept ones, 17 negative ones are kept and cut."""
    pre = preactivations(SPEC, PARAMS, X)
    fifth = jnp.sort(pre.reshape(-1))[-6]
    params = PARAMS | {"b_enc": PARAMS["b_enc"] - fifth - 1e-4}
    codes = SPEC.encode(params, X, train=True)
    assert int(codes.count().sum()) == 5 and float(codes.values.min()) == 0.0
    loss, parts = SPEC.loss(params, X)
    close(loss, dense_loss(SPEC, params, X, X))
    close(parts.l0, 5 / B)


def test_leading_axes():
    x = X[:10].reshape(2, 5, D)
    for train in (False, True):
        codes = SPEC.encode(PARAMS, x, train=train)
        assert codes.count().shape == (2, 5) and SPEC.dense(codes).shape == (2, 5, N)
        close(SPEC.dense(codes).reshape(10, N), SPEC.dense(SPEC.encode(PARAMS, X[:10], train=train)))


def test_afterwards_the_threshold_decides_strictly():
    positive = SPEC.encode(PARAMS | {"threshold": jnp.float32(0)}, X).values
    close(positive, jnp.maximum(preactivations(SPEC, PARAMS, X), 0.0))
    theta = jnp.sort(positive.reshape(-1))[-30]
    codes = SPEC.encode(PARAMS | {"threshold": theta}, X)
    assert isinstance(codes, Dense)
    np.testing.assert_array_equal(codes.values, jnp.where(positive > theta, positive, 0.0))
    assert int(codes.count().sum()) == 29  # the entry that equals the threshold is not active


@pytest.mark.some(6)
@pytest.mark.parametrize("n_dead", [None, pytest.param(0, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow), 9])
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
    assert ("aux" in parts.terms) == (dead is not None)
    assert float(gradient["threshold"]) == 0.0


def test_gradient_agrees_with_finite_differences():
    params = {name: np.asarray(value, np.float64) for name, value in PARAMS.items()}
    direction = {name: np.asarray(draw(40, *value.shape), np.float64) for name, value in params.items()}
    gradient = jax.grad(lambda p: SPEC.loss(p, X)[0])(PARAMS)
    slope = sum(float((np.asarray(gradient[n], np.float64) * direction[n]).sum()) for n in params)
    mask = np.asarray(kept(preactivations(SPEC, PARAMS, X), K * B))

    def at(step):  # numpy float64, the selection held where it is
        p = {n: params[n] + step * direction[n] for n in params}
        x = np.asarray(X, np.float64)
        code = np.maximum((x - p["b_dec"]) @ p["W_enc"].T + p["b_enc"], 0) * mask
        return ((x - code @ p["W_dec"] - p["b_dec"]) ** 2).sum() / B

    np.testing.assert_allclose(slope, (at(1e-5) - at(-1e-5)) / 2e-5, rtol=1e-4)


def test_auxk_reaches_encoders_that_are_negative_on_the_whole_batch():
    dead = jnp.zeros(N, bool).at[jnp.array([3, 8])].set(True)
    params = PARAMS | {"b_enc": PARAMS["b_enc"].at[jnp.array([3, 8])].set(-50.0)}
    with_aux, without = (jax.grad(lambda p, a=a: SPEC.loss(p, X, dead=dead, settings=LossSettings(aux=a))[0])(params) for a in (1.0, 0.0))
    live = jnp.ones(N, bool).at[jnp.array([3, 8])].set(False)
    for name in ("W_enc", "b_enc", "W_dec"):
        assert float(jnp.abs(with_aux[name][jnp.array([3, 8])]).max()) > 1e-3, name
        assert float(jnp.abs(without[name][jnp.array([3, 8])]).max()) == 0.0, name
        np.testing.assert_array_equal(with_aux[name][live], without[name][live])  # its target is held constant


@pytest.mark.parametrize("fewer", [1, 2])
def test_a_smaller_k_now_is_that_dictionary_exactly(fewer):
    small = dataclasses.replace(SPEC, k=fewer)
    (loss, parts), gradient = jax.value_and_grad(SPEC.loss, has_aux=True)(PARAMS, X, settings=LossSettings(k=jnp.int32(fewer)))
    (want, want_parts), want_gradient = jax.value_and_grad(small.loss, has_aux=True)(PARAMS, X)
    close(loss, want, rtol=1e-6)
    close(gradient, want_gradient, rtol=1e-5)
    np.testing.assert_array_equal(parts.fired, want_parts.fired)
    np.testing.assert_array_equal(parts.l0, want_parts.l0)
    np.testing.assert_array_equal(parts.statistics["threshold"], want_parts.statistics["threshold"])


def test_another_k_compiles_nothing():
    run = jax.jit(lambda k: SPEC.loss(PARAMS, X, settings=LossSettings(k=k))[0])
    assert float(run(jnp.int32(1))) != float(run(jnp.int32(2)))
    assert run._cache_size() == 1


def test_the_threshold_of_a_batch_is_its_least_positive_activation():
    _, parts = SPEC.loss(PARAMS, X)
    pre = preactivations(SPEC, PARAMS, X)
    close(parts.statistics["threshold"], jnp.sort(pre.reshape(-1))[-K * B])
    _, parts = SPEC.loss(PARAMS | {"b_enc": jnp.full(N, -100.0)}, X)
    assert float(parts.statistics["threshold"]) == 0.0


def test_the_running_threshold():
    def update(running, of_batch):
        params = PARAMS | {"threshold": jnp.float32(running)}
        moved = SPEC.update_statistics(params, {"threshold": jnp.float32(of_batch)})
        assert all(moved[name] is params[name] for name in params if name != "threshold")
        return float(moved["threshold"])

    assert update(0.0, 0.5) == 0.5  # the first batch sets it
    np.testing.assert_allclose(update(2.0, 1.0), 1.99, rtol=1e-6)
    assert update(2.0, 0.0) == 2.0 and update(0.0, 0.0) == 0.0  # nothing was positive
    assert SPEC.STATISTICS == ("threshold",)


@pytest.mark.standard_promotion
def test_after_training_the_threshold_gives_about_k_latents_a_row():
    d, n, k = 16, 48, 4
    spec, tx = BatchTopK(d, n, k), optax.adam(3e-3)
    truth = jax.random.normal(jax.random.key(5), (n, d)) / 4.0

    def rows(key, size):
        return jax.random.bernoulli(key, 0.08, (size, n)).astype(jnp.float32) @ truth

    def step(carry, key):
        params, moments = carry
        (_, parts), g = jax.value_and_grad(spec.loss, has_aux=True)(params, rows(key, 128))
        update, moments = tx.update(spec.project_gradient(params, g), moments, params)
        params = spec.constrain(optax.apply_updates(params, update))
        return (spec.update_statistics(params, parts.statistics), moments), parts.terms["reconstruction"]

    params = spec.init(jax.random.key(0))
    assert {name: value.shape for name, value in params.items()} == spec.shapes()
    assert float(params["threshold"]) == 0.0
    start = (params, tx.init(params))
    (params, _), errors = jax.jit(lambda s: jax.lax.scan(step, s, jax.random.split(jax.random.key(1), 600)))(start)
    assert float(errors[-50:].mean()) < 0.5 * float(errors[:20].mean())
    counts = np.asarray(spec.encode(params, rows(jax.random.key(2), 4000)).count())
    assert abs(counts.mean() - k) < 0.05 * k and counts.std() > 0.5


@pytest.mark.parametrize("spec", VARIANTS.values(), ids=VARIANTS)
def test_fold_acts_on_raw_rows(spec):
    params, scale, out_scale = random_params(spec), 7.3, None if spec.d_out is None else 0.4
    folded = spec.fold(params, scale, out_scale)
    close(folded["threshold"], params["threshold"] * (out_scale or scale))
    close(spec.reconstruct(folded, X * scale), spec.reconstruct(params, X) * (out_scale or scale), rtol=2e-4)
    np.testing.assert_array_equal(spec.encode(folded, X * scale).values > 0, spec.encode(params, X).values > 0)
    close(spec.unfold(folded, scale, out_scale), params)


def test_nothing_of_all_rows_and_latents_but_the_preactivations():
    """One [B, N] product forward (none backward), and AuxK computes its own in a branch that runs where more than k_aux are dead."""
    b, n = 64, 512
    spec = BatchTopK(D, n, 4, k_aux=4)
    params, x = random_params(spec), draw(1, b, D)
    run = jax.jit(jax.value_and_grad(lambda p, dead: spec.loss(p, x, dead=dead), has_aux=True))
    lowered = run.lower(params, jnp.zeros(n, bool))  # for this platform: a jaxpr holds what others would run as well
    lines = lowered.as_text(dialect="hlo").splitlines()
    products = [line for line in lines if " dot(" in line and f"= f32[{b},{n}]" in line]
    assert 1 <= len(products) <= 3  # the encoder, and the branch of AuxK, forward and again in the backward pass
    assert not [line for line in lines if f"[{b},{n},{D}]" in line or f"f32[{b * 4},{n}]" in line]
    held = lowered.compile().memory_analysis().temp_size_in_bytes
    assert held < 6 * b * n * 4, held
    large = 4 * batch._FEW
    assert b * n < large  # at this size everything is done at once; tests/kernels/test_topk_batch.py measures the other path


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"k": 21}, "k = 21 is more than the 20 latents"),
        ({"k": 0}, "k = 0 must be a positive integer"),
        ({"k": 3, "k_aux": 21}, "k_aux = 21"),
        ({"k": 3, "skip": True}, "give d_out"),
    ],
)
def test_mistakes_in_the_description(arguments, says):
    with pytest.raises(UserError, match=says):
        BatchTopK(D, N, **arguments)


def test_a_transcoder_needs_a_target():
    with pytest.raises(UserError, match="give target"):
        VARIANTS["skip"].loss(random_params(VARIANTS["skip"]), X)
