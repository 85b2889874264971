"""Training of small language models: next-token prediction and masked diffusion by the same few functions.

The step is pure and jitted once; a batch is a function of (seed, step), the noise is ``fold_in(seed, step)``, so that two
models trained with the same seed see the same tokens in the same order, and a resumed run equals one that never stopped.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from dlmscope_jax.diffusion import diffusion_loss, next_token_loss
from dlmscope_jax.errors import UserError
from dlmscope_jax.models import Transformer


@dataclasses.dataclass(frozen=True)
class LanguageModelSpec:
    """How a language model is trained (AdamW, linear warm-up, cosine decay to a tenth).

    Attributes:
      steps: optimiser steps.
      batch_size: sequences a step.
      micro_batch: sequences a pass; the gradient of a step is accumulated over ``batch_size / micro_batch`` passes.
      learning_rate: peak.
      warmup: share of the steps with rising rate.
      weight_decay: on matrices, not on norms.
      clip: global norm of the gradient.
      seed: of the token order and of the noise.
    """

    steps: int
    batch_size: int = 32
    micro_batch: int = 8
    learning_rate: float = 3e-3
    warmup: float = 0.05
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if self.batch_size % self.micro_batch:
            raise UserError(f"micro_batch {self.micro_batch} does not divide batch_size {self.batch_size}")


@struct.dataclass
class LanguageModelState:
    """Everything that a resumed run needs.

    Attributes:
      step: optimiser steps done.
      params: ``{"params": {...}}``, float32.
      opt_state: optax's state.
    """

    step: Int[Array, ""]
    params: Any
    opt_state: Any


def make_optimizer(spec: LanguageModelSpec) -> optax.GradientTransformation:
    """AdamW (0.9, 0.95) with clipping, on the schedule of ``spec``."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, spec.learning_rate, max(1, round(spec.warmup * spec.steps)), spec.steps, 0.1 * spec.learning_rate
    )
    is_matrix = lambda params: jax.tree.map_with_path(lambda path, _: "norm" not in path[-1].key and "bias" not in path[-1].key, params)  # noqa: E731
    adam = optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=spec.weight_decay, mask=is_matrix)
    return optax.chain(optax.clip_by_global_norm(spec.clip), adam)


def init_language_model(spec: LanguageModelSpec, params: Any) -> LanguageModelState:
    """The state before the first step, from random or pretrained parameters."""
    return LanguageModelState(step=jnp.int32(0), params=params, opt_state=make_optimizer(spec).init(params))


def batch_rows(spec: LanguageModelSpec, step: int, n_rows: int) -> np.ndarray:
    """Indices of the sequences of one step: every epoch is a permutation drawn from (seed, epoch).

    Raises:
      UserError: when there are fewer sequences than one batch.
    """
    per_epoch = n_rows // spec.batch_size
    if not per_epoch:
        raise UserError(f"{n_rows} blocks are fewer than one batch of {spec.batch_size}: use a larger corpus or a smaller batch_size")
    epoch, index = divmod(step, per_epoch)
    return np.random.default_rng([spec.seed, epoch]).permutation(n_rows)[index * spec.batch_size : (index + 1) * spec.batch_size]


def model_loss(model: Transformer, params: Any, key: Array, tokens: Int[Array, "B T"], keep: Bool[Array, "B T"]) -> Float[Array, ""]:
    """Training loss in nats a token: next-token cross-entropy, or LLaDA's 1/p-weighted masked cross-entropy."""
    if model.diffusion is None:
        return next_token_loss(model, params, tokens, keep)[0]
    return diffusion_loss(model, params, tokens, key, keep)[0]


def make_language_model_step(
    model: Transformer, spec: LanguageModelSpec
) -> Callable[[LanguageModelState, Array, Array], tuple[LanguageModelState, dict[str, Array]]]:
    """The jitted step ``(state, tokens [B, T], keep [B, T]) -> (state, {"loss", "grad_norm"})``; the state is donated."""
    optimizer = make_optimizer(spec)
    passes = spec.batch_size // spec.micro_batch
    trained = model.clone(trains=True)

    def step(state: LanguageModelState, tokens: Array, keep: Array) -> tuple[LanguageModelState, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.key(spec.seed), state.step)
        split = lambda a: a.reshape(passes, spec.micro_batch, *a.shape[1:])  # noqa: E731
        parts = (jax.random.split(key, passes), split(tokens), split(keep))

        def accumulate(total: Any, part: tuple) -> tuple[Any, Array]:
            loss, grads = jax.value_and_grad(lambda p: model_loss(trained, p, *part))(state.params)
            return jax.tree.map(jnp.add, total, grads), loss

        grads, losses = jax.lax.scan(accumulate, jax.tree.map(jnp.zeros_like, state.params), parts)
        grads = jax.tree.map(lambda g: g / passes, grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": losses.mean(), "grad_norm": optax.tree.norm(grads)}
        return LanguageModelState(step=state.step + 1, params=params, opt_state=opt_state), metrics

    return jax.jit(step, donate_argnums=0)


def make_evaluation(model: Transformer, micro_batch: int = 8, seed: int = 0) -> Callable[[Any, np.ndarray, np.ndarray], float]:
    """``(params, tokens [n, T], keep [n, T]) -> mean loss`` in nats a token, with the same noise at every call."""
    loss = jax.jit(lambda params, key, tokens, keep: model_loss(model, params, key, tokens, keep))

    def evaluate(params: Any, tokens: np.ndarray, keep: np.ndarray) -> float:
        key, total, parts = jax.random.key(seed), 0.0, 0
        for start in range(0, len(tokens) - micro_batch + 1, micro_batch):
            part = slice(start, start + micro_batch)
            total += float(loss(params, jax.random.fold_in(key, start), tokens[part], keep[part]))
            parts += 1
        return total / parts

    return evaluate
