"""Damage to any file of a store is noticed and named, and nothing damaged is read as rows."""

import random
import shutil
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from dlmscope_jax.activations import ActivationStore
from dlmscope_jax.activations.checking import examine, keep
from dlmscope_jax.errors import UserError

COLUMNS = {"number": np.int64, "is_masked": np.bool_}
SHARDS, ROWS = 4, 8


def shard(index):
    ids = np.arange(ROWS * index, ROWS * index + (5 if index == SHARDS - 1 else ROWS))
    return {"h": np.stack([ids, -ids, 0 * ids + 1], 1).astype(np.float32), "number": ids, "is_masked": ids % 3 == 1}


def make(url, dtype="int8"):
    store = ActivationStore.create(url, {"h": 3}, {"who": "test"}, dtype, ROWS, 4, columns=COLUMNS, shards=SHARDS)
    for index in range(SHARDS):
        store.write_shard(index, shard(index))
    return store.finish()


def files(folder):
    return [path for path in sorted(Path(folder).rglob("*")) if path.is_file() and not path.name.endswith("__lock")]


@pytest.fixture(scope="module", params=["int8", "float32"])
def whole(request, tmp_path_factory):
    return make(tmp_path_factory.mktemp("whole") / "s", request.param).url


@pytest.fixture
def folder(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "s"))


def train_on(url):
    """Everything that a training could read of a store."""
    return [batch for batch in ActivationStore.open(url).batches(29, 0, epochs=1)]


def named(url):
    return {damage.file for damage in examine(url).damaged}


def test_a_sound_store_has_no_damage(whole):
    found = examine(whole)
    assert not found.damaged and found.finished and list(found.sound) == [0, 1, 2, 3]
    assert len(train_on(whole)) == 1


def test_200_random_flips_are_all_noticed_and_named(folder):
    """Over all files alike, so that the small ones get their share; a bit at a time."""
    draw, kinds = random.Random(0), set()
    for _ in range(200):
        path = draw.choice(files(folder))
        sound = path.read_bytes()
        flipped = bytearray(sound)
        flipped[draw.randrange(len(flipped))] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        name = str(path.relative_to(folder))
        kinds.add(name)
        assert name in named(folder), name
        with pytest.raises(UserError):
            train_on(folder)
        path.write_bytes(sound)
    assert kinds == {str(path.relative_to(folder)) for path in files(folder)}
    assert not named(folder) and len(train_on(folder)) == 1


def test_a_missing_or_cut_file_is_noticed_and_named(folder):
    for path in files(folder):
        sound, name = path.read_bytes(), str(path.relative_to(folder))
        for left in (None, b"", sound[: len(sound) // 2], sound[:-1], sound + b"\n"):
            path.unlink() if left is None else path.write_bytes(left)
            if left is None and name == "COMPLETE":
                found = examine(folder)
                assert not found.damaged and not found.finished and len(found.sound) == SHARDS
            else:
                assert name in named(folder), (name, left)
            with pytest.raises(UserError):
                train_on(folder)
        path.write_bytes(sound)
    assert not named(folder)


def test_swapped_shards_are_noticed_and_named(folder):
    """Sound files in the wrong places, in one array and in all of them; also while the store is not finished."""
    for arrays in (
        [p.parent for p in folder.glob("*/*/c")],
        [folder / "sites/h"],
        [folder / "columns/number"],
        [folder / "columns/is_masked"],
    ):
        places = [
            (next(p for p in (a / "c/0", a / "c/0/0") if p.is_file()), next(p for p in (a / "c/2", a / "c/2/0") if p.is_file()))
            for a in arrays
        ]
        for one, other in places * 2:  # the second time back
            held = one.read_bytes()
            one.write_bytes(other.read_bytes())
            other.write_bytes(held)
            if (one, other) != places[-1] or named(folder) == set():
                continue
            assert {str(p.relative_to(folder)) for pair in places for p in pair} == named(folder)
            with pytest.raises(UserError, match="rows of another place"):
                train_on(folder)
            (folder / "COMPLETE").rename(folder / "aside")
            growing = ActivationStore.open(folder, allow_incomplete=True)
            with pytest.raises(UserError, match="rows of another place"):
                list(islice(growing.batches(4, 0, buffer_rows=8, follow=True, patience=0), 6))
            (folder / "aside").rename(folder / "COMPLETE")
    assert not named(folder)


def test_a_manifest_line_that_was_removed_or_changed(folder):
    path = folder / "manifest.jsonl"
    sound = path.read_bytes()
    lines = sound.splitlines(keepends=True)
    for left in (lines[:1] + lines[2:], lines[::-1], [*lines, lines[0]], [lines[0].replace(b'"rows": 8', b'"rows": 4'), *lines[1:]]):
        path.write_bytes(b"".join(left))
        assert named(folder) == {"manifest.jsonl"}
        with pytest.raises(UserError, match="manifest.jsonl changed"):
            train_on(folder)
    # in a store that is not finished each line has to speak for itself
    (folder / "COMPLETE").unlink()
    assert named(folder) == {"manifest.jsonl"}
    with pytest.raises(UserError, match="manifest.jsonl is damaged .*line 1"):
        ActivationStore.open(folder, allow_incomplete=True)
    path.write_bytes(b"".join(lines[:2] + lines[3:]))
    found = examine(folder)
    assert not found.damaged and list(found.sound) == [0, 1, 3]


@pytest.mark.parametrize("dtype", ["int8", "float32"])
def test_what_is_sound_is_kept_and_the_rest_can_be_made_again(tmp_path, dtype):
    url = tmp_path / "s"
    store = make(url, dtype)
    before = {path: path.read_bytes() for path in files(url)}

    def damage(*names):
        for name in names:
            raw = bytearray((url / name).read_bytes())
            raw[len(raw) // 2] ^= 4
            (url / name).write_bytes(raw)

    for names, kept in (
        (["sites/h/c/1/0", "columns/number/c/3"], [0, 2]),
        (["COMPLETE"], [0, 1, 2, 3]),
        (["columns/number/zarr.json"], [0, 1, 2, 3]),
        (["manifest.jsonl"], None),
        (["store.json"], []),
    ):
        damage(*names)
        found = examine(url)
        assert {d.file for d in found.damaged} == set(names)
        keep(url, found)
        if names == ["store.json"]:
            assert not (url / "store.json").exists()
            ActivationStore.create(url, {"h": 3}, {"who": "test"}, dtype, ROWS, 4, columns=COLUMNS, shards=SHARDS)
        again = ActivationStore.open(url, allow_incomplete=True)
        there = [s.shard for s in again.shards]
        assert there == kept if kept is not None else 0 < len(there) < SHARDS, (names, there, found)
        for index in set(range(SHARDS)) - set(there):
            again.write_shard(index, shard(index))
        again.finish()
        assert {path: path.read_bytes() for path in files(url)} == before
    # rows that were appended can only go on where the sound ones end
    damage("sites/h/c/1/0")
    keep(url, examine(url), in_order=True)
    assert [s.shard for s in ActivationStore.open(url, allow_incomplete=True).shards] == [0]
    assert store.rows == 29


def test_there_is_no_store(tmp_path):
    with pytest.raises(UserError, match="there is no activation store"):
        examine(tmp_path / "none")
    assert not (tmp_path / "none").exists()
