"""Cross-layer transcoders: against sums written out, plain autodiff and float64 differences; scales of their own for each layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlmscope_jax.dictionaries import CrossLayer, Dense, DictionaryMeta, LossSettings, load_dictionary, rows, save_dictionary
from dlmscope_jax.errors import UserError

L, D, N, OUT, B = 3, 5, 7, 4, 11
SETTINGS = LossSettings(sparsity=0.3, preactivation=0.2)
both = pytest.mark.parametrize("activation", ["jumprelu", "relu"])


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


X, TARGET = draw(90, B, L * D) + 0.1, draw(91, B, L * OUT) - 0.3


def make(activation="jumprelu"):
    return CrossLayer(L * D, L * N, L, L * OUT, activation)


def random_params(spec, seed=0):
    params = {name: draw(seed + i, *shape) for i, (name, shape) in enumerate(sorted(spec.shapes().items()))}
    return params | {name: 0.5 * jnp.abs(params[name]) for name in ("threshold",) if name in params}


def by_hand(params, x):
    """Activations [B, L, N] and outputs [B, L, OUT] in float64, one product for each pair of layers."""
    p = {name: np.asarray(value, np.float64) for name, value in params.items()}
    x = np.asarray(x, np.float64).reshape(-1, L, D)
    a, y = np.zeros((len(x), L, N)), np.tile(p["b_dec"].reshape(L, OUT), (len(x), 1, 1))
    for layer in range(L):
        mine = slice(layer * N, (layer + 1) * N)
        z = x[:, layer] @ p["W_enc"][mine].T + p["b_enc"][mine]
        a[:, layer] = z * (z > (p["threshold"][mine] if "threshold" in p else 0.0))
        for above in range(layer, L):
            y[:, above] += a[:, layer] @ p[f"W_dec_{layer}"][:, above - layer]
    return a, y


def close(got, want, rtol=3e-5, atol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), got, want)


# --- the function


@both
def test_forward(activation):
    spec = make(activation)
    params = random_params(spec)
    a, y = by_hand(params, X)
    codes = spec.encode(params, X)
    assert 0.1 < (a != 0).mean() < 0.6
    close(spec.dense(codes), a.reshape(B, L * N))
    close(spec.reconstruct(params, X), y.reshape(B, L * OUT))
    deep = spec.reconstruct(params, X[:10].reshape(2, 5, L * D).astype(jnp.bfloat16))
    assert deep.shape == (2, 5, L * OUT) and deep.dtype == jnp.float32
    close(spec.decode(params, Dense(codes.values[0])), y[0].reshape(-1))


@both
def test_a_latent_writes_its_direction(activation):
    spec = make(activation)
    params = random_params(spec)
    for i in (0, N - 1, N + 2, 3 * N - 1):
        one = Dense(jnp.zeros((1, L * N)).at[0, i].set(1.0))
        want = spec.decode(params, one)[0] - params["b_dec"]
        close(spec.direction(params, i), want)
        close(jax.jit(spec.direction)(params, jnp.int32(i)), want)
        layer = i // N
        assert not want[: layer * OUT].any() and bool((want[layer * OUT :] != 0).all())


def test_layers_below_do_not_see_those_above():
    spec = make()
    params = random_params(spec)
    changed = spec.reconstruct(params, X.at[:, D : 2 * D].add(3.0)) - spec.reconstruct(params, X)
    moved = np.abs(np.asarray(changed)).reshape(B, L, OUT).max(axis=(0, 2))
    assert moved[0] == 0 and moved[1] > 0.1 and moved[2] > 0.1


# --- first parameters


@both
def test_init(activation):
    spec = make(activation)
    params = spec.init(jax.random.key(0), 3.0 * TARGET, 2.0 * X)
    assert {name: value.shape for name, value in params.items()} == spec.shapes()
    assert all(value.dtype == jnp.float32 for value in params.values())
    buffers = [value.unsafe_buffer_pointer() for value in params.values()]
    assert len(set(buffers)) == len(buffers)
    close(spec._norms(params), np.ones(L * N))
    close(np.linalg.norm(params["W_enc"], axis=1), np.ones(L * N))
    for layer in range(L):
        median = rows.geometric_median(3.0 * TARGET[:, layer * OUT : (layer + 1) * OUT])
        close(params["b_dec"][layer * OUT : (layer + 1) * OUT], median)
        mine = slice(layer * N, (layer + 1) * N)
        centre = rows.geometric_median(2.0 * X[:, layer * D : (layer + 1) * D])
        close(params["W_enc"][mine] @ centre + params["b_enc"][mine], np.zeros(N))
    bare = spec.init(jax.random.key(1))
    assert not bare["b_dec"].any() and not bare["b_enc"].any() and not np.array_equal(bare["W_dec_1"], params["W_dec_1"])


# --- the loss


def plain_loss(params, x, target, settings, window=None):
    """The formulas once more, with plain products, and JumpReLU's estimator as a stopped gradient."""
    x, target, y = x.reshape(-1, L, D), target.reshape(-1, L, OUT), params["b_dec"].reshape(1, L, OUT)
    sparsity = below = jnp.float32(0)
    for layer in range(L):
        mine = slice(layer * N, (layer + 1) * N)
        z = x[:, layer] @ params["W_enc"][mine].T + params["b_enc"][mine]
        decoder = params[f"W_dec_{layer}"]
        norm = jnp.sqrt((decoder**2).sum(axis=(1, 2)))
        if window is None:
            a = jnp.maximum(z, 0.0)
        else:
            theta = params["threshold"][mine]
            estimate = jax.lax.stop_gradient(theta / window * (jnp.abs(z - theta) < window / 2).astype(z.dtype))
            a = z * (z > theta).astype(z.dtype) + estimate * (z - theta - jax.lax.stop_gradient(z - theta))
            below += (jnp.maximum(theta - z, 0.0) * norm).sum(axis=1).mean()
        y = y + jnp.pad(jnp.einsum("bn,nmd->bmd", a, decoder), ((0, 0), (layer, 0), (0, 0)))
        sparsity += jnp.tanh(4.0 * OUT**0.5 * a * norm).sum(axis=1).mean()
    return ((y - target) ** 2).sum(axis=(1, 2)).mean() + settings.sparsity * sparsity + settings.preactivation * below


@both
def test_loss_and_gradient(activation):
    spec = make(activation)
    params = random_params(spec)
    window = spec.window if activation == "jumprelu" else None
    (loss, parts), gradient = jax.jit(jax.value_and_grad(spec.loss, has_aux=True))(params, X, TARGET, None, SETTINGS)
    want, want_gradient = jax.value_and_grad(plain_loss)(params, X, TARGET, SETTINGS, window)
    close(loss, want, rtol=1e-5)
    close(gradient, want_gradient, rtol=1e-4, atol=1e-4)
    assert all(bool(value.any()) for value in gradient.values())
    close(sum(parts.terms.values()), loss, rtol=1e-6)
    assert set(parts.terms) == {"reconstruction", "sparsity"} | ({"preactivation"} if window else set())
    a, y = by_hand(params, X)
    close(parts.terms["reconstruction"], np.square(y.reshape(B, -1) - np.asarray(TARGET)).sum(axis=1).mean(), rtol=1e-5)
    np.testing.assert_array_equal(parts.fired, (a != 0).sum(axis=0).reshape(-1))
    close(parts.l0, (a != 0).sum(axis=(1, 2)).mean())


@both
def test_what_is_reported_has_no_gradient(activation):
    spec = make(activation)

    def reported(params):
        parts = spec.loss(params, X, TARGET, None, SETTINGS)[1]
        return sum(parts.terms.values()) + sum(parts.measured.values()) + parts.explained_variance

    assert not any(bool(leaf.any()) for leaf in jax.tree.leaves(jax.jit(jax.grad(reported))(random_params(spec))))


def test_constraints():
    spec = make()
    params, gradient = random_params(spec), random_params(spec, 50)
    held = spec.constrain(params | {"threshold": params["threshold"] - 0.5})
    close(held, params | {"threshold": jnp.maximum(params["threshold"] - 0.5, 0.0)})
    assert not spec.unit_decoder and spec.project_gradient(params, gradient) is gradient
    assert make("relu").constrain(params) is params


# --- units


@both
@pytest.mark.parametrize("scale, out_scale", [(jnp.array([0.5, 7.0, 90.0]), jnp.array([3.0, 0.2, 11.0])), (7.3, None)])
def test_each_layer_has_a_scale_of_its_own(activation, scale, out_scale):
    spec = make(activation)
    params = random_params(spec)
    read = jnp.repeat(jnp.broadcast_to(scale, L), D)
    written = jnp.repeat(jnp.broadcast_to(scale if out_scale is None else out_scale, L), OUT)
    folded = spec.fold(params, scale, out_scale)
    assert {name: value.shape for name, value in folded.items()} == spec.shapes()
    close(spec.encode(folded, X * read).values, spec.encode(params, X).values, rtol=1e-4)
    close(spec.reconstruct(folded, X * read) / written, spec.reconstruct(params, X), rtol=1e-4, atol=1e-4)
    close(spec.unfold(folded, scale, out_scale), params)


# --- files and errors


@both
def test_our_files(tmp_path, activation):
    spec = make(activation)
    params, meta = random_params(spec), DictionaryMeta("m", "mlp_in@0+mlp_in@1+mlp_in@2", 0)
    save_dictionary(tmp_path, spec, params, meta)
    again = load_dictionary(tmp_path)
    assert again[0] == spec and again[2] == meta
    jax.tree.map(np.testing.assert_array_equal, again[1], params)


def test_errors():
    for call, wanted in (
        (lambda: CrossLayer(16, 21, 3, 12), "CrossLayer: d_in = 16 counts all 3 layers together: give a multiple of 3"),
        (lambda: CrossLayer(15, 20, 3, 12), "CrossLayer: width = 20 counts"),
        (lambda: CrossLayer(15, 21, 3, None), "CrossLayer: d_out = None counts"),
        (lambda: CrossLayer(15, 21, 0, 12), "CrossLayer: layers = 0 must be a positive integer"),
        (lambda: CrossLayer(15, 21, 3, 12, "topk"), "CrossLayer: activation 'topk' is not known: jumprelu or relu"),
        (lambda: CrossLayer(15, 21, 3, 12, bandwidth=2.0), "CrossLayer: bandwidth = 2.0 must be"),
        (lambda: make().loss(random_params(make()), X), "CrossLayer.loss: a transcoder needs the rows that it should produce"),
        (lambda: make().encode(random_params(make()), X[:, :5]), "CrossLayer.encode: rows must have 15 entries"),
        (lambda: make().init(jax.random.key(0), X), "CrossLayer.init: the sample must be [rows, 12]"),
    ):
        with pytest.raises(UserError) as caught:
            call()
        assert str(caught.value).startswith(wanted) and "\n" not in str(caught.value)
