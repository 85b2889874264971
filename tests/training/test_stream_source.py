"""Training straight from a model: as from any source, and a killed run goes on from the same bits."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dlmscope_jax.activations import ActivationStore, ActivationStream, Corruption
from dlmscope_jax.dictionaries import TopK
from dlmscope_jax.errors import UserError
from dlmscope_jax.training import Checkpoints, Growing, TrainSpec, train
from tests.activations.conftest import tiny_blocks, tiny_model

from .conftest import assert_same_bits
from .test_resume import StopAt, Stopped, files_of

SITES = ("resid_post@1", "mlp_in@1", "mlp_out@1")
EVERY = Checkpoints(every=4)


def stream(seed=0, **changes):
    settings = dict(seed=seed, batch_size=8, buffer_rows=200) | changes
    return ActivationStream(*tiny_model("dlm"), tiny_blocks(61), SITES, Corruption("rate", 0.3, 0.7), meta={"model": "tiny"}, **settings)


def specs(**changes):
    common = dict(steps=14, batch_size=16, lr=3e-3, sample_rows=64, dead_rows=80, select="masked") | changes
    return [
        TrainSpec(dictionary=TopK(8, 32, 2), site="resid_post@1", **common),
        TrainSpec(dictionary=TopK(8, 32, 2, d_out=8), site="mlp_in@1", target="mlp_out@1", label="transcoder", **common),
    ]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    return train(specs(), stream(), folder, checkpoints=EVERY), files_of(folder)


def test_several_sites_and_a_pair(undisturbed):
    trained, _ = undisturbed
    assert [t.meta.site for t in trained] == ["resid_post@1", "mlp_in@1"]
    meta = trained[0].meta
    assert (meta.model, meta.select, meta.layer) == ("tiny", "masked", 1)
    assert meta.corruption == "rate U[0.3, 0.7]" and len(meta.model_identity) == 16
    # scales come from rows of this model
    rows = [np.asarray(b["resid_post@1"], np.float32) for b, _ in zip(stream().batches(16, 0, select="masked"), range(8), strict=False)]
    scale = np.sqrt(np.square(np.concatenate(rows)).sum(axis=1).mean())
    np.testing.assert_allclose(meta.input_scale, scale, rtol=0.05)


def test_stopped_anywhere_and_resumed(undisturbed, tmp_path):
    trained, files = undisturbed
    for stop in (3, int(np.random.default_rng().integers(5, 14))):
        folder = tmp_path / str(stop)
        with pytest.raises(Stopped):
            train(specs(), stream(), folder, checkpoints=EVERY, progress=StopAt(stop))
        again = train(specs(), stream(), folder, checkpoints=EVERY)
        for one, other in zip(trained, again, strict=True):
            assert_same_bits(one.params, other.params)
        assert files_of(folder) == files, stop


def test_another_streams_run_is_refused(tmp_path):
    with pytest.raises(Stopped):
        train(specs(), stream(), tmp_path, checkpoints=EVERY, progress=StopAt(6))
    for other in (stream(seed=1), stream(buffer_rows=100)):
        with pytest.raises(UserError, match="source"):
            train(specs(), other, tmp_path, checkpoints=EVERY)


def test_a_stream_on_other_devices_is_refused(tmp_path, monkeypatch):
    source = stream()
    monkeypatch.setattr(type(source), "mesh", SimpleNamespace(shape={"data": 2}, size=2))
    with pytest.raises(UserError, match="stream's model is on {'data': 2}, the training on one device: use one mesh"):
        train(specs(), source, tmp_path)


def test_a_growing_store_is_a_source_of_its_own(tmp_path):
    store = ActivationStore.create(tmp_path / "s", {"h": 8}, shard_rows=64, chunk_rows=8, columns={}, shards=4)
    rows = np.random.default_rng(0).normal(size=(256, 8)).astype(np.float32)
    for shard in range(4):
        store.write_shard(shard, {"h": rows[64 * shard : 64 * (shard + 1)].astype(store.dtype)})
    store.finish()
    spec = TrainSpec(dictionary=TopK(8, 32, 2), steps=10, batch_size=16, sample_rows=64)
    [early] = train(spec, Growing(store), tmp_path / "early")
    # it is the same training with the store opened again, and not that of the finished store's order
    assert train(spec, Growing(ActivationStore.open(tmp_path / "s")), tmp_path / "early")[0].meta == early.meta
    with pytest.raises(UserError, match="another training"):
        train(spec, store, tmp_path / "early")


def test_training_on_a_store_that_is_being_written(tmp_path):
    """A writer that is slow, and commits in another order; beyond the first epoch, when all is there, as well."""
    rows = np.random.default_rng(0).normal(size=(256, 8)).astype(np.float32)
    spec = TrainSpec(dictionary=TopK(8, 32, 2), steps=40, batch_size=16, sample_rows=64)

    def create(path):
        return ActivationStore.create(path, {"h": 8}, {"made": "here"}, shard_rows=32, chunk_rows=8, columns={}, shards=8)

    def write(store, seconds):
        for shard in (1, 0, 4, 2, 3, 7, 6, 5):
            time.sleep(seconds)
            store.write_shard(shard, {"h": rows[32 * shard : 32 * (shard + 1)].astype(store.dtype)})
        store.finish()

    whole = create(tmp_path / "whole")
    write(whole, 0)
    [wanted] = train(spec, Growing(whole), tmp_path / "after")

    thread = threading.Thread(target=write, args=(create(tmp_path / "slow"), 0.3))
    store = ActivationStore.open(tmp_path / "slow", allow_incomplete=True)
    thread.start()
    [found] = train(spec, Growing(store), tmp_path / "meanwhile")
    thread.join()
    assert_same_bits(found.params, wanted.params)
    assert files_of(tmp_path / "meanwhile")[f"{spec.name}/metrics.jsonl"] == files_of(tmp_path / "after")[f"{spec.name}/metrics.jsonl"]


CHILD = """
import sys, time
from dlmscope_jax.training import train
from tests.training.test_stream_source import EVERY, StopAt, specs, stream

class Wait(StopAt):
    def advance(self, count=1):
        self.left -= count
        if self.left == 0:
            print("ready", flush=True)
            time.sleep(600)

train(specs(), stream(), sys.argv[1], checkpoints=EVERY, progress=Wait(10))
"""


@pytest.mark.slow
def test_killed_and_resumed(undisturbed, tmp_path):
    root = Path(__file__).parents[2]
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path)], env=os.environ | {"PYTHONPATH": str(root)}, cwd=root, stdout=subprocess.PIPE
    )  # fmt: skip
    assert child.stdout is not None and child.stdout.readline() == b"ready\n"
    child.send_signal(signal.SIGKILL)
    child.stdout.close()
    assert child.wait() == -signal.SIGKILL
    train(specs(), stream(), tmp_path, checkpoints=EVERY)
    assert files_of(tmp_path) == undisturbed[1]
