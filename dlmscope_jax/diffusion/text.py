"""The text under way, as forward passes see it: whole, or some of its columns beside a cache, with the edits cut to them."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from dlmscope_jax.errors import UserError
from dlmscope_jax.models.edits import Edit, InDictionary
from dlmscope_jax.models.sites import site_shape

from .samplers import Sampler
from .trace import Progress, Taps


@dataclasses.dataclass(frozen=True, eq=False)
class Text:
    """What stays the same over a generation.

    Attributes:
      model, params: the language model.
      rows, given, total: rows B, columns of the prompt P, columns of prompt and response T.
      keep: [B, T] False at padding, or None.
      position_ids: [B, T], or None where columns are positions.
      origin: [] or [B, 1], the column from which a sampler counts places: where the prompt ends, or, for samplers that
        follow a block-causal model's blocks, where the block begins that the prompt ends in.
      sites: what to collect.
    """

    model: Any
    params: Any
    rows: int
    given: int
    total: int
    keep: Bool[Array, "B T"] | None
    position_ids: Int[Array, "B T"] | None
    origin: Any
    sites: tuple[str, ...]

    @classmethod
    def of(cls, model: Any, params: Any, sampler: Sampler, shape: tuple[int, int], mask: Bool[Array, "B P"] | None, sites: Any) -> "Text":
        """The text of a prompt of ``shape``, padded where ``mask`` is False, that a sampler continues."""
        rows, given = shape
        origin: Any = given
        if sampler.model_blocks and model.config.attention == "block_causal":
            real = given if mask is None else mask.sum(axis=1, keepdims=True, dtype=jnp.int32)
            origin = given - real % model.config.block_length
        ids = None
        if mask is not None:
            mask = jnp.concatenate([mask, jnp.ones((rows, sampler.length), bool)], axis=1)
            if model.config.family != "llada":  # LLaDA has no position ids: it counts padding
                ids = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
        return cls(model, params, rows, given, given + sampler.length, mask, ids, origin, sites)

    def forward(self, x: Array, logits: Any, edits: tuple[Edit, ...], sites: tuple[str, ...]) -> Any:
        """A forward pass over the whole text."""
        return self.model.apply(
            self.params, x, attention_mask=self.keep, position_ids=self.position_ids, logits=logits, collect=sites, edits=edits
        )

    def forward_part(self, x: Array, columns: Array, cache: Any, logits: Any, edits: tuple[Edit, ...]) -> Any:
        """A forward pass over some columns, which are written to the cache; columns past the text's end are padding."""
        inside = columns < self.total
        take = lambda a: jnp.take_along_axis(a, jnp.minimum(columns, self.total - 1), axis=1)  # noqa: E731
        return self.model.apply(
            self.params,
            take(x),
            attention_mask=inside if self.keep is None else inside & take(self.keep),
            position_ids=columns if self.position_ids is None else take(self.position_ids),
            logits=logits,
            collect=self.sites,
            edits=tuple(edit_at(edit, columns, self) for edit in edits),
            cache=cache,
            start=columns[:, 0],
        )

    def read_prompt(self, width: int, progress: Progress, edits: tuple[Edit, ...], cache: Any, kept: Taps) -> tuple[Any, Taps]:
        """The cache and the activations after a pass over the first ``width`` columns, of which nothing is scored."""
        if width == 0:
            return cache, kept
        columns = jnp.broadcast_to(jnp.arange(width), (self.rows, width))
        nothing = jnp.zeros((self.rows, 0), jnp.int32)  # False would leave out the layers past the last tap
        out = self.forward_part(progress.tokens, columns, cache, nothing, edits)
        return out.cache, self.put(kept, out.taps, columns)

    def empty_taps(self, keys: int) -> Taps:
        """Activations of the whole text before anything is read; ``keys`` is the cache's length."""
        x = jnp.zeros((self.rows, self.total), jnp.int32)
        made = jax.eval_shape(lambda: self.forward(x, False, (), self.sites).taps)

        def zeros(name: str, tap: Any) -> Array:
            shape = (*tap.shape[:-1], keys) if name == "attn_pattern" else tap.shape
            return jnp.zeros(shape, tap.dtype)

        return {name: {layer: zeros(name, tap) for layer, tap in layers.items()} for name, layers in made.items()}

    def put(self, kept: Taps, new: Taps, columns: Int[Array, "B W"]) -> Taps:
        """Activations with the columns of one pass written over."""
        rows = jnp.arange(self.rows)[:, None]

        def write(name: str, old: Array, part: Array) -> Array:
            if name == "attn_pattern":
                return old.at[rows, :, columns].set(part.swapaxes(1, 2), mode="drop")
            return old.at[rows, columns].set(part, mode="drop")

        return {name: {layer: write(name, old, new[name][layer]) for layer, old in layers.items()} for name, layers in kept.items()}

    def first_columns(self) -> Int[Array, " B"]:
        """Column of each row's first real token."""
        return jnp.zeros(self.rows, jnp.int32) if self.keep is None else jnp.argmax(self.keep, axis=1).astype(jnp.int32)

    def whole(self) -> Int[Array, "B T"]:
        """All columns."""
        return jnp.broadcast_to(jnp.arange(self.total), (self.rows, self.total))


def edit_at(edit: Edit, columns: Int[Array, "B W"], text: Text) -> Edit:
    """An edit of the whole text as it applies to some of its columns: its mask and a value per token are cut.

    Raises:
      UserError: for an array as value of ``attn_pattern``, which cannot be cut.
    """
    mask = None if edit.mask is None else _cut(edit.mask, columns, 0)
    value, behind = edit.value, entries(edit, text.model.config)
    if edit.site == "attn_pattern" and isinstance(value, jax.Array) and value.ndim:
        raise UserError("edit of attn_pattern with an array as value: generate reads the whole text for that, with cache='none'")
    if isinstance(value, jax.Array):
        value = _cut(value, columns, behind)
    elif isinstance(value, InDictionary):
        value = dataclasses.replace(value, target=_cut(jnp.asarray(value.target), columns, behind))
    return dataclasses.replace(edit, mask=mask, value=value)


def entries(edit: Edit, config: Any) -> int:
    """How many axes of an edit's value (of an ``InDictionary``, its target) lie behind the one over tokens, where it has one."""
    if isinstance(edit.value, InDictionary):
        return 0
    shape = (1,) if edit.site == "attn_pattern" else site_shape(edit.site, config)  # a pattern's tokens are its queries
    side_by_side = getattr(edit.value, "shape", ())[-1:] == (math.prod(shape),) != shape[-1:]  # all heads, as wide as they are together
    return 1 if side_by_side else len(shape)


def _cut(value: Array, columns: Array, behind: int) -> Array:
    """Takes columns along the token axis, the one before the last ``behind``; a value without one stays."""
    if value.ndim <= behind or value.shape[-behind - 1] == 1:
        return value
    value = value if value.ndim == behind + 2 else value[None]
    value = jnp.broadcast_to(value, (columns.shape[0], *value.shape[1:]))
    index = jnp.minimum(columns, value.shape[1] - 1).reshape(*columns.shape, *[1] * behind)  # a window may pass the text's end
    return jnp.take_along_axis(value, index, axis=1)
