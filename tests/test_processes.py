"""Two and four real processes on one machine: what they agree on, what they write together, and what becomes of a lost one."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import kill_and_resume
import numpy as np
import pytest

from dlmscope_jax.activations import ActivationStore
from dlmscope_jax.dictionaries import load_dictionary
from dlmscope_jax.training import load_latest, read_metrics, save_checkpoint

from .training.conftest import assert_same_bits

ROOT = Path(__file__).resolve().parent.parent
RUN = {"of": "this test"}
STATE = """
import jax, jax.numpy as jnp, numpy as np

def state():
    "Arrays that a mesh divides and arrays that it does not; a zero with a sign, a number that is none."
    rows = np.arange(8 * 6, dtype=np.float32).reshape(8, 6) / 7
    rows[3, 2], rows[5, 1], rows[6] = -0.0, np.nan, -0.0
    return {"rows": rows, "half": jnp.asarray(rows[:, 0] * 3, jnp.bfloat16), "count": np.arange(8, dtype=np.int32), "step": np.int32(7)}
"""
TOGETHER = (
    STATE
    + """
import logging, sys
from pathlib import Path
from jax.sharding import NamedSharding, PartitionSpec
from dlmscope_jax import distributed
from dlmscope_jax.errors import UserError
from dlmscope_jax.training import load_latest, save_checkpoint

folder, coordinator, n, i = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
distributed.start(coordinator, n, i)
distributed.start(coordinator, n, i)  # nothing happens
assert jax.process_count() == n and distributed.is_first() == (i == 0)
assert distributed.gather({"process": i, "text": "x" * 37 * i}) == [{"process": j, "text": "x" * 37 * j} for j in range(n)]
assert distributed.broadcast(i + 5) == 5
assert distributed.on_first(lambda: ["only", i]) == ["only", 0]
try:
    distributed.on_first(lambda: (_ for _ in ()).throw(UserError(f"no such thing on {i}")))
except UserError as error:
    assert str(error) == "no such thing on 0"
else:
    raise AssertionError
distributed.barrier("half way")

# latents over all processes: nobody holds an array
mesh = distributed.make_mesh(model=jax.device_count())
place = {"rows": PartitionSpec("model"), "half": PartitionSpec("model"), "count": PartitionSpec("model"), "step": PartitionSpec()}
here = {name: NamedSharding(mesh, spec) for name, spec in place.items()}
wanted = jax.tree.map(np.asarray, state())

def same(found):
    whole = distributed.to_host(found)
    for name in wanted:
        assert whole[name].dtype == wanted[name].dtype and whole[name].tobytes() == wanted[name].tobytes(), name

like = {name: jax.ShapeDtypeStruct(wanted[name].shape, wanted[name].dtype, sharding=here[name]) for name in wanted}
for written in sorted(folder.glob("by_*")):
    step, found = load_latest(written, like, {"of": "this test"})
    assert step == 3 and not (found["rows"].is_fully_addressable and n > 1), written
    same(found)
mine = jax.tree.map(lambda value, sharding: jax.make_array_from_callback(value.shape, sharding, lambda index: value[index]), wanted, here)
same(mine)
save_checkpoint(folder / f"by_{n}", 3, mine, {"of": "this test"})
distributed.barrier("written")
step, found = load_latest(folder / f"by_{n}", like, {"of": "this test"})
same(found)
# one byte of one file: no process uses it
def flip():
    path = max((folder / f"by_{n}").glob("step_*/state/**/*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    content = bytearray(path.read_bytes())
    whole = bytes(content)
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return [str(path), whole.hex()]
path, whole = distributed.on_first(flip)
try:
    load_latest(folder / f"by_{n}", like, {"of": "this test"})
except UserError as error:
    assert "none of its checkpoints (3) is whole" in str(error)
else:
    raise AssertionError
distributed.on_first(lambda: Path(path).write_bytes(bytes.fromhex(whole)))
print("well", i)
"""
)
made: dict = {}
exec(STATE, made)


def run_together(script: str, folder: Path, processes: int, devices: int = 1) -> None:
    """A script in so many processes, which must all end well."""
    with socket.create_server(("localhost", 0)) as free:
        coordinator = f"localhost:{free.getsockname()[1]}"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # two processes that write one entry would tear it
    }
    command = [sys.executable, "-c", script, str(folder), coordinator, str(processes)]
    running = [
        subprocess.Popen([*command, str(i)], env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for i in range(processes)
    ]
    said = [process.communicate(timeout=280) for process in running]
    assert [process.returncode for process in running] == [0] * processes, "\n".join(stderr[:3000] for _, stderr in said)
    assert all(f"well {i}" in stdout for i, (stdout, _) in enumerate(said))


def test_two_processes_agree_and_share_checkpoints_with_one(tmp_path):
    state = jax.tree.map(jnp.asarray, made["state"]())
    save_checkpoint(tmp_path / "by_1", 3, state, RUN)
    run_together(TOGETHER, tmp_path, 2)
    step, found = load_latest(tmp_path / "by_2", state, RUN)
    assert step == 3
    assert_same_bits(found, state)


@pytest.mark.slow
def test_four_processes_two_and_one_share_checkpoints(tmp_path):
    state = jax.tree.map(jnp.asarray, made["state"]())
    save_checkpoint(tmp_path / "by_1", 3, state, RUN)
    run_together(TOGETHER, tmp_path, 4, devices=2)
    run_together(TOGETHER, tmp_path, 2)
    for n in (4, 2):
        assert_same_bits(load_latest(tmp_path / f"by_{n}", state, RUN)[1], state)


def until(process: subprocess.Popen, step: int) -> None:
    """Reads what a worker says until it has done so many steps."""
    for line in process.stdout:
        if line.strip() == str(step).encode():
            return
    raise AssertionError(f"it ended before step {step}")


def ended(running: list[subprocess.Popen], folder: Path, seconds: float = 120) -> tuple[list[int], list[str]]:
    """Exit codes, and what was said on stderr."""
    codes = [process.wait(timeout=seconds) for process in running]
    for process in running:
        process.stdout.close()
    return codes, [(folder / f"stderr-{i}").read_text() for i in range(len(running))]


PREEMPTED = """
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, "scripts")
from kill_and_resume import harvest
from dlmscope_jax import distributed
from dlmscope_jax.errors import Preempted

folder, coordinator, n, i = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
distributed.start(coordinator, n, i)
mesh, seen = distributed.make_mesh(), []

def slowly(rows):
    seen.append(rows)
    if len(seen) == 3 and i == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.3)  # jax looks for the signal once a second

try:
    harvest(folder, mesh, slowly)
except Preempted as message:
    said = str(message)
there = int(said.split()[1])
assert 0 < there < 48 and said == f"SIGTERM: {there} of 48 shards are harvested; the same command goes on from there", said
assert distributed.gather(said) == [said] * n
before = len(seen)
harvest(folder, mesh, seen.append)
assert len(seen) > before
print("well", i)
"""


@pytest.fixture(scope="module")
def harvested(tmp_path_factory):
    """A store made by two processes, of which the second had SIGTERM, so that both stopped at one pass; then they went on."""
    folder = tmp_path_factory.mktemp("two")
    run_together(PREEMPTED, folder, 2)
    return folder


def test_two_processes_harvest_the_rows_of_one(harvested, tmp_path):
    kill_and_resume.work("harvest", tmp_path, 0, 1, (None, None, None))
    one, two = (ActivationStore.open(folder / "store") for folder in (tmp_path, harvested))
    assert two.complete and one.rows == two.rows
    for name in one.columns:
        np.testing.assert_array_equal(one.column(name), two.column(name), err_msg=name)
    for site in one.sites:
        a, b = (np.asarray(store.read(site), np.float32) for store in (one, two))
        np.testing.assert_allclose(a, b, rtol=2**-7, atol=1e-6)  # bfloat16


@pytest.mark.slow  # what stops is among the harvest's, and what goes on among the checkpoints'
def test_preempted_on_two_processes_and_finished_on_one(harvested, tmp_path):
    """SIGTERM to one of them stops both at one step; one process goes on, and ends where one that did it all does."""
    (tmp_path / "store").symlink_to(harvested / "store")
    running = kill_and_resume.launch("train", tmp_path, 2, steps=40)
    until(running[0], 7)
    os.kill(running[1].pid, signal.SIGTERM)
    codes, said = ended(running, tmp_path)
    assert codes == [75, 75], said
    names = {path.name for path in tmp_path.glob("run/*/checkpoints/step_*")}
    at = max(int(name[-8:]) for name in names)
    assert 7 < at < 40 and all(f"training is saved at step {at} of 40" in text for text in said), (names, said)
    kill_and_resume.finish(kill_and_resume.launch("train", tmp_path, 1, steps=40), tmp_path)

    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "store").symlink_to(harvested / "store")
    kill_and_resume.finish(kill_and_resume.launch("train", alone, 1, steps=40), alone)
    for spec in kill_and_resume.specs(40):
        one, other = (read_metrics(folder / "run" / spec.name / "metrics.jsonl") for folder in (alone, tmp_path))
        assert [line["step"] for line in one] == [line["step"] for line in other] == list(range(1, 41))
        np.testing.assert_allclose([line["loss"] for line in one], [line["loss"] for line in other], rtol=1e-4)
        for name in (".", "best"):
            (_, a, _), (_, b, _) = (load_dictionary(folder / "run" / spec.name / name) for folder in (alone, tmp_path))
            jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), a, b)


def test_a_lost_process_stops_the_other(harvested, tmp_path):
    (tmp_path / "store").symlink_to(harvested / "store")
    running = kill_and_resume.launch("train", tmp_path, 2, steps=400)
    until(running[0], 3)
    os.kill(running[1].pid, signal.SIGKILL)
    codes, said = ended(running, tmp_path)
    assert codes == [1, -signal.SIGKILL]
    assert said[0].splitlines()[-1].endswith("process 1 of 2 stopped; the same command goes on from the last checkpoint")


@pytest.mark.slow
@pytest.mark.parametrize("scenario", list(kill_and_resume.SCENARIOS))
def test_killed_and_resumed_anywhere(scenario, tmp_path):
    for kill in kill_and_resume.trials(scenario, tmp_path, 3, seed=1, show=False):
        assert kill.same, kill
        # by itself; while the processes still look for each other, jax does it, with SIGABRT
        assert all(code != 0 and code < 1000 for _, code in kill.stopped), kill
