"""Training while harvesting: batches that depend on what the store will hold, never on when it was written."""

import threading
import time
from itertools import islice

import numpy as np
import pytest

from dlmscope_jax.activations import ActivationStore, following
from dlmscope_jax.errors import UserError

COLUMNS = {"number": np.int64, "is_masked": np.bool_}
SIZES = [32, 32, 7, 32, 0, 32, 32, 32, 32, 32, 32, 13]
STARTS = np.concatenate([[0], np.cumsum(SIZES)])
READ = dict(batch_size=8, seed=3, buffer_rows=70, follow=True)  # windows of 64 rows


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(following, "POLL", 0.005)


def shard(index):
    ids = np.arange(STARTS[index], STARTS[index + 1])
    return {"h": np.stack([ids, -ids], 1).astype(np.float32), "number": ids, "is_masked": ids % 3 == 1}


def create(url):
    return ActivationStore.create(url, {"h": 2}, dtype="float32", shard_rows=32, chunk_rows=4, columns=COLUMNS, shards=len(SIZES))


def write(store, indices):
    for index in indices:
        store.write_shard(index, shard(index))
    store.flush()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    store = create(tmp_path_factory.mktemp("finished") / "s")
    write(store, range(len(SIZES)))
    return store.finish()


def numbers(batches):
    return [batch["number"].tolist() for batch in batches]


@pytest.mark.parametrize("select", ["all", "masked", "visible"])
def test_every_selected_row_once_within_its_window(finished, select):
    batches = finished.batches(**READ, select=select, epochs=1)
    found = list(batches)
    wanted = [i for i in range(STARTS[-1]) if select == "all" or (i % 3 == 1) == (select == "masked")]
    assert batches.rows == len(wanted) and batches.steps_per_epoch == len(found) == len(wanted) // 8
    order = [i for batch in numbers(found) for i in batch]
    assert len(set(order)) == len(order)
    for start in range(0, len(wanted) // 64 * 64, 64):
        assert set(order[start : start + 64]) == set(wanted[start : start + 64])
        assert order[start : start + 64] != sorted(order[start : start + 64])
    assert set(order) <= set(wanted)
    for batch in found:
        np.testing.assert_array_equal(batch["h"], np.stack([batch["number"], -batch["number"]], 1))
        np.testing.assert_array_equal(batch["is_masked"], batch["number"] % 3 == 1)


def test_windows_have_orders_of_their_own(tmp_path):
    store = ActivationStore.create(tmp_path / "s", {"h": 1}, dtype="float32", shard_rows=32, chunk_rows=4)
    store.append({"h": np.zeros((192, 1))}, {"number": np.arange(192)})
    order = np.concatenate([batch["number"] for batch in store.finish().batches(**READ, epochs=1)]).reshape(3, 64)
    within = order - 64 * np.arange(3)[:, None]
    assert (np.sort(within, axis=1) == np.arange(64)).all()
    assert (within[0] != within[1]).any() and (within[1] != within[2]).any()


def test_later_epochs_are_those_of_any_other_reading(finished):
    steps = int(STARTS[-1]) // 8
    found = numbers(islice(finished.batches(**READ), 2 * steps + 3))
    plain = numbers(islice(finished.batches(8, 3, buffer_rows=70), 2 * steps + 3))
    assert found[steps:] == plain[steps:] and found[:steps] != plain[:steps]


def test_resumes_at_any_step_and_for_any_process(finished):
    steps = int(STARTS[-1]) // 8
    whole = numbers(finished.batches(**READ, epochs=2))
    assert len(whole) == 2 * steps
    for start in (1, 7, 8, 9, steps - 1, steps, steps + 5, 2 * steps):
        assert numbers(finished.batches(**READ, start_step=start, epochs=2)) == whole[start:]
    parts = [numbers(finished.batches(**READ, epochs=2, process=(i, 4))) for i in range(4)]
    assert [sum(part, []) for part in zip(*parts, strict=True)] == whole
    assert numbers(finished.batches(**(READ | {"seed": 4}), epochs=2)) != whole


@pytest.mark.parametrize("select", ["all", "masked"])
def test_a_growing_store_gives_the_batches_of_the_finished_one(finished, tmp_path, select):
    """Three writers in an order of their own, with pauses; the reader begins before the first shard and resumes in the middle."""
    arguments = READ | {"select": select, "epochs": 2}
    whole = numbers(finished.batches(**arguments))
    first = create(tmp_path / "s")

    def write_all():
        for index in (3, 0, 1, 2, 6, 5, 4, 8, 9, 7, 11, 10):
            time.sleep(0.01 * (index % 3))
            write(ActivationStore.open(tmp_path / "s", allow_incomplete=True, writer=index % 3) if index % 3 else first, [index])
        first.finish()

    reading = ActivationStore.open(tmp_path / "s", allow_incomplete=True)
    batches = reading.batches(**arguments, patience=60)
    assert batches.rows > 1 << 40
    thread = threading.Thread(target=write_all)
    thread.start()
    part = [next(batches)["number"].tolist() for _ in range(5)]
    batches.close()
    rest = numbers(ActivationStore.open(tmp_path / "s", allow_incomplete=True).batches(**arguments, start_step=5, patience=60))
    thread.join()
    assert part + rest == whole
    assert ActivationStore.open(tmp_path / "s").identity == reading.identity
    assert {p.name for p in (tmp_path / "s").iterdir()} == {"COMPLETE", "columns", "manifest.jsonl", "sites", "store.json"}


def test_nothing_comes_before_its_window_is_whole(tmp_path):
    store = create(tmp_path / "s")
    write(store, [0, 2, 3])  # 1 is missing: rows 0 to 31
    batches = ActivationStore.open(tmp_path / "s", allow_incomplete=True).batches(**READ, patience=60)
    time.sleep(0.2)
    assert batches._ready.empty()
    write(store, [1])
    assert len(numbers(islice(batches, 8))) == 8
    time.sleep(0.1)
    assert batches._ready.empty()
    batches.close()


def test_a_writer_that_is_gone(tmp_path):
    store = create(tmp_path / "s")
    write(store, [0, 1, 2])
    batches = ActivationStore.open(tmp_path / "s", allow_incomplete=True).batches(**READ, patience=0.1)
    assert len(numbers(islice(batches, 8))) == 8
    with pytest.raises(UserError, match=r"no shard was committed to .* for 0.1 s \(71 rows are there\): its writer seems to have stopped"):
        next(batches)


def test_damage_and_changes_reach_the_consumer(tmp_path):
    store = create(tmp_path / "s")
    write(store, [0, 1, 2, 3])
    path = tmp_path / "s/sites/h/c/1/0"
    sound = path.read_bytes()
    path.write_bytes(sound[:40] + bytes([sound[40] ^ 1]) + sound[41:])
    with pytest.raises(UserError, match="shard 1 of h"):
        list(ActivationStore.open(tmp_path / "s", allow_incomplete=True).batches(**READ, patience=0.1))
    path.write_bytes(sound)
    batches = ActivationStore.open(tmp_path / "s", allow_incomplete=True).batches(**READ, patience=60)
    numbers(islice(batches, 8))
    store.forget([0])
    with pytest.raises(UserError, match="shards that were read already are not there any more"):
        next(batches)
    (tmp_path / "s/manifest.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="manifest.jsonl is damaged"):
        ActivationStore.open(tmp_path / "s", allow_incomplete=True)


def test_a_store_that_ends_too_small(tmp_path):
    store = ActivationStore.create(tmp_path / "s", {"h": 2}, dtype="float32")
    reading = ActivationStore.open(tmp_path / "s", allow_incomplete=True)
    batches = reading.batches(8, 0, columns=(), follow=True, patience=60)
    store.append({"h": np.zeros((7, 2))}, {"number": np.arange(7)})
    store.finish()
    with pytest.raises(UserError, match="has 7 rows to select as 'all': fewer than one batch of 8"):
        next(batches)


def test_waiting_ends_with_the_iterator(tmp_path):
    create(tmp_path / "s")
    batches = ActivationStore.open(tmp_path / "s", allow_incomplete=True).batches(**READ)
    batches.close()
    assert not [t for t in threading.enumerate() if t.name == "activation-reader" and t.is_alive()] and list(batches) == []
