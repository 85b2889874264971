"""Optimisers by name, with the learning rate given at each update: it follows the run's step, not a count of updates.

Adam is ``kernels.row_update``, which does all that happens to a row in one pass over memory; the others are optax's.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float
from optax import contrib

from dlmscope_jax.dictionaries import Dictionary
from dlmscope_jax.kernels import row_update

from .spec import Optimizer


class Optimiser(NamedTuple):
    """Three pure functions.

    Attributes:
      init: ``params -> state``.
      update: ``(gradients, state, params, rate, scale, keep) -> (params, state)``: gradients as they are, their part along unit decoder
        rows included; ``scale`` is the factor that clips them; where ``keep`` is False nothing changes.
      weights: ``(state, params) ->`` the weights that the training stands for; for most the parameters themselves.
    """

    init: Callable[[dict], Any]
    update: Callable[[dict, Any, dict, Float[Array, ""], Float[Array, ""], Bool[Array, ""]], tuple[dict, Any]]
    weights: Callable[[Any, dict], dict]


def make_optimiser(name: Optimizer, betas: tuple[float, float], eps: float, dictionary: Dictionary) -> Optimiser:
    """An optimiser whose parameters are put back to where they must lie after each update.

    Args:
      name: see ``TrainSpec.optimizer``.
      betas, eps: of Adam (for Muon, of the vectors' Adam); Lion's two; Signum's first; the first of schedule_free is the share of
        the average in the point where the gradient is taken.
      dictionary: whose constraints hold.
    """
    if name in ("adam", "adam_bf16"):
        return _adam(betas, eps, dictionary, jnp.bfloat16 if name == "adam_bf16" else jnp.float32)
    if name == "schedule_free":
        return _schedule_free(betas, eps, dictionary)
    b1, b2 = betas
    if name == "lion":
        transform = optax.scale_by_lion(b1, b2)
    elif name == "signum":
        transform = optax.chain(optax.ema(b1, debias=False), optax.scale_by_sign())
    else:
        # Nesterov momentum for both; the matrices' updates get the root mean square that Adam's usually have, so that one rate fits both
        transform = optax.chain(contrib.muon(1.0, adam_b1=b1, adam_b2=b2, eps=eps, consistent_rms=0.2), optax.scale(-1.0))

    def update(gradients: dict, state: Any, params: dict, rate: Array, scale: Array, keep: Array) -> tuple[dict, Any]:
        gradients = _clipped(dictionary, params, gradients, scale)
        with jax.default_matmul_precision("highest"):
            updates, new = transform.update(gradients, state, params)
        moved = dictionary.constrain(jax.tree.map(lambda p, u: p - rate * u, params, updates))
        return kept(keep, (moved, new), (params, state))

    return Optimiser(transform.init, update, lambda state, params: params)


def held_at_unit_norm(dictionary: Dictionary, name: str) -> bool:
    """Whether training holds the rows of a parameter at unit norm."""
    return dictionary.unit_decoder and name == "W_dec"


def _clipped(dictionary: Dictionary, params: dict, gradients: dict, scale: Array) -> dict:
    return jax.tree.map(lambda g: g * scale, dictionary.project_gradient(params, gradients))


def kept(keep: Array, new: Any, old: Any) -> Any:
    """The new tree, or the old one where ``keep`` is False."""
    return jax.tree.map(lambda a, b: jnp.where(keep, a, b), new, old)


def _adam(betas: tuple[float, float], eps: float, dictionary: Dictionary, dtype: Any) -> Optimiser:
    """Adam with moments of ``dtype``; its state is optax's."""
    b1, b2 = betas

    def init(params: dict) -> optax.ScaleByAdamState:
        zeros = lambda: jax.tree.map(lambda p: jnp.zeros(p.shape, dtype), params)  # noqa: E731
        return optax.ScaleByAdamState(jnp.int32(0), zeros(), zeros())

    def update(gradients: dict, state: Any, params: dict, rate: Array, scale: Array, keep: Array) -> tuple[dict, Any]:
        count, weights, mu, nu = state.count + 1, {}, {}, {}
        for name, weight in params.items():
            shape = (1, -1) if weight.ndim < 2 else (-1, weight.shape[-1])
            four = (array.reshape(shape) for array in (weight, state.mu[name], state.nu[name], gradients[name]))
            unit = held_at_unit_norm(dictionary, name)
            new = row_update(*four, rate=rate, count=count, scale=scale, keep=keep, b1=b1, b2=b2, eps=eps, unit=unit)
            weights[name], mu[name], nu[name] = (array.reshape(weight.shape) for array in new)
        count = jnp.where(keep, count, state.count)
        return dictionary.bounded(weights), optax.ScaleByAdamState(count, mu, nu)

    return Optimiser(init, update, lambda state, params: params)


def _schedule_free(betas: tuple[float, float], eps: float, dictionary: Dictionary) -> Optimiser:
    """Adam without momentum under ``optax.contrib.schedule_free``, which needs the rate itself: it weighs its average with it.

    Three points of which two are stored: gradients are taken at ``params``, steps move ``state.z``, and the weights are their average.
    All three are constrained.
    """
    b1, b2 = betas

    def transform(rate: Any) -> optax.GradientTransformation:
        rms = optax.scale_by_rms(decay=b2, eps=eps, eps_in_sqrt=False, bias_correction=True)
        return contrib.schedule_free(optax.chain(rms, optax.scale_by_learning_rate(rate)), rate, b1=b1)

    def update(gradients: dict, state: Any, params: dict, rate: Array, scale: Array, keep: Array) -> tuple[dict, Any]:
        updates, new = transform(rate).update(_clipped(dictionary, params, gradients, scale), state, params)
        moved = dictionary.constrain(jax.tree.map(lambda p, u: p + u, params, updates))
        return kept(keep, (moved, new._replace(z=dictionary.constrain(new.z))), (params, state))

    def weights(state: Any, params: dict) -> dict:
        return dictionary.constrain(contrib.schedule_free_eval_params(state, params))

    return Optimiser(lambda params: transform(0.0).init(params), update, weights)
