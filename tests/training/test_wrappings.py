"""One step, three wrappings: on every mesh the step is that of one device, and everything lies where it should."""

import dataclasses

import jax
import numpy as np
import pytest

from dlmscope_jax.dictionaries import (
    BatchTopK,
    Binary,
    CrossLayer,
    Gated,
    JumpReLU,
    LossSettings,
    Matryoshka,
    ReLU,
    TopK,
)
from dlmscope_jax.distributed import make_mesh
from dlmscope_jax.errors import UserError
from dlmscope_jax.training import init_state, make_step

from .conftest import assert_same_bits, small_spec, sparse_rows

HELPERS = 'import sys; sys.path.insert(0, "tests/training")\nfrom wrappings import *\n'
NAMES = ("topk", "transcoder", "jumprelu", "batch_topk", "binary")
SMALL = {1: [(1, 1)], 2: [(2, 1), (1, 2)], 4: [(2, 2), (4, 1), (1, 4)]}
EIGHT = [(2, 4), (4, 2), (8, 1), (1, 8), (2, 2, 2)]


def test_eight_devices_take_the_step_of_one(run_with_devices):
    """Each architecture on a mesh that divides rows and latents, and rows alone under ``pmap``; all with all in the slow tests below."""
    on = (("topk", (2, 2, 2)), ("transcoder", (2, 2)), ("jumprelu", (2, 4)), ("batch_topk", (2, 2)), ("binary", (4, 2)))
    checks = "\n".join(f"check({name!r}, {mesh})" for name, mesh in on)
    run_with_devices(HELPERS + checks + '\ncheck("jumprelu", (4, 1), parallel="pmap")', timeout=600)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2, 4, 8])
@pytest.mark.parametrize("name", [*NAMES, "matryoshka", "annealed"])
def test_all_meshes_take_the_step_of_one_device(run_with_devices, name, devices):
    run_with_devices(HELPERS + f"check({name!r}, *{SMALL.get(devices, EIGHT)})", n_devices=devices, timeout=900)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_pmap_and_jit_take_the_step_of_one_device(run_with_devices, name):
    script = f'check({name!r}, (1, 1), (2, 1), (8, 1), parallel="pmap"); check({name!r}, (1, 1), parallel="jit")'
    run_with_devices(HELPERS + script, timeout=900)


# what the losses have beside the common case
LOSSES = """
import functools
from dlmscope_jax.dictionaries import CrossLayer, Gated, Matryoshka, ReLU, auxk
from dlmscope_jax.kernels.axes import ALONE, Axes
from jax.sharding import PartitionSpec as P
from dlmscope_jax import distributed
S = LossSettings
VARIANTS = {
    "multi": (TopK(D, N, 3, multi_topk=True), S()),
    "annealed": (TopK(D, N, 6, multi_topk=True), S(k=jnp.int32(2))),
    "raw": (TopK(D, N, 30, rule="raw"), S()),
    "magnitude": (TopK(D, N, 5, rule="magnitude"), S(k=jnp.int32(3))),
    "groups": (TopK(D, N, 8, rule="groups"), S()),
    "bf16": (TopK(D, N, 5, selection="bfloat16"), S()),
    "row norm": (TopK(D, N, 5, row_norm="layer_norm", d_out=6, skip=True), S()),
    "relu": (ReLU(D, N, ghost=True, norm_weighted=True), S(sparsity=0.1, aux=1.0)),
    "over norm": (ReLU(D, N, error="over_norm", subtract=False), S(sparsity=0.1)),
    "gated": (Gated(D, N, d_out=6, skip=True, input_bias=True), S(sparsity=0.1)),
    "target": (JumpReLU(D, N, penalty="target"), S(sparsity=0.1, target_l0=3.0)),
    "tanh": (JumpReLU(D, N, penalty="tanh"), S(sparsity=0.1, preactivation=0.1)),
    "cross layer": (CrossLayer(D, N, 2, D), S(sparsity=0.1, preactivation=0.1)),
}
@functools.cache
def parts_of(dictionary, axes):
    @jax.jit
    def f(params, x, target, dead, settings):
        loss = lambda p: dictionary.loss(p, x, target, dead, settings, axes=axes)
        (loss, parts), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        return loss, parts, jax.lax.psum(gradients, axes.rows) if axes.rows else gradients
    return f

@functools.cache
def divided(dictionary, mesh, structure):
    shapes = {n: jax.ShapeDtypeStruct(s, "float32") for n, s in dictionary.shapes().items()}
    specs = distributed.partition_specs(dictionary.axes(), shapes, mesh)
    rows, whole = P("data"), P()
    parts = jax.tree.unflatten(structure, [whole] * structure.num_leaves).replace(fired=P("model"))
    return jax.jit(jax.shard_map(parts_of(dictionary, Axes(("data",), "model")), mesh=mesh, check_vma=False,
        in_specs=(specs, rows, rows, P("model"), whole), out_specs=(whole, parts, specs)))

def compare(name, dictionary, settings, dead, seed=0, meshes=((2, 2),), tolerance=2e-6):
    rng = np.random.default_rng(seed)
    params = {n: jnp.asarray(rng.normal(size=s) * 0.4, jnp.float32) for n, s in dictionary.shapes().items()}
    if "threshold" in params:
        params["threshold"] = jnp.abs(params["threshold"]) * 0.3
    x = jnp.asarray(rng.normal(size=(16, D)) + 1.0, jnp.float32)
    y = jnp.asarray(rng.normal(size=(16, dictionary.out)), jnp.float32) if dictionary.transcoder else None
    want = parts_of(dictionary, ALONE)(params, x, y, dead, settings)
    for sizes in meshes:
        mesh = make_mesh(*(4, 1) if isinstance(dictionary, CrossLayer) else sizes)
        got = divided(dictionary, mesh, jax.tree.structure(want[1]))(params, x, y, dead, settings)
        close(jax.device_get(got), jax.device_get(want), tolerance, f"{name} on {mesh.shape}")
some = jnp.arange(N) % 3 == 0
"""
# ghost gradients: exponentials, and a division by what is left over
EACH = """
for name in {names} or VARIANTS:
    dictionary, settings = VARIANTS[name]
    compare(name, dictionary, settings, some, meshes={meshes}, tolerance=1e-5 if name == "relu" else 2e-6)
"""


def test_losses_over_divided_rows_and_latents(run_with_devices):
    """Options that meet the axes: values, what is measured, which latents fired, and gradients."""
    names = ("row norm", "relu", "gated")
    run_with_devices(HELPERS + LOSSES + EACH.format(names=names, meshes="((2, 2),)"), n_devices=4)


@pytest.mark.slow
def test_all_losses_on_all_meshes(run_with_devices):
    run_with_devices(HELPERS + LOSSES + EACH.format(names=(), meshes="((2, 2), (1, 4), (4, 1))"), n_devices=4, timeout=900)


def test_auxk_over_divided_latents_in_each_case(run_with_devices):
    """None, few, some and many dead; all of the dead on one device, where it has no room for them, and ties among shards."""
    run_with_devices(
        HELPERS
        + LOSSES
        + """
auxk._LEAST_ROOM, auxk._ROOM_SHARE = 6, 2
dictionary = TopK(D, N, 4, k_aux=5)
ids = np.arange(N)
cases = [ids < 0, ids == 9, ids < 5, ids % 4 == 1, (ids >= 8) & (ids < 16), ids % 2 == 0, ids < 16, ids >= 0, ids < 6]
for i, dead in enumerate(cases):
    compare(f"auxk {i}", dictionary, S(aux=1.0), jnp.asarray(dead), seed=i)
""",
        n_devices=4,
    )


def test_optimiser_states_and_averages_lie_like_the_rows_that_they_belong_to(run_with_devices):
    run_with_devices(
        HELPERS
        + """
mesh = make_mesh(2, 2, devices=jax.devices()[:4])
base = SPECS["topk"]
for optimizer in ("adam", "adam_bf16", "lion", "signum", "schedule_free"):
    spec = dataclasses.replace(base, optimizer=optimizer, ema=None if optimizer == "schedule_free" else 0.9)
    shardings = state_shardings(spec, mesh)
    if optimizer in ("adam_bf16", "schedule_free"):
        as_declared(init_state(spec, mesh=mesh), shardings, optimizer)
    divided = [jax.tree_util.keystr(path) for path, s in jax.tree_util.tree_leaves_with_path(shardings) if "model" in s.spec]
    # three parameters, the same of each moment and average, and the counters
    moments = {"lion": 1, "signum": 1}.get(optimizer, 2)
    assert len(divided) == 3 * (1 + moments + (spec.ema is not None)) + 1, divided
""",
        n_devices=4,
    )


@pytest.mark.slow
def test_optimisers_and_resampling_on_a_mesh(run_with_devices):
    """Steps of other optimisers; resampling draws as on one device."""
    run_with_devices(
        HELPERS
        + """
mesh, base = make_mesh(2, 2), SPECS["topk"]
# a step of those that do not take signs: a sign turns the last bit of a gradient near zero into a whole step
for optimizer in ("adam_bf16", "schedule_free"):
    spec = dataclasses.replace(base, optimizer=optimizer, ema=None, clip=0.01)
    want = jax.device_get(run(spec, make_step(spec), start(spec, dead=17), 2))
    close(run(spec, make_step(spec, mesh), start(spec, mesh, 17), 2, mesh), want, 1e-5 if optimizer != "adam_bf16" else 2e-3, optimizer)

spec = dataclasses.replace(SPECS["jumprelu"], resample_every=1, dead_rows=300)
def silenced(state):
    bias = np.where(np.asarray(state.rows_since_fired) > 0, -100.0, 0.0).astype(np.float32)
    return dataclasses.replace(state, params=state.params | {"b_enc": jax.device_put(bias, state.params["b_enc"].sharding)})
want, counted = jax.device_get(run(spec, make_step(spec), silenced(start(spec, dead=9)), 1))
got, _ = run(spec, make_step(spec, mesh), silenced(start(spec, mesh, 9)), 1, mesh)
assert counted["resampled"][0] == 9
close(got, want, 2e-6, "resampling")
""",
        n_devices=4,
    )


@pytest.mark.slow
def test_micro_batches_on_a_mesh_are_those_of_one_device(run_with_devices):
    run_with_devices(
        HELPERS
        + """
spec = dataclasses.replace(SPECS["topk"], micro_batches=2)
mesh = make_mesh(2, 2)
want = jax.device_get(run(spec, make_step(spec), start(spec, dead=17), 1))
close(run(spec, make_step(spec, mesh), start(spec, mesh, 17), 1, mesh), want, 1e-6, "micro-batches")
""",
        n_devices=4,
    )


@pytest.mark.some(1)
@pytest.mark.parametrize(
    ("dictionary", "settings"),
    [
        (JumpReLU(16, 64), LossSettings(sparsity=0.01)),
        (TopK(16, 64, 4), LossSettings(aux=0.0)),
        (ReLU(16, 64), LossSettings(sparsity=0.01)),
    ],
    ids=["jumprelu", "topk", "relu"],
)
def test_micro_batches_make_the_step_of_the_batch(dictionary, settings):
    rows = sparse_rows(256)[0]
    spec = small_spec(dictionary=dictionary, settings=settings)
    want, metrics = make_step(spec)(init_state(spec, sample=rows), rows[:64])
    parts = dataclasses.replace(spec, micro_batches=4)
    got, same = make_step(parts)(init_state(parts, sample=rows), rows[:64])
    np.testing.assert_array_equal(got.rows_since_fired, want.rows_since_fired)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path((got.params, got.opt_state)), jax.tree.leaves((want.params, want.opt_state)), strict=True
    ):
        np.testing.assert_allclose(np.linalg.norm(a - b), 0, atol=2e-6 * max(1e-3, np.linalg.norm(b)), err_msg=jax.tree_util.keystr(path))
    for name in ("loss", "reconstruction", "l0", "grad_norm"):
        np.testing.assert_allclose(same[name][0], metrics[name][0], rtol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    "dictionary",
    [
        TopK(8, 32, 4),
        TopK(8, 32, 4, d_out=6, skip=True, input_bias=True),
        BatchTopK(8, 32, 4),
        Matryoshka(8, 32, 4),
        ReLU(8, 32),
        Gated(8, 32),
        JumpReLU(8, 32),
        Binary(8, 32),
        Binary(8, 32, follows="paper"),
        CrossLayer(8, 32, 2, 8),
    ],
    ids=lambda dictionary: type(dictionary).__name__,
)
def test_every_parameter_says_what_its_dimensions_are(dictionary):
    axes = dictionary.axes()
    assert {name: len(names) for name, names in axes.items()} == {name: len(shape) for name, shape in dictionary.shapes().items()}
    for name, shape in dictionary.shapes().items():
        of_latents = [axis == "latent" for axis in axes[name]]
        assert of_latents == [size in (32, 16) and i == 0 for i, size in enumerate(shape)], name  # 16: one layer's of CrossLayer


def test_what_does_not_go_on_a_mesh_is_said(run_with_devices):
    run_with_devices(
        HELPERS
        + """
import re
from dlmscope_jax.dictionaries import CrossLayer
from dlmscope_jax.errors import UserError
two, four, replicas = make_mesh(2, 2), make_mesh(4, 1), make_mesh(2, 1, 2)
spec = SPECS["topk"]
cross = TrainSpec(CrossLayer(D, N, 2, D), steps=9, site=("a", "b"), target=("c", "d"), batch_size=B)
for pattern, wanted, *how in (
    ("'jit' is for one device, and the mesh is data 2 x model 2", spec, two, "jit"),
    ("'pmap' divides rows over data and nothing else", spec, two, "pmap"),
    ("'pmap' divides rows over data and nothing else", spec, replicas, "pmap"),
    ("'pmap' is for several devices: give a mesh", spec, None, "pmap"),
    ("parallel 'xmap' is not known: one of jit, shard_map, pmap", spec, two, "xmap"),
    ("batch of 30 rows does not divide into 4 equal parts: use a multiple of 4", dataclasses.replace(spec, batch_size=30), four),
    ("30 rows does not divide into 4 equal parts", dataclasses.replace(spec, batch_size=30), four, "pmap"),
    ("32 rows .* in 16 micro-batches: use a multiple of 64", dataclasses.replace(spec, micro_batches=16), four),
    ("W_dec.*33 .latent. is not divisible by mesh axis 'model' of 2", dataclasses.replace(spec, dictionary=TopK(D, 33, 4)), two),
    ("'muon' needs whole matrices on every device: model = 2 must be 1", dataclasses.replace(spec, optimizer="muon"), two),
    ("CrossLayer .* model = 2 must be 1", cross, two),
):
    try:
        make_step(wanted, *how)
    except UserError as error:
        assert re.search(pattern, str(error)), error
    else:
        raise AssertionError(pattern)
try:
    init_state(cross, mesh=two)
except UserError as error:
    assert "model = 2 must be 1" in str(error)
else:
    raise AssertionError
make_step(cross, four)
try:  # a batch that is not the one that was announced
    make_step(spec, four, "pmap")(start(spec, four), rows_of(spec, 30, 0))
except UserError as error:
    assert "30 rows does not divide" in str(error)
else:
    raise AssertionError
""",
        n_devices=4,
    )


def test_micro_batches_must_divide_the_batch():
    with pytest.raises(UserError, match="micro_batches = 3 must divide batch_size = 64"):
        small_spec(micro_batches=3)
    with pytest.raises(UserError, match="micro_batches = 0"):
        small_spec(micro_batches=0)


def test_a_mesh_of_one_device_is_the_step_as_it_was():
    """Bit for bit: not one more operation."""
    spec, rows = small_spec(settings=LossSettings(aux=0.0)), sparse_rows(256)[0]
    mesh = make_mesh(1, 1, devices=jax.devices()[:1])
    assert make_step(spec, mesh, "jit") is make_step(spec)
    want, got = init_state(spec, sample=rows), init_state(spec, sample=rows, mesh=mesh)
    assert_same_bits(got.rows_since_fired, want.rows_since_fired)
    assert_same_bits(make_step(spec, mesh)(want, rows[:64]), make_step(spec)(init_state(spec, sample=rows), rows[:64]))
