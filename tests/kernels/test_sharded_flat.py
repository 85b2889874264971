"""BatchTopK's code with rows and latents divided: the same winners, values and gradients as one device, with room for them or without."""

import pytest

FORMS = pytest.mark.parametrize("all_cases", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["some", "all"])
DIVIDED = """
import jax, jax.numpy as jnp, numpy as np, sys
from functools import partial
from jax.sharding import Mesh, PartitionSpec as P
sys.path.insert(0, "tests/kernels")
from conformance import rows as draw_rows
from programs import collectives
from dlmscope_jax import kernels
from dlmscope_jax.kernels import decode_flat, decode_prefixes, encode_topk_batch, topk_batch
from dlmscope_jax.kernels.axes import Axes
from dlmscope_jax.kernels.encode import encode_winners
from dlmscope_jax.kernels.sparse_matmul.sharded_flat import decode_winners
from dlmscope_jax.kernels.topk import marks
from dlmscope_jax.kernels.topk.sharded import batch_winners

jax.config.update("jax_numpy_dtype_promotion", "strict")
axes = Axes(("data",), "model")
rng = np.random.default_rng(0)
draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)

def over(data, model, f, ins, outs):
    mesh = Mesh(np.array(jax.devices()[: data * model]).reshape(data, model), ("data", "model"))
    return jax.jit(jax.shard_map(f, mesh=mesh, in_specs=ins, out_specs=outs, check_vma=False))
"""


@FORMS
def test_the_winners_are_those_of_one_device(run_with_devices, all_cases):
    """Ties across rows and shards, NaN and infinities, a count that is traced, and rows that do not fill their last word."""
    run_with_devices(
        f"ALL = {all_cases}\n"
        + DIVIDED
        + """
for data, model, latents in ((2, 4, None), (4, 1, "alone")) if ALL else ((2, 4, None),):
    these = Axes(("data",), None) if latents == "alone" else axes
    spec = P("data", "model")
    bits = lambda pre, count: marks.unpack(batch_winners(pre, count, these), pre.shape[1])
    run = over(data, model, bits, (spec, P()), spec)
    for kind in ("normal", "special", "two values", "one value"):
        pre = jnp.asarray(draw_rows(kind, (8, 72)))
        for count in (1, 50, 575) if ALL else (50,):
            _, rows, latents = topk_batch(pre, count)
            want = np.zeros(pre.shape, bool)
            want[rows, latents] = True
            np.testing.assert_array_equal(run(pre, jnp.int32(count)), want, err_msg=f"{data} {model} {kind} {count}")
    assert run._cache_size() == 1
"""
    )


@FORMS
def test_decoded_as_on_one_device_with_and_without_room(run_with_devices, all_cases):
    """Values, gradients of everything, and what is reported; prefixes that end within a shard; one shard that holds nearly all winners."""
    run_with_devices(
        f"ALL = {all_cases}\n"
        + DIVIDED
        + """
B, D, N, K, PREFIXES = 16, 5, 48, 3, (5, 17, 48)

def one_device(params, x, target, selection, prefixes):
    encoder = params["W_enc"], params["b_enc"], params["b_dec"]
    values, rows, latents = encode_topk_batch(x, *encoder, K * B, selection=selection)
    values = jax.nn.relu(values)
    decoded = decode_prefixes(values, rows, latents, params["W_dec"], B, prefixes)
    count, fired = jnp.zeros(B, int).at[rows].add((values > 0).astype(int)), jnp.zeros(N, int).at[latents].add((values > 0).astype(int))
    report = decoded, count, fired, jnp.where(values > 0, values, jnp.inf).min()
    return jnp.square(target - decoded - params["b_dec"]).sum(), report

def shards(params, x, target, selection, prefixes, room):
    n = params["W_enc"].shape[0]
    encoder = axes.shared(x), params["W_enc"], params["b_enc"], axes.shared(params["b_dec"])
    winners = encode_winners(*encoder, K * B, room, axes, selection=selection)
    latent = axes.first_latent(n) + jnp.arange(n, dtype=jnp.int32)
    group = jnp.searchsorted(jnp.array(prefixes, jnp.int32), latent, side="right").astype(jnp.int32)
    here = decode_winners(*encoder, params["W_dec"], winners, group, len(prefixes))
    decoded = jnp.cumsum(axes.sum_latents(here.parts), axis=0)
    report = decoded, axes.sum_latents(here.count), axes.sum_rows(here.fired), jax.lax.pmin(here.least, axes.every), winners.overflow
    return axes.sum_rows(jnp.square(target - decoded - params["b_dec"]).sum()), report

SPECS = {"W_enc": P("model"), "b_enc": P("model"), "W_dec": P("model"), "b_dec": P()}
params = {"W_enc": draw(N, D), "b_enc": draw(N), "W_dec": draw(N, D), "b_dec": draw(D)}
crowded = params | {"b_enc": params["b_enc"].at[:6].add(9.0)}  # the first shard wins almost everything
few = params | {"b_enc": params["b_enc"] - 3.5}  # most of what is kept is negative, and cut
x, target = draw(B, D), draw(B, D)
for data, model in ((2, 4), (1, 4)):
    mean = K * B // (data * model)
    for name, weights, selection, prefixes, room in (
        ("room", params, "float32", PREFIXES, 4 * mean), ("no room", params, "float32", PREFIXES, mean // 2),
        ("crowded", crowded, "float32", (N,), 2 * mean), ("bf16", params, "bfloat16", (N,), 4 * mean),
        ("bf16, no room", params, "bfloat16", (N,), mean // 2), ("few", few, "float32", (N,), 4 * mean),
    ):
        if data == 1 and name != "crowded" or not ALL and (data == 1 or name != "no room"):
            continue
        f = jax.value_and_grad(partial(shards, selection=selection, prefixes=prefixes, room=room), (0, 1), has_aux=True)

        def step(weights, x, target):
            (loss, report), (g, gx) = f(weights, x, target)
            return loss, report, jax.tree.map(lambda leaf: jax.lax.psum(leaf, "data"), g), gx

        reports = P(None, "data"), P("data"), P("model"), P(), P()
        run = over(data, model, step, (SPECS, P("data"), P("data")), (P(), reports, SPECS, P("data")))
        loss, (*report, overflow), g, gx = run(weights, x, target)
        assert bool(overflow) == (name in ("no room", "crowded", "bf16, no room")), (name, data, model)
        want = jax.jit(partial(one_device, selection=selection, prefixes=prefixes))
        (want_loss, want_report), want_g = jax.value_and_grad(want, (0, 1), has_aux=True)(weights, x, target)
        np.testing.assert_allclose(loss, want_loss, rtol=1e-5)
        for a, b in zip(report[1:3], want_report[1:3], strict=True):
            np.testing.assert_array_equal(a, b)
        got, want = (report[0], report[3], g, gx), (want_report[0], want_report[3], *want_g)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=3e-6 * float(jnp.abs(b).max()), err_msg=f"{name} {data} {model}")
"""
    )


@FORMS
def test_what_moves_does_not_know_the_width(run_with_devices, all_cases):
    """A shard has 1021 latents, a prime. Forward and backward: a fixed number of collectives, none in a branch."""
    run_with_devices(
        f"ALL = {all_cases}\n"
        + DIVIDED
        + """
n, B, D, K, F = 1021, 6, 5, 4, 4

def loss(params, x, data, model):
    encoder = x, params["W_enc"], params["b_enc"], axes.shared(params["b_dec"])
    winners = encode_winners(*encoder, K * B * data, 2 * K * B // model, axes)
    return axes.sum_rows(jnp.square(axes.sum_latents(decode_winners(*encoder, params["W_dec"], winners).parts[0]) - x).sum())

for data, model in ((1, 4), (2, 4), (4, 2)) if ALL else ((2, 4),):
    leaf = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    params = {"W_enc": leaf(n * model, D), "b_enc": leaf(n * model), "W_dec": leaf(n * model, D), "b_dec": leaf(D)}
    SPECS = {"W_enc": P("model"), "b_enc": P("model"), "W_dec": P("model"), "b_dec": P()}
    step = jax.value_and_grad(partial(loss, data=data, model=model))
    text = over(data, model, step, (SPECS, P("data")), (P(), SPECS)).lower(params, leaf(B * data, D)).compile().as_text()
    found = collectives(text)
    small = [F * B] + ([F, F] if data > 1 else []) + [F, F * D]  # ties here, ties of rows, the loss; room, the pre-encoder bias
    assert sorted(c.operand_bytes for c in found for _ in range(c.trips)) == sorted([60] * 8 + small + [F * B * D]), found
    # it is the branch that is large: no collective may be inside of it
    assert " conditional(" in text
"""
    )
