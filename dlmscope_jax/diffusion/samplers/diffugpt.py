"""DiffuGPT's and DiffuLLaMA's sampler: a uniformly random order, tokens drawn from a nucleus."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from .base import Proposal, Sampler, check, draw, given, probability_of
from .filters import keep_top_p


@dataclasses.dataclass(frozen=True)
class DiffuGPTSampler(Sampler):
    """The sampler of DiffuGPT and DiffuLLaMA (Gong et al. 2025, ``generate_samples``).

    With t counting down from ``steps - 1`` to 0, each masked token is drawn and shown with probability ``1 / (t + 1)``:
    the last step shows all that is left.

    Attributes:
      steps: forward passes, T; the released scripts take 64.
      max_new_tokens: tokens to generate.
      temperature: divides the logits before sampling; the scripts take 0.95 for DiffuGPT and 0.9 for DiffuLLaMA; 0 takes
        the most probable token.
      top_p: nucleus of tokens to sample from, None for all.

    A mask that the model itself predicts is drawn again at the next step (the original leaves it in the text).
    ``confidence`` is the probability of the chosen token within the nucleus. The key of a step is split in two, for the
    Gumbels of the tokens and the uniforms of the order.

    Raises:
      UserError: when a value is out of range.
    """

    steps: int
    max_new_tokens: int
    temperature: float = 0.95
    top_p: float | None = 0.9

    def __post_init__(self):
        check(self, whole=("steps", "max_new_tokens"), not_negative=("temperature",), share=given(self, "top_p"))

    @property
    def n_steps(self) -> int:
        return self.steps

    @property
    def length(self) -> int:
        return self.max_new_tokens

    @property
    def needs_key(self) -> bool:
        return True

    def propose(
        self, step: Array, logits: Float[Array, "B W V"], masked: Bool[Array, "B W"], position: Int[Array, "*B W"], key: Key[Array, ""]
    ) -> Proposal:
        token_key, order_key = jax.random.split(key)
        if self.temperature > 0:
            logits = logits / self.temperature
        logits = keep_top_p(logits, self.top_p)
        tokens = draw(token_key, logits) if self.temperature > 0 else jnp.argmax(logits, axis=-1)
        shown = jax.random.uniform(order_key, masked.shape) < 1.0 / (self.steps - step).astype(jnp.float32)
        return tokens, masked & shown, probability_of(tokens, logits)
