"""What every sampler is to ``generate``, and what samplers share: random choices, ranking, checks of their options."""

import abc
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from dlmscope_jax.errors import UserError

from ..corruption import rank

Proposal = tuple[Int[Array, "B W"], Bool[Array, "B W"], Float[Array, "B W"]]


class Sampler(abc.ABC):
    """A frozen, hashable description of a way to generate; ``generate`` compiles one program for it and a shape.

    Attributes:
      needs_diffusion: whether it fills masks (True) or appends tokens (False).
      drops_mask: whether the mask's own logit is removed, so that it is never predicted (MDLM's SUBS).
      model_blocks: whether places are counted in the blocks of a block-causal model instead of from the prompt's end.
    """

    needs_diffusion: ClassVar[bool] = True
    drops_mask: ClassVar[bool] = False
    model_blocks: ClassVar[bool] = False

    @property
    @abc.abstractmethod
    def n_steps(self) -> int:
        """Forward passes at most, S."""

    @property
    @abc.abstractmethod
    def length(self) -> int:
        """Tokens added to the prompt, N."""

    @property
    @abc.abstractmethod
    def needs_key(self) -> bool:
        """Whether it draws random numbers."""

    @property
    def cfg_scale(self) -> float:
        """Strength of classifier-free guidance, 0 for none."""
        return 0.0

    @property
    def reuses_logits(self) -> bool:
        """Whether a step that follows one without commits may use that one's logits again."""
        return False

    def stops(self, config: Any) -> tuple[int, ...]:
        """Tokens after which a row of a model of this ``ModelConfig`` is complete."""
        return ()

    def pending(self, masked: Bool[Array, "B W"], position: Int[Array, "*B W"]) -> Bool[Array, "B W"]:
        """The unknown tokens that this sampler still has to write; generation ends when no row has any."""
        return masked

    @abc.abstractmethod
    def propose(
        self, step: Array, logits: Float[Array, "B W V"], masked: Bool[Array, "B W"], position: Int[Array, "*B W"], key: Key[Array, ""]
    ) -> Proposal:
        """Tokens, where to write them, and the confidence of each.

        Args:
          step: 0-based step, traced.
          logits: float32, aligned: entry w scores the token at ``position[w]``.
          masked: which of these tokens are unknown; only they may be written.
          position: place of the window's tokens among the N that are generated, negative in the prompt; [B, W] where
            rows differ.
          key: ``fold_in(key, step)``.
        """


def gumbel(key: Key[Array, ""], shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Gumbel noise with its tail: with jax's default of 24 bits the largest of 126,464 draws would often be cut off."""
    return jax.random.gumbel(key, shape, jnp.float32, mode="high")


def draw(key: Key[Array, ""], logits: Float[Array, "*n V"]) -> Int[Array, "*n"]:
    """A token from ``softmax(logits)``: the argmax after Gumbel noise."""
    return jnp.argmax(logits + gumbel(key, logits.shape), axis=-1)


def probability_of(tokens: Int[Array, "*n"], logits: Float[Array, "*n V"]) -> Float[Array, "*n"]:
    """``softmax(logits)[tokens]``."""
    return jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), tokens[..., None], axis=-1)[..., 0]


def place(order: Float[Array, "B W"], eligible: Bool[Array, "B W"]) -> Int[Array, "B W"]:
    """Place of each eligible entry in its row, 0 for the highest ``order``; the others come behind."""
    return rank(jnp.where(eligible, -order, jnp.inf))


def best(order: Float[Array, "B W"], eligible: Bool[Array, "B W"], count: Array) -> Bool[Array, "B W"]:
    """The ``count`` eligible entries of each row with the highest ``order``."""
    return eligible & (place(order, eligible) < count)


def check(
    sampler: Sampler,
    *,
    whole: tuple[str, ...] = (),
    not_negative: tuple[str, ...] = (),
    share: tuple[str, ...] = (),
    one_of: dict[str, tuple[str, ...]] | None = None,
) -> None:
    """Raises a ``UserError`` for the first option that is out of range; None passes, where an option may be None.

    Args:
      sampler: the sampler, whose fields are read.
      whole: fields that are whole numbers of at least 1.
      not_negative: fields that are at least 0.
      share: fields above 0 and at most 1.
      one_of: fields with a choice of texts.
    """
    who = type(sampler).__name__
    for name in whole:
        value = getattr(sampler, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"{who}: {name} is {value!r}: a whole number of at least 1")
    for name in not_negative:
        if not (value := getattr(sampler, name)) >= 0:
            raise UserError(f"{who}: {name} is {value!r}: 0 or more")
    for name in share:
        if not 0 < (value := getattr(sampler, name)) <= 1:
            raise UserError(f"{who}: {name} is {value!r}: above 0 and at most 1")
    for name, known in (one_of or {}).items():
        if (value := getattr(sampler, name)) not in known:
            raise UserError(f"{who}: {name} {value!r} is not known: one of {', '.join(known)}")


def given(sampler: Sampler, *names: str) -> tuple[str, ...]:
    """Those of the fields that are not None."""
    return tuple(name for name in names if getattr(sampler, name) is not None)
