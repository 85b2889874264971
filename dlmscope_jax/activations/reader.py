"""Shuffled batches from a store, read ahead of the consumer by a thread.

``plan.py`` says which rows make which batch, ``loader.py`` reads them, ``following.py`` does both for a store that is still being written.
Nothing is carried from step to step but the rows that are in memory. Starting at any step therefore costs one fill of the buffer.
"""

import math
import queue
import threading
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

import numpy as np

from ..errors import UserError
from .following import PATIENCE, Following, check_enough
from .loader import LANES, Loaders, Reading, column_of

if TYPE_CHECKING:
    from .store import ActivationStore

Select = Literal["all", "masked", "visible", "predicting"]
BUFFER_ROWS = 1 << 17
AHEAD = 8  # batches that are made together, and that wait for the consumer


class Batches(Protocol):
    """Where a ``BatchIterator`` gets its batches."""

    @property
    def steps_per_epoch(self) -> int:
        """Batches of one pass."""
        ...

    @property
    def rows(self) -> int:
        """Selected rows."""
        ...

    def next(self, step: int, most: int, stopped: threading.Event) -> list[dict[str, np.ndarray]]:
        """Up to ``most`` batches from a step on; none where the last epoch has ended or the consumer has gone."""
        ...


class Whole:
    """The batches of all shards that were committed when the reading began."""

    def __init__(self, loader: Loaders, rows: int, epochs: int | None):
        self.loader, self.rows, self.steps_per_epoch = loader, rows, loader.plan.steps_per_epoch
        self._stop = None if epochs is None else epochs * self.steps_per_epoch

    def next(self, step: int, most: int, stopped: threading.Event) -> list[dict[str, np.ndarray]]:
        """As ``Batches`` says."""
        if self._stop is not None and step >= self._stop:
            return []
        return self.loader.batches(step, min(most, self.steps_per_epoch - step % self.steps_per_epoch))


class BatchIterator:
    """Batches in the order of their steps, prepared by a thread that runs a few steps ahead.

    Attributes:
      step: the step of the next batch, for a checkpoint.
    """

    def __init__(self, source: Batches, start: int):
        self.step, self._source = start, source
        ready: queue.Queue[Any] = queue.Queue(AHEAD)
        stopped = threading.Event()
        self._ready, self._ended = ready, False
        # the thread must not hold the iterator, or an abandoned one would never be collected
        thread = threading.Thread(target=_fill, args=(source, ready, stopped, start), name="activation-reader", daemon=True)
        self._close = weakref.finalize(self, _halt, thread, ready, stopped)
        thread.start()

    @property
    def steps_per_epoch(self) -> int:
        """Batches of one pass; ``sys.maxsize`` while a store that is followed grows."""
        return self._source.steps_per_epoch

    @property
    def rows(self) -> int:
        """Selected rows; ``sys.maxsize`` while a store that is followed grows."""
        return self._source.rows

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


def _fill(source: Batches, ready: "queue.Queue[Any]", stopped: threading.Event, step: int) -> None:
    try:
        while batches := source.next(step, AHEAD, stopped):
            for batch in batches:
                if stopped.is_set():
                    return
                ready.put(batch)
            step += len(batches)
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
    follow: bool = False,
    patience: float = PATIENCE,
) -> BatchIterator:
    """``ActivationStore.batches``, whose docstring says what it does."""
    least_of = {"batch_size": (batch_size, 1), "seed": (seed, 0), "start_step": (start_step, 0), "buffer_rows": (buffer_rows, 1)}
    for name, (value, least) in least_of.items():
        if not isinstance(value, (int, np.integer)) or value < least:
            raise UserError(f"batches: {name} is {value!r}: it must be an integer of at least {least}")
    if select not in get_args(Select):
        raise UserError(f"batches: select {select!r} is not known: use one of {', '.join(get_args(Select))}")
    sites, columns = tuple(store.sites if sites is None else sites), tuple(store.columns if columns is None else columns)
    for kind, wanted, there in (("site", sites, tuple(store.sites)), ("column", columns, store.columns)):
        if unknown := [name for name in wanted if name not in there]:
            raise UserError(f"the store at {store.url} has no {kind} {unknown[0]!r}: it has {', '.join(there) or 'none'}")
    if select != "all" and column_of(select) not in store.columns:
        name = column_of(select)
        raise UserError(f"batches: select {select!r} needs the column {name!r}, which the store at {store.url} does not have: use 'all'")
    lanes = math.gcd(LANES, batch_size)
    index, count = process
    if not 0 <= index < count or lanes % count:
        raise UserError(f"batches: process {index} of {count} cannot share batches of {batch_size}: use a count that divides {lanes}")
    reading = Reading(store, int(batch_size), int(seed), sites, columns, select, int(buffer_rows), (int(index), int(count)))
    if follow:
        return BatchIterator(Following(reading, epochs, patience), int(start_step))
    shards = store.shards
    selected = reading.selected(shards)
    rows = store.rows if selected is None else int(selected.sum())
    check_enough(reading, rows)
    return BatchIterator(Whole(reading.loader(shards), rows, epochs), int(start_step))
