"""The order of a stream: which rows of which forward passes make which batch. Arithmetic on the host; no activation is touched here.

Blocks. An epoch takes the blocks in an order drawn from (seed, epoch), ``per_pass`` of them at a time: a pass. Epochs follow each other
without a seam, and passes are counted through them.

Lanes. A pass has a fixed number of lanes, whatever the mesh. Its blocks are dealt to them so that all lanes have had about equally many
selected rows so far (never more than one block's apart). A batch takes ``rows / lanes`` rows from each lane, which lies on one device from
the forward pass to the training step.

Mixing. The rows of a pass leave over ``span`` stages, about as many in each: a row's stage is drawn from (seed, epoch, pass). A stage's
rows are permuted by (seed, stage), and a lane's line is its stages one after the other. So a batch mixes rows of ``span`` passes evenly,
while ``(span + 1) / 2`` passes are in memory, those rows that have not left yet. The first ``(span + 1) / 2`` passes come before the first
batch, and after that one at a time, when the first lane runs out.

Position. How many rows each lane has let go by the end of a stage follows from the numbers of selected rows alone, so any step can be
begun with: the passes of which some rows have not left, ``span`` at most, are run again.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

_UNIT = 1 << 16  # fractions of a row, as integers: they decide which stage a row leaves in
_BLOCKS, _STAGES, _SHIFTS, _LINES = range(4)  # what a random number is for


@dataclass(frozen=True)
class Window:
    """What a pass gives: the rows that are selected, lane by lane.

    Attributes:
      blocks: [per_pass] which blocks it runs, slots lane by lane; -1: none.
      epoch: of these blocks.
      row: [n] the selected rows, ``slot * T + position``.
      lane: [n] their lanes, ascending.
      stage: [n] when each leaves.
    """

    blocks: np.ndarray
    epoch: int
    row: np.ndarray
    lane: np.ndarray
    stage: np.ndarray


class Order:
    """The order for one seed: passes, stages and their sizes; as many epochs as were asked for."""

    def __init__(
        self,
        counts: Callable[[int], np.ndarray],
        selected: Callable[[int, np.ndarray], np.ndarray],
        length: int,
        per_pass: int,
        lanes: int,
        span: int,
        seed: int,
    ):
        """``counts(epoch)`` [blocks]: selected rows of each block; ``selected(epoch, blocks)`` [n, T]: which they are, none of block -1.

        ``length``: T; ``lanes`` divides ``per_pass``; ``span``: stages in which the rows of a pass leave.
        """
        self.length, self.per_pass, self.lanes, self.span, self.seed = length, per_pass, lanes, span, seed
        self.first = (span + 1) // 2  # passes before the first batch
        self._counts, self._selected = counts, selected
        self._epochs = self._per_epoch = 0  # that are planned, and passes of each
        self._dealt: dict[int, np.ndarray] = {}  # of each epoch [passes, per_pass]
        # from pass or stage ``_base`` on, what is long past is forgotten:
        self._base = 0
        self._sizes = np.zeros((0, lanes), np.int64)  # selected rows of each pass and lane
        self._come = np.zeros((0, lanes), np.int64)  # those and all before
        self._shifts = np.zeros((0, lanes), np.int64)
        self._gone = np.zeros((0, lanes), np.int64)  # rows that have left by the end of each stage

    def gone(self, stage: int) -> np.ndarray:
        """[lanes] rows that have left by the end of a stage, 0 before the first one."""
        while self._base + len(self._gone) <= stage:
            self._extend()
        return self._gone[stage - self._base] if stage >= 0 else np.zeros(self.lanes, np.int64)

    def stage_of(self, rows: int) -> int:
        """The first stage at whose end a lane has let more than ``rows`` rows go."""
        while not len(self._gone) or self._gone[-1].max() <= rows:
            self._extend()
        return self._base + int(np.searchsorted(self._gone.max(axis=1), rows, side="right"))

    def capacity(self, share: int, stages: int) -> int:
        """The most rows of a lane that wait at a time, over the first stages, when a batch takes ``share`` rows of each lane.

        Has to be asked for first.
        """
        self.gone(stages - 1)
        come = self._come[self.first - 1 : self.first - 1 + stages].max(axis=1)
        gone = np.concatenate([[0], self._gone[: stages - 1].min(axis=1)])
        return int((come - gone // share * share).max())

    def passes(self, stage: int) -> range:
        """The passes whose rows leave in a stage."""
        return range(max(0, stage + self.first - self.span), stage + self.first)

    def window(self, number: int) -> Window:
        """A pass, by its number."""
        while self._epochs * self._per_epoch <= number:
            self._extend()
        epoch, index = divmod(number, self._per_epoch)
        blocks = self._dealt[epoch][index]
        keep = self._selected(epoch, blocks)
        row = np.flatnonzero(keep)
        lane = row // (keep.size // self.lanes)
        # a random order within each lane
        row = row[np.argsort(lane + np.random.default_rng([self.seed, _STAGES, number]).random(len(row)))]
        size = self._sizes[number - self._base]
        rank = np.arange(len(row)) - (np.cumsum(size) - size)[lane]
        begin, portions = self._stages(number)
        stage = begin + (rank * _UNIT + self._shifts[number - self._base][lane]) * portions // (size[lane] * _UNIT)
        return Window(blocks, epoch, row, lane, stage)

    def shuffled(self, stage: int, lane: np.ndarray) -> np.ndarray:
        """The order of a stage's rows, given their lanes: lane by lane, at random within each."""
        return np.argsort(lane + np.random.default_rng([self.seed, _LINES, stage]).random(len(lane)))

    def _stages(self, number: int | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The first stage in which rows of a pass leave, and in how many they do; passes before the first batch have fewer left."""
        begin = np.maximum(0, np.asarray(number) - self.first + 1)
        return begin, number - self.first + self.span - begin + 1

    def _extend(self) -> None:
        """Plans one epoch more."""
        epoch = self._epochs
        counts = self._counts(epoch)
        order = np.random.default_rng([self.seed, _BLOCKS, epoch]).permutation(len(counts))
        order = np.concatenate([order, np.full(-len(order) % self.per_pass, -1)])
        counts = np.append(counts, 0)  # of block -1
        rounds = order.reshape(-1, self.lanes)  # of each round, every lane gets one block
        before = self._come[-1] if epoch else np.zeros(self.lanes, np.int64)
        total, dealt = before.copy(), np.empty_like(rounds)
        for i, blocks in enumerate(rounds):
            n = counts[blocks]
            if n.min() < n.max():  # the longest block to the lane that has had least
                dealt[i, np.argsort(total, kind="stable")] = blocks[np.argsort(-n, kind="stable")]
            else:
                dealt[i] = blocks
            total += counts[dealt[i]]
        # [passes, rounds of a pass, lanes] -> slots lane by lane
        slots = dealt.reshape(-1, self.per_pass // self.lanes, self.lanes).swapaxes(1, 2)
        self._dealt[epoch] = slots.reshape(-1, self.per_pass)
        sizes = counts[slots].sum(axis=2)
        shifts = np.random.default_rng([self.seed, _SHIFTS, epoch]).integers(_UNIT, size=sizes.shape)
        self._epochs, self._per_epoch = epoch + 1, len(sizes)
        self._sizes = np.concatenate([self._sizes, sizes])
        self._come = np.concatenate([self._come, before + np.cumsum(sizes, axis=0)])
        self._shifts = np.concatenate([self._shifts, shifts])
        start, stop = self._base + len(self._gone), self._base + len(self._sizes) - self.first + 1
        self._gone = np.concatenate([self._gone, self._rows_gone(start, stop)])
        self._forget(self._epochs * self._per_epoch - 2 * (self.span + self._per_epoch))

    def _rows_gone(self, start: int, stop: int) -> np.ndarray:
        """``gone`` of stages ``start:stop``: passes that have let all rows go, and what others have let go in the stages so far."""
        stages = np.arange(start, max(start, stop))
        oldest = stages + self.first - self.span
        found = np.where((oldest > 0)[:, None], self._come[np.maximum(oldest - 1 - self._base, 0)], 0)
        for ahead in range(self.span):
            number = oldest + ahead
            there = number >= 0
            number = np.maximum(number, 0)
            begin, portions = self._stages(number)
            size, shift = self._sizes[number - self._base], self._shifts[number - self._base]
            # rank * unit + shift < so much
            limit = -(-((stages - begin + 1)[:, None] * size * _UNIT) // portions[:, None])
            found += np.where(there[:, None], np.clip(-(-(limit - shift) // _UNIT), 0, size), 0)
        return found

    def _forget(self, before: int) -> None:
        """Lets passes and stages before one go, when they are many: who walks through an order goes forward."""
        past = before - self._base
        if past <= max(2 * self._per_epoch, 1000):
            return
        self._sizes, self._come, self._shifts, self._gone = (
            array[past:] for array in (self._sizes, self._come, self._shifts, self._gone)
        )  # fmt: skip
        self._base = before
        self._dealt = {epoch: dealt for epoch, dealt in self._dealt.items() if (epoch + 1) * self._per_epoch > before}


@dataclass(frozen=True)
class Fill:
    """A pass to run, and where its rows go.

    ``slot`` [n]: where in its lane's part of the buffer each row of the window is kept, -1: nowhere, it has left already.
    """

    window: Window
    slot: np.ndarray


class Mixer:
    """Walks through an order from some step on: what to run, what to take, and which places in the buffer are free."""

    def __init__(self, order: Order, share: int, start: int, capacity: int):
        """``share``: rows of a lane in a batch; ``start``: the first step; ``capacity``: rows of a lane that the buffer holds."""
        lanes = order.lanes
        self._order, self._share, self.capacity = order, share, capacity
        self._free = np.tile(np.arange(capacity), (lanes, 1))  # the first ``_left`` of each lane are free
        self._left = np.full(lanes, capacity)
        self._stage = order.stage_of(start * share)
        self._skip = start * share - order.gone(self._stage - 1)  # rows of the lines that earlier steps took
        self._run = order.passes(self._stage).start  # the next pass
        self._first = self._stage
        self._waiting: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}  # lanes and slots of the rows of later stages
        self._lines = [np.zeros(0, np.int64)] * lanes  # slots

    @property
    def lanes(self) -> int:
        """How many lanes there are."""
        return self._order.lanes

    def __iter__(self) -> "Mixer":
        return self

    def __next__(self) -> tuple[list[Fill], np.ndarray]:
        """The passes to run before a step, and the slots [lanes, share] of its rows."""
        fills: list[Fill] = []
        while min(map(len, self._lines)) < self._share:
            fills += self._advance()
        slots = np.stack([line[: self._share] for line in self._lines])
        self._lines = [line[self._share :] for line in self._lines]
        self._release(np.repeat(np.arange(len(slots)), self._share), slots.reshape(-1))
        return fills, slots

    def _advance(self) -> list[Fill]:
        """Lines one stage longer, and the passes that this takes."""
        fills = []
        for number in range(self._run, self._order.passes(self._stage).stop):
            window = self._order.window(number)
            kept = window.stage >= self._first
            slot = np.full(len(kept), -1)
            slot[kept] = self._hold(window.lane[kept])
            fills.append(Fill(window, slot))
            by_stage = np.argsort(window.stage, kind="stable")  # each stage's rows keep their lanes ascending
            for some in np.split(by_stage, np.flatnonzero(np.diff(window.stage[by_stage])) + 1):
                if len(some) and (stage := int(window.stage[some[0]])) >= self._first:
                    self._waiting.setdefault(stage, []).append((window.lane[some], slot[some]))
        self._run = self._order.passes(self._stage).stop
        parts = self._waiting.pop(self._stage, None)
        if parts:
            lane, slot = (np.concatenate(part) for part in zip(*parts, strict=True))
            ends = np.cumsum(np.bincount(lane, minlength=len(self._lines)))
            lines = np.split(slot[self._order.shuffled(self._stage, lane)], ends[:-1])
            for i, line in enumerate(lines):
                skipped = min(int(self._skip[i]), len(line))
                if skipped:
                    self._skip[i] -= skipped
                    self._release(np.full(skipped, i), line[:skipped])
                self._lines[i] = np.concatenate([self._lines[i], line[skipped:]])
        self._stage += 1
        return fills

    def _hold(self, lane: np.ndarray) -> np.ndarray:
        """A free slot for each of some rows, given their lanes in ascending order; the buffer has to grow where there are too few."""
        need = np.bincount(lane, minlength=len(self._left))
        if (short := int((need - self._left).max())) > 0:
            short = max(short, self.capacity // 8)  # seldom, because programs are compiled for a size
            # free slots stand first in each lane: new ones after them, taken ones are not looked at
            grown = np.zeros((len(self._free), self.capacity + short), self._free.dtype)
            for i, left in enumerate(self._left):
                grown[i, : left + short] = np.concatenate([self._free[i, :left], np.arange(self.capacity, self.capacity + short)])
            self._free, self._left, self.capacity = grown, self._left + short, self.capacity + short
        rank = np.arange(len(lane)) - (np.cumsum(need) - need)[lane]
        self._left = self._left - need
        return self._free[lane, self._left[lane] + rank]

    def _release(self, lane: np.ndarray, slot: np.ndarray) -> None:
        """Gives slots back, given their lanes in ascending order."""
        freed = np.bincount(lane, minlength=len(self._left))
        rank = np.arange(len(lane)) - (np.cumsum(freed) - freed)[lane]
        self._free[lane, self._left[lane] + rank] = slot
        self._left = self._left + freed
