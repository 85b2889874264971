"""A checkpoint is whole, or it is not used."""

import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlmscope_jax.errors import UserError
from dlmscope_jax.training import checkpoints, init_state, load_latest, save_checkpoint

from .conftest import assert_same_bits, small_spec, sparse_rows

RUN = {"training": {"lr": 0.1, "betas": (0.9, 0.99)}, "source": "a"}


@pytest.fixture(scope="module")
def state():
    state = init_state(small_spec(), sample=sparse_rows(128)[0])
    noise = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: leaf + jnp.asarray(noise.integers(1, 9, leaf.shape), leaf.dtype), state)


@pytest.fixture(scope="module")
def written(state, tmp_path_factory):
    """Checkpoints of steps 5 and 10, to be copied."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for step in (1, 5, 10):
        save_checkpoint(folder, step, state.replace(step=jnp.int32(step)), RUN)
    return folder


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written, tmp_path / "checkpoints")


def test_round_trip_keeps_the_newest_two(folder, state):
    assert checkpoints.checkpoint_steps(folder) == [5, 10]
    step, found = load_latest(folder, jax.eval_shape(lambda: state), RUN)
    assert step == 10
    assert_same_bits(found, state.replace(step=jnp.int32(10)))


def test_nothing_there_is_no_error(tmp_path, state):
    assert load_latest(tmp_path / "none", state, RUN) is None


def test_every_flipped_byte_is_noticed(folder):
    newest = folder / "step_00000010"
    checkpoints.verify(newest)
    rng = np.random.default_rng(0)
    files = [path for path in newest.rglob("*") if path.is_file()]
    assert len(files) >= 5
    for path in files:
        whole = path.read_bytes()
        for _ in range(5 if whole else 0):
            at = int(rng.integers(len(whole)))
            path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << int(rng.integers(8)))]) + whole[at + 1 :])
            with pytest.raises(checkpoints.Damaged):
                checkpoints.verify(newest)
        path.write_bytes(whole + b"x")
        with pytest.raises(checkpoints.Damaged):
            checkpoints.verify(newest)
        path.write_bytes(whole)
    checkpoints.verify(newest)


@pytest.mark.parametrize("damage", ["flip", "no digests", "missing file", "extra file", "renamed", "dtype"])
def test_a_damaged_checkpoint_is_skipped_with_a_message(folder, state, damage, caplog):
    newest = folder / "step_00000010"
    arrays = max((newest / "state").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    if damage == "flip":
        content = bytearray(arrays.read_bytes())
        content[len(content) // 2] ^= 4
        arrays.write_bytes(content)
    elif damage == "no digests":
        (newest / "digests.json").unlink()
    elif damage == "missing file":
        arrays.unlink()
    elif damage == "extra file":
        (newest / "state" / "more").write_text("")
    elif damage == "renamed":
        newest.rename(folder / "step_00000012")
    else:
        shutil.rmtree(newest)
        save_checkpoint(folder, 10, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), state), RUN)
    with caplog.at_level(logging.WARNING):
        step, found = load_latest(folder, state, RUN)
    assert step == 5
    assert_same_bits(found, state.replace(step=jnp.int32(5)))
    [record] = caplog.records
    assert "is damaged and skipped" in record.message and "step_000000" in record.message


def test_none_whole_is_a_users_error(folder, state):
    for path in folder.glob("step_*/digests.json"):
        path.write_text("{")
    with pytest.raises(UserError, match=r"none of its checkpoints \(5, 10\) is whole: delete the folder"):
        load_latest(folder, state, RUN)


def test_another_training_is_refused_and_the_field_named(folder, state):
    with pytest.raises(UserError, match=r"another training \(training.lr is 0.1 there and 0.2 here\)"):
        load_latest(folder, state, {**RUN, "training": {"lr": 0.2, "betas": (0.9, 0.99)}})


def test_half_written_ones_are_removed(folder, state):
    shutil.copytree(folder / "step_00000010", folder / ".writing_00000015")
    (folder / ".writing_00000015" / "digests.json").unlink()
    assert load_latest(folder, state, RUN)[0] == 10
    assert sorted(path.name for path in folder.iterdir()) == ["step_00000005", "step_00000010"]


def test_a_full_disk_leaves_the_older_checkpoints(folder, state, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "_sync", full)
    with pytest.raises(UserError, match=r"step_00000015 cannot be written: No space left on device"):
        save_checkpoint(folder, 15, state, RUN)
    assert sorted(path.name for path in folder.iterdir()) == ["step_00000005", "step_00000010"]
    assert load_latest(folder, state, RUN)[0] == 10
