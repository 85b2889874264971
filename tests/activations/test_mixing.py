"""The order of a stream: every row once an epoch, the same from wherever it is begun, well mixed, in as little memory as it says."""

from itertools import islice

import numpy as np
import pytest

from dlmscope_jax.activations.mixing import Mixer, Order

BLOCKS, LENGTH, PASS, LANES = 37, 8, 8, 4


class Rows:
    """Which rows of each epoch are selected: all, or each with its block's own probability."""

    def __init__(self, all_of_them=False, blocks=BLOCKS, length=LENGTH):
        self.all, self.shape = all_of_them, (blocks, length)

    def of(self, epoch):
        random = np.random.default_rng([7, epoch])
        return np.ones(self.shape, bool) if self.all else random.random(self.shape) < random.random((self.shape[0], 1))

    def order(self, span=5, seed=0, per_pass=PASS, lanes=LANES):
        selected = lambda epoch, blocks: np.append(self.of(epoch), np.zeros((1, self.shape[1]), bool), axis=0)[blocks]  # noqa: E731
        return Order(lambda epoch: self.of(epoch).sum(axis=1), selected, self.shape[1], per_pass, lanes, span, seed)


def walk(order, share, start, steps, capacity=None):
    """The batches of some steps as rows ``(epoch, block, position)`` [lanes, share], from what ``Mixer`` says of the buffer."""
    mixer = Mixer(order, share, start, order.capacity(share, 120) if capacity is None else capacity)
    there, batches, ran = {}, [], []
    for fills, slots in islice(mixer, steps):
        for fill in fills:
            ran.append(len(batches))
            window = fill.window
            for lane, slot, row in zip(window.lane, fill.slot, window.row, strict=True):
                if slot >= 0:
                    # nobody waits there; where earlier steps took rows, these come once more and are written over
                    assert slot < mixer.capacity and (start or (lane, slot) not in there)
                    slot_of_pass, position = divmod(int(row), order.length)
                    there[lane, slot] = (window.epoch, int(window.blocks[slot_of_pass]), position)
        batches.append([[there.pop((lane, slot)) for slot in slots[lane]] for lane in range(order.lanes)])
    return np.array(batches), ran, mixer, there


@pytest.mark.parametrize("all_of_them", [True, False])
@pytest.mark.parametrize("span", [1, 2, 5, 8])
def test_every_row_once_an_epoch(all_of_them, span):
    rows = Rows(all_of_them)
    batches, ran, mixer, there = walk(rows.order(span), 3, 0, 110)
    seen = batches.reshape(-1, 3)
    assert len(np.unique(seen, axis=0)) == len(seen)
    last = int(seen[:, 0].max())
    assert last >= 2
    waiting = {row for row in there.values()}
    for epoch in range(last):
        taken = {tuple(row) for row in seen[seen[:, 0] == epoch].tolist()} | {row for row in waiting if row[0] == epoch}
        assert taken == {(epoch, block, position) for block, position in np.argwhere(rows.of(epoch)).tolist()}
    assert not any(row[0] == 0 for row in waiting)
    # no pass before it is needed, and none together but at the start
    assert ran.count(0) == (span + 1) // 2 and max(map(ran.count, set(ran) - {0})) <= 2


@pytest.mark.parametrize("all_of_them", [True, False])
def test_a_step_is_the_same_from_wherever_it_is_begun(all_of_them):
    whole, *_ = walk(Rows(all_of_them).order(), 3, 0, 70)
    for start in (1, 2, 33, 69, int(np.random.default_rng().integers(3, 69))):
        batches, ran, mixer, _ = walk(Rows(all_of_them).order(), 3, start, 70 - start)
        np.testing.assert_array_equal(batches, whole[start:], err_msg=str(start))
        assert ran.count(0) <= 5 + 1  # the passes that were in the buffer
    other, *_ = walk(Rows(all_of_them).order(seed=1), 3, 0, 70)
    assert (other != whole).any(axis=3).mean() > 0.9


def test_the_buffer_is_as_large_as_the_order_says():
    for all_of_them, span in ((True, 5), (False, 5), (False, 9)):
        order = Rows(all_of_them).order(span)
        capacity = order.capacity(3, 120)
        *_, mixer, _ = walk(order, 3, 0, 100, capacity)
        assert mixer.capacity == capacity
        *_, mixer, _ = walk(Rows(all_of_them).order(span), 3, 41, 60, capacity)
        assert mixer.capacity == capacity
    # rows of all passes in the buffer, of which half have left: one pass more than that would hold them at once
    order = Rows(True, 64).order(7, lanes=8)
    assert order.capacity(4, 40) <= (7 + 1) / 2 * LENGTH + 4


def test_a_buffer_that_is_too_small_grows_and_changes_nothing():
    whole, *_ = walk(Rows().order(), 3, 0, 60)
    grown, _, mixer, _ = walk(Rows().order(), 3, 0, 60, 3)
    np.testing.assert_array_equal(grown, whole)
    assert mixer.capacity > 3


def test_lanes_have_equally_much():
    order = Rows(blocks=400).order(lanes=8)
    order.gone(0)
    assert np.ptp(order._come, axis=1).max() <= LENGTH
    assert order._sizes.sum() == Rows(blocks=400).of(0).sum()


def test_rows_of_a_block_are_spread():
    """Rows of one block are in one batch as often as chance has it, and those of a pass leave evenly over the whole span."""
    span, share, blocks = 16, 16, 256
    order = Rows(True, blocks, 32).order(span, per_pass=8, lanes=8)
    batches, *_ = walk(order, share, 0, 400, order.capacity(share, 300))
    middle = batches[100:300]
    pairs = []
    for batch in middle:
        for lane in batch:
            _, counts = np.unique(lane[:, :2], axis=0, return_counts=True)
            pairs.append((counts * (counts - 1)).sum())
    # of 16 rows out of 16 passes with one block of 32 rows each: 15 others, of which 31 in 511 are of the same block
    expected = share * (share - 1) * 31 / (span * 32 - 1)
    # they are fewer: each stage has its share of every block
    assert np.mean(pairs) < expected
    # and neighbours in a block leave as far from each other as any two of its rows
    step = {tuple(row): i for i, batch in enumerate(batches) for row in batch.reshape(-1, 3).tolist()}
    some = [(e, b) for e, b in {(e, b) for e, b, _ in step} if all((e, b, p) in step for p in range(32))]
    steps = np.array([[step[e, b, p] for p in range(32)] for e, b in some])
    neighbours = np.abs(np.diff(steps, axis=1)).mean()
    any_two = np.abs(steps[:, :, None] - steps[:, None, :]).sum() / (len(steps) * 32 * 31)
    assert 0.95 < neighbours / any_two < 1.05
    assert 0.85 < np.ptp(steps, axis=1).mean() / (span * 32 / share) < 1.1


def test_what_is_long_past_is_forgotten():
    order = Rows().order()
    capacity = order.capacity(3, 60)
    whole = []
    mixer = Mixer(order, 3, 0, capacity)
    for step in range(5_500):
        fills, slots = next(mixer)
        if step >= 5_480:
            whole.append((slots, [fill.window.row.tobytes() for fill in fills]))
    assert order._epochs > 400 and len(order._sizes) < 1_100 and len(order._dealt) < 250
    again = walk(Rows().order(), 3, 5_480, 20)[0]
    np.testing.assert_array_equal(walk(Rows().order(), 3, 5_470, 30)[0][10:], again)
    # what was forgotten on the way does not matter: the same passes run at the same steps
    late = Mixer(Rows().order(), 3, 5_470, capacity)
    ran = [[fill.window.row.tobytes() for fill in next(late)[0]] for _ in range(30)][10:]
    assert ran == [rows for _, rows in whole]
