"""A checkpoint is whole, or it is not used."""

import json
import logging
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlmscope_jax.errors import UserError
from dlmscope_jax.training import Checkpoints, checkpoints, init_state, load_latest, save_checkpoint

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


def test_two_hundred_flipped_bits_are_noticed_and_named(folder):
    newest = folder / "step_00000010"
    checkpoints.verify(newest)
    rng = np.random.default_rng(0)
    files = [path for path in newest.rglob("*") if path.is_file() and path.stat().st_size]
    assert len(files) >= 5
    for _ in range(200):
        path = files[rng.integers(len(files))]
        whole = path.read_bytes()
        at = int(rng.integers(len(whole)))
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << int(rng.integers(8)))]) + whole[at + 1 :])
        with pytest.raises(checkpoints.Damaged, match=path.name):
            checkpoints.verify(newest)
        path.write_bytes(whole)
    for path in files:
        whole = path.read_bytes()
        path.write_bytes(whole + b"x")
        with pytest.raises(checkpoints.Damaged):
            checkpoints.verify(newest)
        path.write_bytes(whole)
    checkpoints.verify(newest)


def test_shares_of_a_verification_cover_every_file(folder):
    newest = folder / "step_00000010"
    arrays = max((newest / "state").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    arrays.write_bytes(arrays.read_bytes()[::-1])
    noticed = 0
    for i in range(3):
        try:
            checkpoints.verify(newest, (i, 3))
        except checkpoints.Damaged:
            noticed += 1
    assert noticed == 1


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


def test_a_write_that_fails_in_the_background_is_one_line(folder, state, caplog):
    """The system refuses large files: the arrays, which orbax writes in a thread of its own."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    large = {"a": jax.random.normal(jax.random.key(0), (100_000,))}
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(UserError, match="step_00000015 cannot be written: .*File too large") as raised:
            save_checkpoint(folder, 15, large, RUN)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(raised.value) and not caplog.records
    assert sorted(path.name for path in folder.iterdir()) == ["step_00000005", "step_00000010"]
    assert load_latest(folder, state, RUN)[0] == 10


def test_the_state_may_be_donated_as_soon_as_saving_has_begun(tmp_path):
    """On a CPU what is written is the state's own memory: no step may write to it, and later states, which nobody saves, are donated."""
    make = jax.jit(lambda: {name: jnp.full(1_000_000, i, jnp.float32) for i, name in enumerate("abcdefgh")})
    following = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * 0 - 1, tree), donate_argnums=0)
    mine = jax.block_until_ready(make())
    wait = checkpoints.begin_checkpoint(tmp_path, 1, mine, RUN)
    for turn in range(3):  # much faster than writing
        before, mine = mine, jax.block_until_ready(following(mine))
        assert turn == 0 or all(leaf.is_deleted() for leaf in before.values())
    assert wait() == tmp_path / "step_00000001"
    assert_same_bits(load_latest(tmp_path, mine, RUN)[1], make())


def test_the_best_stays_however_old(tmp_path, state):
    policy = Checkpoints(keep=2, best="loss")
    for step, loss in enumerate([5.0, 3.0, 4.0, None, 3.0, 6.0], 1):
        save_checkpoint(tmp_path, step, state, RUN, policy, {"loss": loss, "explained_variance": 0.5})
    assert checkpoints.checkpoint_steps(tmp_path) == [2, 5, 6]
    assert checkpoints.best_checkpoint(tmp_path, policy) == (2, 3.0)
    assert checkpoints.best_checkpoint(tmp_path, Checkpoints(best="explained_variance")) == (2, 0.5)
    assert checkpoints.best_checkpoint(tmp_path, Checkpoints()) is None
    save_checkpoint(tmp_path, 7, state, RUN, policy, {"loss": 2.0, "explained_variance": 0.5})
    assert checkpoints.checkpoint_steps(tmp_path) == [6, 7]


def test_another_format_is_refused(folder, state):
    digests = folder / "step_00000010" / "digests.json"
    content = json.loads(digests.read_text())["content"]
    for changed in ({**content, "format": 3}, {name: value for name, value in content.items() if name != "format"}):
        digests.write_text(json.dumps({"content": changed, "sha256": checkpoints._digest(changed)}))
        with pytest.raises(UserError, match=rf"has format {changed.get('format', 1)}, this package reads 2"):
            load_latest(folder, state, RUN)


@pytest.mark.parametrize(("field", "value"), [("every", 0), ("keep", 0), ("keep", 1.5), ("best", "l0")])
def test_policies_that_mean_nothing(field, value):
    with pytest.raises(UserError, match=f"Checkpoints: {field}"):
        Checkpoints(**{field: value})


def test_restored_on_any_mesh_bit_by_bit(run_with_devices, tmp_path):
    out = run_with_devices(
        f"""
        import jax, numpy as np
        from dlmscope_jax.dictionaries import TopK
        from dlmscope_jax.distributed import make_mesh
        from dlmscope_jax.training import TrainSpec, init_state, load_latest, save_checkpoint, state_shardings

        spec = TrainSpec(TopK(8, 16, 2), steps=10, batch_size=8, ema=0.9)
        meshes = [make_mesh(data, 4 // data, devices=jax.devices()[:4]) for data in (1, 2, 4)]
        sample = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
        first = init_state(spec, sample=sample, mesh=meshes[1])
        save_checkpoint({str(tmp_path)!r}, 3, first, {{}})
        like = jax.eval_shape(lambda: init_state(spec))
        for mesh in meshes:
            places = state_shardings(spec, mesh)
            wanted = jax.tree.map(lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), like, places)
            step, found = load_latest({str(tmp_path)!r}, wanted, {{}})
            assert step == 3
            for place, a, b in zip(jax.tree.leaves(places), jax.tree.leaves(first), jax.tree.leaves(found), strict=True):
                assert b.sharding.is_equivalent_to(place, b.ndim)
                assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
        step, found = load_latest({str(tmp_path)!r}, like, {{}})
        assert len(found.params["W_enc"].devices()) == 1
        assert np.asarray(found.params["W_enc"]).tobytes() == np.asarray(first.params["W_enc"]).tobytes()
        print("well")
        """,
        n_devices=4,
    )
    assert "well" in out
