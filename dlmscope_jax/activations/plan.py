"""The order of shuffled batches: which rows make which batch, as pure arithmetic.

The order of an epoch. The store's chunks are permuted by (seed, epoch); their selected rows, one chunk after the other, are a
line of ``n`` rows. The line is cut into ``lanes`` equal stretches, and a batch takes ``batch_size / lanes`` rows from each, so
it mixes rows from all over the store. Within its stretch a lane permutes rows over groups of consecutive chunks, which are
disjoint; a group is what must be in memory at once. There are 256 lanes (the greatest common divisor with the batch size, where
that is no multiple), however many processes there are: a process owns consecutive lanes and gets their part of each batch, so
neither rows nor batches depend on the number of processes.

As all stretches are equally long, an epoch has ``n // batch_size`` batches and drops fewer than ``batch_size`` rows, the ends of the
stretches, which are other rows each epoch.

Every number above follows from (seed, step), the numbers of selected rows in each chunk, and the arguments.
"""

from dataclasses import dataclass

import numpy as np


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

    def __init__(self, counts: np.ndarray, batch_size: int, seed: int, group_chunks: int, lanes: int, window: int | None = None):
        """``counts`` [chunks]: selected rows of each chunk. ``lanes`` divides ``batch_size``. A ``window`` has an order of its own."""
        self.window = window
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
            self._order = self._generator(epoch, 1).permutation(len(self.counts))
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
        return self._generator(group.epoch, 2, group.lane, group.low).permutation(group.high - group.low)

    def _generator(self, epoch: int, purpose: int, *place: int) -> np.random.Generator:
        if self.window is not None:
            epoch, purpose = self.window, purpose + 2
        return np.random.default_rng([self.seed, epoch, purpose, *place])
