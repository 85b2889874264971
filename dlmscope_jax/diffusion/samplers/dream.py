"""Dream's sampler: a schedule over all positions, in random order or by one of three confidences."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from dlmscope_jax.errors import UserError

from ..schedule import dream_fractions
from .base import Proposal, Sampler, best, check, draw, given, gumbel, probability_of
from .filters import keep_top_k, keep_top_p


@dataclasses.dataclass(frozen=True)
class DreamSampler(Sampler):
    """Dream's sampler (Ye et al. 2025, ``diffusion_generate``).

    Attributes:
      steps: forward passes.
      max_new_tokens: tokens to generate.
      algorithm: ``"origin"`` commits each masked token with the schedule's probability; the others commit the best
        of the schedule's number: ``"maskgit_plus"`` by the probability of the chosen token, ``"topk_margin"`` by the
        distance to the second, ``"entropy"`` by negative entropy.
      temperature: divides the logits before sampling; 0 takes the most probable token.
      top_p: nucleus of tokens to sample from, None for all.
      top_k: number of tokens to sample from, None for all. The original inherits 50 where nothing is said.
      alg_temp: None or 0 commits the best; otherwise the order is drawn without replacement from
        ``softmax(confidence / alg_temp)``.
      eps: the last time of the schedule.

    The filters come before the confidences, as in the original: ``top_k`` at temperature 0 leaves each choice alone and
    changes the order. Two deliberate differences, both for batches whose rows have unequal numbers of masks: the number
    of commits is a row's own (the original takes the mean over the batch), and only masked positions are written (the
    original overwrites known tokens with the mask in rows that have fewer). With equal numbers there is no difference.
    ``confidence`` is the algorithm's, for ``origin`` the probability of the chosen token. The key of a step is split in
    two, for the Gumbels of the tokens and for the order (uniforms of ``origin``, Gumbels of ``alg_temp``).

    Raises:
      UserError: when a value is out of range.
    """

    steps: int
    max_new_tokens: int
    algorithm: str = "origin"
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    alg_temp: float | None = None
    eps: float = 1e-3

    def __post_init__(self):
        check(
            self,
            whole=("steps", "max_new_tokens", *given(self, "top_k")),
            not_negative=("temperature", *given(self, "alg_temp")),
            share=given(self, "top_p"),
            one_of={"algorithm": ("origin", "maskgit_plus", "topk_margin", "entropy")},
        )
        if not 0 < self.eps < 1:
            raise UserError(f"DreamSampler: eps is {self.eps}: between 0 and 1")

    @property
    def n_steps(self) -> int:
        return self.steps

    @property
    def length(self) -> int:
        return self.max_new_tokens

    @property
    def needs_key(self) -> bool:
        return self.temperature > 0 or self.algorithm == "origin" or bool(self.alg_temp)

    def propose(
        self, step: Array, logits: Float[Array, "B W V"], masked: Bool[Array, "B W"], position: Int[Array, "*B W"], key: Key[Array, ""]
    ) -> Proposal:
        fraction = jnp.asarray(dream_fractions(self.steps, self.eps))[step]
        token_key, order_key = jax.random.split(key)

        if self.temperature > 0:
            logits = logits / self.temperature
        logits = keep_top_k(keep_top_p(logits, self.top_p), self.top_k)
        probability = jax.nn.softmax(logits, axis=-1)
        tokens = draw(token_key, logits) if self.temperature > 0 else jnp.argmax(probability, axis=-1)
        if self.algorithm == "topk_margin":
            two = jax.lax.top_k(probability, 2)[0]
            confidence = two[..., 0] - two[..., 1]
        elif self.algorithm == "entropy":
            confidence = (probability * jnp.log(probability + 1e-10)).sum(axis=-1)
        else:
            confidence = probability_of(tokens, logits)

        if self.algorithm == "origin":
            return tokens, masked & (jax.random.uniform(order_key, masked.shape) < fraction), confidence
        count = (masked.sum(axis=1).astype(jnp.float32) * fraction).astype(jnp.int32)
        # Gumbel noise and the best n: the same distribution as drawing n without replacement
        order = confidence / self.alg_temp + gumbel(order_key, masked.shape) if self.alg_temp else confidence
        return tokens, best(order, masked, count[:, None]), confidence
