"""What of a training is compiled and what is data: trainings that differ only in numbers run one program.

The static part is a key of compiled programs. The numbers are arrays in the state, so a grid over learning rates, penalties,
seeds or the final k of an annealing compiles once.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from dlmscope_jax.dictionaries import Dictionary, LossSettings

from .spec import Optimizer, Schedule, TrainSpec

# k is whole and all else is not, however it was written: weights of 1 and of 1.0 are one program
_SETTINGS = {field.name: jnp.int32 if field.name == "k" else jnp.float32 for field in dataclasses.fields(LossSettings)}


@dataclasses.dataclass(frozen=True)
class Program:
    """What a step is compiled for; ``dictionary`` has the k that annealing starts with."""

    dictionary: Dictionary
    optimizer: Optimizer
    betas: tuple[float, float]
    eps: float
    schedule: Schedule
    aux: bool
    micro_batches: int


@struct.dataclass
class Numbers:
    """What may differ between trainings of one program; None is a feature that the program does not have.

    Attributes:
      steps, lr, warmup, decay_from: of the learning rate, steps as float32.
      clip: largest norm of a gradient.
      settings: weights of the loss; ``settings.k`` is the final k of an annealing.
      sparsity_warmup, entropy_start: steps.
      k_start, k_anneal_steps: of an annealing.
      dead_rows: rows without firing that make a latent dead.
      resample_every: steps between two resamplings.
      ema: decay of the average of the weights.
      seed: of resampling.
    """

    steps: Float[Array, ""]
    lr: Float[Array, ""]
    warmup: Float[Array, ""]
    decay_from: Float[Array, ""]
    clip: Float[Array, ""]
    settings: LossSettings
    sparsity_warmup: Float[Array, ""]
    entropy_start: Int[Array, ""]
    k_start: Float[Array, ""] | None
    k_anneal_steps: Float[Array, ""] | None
    dead_rows: Int[Array, ""]
    resample_every: Int[Array, ""] | None
    ema: Float[Array, ""] | None
    seed: Int[Array, ""] | None


def program_of(spec: TrainSpec) -> Program:
    """The static part of a training."""
    dictionary: Any = spec.dictionary
    if spec.k_start is not None:
        dictionary = dataclasses.replace(dictionary, k=spec.k_start)
    aux = spec.settings_used.aux > 0
    return Program(dictionary, spec.optimizer, spec.betas_used, spec.eps_used, spec.schedule, aux, spec.micro_batches)


def numbers_of(spec: TrainSpec) -> Numbers:
    """The rest of it."""
    settings = {field.name: getattr(spec.settings_used, field.name) for field in dataclasses.fields(LossSettings)}
    if spec.k_start is not None:
        settings["k"] = getattr(spec.dictionary, "k")  # noqa: B009  # not every dictionary has one
    annealed, resampled = spec.k_start is not None, spec.resample_every is not None
    return Numbers(
        steps=jnp.float32(spec.steps),
        lr=jnp.float32(spec.lr_used),
        warmup=jnp.float32(spec.warmup_used),
        decay_from=jnp.float32(spec.decay_start * spec.steps),
        clip=jnp.float32(np.inf if spec.clip is None else spec.clip),
        settings=LossSettings(**{name: value if value is None else _SETTINGS[name](value) for name, value in settings.items()}),
        sparsity_warmup=jnp.float32(spec.sparsity_warmup_used),
        entropy_start=jnp.int32(spec.entropy_start),
        k_start=jnp.float32(spec.k_start) if annealed else None,
        k_anneal_steps=jnp.float32(spec.k_anneal_used) if annealed else None,
        dead_rows=jnp.int32(min(spec.dead_rows_used, 2**30)),
        resample_every=jnp.int32(spec.resample_every) if resampled else None,
        ema=None if spec.ema is None else jnp.float32(spec.ema),
        seed=jnp.uint32(spec.seed % 2**32) if resampled else None,
    )
