"""Numbers that change along a run: learning rate, sparsity penalty, entropy, active latents. Pure functions of the step."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dlmscope_jax.dictionaries import LossSettings

from .program import Numbers, numbers_of
from .spec import Schedule, TrainSpec


def learning_rate(spec: TrainSpec, step: Array | int) -> Float[Array, ""]:
    """The rate of the 0-based ``step``: linear warm-up (the first step already moves), then ``spec.schedule``."""
    return rate(spec.schedule, numbers_of(spec), step)


def rate(schedule: Schedule, numbers: Numbers, step: Array | int) -> Float[Array, ""]:
    """As ``learning_rate``, of traced numbers.

    ``linear``: constant to ``decay_from``, then a straight line to 0 at ``steps``; ``cosine``: half a wave from the end of the
    warm-up to 0 at ``steps``; ``constant``.
    """
    done = jnp.asarray(step, jnp.float32)
    shape = (done + 1) / jnp.maximum(1.0, numbers.warmup)
    if schedule == "linear":
        shape = jnp.minimum(shape, (numbers.steps - done) / jnp.maximum(1.0, numbers.steps - numbers.decay_from))
    if schedule == "cosine":
        along = (done - numbers.warmup) / jnp.maximum(1.0, numbers.steps - numbers.warmup)
        shape = jnp.minimum(shape, 0.5 + 0.5 * jnp.cos(jnp.pi * jnp.clip(along, 0.0, 1.0)))
    return numbers.lr * jnp.clip(shape, 0.0, 1.0)


def active(numbers: Numbers, step: Array | int) -> Int[Array, ""] | None:
    """How many latents may be active in the 0-based ``step``: a straight line from k_start to the final k; None: not annealed."""
    final = numbers.settings.k
    if final is None or numbers.k_start is None or numbers.k_anneal_steps is None:
        return None
    share = jnp.minimum(1.0, jnp.asarray(step, jnp.float32) / numbers.k_anneal_steps)
    return jnp.round(numbers.k_start + (final - numbers.k_start) * share).astype(jnp.int32)


def loss_settings(numbers: Numbers, step: Array | int) -> LossSettings:
    """The weights of the loss in the 0-based ``step``.

    The sparsity penalty rises linearly from 0; the entropy is off and then on. Everything else is on from the start.
    """
    done = jnp.asarray(step, jnp.float32)
    risen = jnp.where(numbers.sparsity_warmup > 0, jnp.minimum(1.0, done / jnp.maximum(1.0, numbers.sparsity_warmup)), 1.0)
    settings = numbers.settings
    return dataclasses.replace(
        settings,
        sparsity=settings.sparsity * risen,
        entropy=jnp.where(step >= numbers.entropy_start, settings.entropy, 0.0),
        k=active(numbers, step),
    )
