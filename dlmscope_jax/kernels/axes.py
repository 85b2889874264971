"""Over which mesh axes a computation is divided, and the few ways in which its parts meet.

Dictionaries and their training step are written once, for the part of the batch and of the latents that one device holds. ``Axes``
says which mesh axes divide the two; on one device (``ALONE``) all of it is the identity. Inside ``jax.shard_map`` with ``check_vma=False``
or ``jax.pmap``.

Gradients. What is the same on several devices carries its whole cotangent on each of them. So a sum over devices (``sum_rows``,
``sum_latents``) hands its cotangent on as it is, and what goes from such a value into a computation that is divided over latents passes
through ``shared``, which adds up the cotangents of the parts. Nothing adds up the gradients of the parts of a batch: the
step does that once, for all parameters together.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jaxtyping import Array

Names = str | tuple[str, ...]


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def shared(x: Array, axis: Names) -> Array:
    """``x``, which is the same on every shard of ``axis``; its cotangent is the sum of the shards' cotangents."""
    return jax.lax.pcast(x, axis, to="varying")


shared.defvjp(lambda x, axis: (shared(x, axis), None), lambda axis, _, cotangent: (jax.lax.psum(cotangent, axis),))


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def summed(x: Array, axis: Names) -> Array:
    """The sum of ``x`` over the shards of ``axis``, the same on each; so is its cotangent, which every shard takes as it is.

    (Without ``check_vma``, jax gives ``psum`` the cotangent ``psum``, which is as many times too large as there are shards.)
    """
    return jax.lax.psum(x, axis)


summed.defvjp(lambda x, axis: (summed(x, axis), None), lambda axis, _, cotangent: (jax.lax.pcast(cotangent, axis, to="varying"),))


@dataclass(frozen=True)
class Axes:
    """The mesh axes that divide a computation; static.

    Attributes:
      rows: those that divide the rows of the batch, major first; empty: one part.
      latents: the one that divides the latents; None: one part.
    """

    rows: tuple[str, ...] = ()
    latents: str | None = None

    @property
    def alone(self) -> bool:
        """Whether nothing is divided."""
        return not self.rows and self.latents is None

    @property
    def every(self) -> tuple[str, ...]:
        """All of them, rows first."""
        return self.rows if self.latents is None else (*self.rows, self.latents)

    @property
    def row_parts(self) -> int:
        """Into how many parts rows are divided."""
        return jax.lax.axis_size(self.rows) if self.rows else 1

    @property
    def latent_parts(self) -> int:
        """Into how many parts latents are divided."""
        return 1 if self.latents is None else jax.lax.axis_size(self.latents)

    def first_latent(self, here: int) -> Array | int:
        """The index among all latents of the first of the ``here`` that this device holds."""
        return 0 if self.latents is None else jax.lax.axis_index(self.latents) * here

    def sum_rows(self, tree: Any) -> Any:
        """Sums over the parts of the batch; each part's gradient is that of its own contribution."""
        return self._each(tree, self.rows, summed)

    def mean_rows(self, tree: Any) -> Any:
        """Means over the whole batch, from those over each of its equal parts; each part's gradient is that of its own contribution."""
        return jax.tree.map(lambda leaf: leaf / self.row_parts, self.sum_rows(tree)) if self.rows else tree

    def gather_rows(self, tree: Any) -> Any:
        """Arrays [B, ...] of the whole batch, from those of its parts; no derivative."""
        return jax.tree.map(lambda leaf: jax.lax.all_gather(leaf, self.rows, tiled=True), tree) if self.rows else tree

    def sum_latents(self, tree: Any) -> Any:
        """Sums over the parts of the latents."""
        return self._each(tree, self.latents, summed)

    def mean_latents(self, tree: Any) -> Any:
        """Means over all latents, from those over each of their equal parts."""
        return jax.tree.map(lambda leaf: leaf / self.latent_parts, self.sum_latents(tree)) if self.latents else tree

    def max_latents(self, x: Array) -> Array:
        """The largest over the parts of the latents; no derivative."""
        return x if self.latents is None else jax.lax.pmax(x, self.latents)

    def any_latents(self, which: Array) -> Array:
        """Whether one of all latents is among ``which`` [n] of those that are here."""
        return which.any() if self.latents is None else jax.lax.pmax(which.any().astype("int32"), self.latents) > 0

    def shared(self, tree: Any) -> Any:
        """Values that are the same for all parts of the latents, before they meet what is divided."""
        return self._each(tree, self.latents, shared)

    def _each(self, tree: Any, axes: Names | None, f: Callable[[Array, Names], Array]) -> Any:
        return jax.tree.map(lambda leaf: f(leaf, axes), tree) if axes else tree


ALONE = Axes()
