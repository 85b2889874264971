"""ReLU dictionaries against closed forms written with plain autodiff; ghost gradients against the published equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlmscope_jax.dictionaries import LossSettings, ReLU
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
RECIPES = {
    "plain": {},
    "norm weighted": {"norm_weighted": True},
    "over norm": {"error": "over_norm"},
    "ghost": {"ghost": True},
    "ghost, over norm": {"ghost": True, "error": "over_norm"},
}
SETTINGS = LossSettings(sparsity=0.3, aux=0.5)
DEAD = np.isin(np.arange(N), (2, 3, 11))


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def random_params(spec, seed=0):
    """Weights, and biases that keep the ``DEAD`` latents off in every row."""
    params = {name: 0.5 * draw(seed + i, *shape) for i, (name, shape) in enumerate(sorted(spec.shapes().items()))}
    return params | {"b_enc": jnp.where(DEAD, -6.0, params["b_enc"])}


def close(got, want, rtol=3e-5, atol=3e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), got, want)


X, TARGET = draw(90, B, D), draw(91, B, OUT)


def forward(spec, params, x, target):
    """Pre-activations, activations, output and target by the definition."""
    if spec.row_norm == "layer_norm":
        x = (x - x.mean(axis=1, keepdims=True)) / (x.std(axis=1, keepdims=True, ddof=1) + 1e-5)
    target = x if target is None else target
    shift = 0.0 if not (spec.input_bias or (spec.d_out is None and spec.subtract)) else params["b_in" if spec.input_bias else "b_dec"]
    pre = (x - shift) @ params["W_enc"].T + params["b_enc"]
    f = jnp.maximum(pre, 0.0)
    return pre, f, f @ params["W_dec"] + params["b_dec"] + (x @ params["W_skip"].T if spec.skip else 0.0), target


def plain_loss(spec, params, x, target, dead, settings, wrong_residual=False):
    """reference/transcoders.md 1.2, entry by entry."""
    stop = jax.lax.stop_gradient
    pre, f, y, target = forward(spec, params, x, target)
    length = jnp.linalg.norm(target, axis=1, keepdims=True)

    def reduce(squares):
        return squares.sum(axis=1).mean() if spec.error == "squared" else (squares / length).mean()

    weight = jnp.linalg.norm(params["W_dec"], axis=1) if spec.norm_weighted else 1.0
    terms = {"reconstruction": reduce((target - y) ** 2), "sparsity": settings.sparsity * (f * weight).sum(axis=1).mean()}
    if spec.ghost and dead is not None:
        r = stop((x if wrong_residual else target) - y)
        ids = np.flatnonzero(dead)
        entry = 1.0 if spec.row_norm != "none" else spec.d_in**-0.5
        ghost = jnp.exp(pre[:, ids] / entry) @ params["W_dec"][ids]
        r_norm, g_norm = (jnp.linalg.norm(a, axis=1, keepdims=True) for a in (r, ghost))
        ghost = ghost * stop(r_norm / (1e-6 + 2 * g_norm))
        error = (ghost - r) ** 2 / r_norm
        terms["ghost"] = settings.aux * reduce(stop(r**2 / (error + 1e-6)) * error)
    return sum(terms.values()), terms


@pytest.mark.some(4)
@pytest.mark.parametrize(
    "recipe, variant",
    [(recipe, variant) for recipe in RECIPES for variant in VARIANTS if variant in ("autoencoder", "skip transcoder") or "," in recipe],
)
def test_loss_and_gradient_equal_plain_autodiff(recipe, variant):
    spec = ReLU(D, N, **RECIPES[recipe], **VARIANTS[variant])
    params, target = random_params(spec), TARGET if spec.transcoder else None
    (loss, parts), gradient = jax.jit(jax.value_and_grad(spec.loss, has_aux=True))(params, X, target, jnp.asarray(DEAD), SETTINGS)
    (want, terms), want_gradient = jax.value_and_grad(lambda p: plain_loss(spec, p, X, target, DEAD, SETTINGS), has_aux=True)(params)
    close(parts.terms, terms, rtol=1e-4)
    close(loss, want)
    close(sum(parts.terms.values()), loss, rtol=1e-6)
    close(gradient, want_gradient, rtol=1e-3, atol=3e-5)
    np.testing.assert_allclose(parts.l0, (forward(spec, params, X, target)[1] > 0).sum(axis=1).mean(), rtol=1e-6)
    assert not np.asarray(parts.fired)[DEAD].any()


@pytest.mark.parametrize("error", ["squared", "over_norm"])
def test_gradient_agrees_with_finite_differences(error):
    """Numpy, float64, along a random direction; all that the ghost term holds constant is held at the start."""
    spec = ReLU(D, N, d_out=OUT, skip=True, error=error, norm_weighted=True, ghost=True)
    params32 = random_params(spec)
    params = {name: np.asarray(value, np.float64) for name, value in params32.items()}
    direction = {name: np.asarray(draw(40 + i, *value.shape), np.float64) for i, (name, value) in enumerate(params.items())}
    gradient = jax.grad(lambda p: spec.loss(p, X, TARGET, jnp.asarray(DEAD), SETTINGS)[0])(params32)
    slope = sum(float((np.asarray(gradient[n], np.float64) * direction[n]).sum()) for n in params)
    x, target, entry = np.asarray(X, np.float64), np.asarray(TARGET, np.float64), D**-0.5
    length = np.linalg.norm(target, axis=1, keepdims=True)

    def state(h):
        p = {n: params[n] + h * direction[n] for n in params}
        pre = x @ p["W_enc"].T + p["b_enc"]
        f = np.maximum(pre, 0)
        y = f @ p["W_dec"] + p["b_dec"] + x @ p["W_skip"].T
        return f * np.linalg.norm(p["W_dec"], axis=1), target - y, np.exp(pre[:, DEAD] / entry) @ p["W_dec"][DEAD]

    _, r, ghost = state(0.0)
    r_norm = np.linalg.norm(r, axis=1, keepdims=True)
    half = r_norm / (1e-6 + 2 * np.linalg.norm(ghost, axis=1, keepdims=True))
    rescale = r**2 / ((half * ghost - r) ** 2 / r_norm + 1e-6)

    def reduce(squares):
        return squares.sum(axis=1).mean() if error == "squared" else (squares / length).mean()

    def at(h):
        weighed, residual, ghost = state(h)
        return reduce(residual**2) + 0.3 * weighed.sum(axis=1).mean() + 0.5 * reduce(rescale * (half * ghost - r) ** 2 / r_norm)

    np.testing.assert_allclose(slope, (at(1e-6) - at(-1e-6)) / 2e-6, rtol=2e-4)


# --- ghost gradients


def test_the_ghost_residual_is_the_targets_not_the_inputs():
    """Where the widths of a transcoder are equal, the published code subtracts the output from the *input*: nothing fails."""
    spec = ReLU(D, N, d_out=D, ghost=True)
    params, target = random_params(spec), draw(92, B, D)
    got = jax.grad(lambda p: spec.loss(p, X, target, jnp.asarray(DEAD), SETTINGS)[0])(params)["W_dec"][DEAD]
    right, wrong = (
        jax.grad(lambda p: plain_loss(spec, p, X, target, DEAD, SETTINGS, wrong)[0])(params)["W_dec"][DEAD] for wrong in (False, True)  # noqa: B023
    )
    close(got, right, rtol=1e-3)
    assert float(jnp.abs(right - wrong).max()) > 0.1 * float(jnp.abs(right).max())


def test_a_step_along_the_ghost_gradient_brings_the_dead_nearer_to_the_residual():
    spec = ReLU(D, N, d_out=OUT, ghost=True)
    params = random_params(spec)

    def away(p):  # 1 - cosine of the dead latents' sum with the residual, over rows
        pre, _, y, target = forward(spec, params, X, TARGET)
        pre = X @ p["W_enc"].T + p["b_enc"]
        g, r = jnp.exp(pre[:, DEAD] * D**0.5) @ p["W_dec"][DEAD], target - y
        return 1 - ((g * r).sum(axis=1) / jnp.linalg.norm(g, axis=1) / jnp.linalg.norm(r, axis=1)).mean()

    on, off = (jax.grad(lambda p: spec.loss(p, X, TARGET, jnp.asarray(DEAD), LossSettings(aux=aux))[0])(params) for aux in (1.0, 0.0))  # noqa: B023
    ghost = jax.tree.map(jnp.subtract, on, off)
    size = float(jnp.sqrt(sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(ghost))))
    stepped = jax.tree.map(lambda p, g: p - 0.05 * g / size, params, ghost)
    assert float(away(stepped)) < float(away(params)) - 1e-3


def test_ghost_gradients_reach_dead_latents_and_leave_the_living_alone():
    spec = ReLU(D, N, d_out=OUT, ghost=True, skip=True, input_bias=True)
    params = random_params(spec)
    on, off = (jax.grad(lambda p: spec.loss(p, X, TARGET, dead, SETTINGS)[0])(params) for dead in (jnp.asarray(DEAD), None))  # noqa: B023
    for name in ("W_enc", "b_enc", "W_dec"):
        assert float(jnp.abs(off[name][DEAD]).max()) == 0.0
        assert all(float(jnp.abs(on[name][i]).max()) > 1e-4 for i in np.flatnonzero(DEAD)), name
        close(on[name][~DEAD], off[name][~DEAD], rtol=1e-6, atol=1e-7)
    for name in ("b_dec", "W_skip"):  # neither the residual nor any scale passes a gradient on
        close(on[name], off[name], rtol=1e-6, atol=1e-7)
    assert float(jnp.abs(on["b_in"] - off["b_in"]).max()) > 1e-4  # what the encoder subtracts moves the dead pre-activations


@pytest.mark.parametrize("case", ["none dead", "perfect reconstruction", "far below zero", "far above zero", "all dead"])
def test_ghost_gradients_are_finite(case):
    spec, dead = ReLU(D, N, ghost=True), np.full(N, case != "none dead")
    params, x = random_params(spec), X
    if case == "perfect reconstruction":
        spec = ReLU(D, D, ghost=True)
        params = {"W_enc": jnp.eye(D), "W_dec": jnp.eye(D), "b_enc": jnp.zeros(D), "b_dec": jnp.zeros(D)}
        x, dead = jnp.abs(X), np.ones(D, bool)
    if case.startswith("far"):
        params |= {"b_enc": jnp.full(N, 1e4 if "above" in case else -1e4)}
    (loss, parts), gradient = jax.jit(jax.value_and_grad(spec.loss, has_aux=True))(params, x, None, jnp.asarray(dead), SETTINGS)
    assert bool(jnp.isfinite(loss)) and all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(gradient))
    if case in ("none dead", "perfect reconstruction"):
        assert float(parts.terms["ghost"]) == 0.0
    if case == "none dead":
        off = jax.grad(lambda p: spec.loss(p, x, settings=SETTINGS)[0])(params)
        close(gradient, off, rtol=1e-6, atol=1e-7)


def test_the_ghost_term_is_as_large_as_the_error():
    spec = ReLU(D, N, ghost=True)
    parts = spec.loss(random_params(spec), X, dead=jnp.asarray(DEAD), settings=SETTINGS)[1]
    np.testing.assert_allclose(parts.measured["ghost"], parts.terms["reconstruction"], rtol=1e-3)


@pytest.mark.standard_promotion
def test_ghost_gradients_revive_killed_latents():
    """Half of the latents, killed by their bias, of a transcoder: they fire again with ghost gradients and stay dead without."""
    spec, out = ReLU(toy.D, 64, d_out=16, ghost=True), toy.directions(5, 16)
    killed = np.arange(64) < 32
    params = toy.start(spec, out)
    params |= {"b_enc": jnp.where(killed, params["b_enc"] - 2.0, params["b_enc"])}
    alive = {
        aux: toy.fit(spec, LossSettings(sparsity=0.05, aux=aux), steps=1000, dead_after=20, out=out, params=params)[3][killed].mean()
        for aux in (0.0, 1.0)
    }
    assert alive[0.0] < 0.1 and alive[1.0] >= 0.8


# --- the rest


@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if variant != "normalised"])  # there its 1e-5 has a scale
def test_fold_keeps_the_latents_and_unfold_undoes_it(variant):
    spec = ReLU(D, N, **VARIANTS[variant])
    params, scale, out_scale = random_params(spec), 7.3, 0.4 if spec.transcoder else None
    folded = spec.fold(params, scale, out_scale)
    before, after = spec.encode(params, X), spec.encode(folded, X * scale)
    close(after.values, before.values * (out_scale or scale), rtol=1e-4, atol=1e-4)
    close(spec.reconstruct(folded, X * scale), spec.reconstruct(params, X) * (out_scale or scale), rtol=1e-4, atol=1e-4)
    close(spec.unfold(folded, scale, out_scale), params)


def test_training_and_inference_encode_the_same():
    spec, params = ReLU(D, N), random_params(ReLU(D, N))
    codes = spec.encode(params, X)
    np.testing.assert_array_equal(spec.encode(params, X, train=True).values, codes.values)
    close(codes.values, forward(spec, params, X, None)[1])


def test_decoder_norms_are_free_where_the_penalty_weighs_them():
    params = random_params(ReLU(D, N))
    for weighted in (False, True):
        held = ReLU(D, N, norm_weighted=weighted).constrain(params)["W_dec"]
        assert np.array_equal(held, params["W_dec"]) == weighted
        assert np.allclose(np.linalg.norm(held, axis=1), 1.0, atol=1e-5) != weighted


def test_the_weighted_loss_does_not_see_how_a_latent_splits_its_scale():
    """Encoder times c, decoder row over c: the same function and, weighted, the same loss; unweighted, another."""
    c = jnp.exp(draw(7, N))
    for weighted in (False, True):
        spec = ReLU(D, N, norm_weighted=weighted)
        params = random_params(spec)
        other = params | {"W_enc": params["W_enc"] * c[:, None], "b_enc": params["b_enc"] * c, "W_dec": params["W_dec"] / c[:, None]}
        one, two = (float(spec.loss(p, X, settings=SETTINGS)[0]) for p in (params, other))
        assert np.isclose(one, two, rtol=1e-5) == weighted


def test_a_decoder_row_of_zeros_has_a_finite_gradient():
    spec = ReLU(D, N, norm_weighted=True)
    params = random_params(spec)
    gradient = jax.grad(lambda p: spec.loss(p, X, settings=SETTINGS)[0])(params | {"W_dec": params["W_dec"].at[1].set(0.0)})
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(gradient))


def test_an_unknown_error_is_refused():
    with pytest.raises(UserError, match="error 'l1' is not known: squared or over_norm"):
        ReLU(D, N, error="l1")


@pytest.mark.standard_promotion
@pytest.mark.slow
@pytest.mark.parametrize(
    "spec, sparsity",
    [
        (ReLU(toy.D, 64), 0.15),
        (ReLU(toy.D, 64, norm_weighted=True), 0.15),
        (ReLU(toy.D, 64, d_out=16, error="over_norm", input_bias=True, ghost=True), 0.15 / 16),
    ],
    ids=["unit rows", "free rows", "the transcoder paper's recipe"],
)
def test_it_finds_the_features(spec, sparsity):
    out = toy.directions(5, 16) if spec.transcoder else None
    params, l0, explained, alive = toy.fit(spec, LossSettings(sparsity=sparsity), dead_after=20 if spec.ghost else None, out=out)
    assert toy.found(params, alive, toy.directions() if out is None else out) >= 0.9
    assert l0 < 6 and explained > 0.9
