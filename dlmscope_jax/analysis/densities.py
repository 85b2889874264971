"""How often every latent of a dictionary fires: by corruption rate, by mask state, over all rows of a store."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dlmscope_jax.dictionaries import RowSparse
from dlmscope_jax.errors import UserError

from .match import Dictionary, check_match, raw, stored_as

RATE_EDGES = tuple(round(0.1 * i, 1) for i in range(11))
_BINS = len(RATE_EDGES)  # ten, and one for rows without a rate
BATCH = 4096


@dataclasses.dataclass(frozen=True)
class Firing:
    """Counts over a store. A latent fires where its activation is not 0; a bit where it has the value that it has more rarely.

    Attributes:
      counts: [rate bin, state, own, N]; state 1 is masked; own 1 are rows of the kind that the dictionary was trained on;
        the last rate bin holds rows without a rate.
      rows: [rate bin, state, own], the rows behind them.
      largest, total: [N] the activation of largest size, with its sign, and their sum over own rows; of bits, of ``fires``.
      select: the kind of own rows.
      usual: [N] for binary codes: bits that are 1 in more than half of the own rows, so that a 0 is the event; None for others.
    """

    counts: Int[np.ndarray, "R 2 2 N"]
    rows: Int[np.ndarray, "R 2 2"]
    largest: Float[np.ndarray, " N"]
    total: Float[np.ndarray, " N"]
    select: str
    usual: Bool[np.ndarray, " N"] | None = None

    @property
    def n_rows(self) -> int:
        """Rows of the dictionary's own kind."""
        return int(self.rows[:, :, 1].sum())

    @property
    def fired(self) -> Int[np.ndarray, " N"]:
        """Own rows in which each latent fired."""
        return self.counts[:, :, 1].sum(axis=(0, 1))

    @property
    def density(self) -> Float[np.ndarray, " N"]:
        """Share of own rows in which each latent fires."""
        return self.fired / max(self.n_rows, 1)

    @property
    def dead_share(self) -> float:
        """Share of latents that fired in no own row."""
        return float((self.fired == 0).mean())

    def by_state(self, masked: bool) -> Float[np.ndarray, " N"] | None:
        """Density over all masked or all visible rows, None where there are none."""
        rows = int(self.rows[:, int(masked)].sum())
        return self.counts[:, int(masked)].sum(axis=(0, 1)) / rows if rows else None

    def by_rate(self, latent: int) -> tuple[dict[str, float], ...]:
        """``{low, high, rows, density}`` over own rows for every rate bin that has some; empty where only one has (clean text)."""
        rows, counts = self.rows[:-1, :, 1].sum(axis=1), self.counts[:-1, :, 1, latent].sum(axis=1)
        if (rows > 0).sum() < 2:
            return ()
        return tuple(
            {"low": RATE_EDGES[i], "high": RATE_EDGES[i + 1], "rows": int(rows[i]), "density": float(counts[i] / rows[i])}
            for i in np.flatnonzero(rows)
        )

    def deciles(self) -> Int[np.ndarray, " N"]:
        """Which tenth of the living latents each belongs to, by density, 0 the rarest; -1 for dead ones. Ties go by index."""
        alive = np.flatnonzero(self.fired)
        order = alive[np.argsort(self.fired[alive], kind="stable")]
        tenth = np.full(len(self.fired), -1)
        for i, part in enumerate(np.array_split(order, 10)):
            tenth[part] = i
        return tenth


def firing(
    dictionary: Dictionary, store: Any, *, batch_size: int = BATCH, force: bool = False, progress: Callable[[int], None] | None = None
) -> Firing:
    """Streams a store once and counts, for all latents.

    Args:
      dictionary: ``(spec, params, meta)``.
      store: an ``ActivationStore`` that holds its site.
      batch_size: rows at a time.
      force: go on in spite of a mismatch between dictionary and store.
      progress: called with the number of rows done.

    Raises:
      UserError: what ``check_match`` raises; a store without rows of the dictionary's kind.
    """
    check_match(dictionary, store=store, force=force)
    spec, params, meta = raw(dictionary)
    own, masked = own_rows(store, meta.select), _column(store, "is_masked", False).astype(np.int64)
    rate = _column(store, "rate", np.nan).astype(np.float64)
    bins = np.clip(np.digitize(np.nan_to_num(rate, nan=-1.0), RATE_EDGES) - 1, -1, _BINS - 2)
    bins[bins < 0] = _BINS - 1
    group = ((bins * 2 + masked) * 2 + own).astype(np.int32)
    counts = jnp.zeros((_BINS * 4 + 1, spec.width), jnp.int32)  # the last line takes what only fills up a batch
    most, least, total = np.zeros(spec.width, np.float32), np.zeros(spec.width, np.float32), np.zeros(spec.width)
    for start, stop, x in batches_of(store, meta.site, batch_size):
        padded = np.full(batch_size, _BINS * 4, np.int32)
        padded[: stop - start] = group[start:stop]
        counts, highest, lowest, added = _count(spec, params, x, padded, counts)
        most, least = np.maximum(most, np.asarray(highest)), np.minimum(least, np.asarray(lowest))
        total += np.asarray(added, np.float64)
        if progress:
            progress(stop - start)
    shape = (_BINS, 2, 2)
    rows = np.bincount(group, minlength=_BINS * 4).reshape(shape)
    found = np.asarray(counts, np.int64)[:-1].reshape(*shape, spec.width)
    largest, usual = np.where(most >= -least, most, least), None
    if is_binary(spec):
        usual = 2 * found[:, :, 1].sum(axis=(0, 1)) > own.sum()
        found = np.where(usual, rows[..., None] - found, found)
        total = found[:, :, 1].sum(axis=(0, 1)).astype(np.float64)
        largest = (total > 0).astype(np.float32)
    return Firing(found, rows, largest, total, meta.select or "all", usual)


def is_binary(spec: Any) -> bool:
    """Whether the codes of a dictionary are single bits, of which neither value is the active one by itself."""
    return getattr(spec, "KIND", None) == "binary" and spec.bits == 1


def own_rows(store: Any, select: str | None) -> Bool[np.ndarray, " rows"]:
    """Rows of the kind that a dictionary was trained on.

    Raises:
      UserError: when the store has none, or cannot tell.
    """
    if select in (None, "all"):
        return np.ones(store.rows, bool)
    name = "predicts_masked" if select == "predicting" else "is_masked"
    if name not in store.columns:
        raise UserError(f"the dictionary was trained on {select} rows, but the store has no column {name} to find them by")
    chosen = store.column(name).astype(bool)
    chosen = ~chosen if select == "visible" else chosen
    if not chosen.any():
        raise UserError(f"the dictionary was trained on {select} rows and the store has none of them")
    return chosen


def batches_of(store: Any, site: str, batch_size: int) -> Iterator[tuple[int, int, Float[np.ndarray, "b D"]]]:
    """``(start, stop, rows)`` through a store in order, float32, the last batch filled up with zero rows."""
    read_as = stored_as(store, site)
    for start in range(0, store.rows, batch_size):
        stop = min(start + batch_size, store.rows)
        x = np.zeros((batch_size, store.sites[read_as]), np.float32)
        x[: stop - start] = store.read(read_as, start, stop)
        yield start, stop, x


def _column(store: Any, name: str, default: Any) -> np.ndarray:
    return store.column(name) if name in store.columns else np.full(store.rows, default)


@functools.partial(jax.jit, static_argnames="spec")
def _count(
    spec: Any, params: Any, x: Float[Array, "b D"], group: Int[Array, " b"], counts: Int[Array, "G N"]
) -> tuple[Int[Array, "G N"], Float[Array, " N"], Float[Array, " N"], Float[Array, " N"]]:
    """Counts by group, and over own rows the highest, the lowest (0 at least and at most) and the summed activations."""
    codes = spec.encode(params, x)
    own = ((group % 2 == 1) & (group < counts.shape[0] - 1))[:, None]
    if not isinstance(codes, RowSparse):
        active = spec.dense(codes).astype(jnp.float32)
        kept = jnp.where(own, active, 0.0)
        return counts.at[group].add((active != 0).astype(jnp.int32)), kept.max(axis=0), kept.min(axis=0), kept.sum(axis=0)
    kept = jnp.where(own, codes.values, 0.0)
    empty = jnp.zeros(counts.shape[1], jnp.float32)
    return (
        counts.at[group[:, None], codes.indices].add((codes.values != 0).astype(jnp.int32)),
        empty.at[codes.indices].max(kept),
        empty.at[codes.indices].min(kept),
        empty.at[codes.indices].add(kept),
    )
