"""Every selected row exactly once an epoch, from (seed, step) alone, mixed over the whole store."""

import gc
import math
import threading
import time
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlmscope_jax.activations import ActivationStore, reader
from dlmscope_jax.activations.loader import LANES, Loader, Loaders
from dlmscope_jax.activations.plan import Plan
from dlmscope_jax.errors import UserError


def store_of(n, url, chunk=8, shard=32, document=7):
    """A store whose site and column both say the row's number (exactly, in float32)."""
    store = ActivationStore.create(url, {"h": 2, "g": 1}, dtype="float32", shard_rows=shard, chunk_rows=chunk)
    ids = np.arange(n)
    columns = {"number": ids, "document": ids // document, "is_masked": ids % 3 == 1, "predicts_masked": ids % 3 == 0}
    store.append({"h": np.stack([ids, -ids], 1).astype(np.float32), "g": ids[:, None].astype(np.float32)}, columns)
    return store.finish()


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return store_of(1003, tmp_path_factory.mktemp("reader") / "s")


def numbers(batches):
    return [batch["number"].tolist() for batch in batches]


def loader_of(shard_rows_each, chunk, selected, batch_size, seed, buffer_rows, lanes=None):
    """A loader over shards in memory: row numbers as the only site."""
    table, first = [], 0
    starts = np.concatenate([[0], np.cumsum(shard_rows_each)])
    for shard, n in enumerate(shard_rows_each):
        for start in range(0, n, chunk):
            table.append((shard, start, min(start + chunk, n), first + start))
        first += n
    table = np.array(table)
    mask = np.ones(first, bool) if selected is None else selected
    counts = np.array([mask[f : f + b - a].sum() for _, a, b, f in table])
    n_lanes = math.gcd(LANES, batch_size)
    plan = Plan(counts, batch_size, seed, max(1, buffer_rows // (n_lanes * chunk)), n_lanes)
    read = lambda site, places: [np.arange(starts[s] + a, starts[s] + b, dtype=np.float32)[:, None] for s, a, b in places]  # noqa: E731
    return Loader(plan, table, selected, read, {"h": (1, np.dtype(np.float32))}, {"number": np.arange(first)}, lanes or range(n_lanes))


@settings(max_examples=150, deadline=None)
@given(
    shards=st.lists(st.integers(0, 90), min_size=1, max_size=6).filter(lambda s: sum(s) > 0),
    chunk=st.integers(1, 20),
    batch_size=st.integers(1, 64),
    buffer_rows=st.integers(1, 400),
    seed=st.integers(0, 5),
    share=st.one_of(st.none(), st.floats(0.05, 1)),
    data=st.data(),
)
def test_every_selected_row_exactly_once_an_epoch(shards, chunk, batch_size, buffer_rows, seed, share, data):
    n = sum(shards)
    selected = None if share is None else np.random.default_rng(9).random(n) < share
    total = n if selected is None else int(selected.sum())
    make = lambda: loader_of(shards, chunk, selected, batch_size, seed, buffer_rows)  # noqa: E731
    steps = total // batch_size
    if not steps:
        return
    loader = make()
    assert loader.plan.steps_per_epoch == steps
    seen = []
    for epoch in range(2):
        one = []
        at = 0
        while at < steps:  # any way of cutting an epoch into runs of steps gives the same batches
            count = data.draw(st.integers(1, steps - at))
            one += loader.batches(epoch * steps + at, count)
            at += count
        for batch in one:
            np.testing.assert_array_equal(batch["h"][:, 0], batch["number"])
            assert len(batch["number"]) == batch_size
        rows = np.concatenate([b["number"] for b in one])
        assert len(set(rows)) == len(rows) == steps * batch_size > total - batch_size
        if selected is not None:
            assert selected[rows].all()
        seen.append([b["number"] for b in one])
    start = data.draw(st.integers(0, 2 * steps - 1))
    (there,) = make().batches(start, 1)
    np.testing.assert_array_equal(there["number"], seen[start // steps][start % steps])


@settings(max_examples=30, deadline=None)
@given(processes=st.sampled_from([1, 2, 4, 8]), seed=st.integers(0, 3), step=st.integers(0, 30))
def test_processes_share_the_same_batches(processes, seed, step):
    arguments = ([100, 61, 100], 9, np.arange(261) % 4 > 0, 24, seed, 96)
    (whole,) = loader_of(*arguments).batches(step, 1)
    width = 8 // processes
    parts = [loader_of(*arguments, lanes=range(i * width, (i + 1) * width)).batches(step, 1)[0] for i in range(processes)]
    for key in whole:
        np.testing.assert_array_equal(np.concatenate([p[key] for p in parts]), whole[key])


@pytest.mark.parametrize("select", ["all", "masked", "visible", "predicting"])
def test_selection(store, select):
    wanted = {"all": lambda i: i >= 0, "masked": lambda i: i % 3 == 1, "visible": lambda i: i % 3 != 1, "predicting": lambda i: i % 3 == 0}
    expected = {i for i in range(1003) if wanted[select](np.array(i))}
    batches = store.batches(1, 3, select=select, epochs=1)
    assert batches.rows == batches.steps_per_epoch == len(expected)
    found = list(batches)
    assert {int(b["number"][0]) for b in found} == expected and len(found) == len(expected)
    for batch in found:
        assert batch["h"].tolist() == [[batch["number"][0], -batch["number"][0]]]
        assert batch["g"].tolist() == [[batch["number"][0]]]
        assert batch["is_masked"].tolist() == [bool(batch["number"][0] % 3 == 1)]


def test_start_step_epochs_and_seeds(store):
    steps = 1003 // 32
    whole = numbers(store.batches(32, 5, epochs=3, buffer_rows=256))
    assert len(whole) == 3 * steps
    for start in (1, 7, steps - 1, steps, steps + 3, 3 * steps - 1, 3 * steps):
        iterator = store.batches(32, 5, start_step=start, epochs=3, buffer_rows=256)
        assert iterator.step == start
        assert numbers(iterator) == whole[start:]
        assert iterator.step == 3 * steps
    assert numbers(islice(store.batches(32, 5, buffer_rows=256), 3 * steps + 2))[: 3 * steps] == whole
    orders = [[i for b in whole[e * steps : (e + 1) * steps] for i in b] for e in range(3)]
    assert orders[0] != orders[1] != orders[2]
    assert numbers(store.batches(32, 6, epochs=1, buffer_rows=256)) != whole[:steps]
    dropped = [set(range(1003)) - set(order) for order in orders]
    assert all(len(d) == 1003 % 32 for d in dropped) and dropped[0] != dropped[1]


def test_sites_columns_and_processes(store):
    (batch,) = islice(store.batches(16, 0, sites=["g"], columns=["document"]), 1)
    assert set(batch) == {"g", "document"} and batch["g"].shape == (16, 1)
    np.testing.assert_array_equal(batch["g"][:, 0] // 7, batch["document"])
    (plain,) = islice(store.batches(16, 0, columns=()), 1)
    assert set(plain) == {"h", "g"}
    halves = [next(store.batches(16, 0, process=(i, 2)))["number"] for i in range(2)]
    np.testing.assert_array_equal(np.concatenate(halves), next(store.batches(16, 0))["number"])


def test_the_shuffle_mixes_the_whole_store():
    """Against a uniformly random order: pairs that were neighbours are far apart, and a batch holds rows from everywhere."""
    n, chunk, batch_size = 40_000, 16, 256
    loader = loader_of([8000] * 5, chunk, None, batch_size, 0, 8192)
    steps = loader.plan.steps_per_epoch
    order = np.concatenate([b["number"] for b in loader.batches(0, steps)])
    place = np.full(n, -1)
    place[order] = np.arange(len(order))
    for batch in order.reshape(steps, batch_size)[:: steps // 10]:
        tenths = np.bincount(batch * 10 // n, minlength=10)
        assert tenths.min() > 8, tenths  # 25.6 expected
        assert len(np.unique(batch // chunk)) > 0.8 * batch_size
    # the rows of one document (16 consecutive chunks) are spread over the epoch as uniform places would be
    spread = []
    for document in range(0, n, 256):
        rows = place[document : document + 256]
        spread.append(np.std(rows[rows >= 0]) / (n / math.sqrt(12)))
    assert 0.9 < np.mean(spread) < 1.1 and min(spread) > 0.5
    # and nothing of the stored order is left in the order of a batch's rows
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.1


def test_lanes_do_not_load_at_the_same_time():
    """After the start, the most that one step reads stays a fraction of the buffer."""
    loader = loader_of([16384] * 2, 16, None, 256, 0, 16384)
    reads = []
    inner = loader.read
    loader.read = lambda site, places: reads.append(len(places)) or inner(site, places)
    loader.batches(0, 1)
    start = sum(reads)
    most = 0
    for step in range(1, loader.plan.steps_per_epoch):
        reads.clear()
        loader.batches(step, 1)
        most = max(most, sum(reads))
    assert most < start / 2


def test_small_stores_and_wrong_arguments(store, tmp_path):
    for arguments, message in (
        (dict(batch_size=1004, seed=0), "1003 rows to select as 'all': fewer than one batch of 1004"),
        (dict(batch_size=500, seed=0, select="masked"), "334 rows to select as 'masked'"),
        (dict(batch_size=0, seed=0), "batch_size is 0"),
        (dict(batch_size=8, seed=-1), "seed is -1"),
        (dict(batch_size=8, seed=0, start_step=-2), "start_step is -2"),
        (dict(batch_size=8, seed=0, select="most"), "select 'most' is not known: use one of all, masked, visible, predicting"),
        (dict(batch_size=8, seed=0, sites=["x"]), "no site 'x': it has h, g"),
        (dict(batch_size=8, seed=0, columns=["x"]), "no column 'x'"),
        (dict(batch_size=8, seed=0, process=(0, 3)), "use a count that divides 8"),
    ):
        with pytest.raises(UserError, match=message):
            store.batches(**arguments)
    bare = ActivationStore.create(tmp_path / "bare", {"h": 2})
    bare.append({"h": np.zeros((4, 2))})
    bare.finish()
    assert next(bare.batches(4, 0))["h"].shape == (4, 2)
    with pytest.raises(UserError, match="select 'masked' needs the column 'is_masked'"):
        bare.batches(2, 0, select="masked")


def test_what_is_committed_can_be_read_while_the_rest_is_written(tmp_path):
    store = ActivationStore.create(tmp_path / "s", {"h": 1}, dtype="float32", shard_rows=8, chunk_rows=4)
    store.append({"h": np.arange(20.0)[:, None]}, {"number": np.arange(20)})
    store.flush()
    reading = ActivationStore.open(tmp_path / "s", allow_incomplete=True)
    assert sorted(i for b in numbers(reading.batches(4, 0, epochs=1)) for i in b) == list(range(16))


def test_damage_reaches_the_consumer(tmp_path):
    store = store_of(200, tmp_path / "s")
    path = tmp_path / "s/sites/h/c/3/0"
    raw = bytearray(path.read_bytes())
    raw[5] ^= 1
    path.write_bytes(raw)
    iterator = store.batches(8, 0)
    with pytest.raises(UserError, match="shard 3 of h"):
        list(islice(iterator, 50))
    with pytest.raises(StopIteration):
        next(iterator)


def readers():
    return [t for t in threading.enumerate() if t.name == "activation-reader"]


def test_the_thread_ends_with_its_iterator(store):
    assert_ends = lambda: any(not readers() or time.sleep(0.02) for _ in range(500))  # noqa: E731
    gc.collect()
    assert assert_ends()
    iterator = store.batches(8, 0)
    next(iterator)
    iterator.close()
    assert assert_ends() and list(iterator) == []
    iterator = store.batches(8, 0)
    next(iterator)
    del iterator
    gc.collect()
    assert assert_ends()


def test_reading_is_ahead_and_bounded(store, monkeypatch):
    made = []
    inner = Loaders.batches
    monkeypatch.setattr(Loaders, "batches", lambda self, step, count: made.append(count) or inner(self, step, count))
    iterator = store.batches(8, 0)
    next(iterator)
    before = -1
    while sum(made) != before:  # until the thread waits for room
        before = sum(made)
        time.sleep(0.3)
    assert reader.AHEAD < sum(made) <= 3 * reader.AHEAD
    iterator.close()
