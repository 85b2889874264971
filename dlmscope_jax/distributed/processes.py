"""Several processes that do one job, one on each machine: how they find each other, agree, wait, and stop together.

Everything here is the identity on one process. What one process does for all (``on_first``), what all must know (``broadcast``,
``gather``) and where they wait (``barrier``) go over the devices, so all processes must come to the same calls in the same order, and
none of them may be in another thread.
"""

import itertools
import json
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from glob import glob
from importlib.util import find_spec
from types import TracebackType
from typing import Any

import jax
import numpy as np

from dlmscope_jax.errors import PeerLost, UserError

from .watch import Watch, told

HEARTBEAT_SECONDS = 60  # after which jax itself ends processes that wait for a lost one
_PATIENCE = 10.0  # seconds after a collective broke, for news of who is gone
_watch: Watch | None = None
_asked = itertools.count()  # calls of ``asked``, equal in all processes
_log = logging.getLogger(__name__)


def start(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Joins this process to the others of its job: one process a machine, with all its devices.

    Without arguments they are found in the environment: a TPU pod or several TPU slices, or a SLURM step with several tasks. Nothing
    happens where there is one process, or on a second call. Must come before anything that uses a device.

    Args:
      coordinator: ``"host:port"`` of process 0, a port that is free there.
      processes: how many there are.
      process: which one this is, from 0.

    Raises:
      UserError: arguments that say half of it; several SLURM tasks on one node; no connection; devices are in use already.
    """
    if jax.distributed.is_initialized():
        return
    found = _given(coordinator, processes, process) or _slurm(os.environ)
    if (found is None and not _on_tpu_pod(os.environ)) or (found is not None and found[1] == 1):
        return
    try:
        if found is None:
            jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
        else:
            # jax would give a SLURM task one GPU
            jax.distributed.initialize(*found, cluster_detection_method="deactivate", heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except (RuntimeError, ValueError) as error:
        if "before" in str(error):
            raise UserError("distributed.start must come before anything that uses a device of jax") from None
        what = "the TPU pod" if found is None else f"process {found[2]} of {found[1]} at {found[0]}"
        raise UserError(f"the processes do not find each other ({what}): {' '.join(str(error).split())[:200]}") from error
    if jax.process_count() > 1:
        _begin_to_watch(None if found is None else found[0].rpartition(":")[0])


def is_first() -> bool:
    """Whether this is process 0, which writes what is written once."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until all processes are here.

    Raises:
      PeerLost: one of them is gone.
    """
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        with together():
            multihost_utils.sync_global_devices(name)


def gather(value: Any) -> list[Any]:
    """What each process has to say, a small JSON value, in the order of the processes; the same list on all.

    Raises:
      PeerLost: one of them is gone.
    """
    if jax.process_count() == 1:
        return [json.loads(json.dumps(value))]
    from jax.experimental import multihost_utils

    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    with together():
        lengths = multihost_utils.process_allgather(np.int32(len(text)))
        # few lengths, few programs
        room = 1 << int(max(lengths) - 1).bit_length()
        padded = multihost_utils.process_allgather(np.pad(text, (0, room - len(text))))
    return [json.loads(row[:length].tobytes()) for row, length in zip(padded, lengths, strict=True)]


def broadcast(value: Any) -> Any:
    """What process 0 has to say, a small JSON value; other processes' values do not count."""
    return gather(value if is_first() else None)[0]


def on_first(work: Callable[[], Any]) -> Any:
    """Process 0 does some work; all get its result, a small JSON value, or its ``UserError``.

    Raises:
      UserError: what the work raised.
      PeerLost: a process is gone.
    """
    if jax.process_count() == 1:
        return work()
    result, error = None, None
    if is_first():
        try:
            result = work()
        except UserError as raised:
            error = str(raised)
    result, error = broadcast([result, error])
    if error is not None:
        raise UserError(error)
    return result


def to_host(tree: Any) -> Any:
    """Whole arrays in the memory of every process, for arrays of which each process may hold a part only.

    Parts travel one by one: no device has to hold a whole array.
    """
    return jax.tree.map(_to_host, tree)


@contextmanager
def together() -> Iterator[None]:
    """Around what needs the other processes: a collective that breaks because one is gone raises ``PeerLost``, which says so.

    Raises:
      PeerLost: another process is gone.
    """
    try:
        yield
    except (RuntimeError, ValueError) as error:  # gloo's are ValueErrors
        news = None if _watch is None or isinstance(error, UserError) else _watch.lost(_PATIENCE)
        if news is None:
            raise
        raise PeerLost(told(news)) from error


@contextmanager
def preemption() -> Iterator[Callable[[], bool]]:
    """Takes the signal SIGTERM, by which schedulers say that the machine will be taken away.

    Yields a function to be called once a step. It returns whether to stop after this step: in all processes at the same step,
    whichever of them had the signal.
    """
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        yield lambda: multihost_utils.reached_preemption_sync_point(next(_asked))
        return
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    received: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        yield lambda: bool(received)
    finally:
        signal.signal(signal.SIGTERM, before)


def end(code: int, reason: str) -> None:
    """Ends this process after a failure, telling the others why; returns where there are no others, or none failed.

    Python's own way out would wait for the others, which wait for this one.
    """
    if _watch is None or code == 0:
        return
    _watch.end(reason or f"exit code {code}")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _begin_to_watch(host: str | None) -> None:
    """Connects every process to process 0; without a connection the heartbeats of jax must do."""
    global _watch
    import atexit

    watch = Watch(jax.process_index(), jax.process_count())
    if watch.index == 0:
        watch.listen(host)
    address = broadcast(watch.address)
    try:
        if watch.index:
            watch.connect(address)
    except OSError as error:
        _log.warning("process %d cannot watch process 0 (%s): should one stop, the others notice it late", watch.index, error)
        return
    _watch = watch
    atexit.register(_leave)  # before jax takes down what others may still talk to
    hook = sys.excepthook

    def failed(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        hook(kind, error, trace)
        end(1, f"{kind.__name__}: {str(error)[:200]}")

    sys.excepthook = failed


def _leave() -> None:
    """The normal end: says goodbye and waits for the others."""
    _watch.end()
    jax.distributed.shutdown()


def _given(coordinator: str | None, processes: int | None, process: int | None) -> tuple[str, int, int] | None:
    given = {"coordinator": coordinator, "processes": processes, "process": process}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == 3 or (processes == 1 and process in (None, 0)):
        return None if len(missing) == 3 else ("", 1, 0)
    if missing:
        raise UserError(f"cluster: {', '.join(missing)} missing: give coordinator ('host:port'), processes and process together, or none")
    if not re.fullmatch(r".+:\d+", coordinator):
        raise UserError(f"cluster: coordinator {coordinator!r} must be 'host:port' of process 0")
    if processes < 1 or not 0 <= process < processes:
        raise UserError(f"cluster: process {process} of {processes}: processes count from 0")
    return coordinator, processes, process


def _slurm(environment: Any) -> tuple[str, int, int] | None:
    """The tasks of a SLURM step."""
    if int(environment.get("SLURM_NTASKS", "1")) == 1 or "SLURM_PROCID" not in environment:
        return None
    if environment.get("SLURM_LOCALID", "0") != "0":
        raise UserError("SLURM: several tasks on one node; one process has all devices of a node: use --ntasks-per-node=1")
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    # "node[004-007,9],other3" begins with node004
    first = re.match(r"([^,\[]+)(?:\[([0-9]+))?", nodes)
    if first is None:
        raise UserError("SLURM: there is no SLURM_STEP_NODELIST: start the processes with srun, or give coordinator, processes and process")
    port = 61440 + int(environment.get("SLURM_JOB_ID", "0")) % 4096
    return f"{first[1]}{first[2] or ''}:{port}", int(environment["SLURM_NTASKS"]), int(environment["SLURM_PROCID"])


def _on_tpu_pod(environment: Any) -> bool:
    """Whether this is a machine of a TPU slice that may have others; jax asks the machine itself for the rest."""
    if environment.get("JAX_PLATFORMS", "tpu").split(",")[0] not in ("", "tpu"):
        return False
    names = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES") or ""
    if "," in names or int(environment.get("MEGASCALE_NUM_SLICES") or "1") > 1:
        return True
    has_tpu = find_spec("libtpu") is not None and bool(glob("/dev/accel*") or glob("/dev/vfio/[0-9]*"))
    return has_tpu and not names and not environment.get("TPU_SKIP_MDS_QUERY")


def _to_host(leaf: Any) -> np.ndarray:
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
        return np.asarray(leaf)
    from jax.experimental import multihost_utils

    whole = np.empty(leaf.shape, leaf.dtype)
    mine = {str(shard.index): shard for shard in leaf.addressable_shards}
    owners: dict[str, tuple[int, tuple[slice, ...]]] = {}
    for device, index in leaf.sharding.devices_indices_map(leaf.shape).items():
        if str(index) not in owners or device.process_index < owners[str(index)][0]:
            owners[str(index)] = device.process_index, index
    for name, (owner, index) in owners.items():
        is_source = owner == jax.process_index()
        part = np.asarray(mine[name].data) if is_source else np.zeros(whole[index].shape, whole.dtype)
        # summed as integers: 0 + -0.0 is not -0.0
        bits = np.ascontiguousarray(part).view(f"u{part.dtype.itemsize}")
        with together():
            whole[index] = multihost_utils.broadcast_one_to_all(bits, is_source=is_source).view(whole.dtype)
    return whole
