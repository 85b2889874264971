"""LLaDA's sampler: blocks from left to right, the surest tokens of a block first."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from dlmscope_jax.errors import UserError

from ..schedule import transfer_counts
from .base import Proposal, Sampler, best, check, gumbel, probability_of


@dataclasses.dataclass(frozen=True)
class LLaDASampler(Sampler):
    """LLaDA's block-wise sampler (Nie et al. 2025, ``generate``).

    Attributes:
      steps: forward passes in all, divided evenly over the blocks.
      gen_length: tokens to generate.
      block_length: blocks are finished from left to right.
      temperature: Gumbel noise on the logits when choosing a token; 0 takes the most probable one.
      cfg_scale: w of ``unconditional + (w + 1)(conditional - unconditional)``; the unconditional input has everything
        that was given masked, padding included.
      remasking: ``"low_confidence"`` commits the most probable choices first, ``"random"`` any.
      logits_eos_inf: ``eos_id`` is never chosen: it is removed from the logits.
      confidence_eos_eot_inf: ``eos_id`` and ``eot_id`` may be chosen but come last: they are removed from the logits
        that confidences are computed of, which so have sum 1 over the other tokens. At a temperature above 0 only
        ``eot_id`` is: the original writes into the noisy copy of the logits, which is the logits only at temperature 0.
      eos_id, eot_id: the two tokens; LLaDA's ids by default.

    Masks inside the prompt are filled too: as in the original they compete for the commits of each block without adding
    to its quota. ``confidence`` is the noise-free probability of the chosen token. The key of a step is split in two,
    for the Gumbels of the tokens and the uniforms of the random order.

    Raises:
      UserError: when the lengths do not divide or a value is out of range.
    """

    steps: int
    gen_length: int
    block_length: int
    temperature: float = 0.0
    cfg_scale: float = 0.0
    remasking: str = "low_confidence"
    logits_eos_inf: bool = False
    confidence_eos_eot_inf: bool = False
    eos_id: int = 126081
    eot_id: int = 126348

    def __post_init__(self):
        check(
            self,
            whole=("steps", "gen_length", "block_length"),
            not_negative=("temperature", "cfg_scale", "eos_id", "eot_id"),
            one_of={"remasking": ("low_confidence", "random")},
        )
        if self.gen_length % self.block_length:
            raise UserError(f"LLaDASampler: gen_length {self.gen_length} must be a multiple of block_length {self.block_length}")
        if self.steps % (self.gen_length // self.block_length):
            raise UserError(f"LLaDASampler: steps {self.steps} must be a multiple of the {self.gen_length // self.block_length} blocks")

    @property
    def n_steps(self) -> int:
        return self.steps

    @property
    def length(self) -> int:
        return self.gen_length

    @property
    def needs_key(self) -> bool:
        return self.temperature > 0 or self.remasking == "random"

    def propose(
        self, step: Array, logits: Float[Array, "B W V"], masked: Bool[Array, "B W"], position: Int[Array, "*B W"], key: Key[Array, ""]
    ) -> Proposal:
        blocks = self.gen_length // self.block_length
        per_block = self.steps // blocks
        counts = jnp.asarray(np.tile(transfer_counts(self.block_length, per_block), blocks))
        end = (step // per_block + 1) * self.block_length
        token_key, order_key = jax.random.split(key)

        if self.logits_eos_inf:
            logits = self._without(logits, "eos_id")
        noisy = logits + self.temperature * gumbel(token_key, logits.shape) if self.temperature > 0 else logits
        tokens = jnp.argmax(noisy, axis=-1)
        if self.confidence_eos_eot_inf:
            logits = self._without(logits, *(("eot_id",) if self.temperature > 0 else ("eos_id", "eot_id")))
        confidence = probability_of(tokens, logits)
        order = jax.random.uniform(order_key, masked.shape) if self.remasking == "random" else confidence
        return tokens, best(order, masked & (position < end), counts[step]), confidence

    def _without(self, logits: Float[Array, "B W V"], *names: str) -> Float[Array, "B W V"]:
        for name in names:
            if (token := getattr(self, name)) >= logits.shape[-1]:
                raise UserError(f"LLaDASampler: {name} is {token}, the model's ids are 0 to {logits.shape[-1] - 1}: give {name}")
            logits = logits.at[..., token].set(-jnp.inf)
        return logits
