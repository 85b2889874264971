"""What a generation leaves behind, and the bookkeeping inside its loop that every way of generating shares."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from dlmscope_jax.models.edits import Edit

Taps = dict[str, dict[int, Array]]


@dataclasses.dataclass(frozen=True)
class Collect:
    """Which activations to keep: sites, and, to save memory, some of the steps and positions.

    Attributes:
      sites: ``("resid_post@5", ...)``.
      steps: 0-based steps in increasing order, None for all.
      positions: positions in prompt plus response, None for all; of ``attn_pattern`` [B, N, T, S] they are the queries.
    """

    sites: tuple[str, ...]
    steps: tuple[int, ...] | None = None
    positions: tuple[int, ...] | None = None

    def __post_init__(self):
        for name in ("steps", "positions"):  # lists and arrays would not be hashable
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, tuple(np.asarray(value).tolist()))

    def slots(self, n_steps: int) -> Int[np.ndarray, " S"]:
        """Row of each step in the buffers, -1 for a step that is not kept."""
        steps = np.arange(n_steps) if self.steps is None else np.array(self.steps, int)
        slots = np.full(n_steps, -1, np.int32)
        slots[steps] = np.arange(len(steps))
        return slots

    def pick(self, taps: Taps) -> Taps:
        """The chosen positions of one forward pass."""
        if self.positions is None:
            return taps
        chosen = np.array(self.positions, int)
        take = lambda name, tap: tap[:, :, chosen] if name == "attn_pattern" else tap[:, chosen]  # noqa: E731
        return {name: {layer: take(name, tap) for layer, tap in layers.items()} for name, layers in taps.items()}

    def buffers(self, picked: Any, n_steps: int) -> Taps:
        """Zeros for all kept steps; ``picked`` are the shapes of what ``pick`` returns."""
        kept = int((self.slots(n_steps) >= 0).sum())
        return jax.tree.map(lambda tap: jnp.zeros((kept, *tap.shape), tap.dtype), picked)

    def keep(self, buffers: Taps, picked: Taps, step: Array, n_steps: int) -> Taps:
        """Writes one step into the buffers, in place inside a loop; a step that is not kept leaves them alone."""
        slot = jnp.asarray(self.slots(n_steps))[step]
        row = jnp.maximum(slot, 0)

        def put(buffer: Array, tap: Array) -> Array:
            if buffer.shape[0] == 0:
                return buffer
            old = jax.lax.dynamic_index_in_dim(buffer, row, 0, keepdims=False)
            return jax.lax.dynamic_update_index_in_dim(buffer, jnp.where(slot >= 0, tap, old), row, 0)

        return jax.tree.map(put, buffers, picked)


@struct.dataclass
class Trace:
    """What happened during a generation; S steps, a prompt of P tokens, N new ones.

    A token is *given* when it stands in the prompt and is not the mask; every other one is *generated*.

    With a cache a step computes a part of the text; activations elsewhere are those of the last step that computed them, 0
    where none did yet. Generation stops when every row is done. A step after that runs no forward pass: ``history``
    repeats the result, taps are zero.

    Attributes:
      tokens: [B, P + N] the result.
      history: [S + 1, B, P + N]; entry s is what the model read at step s, entry S is the result. An autoregressive
        model's tokens that are not written yet, or never, are shown as the padding token (0 where it has none).
      commit_step: [B, P + N] the step that wrote a token: -1 for a given one, 0..S-1, and S where nothing was written
        (or only the mask itself, which a model may predict).
      confidence: [B, P + N] float32, the sampler's confidence in a token when it wrote it; 0 where it wrote none.
      taps: ``{"resid_post": {5: [S, B, P + N, D]}}``, entry s from the forward pass that read ``history[s]`` (with
        guidance the conditional one); S and P + N are the chosen steps and positions where ``Collect`` names them.
      forwards: [] int32, the forward passes that ran, guidance's second ones among them; with a cache the reading of the
        prompt is part of the first.
      approximate: whether keys and values of an earlier text were used, so that activations and logits are not those
        of a forward pass over ``history[s]``: with a dual cache always; with a block cache when an edit has a schedule,
        acts on ``"just_committed"`` or ``"masked_prev"``, or changes ``attn_pattern`` other than by a scalar factor, since
        what is kept of a complete block is as it was edited when it was read last.
    """

    tokens: Int[Array, "B T"]
    history: Int[Array, "S1 B T"]
    commit_step: Int[Array, "B T"]
    confidence: Float[Array, "B T"]
    taps: Taps
    forwards: Int[Array, ""]
    approximate: bool = struct.field(pytree_node=False, default=False)


@struct.dataclass
class Progress:
    """A generation under way: the text as it stands, and what the trace will say of each token.

    Attributes:
      tokens: [B, T] prompt and response.
      given: [B, T] tokens that stood in the prompt and are not the mask.
      masked: [B, T] tokens that are unknown.
      just_committed: [B, T] tokens that were written at the step before.
      commit_step, confidence: as in ``Trace``.
    """

    tokens: Int[Array, "B T"]
    given: Bool[Array, "B T"]
    masked: Bool[Array, "B T"]
    just_committed: Bool[Array, "B T"]
    commit_step: Int[Array, "B T"]
    confidence: Float[Array, "B T"]

    @classmethod
    def begin(cls, tokens: Int[Array, "B T"], unknown: Bool[Array, "B T"], n_steps: int) -> "Progress":
        return cls(
            tokens=tokens,
            given=~unknown,
            masked=unknown,
            just_committed=jnp.zeros_like(unknown),
            commit_step=jnp.where(unknown, jnp.int32(n_steps), jnp.int32(-1)),
            confidence=jnp.zeros(tokens.shape, jnp.float32),
        )

    def edits(self, edits: tuple[Edit, ...], step: Array, n_steps: int) -> tuple[Edit, ...]:
        """The edits as they stand at a step."""
        return tuple(
            edit.at_step(step, n_steps, prompt=self.given, masked=self.masked, just_committed=self.just_committed) for edit in edits
        )

    def write(
        self,
        step: Array,
        window: Int[Array, "*B W"],
        proposal: tuple[Int[Array, "B W"], Bool[Array, "B W"], Float[Array, "B W"]],
        mask_id: int | None,
        stops: tuple[int, ...] = (),
    ) -> "Progress":
        """The text after a step.

        Args:
          step: the step.
          window: positions that the proposal is about, [B, W] where rows differ.
          proposal: what ``Sampler.propose`` returned.
          mask_id: a token that leaves its place unknown when it is written, None where there is none.
          stops: tokens after which all that is unknown in their row is no longer to be written.
        """
        chosen, where, confidence = proposal
        chosen = chosen.astype(self.tokens.dtype)
        committed = where if mask_id is None else where & (chosen != mask_id)
        rows = jnp.arange(len(self.tokens))[:, None]
        place = lambda whole, part, where: whole.at[rows, window].set(jnp.where(where, part, whole[rows, window]))  # noqa: E731
        just_committed = place(jnp.zeros_like(self.masked), True, committed)
        masked = self.masked & ~just_committed
        if stops:
            masked &= ~(where & jnp.isin(chosen, jnp.array(stops, chosen.dtype))).any(axis=1, keepdims=True)
        return dataclasses.replace(
            self,
            tokens=place(self.tokens, chosen, where),
            masked=masked,
            just_committed=just_committed,
            commit_step=place(self.commit_step, step, committed),
            confidence=place(self.confidence, confidence, committed),
        )

    def trace(self, history: Int[Array, "S B T"], taps: Taps, forwards: Int[Array, ""], approximate: bool = False) -> Trace:
        """The trace of a generation that ends here; ``history`` is what the steps read."""
        return Trace(
            tokens=self.tokens,
            history=jnp.concatenate([history, self.tokens[None]]),
            commit_step=self.commit_step,
            confidence=self.confidence,
            taps=taps,
            forwards=forwards,
            approximate=approximate,
        )
