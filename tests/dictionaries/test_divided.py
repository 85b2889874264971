"""Losses over divided rows and latents: BatchTopK, Matryoshka and Binary say what they say on one device, and so do their gradients."""

import pytest

FORMS = pytest.mark.parametrize("all_cases", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["some", "all"])
SETUP = """
import dataclasses, jax, jax.numpy as jnp, numpy as np
from functools import partial
from jax.sharding import PartitionSpec as P
from dlmscope_jax.dictionaries import BatchTopK, Binary, LossSettings, Matryoshka
from dlmscope_jax.distributed import make_mesh, partition_specs
from dlmscope_jax.kernels.axes import Axes

jax.config.update("jax_numpy_dtype_promotion", "strict")
rng = np.random.default_rng(0)
draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
D, N, B, E = 6, 48, 16, 4
X, Y = draw(B, D), draw(B, E)

def random_params(spec):
    return {name: draw(*shape) for name, shape in spec.shapes().items()} | ({"threshold": jnp.float32(1)} if spec.STATISTICS else {})

def alone(spec, dead, settings):
    run = lambda params, x, target, settings: spec.loss(params, x, target, dead, settings)
    return jax.jit(jax.value_and_grad(run, has_aux=True))

def divided(spec, mesh, dead):
    axes = Axes(("data",), "model")
    specs = partition_specs(spec.axes(), {name: np.zeros(shape, "i1") for name, shape in spec.shapes().items()}, mesh)

    def run(params, x, target, dead, settings):
        loss = lambda params: spec.loss(params, x, target, dead, settings, axes)
        (loss, parts), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        fired = parts.fired
        return loss, fired, dataclasses.replace(parts, fired=None), jax.tree.map(lambda leaf: jax.lax.psum(leaf, "data"), gradient)

    ins = specs, P("data"), P("data"), P("model"), P()
    mapped = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=ins, out_specs=(P(), P("model"), P(), specs), check_vma=False))
    return lambda params, x, target, settings: mapped(params, x, target, dead, settings)

def check(spec, params, dead=None, settings=LossSettings(), shapes=((2, 4), (8, 1), (1, 8)), rtol=2e-5):
    target = Y if spec.transcoder else None
    (loss, parts), gradient = alone(spec, dead, settings)(params, X, target, settings)
    for data, model in shapes:
        got = divided(spec, make_mesh(data, model), dead)(params, X, target, settings)
        np.testing.assert_array_equal(got[1], parts.fired)
        want = loss, dataclasses.replace(parts, fired=None), gradient
        for (path, a), b in zip(jax.tree.leaves_with_path((got[0], *got[2:])), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=rtol, atol=4e-6 * float(jnp.abs(b).max()) + 1e-9, err_msg=f"{data} x {model}: {path}")
    return parts
"""


@FORMS
def test_batch_topk_and_matryoshka(run_with_devices, all_cases):
    run_with_devices(
        f"ALL = {all_cases}\n"
        + SETUP
        + """
dead = jnp.arange(N) % 5 == 1
for spec in (BatchTopK(D, N, 3, k_aux=4), Matryoshka(D, N, 4, k_aux=4, prefixes=(5, 17, 48), d_out=E, skip=True, input_bias=True)):
    params = random_params(spec)
    shapes = ((2, 4), (1, 8)) if ALL and spec.KIND == "batch_topk" else ((2, 4),)
    if ALL or spec.KIND == "batch_topk":
        check(spec, params, dead, LossSettings(aux=jnp.float32(0.7)), shapes)
    if ALL or spec.KIND == "matryoshka":
        few = check(spec, params, settings=LossSettings(k=jnp.int32(1)), shapes=((2, 4),))  # annealed: fewer are kept, in the same program
        assert float(few.l0) <= 1.0
if ALL:
    params = random_params(BatchTopK(D, N, 3))
    check(BatchTopK(D, N, 3, selection="bfloat16"), params, shapes=((4, 2),))
    tied = params | {"W_enc": jnp.zeros((N, D)), "b_enc": jnp.ones(N)}  # all are equal: the first row has the whole code
    assert float(check(BatchTopK(D, N, 3), tied, shapes=((2, 4), (8, 1))).fired.max()) == 1
    axes, spec = Axes(("data",), "model"), BatchTopK(D, N, 3)  # what resampling asks for
    specs = {name: P("model") if name[2:] in ("enc", "dec") and name != "b_dec" else P() for name in params}
    errors = partial(spec.row_errors, axes=axes)
    run = jax.shard_map(errors, mesh=make_mesh(2, 4), in_specs=(specs, P("data")), out_specs=P("data"), check_vma=False)
    for a, b in zip(jax.jit(run)(params, X), spec.row_errors(params, X), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
"""
    )


@FORMS
def test_binary(run_with_devices, all_cases):
    """Estimators; bits of the whole batch, entropy and covariance over all latents; a mesh on which a device has one row."""
    run_with_devices(
        f"ALL = {all_cases}\n"
        + SETUP
        + """
settings = LossSettings(entropy=jnp.float32(0.02), covariance=jnp.float32(0.003))
for estimator in ("identity", "sigmoid", "rectangle", "g_times_1mg", "x_times_1mx") if ALL else ("sigmoid",):
    spec = Binary(D, N, estimator=estimator)
    shapes = ((2, 4), (8, 1)) if estimator == "identity" else ((2, 4),)
    parts = check(spec, random_params(spec), settings=settings, shapes=shapes)
    assert parts.measured["covariance"] > 0
coder = Binary(D, N, d_out=E, skip=True, input_bias=True, follows="paper", bits=2)
check(coder, random_params(coder), settings=settings, shapes=((1, 8), (4, 2)) if ALL else ((8, 1),))
"""
    )
