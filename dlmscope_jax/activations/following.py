"""Batches of a store that is still being written: harvest writes while training reads.

Selected rows in stored order are a line, cut into windows of ``buffer_rows`` rows (a whole number of batches; the last one has what is
left). The first epoch goes window by window, and shuffles within each one as ``plan.py`` does within a store: chunks are permuted by
(seed, window), dealt to lanes, and rows permuted within groups. A window begins when all of its rows are committed, so which rows are in
it, and in which order they come, follows from (seed, step) and from what the store holds in the end: never from when who wrote what.

The price is the shuffle of that epoch. A row comes at most one window from its place in the store, so neighbouring batches share
documents (and the corruption rates and the order of the text of a harvest) more than those of a finished store, where a batch mixes
rows from everywhere. Later epochs begin when the store is finished, and are those of any other reading of it.
"""

import sys
import threading
import time

import numpy as np

from ..errors import UserError
from .loader import Loaders, Reading
from .manifest import Shard

PATIENCE = 600.0  # seconds
POLL = 0.2  # seconds between two looks at the manifest


class Following:
    """The batches of a store in the order in which it grows."""

    def __init__(self, reading: Reading, epochs: int | None, patience: float):
        self._reading, self._epochs, self._patience = reading, epochs, patience
        self._steps = max(1, reading.buffer_rows // reading.batch_size)  # of a window
        self._counted: list[Shard] = []
        self._ends = np.zeros(1, np.int64)  # selected rows before each of them, and after the last
        self._window: tuple[int, Loaders] | None = None
        self._later: Loaders | None = None
        self.rows = self.steps_per_epoch = sys.maxsize

    def next(self, step: int, most: int, stopped: threading.Event) -> list[dict[str, np.ndarray]]:
        """As ``reader.Batches`` says."""
        window, size = step // self._steps, self._reading.batch_size
        if self.rows == sys.maxsize and not self._await((window + 1) * self._steps * size, stopped):
            return []
        if step < self.steps_per_epoch and self._epochs != 0:
            if self._window is None or self._window[0] != window:
                self._window = None  # the last window's rows go before the next one's come
                self._window = (window, self._loader(window))
            loader = self._window[1]
            within = step - window * self._steps
            return loader.batches(within, min(most, loader.plan.steps_per_epoch - within))
        if self._epochs is not None and step >= self._epochs * self.steps_per_epoch:
            return []
        if self._later is None:
            self._window = None
            self._later = self._reading.loader(self._counted)
        return self._later.batches(step, min(most, self.steps_per_epoch - step % self.steps_per_epoch))

    def _loader(self, window: int) -> Loaders:
        rows = self._steps * self._reading.batch_size
        low, high = window * rows, min((window + 1) * rows, int(self._ends[-1]))
        first = int(np.searchsorted(self._ends, low, side="right")) - 1
        last = int(np.searchsorted(self._ends, high, side="left"))
        before = int(self._ends[first])
        return self._reading.loader(self._counted[first:last], low - before, high - before, window)

    def _await(self, rows: int, stopped: threading.Event) -> bool:
        """Waits for so many selected rows, or for the end of the store; False where the consumer has gone."""
        store, since = self._reading.store, time.monotonic()
        while True:
            if self._count():
                self.rows = int(self._ends[-1])
                check_enough(self._reading, self.rows)
                self.steps_per_epoch = self.rows // self._reading.batch_size
                return True
            if self._ends[-1] >= rows:
                return True
            committed = len(store.shards)
            if stopped.wait(POLL):
                return False
            store.refresh()
            if len(store.shards) > committed:
                since = time.monotonic()
            elif time.monotonic() - since > self._patience:
                raise UserError(
                    f"no shard was committed to {store.url} for {self._patience:g} s ({store.rows} rows are there): its writer seems to "
                    "have stopped; run the same harvest again, then the training, which goes on from its checkpoint"
                )

    def _count(self) -> bool:
        """Counts the selected rows of the shards that follow one another without a gap; says whether no more will come."""
        store = self._reading.store
        complete, shards = store.complete, store.shards
        if not complete:
            shards = tuple(shard for place, shard in enumerate(shards) if shard.shard == place)
        if list(shards[: len(self._counted)]) != self._counted:
            raise UserError(f"{store.url}: shards that were read already are not there any more, or others: the store was changed")
        new = shards[len(self._counted) :]
        if self._reading.select == "all":
            counts = [shard.rows for shard in new]
        else:
            counts = [int(selected.sum()) for shard in new if (selected := self._reading.selected([shard])) is not None]
        self._counted += new
        self._ends = np.concatenate([self._ends, self._ends[-1] + np.cumsum(np.asarray(counts, np.int64))])
        return complete


def check_enough(reading: Reading, rows: int) -> None:
    """Raises ``UserError`` where there is not one batch."""
    if rows < reading.batch_size:
        raise UserError(
            f"the store at {reading.store.url} has {rows} rows to select as {reading.select!r}: "
            f"fewer than one batch of {reading.batch_size}"
        )
