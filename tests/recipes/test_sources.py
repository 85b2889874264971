"""Where a run's rows come from: a stream of text, a store that grows, the model itself; and stores in 8 bits."""

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from jax.sharding import AbstractMesh

from dlmscope_jax.activations import ActivationStore
from dlmscope_jax.cli import main
from dlmscope_jax.dictionaries import load_dictionary
from dlmscope_jax.errors import UserError
from dlmscope_jax.recipes import pipeline
from dlmscope_jax.recipes.work import Work


@pytest.fixture
def run(small_run, model_folders):
    """One model, one site."""
    harvest = dataclasses.replace(small_run.harvest, sites=("resid_post@0",), train_rows=1500, test_rows=300)
    return dataclasses.replace(small_run, models=(model_folders["llada"],), harvest=harvest)


def of_train(run, **fields):
    return dataclasses.replace(run, train=dataclasses.replace(run.train, **fields))


def dictionary(run):
    spec, params, meta = load_dictionary(Path(run.root) / run.name / "dictionaries" / "llada" / "resid_post@0_k4")
    assert np.isfinite(np.asarray(params["W_dec"])).all()
    return meta


def test_training_straight_from_the_model_keeps_no_rows(run, tmp_path):
    streamed = of_train(run, source="model", buffer_rows=1024)
    pipeline.harvest(streamed)
    pipeline.train(streamed)
    folder = Path(run.root) / run.name / "harvest" / "llada"
    assert [p.name for p in folder.iterdir()] == ["test"]
    meta = dictionary(streamed)
    assert meta.model == run.models[0] and meta.tokenizer and meta.steps == 6


def test_a_growing_store_is_waited_for(run, monkeypatch):
    growing = of_train(run, source="growing")
    monkeypatch.setattr(pipeline, "_PATIENCE", 1)
    with pytest.raises(UserError, match="growing, but nothing was harvested"):
        pipeline.train(growing)
    harvest = dataclasses.replace(growing, harvest=dataclasses.replace(growing.harvest, dtype="int8"))
    pipeline.harvest(harvest)
    pipeline.train(harvest)
    assert dictionary(harvest).steps == 6


def test_text_is_streamed_into_the_stores(run, corpus, tmp_path):
    texts = [path.read_text() for path in sorted(Path(corpus).iterdir())]
    (tmp_path / "text").mkdir()
    for i in range(2):
        pyarrow.parquet.write_table(pyarrow.table({"body": texts[i::2]}), tmp_path / "text" / f"{i}.parquet", row_group_size=2)
    data = dataclasses.replace(run.data, path=str(tmp_path / "text"), stream=True, text="body")
    run = dataclasses.replace(run, data=data)
    pipeline.harvest(run)
    folder = Path(run.root) / run.name / "harvest" / "llada"
    train, test = (ActivationStore.open(folder / side) for side in ("train", "test"))
    assert train.complete and train.rows >= 1500 and 0 < test.rows <= 320
    before = [(s.shard, s.rows, s.digest) for s in train.shards]
    pipeline.harvest(run)  # finds all of it
    assert [(s.shard, s.rows, s.digest) for s in ActivationStore.open(folder / "train").shards] == before
    assert list((folder / "train-cursors").rglob("lane-*.jsonl"))
    for parts in (2, 16):  # another mesh, the same blocks
        work = Work(run)
        work.model(run.models[0])
        work.mesh = AbstractMesh((parts, 1), ("data", "model"))
        blocks = pipeline._blocks_to_harvest(work, run.models[0], "train", 1500)
        assert blocks.window % run.harvest.batch_size == 0 and blocks.digest == train.meta["blocks"]["digest"]
    pipeline.train(run)
    assert dictionary(run).steps == 6


def test_the_verb_cache_reaches_its_functions(monkeypatch, tmp_path):
    from dlmscope_jax.recipes import cache

    got = []
    for action in ("info", "verify", "repair"):
        monkeypatch.setattr(cache, action, lambda where, action=action: got.append((action, getattr(where, "name", where))))
    (tmp_path / "mine.yaml").write_text("name: mine\n")
    assert main(["cache", "info", str(tmp_path / "mine.yaml"), "--seed=3"]) == 0
    assert main(["cache", "verify", "gs://bucket/store"]) == main(["cache", "repair"]) == 0
    assert got == [("info", "mine"), ("verify", "gs://bucket/store"), ("repair", "quickstart")]
