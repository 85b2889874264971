"""Rows made of known directions, and the plainest loop that trains a dictionary on them."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dlmscope_jax.dictionaries import LossSettings

D, FEATURES, ACTIVE = 24, 32, 2


def directions(seed: int = 0, d: int = D) -> np.ndarray:
    """Unit directions [FEATURES, d]."""
    drawn = np.random.default_rng(seed).normal(size=(FEATURES, d))
    return (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)


def draw_codes(key, n: int):
    """[n, FEATURES] with ACTIVE entries between .5 and 1.5, scaled so that rows made of them have a mean squared norm of about 1."""
    which, size = jax.random.split(key)
    chosen = jax.lax.top_k(jax.random.uniform(which, (n, FEATURES)), ACTIVE)[1]
    on = jax.nn.one_hot(chosen, FEATURES).sum(axis=1)
    return on * jax.random.uniform(size, (n, FEATURES), minval=0.5, maxval=1.5) * (1.083 * ACTIVE) ** -0.5


def start(spec, out=None):
    """First parameters, biases estimated from a few rows."""
    codes = draw_codes(jax.random.key(2), 512)
    x = codes @ directions() + 0.1
    return spec.init(jax.random.key(0), x) if out is None else spec.init(jax.random.key(0), codes @ out, x)


@cache
def _program(spec, steps, lr, batch, b1, dead_after):
    tx = optax.adam(optax.linear_schedule(lr, 0.0, steps // 5, 4 * steps // 5), b1=b1)

    def learned(tree):
        return {name: value for name, value in tree.items() if name not in spec.STATISTICS}

    @jax.jit
    def run(params, settings, read, write):
        def step(carry, i):
            params, moments, since = carry
            codes = draw_codes(jax.random.fold_in(jax.random.key(1), i), batch)
            target = None if write is None else codes @ write
            dead = None if dead_after is None else since > dead_after
            rise = jnp.minimum(1.0, i.astype(jnp.float32) / (steps / 3))
            now = replace(settings, sparsity=settings.sparsity * rise)
            (_, parts), gradient = jax.value_and_grad(spec.loss, has_aux=True)(params, codes @ read + 0.1, target, dead, now)
            update, moments = tx.update(learned(spec.project_gradient(params, gradient)), moments, learned(params))
            params = spec.constrain(params | optax.apply_updates(learned(params), update))
            params = spec.update_statistics(params, parts.statistics)
            since = jnp.where(parts.fired > 0, 0, since + 1)
            return (params, moments, since), (parts.l0, parts.explained_variance)

        first = (params, tx.init(learned(params)), jnp.zeros(spec.width, jnp.int32))
        (params, _, since), history = jax.lax.scan(step, first, jnp.arange(steps))
        return params, since < 100, history

    return run


def fit(spec, settings=LossSettings(), steps=2000, lr=3e-3, batch=256, b1=0.0, dead_after=None, out=None, params=None):  # noqa: B008
    """(parameters, L0, explained variance, [N] which latents fired); the last three are of the last 100 steps.

    The sparsity penalty rises over the first third, the rate falls over the last fifth. The mean of the rows is not zero.

    Args:
      dead_after: steps without firing after which a latent is dead; None: no auxiliary loss.
      out: directions that a transcoder writes where the rows have those of ``directions()``.
      params: where to start.
    """
    run = _program(spec, steps, lr, batch, b1, dead_after)
    with jax.numpy_dtype_promotion("standard"):  # optax relies on it
        first = start(spec, out) if params is None else params
        params, alive, (l0, explained) = run(first, jax.tree.map(jnp.float32, settings), directions(), out)
    return params, float(l0[-100:].mean()), float(explained[-100:].mean()), np.asarray(alive)


def found(params, alive, truth) -> float:
    """The share of the true directions that a living latent's decoder row meets at a cosine of .9."""
    rows = np.asarray(params["W_dec"])[alive]
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)
    return float(((truth @ rows.T).max(axis=1, initial=0.0) >= 0.9).mean())
