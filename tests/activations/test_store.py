"""What is written is what is read; what is not committed, damaged or unsuitable is refused with a reason."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlmscope_jax.activations import ActivationStore
from dlmscope_jax.activations.layout import Arrays, default_rows
from dlmscope_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
BF16 = np.dtype(ml_dtypes.bfloat16)


def rows(n, width=3, start=0):
    """Rows that carry their own number: entry 0 is n // 200, entry 1 is n % 200, both exact in bfloat16."""
    ids = np.arange(start, start + n)
    return np.stack([ids // 200, ids % 200, *[np.zeros(n)] * (width - 2)], axis=1).astype(np.float32)


def ids_of(matrix):
    wide = np.asarray(matrix).astype(np.float64)
    return (wide[:, 0] * 200 + wide[:, 1]).astype(int)


def make(url, n=50, shard_rows=16, chunk_rows=4, finish=True, **columns):
    store = ActivationStore.create(url, {"resid_post@1": 3}, {"who": "test"}, shard_rows=shard_rows, chunk_rows=chunk_rows)
    store.append({"resid_post@1": rows(n)}, {"number": np.arange(n), **columns})
    return store.finish() if finish else store


@settings(max_examples=15, deadline=None)
@given(
    parts=st.lists(st.integers(0, 37), min_size=1, max_size=5).filter(any),
    chunk=st.integers(1, 5),
    shard=st.integers(1, 4),
    dtype=st.sampled_from(["bfloat16", "float16", "float32"]),
    data=st.data(),
)
def test_appended_rows_come_back(tmp_path_factory, parts, chunk, shard, dtype, data):
    url = tmp_path_factory.mktemp("store") / "s"
    generator = np.random.default_rng(0)
    n = sum(parts)
    matrix = {"a": generator.standard_normal((n, 5)).astype(np.float32), "b": generator.standard_normal((n, 2)).astype(np.float32)}
    column = {"rate": generator.random(n), "is_masked": generator.random(n) < 0.5, "mine": generator.integers(0, 2**40, n)}
    store = ActivationStore.create(url, {"a": 5, "b": 2}, {"x": 1}, dtype=dtype, shard_rows=shard * chunk, chunk_rows=chunk)
    at = 0
    for part in parts:
        of = slice(at, at + part)
        store.append({k: v[of] for k, v in matrix.items()}, {k: v[of] for k, v in column.items()})
        at += part
    store.finish()
    found = ActivationStore.open(url)
    assert found.rows == n and found.sites == {"a": 5, "b": 2} and found.meta == {"x": 1} and found.complete
    start = data.draw(st.integers(0, n))
    stop = data.draw(st.integers(start, n))
    for site, values in matrix.items():
        expected = values.astype(found.dtype)
        assert found.read(site).dtype == expected.dtype
        np.testing.assert_array_equal(found.read(site, start, stop), expected[start:stop])
    np.testing.assert_array_equal(found.column("rate"), column["rate"].astype(np.float32))
    np.testing.assert_array_equal(found.column("is_masked"), column["is_masked"])
    np.testing.assert_array_equal(found.column("mine"), column["mine"])
    assert found.verify() == ()


def test_shards_are_whole_and_committed_as_they_fill(tmp_path):
    store = make(tmp_path / "s", n=50, finish=False)
    store.flush()
    assert store.rows == 48 and [s.rows for s in store.shards] == [16, 16, 16]
    partly = ActivationStore.open(tmp_path / "s", allow_incomplete=True)
    assert partly.rows == 48
    np.testing.assert_array_equal(ids_of(partly.read("resid_post@1")), np.arange(48))
    with pytest.raises(UserError, match=r"not finished \(48 rows .*allow_incomplete=True"):
        ActivationStore.open(tmp_path / "s")
    store.finish()
    found = ActivationStore.open(tmp_path / "s")
    assert found.rows == 50
    np.testing.assert_array_equal(ids_of(found.read("resid_post@1", 40, 50)), np.arange(40, 50))


def test_an_unfinished_store_can_be_appended_to(tmp_path):
    store = make(tmp_path / "s", n=40, finish=False)
    store.flush()
    del store  # 8 rows were never committed
    again = ActivationStore.open(tmp_path / "s", allow_incomplete=True)
    assert again.rows == 32
    again.append({"resid_post@1": rows(13, start=32)}, {"number": np.arange(32, 45)})
    again.finish()
    np.testing.assert_array_equal(ids_of(ActivationStore.open(tmp_path / "s").read("resid_post@1")), np.arange(45))
    with pytest.raises(UserError, match="is finished"):
        again.append({"resid_post@1": rows(1)}, {"number": [0]})


def test_the_layout_is_plain_zarr3(tmp_path):
    make(tmp_path / "s", n=50)
    found = json.loads((tmp_path / "s/sites/resid_post@1/zarr.json").read_text())
    assert found["data_type"] == "bfloat16" and found["shape"] == [50, 3]
    assert found["chunk_grid"]["configuration"]["chunk_shape"] == [16, 3]
    (sharding,) = found["codecs"]
    assert sharding["name"] == "sharding_indexed" and sharding["configuration"]["chunk_shape"] == [4, 3]
    assert [c["name"] for c in sharding["configuration"]["codecs"]] == ["bytes", "crc32c"]
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == ["COMPLETE", "columns", "manifest.jsonl", "sites", "store.json"]


def test_memory_and_file_urls(tmp_path):
    for url in ("memory://activations/one/", f"file://{tmp_path}/two"):
        make(url)
        assert ActivationStore.open(url).rows == 50
    assert (tmp_path / "two" / "COMPLETE").exists()
    with pytest.raises(UserError, match="cannot open 'nonsense://x'"):
        ActivationStore.open("nonsense://x")


def test_rows_of_other_frameworks(tmp_path):
    import jax.numpy as jnp

    store = ActivationStore.create(tmp_path / "s", {"h": 2})
    store.append({"h": jnp.ones((2, 2), jnp.bfloat16)})
    store.append({"h": [[0.5, 1.5]]})
    store.finish()
    np.testing.assert_array_equal(ActivationStore.open(tmp_path / "s").read("h").astype(float), [[1, 1], [1, 1], [0.5, 1.5]])


def test_the_callers_arrays_may_be_reused(tmp_path):
    store = ActivationStore.create(tmp_path / "s", {"h": 3}, dtype="float32", shard_rows=16, chunk_rows=4)
    matrix, number = rows(5), np.arange(5)
    for start in range(0, 20, 5):
        matrix[:] = rows(5, start=start)
        number[:] = np.arange(start, start + 5)
        store.append({"h": matrix}, {"number": number})
    store.finish()
    np.testing.assert_array_equal(ids_of(store.read("h")), np.arange(20))
    np.testing.assert_array_equal(store.column("number"), np.arange(20))


@pytest.mark.parametrize(
    ("values", "columns", "message"),
    [
        ({"resid_post@1": np.zeros((4, 5))}, {"number": range(4)}, r"shape \(4, 5\).*\[n, 3\]"),
        ({"resid_post@1": np.zeros(3)}, {"number": range(3)}, r"shape \(3,\)"),
        ({"resid_post@1": np.zeros((4, 3), int)}, {"number": range(4)}, "int64: activations are floats"),
        ({"resid_post@1": np.zeros((4, 3), complex)}, {"number": range(4)}, "complex128"),
        ({"resid_post@1": [[1.0, 2.0, 3.0], [1.0]]}, {"number": range(2)}, "cannot be made a NumPy array"),
        ({"resid_pre@1": np.zeros((4, 3))}, {"number": range(4)}, "got the sites resid_pre@1, .* has resid_post@1"),
        ({"resid_post@1": np.zeros((4, 3))}, {"number": range(5)}, r"column 'number' has shape \(5,\): it must be \[4\]"),
        ({"resid_post@1": np.zeros((4, 3))}, {}, "got the columns none, .* has number"),
        ({"resid_post@1": np.zeros((4, 3))}, {"number": np.zeros(4)}, "column 'number' got float64 values"),
        ({"resid_post@1": np.zeros((4, 3))}, {"number": np.zeros(4), "other": np.zeros(4)}, "number, other"),
    ],
)
def test_unsuitable_rows_are_refused_and_nothing_is_added(tmp_path, values, columns, message):
    store = make(tmp_path / "s", n=16, finish=False)
    with pytest.raises(UserError, match=message):
        store.append(values, columns)
    store.finish()
    assert ActivationStore.open(tmp_path / "s").rows == 16


def test_columns_of_the_harvest_keep_their_dtypes(tmp_path):
    store = ActivationStore.create(tmp_path / "s", {"h": 3})
    for bad, message in (
        ({"token": np.array([2**31])}, "'token' got int64 values that do not fit its dtype int32"),
        ({"is_masked": np.array([1])}, "'is_masked'"),
        ({"names": np.array(["a"])}, "columns hold"),
        ({"a/b": np.array([1])}, "column name"),
    ):
        with pytest.raises(UserError, match=message):
            store.append({"h": rows(1)}, bad)
        store = ActivationStore.create(tmp_path / f"s{next(iter(bad))[0]}", {"h": 3})
    store.append({"h": rows(1)}, {"token": np.array([7]), "rate": np.array([0.5])})
    store.finish()
    assert store.column("token").dtype == np.int32 and store.column("rate").dtype == np.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(sites={}), "at least one site"),
        (dict(sites={"h": 0}), "width 0"),
        (dict(sites={"../h": 3}), "site name"),
        (dict(sites={"h": 3}, dtype="int4"), "dtype 'int4' cannot be stored: use one of bfloat16, float16, float32, int8"),
        (dict(sites={"h": 3}, columns={"h": np.int32}), "column 'h' has the name of a site"),
        (dict(sites={"h": 3}, columns={"a/b": np.int32}), "column name"),
        (dict(sites={"h": 3}, shards=2), "with the columns named"),
        (dict(sites={"h": 3}, columns={}, shards=0), "shards is 0"),
        (dict(sites={"h": 3}, shard_rows=10, chunk_rows=4), "multiple of chunk_rows 4"),
        (dict(sites={"h": 3}, meta={"f": print}), "must be JSON"),
    ],
)
def test_create_checks_its_arguments(tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        ActivationStore.create(tmp_path / "s", **arguments)
    assert not (tmp_path / "s").exists()


def test_default_layout():
    for width, dtype in ((192, "bfloat16"), (4096, "bfloat16"), (3584, "float32"), (1, "float16"), (1 << 20, "float32")):
        shard, chunk = default_rows({"narrow": 1, "wide": width}, dtype)
        row = width * (4 if dtype == "float32" else 2)
        assert shard % chunk == 0 and chunk & (chunk - 1) == 0
        assert chunk * row <= max(row, 512 << 10) and shard * row <= max(row, 32 << 20)
        assert chunk <= 256 or chunk * row <= 64 << 10
        if row < 64 << 10:
            assert chunk * row > 32 << 10 and shard * row > 31 << 20
    assert [default_rows({"site": d}, "bfloat16")[1] for d in (192, 768, 4096)] == [256, 256, 64]


def test_missing_existing_and_empty_stores(tmp_path):
    with pytest.raises(UserError, match=f"no activation store at {tmp_path}/none: harvest one there first"):
        ActivationStore.open(tmp_path / "none")
    assert not (tmp_path / "none").exists()
    make(tmp_path / "s")
    with pytest.raises(UserError, match="already an activation store"):
        make(tmp_path / "s")
    with pytest.raises(UserError, match="has no rows"):
        ActivationStore.create(tmp_path / "empty", {"h": 3}).finish()
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="file"):
        make(tmp_path / "file")


def test_reads_outside_are_refused(tmp_path):
    store = make(tmp_path / "s")
    for start, stop in ((0, 51), (-1, 3), (5, 4)):
        with pytest.raises(UserError, match="outside of the 50 rows"):
            store.read("resid_post@1", start, stop)
    with pytest.raises(UserError, match="no site 'x': it has resid_post@1"):
        store.read("x")
    with pytest.raises(UserError, match="no column 'x': it has number"):
        store.column("x")


def flip(path, at=None):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 3 if at is None else at] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("how", ["flip", "remove", "truncate"])
def test_a_damaged_shard_is_named_and_can_be_dropped(tmp_path, how):
    store = make(tmp_path / "s", n=50)
    path = tmp_path / "s/sites/resid_post@1/c/1/0"
    if how == "flip":
        flip(path)
    elif how == "remove":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(UserError, match=r"shard 1 of resid_post@1 in .* is damaged or missing.*forget\(verify\(\)\)"):
        store.read("resid_post@1")
    np.testing.assert_array_equal(ids_of(store.read("resid_post@1", 32, 50)), np.arange(32, 50))
    assert store.verify() == (1,)
    store.forget(store.verify())
    with pytest.raises(UserError, match="not finished"):
        ActivationStore.open(tmp_path / "s")
    left = ActivationStore.open(tmp_path / "s", allow_incomplete=True)
    np.testing.assert_array_equal(ids_of(left.read("resid_post@1")), [*range(16), *range(32, 50)])
    np.testing.assert_array_equal(left.column("number"), [*range(16), *range(32, 50)])


def test_a_damaged_column_is_named(tmp_path):
    store = make(tmp_path / "s")
    flip(tmp_path / "s/columns/number/c/2")
    with pytest.raises(UserError, match="shard 2 of number"):
        store.column("number")
    assert store.verify() == (2,)


def test_a_sound_file_with_other_rows_is_noticed(tmp_path):
    """A shard of another place has valid checksums; only what the manifest says about it can tell."""
    make(tmp_path / "s", n=48)
    shutil.copy(tmp_path / "s/sites/resid_post@1/c/0/0", tmp_path / "s/sites/resid_post@1/c/1/0")
    again = ActivationStore.open(tmp_path / "s")
    with pytest.raises(UserError, match="shard 1 of resid_post@1 .*: these are rows of another place"):
        again.read_chunks("resid_post@1", [(0, 4, 8), (1, 8, 12)])
    with pytest.raises(UserError, match="shard 1 of resid_post@1"):
        list(again.batches(8, 0, epochs=1))
    assert again.verify() == (1,)


def test_leftovers_of_a_store_without_a_header_do_not_count(tmp_path):
    make(tmp_path / "s", n=48)
    (tmp_path / "s/store.json").unlink()
    (tmp_path / "s/manifest-00001.jsonl").write_bytes((tmp_path / "s/manifest.jsonl").read_bytes())
    store = ActivationStore.create(tmp_path / "s", {"resid_post@1": 3}, {"who": "test"}, shard_rows=16, chunk_rows=4)
    assert not store.rows and not ActivationStore.open(tmp_path / "s", allow_incomplete=True).rows
    store.append({"resid_post@1": rows(20)}, {"number": np.arange(20)})
    assert store.finish().rows == ActivationStore.open(tmp_path / "s").rows == 20


def test_changed_header_or_manifest_is_noticed(tmp_path):
    make(tmp_path / "s")
    manifest = tmp_path / "s/manifest.jsonl"
    whole = manifest.read_text()
    manifest.write_text("".join(whole.splitlines(keepends=True)[:2]))
    with pytest.raises(UserError, match="s: manifest.jsonl changed after the store was finished"):
        ActivationStore.open(tmp_path / "s")
    manifest.write_text(whole)
    assert ActivationStore.open(tmp_path / "s").rows == 50
    header = tmp_path / "s/store.json"
    text = header.read_text()
    header.write_text(text.replace('"test"', '"best"'))
    with pytest.raises(UserError, match="s: store.json changed after"):
        ActivationStore.open(tmp_path / "s")
    header.write_text(text[:-20])
    with pytest.raises(UserError, match="store.json is damaged"):
        ActivationStore.open(tmp_path / "s")
    header.write_text(text.replace('"version": 2', '"version": 9'))
    with pytest.raises(UserError, match="format version 9"):
        ActivationStore.open(tmp_path / "s")


def test_arrays_that_contradict_the_header_are_refused(tmp_path):
    make(tmp_path / "s")
    path = tmp_path / "s/sites/resid_post@1/zarr.json"
    path.write_text(path.read_text().replace("bfloat16", "float16"))
    with pytest.raises(UserError, match="s: sites/resid_post@1/zarr.json changed after"):
        ActivationStore.open(tmp_path / "s")
    (tmp_path / "s/COMPLETE").unlink()
    with pytest.raises(UserError, match="not what the header says"):
        ActivationStore.open(tmp_path / "s", allow_incomplete=True).read("resid_post@1")


def test_a_failed_write_does_not_count(tmp_path, monkeypatch):
    """The disk is full at the second array of the second shard."""
    store = ActivationStore.create(tmp_path / "s", {"a": 3, "b": 3}, shard_rows=16, chunk_rows=4)
    whole = Arrays._array

    def full(self, key, at_least=0):
        if key == "b" and at_least > 16:
            raise OSError(28, "No space left on device")
        return whole(self, key, at_least)

    monkeypatch.setattr(Arrays, "_array", full)
    with pytest.raises(UserError, match="cannot write shard 1 of .*No space left.*shards before it are safe"):
        store.append({"a": rows(40), "b": rows(40)})
        store.finish()
    monkeypatch.undo()
    left = ActivationStore.open(tmp_path / "s", allow_incomplete=True)
    assert left.rows == 16 and left.verify() == ()
    assert not (tmp_path / "s/sites/a/c/1/0").exists()
    left.append({"a": rows(24, start=16), "b": rows(24, start=16)})
    left.finish()
    np.testing.assert_array_equal(ids_of(ActivationStore.open(tmp_path / "s").read("b")), np.arange(40))


def test_the_system_refusing_to_write_is_one_clear_line(tmp_path):
    """A real refusal by the system: files above 24 KiB cannot be written, which the first shard is."""
    script = f"""
    import resource, numpy as np
    from dlmscope_jax.activations import ActivationStore
    from dlmscope_jax.errors import UserError
    resource.setrlimit(resource.RLIMIT_FSIZE, (24 << 10, 24 << 10))
    store = ActivationStore.create({str(tmp_path / "s")!r}, {{"h": 8}}, shard_rows=4096, chunk_rows=64)
    try:
        store.append({{"h": np.ones((5000, 8), np.float32)}})
        store.finish()
    except UserError as error:
        print(error)
    left = ActivationStore.open({str(tmp_path / "s")!r}, allow_incomplete=True)
    print(left.rows, left.verify())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT, capture_output=True, text=True, timeout=120, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr
    message, state = done.stdout.strip().splitlines()
    assert "cannot write shard 0" in message and "make room" in message
    assert state == "0 ()"


def test_a_failed_manifest_leaves_the_previous_one(tmp_path, monkeypatch):
    store = make(tmp_path / "s", n=16, finish=False)
    store.flush()
    from dlmscope_jax.activations import manifest

    write = manifest.write_key

    def full(kv, key, value, shown):
        if key == "manifest.jsonl":
            raise UserError("no room")
        write(kv, key, value, shown)

    monkeypatch.setattr(manifest, "write_key", full)
    with pytest.raises(UserError, match="no room"):
        store.append({"resid_post@1": rows(16, start=16)}, {"number": np.arange(16)})
        store.flush()
    assert store.rows == 16
    monkeypatch.undo()
    assert ActivationStore.open(tmp_path / "s", allow_incomplete=True).rows == 16


def test_a_stale_partial_shard_is_replaced_not_merged(tmp_path):
    """What a killed writer left in a shard's file must not matter, even where it is broken."""
    store = make(tmp_path / "s", n=20)
    path = tmp_path / "s/sites/resid_post@1/c/1/0"
    flip(path, -3)
    store.forget([1])
    again = ActivationStore.open(tmp_path / "s", allow_incomplete=True)
    again.append({"resid_post@1": rows(4, start=16)}, {"number": np.arange(16, 20)})
    again.finish()
    np.testing.assert_array_equal(ids_of(ActivationStore.open(tmp_path / "s").read("resid_post@1")), np.arange(20))
