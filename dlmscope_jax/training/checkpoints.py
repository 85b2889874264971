"""Checkpoints: orbax writes the arrays, our own digests say whether they are what was written.

Orbax restores flipped bits without a word, and float32 as whatever dtype is asked for. So each checkpoint carries
``digests.json``: the SHA-256 of every file, and path, shape and dtype of every leaf. It is written last, into a folder that
gets its name only then; it is checked before anything is loaded.

Arrays are written in the background: from a copy on the host, or on a CPU from their own memory, which jax gives to no step meanwhile.
Several processes write and read their own parts of one folder that all of them see; process 0 does what is done once.
"""

import dataclasses
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import jax

from dlmscope_jax import distributed
from dlmscope_jax.errors import UserError

FORMAT = 2  # of the folder and of digests.json; 1 did not say so
STATE, DIGESTS = "state", "digests.json"
_PREFIX, _TEMPORARY = "step_", ".writing_"
_BETTER: dict[str, Callable[[float, float], bool]] = {
    "explained_variance": lambda value, than: value > than,
    "loss": lambda value, than: value < than,
}
MEASURED = tuple(_BETTER)  # what a checkpoint may be the best by
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """When checkpoints are made and which are kept.

    Attributes:
      every: steps between two.
      keep: how many of the newest stay.
      best: a metric, ``"explained_variance"`` or ``"loss"``, by whose mean since the checkpoint before the best one stays as well,
        however old; its dictionary is saved too, as ``best/`` beside the last one. None: only the last.

    Raises:
      UserError: a number below 1; another metric.
    """

    every: int = 1000
    keep: int = 2
    best: Literal["explained_variance", "loss"] | None = None

    def __post_init__(self) -> None:
        for name in ("every", "keep"):
            if isinstance(getattr(self, name), bool) or not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise UserError(f"Checkpoints: {name} = {getattr(self, name)!r} must be an integer of at least 1")
        if self.best is not None and self.best not in _BETTER:
            raise UserError(f"Checkpoints: best {self.best!r} is not known: one of {', '.join(_BETTER)}")

    def better(self, value: float | None, than: float | None) -> bool:
        """Whether a checkpoint's mean is better than the best so far; nothing is better than None, and None than nothing."""
        return self.best is not None and value is not None and (than is None or _BETTER[self.best](value, than))


class Damaged(Exception):
    """A checkpoint that must not be used; the message says why."""


def save_checkpoint(
    folder: str | Path,
    step: int,
    state: Any,
    run: dict[str, Any],
    policy: Checkpoints = Checkpoints(),  # noqa: B008  # frozen
    measured: Mapping[str, float | None] | None = None,
    carried: Mapping[str, Any] | None = None,
) -> Path:
    """Writes ``folder/step_00000200`` and removes what the policy does not keep.

    Args:
      folder: where the checkpoints of one training lie; for several processes one that all see.
      step: steps that are done.
      state: a pytree of arrays, on any mesh.
      run: JSON that describes the training; ``load_latest`` refuses a checkpoint of another.
      policy: which of the older ones stay.
      measured: means of metrics since the checkpoint before, for ``policy.best``.
      carried: more JSON that the training wants back, from ``read_digests``.

    Raises:
      UserError: it cannot be written; nothing of it stays behind, older checkpoints are untouched.
    """
    return begin_checkpoint(folder, step, state, run, policy, measured, carried)()


def begin_checkpoint(
    folder: str | Path,
    step: int,
    state: Any,
    run: dict[str, Any],
    policy: Checkpoints = Checkpoints(),  # noqa: B008  # frozen
    measured: Mapping[str, float | None] | None = None,
    carried: Mapping[str, Any] | None = None,
) -> Callable[[], Path]:
    """``save_checkpoint`` in the background: returns when the state may be donated.

    Returns a function that waits until the checkpoint is there, or raises why it is not. Call it before the next one begins.
    """
    from orbax.checkpoint import v1 as ocp

    folder = Path(folder).absolute()
    temporary = folder / f"{_TEMPORARY}{step:08d}"
    content = {
        "format": FORMAT,
        "step": step,
        "run": run,
        "measured": dict(measured or {}),
        "carried": dict(carried or {}),
        "leaves": describe(state),
    }
    content = json.loads(json.dumps(content))  # as it is now
    logging.getLogger("absl").addFilter(_not_said_by_us)
    try:
        if distributed.is_first():
            folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
        with distributed.together():
            written = ocp.save_async(temporary / STATE, state)
    except (OSError, ValueError, RuntimeError) as error:
        raise _not_written(temporary, folder, step, error) from error
    worker = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
    done: Future[Path] = worker.submit(_finish, written.result, folder, temporary, content, policy)
    worker.shutdown(wait=False)
    return done.result


def _finish(wait: Callable[[], None], folder: Path, temporary: Path, content: dict[str, Any], policy: Checkpoints) -> Path:
    """Once all arrays of all processes are written: process 0 says what was written and gives the folder its name."""
    step = content["step"]
    final = folder / f"{_PREFIX}{step:08d}"
    try:
        with distributed.together():
            wait()
        if distributed.is_first():
            files = _files(temporary)
            for path in files:
                _sync(temporary / path)
            content = {**content, "files": {path: _sha256(temporary / path) for path in files}}
            text = json.dumps({"content": content, "sha256": _digest(content)}, indent=1)
            (temporary / DIGESTS).write_text(text, encoding="utf-8")
            _sync(temporary / DIGESTS)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(temporary, final)
            _sync(folder)
    except (OSError, ValueError, RuntimeError) as error:
        raise _not_written(temporary, folder, step, error) from error
    if distributed.is_first():
        steps = checkpoint_steps(folder)
        best = best_checkpoint(folder, policy)
        for old in steps[: -policy.keep]:
            if best is None or old != best[0]:
                shutil.rmtree(folder / f"{_PREFIX}{old:08d}", ignore_errors=True)
    return final


def _not_written(temporary: Path, folder: Path, step: int, error: Exception) -> UserError:
    shutil.rmtree(temporary, ignore_errors=True)
    said = error.strerror if isinstance(error, OSError) else None
    reason = said or " ".join(str(error).replace(f"{temporary}/", "").split())[:300]
    final = folder / f"{_PREFIX}{step:08d}"
    return UserError(f"checkpoint {final} cannot be written: {reason}; make room, then run it again to go on from the one before")


def _not_said_by_us(record: logging.LogRecord) -> bool:
    """Whether a line of the log is not one of those, each with a page of traceback, that orbax's threads write of what they raise."""
    return "_SignalingThread" not in record.getMessage()


def load_latest(folder: str | Path, like: Any, run: dict[str, Any]) -> tuple[int, Any] | None:
    """The newest checkpoint that is whole: ``(step, state)``, or None where none was ever finished.

    A damaged one is logged as a warning and the one before it is used. What a killed writer left half-written is removed. Mesh and
    number of processes may be others than those that wrote it; the bits are the same.

    Args:
      folder: as for ``save_checkpoint``.
      like: a pytree of arrays or ``ShapeDtypeStruct`` of the same structure as the state; leaves with a ``sharding`` are laid out so,
        others on one device.
      run: as for ``save_checkpoint``.

    Raises:
      UserError: there are checkpoints but none can be used, or they belong to another training, or they have another format.
    """
    folder = Path(folder).absolute()
    steps = distributed.on_first(lambda: _swept(folder))
    for step in reversed(steps):
        try:
            return step, load_checkpoint(folder, step, like, run)
        except Damaged as damage:
            _log.warning("%s is damaged and skipped: %s", folder / f"{_PREFIX}{step:08d}", damage)
    if steps:
        raise UserError(
            f"{folder}: none of its checkpoints ({', '.join(map(str, steps))}) is whole: delete the folder to train from the start"
        )
    return None


def load_checkpoint(folder: str | Path, step: int, like: Any, run: dict[str, Any]) -> Any:
    """The state of one checkpoint; arguments as for ``load_latest``.

    Raises:
      Damaged: it must not be used.
      UserError: it belongs to another training, or has another format.
    """
    path = Path(folder).absolute() / f"{_PREFIX}{step:08d}"
    content = _verified(path)
    if content["run"] != json.loads(json.dumps(run)):
        raise UserError(f"{path} belongs to another training ({difference(content['run'], run)}): choose another folder or delete it")
    return _load(path, content, like)


def best_checkpoint(folder: str | Path, policy: Checkpoints) -> tuple[int, float] | None:
    """Step and mean of the checkpoint that is best by ``policy.best``, the earliest of equals; None where there is none.

    Only what their digests say is read.
    """
    best: tuple[int, float] | None = None
    for step in checkpoint_steps(folder) if policy.best else []:
        try:
            value = read_digests(folder, step)["measured"].get(policy.best)
        except (Damaged, UserError):
            continue
        if policy.better(value, best and best[1]):
            best = step, value
    return best


def read_digests(folder: str | Path, step: int) -> dict[str, Any]:
    """What one checkpoint says of itself; its arrays are not looked at.

    Raises:
      Damaged: it says nothing, or was changed.
      UserError: it has another format.
    """
    return _content(Path(folder) / f"{_PREFIX}{step:08d}")


def remove_checkpoints(folder: str | Path) -> None:
    """Deletes the checkpoints of a training that is done."""
    shutil.rmtree(folder, ignore_errors=True)


def checkpoint_steps(folder: str | Path) -> list[int]:
    """The steps of the checkpoints there, ascending; whole or not."""
    names = [path.name.removeprefix(_PREFIX) for path in Path(folder).glob(f"{_PREFIX}*")]
    return sorted(int(name) for name in names if name.isdigit())


def verify(path: Path, part: tuple[int, int] = (0, 1)) -> dict[str, Any]:
    """The content of a checkpoint's ``digests.json``, after every file was compared with it.

    Args:
      path: of one checkpoint.
      part: ``(i, n)``: contents of every n-th file only, from the i-th on.

    Raises:
      Damaged: something is missing, unexpected or changed.
      UserError: it has another format.
    """
    content = _content(path)
    files = set(_files(path)) - {DIGESTS}
    for name in sorted(files ^ content["files"].keys()):
        raise Damaged(f"{name} is {'unexpected' if name in files else 'missing'}")
    for name in sorted(content["files"])[part[0] :: part[1]]:
        if _sha256(path / name) != content["files"][name]:
            raise Damaged(f"{name} is not what was written")
    return content


def _verified(path: Path) -> dict[str, Any]:
    """``verify``, of which every process does a part; all come to the same end."""
    content: dict[str, Any] = {}
    verdict: list[str | None] = [None, None]
    try:
        content = verify(path, (jax.process_index(), jax.process_count()))
    except Damaged as found:
        verdict[0] = str(found)
    except UserError as found:
        verdict[1] = str(found)
    for damage, error in distributed.gather(verdict):
        if error is not None:
            raise UserError(error)
        if damage is not None:
            raise Damaged(damage)
    return content


def _content(path: Path) -> dict[str, Any]:
    try:
        found = json.loads((path / DIGESTS).read_bytes())
        content, digest = found["content"], found["sha256"]
    except FileNotFoundError:
        raise Damaged(f"no {DIGESTS}, it was never finished") from None
    except (OSError, ValueError, TypeError, KeyError):
        raise Damaged(f"{DIGESTS} cannot be read") from None
    if _digest(content) != digest:
        raise Damaged(f"{DIGESTS} was changed")
    version = content.get("format", 1)
    if version != FORMAT:
        raise UserError(
            f"{path} has format {version}, this package reads {FORMAT}: go on with the one that wrote it, or delete {path.parent}"
        )
    if path.name != f"{_PREFIX}{content['step']:08d}":
        raise Damaged(f"it is of step {content['step']}")
    return content


def describe(state: Any) -> dict[str, list]:
    """Path of each leaf -> [dtype, shape]."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): [str(leaf.dtype), list(leaf.shape)] for path, leaf in leaves}


def difference(there: Any, here: Any) -> str:
    """The first fields in which two mappings of JSON values differ, in words."""
    there, here = _flat(there), _flat(json.loads(json.dumps(here)))
    names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    shown = [f"{name} is {there.get(name)!r} there and {here.get(name)!r} here" for name in names[:3]]
    return ", ".join(shown) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _load(path: Path, content: dict[str, Any], like: Any) -> Any:
    from orbax.checkpoint import v1 as ocp

    expected = describe(like)
    if content["leaves"] != expected:
        raise Damaged(f"its arrays are others ({difference(content['leaves'], expected)})")
    alone = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def place(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or alone)

    with distributed.together():
        return ocp.load(path / STATE, jax.tree.map(place, like))


def _swept(folder: Path) -> list[int]:
    """The steps of the checkpoints there, after what was left half-written is gone."""
    for half in folder.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(half, ignore_errors=True)
    return checkpoint_steps(folder)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for name, inner in value.items():
        flat |= _flat(inner, f"{prefix}.{name}" if prefix else name)
    return flat


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
