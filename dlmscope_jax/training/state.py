"""What a training run carries from step to step, and how it begins."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jaxtyping import Array, Float, Int

from dlmscope_jax.dictionaries import TopK
from dlmscope_jax.errors import UserError

from .spec import TrainSpec


@struct.dataclass
class TrainState:
    """Everything that a resumed run needs; the batch of a step is a function of (seed, step), so no random state is here.

    Attributes:
      step: batches seen, skipped ones included.
      params: of the dictionary, float32, for rows divided by ``input_scale``.
      opt_state: Adam's moments.
      rows_since_fired: [N] rows since each latent was last active.
      input_scale: what rows are divided by.
      skipped: batches that were left out because something in them was not finite.
    """

    step: Int[Array, ""]
    params: dict
    opt_state: Any
    rows_since_fired: Int[Array, " N"]
    input_scale: Float[Array, ""]
    skipped: Int[Array, ""]


def make_optimizer(spec: TrainSpec) -> optax.GradientTransformation:
    """Adam without its learning rate, which follows the state's step and not the number of updates."""
    return optax.scale_by_adam(b1=spec.betas_used[0], b2=spec.betas_used[1], eps=spec.eps_used)


def estimate_scale(sample: Float[np.ndarray, "S D"], name: str = "the sample") -> float:
    """sqrt(mean |x|^2) over the rows that are finite, in float64.

    Raises:
      UserError: no row is finite, or all are zero; says so of ``name``.
    """
    rows = np.asarray(sample, np.float64)
    square = np.square(rows).sum(axis=1)
    square = square[np.isfinite(square)]
    if not len(square):
        raise UserError(f"{name}: none of its first {len(rows)} rows is finite: look for NaN and infinity where the rows were made")
    if not square.any():
        raise UserError(f"{name}: its first {len(rows)} rows are all zero: nothing can be learned from them")
    return float(np.sqrt(square.mean()))


def init_state(spec: TrainSpec, key: Array | None = None, sample: Float[np.ndarray, "S D"] | None = None) -> TrainState:
    """The state before the first step.

    Args:
      spec: the training.
      key: for the first weights; None: ``jax.random.key(spec.seed)``.
      sample: raw rows, from which the input scale is estimated and ``b_dec`` starts at their geometric median; None: 1 and 0.

    Raises:
      UserError: a sample of another width, or of which nothing can be learned.
    """
    key = jax.random.key(spec.seed) if key is None else key
    scale = 1.0
    if sample is not None:
        if sample.ndim != 2 or sample.shape[1] != spec.dictionary.d_in:
            raise UserError(f"init_state: the sample must be [rows, {spec.dictionary.d_in}], got {list(sample.shape)}")
        sample = np.asarray(sample, np.float32)
        scale = estimate_scale(sample, spec.site or "the sample")
        sample = sample[np.isfinite(sample).all(axis=1)] / np.float32(scale)
    params = _initialiser(spec.dictionary)(key, None if sample is None else jnp.asarray(sample))
    return TrainState(
        step=jnp.int32(0),
        params=params,
        opt_state=make_optimizer(spec).init(params),
        rows_since_fired=jnp.zeros(spec.dictionary.width, jnp.int32),
        input_scale=jnp.float32(scale),
        skipped=jnp.int32(0),
    )


@functools.cache
def _initialiser(dictionary: TopK) -> Callable[..., dict]:
    """``dictionary.init``, compiled once for a shape: its geometric median is a loop."""
    return jax.jit(dictionary.init)
