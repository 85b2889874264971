"""One optimiser step of a dictionary: pure, jitted, with a donated state."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dlmscope_jax.dictionaries import LossSettings

from .spec import TrainSpec
from .state import TrainState, make_optimizer

Metrics = dict[str, tuple[Array, Array]]
Step = Callable[[TrainState, Float[Array, "B D"]], tuple[TrainState, Metrics]]

# rows_since_fired stops counting here, far above any threshold and far below overflow
_LONG = 2**30


def make_step(spec: TrainSpec) -> Step:
    """The jitted step ``(state, batch) -> (state, metrics)``; the state is donated.

    The batch holds raw rows [B, D] of any float dtype. Metrics are pairs (sum, count) of float32 scalars, whose quotient is
    the mean over whatever steps they are added up over: ``loss``, ``reconstruction``, ``aux``, ``explained_variance`` (of
    the batch, for progress only), ``l0``, ``dead`` (share), ``grad_norm`` (before clipping), ``learning_rate``, ``skipped``.

    A batch whose loss or gradient is not finite changes nothing but ``step`` and ``skipped``, and counts in no other metric.

    Trainings that differ only in their site, row selection or seed share one compiled program.
    """
    return _compiled(dataclasses.replace(spec, site=None, select="all", seed=0, sample_rows=1))


@functools.cache
def _compiled(spec: TrainSpec) -> Step:
    return jax.jit(functools.partial(_step, spec), donate_argnums=0)


def learning_rate(spec: TrainSpec, step: Array | int) -> Float[Array, ""]:
    """The rate of the 0-based ``step``: linear warm-up (the first step already moves), constant, linear to 0."""
    done = jnp.asarray(step, jnp.float32)
    decay_from = spec.decay_start * spec.steps
    up = (done + 1) / max(1, spec.warmup_used)
    down = (spec.steps - done) / max(1.0, spec.steps - decay_from)
    return spec.lr_used * jnp.clip(jnp.minimum(up, down), 0.0, 1.0)


def _step(spec: TrainSpec, state: TrainState, batch: Float[Array, "B D"]) -> tuple[TrainState, Metrics]:
    dictionary, n_rows = spec.dictionary, batch.shape[0]
    x = batch.astype(jnp.float32) / state.input_scale
    dead = state.rows_since_fired >= spec.dead_rows_used

    differentiate = jax.value_and_grad(dictionary.loss, has_aux=True)
    (loss, parts), gradients = differentiate(
        state.params, x, dead=dead if spec.settings_used.aux else None, settings=LossSettings(aux=spec.settings_used.aux)
    )
    gradients = dictionary.project_gradient(state.params, gradients)
    norm = jnp.sqrt(sum(jnp.vdot(g, g) for g in jax.tree.leaves(gradients)))
    gradients = jax.tree.map(lambda g: g * jnp.minimum(1.0, (spec.clip or jnp.inf) / norm), gradients)

    updates, opt_state = make_optimizer(spec).update(gradients, state.opt_state)
    rate = learning_rate(spec, state.step)
    params = dictionary.constrain(jax.tree.map(lambda p, u: p - rate * u, state.params, updates))
    since = jnp.where(parts.fired > 0, 0, jnp.minimum(state.rows_since_fired + n_rows, _LONG))

    good = jnp.isfinite(loss) & jnp.isfinite(norm)
    params, opt_state, since = jax.tree.map(
        lambda new, old: jnp.where(good, new, old), (params, opt_state, since), (state.params, state.opt_state, state.rows_since_fired)
    )
    bad = 1 - good.astype(jnp.int32)
    following = TrainState(
        step=state.step + 1,
        params=params,
        opt_state=opt_state,
        rows_since_fired=since,
        input_scale=state.input_scale,
        skipped=state.skipped + bad,
    )
    per_row = {"loss": loss, "reconstruction": parts.terms["reconstruction"], "l0": parts.l0}
    per_step = {
        "aux": parts.measured.get("aux", jnp.float32(0)),
        "explained_variance": parts.explained_variance,
        "dead": dead.mean(dtype=jnp.float32),
        "grad_norm": norm,
        "learning_rate": rate,
    }
    metrics = {name: _pair(good, value * n_rows, n_rows) for name, value in per_row.items()}
    metrics |= {name: _pair(good, value, 1) for name, value in per_step.items()}
    metrics["skipped"] = (bad.astype(jnp.float32), jnp.float32(1))
    return following, metrics


def _pair(good: Array, total: Array, count: int) -> tuple[Array, Array]:
    """A (sum, count) that a bad batch does not enter."""
    return jnp.where(good, total, 0.0).astype(jnp.float32), jnp.where(good, float(count), 0.0).astype(jnp.float32)
