"""TopK dictionaries against closed forms written with plain autodiff on dense arrays."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dlmscope_jax.dictionaries import BatchTopK, Dense, LossSettings, RowSparse, TopK, auxk, geometric_median
from dlmscope_jax.errors import UserError

D, N, K, B = 6, 20, 3, 11
SPEC = TopK(D, N, K, k_aux=4)
CODER = TopK(D, N, K, d_out=4, skip=True)


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def random_params(spec, seed=0):
    return {name: draw(seed + i, *shape) for i, (name, shape) in enumerate(sorted(spec.shapes().items()))}


PARAMS, X = random_params(SPEC), draw(9, B, D)


def close(got, want, rtol=3e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=3e-6), got, want)


def dense_forward(params, x, k=K, subtract=True, skip=False):
    """The definition, with every latent written out."""
    pre = (x - params["b_dec"] if subtract else x) @ params["W_enc"].T + params["b_enc"]
    kept = jax.lax.top_k(pre, k)[1]
    mask = jax.nn.one_hot(kept, pre.shape[1]).sum(axis=1)
    code = jnp.maximum(pre, 0.0) * mask
    return pre, code, code @ params["W_dec"] + params["b_dec"] + (x @ params["W_skip"].T if skip else 0.0)


def dense_loss(params, x, dead, alpha, k_aux):
    """The whole loss with AuxK as METHODS.md defines it."""
    pre, _, y = dense_forward(params, x)
    error = x - y
    reconstruction = (error**2).sum(axis=1).mean()
    residual = jax.lax.stop_gradient(error)
    n_dead = int(dead.sum())
    if n_dead == 0:
        return reconstruction
    chosen = jax.lax.top_k(jnp.where(dead, pre, -jnp.inf), min(k_aux, n_dead))[1]
    code = pre * jax.nn.one_hot(chosen, pre.shape[1]).sum(axis=1)
    aux = ((residual - code @ params["W_dec"]) ** 2).sum() / ((residual - residual.mean(axis=0)) ** 2).sum()
    return reconstruction + alpha * min(1.0, n_dead / k_aux) * aux


def test_encode_decode_equal_the_definition():
    codes = SPEC.encode(PARAMS, X)
    _, code, y = dense_forward(PARAMS, X)
    assert codes.values.shape == codes.indices.shape == (B, K)
    close(SPEC.dense(codes), code)
    close(SPEC.decode(PARAMS, codes), y)
    close(SPEC.decode(PARAMS, Dense(code)), y)
    close(SPEC.reconstruct(PARAMS, X), y)
    close(SPEC.direction(PARAMS, 5), PARAMS["W_dec"][5])
    for i in (0, 7):
        close(codes.latent(i), code[:, i])
        close(Dense(code).latent(i), code[:, i])
    close(jax.jit(RowSparse.latent)(codes, jnp.int32(7)), code[:, 7])


def test_leading_axes_and_low_precision_input():
    x = X[:10].reshape(2, 5, D)
    codes = SPEC.encode(PARAMS, x)
    assert codes.values.shape == (2, 5, K)
    close(SPEC.decode(PARAMS, codes).reshape(10, D), SPEC.reconstruct(PARAMS, X[:10]))
    half = SPEC.reconstruct(PARAMS, x.astype(jnp.bfloat16))
    assert half.dtype == jnp.float32
    close(half, SPEC.reconstruct(PARAMS, x.astype(jnp.bfloat16).astype(jnp.float32)))


def test_ties_go_to_the_lowest_latent():
    params = {**PARAMS, "W_enc": jnp.tile(PARAMS["W_enc"][:1], (N, 1)), "b_enc": jnp.zeros(N)}
    np.testing.assert_array_equal(SPEC.encode(params, X).indices, np.tile(np.arange(K), (B, 1)))


def test_negative_preactivations_are_cut_after_the_selection():
    params = {**PARAMS, "b_enc": PARAMS["b_enc"] - 100.0}
    codes = SPEC.encode(params, X)
    assert float(jnp.abs(codes.values).max()) == 0.0
    close(SPEC.decode(params, codes), jnp.tile(params["b_dec"], (B, 1)))


@pytest.mark.some(4)
@pytest.mark.parametrize(
    ("n_dead", "room"),
    [(0, 512), (2, 512), (4, 512), (9, 512), (4, 1), (5, 1), (6, 1), (7, 1)],
    ids=["none", "fewer than k_aux", "k_aux", "more than k_aux", "k_aux of few", "gathered", "as many as there is room", "one more"],
)
def test_loss_and_gradient_equal_the_definition(monkeypatch, n_dead, room):
    monkeypatch.setattr(auxk, "_LEAST_ROOM", room)
    monkeypatch.setattr(auxk, "_ROOM_SHARE", 3)  # of 20 latents: room for 6
    dead = jnp.zeros(N, bool).at[jnp.arange(n_dead) * 2].set(True)
    alpha = 0.7
    differentiate = jax.value_and_grad(SPEC.loss, has_aux=True)
    (loss, parts), gradient = jax.jit(lambda p: differentiate(p, X, dead=dead, settings=LossSettings(aux=alpha)))(PARAMS)
    want, want_gradient = jax.value_and_grad(dense_loss)(PARAMS, X, dead, alpha, 4)
    close(loss, want)
    close(gradient, want_gradient, rtol=2e-4)
    # what is reported is what was differentiated
    close(sum(parts.terms.values()), loss)
    close(parts.terms["aux"], alpha * min(1.0, n_dead / 4) * parts.measured["aux"])


def test_loss_parts():
    loss, parts = SPEC.loss(PARAMS, X)
    _, code, y = dense_forward(PARAMS, X)
    close(loss, parts.terms["reconstruction"])
    close(parts.l0, (code > 0).sum(axis=1).mean())
    np.testing.assert_array_equal(parts.fired, (np.asarray(code) > 0).sum(axis=0))
    close(parts.explained_variance, 1 - ((X - y) ** 2).sum() / ((X - X.mean(axis=0)) ** 2).sum())


def test_gradient_agrees_with_finite_differences():
    params = {name: np.asarray(value, np.float64) for name, value in PARAMS.items()}
    direction = {name: np.asarray(draw(40, *value.shape), np.float64) for name, value in params.items()}
    gradient = jax.grad(lambda p: SPEC.loss(p, X)[0])(PARAMS)
    slope = sum(float((np.asarray(gradient[n], np.float64) * direction[n]).sum()) for n in params)

    def at(step):  # numpy float64, the selection held where it is
        p = {n: params[n] + step * direction[n] for n in params}
        x = np.asarray(X, np.float64)
        pre = (x - p["b_dec"]) @ p["W_enc"].T + p["b_enc"]
        code = np.maximum(pre, 0) * np.asarray(SPEC.dense(RowSparse(jnp.ones((B, K)), SPEC.encode(PARAMS, X).indices)))
        return ((x - code @ p["W_dec"] - p["b_dec"]) ** 2).sum() / B

    np.testing.assert_allclose(slope, (at(1e-5) - at(-1e-5)) / 2e-5, rtol=1e-4)


def test_auxk_reaches_encoders_that_are_negative_on_the_whole_batch():
    """The fault of the published implementations: such a latent contributes 0 after ReLU and is never revived."""
    dead = jnp.zeros(N, bool).at[jnp.array([3, 8])].set(True)
    params = {**PARAMS, "b_enc": PARAMS["b_enc"].at[jnp.array([3, 8])].set(-50.0)}
    pre = (X - params["b_dec"]) @ params["W_enc"].T + params["b_enc"]
    assert float(pre[:, [3, 8]].max()) < 0
    gradient = jax.grad(lambda p: SPEC.loss(p, X, dead=dead, settings=LossSettings(aux=1 / 32))[0])(params)
    for name in ("W_enc", "b_enc", "W_dec"):
        assert float(jnp.abs(gradient[name][3]).max()) > 1e-4, name
        assert float(jnp.abs(gradient[name][8]).max()) > 1e-4, name
    off = jax.grad(lambda p: SPEC.loss(p, X, dead=dead, settings=LossSettings(aux=0.0))[0])(params)
    assert float(jnp.abs(off["W_enc"][jnp.array([3, 8])]).max()) == 0.0


def test_the_target_of_auxk_is_held_constant():
    """Were the residual not detached, AuxK would also move the live latents."""
    dead = jnp.zeros(N, bool).at[2].set(True)
    params = {**PARAMS, "b_enc": PARAMS["b_enc"].at[2].set(-50.0)}
    with_aux = jax.grad(lambda p: SPEC.loss(p, X, dead=dead, settings=LossSettings(aux=1.0))[0])(params)
    without = jax.grad(lambda p: SPEC.loss(p, X, settings=LossSettings(aux=0.0))[0])(params)
    live = jnp.arange(N) != 2
    for name in ("W_enc", "W_dec", "b_enc"):
        np.testing.assert_array_equal(with_aux[name][live], without[name][live])


def test_auxk_of_a_perfect_reconstruction_is_zero_not_nan():
    spec = TopK(D, D, D, k_aux=2)
    params = {"W_enc": jnp.eye(D), "W_dec": jnp.eye(D), "b_enc": jnp.zeros(D), "b_dec": jnp.zeros(D)}
    (loss, parts), gradient = jax.value_and_grad(spec.loss, has_aux=True)(params, jnp.abs(X), dead=jnp.ones(D, bool))
    assert float(loss) == 0.0 and float(parts.terms["aux"]) == 0.0
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(gradient))


@pytest.mark.standard_promotion
def test_auxk_revives_killed_latents():
    """Half of the latents, killed by their bias, fire again within 1,000 steps of 128 rows with AuxK; without it, they stay dead."""
    d, n, half = 16, 32, 16
    spec, tx = TopK(d, n, 2), optax.adam(3e-3)
    truth = jax.random.normal(jax.random.key(5), (n, d)) / 4.0

    def step(carry, key, alpha):
        params, moments, since = carry
        one, two = jax.random.split(key)
        x = jax.random.bernoulli(one, 0.08, (128, n)).astype(jnp.float32) @ truth + 0.01 * jax.random.normal(two, (128, d))
        (_, parts), g = jax.value_and_grad(spec.loss, has_aux=True)(params, x, dead=since > 20, settings=LossSettings(aux=alpha))
        update, moments = tx.update(spec.project_gradient(params, g), moments, params)
        params = spec.constrain(optax.apply_updates(params, update))
        return (params, moments, jnp.where(parts.fired > 0, 0, since + 1)), parts.fired[:half] > 0

    @jax.jit
    def revived(alpha):
        params = spec.init(jax.random.key(0))
        params = {**params, "b_enc": params["b_enc"].at[:half].set(-2.0)}
        start = (params, tx.init(params), jnp.zeros(n, jnp.int32))
        _, fired = jax.lax.scan(lambda c, k: step(c, k, alpha), start, jax.random.split(jax.random.key(1), 1000))
        return fired[-300:].any(axis=0).mean()

    assert float(revived(jnp.float32(0.0))) < 0.1
    assert float(revived(jnp.float32(1 / 32))) >= 0.8


@pytest.mark.parametrize("spec", [SPEC, CODER], ids=["autoencoder", "skip transcoder"])
def test_fold_acts_on_raw_rows_and_unfold_undoes_it(spec):
    params, scale, out_scale = random_params(spec), 7.3, None if spec.d_out is None else 0.4
    scaled_out = scale if out_scale is None else out_scale
    folded = spec.fold(params, scale, out_scale)
    close(spec.reconstruct(folded, X * scale), spec.reconstruct(params, X) * scaled_out, rtol=1e-4)
    np.testing.assert_array_equal(spec.encode(folded, X * scale).indices, spec.encode(params, X).indices)
    close(folded["W_dec"], params["W_dec"])  # unit rows stay unit rows
    close(spec.unfold(folded, scale, out_scale), params)
    if spec.d_out is None:
        close(folded["W_enc"], params["W_enc"])


def test_skip_transcoder_equals_the_definition():
    params, target = random_params(CODER), draw(5, B, 4)
    _, _, want = dense_forward(params, X, subtract=False, skip=True)
    close(CODER.reconstruct(params, X), want)
    gradient = jax.grad(lambda p: CODER.loss(p, X, target=target)[0])(params)
    close(gradient, jax.grad(lambda p: ((dense_forward(p, X, subtract=False, skip=True)[2] - target) ** 2).sum() / B)(params), rtol=2e-4)
    with pytest.raises(UserError, match="decode\\(params, codes, x=x\\)"):
        CODER.decode(params, CODER.encode(params, X))
    with pytest.raises(UserError, match="give target"):
        CODER.loss(params, X)


def test_init():
    sample = draw(3, 50, D) + 4.0
    params = SPEC.init(jax.random.key(0), sample)
    assert {n: v.shape for n, v in params.items()} == SPEC.shapes()
    close(jnp.linalg.norm(params["W_dec"], axis=1), jnp.ones(N))
    np.testing.assert_array_equal(params["W_enc"], params["W_dec"])
    close(params["b_dec"], geometric_median(sample))
    np.testing.assert_array_equal(SPEC.init(jax.random.key(0))["b_dec"], np.zeros(D))
    assert not np.array_equal(SPEC.init(jax.random.key(1))["W_dec"], params["W_dec"])
    coder = CODER.init(jax.random.key(0))
    assert {n: v.shape for n, v in coder.items()} == CODER.shapes() and float(jnp.abs(coder["W_skip"]).max()) == 0.0


def test_geometric_median_minimises_the_summed_distance_and_ignores_an_outlier():
    points = np.random.default_rng(0).normal(size=(41, 3)) + 2.0
    points[0] = 1e5
    median = np.asarray(geometric_median(jnp.asarray(points, jnp.float32)), np.float64)

    def cost(c):
        return np.linalg.norm(points - c, axis=1).sum()

    assert np.linalg.norm(median - 2.0) < 0.6 < np.linalg.norm(points.mean(axis=0) - 2.0)
    assert all(cost(median) <= cost(median + 0.05 * np.eye(3)[i] * s) for i in range(3) for s in (1, -1))


def test_projection_and_renormalisation():
    params = SPEC.init(jax.random.key(2))
    gradient = random_params(SPEC, 60)
    projected = SPEC.project_gradient(params, gradient)
    close((projected["W_dec"] * params["W_dec"]).sum(axis=1), jnp.zeros(N))
    rest = gradient["W_dec"] - projected["W_dec"]
    close(rest, (gradient["W_dec"] * params["W_dec"]).sum(axis=1, keepdims=True) * params["W_dec"])
    np.testing.assert_array_equal(projected["W_enc"], gradient["W_enc"])
    moved = {**params, "W_dec": (params["W_dec"] * 3.0).at[0].set(0.0)}
    close(jnp.linalg.norm(SPEC.constrain(moved)["W_dec"], axis=1), jnp.ones(N).at[0].set(0.0))


def test_parity_with_torch():
    torch = pytest.importorskip("torch")
    params, x = ({n: torch.tensor(np.asarray(v)) for n, v in PARAMS.items()}, torch.tensor(np.asarray(X)))
    for tensor in params.values():
        tensor.requires_grad_()
    post = torch.relu((x - params["b_dec"]) @ params["W_enc"].T + params["b_enc"])
    kept = post.topk(K, dim=-1)
    code = torch.zeros_like(post).scatter(-1, kept.indices, kept.values)
    y = code @ params["W_dec"] + params["b_dec"]
    loss = (y - x).pow(2).sum(-1).mean()
    loss.backward()
    close(SPEC.dense(SPEC.encode(PARAMS, X)), code.detach().numpy())
    close(SPEC.reconstruct(PARAMS, X), y.detach().numpy())
    close(jax.grad(lambda p: SPEC.loss(p, X)[0])(PARAMS), {n: v.grad.numpy() for n, v in params.items()}, rtol=2e-4)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"d_in": 4, "width": 8, "k": 9}, "k = 9 is more than the 8 latents"),
        ({"d_in": 4, "width": 8, "k": 0}, "k = 0 must be a positive integer"),
        ({"d_in": 4.0, "width": 8, "k": 1}, "d_in = 4.0"),
        ({"d_in": 4, "width": 8, "k": True}, "k = True"),
        ({"d_in": 4, "width": 8, "k": 2, "skip": True}, "give d_out"),
        ({"d_in": 4, "width": 8, "k": 2, "k_aux": 9}, "k_aux = 9"),
    ],
)
def test_mistakes_in_the_description(arguments, says):
    with pytest.raises(UserError, match=says):
        TopK(**arguments)


def test_mistakes_in_the_rows():
    with pytest.raises(UserError, match=r"encode: rows must have 6 entries, got an array of shape \[2, 5\]"):
        SPEC.encode(PARAMS, jnp.zeros((2, 5)))
    with pytest.raises(UserError, match="the sample must be"):
        SPEC.init(jax.random.key(0), jnp.zeros((3, 5)))


def test_default_k_aux_is_half_the_width_of_the_rows():
    assert TopK(64, 512, 4).aux_count == 32 and TopK(64, 16, 4).aux_count == 16 and SPEC.aux_count == 4


# --- the other rules, what is subtracted, Multi-TopK, rows that are normalised, a k that changes

RULE_SPECS = {rule: TopK(D, N, 4, rule=rule) for rule in ("positive", "raw", "magnitude", "groups")}


def numpy_code(spec, pre):
    """The activations by the definition of the rule, one row at a time."""
    code = np.zeros_like(pre)
    for b, row in enumerate(pre):
        if spec.rule == "groups":
            size = spec.width // spec.k
            kept = [g * size + int(np.argmax(row[g * size : (g + 1) * size])) for g in range(spec.k)]
        else:
            kept = np.argsort(-np.abs(row) if spec.rule == "magnitude" else -row, kind="stable")[: spec.k]
        code[b, kept] = row[kept]
    return np.maximum(code, 0) if spec.rule in ("positive", "groups") else code


@pytest.mark.parametrize("spec", RULE_SPECS.values(), ids=RULE_SPECS)
def test_rules_equal_numpy(spec):
    params = {**PARAMS, "b_enc": PARAMS["b_enc"] - 4.0}  # few positive ones, so that the rules differ
    pre = (X - params["b_dec"]) @ params["W_enc"].T + params["b_enc"]
    codes = spec.encode(params, X)
    want = numpy_code(spec, np.asarray(pre))
    close(spec.dense(codes), want)
    assert codes.values.shape == (B, 4)
    if spec.rule in ("raw", "magnitude"):
        assert float(codes.values.min()) < 0
    if spec.rule == "groups":
        np.testing.assert_array_equal(codes.indices // 5, np.tile(np.arange(4), (B, 1)))
    if spec.rule == "magnitude":
        assert np.all(np.diff(np.abs(codes.values), axis=1) <= 0)

    mask = jnp.asarray(numpy_code(dataclasses.replace(spec, rule="raw") if spec.rule == "positive" else spec, np.asarray(pre)) != 0)

    def dense(p):
        pre = (X - p["b_dec"]) @ p["W_enc"].T + p["b_enc"]
        code = jnp.where(mask, jax.nn.relu(pre) if spec.rule in ("positive", "groups") else pre, 0.0)
        return ((X - code @ p["W_dec"] - p["b_dec"]) ** 2).sum() / B

    (loss, parts), gradient = jax.value_and_grad(spec.loss, has_aux=True)(params, X)
    want_loss, want_gradient = jax.value_and_grad(dense)(params)
    close(loss, want_loss)
    close(gradient, want_gradient, rtol=2e-4)
    np.testing.assert_array_equal(parts.fired, (want != 0).sum(axis=0))


@pytest.mark.parametrize("rule", ["raw", "magnitude"])
def test_the_largest_of_negative_activations_is_that_of_the_latents_that_are_not_active(rule):
    spec = TopK(D, N, K, rule=rule)
    params = spec.init(jax.random.key(0))
    codes = spec.encode(params | {"b_enc": params["b_enc"] - 100.0}, jnp.ones((3, D)))
    assert (codes.values < 0).all()
    np.testing.assert_array_equal(codes.largest(), spec.dense(codes).max(axis=1))


def test_ties_of_magnitude_and_groups_go_to_the_lowest_latent():
    params = {**PARAMS, "W_enc": jnp.zeros((N, D)), "b_enc": jnp.where(jnp.arange(N) % 2 == 0, -2.0, 2.0)}
    np.testing.assert_array_equal(RULE_SPECS["magnitude"].encode(params, X).indices, np.tile(np.arange(4), (B, 1)))
    np.testing.assert_array_equal(RULE_SPECS["groups"].encode(params, X).indices, np.tile([1, 5, 11, 15], (B, 1)))


MULTI = TopK(D, N, K, multi_topk=True)


def multi_definition(params, k=K):
    error = [((X - dense_forward(params, X, kept)[2]) ** 2).sum() / B for kept in (k, min(N, 4 * k))]
    return error[0] + error[1] / 8.0


def test_multi_topk_equals_the_definition():
    (loss, parts), gradient = jax.value_and_grad(MULTI.loss, has_aux=True)(PARAMS, X)
    want, want_gradient = jax.value_and_grad(multi_definition)(PARAMS)
    close(loss, want)
    close(gradient, want_gradient, rtol=2e-4)
    close(parts.terms["multi_topk"], parts.measured["multi_topk"] / 8)
    plain = SPEC.loss(PARAMS, X)[1]
    close(parts.terms["reconstruction"], plain.terms["reconstruction"])
    np.testing.assert_array_equal(parts.fired, plain.fired)  # 4 k latents train, k are the code


def test_multi_topk_reaches_encoders_beyond_k():
    """sparsify's fused encoder drops this gradient (reference/sae_libraries.md 1, defect 1): only decoders learn there."""
    params = {**PARAMS, "W_enc": PARAMS["W_enc"] * 0.01, "b_enc": jnp.linspace(10.0, 1.0, N)}  # latents 0..2 are always the first k
    codes = SPEC.encode(params, X)
    assert set(np.unique(codes.indices)) == {0, 1, 2}
    with_multi, without = (jax.grad(lambda p, s=s: s.loss(p, X)[0])(params) for s in (MULTI, SPEC))
    beyond = jnp.arange(4, 9)
    for name in ("W_enc", "b_enc", "W_dec"):
        assert float(jnp.abs(without[name][beyond]).max()) == 0.0, name
        assert float(jnp.abs(with_multi[name][beyond]).max()) > 1e-3, name
    assert float(jnp.abs(with_multi["W_enc"][12:]).max()) == 0.0  # beyond 4 k


SMALLER = {
    "positive": TopK(D, N, 4, k_aux=4),
    "raw": RULE_SPECS["raw"],
    "magnitude": RULE_SPECS["magnitude"],
    "multi_topk": TopK(D, N, 4, multi_topk=True),
    "transcoder": TopK(D, N, 4, d_out=D, skip=True, input_bias=True),
}


@pytest.mark.some(2)
@pytest.mark.parametrize("spec", SMALLER.values(), ids=SMALLER)
def test_a_smaller_k_now_is_that_dictionary_exactly(spec):
    params = {**random_params(spec), "b_enc": random_params(spec)["b_enc"] - 1.0}
    dead = jnp.zeros(N, bool).at[jnp.array([2, 5])].set(True)
    run = jax.jit(lambda p, k: jax.value_and_grad(spec.loss, has_aux=True)(p, X, target=X, dead=dead, settings=LossSettings(k=k)))
    for fewer in (1, 2, 4):
        small = dataclasses.replace(spec, k=fewer)
        (loss, parts), gradient = run(params, jnp.int32(fewer))
        (want, want_parts), want_gradient = jax.value_and_grad(small.loss, has_aux=True)(params, X, target=X, dead=dead)
        close(loss, want, rtol=1e-6)
        close(gradient, want_gradient, rtol=1e-5)
        close(parts.terms, want_parts.terms, rtol=2e-6)
        np.testing.assert_array_equal(parts.fired, want_parts.fired)
        np.testing.assert_array_equal(parts.l0, want_parts.l0)
    assert run._cache_size() == 1


def test_groups_have_no_smaller_k():
    with pytest.raises(UserError, match="settings.k does not go with the rule 'groups'"):
        RULE_SPECS["groups"].loss(PARAMS, X, settings=LossSettings(k=2))


SHIFTED = {
    "b_dec not subtracted": TopK(D, N, K, k_aux=4, subtract=False),
    "input bias": TopK(D, N, K, k_aux=4, d_out=4, input_bias=True),
    "nothing subtracted": TopK(D, N, K, k_aux=4, d_out=4),
}


@pytest.mark.parametrize("n_dead", [2, 9], ids=["fewer than k_aux", "more than k_aux"])
@pytest.mark.parametrize("spec", SHIFTED.values(), ids=SHIFTED)
def test_what_is_subtracted_before_encoding(spec, n_dead):
    params, target = random_params(spec), X if spec.d_out is None else draw(5, B, 4)
    dead = jnp.zeros(N, bool).at[jnp.arange(n_dead) * 2].set(True)

    def dense(p):
        pre = (X - p["b_in"] if spec.input_bias else X) @ p["W_enc"].T + p["b_enc"]
        code = jnp.maximum(pre, 0.0) * jax.nn.one_hot(jax.lax.top_k(pre, K)[1], N).sum(axis=1)
        error = target - code @ p["W_dec"] - p["b_dec"]
        residual = jax.lax.stop_gradient(error)
        chosen = jax.nn.one_hot(jax.lax.top_k(jnp.where(dead, pre, -jnp.inf), min(4, n_dead))[1], N).sum(axis=1)
        aux = ((residual - (pre * chosen) @ p["W_dec"]) ** 2).sum() / ((residual - residual.mean(axis=0)) ** 2).sum()
        return (error**2).sum() / B + 0.7 * min(1.0, n_dead / 4) * aux

    loss, gradient = jax.value_and_grad(lambda p: spec.loss(p, X, target=target, dead=dead, settings=LossSettings(aux=0.7))[0])(params)
    want, want_gradient = jax.value_and_grad(dense)(params)
    close(loss, want)
    close(gradient, want_gradient, rtol=3e-4)
    if spec.input_bias:
        assert float(jnp.abs(gradient["b_in"]).max()) > 1e-3


def formula(x, kind):
    """Normalised rows, the factor and the offset that undo it (reference/sae_libraries.md 8)."""
    x = np.asarray(x, np.float64)
    if kind == "unit_rms":
        norm = np.sqrt((x**2).sum(axis=1, keepdims=True))
        return x / norm * np.sqrt(D), norm / np.sqrt(D), np.zeros_like(norm)
    mean, std = x.mean(axis=1, keepdims=True), x.std(axis=1, ddof=1, keepdims=True)
    return (x - mean) / (std + 1e-5), std, mean


@pytest.mark.parametrize("kind", ["layer_norm", "unit_rms"])
def test_normalised_rows_equal_the_formula(kind):
    spec, rows = TopK(D, N, K, row_norm=kind), 30.0 * X + 7.0
    normal, scale, offset = (jnp.asarray(a, jnp.float32) for a in formula(rows, kind))
    _, code, y = dense_forward(PARAMS, normal)
    close(spec.dense(spec.encode(PARAMS, rows)), code, rtol=2e-4)
    close(spec.reconstruct(PARAMS, rows), y * scale + offset, rtol=3e-4)
    close(spec.loss(PARAMS, rows)[0], ((normal - y) ** 2).sum() / B, rtol=2e-4)
    with pytest.raises(UserError, match="needs the input as well"):
        spec.decode(PARAMS, spec.encode(PARAMS, rows))
    # a transcoder's target is brought to the units of its normalised input
    coder = TopK(D, N, K, d_out=4, skip=True, row_norm=kind)
    params, target = random_params(coder), draw(5, B, 4) * 20.0
    _, _, y = dense_forward(params, normal, subtract=False, skip=True)
    close(coder.reconstruct(params, rows), y * scale + offset, rtol=3e-4)
    close(coder.loss(params, rows, target=target)[0], (((target - offset) / scale - y) ** 2).sum() / B, rtol=3e-4)


def test_auxk_holds_no_array_of_all_rows_and_latents_by_anything():
    """With AuxK, at most three [B, N] products appear (encoder; the branch for many dead latents), and memory stays at a few of them."""
    b, n = 64, 512
    spec = TopK(D, n, 4, k_aux=4)
    params, x = random_params(spec), draw(1, b, D)
    run = jax.jit(jax.value_and_grad(lambda p, dead: spec.loss(p, x, dead=dead), has_aux=True))
    lowered = run.lower(params, jnp.zeros(n, bool))  # for this platform: a jaxpr holds what others would run as well
    lines = lowered.as_text(dialect="hlo").splitlines()
    assert 1 <= len([line for line in lines if " dot(" in line and f"= f32[{b},{n}]" in line]) <= 3
    assert not [line for line in lines if f"[{b},{n}," in line]  # tests of the kernels look for [B, k, D]
    held = lowered.compile().memory_analysis().temp_size_in_bytes
    assert held < 6 * b * n * 4, held


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"rule": "largest"}, "rule 'largest' is not known"),
        ({"rule": "groups"}, "k = 3 must divide width = 20"),
        ({"rule": "raw", "multi_topk": True}, "multi_topk goes with the rule 'positive'"),
        ({"input_bias": True}, "input_bias=True belongs to a transcoder"),
        ({"row_norm": "batch"}, "row_norm 'batch' is not known"),
    ],
)
def test_mistakes_in_the_rules(arguments, says):
    with pytest.raises(UserError, match=says):
        TopK(D, N, K, **arguments)


@pytest.mark.parametrize("spec", [TopK(D, N, K, selection="bfloat16"), BatchTopK(D, N, K, selection="bfloat16")])
def test_bf16_selection_keeps_float32_values(spec):
    params, x = random_params(spec), draw(1, B, D)
    codes = spec.encode(params, x, train=True)
    pre = (x - params["b_dec"]) @ params["W_enc"].T + params["b_enc"]
    kept = codes.dense(N)
    close(kept, jnp.where(kept > 0, pre, 0.0))
    gradient = jax.grad(lambda p: spec.loss(p, x)[0])(params)
    assert all(bool(jnp.isfinite(g).all()) and bool((g != 0).any()) for name, g in gradient.items() if name != "threshold")


def test_mistakes_in_the_selection():
    with pytest.raises(UserError, match="selection 'float16' is not known: one of float32, bfloat16"):
        TopK(D, N, K, selection="float16")
    with pytest.raises(UserError, match="goes with the rules 'positive' and 'raw', not 'magnitude'"):
        TopK(D, N, K, selection="bfloat16", rule="magnitude")
