"""The covariance term in strips against the formula with the whole matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlmscope_jax.kernels import covariance, offdiagonal_covariance


def draw(n, width, p=0.3, seed=0):
    return (np.random.default_rng(seed).random((n, width)) < p).astype(np.float32)


def closed_form(codes):
    """Value and gradient in float64; a covariance of exactly 0 has slope 0, as in torch."""
    codes = codes.astype(np.float64)
    n = len(codes)
    centred = codes - codes.mean(axis=0)
    c = centred.T @ centred / (n - 1)
    np.fill_diagonal(c, 0.0)
    return np.abs(c).sum(), 2 / (n - 1) * centred @ np.where(np.abs(c) < 1e-12, 0.0, np.sign(c))


@pytest.mark.some(6)
@pytest.mark.parametrize(
    ("n", "width", "block"),
    [(32, 48, 16), (37, 48, 16), (32, 50, 16), (37, 61, 8), (5, 7, 512), (64, 33, 33), (9, 40, 20), (2, 12, 4), (40, 5, 1)],
    ids=str,
)
@pytest.mark.parametrize("p", [0.5, 0.04])
def test_value_and_gradient_equal_the_dense_formula(n, width, block, p):
    codes = draw(n, width, p, seed=n + width)
    value, gradient = jax.value_and_grad(lambda x: offdiagonal_covariance(x, block))(jnp.asarray(codes))
    want, want_gradient = closed_form(codes)
    np.testing.assert_allclose(value, want, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(gradient, want_gradient, rtol=1e-5, atol=1e-6 * np.abs(want_gradient).max() + 1e-12)
    np.testing.assert_allclose(offdiagonal_covariance(jnp.asarray(codes), block), want, rtol=1e-5, atol=1e-7)  # without gradient
    scaled = jax.grad(lambda x: 3.0 * offdiagonal_covariance(x, block))(jnp.asarray(codes))
    np.testing.assert_allclose(scaled, 3 * gradient, rtol=1e-6)


def test_equals_torch_autograd_through_torch_cov():
    torch = pytest.importorskip("torch")
    codes = draw(31, 40, 0.4, seed=3)
    x = torch.tensor(codes, dtype=torch.float64, requires_grad=True)
    c = torch.cov(x.T)
    q = c.abs().sum() - c.diagonal().abs().sum()
    q.backward()
    value, gradient = jax.value_and_grad(lambda a: offdiagonal_covariance(a, 16))(jnp.asarray(codes))
    np.testing.assert_allclose(value, q.item(), rtol=1e-5)
    near_zero = (c.abs() < 1e-12).any(dim=1).numpy()  # float64 rounds these to either side of 0
    np.testing.assert_allclose(np.asarray(gradient)[:, ~near_zero], x.grad.numpy()[:, ~near_zero], rtol=1e-4, atol=1e-7)
    assert (~near_zero).sum() > 20


def test_exact_zeros_have_no_slope():
    """Two bits that are independent in the batch to the last count; a rounded mean would push them one way or the other."""
    codes = np.zeros((6, 3), np.float32)
    codes[:3, 0] = 1
    codes[[0, 1, 3, 4], 1] = 1  # half and two thirds: 6 * 2 = 3 * 4
    assert float(jnp.abs(jax.grad(offdiagonal_covariance)(jnp.asarray(codes))).max()) == 0.0
    assert float(offdiagonal_covariance(jnp.asarray(codes))) == 0.0


def test_two_equal_bits():
    n = 512
    codes = np.zeros((n, 90), np.float32)
    codes[: n // 2, 3] = codes[: n // 2, 70] = 1
    np.testing.assert_allclose(offdiagonal_covariance(jnp.asarray(codes), 16), 2 * (n / (n - 1)) * 0.25, rtol=1e-6)


@pytest.mark.parametrize(("p", "want"), [(0.5, 9235.0), (0.1, 3324.0)])
def test_independent_bits_give_sampling_noise(p, want):
    """E[Q] = sqrt(2 / pi) p (1 - p) N (N - 1) / sqrt(n) (reference/binary_autoencoder.md 1.3)."""
    got = float(offdiagonal_covariance(jnp.asarray(draw(512, 1024, p, seed=1))))
    np.testing.assert_allclose(np.sqrt(2 / np.pi) * p * (1 - p) * 1024 * 1023 / np.sqrt(512), want, rtol=2e-3)
    np.testing.assert_allclose(got, want, rtol=0.02)


def test_one_row_and_constant_bits():
    for codes in (draw(1, 20), np.zeros((8, 20), np.float32), np.ones((8, 20), np.float32)):
        value, gradient = jax.value_and_grad(offdiagonal_covariance)(jnp.asarray(codes))
        assert float(value) == 0.0 and float(jnp.abs(gradient).max()) == 0.0
    value, gradient = jax.value_and_grad(offdiagonal_covariance)(jnp.asarray([[0.0, 1.0], [1.0, 0.0]]))
    np.testing.assert_allclose(value, 1.0)
    np.testing.assert_allclose(gradient, [[-1.0, 1.0], [1.0, -1.0]])


def test_no_array_of_width_times_width():
    """d' = 16,384 as the issue asks: compiled, not run. The dense formula would need 1 GiB for the covariance alone."""
    n, width = 64, 16_384
    shape = jax.ShapeDtypeStruct((n, width), jnp.float32)
    for program in (offdiagonal_covariance, jax.value_and_grad(offdiagonal_covariance)):
        compiled = jax.jit(program).lower(shape).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < width * width * 4 / 8
        assert f"{width},{width}" not in compiled.as_text()


def test_factors_of_accelerators_are_exact(monkeypatch):
    codes = draw(300, 40, 0.5)
    monkeypatch.setattr(covariance, "_factor_dtype", lambda: jnp.dtype(jnp.bfloat16))
    value, gradient = jax.value_and_grad(lambda x: offdiagonal_covariance(x, 8))(jnp.asarray(codes))
    want, want_gradient = closed_form(codes)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    np.testing.assert_allclose(gradient, want_gradient, rtol=1e-5, atol=1e-6 * np.abs(want_gradient).max())


def test_several_at_once():
    codes = jnp.asarray(np.stack([draw(16, 24, seed=s) for s in (0, 1, 2)]))
    together = jax.vmap(jax.value_and_grad(lambda x: offdiagonal_covariance(x, 8)))(codes)
    for i in range(3):
        want, want_gradient = closed_form(np.asarray(codes[i]))
        np.testing.assert_allclose(together[0][i], want, rtol=1e-5)
        np.testing.assert_allclose(together[1][i], want_gradient, rtol=1e-5, atol=1e-7)


DIVIDED = """
    import jax, jax.numpy as jnp, numpy as np, sys
    from jax.sharding import Mesh, PartitionSpec as P
    sys.path.insert(0, "tests/kernels")
    from programs import collectives
    from dlmscope_jax.kernels import offdiagonal_covariance
    from dlmscope_jax.kernels.axes import ALONE, Axes

    jax.config.update("jax_numpy_dtype_promotion", "strict")
    rng, axes = np.random.default_rng(0), Axes(("data",), "model")

    def over(data, model, block, axes=axes):
        mesh = Mesh(np.array(jax.devices()[: data * model]).reshape(data, model), ("data", "model"))
        run = jax.value_and_grad(lambda x: 3.0 * offdiagonal_covariance(x, block, axes))
        spec = P("data", "model")
        return jax.jit(jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=(P(), spec), check_vma=False))

    for data, model, n, width, block in ((1, 1, 9, 20, 8), (2, 2, 12, 26, 5), (4, 2, 24, 34, 512), (2, 4, 10, 52, 4), (1, 8, 16, 40, 2)):
        codes = (rng.random((n, width)) < 0.4).astype(np.float32)
        codes[:, 1], codes[:, -1] = codes[:, 0], 1 - codes[:, 0]  # the same, and the opposite, on the first and on the last shard
        value, gradient = over(data, model, block)(codes)
        want, want_gradient = jax.value_and_grad(lambda x: 3.0 * offdiagonal_covariance(x, 8))(jnp.asarray(codes))
        np.testing.assert_allclose(value, want, rtol=1e-6)
        np.testing.assert_allclose(gradient, want_gradient, rtol=1e-5, atol=2e-6 * np.abs(want_gradient).max())

    independent = np.zeros((6, 4), np.float32)  # a covariance of 0 to the last count has no slope, across shards as well
    independent[:3, 0], independent[[0, 1, 3, 4], 2] = 1, 1
    for value in over(2, 2, 8)(independent):
        assert float(jnp.abs(value).max()) == 0.0

    # rows of a part fill 3 bytes but for 5 bits
    data, model, n, width = 2, 4, 19, 257
    moved = collectives(over(data, model, 64).lower(jax.ShapeDtypeStruct((data * n, model * width), jnp.float32)).compile().as_text())
    assert sorted((c.op, c.operand_bytes * c.trips) for c in moved) == [
        ("all-gather", width * 3), ("all-reduce", 4), ("collective-permute", 3 * width * 3 * data),
    ], moved
"""


def test_over_devices_only_bits_move(run_with_devices):
    run_with_devices(DIVIDED, 8)
