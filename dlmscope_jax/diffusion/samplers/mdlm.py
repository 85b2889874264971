"""MDLM's ancestral sampler: the reverse process itself, a step of time at a time."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from dlmscope_jax.errors import UserError

from ..schedule import mdlm_stays
from .base import Proposal, Sampler, check, draw, probability_of


@dataclasses.dataclass(frozen=True)
class MDLMSampler(Sampler):
    """MDLM's ancestral sampler (Sahoo et al. 2024, ``ddpm`` and ``ddpm_cache``).

    From time t to s a masked token stays masked with probability ``s / t`` and otherwise becomes a token drawn from the
    model (SUBS: the mask itself never; known tokens stay as they are).

    Attributes:
      steps: steps of time, evenly from 1 to ``eps``.
      gen_length: tokens to generate.
      eps: the last time.
      noise_removal: one more step in the end, in which each token that is still masked becomes the most probable one.
      cached: a step that follows one without commits uses its logits again and skips the forward pass (``ddpm_cache``).
        This is exact: the model is not told the time. It is left out at steps whose activations are collected, and with
        edits that have a schedule or act on ``"just_committed"``, since these change from step to step.

    ``confidence`` is the probability of the chosen token. The key of a step is split in two, for the Gumbels of the tokens
    and the uniforms u of the masks (a mask stays where ``u < s / t``).

    Raises:
      UserError: when a value is out of range.
    """

    steps: int
    gen_length: int
    eps: float = 1e-5
    noise_removal: bool = True
    cached: bool = True

    drops_mask: ClassVar[bool] = True

    def __post_init__(self):
        check(self, whole=("steps", "gen_length"))
        if not 0 < self.eps < 1:
            raise UserError(f"MDLMSampler: eps is {self.eps}: between 0 and 1")

    @property
    def n_steps(self) -> int:
        return self.steps + self.noise_removal

    @property
    def length(self) -> int:
        return self.gen_length

    @property
    def needs_key(self) -> bool:
        return True

    @property
    def reuses_logits(self) -> bool:
        return self.cached

    def propose(
        self, step: Array, logits: Float[Array, "B W V"], masked: Bool[Array, "B W"], position: Int[Array, "*B W"], key: Key[Array, ""]
    ) -> Proposal:
        token_key, order_key = jax.random.split(key)
        stays = np.append(mdlm_stays(self.steps, self.eps), np.float32(0.0))
        tokens = jnp.where(step == self.steps, jnp.argmax(logits, axis=-1), draw(token_key, logits))
        write = masked & (jax.random.uniform(order_key, masked.shape) >= jnp.asarray(stays)[step])
        return tokens, write, probability_of(tokens, logits)
