"""The rows of a plan's steps, read from a store: one group of each lane is in memory at a time."""

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from .int8 import restore
from .manifest import Shard
from .plan import Plan

if TYPE_CHECKING:
    from .store import ActivationStore

LANES = 256
PARTS = 4  # threads that fill a batch, at most


class Loader:
    """Turns a plan's steps into arrays, keeping one group of each lane in memory."""

    def __init__(
        self,
        plan: Plan,
        chunks: np.ndarray,
        selected: np.ndarray | None,
        read: Callable[[str, Sequence[tuple[int, int, int]]], list[np.ndarray]],
        sites: dict[str, tuple[int, np.dtype]],
        columns: dict[str, np.ndarray],
        lanes: range,
        scales: dict[str, np.ndarray] | None = None,
    ):
        """``chunks`` [chunks, 4]: shard, first row, last row + 1 in the shard, first row in the store; ``selected`` [rows] bool or None.

        ``sites`` gives width and stored dtype, ``columns`` the values of all rows, ``lanes`` those of this process, ``scales`` those of
        all rows for each site that is stored as int8. Rows are those of ``chunks`` one after the other.
        """
        self.scales = scales or {}
        self.plan, self.chunks, self.selected, self.read = plan, chunks, selected, read
        self.sites, self.columns = sites, columns
        self.lanes = np.asarray(lanes, np.int64)
        n, room = len(lanes), plan.largest_group(int((chunks[:, 2] - chunks[:, 1]).max()))
        # rows move as raw words: NumPy copies bfloat16 element by element
        self._pool = {site: np.empty((n * room, width), f"u{dtype.itemsize}") for site, (width, dtype) in sites.items()}
        self._slot = np.zeros((n, room), np.int64)  # where in the pool the i-th row of the lane's permutation is
        self._row = np.zeros((n, room), np.int64)  # and which row of the store it is
        self._low = np.zeros(n, np.int64)
        self._high = np.zeros(n, np.int64)
        self._epoch = -1

    def batches(self, step: int, count: int) -> list[dict[str, np.ndarray]]:
        """The batches of ``count`` steps of one epoch, rows lane by lane in each."""
        return together([self], step, count)

    def fill(self, step: int, count: int, out: dict[str, list[np.ndarray]], rows: np.ndarray, first: int) -> None:
        """Writes this loader's rows of ``count`` batches: sites [B, D] each, row numbers [count, B], from row ``first`` of each on.

        Several steps at once, so that the lanes which run out within them are read together: a read of few chunks costs mostly its
        look-ups. Most rows are copied once, out of the pool to where they belong; those of a lane that goes on in its next group, which
        will take its place in the pool, are set aside before.
        """
        plan, n = self.plan, len(self.lanes)
        epoch, within = divmod(step, plan.steps_per_epoch)
        if epoch != self._epoch:
            self._high[:] = 0
            self._epoch = epoch
        at = self.lanes * plan.stretch + within * plan.share
        wanted = count * plan.share
        left = np.full(n, wanted)
        chosen = np.zeros((count, n * plan.share), np.int64)
        aside: list[tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]] = []
        while left.any():  # until no lane has to go on in its next group
            self._load(np.flatnonzero((left > 0) & ((at < self._low) | (at >= self._high))), at)
            take = np.minimum(left, self._high - at) * (left > 0)
            lane = np.repeat(np.arange(n), take)
            along = np.arange(len(lane)) - np.repeat(np.cumsum(take) - take, take)
            ahead, within_share = np.divmod((wanted - left)[lane] + along, plan.share)
            target = lane * plan.share + within_share
            place = (at - self._low)[lane] + along
            source = self._slot[lane, place]
            rows[ahead, first + target] = self._row[lane, place]
            chosen[ahead, target] = source
            if (going := (left > take)[lane]).any():
                values = {site: pool.take(source[going], axis=0) for site, pool in self._pool.items()}
                aside.append((ahead[going], target[going], values))
            at, left = at + take, left - take
        for i in range(count):
            for site, pool in self._pool.items():
                to = out[site][i][first : first + len(chosen[i])]
                scales = self.scales.get(site)
                found = to if scales is None else np.empty(to.shape, pool.dtype)
                pool.take(chosen[i], axis=0, out=found, mode="clip")  # with a mode that checks, NumPy copies once more
                for ahead, target, values in aside:
                    found[target[ahead == i]] = values[site][ahead == i]
                if scales is not None:
                    restore(found.view(np.int8), scales[rows[i, first : first + len(to)]], to)

    def _load(self, lanes: np.ndarray, at: np.ndarray) -> None:
        """Reads the groups of some lanes at their places; a chunk that several of them need is read once."""
        if not len(lanes):
            return
        plan, room = self.plan, self._slot.shape[1]
        order, ends = plan.order(self._epoch)
        groups = [plan.group(self._epoch, int(self.lanes[i]), int(at[i])) for i in lanes]
        needed = np.unique(np.concatenate([order[g.first : g.last] for g in groups]))
        needed = needed[plan.counts[needed] > 0]
        index = {int(chunk): i for i, chunk in enumerate(needed)}
        places = [(int(shard), int(start), int(stop)) for shard, start, stop, _ in self.chunks[needed]]
        data = {site: [_words(values) for values in self.read(site, places)] for site in self.sites}
        for i, group in zip(lanes, groups, strict=True):
            size, filled = group.high - group.low, 0
            original = np.empty(size, np.int64)
            for place in range(group.first, group.last):
                chunk = int(order[place])
                if chunk not in index:  # nothing selected in it
                    continue
                before = int(ends[place] - plan.counts[chunk])
                low, high = max(0, group.low - before), min(group.high - before, int(plan.counts[chunk]))
                to, first = slice(filled, filled + high - low), int(self.chunks[chunk, 3])
                if self.selected is None:
                    original[to] = np.arange(first + low, first + high)
                    for site, pool in self._pool.items():
                        # all rows between two are a slice, which NumPy copies faster than a choice
                        pool[i * room + to.start : i * room + to.stop] = data[site][index[chunk]][low:high]
                else:
                    kept = self._rows_of(chunk)[low:high]
                    original[to] = first + kept
                    for site, pool in self._pool.items():
                        pool[i * room + to.start : i * room + to.stop] = data[site][index[chunk]].take(kept, axis=0)
                filled = to.stop
            permutation = plan.permutation(group)
            self._slot[i, :size] = i * room + permutation
            self._row[i, :size] = original[permutation]
            self._low[i], self._high[i] = group.low, group.high

    def _rows_of(self, chunk: int) -> np.ndarray:
        _, start, stop, first = self.chunks[chunk]
        return np.flatnonzero(self.selected[first : first + stop - start])


def together(loaders: "Sequence[Loader]", step: int, count: int, pool: ThreadPoolExecutor | None = None) -> list[dict[str, np.ndarray]]:
    """The batches of ``count`` steps of one epoch; each loader fills the rows of its lanes, all of them at one time in a pool."""
    one = loaders[0]
    sizes = [len(loader.lanes) * loader.plan.share for loader in loaders]
    out, rows = {}, np.empty((count, sum(sizes)), np.int64)
    for site, (width, dtype) in one.sites.items():
        kind = np.float32 if site in one.scales else f"u{dtype.itemsize}"
        # each batch by itself: memory of this size is used again, that of all of them together would be mapped anew each time
        out[site] = [np.empty((sum(sizes), width), kind) for _ in range(count)]
    work = [partial(loader.fill, step, count, out, rows, sum(sizes[:i])) for i, loader in enumerate(loaders)]
    if pool is None:
        for part in work:
            part()
    else:
        for future in [pool.submit(part) for part in work]:
            future.result()
    made = []
    for i in range(count):
        batch = {site: out[site][i] if site in one.scales else out[site][i].view(dtype) for site, (_, dtype) in one.sites.items()}
        made.append(batch | {name: values[rows[i]] for name, values in one.columns.items()})
    return made


class Loaders:
    """A loader cut into several of some lanes each, which read at one time; what they read does not depend on their number."""

    def __init__(self, loaders: list[Loader]):
        self.plan, self._loaders = loaders[0].plan, loaders
        self._pool = ThreadPoolExecutor(len(loaders), thread_name_prefix="activation-lanes") if len(loaders) > 1 else None

    def batches(self, step: int, count: int) -> list[dict[str, np.ndarray]]:
        """The batches of ``count`` steps of one epoch."""
        return together(self._loaders, step, count, self._pool)


@dataclass(frozen=True)
class Reading:
    """What is read of a store, and how: the arguments of ``ActivationStore.batches``, checked."""

    store: "ActivationStore"
    batch_size: int
    seed: int
    sites: tuple[str, ...]
    columns: tuple[str, ...]
    select: str
    buffer_rows: int
    process: tuple[int, int]

    def loader(self, shards: Sequence[Shard], low: int = 0, high: int | None = None, window: int | None = None) -> Loaders:
        """What loads the selected rows ``low:high`` of some shards."""
        store, lanes = self.store, math.gcd(LANES, self.batch_size)
        selected = self.selected(shards)
        if selected is None:
            chunks = chunks_of(shards, store.chunk_rows, low, high)
            counts = chunks[:, 2] - chunks[:, 1]
        else:
            chunks = chunks_of(shards, store.chunk_rows)
            kept = np.flatnonzero(selected)[low:high]
            selected = np.zeros_like(selected)
            selected[kept] = True
            counts = np.add.reduceat(selected.astype(np.int64), chunks[:, 3])
        group_chunks = max(1, self.buffer_rows // (lanes * store.chunk_rows))
        index, count = self.process
        own = range(index * lanes // count, (index + 1) * lanes // count)
        parts = next(n for n in range(min(PARTS, os.cpu_count() or 1), 0, -1) if len(own) % n == 0)
        widths = {site: (store.sites[site], store.stored_dtype) for site in self.sites}
        held = {name: store.values(name, shards) for name in self.columns}
        scales = {site: store.values(site, shards) for site in self.sites if store.stored_dtype == np.int8}
        loaders = []
        for part in (own[i * len(own) // parts : (i + 1) * len(own) // parts] for i in range(parts)):
            plan = Plan(counts, self.batch_size, self.seed, group_chunks, lanes, window)  # one for each: it keeps an epoch's order
            loaders.append(Loader(plan, chunks, selected, store.read_chunks, widths, held, part, scales))
        return Loaders(loaders)

    def selected(self, shards: Sequence[Shard]) -> np.ndarray | None:
        """Which rows of some shards are wanted [rows], None where all are."""
        if self.select == "all":
            return None
        column = self.store.values(column_of(self.select), shards)
        return ~column if self.select == "visible" else column


def column_of(select: str) -> str:
    """The column that says which rows are selected."""
    return "predicts_masked" if select == "predicting" else "is_masked"


def chunks_of(shards: Sequence[Shard], chunk_rows: int, low: int = 0, high: int | None = None) -> np.ndarray:
    """``(shard, first row, last row + 1, first row counted over all shards)`` [chunks, 4] of the rows ``low:high`` of these shards."""
    chunks, first = [], 0
    for shard in shards:
        for start in range(0, shard.rows, chunk_rows):
            stop = min(start + chunk_rows, shard.rows)
            start, end = max(start, low - first), stop if high is None else min(stop, high - first)
            if start < end:
                chunks.append((shard.shard, start, end, first + start))
        first += shard.rows
    return np.asarray(chunks, np.int64)


def _words(values: np.ndarray) -> np.ndarray:
    return values.view(f"u{values.dtype.itemsize}")
