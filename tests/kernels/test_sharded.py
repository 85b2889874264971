"""A TopK dictionary with its latents divided over devices: equal to one device, and what it moves between them is small."""

SETUP = """
import jax, jax.numpy as jnp, numpy as np, sys
from functools import partial
from jax.sharding import AxisType, Mesh, PartitionSpec as P
from dlmscope_jax import kernels
from dlmscope_jax.errors import UserError
from dlmscope_jax.kernels.axes import shared, summed
from dlmscope_jax.kernels.sparse_matmul.sharded import decode, encode_topk
from dlmscope_jax.kernels.topk.sharded import among_shards, topk
sys.path.insert(0, "tests/kernels")
from programs import collectives, moved
jax.config.update("jax_numpy_dtype_promotion", "strict")
rng = np.random.default_rng(0)
draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)

def mesh_of(data, model):
    return Mesh(np.array(jax.devices()[: data * model]).reshape(data, model), ("data", "model"), axis_types=(AxisType.Auto,) * 2)

def sharded(f, mesh, ins, outs, check=False):
    return jax.jit(jax.shard_map(f, mesh=mesh, in_specs=ins, out_specs=outs, check_vma=check))
"""


def test_selection_equals_that_of_one_device(run_with_devices):
    """Ties within and across shards, NaN, infinities and signed zeros, k above a shard's width, half precision."""
    run_with_devices(
        SETUP
        + """
special = np.array([0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, -np.nan, 3.5], np.float32)
for data, model in ((1, 1), (1, 2), (2, 2), (1, 4)):
    mesh = mesh_of(data, model)
    for n, k, dtype in ((13, 5, "float32"), (7, 7 * model, "float32"), (5, 5 * model - 1, "bfloat16"), (13, 1, "bfloat16")):
        whole = sharded(lambda x: topk(x, k, "model"), mesh, P("data", "model"), P("data"))
        winners = lambda x: among_shards(kernels.topk(x, min(k, n))[0], k, "model")
        mine = sharded(winners, mesh, P("data", "model"), P("data", "model"))
        for x in (rng.normal(size=(6, n * model)), rng.integers(-1, 2, (6, n * model)), special[rng.integers(0, 9, (6, n * model))]):
            x = jnp.asarray(x, dtype)
            values, indices = whole(x)
            want_values, want = jax.lax.top_k(x, k)
            np.testing.assert_array_equal(indices, want)
            assert values.dtype == x.dtype
            np.testing.assert_array_equal(np.signbit(np.float32(values)), np.signbit(np.float32(want_values)))
            np.testing.assert_array_equal(np.float32(values), np.float32(want_values))
            won = np.asarray(mine(x)).reshape(6, model, -1)
            np.testing.assert_array_equal(won.sum(2), np.stack([(np.asarray(want) // n == s).sum(1) for s in range(model)], 1))
            assert (np.diff(won.astype(int), axis=2) <= 0).all()
try:
    sharded(lambda x: topk(x, 9, "model"), mesh_of(1, 4), P("data", "model"), P("data"))(jnp.zeros((1, 8)))
except UserError as error:
    assert "between 1 and the 8" in str(error)
else:
    raise AssertionError
""",
        n_devices=4,
    )


DICTIONARY = """
B, D, K = 6, 5, 4
SPECS = {"W_enc": P("model"), "b_enc": P("model"), "W_dec": P("model"), "b_dec": P()}

def one_device(params, x, subtract):
    shift = params["b_dec"] if subtract else None
    pre = jax.lax.stop_gradient(kernels.preactivations(x, params["W_enc"], params["b_enc"], shift))
    values, indices = kernels.topk(pre, K)
    values = kernels.with_encoder_gradient(values, indices, x, params["W_enc"], params["b_enc"], shift)
    return kernels.decode(jax.nn.relu(values), indices, params["W_dec"]) + params["b_dec"]

def over_shards(params, x, subtract):
    params = {name: shared(leaf, "data") for name, leaf in params.items()}
    values, indices = encode_topk(x, params["W_enc"], params["b_enc"], params["b_dec"] if subtract else None, K, "model")
    return decode(jax.nn.relu(values), indices, params["W_dec"], "model") + params["b_dec"]

def loss(forward, params, x, target, total=lambda s: s):
    return total(((forward(params, x) - target) ** 2).sum())
"""


def test_values_and_gradients_equal_those_of_one_device(run_with_devices):
    run_with_devices(
        SETUP
        + DICTIONARY
        + """
for (data, model), check, subtract in (((1, 1), False, True), ((1, 2), True, False), ((2, 2), False, True), ((1, 4), True, True)):
    n = 12 // model  # fewer than k on a shard of 4
    params = {"W_enc": draw(n * model, D), "b_enc": draw(n * model), "W_dec": draw(n * model, D), "b_dec": draw(D)}
    params["W_enc"] = params["W_enc"].at[-1].set(params["W_enc"][0])  # the first and the last shard hold equal latents
    params["b_enc"] = params["b_enc"].at[-1].set(params["b_enc"][0])
    x, target = draw(B, D), draw(B, D)
    want_y = one_device(params, x, subtract)
    want = jax.value_and_grad(partial(loss, partial(one_device, subtract=subtract)), (0, 1))(params, x, target)
    total = lambda s: summed(s, "data")
    step = jax.value_and_grad(partial(loss, partial(over_shards, subtract=subtract), total=total), (0, 1))
    got_y = sharded(partial(over_shards, subtract=subtract), mesh_of(data, model), (SPECS, P("data")), P("data"), check)(params, x)
    got = sharded(step, mesh_of(data, model), (SPECS, P("data"), P("data")), (P(), (SPECS, P("data"))), check)(params, x, target)
    for a, b in zip(jax.tree.leaves((got_y, got)), jax.tree.leaves((want_y, want)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * float(jnp.abs(b).max()))
""",
        n_devices=4,
    )


def test_what_moves_between_devices(run_with_devices):
    """Bytes that one device gives, all collectives of the compiled program together; a shard has 1021 latents, a prime."""
    run_with_devices(
        SETUP
        + DICTIONARY
        + """
n, B, D, K, F = 1021, 6, 5, 4, 4
def shapes(model, rows):
    leaf = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    params = {"W_enc": leaf(n * model, D), "b_enc": leaf(n * model), "W_dec": leaf(n * model, D), "b_dec": leaf(D)}
    return params, leaf(rows, D), leaf(rows, D)
def text(f, mesh, outs, arguments):
    ins = (SPECS, P("data"), P("data"))[: len(arguments)]
    return sharded(f, mesh, ins, outs).lower(*arguments).compile().as_text()
candidates, out, weights = F * B * K, F * B * D, F * n * (2 * D + 1)
for data, model in ((1, 2), (1, 4), (2, 2)):
    mesh, arguments = mesh_of(data, model), shapes(model, B * data)
    forward = text(partial(over_shards, subtract=True), mesh, P("data"), arguments[:2])
    assert sorted(c.op for c in collectives(forward)) == ["all-gather", "all-reduce"]
    assert moved(forward) == candidates + out  # the values of the candidates, and one sum
    step = jax.value_and_grad(partial(loss, partial(over_shards, subtract=True), total=lambda s: summed(s, "data")))
    both = text(step, mesh, (P(), SPECS), arguments)
    # the pre-encoder bias over model; over data the gradient of every weight that a device holds, and the loss
    over_data = weights + F * D + F if data > 1 else 0
    assert moved(both) - moved(forward) == F * D + over_data, (moved(both), moved(forward))
    whole = sharded(lambda x: topk(x, K, "model"), mesh, P("data", "model"), P("data"))
    codes = whole.lower(jax.ShapeDtypeStruct((B * data, n * model), jnp.float32)).compile().as_text()
    assert moved(codes) == 2 * candidates
    # what this is for: left to the compiler, whole rows of pre-activations move
    there = jax.sharding.NamedSharding(mesh, P("data", "model"))
    left = jax.jit(lambda x: jax.lax.top_k(x, K), in_shardings=there)
    text_left = left.lower(jax.ShapeDtypeStruct((B * data, n * model), jnp.float32)).compile().as_text()
    assert moved(text_left) >= F * B * n
""",
        n_devices=4,
    )
