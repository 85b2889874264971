"""A training that was stopped, or killed, ends bit for bit where an undisturbed one does."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dlmscope_jax.dictionaries import TopK
from dlmscope_jax.errors import UserError
from dlmscope_jax.training import Checkpoints, run, train

from .conftest import assert_same_bits, small_spec, sparse_rows

ROWS, _ = sparse_rows(1_000)
SPECS = [
    small_spec(),
    small_spec(dictionary=TopK(16, 64, 6)),
    small_spec(dictionary=TopK(16, 64, 2), ema=0.9, k_start=8, k_anneal_steps=12, resample_every=7, optimizer="adam_bf16"),
    small_spec(label="k_free", optimizer="schedule_free", schedule="constant", init_seed=3),
]
EVERY = Checkpoints(every=5)


class Stopped(Exception):
    pass


class StopAt:
    """A progress that ends the training from within, after so many steps."""

    def __init__(self, step):
        self.left = step

    def skip(self, count):
        self.left -= count

    def note(self, text):
        pass

    def advance(self, count=1):
        self.left -= count
        if self.left == 0:
            raise Stopped


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Final states and files of a training that nothing stopped."""
    states, folder = {}, tmp_path_factory.mktemp("undisturbed")
    finish = run.Run.finish
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.Run, "finish", lambda self: (states.update({self.folder.name: self.state}), finish(self)))
        train(SPECS, ROWS, folder, checkpoints=EVERY)
    return states, files_of(folder)


@pytest.mark.slow
def test_stopped_anywhere_and_resumed(undisturbed, final_states, tmp_path):
    # before the first checkpoint, and at random
    for stop in (3, int(np.random.default_rng().integers(6, 24))):
        folder = tmp_path / str(stop)
        with pytest.raises(Stopped):
            train(SPECS, ROWS, folder, checkpoints=EVERY, progress=StopAt(stop))
        train(SPECS, ROWS, folder, checkpoints=EVERY)
        assert_same_bits(dict(final_states), undisturbed[0])
        assert files_of(folder) == undisturbed[1], stop
        final_states.clear()


def test_a_dictionary_that_is_behind_catches_up(undisturbed, final_states, tmp_path):
    """Two dictionaries with checkpoints of different steps, and one that is new, in one pass."""
    with pytest.raises(Stopped):
        train(SPECS[0], ROWS, tmp_path, checkpoints=EVERY, progress=StopAt(12))
    train(SPECS, ROWS, tmp_path, checkpoints=EVERY)
    assert_same_bits(dict(final_states), undisturbed[0])
    assert files_of(tmp_path) == undisturbed[1]


CHILD = """
import sys, time
from tests.training.test_resume import EVERY, ROWS, SPECS, StopAt
from dlmscope_jax.training import checkpoints, train

def ready():
    print("ready", flush=True)
    time.sleep(600)

class Wait(StopAt):
    def advance(self, count=1):
        self.left -= count
        if self.left == 0:
            ready()

if sys.argv[2] == "step":
    train(SPECS, ROWS, sys.argv[1], checkpoints=EVERY, progress=Wait(13))
else:
    # a second checkpoint: its arrays are written, its digests are half
    write = checkpoints.Path.write_text
    def half(path, text, **options):
        if ".writing_00000010" in str(path):
            write(path, text[: len(text) // 2])
            ready()
        return write(path, text, **options)
    checkpoints.Path.write_text = half
    train(SPECS, ROWS, sys.argv[1], checkpoints=EVERY)
"""


@pytest.mark.some(1)
@pytest.mark.parametrize("moment", ["step", "checkpoint"])
def test_killed_and_resumed(undisturbed, final_states, tmp_path, moment):
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root)}
    with subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path), moment], stdout=subprocess.PIPE, env=environment, cwd=root) as child:
        assert child.stdout.readline() == b"ready\n"
        os.kill(child.pid, signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL
    left = {path.name for path in tmp_path.glob("k*/checkpoints/*")}
    assert left <= {"step_00000005", "step_00000010", ".writing_00000010"} and left
    assert moment == "step" or ".writing_00000010" in left
    train(SPECS, ROWS, tmp_path, checkpoints=EVERY)
    assert_same_bits(dict(final_states), undisturbed[0])
    assert files_of(tmp_path) == undisturbed[1]


def test_damaged_newest_checkpoint_costs_only_time(undisturbed, final_states, tmp_path):
    with pytest.raises(Stopped):
        train(SPECS, ROWS, tmp_path, checkpoints=EVERY, progress=StopAt(13))
    (tmp_path / "k4" / "checkpoints" / "step_00000010" / "digests.json").write_text("{}")
    train(SPECS, ROWS, tmp_path, checkpoints=EVERY)
    assert_same_bits(dict(final_states), undisturbed[0])
    assert files_of(tmp_path) == undisturbed[1]


def test_resuming_another_training_is_refused(tmp_path):
    with pytest.raises(Stopped):
        train(SPECS[0], ROWS, tmp_path, checkpoints=EVERY, progress=StopAt(8))
    with pytest.raises(UserError, match=r"another training \(training.lr is 0.003 there and 0.002 here\)"):
        train(small_spec(lr=2e-3), ROWS, tmp_path, checkpoints=EVERY)
    with pytest.raises(UserError, match=r"another training \(source is"):
        train(SPECS[0], ROWS + 1, tmp_path, checkpoints=EVERY)
