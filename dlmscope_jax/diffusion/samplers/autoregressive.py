"""Autoregressive sampling: the next token, and the next."""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from dlmscope_jax.errors import UserError

from .base import Proposal, Sampler, check, draw, given, probability_of
from .filters import keep_top_k, keep_top_p


@dataclasses.dataclass(frozen=True)
class ARSampler(Sampler):
    """Autoregressive sampling: one token a step, from left to right.

    Attributes:
      max_new_tokens: tokens to generate at most.
      temperature: divides the logits before sampling; 0 takes the most probable token.
      top_p: nucleus of tokens to sample from, after ``top_k`` (the order of ``transformers``); None for all.
      top_k: number of tokens to sample from; None for all.
      stop_ids: tokens after which a row is complete; None for the model's ``eos_id`` if it has one (the first, where its
        ``config.json`` lists several: a chat model may need the others named), () to go on. What would follow is the
        padding token, its ``commit_step`` S.

    ``confidence`` is the model's own probability of the chosen token, before temperature and filters. The key of a step
    draws the Gumbels.

    Raises:
      UserError: when a value is out of range.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    stop_ids: tuple[int, ...] | None = None

    needs_diffusion: ClassVar[bool] = False

    def __post_init__(self):
        check(self, whole=("max_new_tokens", *given(self, "top_k")), not_negative=("temperature",), share=given(self, "top_p"))
        whole = lambda i: isinstance(i, int) and not isinstance(i, bool)  # noqa: E731
        if self.stop_ids is not None and not (isinstance(self.stop_ids, tuple) and all(map(whole, self.stop_ids))):
            raise UserError(f"ARSampler: stop_ids is {self.stop_ids!r}: a tuple of token ids, () to never stop, or None")

    @property
    def n_steps(self) -> int:
        return self.max_new_tokens

    @property
    def length(self) -> int:
        return self.max_new_tokens

    @property
    def needs_key(self) -> bool:
        return self.temperature > 0

    def stops(self, config: Any) -> tuple[int, ...]:
        if self.stop_ids is not None:
            return self.stop_ids
        return () if config.eos_id is None else (config.eos_id,)

    def propose(
        self, step: Array, logits: Float[Array, "B W V"], masked: Bool[Array, "B W"], position: Int[Array, "*B W"], key: Key[Array, ""]
    ) -> Proposal:
        """The window is the next token alone."""
        tokens = jnp.argmax(logits, axis=-1)
        if self.temperature > 0:
            tokens = draw(key, keep_top_p(keep_top_k(logits / self.temperature, self.top_k), self.top_p))
        return tokens, masked & (position == step), probability_of(tokens, logits)
