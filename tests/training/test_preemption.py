"""SIGTERM ends a training after the step in flight, with a checkpoint, and nothing shows that it did."""

import os
import signal

import jax
import numpy as np
import pytest

from dlmscope_jax.dictionaries import load_dictionary
from dlmscope_jax.errors import Preempted
from dlmscope_jax.training import Checkpoints, init_state, load_latest, metrics, run, train

from .conftest import assert_same_bits, small_spec, sparse_rows
from .test_resume import StopAt, files_of

ROWS, _ = sparse_rows(1_000)
SPECS = [small_spec(), small_spec(label="other", ema=0.9, init_seed=3)]
POLICY = Checkpoints(every=5, best="loss")


class TermAt(StopAt):
    """Sends this process SIGTERM after so many steps."""

    def advance(self, count=1):
        self.left -= count
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGTERM)


def rising():
    """Batches that are easy to explain for 15 steps and hard from there on."""
    rng = np.random.default_rng(0)
    for step in range(24):
        yield ROWS[rng.integers(1_000, size=64)] * (1 if step < 15 else 5)


@pytest.fixture(autouse=True)
def long_intervals(monkeypatch):
    """Lines of metrics every 6 steps, as in a long run."""
    monkeypatch.setattr(metrics, "_LINES", 4)


def test_preempted_and_resumed(tmp_path):
    """Before the first checkpoint, between two, and at the last step."""
    train(SPECS, rising(), tmp_path / "whole", checkpoints=POLICY)
    before = signal.getsignal(signal.SIGTERM)
    for stop in (1, 13, 22):
        folder = tmp_path / str(stop)
        with pytest.raises(Preempted, match=r"saved at step (\d+) of 24; the same command goes on from there") as raised:
            train(SPECS, rising(), folder, checkpoints=POLICY, progress=TermAt(stop))
        assert signal.getsignal(signal.SIGTERM) is before
        # the signal comes while the step after the next computes
        at = int(str(raised.value).split()[6])
        assert stop < at <= stop + 2
        assert {path.name for path in folder.glob(f"*/checkpoints/step_{at:08d}")}
        train(SPECS, rising(), folder, checkpoints=POLICY)
        assert files_of(folder) == files_of(tmp_path / "whole"), stop


def test_a_signal_after_the_last_step_is_not_lost(tmp_path):
    with pytest.raises(Preempted, match="this training is done and saved"):
        train(SPECS, rising(), tmp_path, checkpoints=POLICY, progress=TermAt(24))
    for trained in train(SPECS, rising(), tmp_path, checkpoints=POLICY):
        assert not (trained.path / "checkpoints").exists()


def test_the_best_is_saved_beside_the_last(tmp_path, monkeypatch):
    kept = {}
    remove = run.remove_checkpoints

    def look(folder):
        for step in (15, 20):
            found = load_latest_of(folder, step)
            if found is not None:
                kept[step] = found
        remove(folder)

    def load_latest_of(folder, step):
        if not (folder / f"step_{step:08d}").exists():
            return None
        like = jax.eval_shape(lambda: init_state(SPECS[0]))
        identity = run.read_digests(folder, step)["run"]
        return run.load_checkpoint(folder, step, like, identity)

    monkeypatch.setattr(run, "remove_checkpoints", look)
    [trained] = train(SPECS[0], rising(), tmp_path, checkpoints=Checkpoints(every=5, keep=1, best="loss"))
    spec, best, meta = load_dictionary(trained.path / "best")
    assert set(kept) == {15, 20} and meta.extra["best"]["step"] == 15 and meta.extra["best"]["metric"] == "loss"
    assert "best" not in trained.meta.extra
    expected = spec.fold(kept[15].params, *(np.asarray(s).tolist() for s in (kept[15].input_scale, kept[15].output_scale)))
    assert_same_bits({name: best[name] for name in expected}, expected)
    assert not np.array_equal(best["W_dec"], trained.params["W_dec"])


def test_the_last_may_be_the_best(tmp_path):
    [trained] = train(small_spec(), ROWS, tmp_path, checkpoints=Checkpoints(every=5, best="explained_variance"))
    _, best, meta = load_dictionary(trained.path / "best")
    assert meta.extra["best"]["step"] == 24
    assert_same_bits(best, trained.params)


def test_outside_of_the_main_thread_nothing_is_caught(tmp_path):
    import threading

    found = []
    thread = threading.Thread(target=lambda: found.append(train(small_spec(), ROWS, tmp_path)))
    thread.start()
    thread.join()
    assert len(found[0]) == 1
    assert load_latest(tmp_path / "none", None, {}) is None
