"""``dlmscope cache``: what a run's stores hold, which files are damaged, and that only what is damaged is made again."""

import dataclasses
from pathlib import Path

import pytest

from dlmscope_jax.activations import ActivationStore, layout
from dlmscope_jax.errors import UserError
from dlmscope_jax.recipes import cache, pipeline
from dlmscope_jax.recipes.configs import Synthetic


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 2
    path.write_bytes(raw)


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.endswith("__lock")}


@pytest.fixture
def harvested(small_run, monkeypatch):
    """A run of one model whose stores have many shards, and its folder."""
    monkeypatch.setattr(layout, "SHARD_BYTES", 1 << 14)
    monkeypatch.setattr(layout, "CHUNK_BYTES", 1 << 10)
    run = dataclasses.replace(small_run, models=small_run.models[1:])
    pipeline.harvest(run)
    return run, Path(run.root) / run.name / "harvest" / "llama"


def written(monkeypatch):
    """The shards that are written from now on."""
    found = []
    inner = layout.Arrays.write_shard
    monkeypatch.setattr(layout.Arrays, "write_shard", lambda self, index, rows: found.append(index) or inner(self, index, rows))
    return found


def test_info_verify_and_repair(harvested, monkeypatch, capsys):
    run, folder = harvested
    before = contents(folder)
    shards = len(ActivationStore.open(folder / "train").shards)
    assert shards > 3
    cache.info(run)
    out = capsys.readouterr().out.splitlines()
    assert out[0].split()[:4] == ["store", "state", "rows", "shards"] and len(out) == 3
    assert out[1].startswith("llama/train  complete  2,") and "resid_post@0 [16], resid_post@1 [16]  bfloat16" in out[1]
    cache.info(str(folder / "test"))
    assert '"side": "test"' in capsys.readouterr().out
    cache.verify(run)
    assert "2 stores are sound" in capsys.readouterr().out

    flip(folder / "train/sites/resid_post@1/c/1/0")
    (folder / "train/columns/token/c/3").unlink()
    flip(folder / "test/COMPLETE")
    with pytest.raises(UserError, match=r"cache verify: 3 damaged files, in 2 shards: dlmscope cache repair makes them again"):
        cache.verify(run)
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in out] == [
        ["store", "shard", "file"],
        ["llama/train", "1", "sites/resid_post@1/c/1/0"],
        ["llama/train", "3", "columns/token/c/3"],
        ["llama/test", "-", "COMPLETE"],
    ]
    with pytest.raises(UserError, match="1 damaged file, in 0 shards: dlmscope cache repair CONFIG"):
        cache.verify(str(folder / "test"))
    again = written(monkeypatch)
    cache.repair(run)
    assert sorted(again) == [1, 3]
    assert contents(folder) == before
    again.clear()
    cache.repair(run)
    assert not again and "sound" in capsys.readouterr().out


def test_repair_finishes_what_was_killed_and_makes_a_damaged_header_again(harvested, monkeypatch, capsys):
    run, folder = harvested
    before = contents(folder)
    store = ActivationStore.open(folder / "train")
    store.forget([store.shards[-1].shard])
    with pytest.raises(UserError, match="cache verify: 1 store not finished"):
        cache.verify(run)
    flip(folder / "test/store.json")
    again = written(monkeypatch)
    cache.repair(run)
    assert set(again) == {store.shards[-1].shard + 1} | set(range(len(ActivationStore.open(folder / "test").shards)))
    assert contents(folder) == before


def test_repair_of_a_world_whose_rows_were_appended(tmp_path, small_run, monkeypatch):
    from dlmscope_jax.recipes import worlds

    monkeypatch.setattr(worlds, "_SHARD", 256)
    run = dataclasses.replace(small_run, synthetic=(Synthetic("w", dimension=8, features=16),))
    pipeline.harvest(run)
    folder = Path(run.root) / run.name / "harvest" / "w"
    before = contents(folder)
    flip(next((folder / "train/sites/rows@0/c/5").iterdir()))
    again = written(monkeypatch)
    cache.repair(run)
    assert again == [5, 6, 7]
    assert contents(folder) == before


def test_what_cannot_be_done(small_run, tmp_path):
    with pytest.raises(UserError, match="run dlmscope harvest with the same config first"):
        cache.verify(small_run)
    with pytest.raises(UserError, match="needs the config of the run"):
        cache.repair(str(tmp_path))
    for action in (cache.info, cache.verify):
        with pytest.raises(UserError, match=f"no activation store at {tmp_path}"):
            action(str(tmp_path))
