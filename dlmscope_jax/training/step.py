"""One optimiser step of a dictionary: pure, jitted, with a donated state."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dlmscope_jax.dictionaries import LossSettings
from dlmscope_jax.dictionaries.auxk import WithAuxK
from dlmscope_jax.kernels import squared_norm

from . import schedules
from .averaging import follow
from .optimisers import held_at_unit_norm, kept
from .program import Program, program_of
from .resampling import resample
from .spec import TrainSpec
from .state import TrainState, divided, learned, optimiser_of

Metrics = dict[str, tuple[Array, Array]]
Rows = Float[Array, "B D"] | tuple[Float[Array, "B D"], Float[Array, "B D_out"]]
Step = Callable[[TrainState, Rows], tuple[TrainState, Metrics]]

# rows_since_fired stops counting here, far above any threshold and far below overflow
_LONG = 2**30


def make_step(spec: TrainSpec) -> Step:
    """The jitted step ``(state, batch) -> (state, metrics)``; the state is donated.

    The batch holds raw rows [B, D] of any float dtype, for a transcoder a pair of them: inputs and targets. Metrics are pairs
    (sum, count) of float32 scalars, whose quotient is the mean over whatever steps they are added up over: ``loss``,
    ``reconstruction``, each term of the loss as ``loss_<term>``, what the dictionary measures (``aux``: 0 where there is none),
    ``explained_variance`` (of the batch, for progress only), ``l0``, ``dead`` (share), ``grad_norm`` (before clipping),
    ``learning_rate``, ``skipped``; with annealing ``k``, with resampling ``resampled`` (latents).

    A batch whose loss or gradient is not finite changes nothing but ``step`` and ``skipped``, and counts in no other metric.

    Trainings of one ``Program`` share one compiled program: their numbers are in the state.
    """
    return _compiled(program_of(spec))


@functools.cache
def _compiled(program: Program) -> Step:
    return jax.jit(functools.partial(_step, program), donate_argnums=0)


def _step(program: Program, state: TrainState, batch: Rows) -> tuple[TrainState, Metrics]:
    dictionary, numbers = program.dictionary, state.numbers
    x, target = _in_training_units(state, batch)
    settings = schedules.loss_settings(numbers, state.step)
    rate = schedules.rate(program.schedule, numbers, state.step)
    dead = state.rows_since_fired >= numbers.dead_rows
    old = learned(dictionary, state.params)

    def differentiated(dead: Array | None) -> tuple[tuple[Array, Any], dict]:
        def loss_of(weights: dict) -> tuple[Array, Any]:
            return dictionary.loss({**state.params, **weights}, x, target, dead=dead, settings=settings)

        return jax.value_and_grad(loss_of, has_aux=True)(old)

    if program.aux and isinstance(dictionary, WithAuxK):
        (loss, parts), gradients = _with_aux(differentiated, dead)
    else:
        (loss, parts), gradients = differentiated(dead if program.aux else None)
    norm = jnp.sqrt(sum(squared_norm(g, old[name] if held_at_unit_norm(dictionary, name) else None) for name, g in gradients.items()))
    good = jnp.isfinite(loss) & jnp.isfinite(norm)
    clip = jnp.minimum(1.0, numbers.clip / norm)

    weights, opt_state = optimiser_of(program).update(gradients, state.opt_state, old, rate, clip, good)
    params = _measure(program, state, {**state.params, **weights}, parts.statistics, settings, good)
    average = None if state.average is None else kept(good, follow(state.average, learned(dictionary, params), numbers.ema), state.average)
    since = jnp.where(parts.fired > 0, 0, jnp.minimum(state.rows_since_fired + x.shape[0], _LONG))
    since = jnp.where(good, since, state.rows_since_fired)
    resampled = jnp.int32(0)
    if numbers.resample_every is not None:
        params, opt_state, since, resampled = _resampled(dictionary, state, params, opt_state, since, x, target, good)

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
        "dead": dead.mean(dtype=jnp.float32),
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


def _with_aux(differentiated: Callable[[Array | None], Any], dead: Array) -> Any:
    """Loss and gradients, with AuxK only in steps that have dead latents.

    One branch around everything and not one around the auxiliary loss, whose gradient would be arrays of zeros, made and added in
    every step.
    """

    def without() -> Any:
        (loss, parts), gradients = differentiated(None)
        nothing = {"aux": jnp.float32(0)}
        return (loss, dataclasses.replace(parts, terms=parts.terms | nothing, measured=parts.measured | nothing)), gradients

    return jax.lax.cond(dead.any(), lambda: differentiated(dead), without)


def _measure(program: Program, state: TrainState, params: dict, statistics: dict, settings: LossSettings, good: Array) -> dict:
    """The parameters that are measured follow the batch; while k still falls they wait, for they belong to the final one."""
    following = program.dictionary.update_statistics(params, statistics)
    settled = good if settings.k is None else good & (settings.k == state.numbers.settings.k)
    return {**params, **{name: jnp.where(settled, following[name], params[name]) for name in program.dictionary.STATISTICS}}


def _resampled(
    dictionary: Any, state: TrainState, params: dict, opt_state: Any, since: Array, x: Array, target: Array | None, good: Array
) -> tuple[dict, Any, Array, Array]:
    """Every so many steps, dead latents begin again; in all others nothing is computed."""
    numbers = state.numbers
    dead = since >= numbers.dead_rows

    def begin_again() -> tuple[dict, Any, Array, Array]:
        key = jax.random.fold_in(jax.random.key(numbers.seed), state.step)
        fresh, forgetful = resample(dictionary, key, params, opt_state, x, target, dead)
        return fresh, forgetful, jnp.where(dead, 0, since), dead.sum(dtype=jnp.int32)

    due = ((state.step + 1) % numbers.resample_every == 0) & dead.any() & good
    return jax.lax.cond(due, begin_again, lambda: (params, opt_state, since, jnp.int32(0)))
