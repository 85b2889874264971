"""Checkpoints: orbax writes the arrays, our own digests say whether they are what was written.

Orbax restores flipped bits without a word, and float32 as whatever dtype is asked for. So each checkpoint carries
``digests.json``: the SHA-256 of every file, and path, shape and dtype of every leaf. It is written last, into a folder that
gets its name only then; it is checked before anything is loaded.
"""

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import jax

from dlmscope_jax.errors import UserError

KEEP = 2
STATE, DIGESTS = "state", "digests.json"
_PREFIX, _TEMPORARY = "step_", ".writing_"
_log = logging.getLogger(__name__)


class Damaged(Exception):
    """A checkpoint that must not be used; the message says why."""


def save_checkpoint(folder: str | Path, step: int, state: Any, run: dict[str, Any]) -> Path:
    """Writes ``folder/step_00000200`` and removes all but the newest two.

    Args:
      folder: where the checkpoints of one training lie.
      step: steps that are done.
      state: a pytree of arrays.
      run: JSON that describes the training; ``load_latest`` refuses a checkpoint of another.

    Raises:
      UserError: it cannot be written; nothing of it stays behind, older checkpoints are untouched.
    """
    from orbax.checkpoint import v1 as ocp

    folder = Path(folder).absolute()
    final = folder / f"{_PREFIX}{step:08d}"
    temporary = folder / f"{_TEMPORARY}{step:08d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        ocp.save(temporary / STATE, state)
        files = _files(temporary)
        for path in files:
            _sync(temporary / path)
        content = {"step": step, "run": run, "leaves": describe(state), "files": {path: _sha256(temporary / path) for path in files}}
        text = json.dumps({"content": content, "sha256": _digest(content)}, indent=1)
        (temporary / DIGESTS).write_text(text, encoding="utf-8")
        _sync(temporary / DIGESTS)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        _sync(folder)
    except (OSError, ValueError, RuntimeError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())[:200]
        raise UserError(
            f"checkpoint {final} cannot be written: {reason}; make room, then run it again to go on from the one before"
        ) from error
    for old in checkpoint_steps(folder)[:-KEEP]:
        shutil.rmtree(folder / f"{_PREFIX}{old:08d}", ignore_errors=True)
    return final


def load_latest(folder: str | Path, like: Any, run: dict[str, Any]) -> tuple[int, Any] | None:
    """The newest checkpoint that is whole: ``(step, state)``, or None where none was ever finished.

    A damaged one is logged as a warning and the one before it is used. What a killed writer left half-written is removed.

    Args:
      folder: as for ``save_checkpoint``.
      like: a pytree of arrays or ``ShapeDtypeStruct`` of the same structure as the state.
      run: as for ``save_checkpoint``.

    Raises:
      UserError: there are checkpoints but none can be used, or they belong to another training.
    """
    folder = Path(folder).absolute()
    for half in folder.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(half, ignore_errors=True)
    steps = checkpoint_steps(folder)
    for step in reversed(steps):
        path = folder / f"{_PREFIX}{step:08d}"
        try:
            content = verify(path)
            if content["run"] != json.loads(json.dumps(run)):
                raise UserError(
                    f"{path} belongs to another training ({difference(content['run'], run)}): choose another folder or delete it"
                )
            return step, _load(path, content, like)
        except Damaged as damage:
            _log.warning("%s is damaged and skipped: %s", path, damage)
    if steps:
        raise UserError(
            f"{folder}: none of its checkpoints ({', '.join(map(str, steps))}) is whole: delete the folder to train from the start"
        )
    return None


def remove_checkpoints(folder: str | Path) -> None:
    """Deletes the checkpoints of a training that is done."""
    shutil.rmtree(folder, ignore_errors=True)


def checkpoint_steps(folder: str | Path) -> list[int]:
    """The steps of the checkpoints there, ascending; whole or not."""
    names = [path.name.removeprefix(_PREFIX) for path in Path(folder).glob(f"{_PREFIX}*")]
    return sorted(int(name) for name in names if name.isdigit())


def verify(path: Path) -> dict[str, Any]:
    """The content of a checkpoint's ``digests.json``, after every file was compared with it.

    Raises:
      Damaged: something is missing, unexpected or changed.
    """
    try:
        found = json.loads((path / DIGESTS).read_bytes())
        content, digest = found["content"], found["sha256"]
    except FileNotFoundError:
        raise Damaged(f"no {DIGESTS}, it was never finished") from None
    except (OSError, ValueError, TypeError, KeyError):
        raise Damaged(f"{DIGESTS} cannot be read") from None
    if _digest(content) != digest:
        raise Damaged(f"{DIGESTS} was changed")
    if path.name != f"{_PREFIX}{content['step']:08d}":
        raise Damaged(f"it is of step {content['step']}")
    files = set(_files(path)) - {DIGESTS}
    for name in sorted(files ^ content["files"].keys()):
        raise Damaged(f"{name} is {'unexpected' if name in files else 'missing'}")
    for name, expected in content["files"].items():
        if _sha256(path / name) != expected:
            raise Damaged(f"{name} is not what was written")
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
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), like)
    return ocp.load(path / STATE, abstract)


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
