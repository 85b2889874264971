"""Several writers of one store: no two write one key, and nothing says afterwards how many there were."""

import hashlib
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from dlmscope_jax.activations import ActivationStore, manifest
from dlmscope_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = {"number": np.int64, "is_masked": np.bool_}


def create(url, shards=7, **arguments):
    arguments = {"dtype": "float32", "shard_rows": 8, "chunk_rows": 4} | arguments
    return ActivationStore.create(url, {"h": 3}, {"who": "test"}, columns=COLUMNS, shards=shards, **arguments)


def shard(index, n=8):
    ids = np.arange(8 * index, 8 * index + n)
    return {"h": np.stack([ids, -ids, 0 * ids], 1).astype(np.float32), "number": ids, "is_masked": ids % 3 == 1}


def write(store, indices, last=6):
    for index in indices:
        store.write_shard(index, shard(index, 5 if index == last else 8))
    store.flush()


def contents(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file() and not path.name.endswith("__lock")
    }


def alone(url):
    store = create(url)
    write(store, range(7))
    return store.finish()


def test_two_writers_make_the_store_that_one_makes(tmp_path):
    whole = contents(alone(tmp_path / "one").url)
    first = create(tmp_path / "two")
    second = ActivationStore.open(tmp_path / "two", allow_incomplete=True, writer=1)
    write(second, [6, 3, 1])
    write(first, [0, 5])
    assert (tmp_path / "two/manifest-00001.jsonl").exists()
    reading = ActivationStore.open(tmp_path / "two", allow_incomplete=True)
    assert [s.shard for s in reading.shards] == [0, 1, 3, 5, 6] and reading.rows == 37
    np.testing.assert_array_equal(reading.column("number")[:16], np.arange(16))
    with pytest.raises(UserError, match="writer 1 of .* cannot finish it"):
        second.finish()
    with pytest.raises(UserError, match="2 of 7 shards are not written, the first is 2"):
        first.finish()
    write(second, [2])
    write(first, [4])
    first.finish()
    assert contents(tmp_path / "two") == whole
    assert not second.complete and second.rows < 53
    second.refresh()
    assert second.complete and second.rows == 53 and second.verify() == ()
    with pytest.raises(UserError, match="is finished"):
        second.write_shard(0, shard(0))


def test_a_later_run_may_have_another_number_of_writers(tmp_path):
    whole = contents(alone(tmp_path / "one").url)
    first = create(tmp_path / "s")
    for i in (1, 2, 3):
        write(ActivationStore.open(tmp_path / "s", allow_incomplete=True, writer=i), [i])
    write(first, [0])
    del first
    first = ActivationStore.open(tmp_path / "s", allow_incomplete=True)
    second = ActivationStore.open(tmp_path / "s", allow_incomplete=True, writer=1)
    done = {s.shard for s in second.shards}
    assert done == {0, 1, 2, 3} and second.rows == first.rows == 32
    write(second, [5])
    write(first, [4, 6])
    # what a writer has of its own is not only what it wrote itself: part 1 still lists shard 1
    assert set(manifest.read_parts(second._kv, "s")["manifest-00001.jsonl"]) == {1, 5}
    first.finish()
    assert contents(tmp_path / "s") == whole


def test_real_processes_write_at_one_time(tmp_path):
    """Arrays that nobody has made yet are created by whoever comes first; rows and manifest are those of one writer."""
    whole = contents(alone(tmp_path / "one").url)
    create(tmp_path / "s")
    for path in (tmp_path / "s").rglob("zarr.json"):
        path.unlink()
    script = textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_writers import ActivationStore, write
        me = int(sys.argv[1])
        write(ActivationStore.open({str(tmp_path / "s")!r}, allow_incomplete=True, writer=me), range(me, 7, 3))
    """)
    running = [subprocess.Popen([sys.executable, "-c", script, str(i)], cwd=ROOT, stderr=subprocess.PIPE, text=True) for i in range(3)]
    for one in running:
        _, error = one.communicate(timeout=120)
        assert one.returncode == 0, error
    ActivationStore.open(tmp_path / "s", allow_incomplete=True).finish()
    assert contents(tmp_path / "s") == whole


def test_killed_while_finishing(tmp_path, monkeypatch):
    """Between gathering the manifest's parts, removing the others, and COMPLETE, the store is whole for whoever opens it."""
    whole = contents(alone(tmp_path / "one").url)
    first = create(tmp_path / "s")
    write(ActivationStore.open(tmp_path / "s", allow_incomplete=True, writer=1), [0, 1, 2])
    write(first, [3, 4, 5, 6])
    monkeypatch.setattr(manifest, "mark_complete", lambda *_: 1 / 0)
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "gather", lambda kv, shards, shown: (manifest.write_shards(kv, shards, shown), 1 / 0))
        with pytest.raises(ZeroDivisionError):
            first.finish()
    assert ActivationStore.open(tmp_path / "s", allow_incomplete=True).rows == 53
    assert (tmp_path / "s/manifest-00001.jsonl").exists()
    with pytest.raises(ZeroDivisionError):
        ActivationStore.open(tmp_path / "s", allow_incomplete=True).finish()
    assert not (tmp_path / "s/manifest-00001.jsonl").exists()
    monkeypatch.undo()
    ActivationStore.open(tmp_path / "s", allow_incomplete=True).finish()
    assert contents(tmp_path / "s") == whole


def test_what_several_writers_may_not_do(tmp_path):
    bare = ActivationStore.create(tmp_path / "bare", {"h": 3})
    with pytest.raises(UserError, match="made for one writer: several need create"):
        ActivationStore.open(tmp_path / "bare", allow_incomplete=True, writer=1)
    assert not bare.shards
    store = create(tmp_path / "s")
    with pytest.raises(UserError, match="made for 7 shards: there is no shard 7"):
        write(store, [7])
    with pytest.raises(UserError, match="would have 9 rows: there is room for 8"):
        store.write_shard(0, {key: np.concatenate([values, values[:1]]) for key, values in shard(0).items()})
        store.flush()
    other = create(tmp_path / "other")
    other.write_shard(1, {**shard(1), "number": np.arange(8)})
    other.flush()
    write(store, [1])
    (tmp_path / "s/manifest-00001.jsonl").write_bytes((tmp_path / "other/manifest.jsonl").read_bytes())
    with pytest.raises(UserError, match="shard 1 was committed twice with different rows"):
        ActivationStore.open(tmp_path / "s", allow_incomplete=True)


def test_forgetting_a_shard_of_another_writer(tmp_path):
    whole = contents(alone(tmp_path / "one").url)
    first = create(tmp_path / "s")
    write(ActivationStore.open(tmp_path / "s", allow_incomplete=True, writer=1), range(0, 7, 2))
    write(first, range(1, 7, 2))
    first.refresh()
    first.forget([2, 3])
    again = ActivationStore.open(tmp_path / "s", allow_incomplete=True)
    assert [s.shard for s in first.shards] == [s.shard for s in again.shards] == [0, 1, 4, 5, 6]
    write(again, [2, 3])
    again.finish()
    assert contents(tmp_path / "s") == whole
    # and one of a finished store, whose arrays were cut to their rows
    again.forget([6])
    second = ActivationStore.open(tmp_path / "s", allow_incomplete=True, writer=1)
    write(second, [6])
    ActivationStore.open(tmp_path / "s", allow_incomplete=True).finish()
    assert contents(tmp_path / "s") == whole


def test_refresh_notices_another_store(tmp_path):
    store = create(tmp_path / "s")
    (tmp_path / "s/store.json").unlink()
    with pytest.raises(UserError, match="deleted or replaced"):
        store.refresh()
    create(tmp_path / "s", shards=8)
    with pytest.raises(UserError, match="deleted or replaced"):
        store.refresh()


def test_an_older_store_is_read_and_continued(tmp_path):
    """Format 1 had no marks, one writer, and one digest in COMPLETE."""
    store = alone(tmp_path / "s")
    header = (tmp_path / "s/store.json").read_text().replace('"version": 2', '"version": 1').replace(',\n "shards": 7', "")
    assert '"shards"' not in header
    (tmp_path / "s/store.json").write_text(header)
    old = {i: manifest.Shard(s.shard, s.rows, s.digest) for i, s in enumerate(store.shards)}
    manifest.write_shards(store._kv, old, "s")
    assert set((tmp_path / "s/manifest.jsonl").read_text().splitlines()[0].split('"')) >= {"shard", "rows", "digest"}
    assert "marks" not in (tmp_path / "s/manifest.jsonl").read_text()
    parts = [hashlib.sha256((tmp_path / "s" / name).read_bytes()).digest() for name in ("store.json", "manifest.jsonl")]
    (tmp_path / "s/COMPLETE").write_text(hashlib.sha256(b"\0".join(parts)).hexdigest() + "\n")
    found = ActivationStore.open(tmp_path / "s")
    assert found.complete and found.verify() == () and found.rows == 53
    np.testing.assert_array_equal(found.column("number"), np.arange(53))
    found.forget([3])
    found.write_shard(3, shard(3))
    found.flush()
    assert ActivationStore.open(tmp_path / "s", allow_incomplete=True).finish().verify() == ()
    (tmp_path / "s/manifest.jsonl").write_text("")
    with pytest.raises(UserError, match="manifest.jsonl changed after"):
        ActivationStore.open(tmp_path / "s")
