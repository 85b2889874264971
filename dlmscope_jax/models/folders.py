"""Where a model's files are, and their bytes: a local folder, a pocket model, the hub, or a bucket (``gs://``, ``s3://``).

Bytes are asked for by range and counted: reading a part of a tensor reads no more of its file. Local files are read with
``preadv`` straight into the caller's array, remote ones through tensorstore, some requests at a time.
"""

import functools
import os
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dlmscope_jax.errors import UserError

if TYPE_CHECKING:
    import tensorstore as ts

POCKET = ("pocket-dlm", "pocket-ar", "pocket-dream")
_PATTERNS = ["config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*", "vocab*", "merges*", "special_tokens*"]
_REQUEST = 2 << 20  # bytes a remote request asks for,
_REQUESTS = 8  # and how many are under way at once
_PATIENCE = 60  # seconds to wait for an answer: the client itself tries for many minutes


def resolve_folder(name: str | os.PathLike) -> Path | str:
    """The folder of a model: a pocket model's, a given one, a URL as it is, or a download of a hub id.

    Raises:
      UserError: when there is no such folder, or the hub does not give it.
    """
    text = os.fspath(name)
    if "://" in text:
        return text.rstrip("/")
    if text in POCKET:
        return Path(__file__).parent.parent / "pocket" / text
    if Path(text).is_dir():
        return Path(text)
    if text.count("/") != 1 or text.startswith((".", "/", "~")) or Path(text.split("/")[0]).is_dir():
        known = f"a folder, a URL (gs://..., s3://...), a hub id (OWNER/NAME) or one of {', '.join(POCKET)}"
        raise UserError(f"model {text!r}: no such folder; give {known}")
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(text, allow_patterns=_PATTERNS))
    except Exception as error:  # the hub client raises many kinds; all mean the same to the user
        raise UserError(f"model {text!r}: neither a folder nor to be had from the hub ({_reason(error)})") from error


def open_folder(name: str | os.PathLike) -> "LocalFolder | RemoteFolder":
    """The files of a model, ready to be read; see ``resolve_folder`` for what a model may be called.

    Raises:
      UserError: when there is no such folder, or its URL means nothing.
    """
    where = resolve_folder(name)
    return RemoteFolder(where) if isinstance(where, str) else LocalFolder(where)


class LocalFolder:
    """The files of a folder on this machine.

    Attributes:
      bytes_read: how many bytes this process has read from them so far.
      gap: bytes between two wanted ranges that are cheaper to read than to leave out: disks read whole pages anyway.
      chunk: bytes to read before they are handed on.
    """

    gap, chunk = 4096, 4 << 20

    def __init__(self, where: Path):
        self.where, self.bytes_read = str(where), 0
        self._files: dict[str, int] = {}

    def names(self) -> list[str]:
        """The names of its files."""
        return sorted(entry.name for entry in os.scandir(self.where) if entry.is_file())

    def read(self, name: str) -> bytes | None:
        """All of a small file; None where there is none."""
        path = Path(self.where) / name
        if not path.is_file():
            return None
        value = path.read_bytes()
        self.bytes_read += len(value)
        return value

    def holds(self, name: str, stop: int) -> bool:
        """Whether a file exists and has at least ``stop`` bytes."""
        path = Path(self.where) / name
        return path.is_file() and path.stat().st_size >= stop

    def read_into(self, name: str, start: int, out: np.ndarray) -> None:
        """Fills the bytes ``out`` from a file's byte ``start`` on. Raises ``UserError`` where the file ends before."""
        view, got = out.data, 0
        try:
            if name not in self._files:
                self._files[name] = os.open(os.path.join(self.where, name), os.O_RDONLY)
            while got < len(view):
                count = os.preadv(self._files[name], [view[got:]], start + got)
                if not count:
                    raise UserError(f"{self.where}/{name} is damaged: it ends at byte {start + got}, before its last tensor")
                got += count
                self.bytes_read += count
        except OSError as error:
            raise UserError(f"{self.where}/{name} cannot be read: {_reason(error)}") from error

    def close(self) -> None:
        """Lets go of the open files."""
        while self._files:
            os.close(self._files.popitem()[1])


class RemoteFolder:
    """The files behind a URL that tensorstore knows (``gs://``, ``s3://``, ``file://``, ``memory://``).

    Attributes:
      bytes_read: how many bytes this process has read from them so far.
      gap: bytes between two wanted ranges that are cheaper to read than to ask for the second: a request takes about as long.
      chunk: bytes to read before they are handed on: as much as is under way at once.
    """

    gap, chunk = 1 << 20, _REQUEST * _REQUESTS

    def __init__(self, where: str):
        import tensorstore as ts

        self.where, self.bytes_read = where, 0
        try:
            self._store = ts.KvStore.open(where + "/", context=context()).result(timeout=_PATIENCE)
        except (ValueError, RuntimeError, OSError, NotImplementedError) as error:
            raise UserError(f"model {where!r} is not a URL that can be opened: {_reason(error)}") from error

    def names(self) -> list[str]:
        """The names of its files."""
        with _requests(self.where):
            keys = self._store.list().result(timeout=_PATIENCE)
        return sorted(key.decode() for key in keys if b"/" not in key)

    def read(self, name: str) -> bytes | None:
        """All of a small file; None where there is none."""
        with _requests(f"{self.where}/{name}"):
            found = self._store.read(name).result(timeout=_PATIENCE)
        self.bytes_read += len(found.value)
        return None if found.state == "missing" else found.value

    def holds(self, name: str, stop: int) -> bool:
        """Whether a file exists and has at least ``stop`` bytes; asks for the last of them."""
        with _requests(f"{self.where}/{name}"):
            try:
                found = self._store.read(name, byte_range=slice(stop - 1, stop)).result(timeout=_PATIENCE)
            except ValueError as error:
                if "OUT_OF_RANGE" in str(error):
                    return False
                raise
        self.bytes_read += len(found.value)
        return found.state != "missing"

    def read_into(self, name: str, start: int, out: np.ndarray) -> None:
        """Fills the bytes ``out`` from a file's byte ``start`` on. Raises ``UserError`` where the file ends before."""
        view, under_way = out.data, deque()
        with _requests(f"{self.where}/{name}"):
            for at in range(0, len(view), _REQUEST):
                stop = min(at + _REQUEST, len(view))
                under_way.append((at, stop, self._store.read(name, byte_range=slice(start + at, start + stop))))
                if len(under_way) == _REQUESTS:
                    self._take(view, *under_way.popleft())
            while under_way:
                self._take(view, *under_way.popleft())

    def _take(self, view: memoryview, at: int, stop: int, answer: "ts.Future") -> None:
        value = answer.result(timeout=_PATIENCE).value
        if len(value) != stop - at:
            raise ValueError(f"{len(value)} bytes came back of {stop - at}")
        view[at:stop] = value
        self.bytes_read += len(value)

    def close(self) -> None:
        """Nothing is held open."""


@contextmanager
def _requests(what: str) -> Iterator[None]:
    """Turns what a request raises into one line that names the file."""
    try:
        yield
    except TimeoutError as error:
        raise UserError(f"{what} cannot be read: no answer within {_PATIENCE} seconds; are network and credentials there?") from error
    except (ValueError, RuntimeError, OSError, NotImplementedError) as error:
        raise UserError(f"{what} cannot be read: {_reason(error)}") from error


@functools.cache
def context() -> "ts.Context":
    """One tensorstore context for the process: what was put at ``memory://`` is found again in it alone."""
    import tensorstore as ts

    return ts.Context()


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
