"""What every architecture promises, in every form: one suite over all of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlmscope_jax.dictionaries import BatchTopK, Binary, Dense, FlatSparse, Gated, JumpReLU, LossSettings, Matryoshka, ReLU, TopK, rows
from dlmscope_jax.errors import UserError

D, N, B, OUT = 8, 24, 30, 5
ARCHITECTURES = {
    "topk": lambda **form: TopK(D, N, 3, k_aux=4, **form),
    "topk, multi": lambda **form: TopK(D, N, 3, multi_topk=True, **form),
    "batch_topk": lambda **form: BatchTopK(D, N, 3, k_aux=4, **form),
    "matryoshka": lambda **form: Matryoshka(D, N, 3, k_aux=4, prefixes=(4, 12, N), **form),
    "relu": lambda **form: ReLU(D, N, ghost=True, **form),
    "relu, weighted": lambda **form: ReLU(D, N, norm_weighted=True, error="over_norm", **form),
    "jumprelu, step": lambda **form: JumpReLU(D, N, bandwidth=0.2, **form),
    "jumprelu, target": lambda **form: JumpReLU(D, N, penalty="target", bandwidth=0.2, **form),
    "jumprelu, tanh": lambda **form: JumpReLU(D, N, penalty="tanh", **form),
    "gated": lambda **form: Gated(D, N, **form),
    "binary": lambda **form: Binary(D, N, **form),
    "binary, paper": lambda **form: Binary(D, N, follows="paper", **form),
    "binary, 2 bits": lambda **form: Binary(D, N, bits=2, estimator="sigmoid", **form),
}
FORMS = {
    "autoencoder": {},
    "transcoder": {"d_out": OUT},
    "skip transcoder": {"d_out": OUT, "skip": True, "input_bias": True},
    "layer norm": {"row_norm": "layer_norm"},
    "normed skip transcoder": {"d_out": OUT, "skip": True, "row_norm": "unit_rms"},
}
# arrays, as a training step has them: a Python number would compile a program of its own
SETTINGS = jax.tree.map(jnp.float32, LossSettings(aux=0.5, sparsity=0.2, preactivation=0.1, target_l0=3.0, entropy=0.01, covariance=0.01))
DEAD = jnp.arange(N) % 3 == 0

every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
slow = pytest.mark.slow  # the forms whose code the other two share
every_form = pytest.mark.parametrize("form", [f if f in ("autoencoder", "skip transcoder") else pytest.param(f, marks=slow) for f in FORMS])


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


X, TARGET = draw(90, B, D) + 0.2, draw(91, B, OUT) - 0.3


def make(architecture, form="autoencoder"):
    return ARCHITECTURES[architecture](**FORMS[form])


def random_params(spec, seed=0):
    params = {name: draw(seed + i, *shape) for i, (name, shape) in enumerate(sorted(spec.shapes().items()))}
    return params | {name: 0.3 * jnp.abs(params[name]) for name in ("threshold",) if name in params}


def arguments(spec):
    return (X, TARGET) if spec.transcoder else (X, None)


def close(got, want, rtol=3e-5, atol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), got, want)


# --- parameters


@pytest.mark.some(10)
@every_architecture
@every_form
def test_init(architecture, form):
    spec = make(architecture, form)
    x, target = arguments(spec)
    params = spec.init(jax.random.key(0), *((x, None) if target is None else (target, x)))
    assert {name: value.shape for name, value in params.items()} == spec.shapes()
    assert all(value.dtype == jnp.float32 for value in params.values())
    buffers = [value.unsafe_buffer_pointer() for value in params.values()]
    assert len(set(buffers)) == len(buffers)  # a training step donates them
    assert set(spec.STATISTICS) <= set(params)
    loss, _ = spec.loss(params, x, target, settings=SETTINGS)
    assert bool(jnp.isfinite(loss))
    other = spec.init(jax.random.key(1))
    assert {name: value.shape for name, value in other.items()} == spec.shapes()
    assert not np.array_equal(other["W_dec"], params["W_dec"])


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if not name.startswith("binary")])  # Binary starts at random
@every_form
def test_biases_start_at_the_centre_of_what_they_meet(architecture, form):
    """Without any latent, the first output is the median of the targets; the first pre-activations are centred on the inputs."""
    spec = make(architecture, form)
    x, target = 3.0 * X, None if not spec.transcoder else 3.0 * TARGET
    params = spec.init(jax.random.key(0), *((x, None) if target is None else (target, x)))
    seen, wanted = spec._pair(x, target)
    close(params["b_dec"], rows.geometric_median(wanted), rtol=1e-3, atol=1e-3)
    shift = spec._shift(params)
    bias = params["b_gate"] if "b_gate" in params else params["b_enc"]
    centre = rows.geometric_median(seen) - (0.0 if shift is None else shift)
    close(params["W_enc"] @ centre + bias, np.zeros(N), atol=1e-3)


# --- codes


@every_architecture
@pytest.mark.parametrize("form", ["autoencoder", "skip transcoder", "layer norm"])
@pytest.mark.parametrize("train", [False, True])
def test_codes_answer_as_their_dense_form_does(architecture, form, train):
    spec = make(architecture, form)
    params = random_params(spec)
    codes = spec.encode(params, X, train=train)
    dense = np.asarray(spec.dense(codes))
    assert dense.shape == (B, N) and dense.dtype == np.float32
    assert 0 < (dense != 0).mean() < 1
    np.testing.assert_array_equal(codes.count(), (dense != 0).sum(axis=1))
    np.testing.assert_array_equal(codes.fired(N), (dense != 0).sum(axis=0))
    valid = np.arange(B) % 2 == 0
    np.testing.assert_array_equal(codes.fired(N, jnp.asarray(valid)), (dense[valid] != 0).sum(axis=0))
    np.testing.assert_allclose(codes.largest(), dense.max(axis=1), rtol=1e-6)
    for i in (0, 5, N - 1):
        np.testing.assert_allclose(codes.latent(i), dense[:, i], rtol=1e-6)
        np.testing.assert_allclose(jax.jit(type(codes).latent)(codes, jnp.int32(i)), dense[:, i], rtol=1e-6)
    y = spec.decode(params, codes, x=X)
    assert y.shape == (B, spec.out) and y.dtype == jnp.float32
    close(spec.decode(params, Dense(jnp.asarray(dense)), x=X), y, rtol=1e-4, atol=1e-4)
    close(spec.direction(params, 5), params["W_dec"][5])


@every_architecture
@pytest.mark.parametrize("form", ["autoencoder", "normed skip transcoder"])
def test_leading_axes(architecture, form):
    spec = make(architecture, form)
    params = random_params(spec)
    flat, deep = spec.encode(params, X), spec.encode(params, X.reshape(2, 3, 5, D))
    np.testing.assert_array_equal(spec.dense(deep), spec.dense(flat).reshape(2, 3, 5, N))
    np.testing.assert_array_equal(deep.count(), flat.count().reshape(2, 3, 5))
    np.testing.assert_array_equal(deep.fired(N), flat.fired(N))
    np.testing.assert_array_equal(deep.latent(3), flat.latent(3).reshape(2, 3, 5))
    np.testing.assert_array_equal(deep.largest(), flat.largest().reshape(2, 3, 5))
    want = spec.decode(params, flat, x=X).reshape(2, 3, 5, spec.out)
    close(spec.decode(params, deep, x=X.reshape(2, 3, 5, D)), want)
    close(spec.reconstruct(params, X.reshape(2, 3, 5, D)), want)
    one = spec.encode(params, X[0])
    np.testing.assert_allclose(spec.dense(one), spec.dense(flat)[0], rtol=1e-5, atol=1e-6)
    assert spec.dense(one).shape == (N,) and one.count().shape == ()


@every_architecture
def test_what_training_computes(architecture):
    """BatchTopK and Matryoshka select over the batch in training; Binary gives float codes with a gradient; the others do the same."""
    spec = make(architecture)
    params = random_params(spec)
    train, inference = spec.encode(params, X, train=True), spec.encode(params, X)
    if isinstance(spec, BatchTopK):
        assert isinstance(train, FlatSparse) and int(train.count().sum()) <= spec.k * B
        return
    np.testing.assert_array_equal(spec.dense(train), spec.dense(inference))


@every_architecture
def test_low_precision_rows(architecture):
    spec = make(architecture)
    params, half = random_params(spec), X.astype(jnp.bfloat16)
    y = spec.reconstruct(params, half)
    assert y.dtype == jnp.float32
    close(y, spec.reconstruct(params, half.astype(jnp.float32)))
    loss, parts = spec.loss(params, half, settings=SETTINGS)
    assert loss.dtype == jnp.float32 and all(term.dtype == jnp.float32 for term in parts.terms.values())
    close(loss, spec.loss(params, half.astype(jnp.float32), settings=SETTINGS)[0])


# --- losses


@pytest.mark.some(10)
@every_architecture
@pytest.mark.parametrize("form", ["autoencoder", "skip transcoder", pytest.param("normed skip transcoder", marks=slow)])
def test_loss(architecture, form):
    """Finite, the sum of what is logged, with a finite gradient for all that is learned and none through what is logged."""
    spec = make(architecture, form)
    params, (x, target) = random_params(spec), arguments(spec)
    differentiate = jax.jit(jax.value_and_grad(spec.loss, has_aux=True))
    (loss, parts), gradient = differentiate(params, x, target, DEAD, SETTINGS)
    assert loss.shape == () and bool(jnp.isfinite(loss))
    np.testing.assert_allclose(sum(parts.terms.values()), loss, rtol=1e-6)
    assert "reconstruction" in parts.terms
    for name in spec.shapes():
        assert bool(jnp.isfinite(gradient[name]).all()), name
        assert bool(gradient[name].any()) == (name not in spec.STATISTICS), name
    assert set(parts.statistics) == set(spec.STATISTICS)
    fired = np.asarray(spec.encode(params, x, train=True).fired(N))
    if isinstance(spec, Binary):  # a bit's rarer value
        fired = np.minimum(fired, B - fired)
    np.testing.assert_array_equal(parts.fired, fired)
    np.testing.assert_allclose(parts.l0, fired.sum() / B, rtol=1e-6)
    assert parts.fired.dtype == jnp.int32

    # no program of its own for other numbers
    other = jax.tree.map(lambda value: 1.1 * value, params)
    again = jax.tree.map(lambda value: 0.5 * value, SETTINGS)
    differentiate(other, x + 1.0, None if target is None else target - 1.0, ~DEAD, again)
    assert differentiate._cache_size() == 1


@every_architecture
def test_what_is_reported_has_no_gradient(architecture):
    spec = make(architecture)
    params = random_params(spec)

    def reported(params):
        parts = spec.loss(params, X, None, DEAD, SETTINGS)[1]
        numbers = [*parts.terms.values(), *parts.measured.values(), *parts.statistics.values(), parts.explained_variance, parts.l0]
        return jnp.stack(numbers).sum()

    assert not any(bool(leaf.any()) for leaf in jax.tree.leaves(jax.jit(jax.grad(reported))(params)))


@every_architecture
def test_loss_is_the_same_for_the_default_target(architecture):
    spec = make(architecture)
    params = random_params(spec)
    close(spec.loss(params, X, settings=SETTINGS)[0], spec.loss(params, X, X, settings=SETTINGS)[0])


@every_architecture
def test_without_dead_there_is_no_auxiliary_term(architecture):
    parts = make(architecture).loss(random_params(make(architecture)), X, settings=SETTINGS)[1]
    assert not {"aux", "ghost"} & (set(parts.terms) | set(parts.measured))


@pytest.mark.slow
@every_architecture
def test_several_in_one_program(architecture):
    """Dictionaries of one shape may be stacked: the loss under vmap is that of each. (Training calls one program several times instead.)"""
    spec = make(architecture)
    each = [random_params(spec, seed) for seed in (0, 100)]
    dead = jnp.stack([DEAD, jnp.zeros_like(DEAD)])
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    differentiate = jax.jit(jax.value_and_grad(spec.loss, has_aux=True))
    (loss, parts), gradient = jax.jit(jax.vmap(lambda p, d: differentiate(p, X, None, d, SETTINGS)))(stacked, dead)
    for i, params in enumerate(each):
        (want, want_parts), want_gradient = differentiate(params, X, None, dead[i], SETTINGS)
        close(loss[i], want, rtol=1e-4)
        close(jax.tree.map(lambda leaf: leaf[i], parts.terms), want_parts.terms, rtol=1e-4, atol=1e-4)  # noqa: B023
        close(jax.tree.map(lambda leaf: leaf[i], gradient), want_gradient, rtol=1e-3, atol=1e-3)  # noqa: B023


# --- constraints


@every_architecture
def test_constraints(architecture):
    spec = make(architecture)
    params, gradient = random_params(spec), random_params(spec, 50)
    held, projected = spec.constrain(params), spec.project_gradient(params, gradient)
    assert set(held) == set(projected) == set(spec.shapes())
    close(spec.constrain(held), held)
    norms = np.linalg.norm(held["W_dec"], axis=1)
    along = (np.asarray(projected["W_dec"]) * np.asarray(params["W_dec"])).sum(axis=1)
    assert np.allclose(norms, 1.0, atol=1e-5) == spec.unit_decoder
    assert np.allclose(along, 0.0, atol=1e-4) == spec.unit_decoder
    for name in set(held) - {"W_dec"}:
        np.testing.assert_array_equal(projected[name], gradient[name])
        np.testing.assert_array_equal(held[name], params[name])
    statistics = spec.loss(params, X, settings=SETTINGS)[1].statistics
    moved = spec.update_statistics(params, statistics)
    assert {name for name in params if not np.array_equal(moved[name], params[name])} == set(spec.STATISTICS)


# --- units


@every_architecture
@pytest.mark.parametrize("form", ["autoencoder", "transcoder", "skip transcoder"])
def test_fold_acts_on_raw_rows_and_unfold_undoes_it(architecture, form):
    spec = make(architecture, form)
    params, scale, out_scale = random_params(spec), 7.3, 0.4 if spec.transcoder else None
    folded = spec.fold(params, scale, out_scale)
    before, after = spec.dense(spec.encode(params, X)), spec.dense(spec.encode(folded, X * scale))
    np.testing.assert_array_equal(before != 0, after != 0)
    close(spec.reconstruct(folded, X * scale), spec.reconstruct(params, X) * (out_scale or scale), rtol=1e-3, atol=1e-3)
    assert {name: value.shape for name, value in folded.items()} == spec.shapes()
    close(spec.unfold(folded, scale, out_scale), params)
    norms = jnp.linalg.norm(folded["W_dec"], axis=1) / jnp.linalg.norm(params["W_dec"], axis=1)
    assert np.allclose(norms, 1.0) == (not isinstance(spec, Binary))  # unit rows stay unit rows


@every_architecture
def test_an_autoencoder_has_one_scale(architecture):
    spec = make(architecture)
    params = random_params(spec)
    close(spec.fold(params, 7.3, 7.3), spec.fold(params, 7.3))
    assert "out_scale = 0.4 belongs to a transcoder" in the_line(lambda: spec.fold(params, 7.3, 0.4))
    assert "out_scale" in the_line(lambda: spec.unfold(params, jnp.float32(7.3), jnp.float32(0.4)))


@pytest.mark.parametrize("row_norm", ["layer_norm", "unit_rms"])
def test_rows_of_equal_entries_do_no_harm(row_norm):
    """They have no spread to divide by."""
    for spec in (TopK(D, N, 3, row_norm=row_norm), TopK(D, N, 3, d_out=OUT, row_norm=row_norm)):
        x, (_, target) = X.at[0].set(0.0).at[1].set(2.0), arguments(spec)
        params = spec.init(jax.random.key(0), *((x, None) if target is None else (target, x)))
        loss, gradient = jax.value_and_grad(lambda p: spec.loss(p, x, target)[0])(params)  # noqa: B023
        assert all(bool(jnp.isfinite(leaf).all()) for leaf in (loss, *params.values(), *gradient.values()))
        assert bool(jnp.isfinite(spec.reconstruct(params, x)).all())


@every_architecture
@pytest.mark.parametrize("row_norm", ["layer_norm", "unit_rms"])
def test_a_dictionary_that_normalises_rows_takes_any_scale_as_it_is(architecture, row_norm):
    spec = ARCHITECTURES[architecture](row_norm=row_norm)
    params = random_params(spec)
    folded = spec.fold(params, 7.3)
    assert all(folded[name] is params[name] for name in params)
    close(spec.reconstruct(params, 8.0 * X), 8.0 * spec.reconstruct(params, X), rtol=1e-3, atol=1e-2)  # layer_norm's 1e-5 has a scale


# --- errors


def the_line(call):
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


@every_architecture
def test_errors_name_the_architecture_and_what_would_be_right(architecture):
    spec, coder = make(architecture), make(architecture, "skip transcoder")
    params, name = random_params(spec), type(spec).__name__
    wrong = jnp.zeros((B, D + 1))
    for call, wanted in (
        (lambda: spec.encode(params, wrong), f"{name}.encode: rows must have {D} entries, got an array of shape [{B}, {D + 1}]"),
        (lambda: spec.loss(params, wrong), f"{name}.loss: rows must have {D} entries"),
        (lambda: spec.loss(params, X, wrong), f"{name}.loss (target): rows must have {D} entries"),
        (lambda: spec.init(jax.random.key(0), wrong), f"{name}.init: the sample must be [rows, {D}]"),
        (lambda: coder.init(jax.random.key(0), None, wrong), f"{name}.init: the inputs must be [rows, {D}]"),
        (lambda: coder.loss(random_params(coder), X), f"{name}.loss: a transcoder needs the rows that it should produce: give target"),
        (lambda: coder.decode(random_params(coder), coder.encode(random_params(coder), X)), f"{name}.decode: a skip transcoder needs"),
        (lambda: ARCHITECTURES[architecture](skip=True), f"{name}: skip=True belongs to a transcoder: give d_out as well"),
        (lambda: ARCHITECTURES[architecture](input_bias=True), f"{name}: input_bias=True belongs to a transcoder"),
        (lambda: ARCHITECTURES[architecture](d_out=0), f"{name}: d_out = 0 must be a positive integer"),
        (lambda: ARCHITECTURES[architecture](row_norm="batch"), f"{name}: row_norm 'batch' is not known: none, layer_norm or unit_rms"),
        (lambda: make(architecture, "normed skip transcoder").fold(params, 2.0), f"{name}.fold: a transcoder with row_norm='unit_rms'"),
    ):
        assert wanted in the_line(call)
