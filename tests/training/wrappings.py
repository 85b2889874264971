"""The dictionary step on a mesh against the step on one device; runs in a process with virtual devices (test_wrappings.py)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp  # noqa: F401  # of the scripts that import all of this
import numpy as np
from jax.sharding import PartitionSpec

from dlmscope_jax.dictionaries import BatchTopK, Binary, JumpReLU, LossSettings, Matryoshka, TopK
from dlmscope_jax.distributed import make_mesh, row_axes, row_sharding
from dlmscope_jax.kernels.axes import ALONE, Axes
from dlmscope_jax.training import TrainSpec, init_state, make_step, state_shardings

D, N, B, STEPS = 8, 32, 32, 20
_AUX, _NO_AUX = {"settings": LossSettings(aux=1 / 32), "dead_rows": 200}, {"settings": LossSettings(aux=0.0)}
SPECS = {
    "topk": TrainSpec(TopK(D, N, 4, k_aux=5), **_AUX, steps=100, batch_size=B, lr=1e-3, warmup_steps=4, ema=0.9),
    "transcoder": TrainSpec(TopK(D, N, 3, d_out=6, skip=True, input_bias=True), target="out", **_NO_AUX, steps=100, batch_size=B, lr=1e-3),
    "jumprelu": TrainSpec(JumpReLU(D, N), settings=LossSettings(sparsity=0.03), steps=100, batch_size=B, lr=1e-3, micro_batches=2),
    "batch_topk": TrainSpec(BatchTopK(D, N, 4), **_NO_AUX, steps=100, batch_size=B, lr=1e-3),
    "matryoshka": TrainSpec(Matryoshka(D, N, 4, k_aux=5), **_AUX, steps=100, batch_size=B, lr=1e-3),
    "annealed": TrainSpec(BatchTopK(D, N, 2, k_aux=5), **_AUX, steps=100, batch_size=B, lr=1e-3, k_start=6, k_anneal_steps=10),
    "binary": TrainSpec(Binary(D, N), settings=LossSettings(entropy=1e-3, covariance=1e-3), steps=100, batch_size=B, lr=1e-3),
}  # fmt: skip
# dead latents at the start: none, as many as k_aux takes, more of them
DEAD = (0, 3, 17)


def rows_of(spec: TrainSpec, n: int, seed: int) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
    """Sums of a few directions, off centre; for a transcoder with what it should write."""
    rng = np.random.default_rng(0)
    directions, outwards, centre = rng.normal(size=(N, D)), rng.normal(size=(N, spec.dictionary.out)), rng.normal(size=D)
    rng = np.random.default_rng(seed)
    codes = (rng.random((n, N)) < 0.1) * rng.uniform(0.5, 1.5, (n, N))
    x = (codes @ directions + centre + 0.1 * rng.normal(size=(n, D))).astype(np.float32)
    return (x, (codes @ outwards).astype(np.float32)) if spec.dictionary.transcoder else x


def fresh(spec: TrainSpec, mesh=None):
    """The first state, as ``init_state`` makes it."""
    sample = rows_of(spec, 256, 1)
    inputs, targets = sample if isinstance(sample, tuple) else (sample, None)
    return init_state(spec, sample=inputs, targets=targets, mesh=mesh)


@functools.cache
def _fresh_on_host(spec: TrainSpec):
    return jax.device_get(fresh(spec))


def start(spec: TrainSpec, mesh=None, dead: int = 0):
    """The first state, with so many latents dead from the start, spread over all of them; without compiling ``init_state`` again."""
    since = np.zeros(N, np.int32)
    since[np.random.default_rng(2).permutation(N)[:dead]] = 10_000
    state = dataclasses.replace(_fresh_on_host(spec), rows_since_fired=since)
    return jax.device_put(state, None if mesh is None else state_shardings(spec, mesh))


def winners(spec: TrainSpec, mesh=None) -> np.ndarray:
    """[B, N] which latents of each row the first step selects."""
    dictionary, batch = spec.dictionary, rows_of(spec, B, 100)
    x = batch[0] if isinstance(batch, tuple) else batch
    axes = ALONE if mesh is None else Axes(row_axes(mesh), "model")

    def select(params, x):
        return dictionary._codes(params, x, True, axes).dense(dictionary.here(axes)) != 0

    state = start(spec, mesh)
    if mesh is not None:
        specs = jax.tree.map(lambda sharding: sharding.spec, state_shardings(spec, mesh).params)
        rows = PartitionSpec(row_axes(mesh))
        select = jax.shard_map(select, mesh=mesh, in_specs=(specs, rows), out_specs=PartitionSpec(row_axes(mesh), "model"), check_vma=False)
    return np.asarray(jax.jit(select)(state.params, x / np.float32(state.input_scale)))


def laid_out(batch, mesh):
    """A batch on the devices of a mesh."""
    return batch if mesh is None else jax.device_put(batch, row_sharding(mesh))


def run(spec: TrainSpec, step, state, steps: int, mesh=None):
    """State and metrics after so many steps."""
    metrics = {}
    for i in range(steps):
        state, metrics = step(state, laid_out(rows_of(spec, B, 100 + i), mesh))
        jax.block_until_ready(state)  # programs with collectives must not pile up on virtual devices
    return state, metrics


def close(got, want, tolerance: float, what: str) -> None:
    """Every array within ``tolerance`` of the other, relative to its norm; whole numbers equal."""
    assert jax.tree.structure(got) == jax.tree.structure(want), what
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        a, b, where = np.asarray(a), np.asarray(b), f"{what}: {jax.tree_util.keystr(path)}"
        assert a.shape == b.shape and a.dtype == b.dtype, where
        if np.issubdtype(a.dtype, np.integer):
            np.testing.assert_array_equal(a, b, where)
            continue
        a, b = a.astype(np.float64), b.astype(np.float64)
        off = np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30) if np.any(a != b) else 0.0
        assert off <= tolerance, f"{where} is off by {off:.2g} of its norm {np.linalg.norm(b):.3g}"


def same_bits(one, other, what: str) -> None:
    """Every leaf the same to the last bit."""
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), f"{what}: {jax.tree_util.keystr(path)}"


def as_declared(state, shardings, what: str) -> None:
    """Each leaf lies where it should, and its copies are the same to the last bit."""
    for (path, leaf), sharding in zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(shardings), strict=True):
        where = f"{what}: {jax.tree_util.keystr(path)}"
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim), f"{where} lies as {leaf.sharding}, not as {sharding}"
        whole = np.asarray(leaf)
        for shard in leaf.addressable_shards:
            assert np.asarray(shard.data).tobytes() == whole[shard.index].tobytes(), f"{where} differs on {shard.device}"


def check(name: str, *meshes: tuple[int, ...], parallel: str = "shard_map") -> None:
    """The step of ``SPECS[name]`` on meshes (data, model) or (replica, data, model) against that of one device."""
    spec = SPECS[name]
    alone = make_step(spec)
    dead = DEAD if spec.settings_used.aux else (0,)
    first = [jax.device_get(run(spec, alone, start(spec, dead=n), 1)) for n in dead]
    last = jax.device_get(run(spec, alone, start(spec, dead=dead[-1]), STEPS))
    for sizes in meshes:
        what = f"{name} with {parallel} on {' x '.join(map(str, sizes))}"
        replica, data, model = (1, *sizes)[-3:]
        mesh = make_mesh(data, model, replica, jax.devices()[: replica * data * model])
        step, shardings = make_step(spec, mesh, parallel), state_shardings(spec, mesh)
        begin = fresh(spec, mesh)
        as_declared(begin, shardings, f"{what}, at first")
        close(begin, start(spec), 1e-6, f"{what}, at first")
        if parallel == "shard_map":
            np.testing.assert_array_equal(winners(spec, mesh), winners(spec), f"{what}, what is selected")
        for n, want in zip(dead, first, strict=True):
            got = run(spec, step, start(spec, mesh, n), 1, mesh)
            close(got, want, 1e-6, f"{what}, {n} dead, step 1")  # rows_since_fired exactly: the same latents fired
            as_declared(got[1], [shardings.step] * len(jax.tree.leaves(got[1])), what)
        if parallel == "shard_map":
            as_declared(got[0], shardings, f"{what}, after a step")
        state, metrics = run(spec, step, start(spec, mesh, dead[-1]), STEPS, mesh)
        close((state, metrics), last, 1e-4, f"{what}, step {STEPS}")
        same_bits(run(spec, step, start(spec, mesh, dead[-1]), STEPS, mesh), (state, metrics), f"{what}, once more")
        if parallel == "shard_map":
            as_declared(state, shardings, what)
            assert step._cache_size() == 1, f"{what}: compiled {step._cache_size()} times"

        bad = jax.tree.map(lambda rows: np.where(np.arange(B)[:, None] == B - 1, np.nan, rows), rows_of(spec, B, 7))
        before = jax.device_get(state)
        state, metrics = step(state, laid_out(bad, mesh))
        same_bits(jax.device_get(state), dataclasses.replace(before, step=before.step + 1, skipped=before.skipped + 1), f"{what}, NaN")
        assert float(metrics["skipped"][0]) == 1 and float(metrics["loss"][1]) == 0, what
        print(what, "agrees", flush=True)
