"""How processes find each other, one process alone, and connections that notice a lost one."""

import os
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from dlmscope_jax import distributed
from dlmscope_jax.distributed import processes
from dlmscope_jax.distributed.watch import Watch
from dlmscope_jax.errors import PeerLost, UserError


def test_alone_everything_is_the_identity():
    distributed.start()
    distributed.start("localhost:1", 1, 0)
    distributed.start(processes=1)
    assert distributed.is_first()
    distributed.barrier("nobody else")
    assert distributed.gather({"a": (1, 2)}) == [{"a": [1, 2]}]
    assert distributed.broadcast(None) is None
    assert distributed.on_first(lambda: 3) == 3
    distributed.end(2, "nobody hears it")
    tree = distributed.to_host({"a": jax.numpy.arange(3), "b": np.float32(2)})
    assert isinstance(tree["a"], np.ndarray) and tree["a"].tolist() == [0, 1, 2]
    with pytest.raises(RuntimeError, match="of its own"), distributed.together():
        raise RuntimeError("of its own")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("host:1", None, None), "processes, process missing"),
        ((None, 2, 0), "coordinator missing"),
        (("host", 2, 0), "must be 'host:port'"),
        (("host:1", 2, 2), "process 2 of 2"),
        (("host:1", 2, -1), "process -1 of 2"),
    ],
)
def test_half_of_a_cluster(given, message):
    with pytest.raises(UserError, match=message):
        distributed.start(*given)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("node4", "node4"), ("node4,other", "node4"), ("node[004-007,9],x", "node004"), ("rack1-gpu[12,14]", "rack1-gpu12")],
)
def test_slurm(nodes, host):
    environment = {"SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "0", "SLURM_STEP_NODELIST": nodes, "SLURM_JOB_ID": "5000"}
    assert processes._slurm(environment) == (f"{host}:{61440 + 5000 % 4096}", 4, 3)


def test_slurm_that_is_one_task_or_not_one_a_node():
    assert processes._slurm({}) is None
    assert processes._slurm({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}) is None
    assert processes._slurm({"SLURM_NTASKS": "4"}) is None  # in a batch script, outside of srun
    with pytest.raises(UserError, match="--ntasks-per-node=1"):
        processes._slurm({"SLURM_NTASKS": "4", "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": "a"})
    with pytest.raises(UserError, match="srun"):
        processes._slurm({"SLURM_NTASKS": "4", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"})


def test_tpu_pods():
    assert not processes._on_tpu_pod({"JAX_PLATFORMS": "cpu", "TPU_WORKER_HOSTNAMES": "a,b"})
    assert processes._on_tpu_pod({"TPU_WORKER_HOSTNAMES": "a,b"})
    assert processes._on_tpu_pod({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"})
    assert not processes._on_tpu_pod({"TPU_WORKER_HOSTNAMES": "localhost"})


def test_too_late():
    script = """
from dlmscope_jax import distributed
from dlmscope_jax.errors import UserError
import jax
jax.devices()
try:
    distributed.start("localhost:1234", 2, 1)
except UserError as error:
    assert "before anything that uses a device" in str(error), error
    print("well")
"""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout == "well\n", done.stderr


@pytest.fixture
def watches(monkeypatch):
    """Makes ends in this process, none of which may end it: not later either, when connections of a test that is over are closed."""
    monkeypatch.setattr("dlmscope_jax.distributed.watch._leave", lambda message: None)
    made = []

    def make(index, count):
        made.append(Watch(index, count))
        return made[-1]

    yield make
    for end in made:
        end.end()


@pytest.fixture
def three(watches):
    """Three ends that know each other."""
    ends = [watches(i, 3) for i in range(3)]
    ends[0].listen("localhost")
    for end in ends[1:]:
        end.connect(ends[0].address)
    until = time.monotonic() + 20
    while len(ends[0]._connections) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    return ends


def test_a_broken_connection_is_told_to_all(three):
    three[1]._connections[0].shutdown(2)
    for i in (0, 2):
        assert three[i].lost(20) == "process 1 of 3 stopped"


def test_process_0_is_missed_too(three):
    three[0]._ending = True  # dead: it tells nobody
    for connection in three[0]._connections.values():
        connection.shutdown(2)
    assert three[1].lost(20) == three[2].lost(20) == "process 0 of 3 stopped"


def test_a_failure_is_told_with_its_reason_and_a_goodbye_is_none(three, monkeypatch):
    three[1].end()
    three[1]._connections[0].shutdown(2)
    assert three[2].lost(0.2) is None
    three[2].end("the disk is\nfull")
    assert three[0].lost(20) == "process 2 of 3 stopped: the disk is full"
    # a collective that breaks says so; a mistake of the user's stays one
    monkeypatch.setattr(processes, "_watch", three[0])
    with pytest.raises(PeerLost, match="process 2 of 3 stopped: the disk is full; the same command goes on from the last checkpoint"):
        with distributed.together():
            raise ValueError("Gloo AllGather failed")
    with pytest.raises(UserError, match="mine"), distributed.together():
        raise UserError("mine")


def test_who_fails_at_once_is_heard(watches):
    """Its first words and its last ones come together."""
    first = watches(0, 2)
    first.listen("localhost")
    [host], port, token = first.address
    with socket.create_connection((host, port)) as connection:
        connection.sendall(f"hello {token} 1\nfailed no such file\n".encode())
        assert first.lost(20) == "process 1 of 2 stopped: no such file"


def test_a_stranger_is_sent_away(watches):
    stranger, ends = watches(1, 3), watches(0, 2)
    ends.listen("localhost")
    stranger.connect([*ends.address[:2], "another token"])
    assert stranger.lost(20) == "process 0 of 3 stopped"
    assert ends.lost(0) is None and not ends._connections
