"""Optimisers by name, from optax, with the learning rate given at each update: it follows the run's step, not a count of updates."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
from jaxtyping import Array, Float
from optax import contrib

from .moments import scale_by_adam_bf16
from .spec import Optimizer


class Optimiser(NamedTuple):
    """Three pure functions.

    Attributes:
      init: ``params -> state``.
      update: ``(gradients, state, params, rate) -> (params, state)``.
      weights: ``(state, params) ->`` the weights that the training stands for; for most the parameters themselves.
    """

    init: Callable[[dict], Any]
    update: Callable[[dict, Any, dict, Float[Array, ""]], tuple[dict, Any]]
    weights: Callable[[Any, dict], dict]


def make_optimiser(name: Optimizer, betas: tuple[float, float], eps: float, constrain: Callable[[dict], dict]) -> Optimiser:
    """An optimiser whose parameters are put back to where they must lie (``constrain``) after each update.

    Args:
      name: see ``TrainSpec.optimizer``.
      betas, eps: of Adam (for Muon, of the vectors' Adam); Lion's two; Signum's first; the first of schedule_free is the share of
        the average in the point where the gradient is taken.
      constrain: the dictionary's.
    """
    if name == "schedule_free":
        return _schedule_free(betas, eps, constrain)
    b1, b2 = betas
    if name == "adam_bf16":
        transform = scale_by_adam_bf16(b1, b2, eps)
    elif name == "lion":
        transform = optax.scale_by_lion(b1, b2)
    elif name == "signum":
        transform = optax.chain(optax.ema(b1, debias=False), optax.scale_by_sign())
    elif name == "muon":
        # Nesterov momentum for both; the matrices' updates get the root mean square that Adam's usually have, so that one rate fits both
        transform = optax.chain(contrib.muon(1.0, adam_b1=b1, adam_b2=b2, eps=eps, consistent_rms=0.2), optax.scale(-1.0))
    else:
        transform = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)

    def update(gradients: dict, state: Any, params: dict, rate: Float[Array, ""]) -> tuple[dict, Any]:
        with jax.default_matmul_precision("highest"):
            updates, state = transform.update(gradients, state, params)
        return constrain(jax.tree.map(lambda p, u: p - rate * u, params, updates)), state

    return Optimiser(transform.init, update, lambda state, params: params)


def _schedule_free(betas: tuple[float, float], eps: float, constrain: Callable[[dict], dict]) -> Optimiser:
    """Adam without momentum under ``optax.contrib.schedule_free``, which needs the rate itself: it weighs its average with it.

    Three points of which two are stored: gradients are taken at ``params``, steps move ``state.z``, and the weights are their average.
    All three are constrained.
    """
    b1, b2 = betas

    def transform(rate: Any) -> optax.GradientTransformation:
        rms = optax.scale_by_rms(decay=b2, eps=eps, eps_in_sqrt=False, bias_correction=True)
        return contrib.schedule_free(optax.chain(rms, optax.scale_by_learning_rate(rate)), rate, b1=b1)

    def update(gradients: dict, state: Any, params: dict, rate: Float[Array, ""]) -> tuple[dict, Any]:
        updates, state = transform(rate).update(gradients, state, params)
        params = constrain(jax.tree.map(lambda p, u: p + u, params, updates))
        return params, state._replace(z=constrain(state.z))

    def weights(state: Any, params: dict) -> dict:
        return constrain(contrib.schedule_free_eval_params(state, params))

    return Optimiser(lambda params: transform(0.0).init(params), update, weights)
