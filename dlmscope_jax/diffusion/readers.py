"""How a denoising step gets its logits: by reading the whole text, or one part of it beside keys and values kept from before.

A reader is built inside the compiled loop. ``start`` gives its state, with what of the prompt it reads once and for all;
``read`` is one forward pass: the logits of some columns of the text, which of these may be written now, the activations,
and the next state. What ``start`` reads and the first pass count as one. Activations have the text's shape: entries that
a pass did not compute are those of the last pass that did, 0 where there was none.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dlmscope_jax.models.edits import Edit

from .objectives import predicts_next
from .samplers import ParallelSampler, Sampler
from .text import Text
from .trace import Progress, Taps


class Read(NamedTuple):
    """One forward pass.

    Attributes:
      logits: float32, aligned: entry w scores the token at ``columns[:, w]``.
      columns: [B, W] columns of the text; those past its end mean nothing.
      open: [B, W] which of them may be written now.
      taps: activations at the collected sites, [B, T, ...].
      forwards: forward passes that ran.
      state: what the next pass needs.
    """

    logits: Float[Array, "B W V"]
    columns: Int[Array, "B W"]
    open: Bool[Array, "B W"]
    taps: Taps
    forwards: Int[Array, ""]
    state: Any


def cuts(edit: Edit) -> bool:
    """Whether an edit can be applied column by column, and does the same at every step: no schedule, no moving positions."""
    return edit.schedule is None and edit.positions in ("all", "prompt", "response", "mask") and _by_column(edit)


def _by_column(edit: Edit) -> bool:
    """Whether an edit does to a column what it does there when the whole text is read: a pattern's keys may not be written yet."""
    return edit.site != "attn_pattern" or (edit.kind == "scale" and jnp.ndim(edit.value) == 0)


def reader_of(text: Text, sampler: Sampler, edits: tuple[Edit, ...], columns: Int[Array, " W"], kept_steps: Bool[Array, " S"]) -> Any:
    """The reader that a sampler asks for.

    Args:
      text: the text.
      sampler: the sampler.
      edits: the edits of the call, before they are resolved for a step.
      columns: the columns that can be written, for readers that always score all of them.
      kept_steps: steps whose activations are kept.
    """
    if isinstance(sampler, ParallelSampler) and sampler.cache == "dual":
        return DualCache(text, sampler.block_length)
    if isinstance(sampler, ParallelSampler) and sampler.cache == "blocks":
        while_masked = lambda edit: edit.schedule is None and edit.positions == "masked" and _by_column(edit)  # noqa: E731
        return BlockCache(text, approximate=not all(cuts(edit) or while_masked(edit) for edit in edits))
    if not sampler.needs_diffusion and all(cuts(edit) for edit in edits):
        return NextToken(text)
    reuses = sampler.reuses_logits and all(edit.schedule is None and edit.positions != "just_committed" for edit in edits)
    return WholeText(text, sampler, columns, kept_steps if reuses else None)


@dataclasses.dataclass(frozen=True, eq=False)
class WholeText:
    """Every pass reads the whole text: exact for every model and edit.

    Attributes:
      text, sampler: with guidance, and without the mask, where the sampler says so.
      columns: [W] columns to score; an autoregressive model's are the next one alone.
      kept_steps: None, or, for a sampler that may use the last logits again while nothing was committed, the steps that
        need a pass all the same because their activations are kept.
    """

    text: Text
    sampler: Sampler
    columns: Int[Array, " W"]
    kept_steps: Bool[Array, " S"] | None
    approximate: ClassVar[bool] = False

    def start(self, progress: Progress, edits: tuple[Edit, ...]) -> Any:
        if self.kept_steps is None:
            return ()
        return jnp.zeros((self.text.rows, len(self.columns), self.text.model.config.vocab_size), jnp.float32)

    def read(self, state: Any, step: Array, progress: Progress, edits: tuple[Edit, ...]) -> Read:
        text = self.text
        columns = self.columns if self.sampler.needs_diffusion else text.given + step[None]
        spread = jnp.broadcast_to(columns, (text.rows, columns.shape[0]))

        def forward() -> tuple:
            logits, taps = self._forward(progress, spread, edits)
            return logits, taps, jnp.int32(1 + (self.sampler.cfg_scale > 0))

        if self.kept_steps is None:
            logits, taps, ran = forward()
        else:
            nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(forward)[1])
            unchanged = (step > 0) & ~progress.just_committed.any() & ~self.kept_steps[step]
            logits, taps, ran = jax.lax.cond(unchanged, lambda: (state, nothing, jnp.int32(0)), forward)
        may = self._open(progress.masked[:, columns], spread - text.origin)
        return Read(logits, spread, may, taps, ran, () if self.kept_steps is None else logits)

    def _forward(self, progress: Progress, columns: Array, edits: tuple[Edit, ...]) -> tuple[Array, Taps]:
        model, sampler = self.text.model, self.sampler
        source = jnp.maximum(columns - 1, 0) if predicts_next(model) else columns  # as align_logits has it
        out = self.text.forward(progress.tokens, source, edits, self.text.sites)
        logits = out.logits.astype(jnp.float32)
        if sampler.cfg_scale > 0:
            blind = jnp.where(progress.given, model.diffusion.mask_id, progress.tokens)
            without = self.text.forward(blind, source, edits, ()).logits.astype(jnp.float32)
            logits = without + (sampler.cfg_scale + 1.0) * (logits - without)
        if sampler.drops_mask:
            logits = logits.at[..., model.diffusion.mask_id].set(-jnp.inf)
        return logits, out.taps

    def _open(self, masked: Array, position: Array) -> Array:
        """All; in a shifted block-causal model the first token of a block comes before the rest of it is read (Fast-dLLM v2)."""
        model = self.text.model
        if not (self.sampler.model_blocks and model.config.attention == "block_causal" and model.diffusion.shift):
            return jnp.ones_like(masked)
        first = jnp.argmax(masked & (position >= 0), axis=1)[:, None]
        starts = jnp.take_along_axis(position, first, axis=1) % model.config.block_length == 0
        return ~starts | (jnp.arange(masked.shape[1]) == first)


@dataclasses.dataclass(frozen=True, eq=False)
class NextToken:
    """An autoregressive model with a cache: the prompt but its last token, then one token a step, the last there is. Exact."""

    text: Text
    approximate: ClassVar[bool] = False

    def start(self, progress: Progress, edits: tuple[Edit, ...]) -> Any:
        cache, kept = self.text.model.init_cache(self.text.rows, self.text.total), self.text.empty_taps(self.text.total)
        return self.text.read_prompt(self.text.given - 1, progress, edits, cache, kept)

    def read(self, state: Any, step: Array, progress: Progress, edits: tuple[Edit, ...]) -> Read:
        text, (cache, kept) = self.text, state
        columns = jnp.full((text.rows, 1), text.given + step)
        out = text.forward_part(progress.tokens, columns - 1, cache, True, edits)
        kept = text.put(kept, out.taps, columns - 1)
        return Read(out.logits.astype(jnp.float32), columns, jnp.ones_like(columns, bool), kept, jnp.int32(1), (out.cache, kept))


@dataclasses.dataclass(frozen=True, eq=False)
class DualCache:
    """Fast-dLLM's dual cache (Wu et al. 2025): the whole text when a block begins, then that block alone. Approximate.

    Within a block the keys and values of all other tokens stay those of the block's first pass. In a shifted model the
    first token of a block is predicted from outside of it: that first pass commits it, and it alone.
    All rows are in the same block; a row that is through with it waits, which leaves its tokens as they would be alone.
    """

    text: Text
    block_length: int
    approximate: ClassVar[bool] = True

    def start(self, progress: Progress, edits: tuple[Edit, ...]) -> Any:
        return (
            self.text.model.init_cache(self.text.rows, self.text.total),
            jnp.int32(-1),
            self.text.empty_taps(self.text.total),
        )

    def read(self, state: Any, step: Array, progress: Progress, edits: tuple[Edit, ...]) -> Read:
        text, x, masked, (cache, before, kept) = self.text, progress.tokens, progress.masked, state
        shift = predicts_next(text.model)
        open_blocks = masked[:, text.given :].reshape(text.rows, -1, self.block_length).any(axis=(0, 2))
        block = jnp.argmax(open_blocks).astype(jnp.int32)
        columns = jnp.broadcast_to(text.given + block * self.block_length + jnp.arange(self.block_length), (text.rows, self.block_length))

        def whole(cache: Any, kept: dict) -> tuple:
            source = jnp.maximum(columns - 1, 0) if shift else columns
            out = text.forward_part(x, text.whole(), cache, source, edits)
            first = columns == columns[:, :1]
            return out.logits.astype(jnp.float32), out.cache, out.taps, first if shift else jnp.ones_like(first)

        def part(cache: Any, kept: dict) -> tuple:
            out = text.forward_part(x, columns, cache, True, edits)
            logits = out.logits.astype(jnp.float32)
            logits = jnp.concatenate([logits[:, :1], logits[:, :-1]], axis=1) if shift else logits
            return logits, out.cache, text.put(kept, out.taps, columns), jnp.ones(columns.shape, bool)

        logits, cache, kept, may = jax.lax.cond(block != before, whole, part, cache, kept)
        return Read(logits, columns, may, kept, jnp.int32(1), (cache, block, kept))


@dataclasses.dataclass(frozen=True, eq=False)
class BlockCache:
    """Block-causal models: complete blocks are read once and kept; a pass reads the current block alone.

    Exact, but for edits that would still change what is kept: ``approximate`` says whether there are any.
    The prompt is read first. When a block is complete one more pass reads it as it then stands, the prompt's last complete
    one too. In a shifted model those passes predict the first token of the next block, and it is committed before the rest
    of that block is read (Fast-dLLM v2). Blocks count from each row's first real token, and each row goes through them at its own pace.
    """

    text: Text
    approximate: bool

    def start(self, progress: Progress, edits: tuple[Edit, ...]) -> Any:
        text = self.text
        columns = text.total + text.model.config.block_length  # the last block of a row may end past the text
        before = jnp.full((text.rows, 1), -1 if text.given else 0)  # without a prompt no block is complete
        cache, kept = text.read_prompt(text.given, progress, edits, text.model.init_cache(text.rows, columns), text.empty_taps(columns))
        return cache, before, kept

    def read(self, state: Any, step: Array, progress: Progress, edits: tuple[Edit, ...]) -> Read:
        text, x, masked, (cache, before, kept) = self.text, progress.tokens, progress.masked, state
        shift, length = predicts_next(text.model), text.model.config.block_length
        first = text.first_columns()[:, None]
        at = jnp.arange(text.total)
        masked &= at >= text.origin
        block = jnp.min(jnp.where(masked, (at - first) // length, 2**30), axis=1, keepdims=True)
        block = jnp.where(masked.any(axis=1, keepdims=True), block, before).astype(jnp.int32)
        window = lambda b: first + b * length + jnp.arange(length)  # noqa: E731
        columns, settles = window(block), block != before  # [B, W]; [B, 1] rows whose last block has to be read once more
        here = jnp.where(settles, window(jnp.maximum(block - 1, 0)), columns)
        out = text.forward_part(x, here, cache, True, edits)
        logits = out.logits.astype(jnp.float32)
        if shift:  # a settled block's last token predicts the first of the next
            front = jnp.where(settles[:, :, None], logits[:, -1:], logits[:, :1])
            logits = jnp.concatenate([front, logits[:, :-1]], axis=1)
        kept = text.put(kept, out.taps, here)
        alone = columns == columns[:, :1] if shift else jnp.zeros(columns.shape, bool)
        may = jnp.where(settles, alone, True) & (columns < text.total)
        return Read(logits, columns, may, kept, jnp.int32(1), (out.cache, block, kept))
