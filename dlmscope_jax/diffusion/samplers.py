"""Samplers: at each step, which of the unknown tokens become known, and as what.

A sampler is a frozen, hashable description; ``generate`` compiles one program for it and a shape. Confidences are
float32 whatever the model computes in (bfloat16 probabilities tie), and ties resolve to the lowest index.
"""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from dlmscope_jax.errors import UserError

from .corruption import rank
from .schedule import dream_fractions, transfer_counts

Proposal = tuple[Int[Array, "B W"], Bool[Array, "B W"], Float[Array, "B W"]]


class Sampler(Protocol):
    """What ``generate`` needs of a sampler.

    Attributes:
      n_steps: forward passes, S.
      length: tokens added to the prompt, N.
      needs_key: whether it draws random numbers.
      needs_diffusion: whether it fills masks (True) or appends tokens (False).
      cfg_scale: strength of classifier-free guidance, 0 for none.
    """

    @property
    def n_steps(self) -> int: ...
    @property
    def length(self) -> int: ...
    @property
    def needs_key(self) -> bool: ...
    @property
    def needs_diffusion(self) -> bool: ...
    @property
    def cfg_scale(self) -> float: ...

    def propose(
        self, step: Array, logits: Float[Array, "B W V"], masked: Bool[Array, "B W"], position: Int[Array, " W"], key: Key[Array, ""]
    ) -> Proposal:
        """Tokens, where to write them, and the confidence of each.

        Args:
          step: 0-based step, traced.
          logits: float32, aligned: entry w scores the token at ``position[w]``.
          masked: which of these tokens are unknown; only they may be written.
          position: place of the window's tokens among the N that are generated, negative in the prompt.
          key: ``fold_in(key, step)``.
        """
        ...


@dataclasses.dataclass(frozen=True)
class LLaDASampler:
    """LLaDA's block-wise sampler (Nie et al. 2025, ``generate``).

    Attributes:
      steps: forward passes in all, divided evenly over the blocks.
      gen_length: tokens to generate.
      block_length: blocks are finished from left to right.
      temperature: Gumbel noise on the logits when choosing a token; 0 takes the most probable one.
      cfg_scale: w of ``unconditional + (w + 1)(conditional - unconditional)``; the unconditional input has everything
        that was given masked, padding included.
      remasking: ``"low_confidence"`` commits the most probable choices first, ``"random"`` any.

    Masks inside the prompt are filled too: as in the original they compete for the commits of each block without adding
    to its quota. ``confidence`` is the noise-free probability of the chosen token.

    Raises:
      UserError: when the lengths do not divide or a value is out of range.
    """

    steps: int
    gen_length: int
    block_length: int
    temperature: float = 0.0
    cfg_scale: float = 0.0
    remasking: str = "low_confidence"

    def __post_init__(self):
        _positive("LLaDASampler", steps=self.steps, gen_length=self.gen_length, block_length=self.block_length)
        _not_negative("LLaDASampler", temperature=self.temperature, cfg_scale=self.cfg_scale)
        if self.gen_length % self.block_length:
            raise UserError(f"LLaDASampler: gen_length {self.gen_length} must be a multiple of block_length {self.block_length}")
        if self.steps % (self.gen_length // self.block_length):
            raise UserError(f"LLaDASampler: steps {self.steps} must be a multiple of the {self.gen_length // self.block_length} blocks")
        _one_of("LLaDASampler", "remasking", self.remasking, ("low_confidence", "random"))

    @property
    def n_steps(self) -> int:
        return self.steps

    @property
    def length(self) -> int:
        return self.gen_length

    @property
    def needs_key(self) -> bool:
        return self.temperature > 0 or self.remasking == "random"

    @property
    def needs_diffusion(self) -> bool:
        return True

    def propose(
        self, step: Array, logits: Float[Array, "B W V"], masked: Bool[Array, "B W"], position: Int[Array, " W"], key: Key[Array, ""]
    ) -> Proposal:
        """See ``Sampler.propose``. The key is split into one for the tokens and one for the order."""
        blocks = self.gen_length // self.block_length
        per_block = self.steps // blocks
        counts = jnp.asarray(np.tile(transfer_counts(self.block_length, per_block), blocks))
        end = (step // per_block + 1) * self.block_length
        token_key, order_key = jax.random.split(key)

        noisy = logits + self.temperature * jax.random.gumbel(token_key, logits.shape) if self.temperature > 0 else logits
        tokens = jnp.argmax(noisy, axis=-1)
        confidence = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), tokens[..., None], axis=-1)[..., 0]
        order = jax.random.uniform(order_key, masked.shape) if self.remasking == "random" else confidence
        eligible = masked & (position < end)
        return tokens, _best(order, eligible, counts[step]), confidence


@dataclasses.dataclass(frozen=True)
class DreamSampler:
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
    original overwrites known tokens with the mask in rows that have fewer). ``confidence`` is the algorithm's, for
    ``origin`` the probability of the chosen token.

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
        _positive("DreamSampler", steps=self.steps, max_new_tokens=self.max_new_tokens)
        _not_negative("DreamSampler", temperature=self.temperature, alg_temp=self.alg_temp or 0.0)
        _one_of("DreamSampler", "algorithm", self.algorithm, ("origin", "maskgit_plus", "topk_margin", "entropy"))
        _filters("DreamSampler", self.top_p, self.top_k)
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

    @property
    def needs_diffusion(self) -> bool:
        return True

    @property
    def cfg_scale(self) -> float:
        return 0.0

    def propose(
        self, step: Array, logits: Float[Array, "B W V"], masked: Bool[Array, "B W"], position: Int[Array, " W"], key: Key[Array, ""]
    ) -> Proposal:
        """See ``Sampler.propose``. The key is split into one for the tokens and one for the order."""
        fraction = jnp.asarray(dream_fractions(self.steps, self.eps))[step]
        token_key, order_key = jax.random.split(key)

        if self.temperature > 0:
            logits = logits / self.temperature
        logits = keep_top_k(keep_top_p(logits, self.top_p), self.top_k)
        probability = jax.nn.softmax(logits, axis=-1)
        tokens = jax.random.categorical(token_key, logits) if self.temperature > 0 else jnp.argmax(probability, axis=-1)
        if self.algorithm == "topk_margin":
            best = jax.lax.top_k(probability, 2)[0]
            confidence = best[..., 0] - best[..., 1]
        elif self.algorithm == "entropy":
            confidence = (probability * jnp.log(probability + 1e-10)).sum(axis=-1)
        else:
            confidence = jnp.take_along_axis(probability, tokens[..., None], axis=-1)[..., 0]

        if self.algorithm == "origin":
            return tokens, masked & (jax.random.uniform(order_key, masked.shape) < fraction), confidence
        count = (masked.sum(axis=1).astype(jnp.float32) * fraction).astype(jnp.int32)
        # Gumbel noise and the best n: the same distribution as drawing n without replacement
        order = confidence / self.alg_temp + jax.random.gumbel(order_key, masked.shape) if self.alg_temp else confidence
        return tokens, _best(order, masked, count[:, None]), confidence


@dataclasses.dataclass(frozen=True)
class ARSampler:
    """Autoregressive sampling: one token a step, from left to right.

    Attributes:
      max_new_tokens: tokens to generate; generation does not stop at an end token, so that shapes are fixed.
      temperature: divides the logits before sampling; 0 takes the most probable token.
      top_p: nucleus of tokens to sample from, after ``top_k`` (the order of ``transformers``); None for all.
      top_k: number of tokens to sample from; None for all.

    ``confidence`` is the model's own probability of the chosen token, before temperature and filters.

    Raises:
      UserError: when a value is out of range.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None

    def __post_init__(self):
        _positive("ARSampler", max_new_tokens=self.max_new_tokens)
        _not_negative("ARSampler", temperature=self.temperature)
        _filters("ARSampler", self.top_p, self.top_k)

    @property
    def n_steps(self) -> int:
        return self.max_new_tokens

    @property
    def length(self) -> int:
        return self.max_new_tokens

    @property
    def needs_key(self) -> bool:
        return self.temperature > 0

    @property
    def needs_diffusion(self) -> bool:
        return False

    @property
    def cfg_scale(self) -> float:
        return 0.0

    def propose(
        self, step: Array, logits: Float[Array, "B W V"], masked: Bool[Array, "B W"], position: Int[Array, " W"], key: Key[Array, ""]
    ) -> Proposal:
        """See ``Sampler.propose``; the window is the next token alone. The key draws the token."""
        tokens = jnp.argmax(logits, axis=-1)
        if self.temperature > 0:
            tokens = jax.random.categorical(key, keep_top_p(keep_top_k(logits / self.temperature, self.top_k), self.top_p))
        confidence = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), tokens[..., None], axis=-1)[..., 0]
        return tokens, masked & (position == step), confidence


def keep_top_p(logits: Float[Array, "*n V"], top_p: float | None) -> Float[Array, "*n V"]:
    """Keeps the smallest set of tokens whose probability exceeds ``top_p``, the rest at the lowest float; equals stay."""
    if top_p is None or top_p >= 1:
        return logits
    descending = -jnp.sort(-logits, axis=-1)
    before = jnp.cumsum(jax.nn.softmax(descending, axis=-1), axis=-1)
    kept = 1 + (before[..., :-1] <= top_p).sum(axis=-1, keepdims=True)  # the token that crosses the threshold is kept
    lowest = jnp.take_along_axis(descending, kept - 1, axis=-1)
    return jnp.where(logits < lowest, jnp.finfo(logits.dtype).min, logits)


def keep_top_k(logits: Float[Array, "*n V"], top_k: int | None) -> Float[Array, "*n V"]:
    """Keeps the ``top_k`` largest, the rest at the lowest float; equals of the last one stay."""
    if top_k is None or top_k >= logits.shape[-1]:
        return logits
    lowest = jax.lax.top_k(logits, top_k)[0][..., -1:]
    return jnp.where(logits < lowest, jnp.finfo(logits.dtype).min, logits)


def _best(order: Array, eligible: Array, count: Array) -> Array:
    """The ``count`` eligible entries of each row with the highest ``order``."""
    return eligible & (rank(jnp.where(eligible, -order, jnp.inf)) < count)


def _positive(who: str, **values: int) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"{who}: {name} is {value!r}: a whole number of at least 1")


def _not_negative(who: str, **values: float) -> None:
    for name, value in values.items():
        if not value >= 0:
            raise UserError(f"{who}: {name} is {value!r}: 0 or more")


def _one_of(who: str, name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError(f"{who}: {name} {value!r} is not known: one of {', '.join(known)}")


def _filters(who: str, top_p: float | None, top_k: int | None) -> None:
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"{who}: top_p is {top_p!r}: above 0 and at most 1, or None")
    if top_k is not None:
        _positive(who, top_k=top_k)
