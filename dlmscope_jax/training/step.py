"""One optimiser step of a dictionary: pure, jitted, with a donated state.

``_step`` is written for what one device holds, and wrapped three times: ``jit`` for one device; ``shard_map`` over a mesh, whose ``data``
(and ``replica``) divides the rows of a batch and whose ``model`` the latents; ``pmap`` over rows alone. Of arrays with a row for each
latent, devices send each other the gradients and nothing else, once a step, among those that hold the same latents.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from dlmscope_jax import distributed
from dlmscope_jax.dictionaries import LossSettings
from dlmscope_jax.dictionaries.auxk import WithAuxK
from dlmscope_jax.errors import UserError
from dlmscope_jax.kernels import squared_norm
from dlmscope_jax.kernels.axes import ALONE, Axes

from . import schedules
from .averaging import follow
from .optimisers import held_at_unit_norm, kept
from .program import Program, program_of
from .resampling import resample
from .spec import TrainSpec
from .state import TrainState, divided, learned, optimiser_of, state_shardings

Metrics = dict[str, tuple[Array, Array]]
Rows = Float[Array, "B D"] | tuple[Float[Array, "B D"], Float[Array, "B D_out"]]
Step = Callable[[TrainState, Rows], tuple[TrainState, Metrics]]
Parallel = Literal["jit", "shard_map", "pmap"]
WRAPPINGS: tuple[Parallel, ...] = ("jit", "shard_map", "pmap")

# rows_since_fired stops counting here, far above any threshold and far below overflow
_LONG = 2**30


def make_step(spec: TrainSpec, mesh: Mesh | None = None, parallel: Parallel | None = None) -> Step:
    """The jitted step ``(state, batch) -> (state, metrics)``; the state is donated, except by ``pmap``.

    The batch holds raw rows [B, D] of any float dtype, for a transcoder a pair of them: inputs and targets. Metrics are pairs
    (sum, count) of float32 scalars, whose quotient is the mean over whatever steps they are added up over: ``loss``,
    ``reconstruction``, each term of the loss as ``loss_<term>``, what the dictionary measures (``aux``: 0 where there is none),
    ``explained_variance`` (of the batch, for progress only), ``l0``, ``dead`` (share), ``grad_norm`` (before clipping),
    ``learning_rate``, ``skipped``; with annealing ``k``, with resampling ``resampled`` (latents).

    A batch whose loss or gradient is not finite changes nothing but ``step`` and ``skipped``, and counts in no other metric.

    Trainings of one ``Program`` share one compiled program: their numbers are in the state.

    Args:
      spec: the training.
      mesh: the devices; None: one. The batch is the whole one, of all processes, laid out as ``distributed.row_sharding`` says or not
        laid out yet; states come from ``init_state(..., mesh=mesh)``. Steps on different meshes agree up to rounding, and on equal ones bit
        for bit. (Moments in bfloat16 are rounded up or down by their places on a device: there it is a bfloat16's rounding.)
      parallel: ``"shard_map"``, what a mesh is for; ``"jit"``: one device; ``"pmap"``: rows divided over the devices of one process, the
        state whole on each. None: ``"shard_map"`` with a mesh and ``"jit"`` without.

    Raises:
      UserError: a mesh that ``parallel`` or the batch size does not go with; what ``state_shardings`` raises.
    """
    if parallel is not None and parallel not in WRAPPINGS:
        raise UserError(f"make_step: parallel {parallel!r} is not known: one of {', '.join(WRAPPINGS)}")
    parallel = parallel or ("jit" if mesh is None else "shard_map")
    program = program_of(spec)
    if mesh is None:
        if parallel != "jit":
            raise UserError(f"make_step: parallel={parallel!r} is for several devices: give a mesh (distributed.make_mesh)")
        return _compiled(program)
    shape = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    if parallel == "jit":
        if mesh.size > 1:
            raise UserError(f"make_step: parallel='jit' is for one device, and the mesh is {shape}: use 'shard_map'")
        return _compiled(program)
    lies = state_shardings(spec, mesh)
    _check_rows(spec.batch_size, distributed.row_parts(mesh), spec.micro_batches)
    if parallel == "shard_map":
        return _sharded(program, mesh, *_hashable(lies))
    if mesh.size > mesh.shape["data"]:
        raise UserError(f"make_step: parallel='pmap' divides rows over data and nothing else, and the mesh is {shape}: use 'shard_map'")
    if len({device.process_index for device in mesh.devices.flat}) > 1:
        raise UserError("make_step: parallel='pmap' is for the devices of one process: use 'shard_map'")
    return _mapped(program, tuple(mesh.devices.flat))


def _check_rows(rows: int, parts: int, micro_batches: int) -> None:
    if rows % (parts * micro_batches):
        several = f" in {micro_batches} micro-batches" if micro_batches > 1 else ""
        raise UserError(
            f"make_step: a batch of {rows} rows does not divide into {parts} equal parts{several}: "
            f"use a multiple of {parts * micro_batches}"
        )


@functools.cache
def _compiled(program: Program) -> Step:
    return jax.jit(functools.partial(_step, program, ALONE), donate_argnums=0)


def _hashable(tree: Any) -> tuple[tuple, Any]:
    leaves, structure = jax.tree.flatten(tree)
    return tuple(leaves), structure


@functools.cache
def _sharded(program: Program, mesh: Mesh, shardings: tuple, structure: Any) -> Step:
    lies = jax.tree.unflatten(structure, shardings)
    specs, rows = jax.tree.map(lambda sharding: sharding.spec, lies), distributed.row_sharding(mesh).spec
    here = functools.partial(_step, program, Axes(distributed.row_axes(mesh), "model"))
    divided = jax.shard_map(here, mesh=mesh, in_specs=(specs, rows), out_specs=(specs, PartitionSpec()), check_vma=False)
    # the shardings of what comes out in so many words: equal ones under another name would compile the step again
    return jax.jit(divided, donate_argnums=0, out_shardings=(lies, None))


@functools.cache
def _mapped(program: Program, devices: tuple[Any, ...]) -> Step:
    here = functools.partial(_step, program, Axes(("data",)))
    mapped = jax.pmap(here, "data", in_axes=(None, 0), out_axes=None, devices=devices)

    def step(state: TrainState, batch: Rows) -> tuple[TrainState, Metrics]:
        _check_rows(len(jax.tree.leaves(batch)[0]), len(devices), program.micro_batches)
        return mapped(state, jax.tree.map(lambda rows: rows.reshape(len(devices), -1, *rows.shape[1:]), batch))

    return step


def _step(program: Program, axes: Axes, state: TrainState, batch: Rows) -> tuple[TrainState, Metrics]:
    dictionary, numbers = program.dictionary, state.numbers
    x, target = _in_training_units(state, batch)
    settings = schedules.loss_settings(numbers, state.step)
    rate = schedules.rate(program.schedule, numbers, state.step)
    dead = state.rows_since_fired >= numbers.dead_rows
    old = learned(dictionary, state.params)

    def loss_and_gradients(x: Array, target: Array | None) -> tuple[tuple[Array, Any], dict]:
        def differentiated(dead: Array | None) -> tuple[tuple[Array, Any], dict]:
            def loss_of(weights: dict) -> tuple[Array, Any]:
                return dictionary.loss({**state.params, **weights}, x, target, dead=dead, settings=settings, axes=axes)

            return jax.value_and_grad(loss_of, has_aux=True)(old)

        if program.aux and isinstance(dictionary, WithAuxK):
            return _with_aux(differentiated, dead, axes.any_latents(dead))
        return differentiated(dead if program.aux else None)

    (loss, parts), gradients = _accumulated(loss_and_gradients, program.micro_batches, x, target)
    gradients = jax.lax.psum(gradients, axes.rows) if axes.rows else gradients
    norm = _norm(dictionary, gradients, old, axes)
    good = jnp.isfinite(loss) & jnp.isfinite(norm)
    clip = jnp.minimum(1.0, numbers.clip / norm)

    weights, opt_state = optimiser_of(program).update(gradients, state.opt_state, old, rate, clip, good)
    params = _measure(program, state, {**state.params, **weights}, parts.statistics, settings, good)
    average = None if state.average is None else kept(good, follow(state.average, learned(dictionary, params), numbers.ema), state.average)
    since = jnp.where(parts.fired > 0, 0, jnp.minimum(state.rows_since_fired + x.shape[0] * axes.row_parts, _LONG))
    since = jnp.where(good, since, state.rows_since_fired)
    resampled = jnp.int32(0)
    if numbers.resample_every is not None:
        params, opt_state, since, resampled = _resampled(dictionary, axes, state, params, opt_state, since, x, target, good)

    bad = 1 - good.astype(jnp.int32)
    following = dataclasses.replace(
        state,
        step=state.step + 1,
        params=params,
        opt_state=opt_state,
        average=average,
        rows_since_fired=since,
        skipped=state.skipped + bad,
    )
    values = {
        "loss": loss,
        "reconstruction": parts.terms["reconstruction"],
        "l0": parts.l0,
        "aux": jnp.float32(0),
        **{f"loss_{name}": value for name, value in parts.terms.items()},
        **parts.measured,
        "explained_variance": parts.explained_variance,
        "dead": axes.mean_latents(dead.mean(dtype=jnp.float32)),
        "grad_norm": norm,
        "learning_rate": rate,
        **({} if settings.k is None else {"k": settings.k}),
        **({} if numbers.resample_every is None else {"resampled": resampled}),
    }
    metrics = {name: (jnp.where(good, value, 0.0).astype(jnp.float32), good.astype(jnp.float32)) for name, value in values.items()}
    metrics["skipped"] = (bad.astype(jnp.float32), jnp.float32(1))
    return following, metrics


def _in_training_units(state: TrainState, batch: Rows) -> tuple[Float[Array, "B D"], Float[Array, "B D_out"] | None]:
    """Float32 inputs and, for a transcoder, targets, each divided by its scale."""
    if not isinstance(batch, tuple):
        return divided(batch.astype(jnp.float32), state.input_scale), None
    return divided(batch[0].astype(jnp.float32), state.input_scale), divided(batch[1].astype(jnp.float32), state.output_scale)


def _with_aux(differentiated: Callable[[Array | None], Any], dead: Array, some: Array) -> Any:
    """Loss and gradients, with AuxK only in steps that have dead latents, on whichever device.

    One branch around everything and not one around the auxiliary loss, whose gradient would be arrays of zeros, made and added in
    every step.
    """

    def without() -> Any:
        (loss, parts), gradients = differentiated(None)
        nothing = {"aux": jnp.float32(0)}
        return (loss, dataclasses.replace(parts, terms=parts.terms | nothing, measured=parts.measured | nothing)), gradients

    return jax.lax.cond(some, lambda: differentiated(dead), without)


def _accumulated(loss_and_gradients: Callable[[Array, Array | None], Any], micro_batches: int, x: Array, target: Array | None) -> Any:
    """Loss, its parts and gradients of a batch, taken in so many equal parts one after another: means, but for ``fired``, a sum.

    Part m is the rows m, m + micro_batches, ... These are the same rows however the batch is divided over devices, as each has a multiple
    of ``micro_batches``.
    """
    if micro_batches == 1:
        return loss_and_gradients(x, target)
    if len(x) % micro_batches:
        raise UserError(f"make_step: {micro_batches} micro-batches do not divide the {len(x)} rows that a device has: give more rows")
    cut = lambda rows: rows.reshape(-1, micro_batches, rows.shape[1]).swapaxes(0, 1)  # noqa: E731
    pieces = jax.tree.map(cut, (x, target))

    def add(sums: Any, piece: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, loss_and_gradients(*piece)), None

    shapes = jax.eval_shape(loss_and_gradients, *jax.tree.map(lambda rows: rows[0], pieces))
    sums = jax.lax.scan(add, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes), pieces)[0]
    (loss, parts), gradients = jax.tree.map(lambda leaf: leaf / micro_batches, sums)
    return (loss, dataclasses.replace(parts, fired=sums[0][1].fired)), gradients


def _norm(dictionary: Any, gradients: dict, params: dict, axes: Axes) -> Float[Array, ""]:
    """The norm of the gradient over all latents."""
    squares = {name: squared_norm(g, params[name] if held_at_unit_norm(dictionary, name) else None) for name, g in gradients.items()}
    if axes.latents is None:
        return jnp.sqrt(sum(squares.values()))
    of_latents = [name for name, names in dictionary.axes().items() if "latent" in names and name in squares]
    whole = [square for name, square in squares.items() if name not in of_latents]
    return jnp.sqrt(sum(whole, axes.sum_latents(sum(squares[name] for name in of_latents))))


def _measure(program: Program, state: TrainState, params: dict, statistics: dict, settings: LossSettings, good: Array) -> dict:
    """The parameters that are measured follow the batch; while k still falls they wait, for they belong to the final one."""
    following = program.dictionary.update_statistics(params, statistics)
    settled = good if settings.k is None else good & (settings.k == state.numbers.settings.k)
    return {**params, **{name: jnp.where(settled, following[name], params[name]) for name in program.dictionary.STATISTICS}}


def _resampled(
    dictionary: Any,
    axes: Axes,
    state: TrainState,
    params: dict,
    opt_state: Any,
    since: Array,
    x: Array,
    target: Array | None,
    good: Array,
) -> tuple[dict, Any, Array, Array]:
    """Every so many steps, dead latents begin again; in all others nothing is computed."""
    numbers = state.numbers
    dead = since >= numbers.dead_rows

    def begin_again() -> tuple[dict, Any, Array, Array]:
        key = jax.random.fold_in(jax.random.key(numbers.seed), state.step)
        fresh, forgetful = resample(dictionary, key, params, opt_state, x, target, dead, axes)
        return fresh, forgetful, jnp.where(dead, 0, since), axes.sum_latents(dead.sum(dtype=jnp.int32))

    due = ((state.step + 1) % numbers.resample_every == 0) & axes.any_latents(dead) & good
    return jax.lax.cond(due, begin_again, lambda: (params, opt_state, since, jnp.int32(0)))
