"""Real processes that harvest into one store, and stream together, against one process on an equal mesh: every byte."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from dlmscope_jax.activations import ActivationStore, Corruption, harvest

from .conftest import tiny_blocks, tiny_model

ROOT = Path(__file__).resolve().parents[2]
CHILD = """
import hashlib, sys
from itertools import islice
import jax, numpy as np
from dlmscope_jax import distributed
from dlmscope_jax.activations import ActivationStore, ActivationStream, Corruption, harvest
from dlmscope_jax.distributed import make_mesh
from dlmscope_jax.errors import UserError
from tests.activations.conftest import tiny_blocks, tiny_model

folder, coordinator, n, i = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
if n > 1:
    distributed.start(coordinator, n, i)
model, params = tiny_model("shifted")
blocks, half, sites = tiny_blocks(61), Corruption("rate", .3, .7), ("resid_post@0", "mlp_act@1")
settings = dict(seed=3, batch_size=8, dtype="float32", shard_blocks=12)
devices = jax.devices()
assert len(devices) == 4 and jax.process_count() == n
meshes = {"rows": make_mesh(4, 1), "one": make_mesh(1, 2, devices=[devices[0], devices[-1]])}
for name, mesh in meshes.items():
    seen = []
    store = harvest(model, params, blocks, f"{folder}/{name}", sites, half, mesh=mesh, progress=seen.append, **settings)
    assert store.complete and store.rows == 462
    # every process writes some, but where they hold the same rows
    assert (sum(seen) < 462 and bool(seen)) if n > 1 and name == "rows" else sum(seen) in ({0, 462} if n > 1 else {462})
    assert store.rows == harvest(model, params, blocks, f"{folder}/{name}", sites, half, mesh=mesh, **settings).rows
# what others left behind is gone on with
assert not ActivationStore.open(f"{folder}/left", allow_incomplete=True).complete
store = harvest(model, params, blocks, f"{folder}/left", sites, half, mesh=meshes["rows"], **settings)
assert store.complete
try:
    harvest(model, params, blocks, f"{folder}/rows", sites, half, mesh=meshes["rows"], **(settings | dict(seed=4)))
except UserError as error:
    assert "made with seed 3, this harvest has 4" in str(error)
else:
    raise AssertionError
stream = ActivationStream(model, params, blocks, sites, half, seed=3, batch_size=8, buffer_rows=200, mesh=meshes["rows"], dtype="float32")
assert stream.meta == {name: value for name, value in store.meta.items() if name != "shard_blocks"}
batches = [distributed.to_host(batch) for batch in islice(stream.batches(16, 5, select="masked"), 12)]
print(hashlib.sha256(b"".join(batch[site].tobytes() for batch in batches for site in sites)).hexdigest())
"""


def run(folder: Path, processes: int) -> set[str]:
    """What the processes print, with four devices in all."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    flags = f"--xla_force_host_platform_device_count={4 // processes}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, str(folder), address, str(processes), str(i)],
            env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in range(processes)
    ]  # fmt: skip
    try:
        done = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * processes, "\n".join(error[-3000:] for _, error in done)
    return {out.strip().splitlines()[-1] for out, _ in done}


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and not p.name.endswith(".__lock")}


def leave(folder: Path, shards: list[int]) -> None:
    """A store that was killed: a finished one's shards taken out of the manifest."""
    ActivationStore.open(folder).forget(shards)


@pytest.mark.slow
def test_processes_make_the_store_of_one(tmp_path):
    alone, together = tmp_path / "alone", tmp_path / "together"
    sites, settings = ("resid_post@0", "mlp_act@1"), dict(seed=3, batch_size=8, dtype="float32", shard_blocks=12)
    here = harvest(*tiny_model("shifted"), tiny_blocks(61), alone / "left", sites, Corruption("rate", 0.3, 0.7), **settings)
    assert len(here.shards) == 6
    leave(alone / "left", [0, 1, 2, 3, 4, 5])
    one = run(alone, 1)
    # where one process has left off, two go on
    shutil.copytree(alone / "left", together / "left")
    leave(together / "left", [0, 3, 4])
    two = run(together, 2)
    assert one == two and len(one) == 1
    assert tree(together) == tree(alone)
