"""Parallel decoding: every step commits all tokens that the model is sure enough of."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from dlmscope_jax.errors import UserError

from .base import Proposal, Sampler, check, draw, given, place, probability_of


@dataclasses.dataclass(frozen=True)
class ParallelSampler(Sampler):
    """Fast-dLLM's confidence-aware parallel decoding (Wu et al. 2025), block by block.

    Of the unknown tokens of the current block (the first that is not complete), the surest is committed at every step, and
    with it every other that passes: those with a confidence of at least ``threshold``; or with ``factor``, going from the
    surest down, the n-th as long as its confidence is at least ``1 - factor / (n + 1)``.

    Attributes:
      gen_length: tokens to generate.
      block_length: blocks are finished from left to right; in a block-causal model they are the model's own (or equal
        parts of these, Fast-dLLM v2's sub-blocks), counted from position 0, and the first holds the prompt's end.
      threshold: confidence that suffices.
      factor: where given, takes the place of ``threshold``. As in the released code, if only the least sure token of the
        block fails, it is committed too.
      temperature: Gumbel noise on the logits when choosing a token; 0 takes the most probable one.
      steps: forward passes at most, None for enough: every step commits a token, but for one a block with ``cache="blocks"``.
        Where the model predicts the mask, or the prompt holds masks, what is unknown at the end stays masked.
      cache: ``"none"``: the whole text is read at every step. ``"dual"``, approximate, for bidirectional models: keys and
        values of all other tokens are those of the block's first step. ``"blocks"``, for block-causal models: exact with
        edits that stay the same (no schedule; on ``"all"``, ``"prompt"``, ``"response"``, ``"masked"`` or an array of
        positions), approximate with others, which ``Trace.approximate`` tells. Array values of ``attn_pattern`` need ``"none"``.

    Each row goes through its blocks at its own pace, so that at temperature 0 a batch gives what its rows give alone (what
    a key draws depends on the batch). Masks inside the prompt are filled as they are in ``LLaDASampler``: they compete with
    the block's and do not hold it back. ``confidence`` is the noise-free probability of the chosen token (Fast-dLLM's Dream
    version takes it after temperature and filters; at temperature 0 there is no difference). The key of a step draws the
    Gumbels.

    Raises:
      UserError: when a value is out of range.
    """

    gen_length: int
    block_length: int
    threshold: float = 0.9
    factor: float | None = None
    temperature: float = 0.0
    steps: int | None = None
    cache: str = "none"

    model_blocks: ClassVar[bool] = True

    def __post_init__(self):
        check(
            self,
            whole=("gen_length", "block_length", *given(self, "steps")),
            not_negative=("temperature", *given(self, "factor")),
            share=("threshold",),
            one_of={"cache": ("none", "dual", "blocks")},
        )
        if self.cache == "dual" and self.gen_length % self.block_length:
            raise UserError(f"ParallelSampler: with cache='dual' gen_length {self.gen_length} must be a multiple of {self.block_length}")

    @property
    def n_steps(self) -> int:
        if self.steps is not None:
            return self.steps
        return self.gen_length + (-(-self.gen_length // self.block_length) + 1 if self.cache == "blocks" else 0)

    @property
    def length(self) -> int:
        return self.gen_length

    @property
    def needs_key(self) -> bool:
        return self.temperature > 0

    def pending(self, masked: Bool[Array, "B W"], position: Int[Array, "*B W"]) -> Bool[Array, "B W"]:
        return masked & (position >= 0)

    def current_block(self, masked: Bool[Array, "B W"], position: Int[Array, "*B W"]) -> Int[Array, " B"]:
        """Index of each row's first block that is not complete; -1 where none is left."""
        pending = self.pending(masked, position)
        first = jnp.argmax(pending, axis=1)[:, None]
        block = jnp.take_along_axis(jnp.broadcast_to(position // self.block_length, masked.shape), first, axis=1)[:, 0]
        return jnp.where(pending.any(axis=1), block, -1)

    def propose(
        self, step: Array, logits: Float[Array, "B W V"], masked: Bool[Array, "B W"], position: Int[Array, "*B W"], key: Key[Array, ""]
    ) -> Proposal:
        """The step does not matter: a call may be given any part of the text that holds the current block."""
        current = self.current_block(masked, position)[:, None]
        eligible = masked & (position < (current + 1) * self.block_length) & (current >= 0)
        tokens = draw(key, logits / self.temperature) if self.temperature > 0 else jnp.argmax(logits, axis=-1)
        confidence = probability_of(tokens, logits)
        order = place(confidence, eligible)
        if self.factor is None:
            return tokens, eligible & ((order == 0) | (confidence >= self.threshold)), confidence

        n = np.arange(1, masked.shape[1] + 1)
        needed = jnp.asarray(np.append(-1.0, 1.0 - self.factor / (n[1:] + 1.0)), jnp.float32)
        available = eligible.sum(axis=1, keepdims=True)
        fails = eligible & (confidence < needed[order])
        count = jnp.where(fails, order, available).min(axis=1, keepdims=True)
        count = jnp.where(count == available - 1, available, count)
        return tokens, eligible & (order < count), confidence
