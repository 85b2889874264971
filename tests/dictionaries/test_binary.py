"""Binary autoencoders against the dense definition, and the test vectors of reference/binary_autoencoder.md, section 5."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlmscope_jax.dictionaries import Binary, Bits, Dense, LossSettings
from dlmscope_jax.dictionaries.entropy import batch_entropy, burstiness, marginal_entropy
from dlmscope_jax.dictionaries.packed import load_bits, pack_bits, save_bits, unpack_bits
from dlmscope_jax.errors import UserError

D, N, B = 6, 20, 11
SPEC = Binary(D, N)
PAPER = Binary(D, N, follows="paper")
CODER = Binary(D, N, d_out=4, skip=True, input_bias=True)
SETTINGS = LossSettings(entropy=0.02, covariance=0.003)


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def random_params(spec, seed=0):
    return {name: draw(seed + i, *shape) for i, (name, shape) in enumerate(sorted(spec.shapes().items()))}


X = draw(9, B, D)


def close(got, want, rtol=3e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=3e-6), got, want)


# --- the definition, every matrix written out, and the step as "hard value plus soft gradient"


def estimated(estimator, pre, t):
    """A function of the pre-activations whose gradient is the estimator's."""
    held = jax.lax.stop_gradient(pre)
    slopes = {
        "identity": jnp.ones_like(held),
        "sigmoid": jax.nn.sigmoid(held / t) * (1 - jax.nn.sigmoid(held / t)),
        "rectangle": jnp.where(jnp.abs(held) < t / 2, 1 / t, 0.0),
        "x_times_1mx": held * (1 - held),
    }
    soft = pre * slopes[estimator]
    return soft - jax.lax.stop_gradient(soft)


def definition_of_bits(bits):
    """(entropy, covariance) of a batch, with the whole matrix and |.| that is flat at 0."""
    n = bits.shape[0]
    p = bits.mean(axis=0)
    held = jax.lax.stop_gradient(p)
    inside = jnp.where((held > 0) & (held < 1), p, 0.5)  # constants have no entropy; their slope is tested by itself
    entropy = jnp.where((held > 0) & (held < 1), -(inside * jnp.log2(inside) + (1 - inside) * jnp.log2(1 - inside)), 0.0).sum()
    centred = bits - p
    c = centred.T @ centred / (n - 1)
    c = c * (1 - jnp.eye(c.shape[0]))
    return entropy, (c * jax.lax.stop_gradient(jnp.where(jnp.abs(c) < 1e-6, 0.0, jnp.sign(c)))).sum()


def definition(spec, params, x, target, settings):
    shift = params["b_in"] if spec.input_bias else 0.0
    pre = (x - shift) @ params["W_enc"].T + (params["b_enc"] if spec.follows == "code" else 0.0)
    bits = (pre > 0).astype(jnp.float32) + estimated(spec.estimator, pre, spec.temperature)
    y = bits @ params["W_dec"] + params["b_dec"] + (x @ params["W_skip"].T if spec.skip else 0.0)
    squares = (target - y) ** 2
    entropy, covariance = definition_of_bits(bits)
    reconstruction = squares.mean() if spec.follows == "code" else squares.sum(axis=1).mean()
    return reconstruction + settings.entropy * entropy + settings.covariance * covariance


CASES = {
    "identity": SPEC,
    "paper": PAPER,
    "sigmoid": Binary(D, N, estimator="sigmoid", temperature=2.0),
    "rectangle": Binary(D, N, estimator="rectangle", temperature=3.0),
    "paper letter by letter": Binary(D, N, estimator="x_times_1mx", follows="paper"),
    "skip transcoder": CODER,
}


@pytest.mark.some(3)
@pytest.mark.parametrize("spec", CASES.values(), ids=CASES)
def test_loss_and_gradient_equal_the_definition(spec):
    params, target = random_params(spec), draw(10, B, spec.out) if spec.transcoder else X
    if "b_enc" in params:  # bits that are constant would compare nothing
        params["b_enc"] = 0.5 * params["b_enc"]
    given = target if spec.transcoder else None
    run = jax.jit(jax.value_and_grad(lambda p, s: spec.loss(p, X, given, settings=s), has_aux=True))
    (loss, parts), gradient = run(params, SETTINGS)
    live = parts.fired > 0  # the 1e-10 of the released loss counts where bits are constant
    want, want_gradient = jax.value_and_grad(lambda p: definition(spec, p, X, target, SETTINGS))(params)
    close(loss, want)
    close(sum(parts.terms.values()), loss)
    assert int(live.sum()) > N / 2
    for name, value in gradient.items():
        per_latent = name in ("W_enc", "b_enc", "W_dec")
        if name == "b_in":  # the sum over latents, constant ones too
            continue
        close(value[live] if per_latent else value, want_gradient[name][live] if per_latent else want_gradient[name], rtol=3e-4)


def test_the_released_gradient_acts_on_the_sum_of_the_three():
    """g (1 - g) is not linear: applied to each term's share it would give something else."""
    spec = dataclasses.replace(SPEC, estimator="g_times_1mg")
    params = random_params(spec)
    settings = LossSettings(entropy=0.5, covariance=0.2)
    _, pull = jax.vjp(lambda p: (spec.encode(p, X, train=True).values,), params)
    bits = spec.encode(params, X, train=True).values

    def after(b):
        error = jnp.square(X - b @ params["W_dec"] - params["b_dec"]).mean()
        return error + settings.entropy * batch_entropy(b) + settings.covariance * definition_of_bits(b)[1]

    g = np.asarray(jax.grad(after)(bits), np.float64)
    want = (g * (1 - g)).T @ np.asarray(X, np.float64)
    got = jax.grad(lambda p: spec.loss(p, X, settings=settings)[0])(params)["W_enc"]
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-6)
    assert np.abs(want - g.T @ np.asarray(X)).max() > 1e-3  # and it is not the identity here


def test_what_is_decoded_and_what_is_reported():
    params = random_params(SPEC)
    codes = SPEC.encode(params, X)
    pre = X @ params["W_enc"].T + params["b_enc"]
    assert isinstance(codes, Bits) and codes.values.dtype == bool
    np.testing.assert_array_equal(codes.values, pre > 0)
    close(SPEC.decode(params, codes), (pre > 0).astype(jnp.float32) @ params["W_dec"] + params["b_dec"])
    close(SPEC.reconstruct(params, X.reshape(1, B, D))[0], SPEC.decode(params, Dense(codes.dense(N))))
    _, parts = SPEC.loss(params, X, settings=SETTINGS)
    ones = np.asarray(pre > 0).sum(axis=0)
    assert (ones > B / 2).any()
    np.testing.assert_array_equal(parts.fired, np.minimum(ones, B - ones))  # the rarer value
    close(parts.l0, np.minimum(ones, B - ones).sum() / B)
    close(parts.terms["entropy"], 0.02 * parts.measured["entropy"])
    close(parts.terms["covariance"], 0.003 * parts.measured["covariance"])


def test_bits_answer_what_dense_codes_answer():
    values = np.random.default_rng(0).random((2, 5, N)) < 0.4
    values[0, 0] = False
    bits, dense = Bits(jnp.asarray(values)), Dense(jnp.asarray(values, jnp.float32))
    valid = jnp.asarray([[True, False, True, True, False], [True] * 5])
    for question in (
        lambda c: c.latent(3), lambda c: jax.jit(type(c).latent)(c, jnp.int32(4)), lambda c: c.count(), lambda c: c.fired(N),
        lambda c: c.fired(N, valid), lambda c: c.largest(), lambda c: c.dense(N),
    ):  # fmt: skip
        got, want = question(bits), question(dense)
        assert got.dtype == want.dtype and got.shape == want.shape
        np.testing.assert_array_equal(got, want)


def test_the_switch_between_code_and_paper():
    assert "b_enc" in SPEC.shapes() and "b_enc" not in PAPER.shapes()
    params = random_params(PAPER)
    zero = jnp.zeros((1, D))
    assert int(PAPER.encode(params, zero).count()[0]) == N  # 1 at exactly 0
    assert int(SPEC.encode(params | {"b_enc": jnp.zeros(N)}, zero).count()[0]) == 0
    both = [s.loss(params | {"b_enc": jnp.zeros(N)}, X)[0] for s in (SPEC, PAPER)]
    close(both[1], D * both[0])


def test_starts_as_torch_linear_does():
    spec = Binary(64, 256)
    params = spec.init(jax.random.key(0))
    for name, bound in (("W_enc", 1 / 8), ("b_enc", 1 / 8), ("W_dec", 1 / 16), ("b_dec", 1 / 16)):
        largest = float(jnp.abs(params[name]).max())
        assert 0.9 * bound < largest <= bound, name
        assert abs(float(params[name].mean())) < 0.2 * bound
    np.testing.assert_allclose(jnp.std(params["W_enc"]), 1 / 8 / np.sqrt(3), rtol=0.02)
    assert not np.array_equal(params["W_enc"], params["W_dec"])
    assert {n: v.shape for n, v in CODER.init(jax.random.key(0)).items()} == CODER.shapes()
    with pytest.raises(UserError, match=r"the sample must be \[rows, 64\]"):
        spec.init(jax.random.key(0), sample=jnp.zeros((4, 3)))
    assert not spec.unit_decoder and not spec.subtract


@pytest.mark.parametrize("bits", [2, 4])
def test_more_bits_keep_support_entropy_and_covariance(bits):
    spec = Binary(D, N, bits=bits)
    params = random_params(spec)
    codes, one = spec.encode(params, X), SPEC.encode(params, X)
    np.testing.assert_array_equal(codes.values > 0, one.values)
    levels = np.unique(np.asarray(codes.values) * (2**bits - 1))
    np.testing.assert_allclose(levels, np.round(levels), atol=1e-5)
    assert 2 < len(levels) <= 2**bits
    ours, theirs = spec.loss(params, X)[1].measured, SPEC.loss(params, X)[1].measured
    assert ours == theirs
    y = codes.values @ params["W_dec"] + params["b_dec"]
    close(spec.loss(params, X)[0], jnp.square(X - y).mean())
    # straight through: with entropy and covariance off, the gradient is that of "values = pre-activations" at these values
    residual = X - y
    g = -2 * residual @ params["W_dec"].T / (B * D)
    close(jax.grad(lambda p: spec.loss(p, X)[0])(params)["W_enc"], g.T @ X, rtol=2e-4)


def test_few_rows():
    params = random_params(SPEC)
    for n in (1, 2):
        (loss, parts), gradient = jax.value_and_grad(lambda p, x: SPEC.loss(p, x, settings=SETTINGS), has_aux=True)(params, X[:n])
        assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves((loss, gradient))), n
        if n == 1:
            assert float(parts.measured["covariance"]) == 0.0 and abs(float(parts.measured["entropy"])) < 1e-6


def test_weights_may_change_without_a_new_program():
    traces = []

    @jax.jit
    def run(params, settings):
        traces.append(1)
        return jax.value_and_grad(lambda p: SPEC.loss(p, X, settings=settings)[0])(params)

    params = random_params(SPEC)
    off, on = run(params, LossSettings(entropy=jnp.float32(0), covariance=jnp.float32(0))), run(params, SETTINGS)
    run(params, LossSettings(entropy=jnp.float32(1), covariance=jnp.float32(0)))
    assert len(traces) == 2  # Python numbers and arrays differ in weak type, values do not count
    plain = jax.grad(lambda p: jnp.square(X - Dense(SPEC.encode(p, X, train=True).values).values @ p["W_dec"] - p["b_dec"]).mean())
    close(off[1], plain(params))
    assert float(on[0]) > float(off[0])


# --- entropy


def test_entropy_of_constant_and_of_even_bits():
    """Compiled: as 1 - p + 1e-10, XLA adds the constants, and a bit that is always 1 has entropy NaN."""
    run = jax.jit(jax.value_and_grad(batch_entropy))
    for constant in (jnp.zeros((512, N)), jnp.ones((512, N))):
        value, gradient = run(constant)
        assert abs(float(value)) < 1e-4 and bool(jnp.isfinite(gradient).all())
    even = jnp.tile(jnp.asarray([[0.0], [1.0]]), (4, N))
    np.testing.assert_allclose(run(even)[0], N, rtol=1e-6)


@pytest.mark.parametrize(
    ("ones", "rows", "slope"),
    [(0, 512, 34.66), (1, 512, 9.00), (10, 1000, 6.63), (100, 1000, 3.17), (500, 1000, 0.0), (900, 1000, -3.17), (512, 512, -34.66)],
)
def test_slope_of_the_entropy(ones, rows, slope):
    """dH/dp (section 1.3's table): each row's share of it is 1 / n."""
    bits = (jnp.arange(rows) < ones).astype(jnp.float32)[:, None]
    gradient = np.asarray(jax.jit(jax.grad(batch_entropy))(bits)) * rows
    np.testing.assert_allclose(gradient, slope, atol=0.006)


def test_entropy_equals_the_released_formula_in_torch():
    torch = pytest.importorskip("torch")
    bits = np.random.default_rng(0).random((50, 8)) < np.linspace(0.02, 0.98, 8)
    x = torch.tensor(bits, dtype=torch.float64, requires_grad=True)
    p = x.mean(dim=0)
    h = -(p * torch.log2(p + 1e-10) + (1 - p) * torch.log2(1 - p + 1e-10)).sum()
    h.backward()
    value, gradient = jax.value_and_grad(batch_entropy)(jnp.asarray(bits, jnp.float32))
    np.testing.assert_allclose(value, h.item(), rtol=1e-5)
    np.testing.assert_allclose(gradient, x.grad.numpy(), rtol=1e-4, atol=1e-6)


def test_entropy_of_a_full_set_is_corrected_for_its_size():
    rng = np.random.default_rng(0)
    p = np.array([0.5, 0.2, 0.1])
    truth = -(p * np.log2(p) + (1 - p) * np.log2(1 - p)).sum()
    drawn = [marginal_entropy(np.append(rng.binomial(100, p), [0, 100]), 100) for _ in range(4000)]
    error = {name: np.mean([d[name] for d in drawn]) - truth for name in ("plug_in", "bits")}
    np.testing.assert_allclose(error["plug_in"], -3 / (200 * np.log(2)), rtol=0.1)
    assert abs(error["bits"]) < 0.15 * abs(error["plug_in"])
    assert {d["live"] for d in drawn} == {3}  # constant bits get no correction
    assert marginal_entropy(np.array([0, 7]), 7)["bits"] == 0.0
    with pytest.raises(UserError, match="between 0 and the number of rows, got rows = 3"):
        marginal_entropy(np.array([4]), 3)
    with pytest.raises(UserError, match="rows = 0"):
        marginal_entropy(np.array([0]), 0)


# --- units, files, mistakes


@pytest.mark.parametrize("spec", [SPEC, PAPER, CODER, Binary(D, N, subtract=True), Binary(D, N, bits=3)], ids=str)
def test_fold_keeps_the_bits_and_scales_the_output(spec):
    params, scale, out_scale = random_params(spec), 7.0, 3.0 if spec.transcoder else 7.0
    folded = spec.fold(params, scale, out_scale)
    np.testing.assert_array_equal(spec.encode(folded, scale * X).values, spec.encode(params, X).values)
    close(spec.reconstruct(folded, scale * X), out_scale * spec.reconstruct(params, X))
    close(spec.unfold(folded, scale, out_scale), params)


def test_a_dictionary_that_normalises_rows_needs_no_folding():
    spec = Binary(D, N, row_norm="unit_rms")
    params = random_params(spec)
    close(spec.reconstruct(spec.fold(params, 7.0), 7.0 * X), 7.0 * spec.reconstruct(params, X))


def test_packed_bits(tmp_path):
    values = np.random.default_rng(0).random((7, 13)) < 0.5
    packed = pack_bits(values)
    assert packed.shape == (7, 2) and packed.dtype == np.uint8
    np.testing.assert_array_equal(unpack_bits(packed, 13), values)
    assert packed[0, 0] == sum(int(values[0, i]) << i for i in range(8))
    path = tmp_path / "codes.bits"
    save_bits(path, values)
    assert path.stat().st_size < 14 + 300
    np.testing.assert_array_equal(load_bits(path), values)
    save_bits(path, np.zeros((0, 5), bool))
    assert load_bits(path).shape == (0, 5)


def test_damaged_packed_bits_are_refused(tmp_path):
    path = tmp_path / "codes.bits"
    save_bits(path, np.ones((40, 20), bool))
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:-3] + bytes([whole[-3] ^ 4]) + whole[-2:], b"", b"no codes", whole + b"0"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="codes.bits"):
            load_bits(path)
    with pytest.raises(UserError, match="no such file"):
        load_bits(tmp_path / "absent")
    with pytest.raises(UserError, match=r"\[rows, width\] bool"):
        save_bits(path, np.ones((3, 3)))
    with pytest.raises(UserError, match=r"13 latents are 2 bytes a row, got \(7, 3\)"):
        unpack_bits(np.zeros((7, 3), np.uint8), 13)


def test_mistakes():
    for given, message in (
        ({"estimator": "sign"}, "estimator 'sign' is not known: one of identity"),
        ({"temperature": 0.0}, "temperature = 0.0 must be above 0"),
        ({"bits": 17}, "bits = 17 must be at most 16"),
        ({"bits": 0}, "bits = 0 must be a positive integer"),
        ({"follows": "both"}, "follows = 'both' must be 'code' or 'paper'"),
    ):
        with pytest.raises(UserError, match=message):
            Binary(D, N, **given)
    with pytest.raises(UserError, match="give target"):
        CODER.loss(random_params(CODER), X)


def test_burstiness_orders_as_the_distance_from_the_mean():
    """Parity vector 6: and a 0 where 1 is usual counts as much as a 1 where 0 is."""
    rng = np.random.default_rng(3)
    prior = rng.permutation(np.linspace(0.01, 0.98, 40)).astype(np.float32)
    bits = jnp.asarray(rng.random((9, 40)) < prior)
    found = np.asarray(burstiness(bits, jnp.asarray(prior)))
    np.testing.assert_array_equal(np.argsort(-found, kind="stable"), np.argsort(-np.abs(np.asarray(bits) - prior), kind="stable"))
    rare = burstiness(jnp.asarray([[True, False]]), jnp.asarray([0.25, 0.75]))
    np.testing.assert_allclose(rare, np.full((1, 2), np.log2(0.75)), rtol=1e-5)
    assert np.isfinite(np.asarray(burstiness(jnp.asarray([True]), jnp.ones(1)))).all()
