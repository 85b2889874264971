"""Shuffled batches from a store: first a plan (which rows, pure arithmetic), then the reading of it, ahead of the consumer.

The order of an epoch. The store's chunks are permuted by (seed, epoch); their selected rows, one chunk after the other, are a
line of ``n`` rows. The line is cut into ``lanes`` equal stretches, and a batch takes ``batch_size / lanes`` rows from each, so
it mixes rows from all over the store. Within its stretch a lane permutes rows over groups of consecutive chunks, which are
disjoint; a group is what must be in memory at once. There are 256 lanes (the greatest common divisor with the batch size, where
that is no multiple), however many processes there are: a process owns consecutive lanes and gets their part of each batch, so
neither rows nor batches depend on the number of processes.

As all stretches are equally long, an epoch has ``n // batch_size`` batches and drops fewer than ``batch_size`` rows, the ends of the
stretches, which are other rows each epoch.

Every number above follows from (seed, step), the store and the arguments; nothing is carried from step to step but the groups that are in
memory. Starting at any step therefore costs one fill of the buffer.
"""

import math
import queue
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from ..errors import UserError

if TYPE_CHECKING:
    from .store import ActivationStore

Select = Literal["all", "masked", "visible", "predicting"]
LANES = 256
BUFFER_ROWS = 1 << 17
AHEAD = 8  # batches that are made together, and that wait for the consumer


@dataclass(frozen=True)
class Group:
    """Rows of one lane that are permuted together: ``low:high`` of the epoch's line, from ``first:last`` of its chunk order."""

    epoch: int
    lane: int
    first: int
    last: int
    low: int
    high: int


class Plan:
    """Which rows make which batch: arithmetic on the numbers of selected rows of each chunk."""

    def __init__(self, counts: np.ndarray, batch_size: int, seed: int, group_chunks: int, lanes: int):
        """``counts`` [chunks]: selected rows of each chunk. ``lanes`` divides ``batch_size``."""
        self.counts, self.seed, self.group_chunks, self.lanes = np.asarray(counts, np.int64), seed, group_chunks, lanes
        self.share = batch_size // lanes
        rows = int(self.counts.sum())
        self.stretch = rows // lanes
        self.steps_per_epoch = rows // batch_size
        self._epoch = -1
        self._order = self._ends = np.zeros(0, np.int64)

    def order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's permutation of the chunks and the place in the line where each of them ends."""
        if epoch != self._epoch:
            self._order = np.random.default_rng([self.seed, epoch, 1]).permutation(len(self.counts))
            self._ends = np.cumsum(self.counts[self._order])
            self._epoch = epoch
        return self._order, self._ends

    def group(self, epoch: int, lane: int, at: int) -> Group:
        """The group of a lane that holds place ``at`` of the line."""
        _, ends = self.order(epoch)
        chunk = int(np.searchsorted(ends, at, side="right"))
        # lanes begin their groups at different chunks, so that they do not all load at the same step
        first = max(0, chunk - (chunk + lane) % self.group_chunks)
        last = min(len(ends), chunk - (chunk + lane) % self.group_chunks + self.group_chunks)
        low = max(lane * self.stretch, int(ends[first - 1]) if first else 0)
        high = min((lane + 1) * self.stretch, int(ends[last - 1]))
        first = int(np.searchsorted(ends, low, side="right"))
        last = int(np.searchsorted(ends, high - 1, side="right")) + 1
        return Group(epoch, lane, first, last, low, high)

    def largest_group(self, chunk_rows: int) -> int:
        """No group has more rows."""
        return min(self.stretch, self.group_chunks * chunk_rows)

    def permutation(self, group: Group) -> np.ndarray:
        """The order of a group's rows."""
        return np.random.default_rng([self.seed, group.epoch, 2, group.lane, group.low]).permutation(group.high - group.low)


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
    ):
        """``chunks`` [chunks, 4]: shard, first row, last row + 1 in the shard, first row in the store; ``selected`` [rows] bool or None.

        ``sites`` gives width and dtype, ``columns`` the values of all rows, ``lanes`` those of this process.
        """
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
        """The batches of ``count`` steps of one epoch, rows lane by lane in each.

        Several steps at once, so that the lanes which run out within them are read together: a read of few chunks costs mostly its
        look-ups.
        """
        plan, n = self.plan, len(self.lanes)
        epoch, within = divmod(step, plan.steps_per_epoch)
        if epoch != self._epoch:
            self._high[:] = 0
            self._epoch = epoch
        at = self.lanes * plan.stretch + within * plan.share
        wanted = count * plan.share
        left = np.full(n, wanted)
        size = n * plan.share
        found = {site: np.empty((count * size, width), self._pool[site].dtype) for site, (width, _) in self.sites.items()}
        rows = np.empty(count * size, np.int64)
        while left.any():  # until no lane has to go on in its next group
            self._load(np.flatnonzero((left > 0) & ((at < self._low) | (at >= self._high))), at)
            take = np.minimum(left, self._high - at) * (left > 0)
            lane = np.repeat(np.arange(n), take)
            along = np.arange(len(lane)) - np.repeat(np.cumsum(take) - take, take)
            ahead, within_share = np.divmod((wanted - left)[lane] + along, plan.share)
            target = ahead * size + lane * plan.share + within_share
            place = (at - self._low)[lane] + along
            source = self._slot[lane, place]
            for site, pool in self._pool.items():
                found[site][target] = pool[source]
            rows[target] = self._row[lane, place]
            at, left = at + take, left - take
        made = []
        for part in (slice(i * size, (i + 1) * size) for i in range(count)):
            batch = {site: found[site][part].view(dtype) for site, (_, dtype) in self.sites.items()}
            made.append(batch | {name: values[rows[part]] for name, values in self.columns.items()})
        return made

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
                kept = self._rows_of(chunk)[max(0, group.low - before) : group.high - before]
                to = slice(filled, filled + len(kept))
                original[to] = self.chunks[chunk, 3] + kept
                for site, pool in self._pool.items():
                    values = data[site][index[chunk]]
                    # all rows of a chunk are a slice, which NumPy copies faster than a choice
                    part = values[kept[0] : kept[-1] + 1] if self.selected is None else values.take(kept, axis=0)
                    pool[i * room + to.start : i * room + to.stop] = part
                filled = to.stop
            permutation = plan.permutation(group)
            self._slot[i, :size] = i * room + permutation
            self._row[i, :size] = original[permutation]
            self._low[i], self._high[i] = group.low, group.high

    def _rows_of(self, chunk: int) -> np.ndarray:
        _, start, stop, first = self.chunks[chunk]
        if self.selected is None:
            return np.arange(stop - start)
        return np.flatnonzero(self.selected[first : first + stop - start])


def _words(values: np.ndarray) -> np.ndarray:
    return values.view(f"u{values.dtype.itemsize}")


class BatchIterator:
    """Batches in the order of their steps, prepared by a thread that runs a few steps ahead.

    Attributes:
      steps_per_epoch: batches of one pass.
      rows: selected rows.
      step: the step of the next batch, for a checkpoint.
    """

    def __init__(self, loader: Loader, rows: int, start: int, stop: int | None):
        self.steps_per_epoch, self.rows, self.step = loader.plan.steps_per_epoch, rows, start
        ready: queue.Queue[Any] = queue.Queue(AHEAD)
        stopped = threading.Event()
        self._ready, self._ended = ready, False
        # the thread must not hold the iterator, or an abandoned one would never be collected
        thread = threading.Thread(target=_fill, args=(loader, ready, stopped, start, stop), name="activation-reader", daemon=True)
        self._close = weakref.finalize(self, _halt, thread, ready, stopped)
        thread.start()

    def __iter__(self) -> "BatchIterator":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if self._ended:
            raise StopIteration
        item = self._ready.get()
        if isinstance(item, dict):
            self.step += 1
            return item
        self._ended = True
        if item is None:
            raise StopIteration
        raise item

    def close(self) -> None:
        """Stops reading; further batches do not come."""
        self._ended = True
        self._close()


def _fill(loader: Loader, ready: "queue.Queue[Any]", stopped: threading.Event, start: int, stop: int | None) -> None:
    step, epoch = start, loader.plan.steps_per_epoch
    try:
        while stop is None or step < stop:
            count = min(AHEAD, epoch - step % epoch)
            for batch in loader.batches(step, count):
                if stopped.is_set():
                    return
                ready.put(batch)
            step += count
        ready.put(None)
    except BaseException as error:  # every failure belongs to the consumer
        ready.put(error)


def _halt(thread: threading.Thread, ready: "queue.Queue[Any]", stopped: threading.Event) -> None:
    stopped.set()
    while thread.is_alive():  # it may be waiting for room
        try:
            ready.get_nowait()
        except queue.Empty:
            thread.join(0.01)


def start_batches(
    store: "ActivationStore",
    batch_size: int,
    seed: int,
    start_step: int,
    sites: Sequence[str] | None,
    select: str,
    epochs: int | None,
    columns: Sequence[str] | None,
    buffer_rows: int,
    process: tuple[int, int],
) -> BatchIterator:
    """``ActivationStore.batches``, whose docstring says what it does."""
    least_of = {"batch_size": (batch_size, 1), "seed": (seed, 0), "start_step": (start_step, 0), "buffer_rows": (buffer_rows, 1)}
    for name, (value, least) in least_of.items():
        if not isinstance(value, (int, np.integer)) or value < least:
            raise UserError(f"batches: {name} is {value!r}: it must be an integer of at least {least}")
    sites, columns = list(store.sites if sites is None else sites), list(store.columns if columns is None else columns)
    for kind, wanted, there in (("site", sites, tuple(store.sites)), ("column", columns, store.columns)):
        if unknown := [name for name in wanted if name not in there]:
            raise UserError(f"the store at {store.url} has no {kind} {unknown[0]!r}: it has {', '.join(there) or 'none'}")
    lanes = math.gcd(LANES, batch_size)
    index, count = process
    if not 0 <= index < count or lanes % count:
        raise UserError(f"batches: process {index} of {count} cannot share batches of {batch_size}: use a count that divides {lanes}")

    selected = _selection(store, select)
    rows = store.rows if selected is None else int(selected.sum())
    if rows < batch_size:
        raise UserError(f"the store at {store.url} has {rows} rows to select as {select!r}: fewer than one batch of {batch_size}")
    chunks, first = [], 0
    for shard in store.shards:
        for start in range(0, shard.rows, store.chunk_rows):
            stop = min(start + store.chunk_rows, shard.rows)
            chunks.append((shard.shard, start, stop, first + start))
        first += shard.rows
    table = np.asarray(chunks, np.int64)
    if selected is None:
        counts = table[:, 2] - table[:, 1]
    else:
        counts = np.add.reduceat(selected.astype(np.int64), table[:, 3])
    group_chunks = max(1, buffer_rows // (lanes * store.chunk_rows))
    plan = Plan(counts, batch_size, int(seed), group_chunks, lanes)
    share = lanes // count
    held = {name: store.column(name) for name in columns}
    widths = {site: (store.sites[site], store.dtype) for site in sites}
    loader = Loader(plan, table, selected, store.read_chunks, widths, held, range(index * share, (index + 1) * share))
    last = None if epochs is None else epochs * plan.steps_per_epoch
    return BatchIterator(loader, rows, int(start_step), last)


def _selection(store: "ActivationStore", select: str) -> np.ndarray | None:
    if select not in get_args(Select):
        raise UserError(f"batches: select {select!r} is not known: use one of {', '.join(get_args(Select))}")
    if select == "all":
        return None
    name = "predicts_masked" if select == "predicting" else "is_masked"
    if name not in store.columns:
        raise UserError(f"batches: select {select!r} needs the column {name!r}, which the store at {store.url} does not have: use 'all'")
    column = store.column(name)
    return ~column if select == "visible" else column
