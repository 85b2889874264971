"""Pickles without a zip around them (``.pkl``, ``.pkl.gz``), under the restrictions of ``torch_pickle``.

Pickled by Python and not by ``torch.save``, a tensor carries its storage as bytes in torch's format from before 1.6: five pickles (a
magic number, a version, the machine, the storage, its key) and then the numbers. Each of them is read under the same
restrictions, and the bytes must be as many as the storage claims.
"""

import gzip
import io
import zlib
from pathlib import Path
from typing import Any

from dlmscope_jax.errors import UserError

from .pickle_check import check_opcodes
from .torch_pickle import Storage, TorchFile, Unpickler, one_line

_MAGIC, _VERSION = 0x1950A86A20F9469CFC6C, 1001
_BYTES = frozenset({"BINBYTES", "SHORT_BINBYTES", "BINBYTES8"})
# weights hardly shrink; a file that unfolds further than this is a trap
MAX_GROWTH, SLACK = 8, 16 * 2**20
_HEAD = 4096  # longer than each of the five pickles before a storage's numbers


class PickleFile(TorchFile):
    """A ``.pkl`` or ``.pkl.gz`` file that answers like a ``TorchFile``; all of it is in memory.

    Raises:
      UserError: no such file, one that unfolds to more than eight times its size, a pickle that asks for more than tensors and
        plain data.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"{self.path}: no such file")
        data = _unfolded(self.path)
        try:
            check_opcodes(data, also=_BYTES)
            self.contents = _Unpickler(io.BytesIO(data)).load()
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from None
        except Exception as error:  # as in TorchFile: it is refused, whatever went wrong
            raise UserError(f"{self.path}: not a pickle that holds tensors: {type(error).__name__}: {one_line(error)}") from None

    def _storage_bytes(self, storage: Storage) -> int:
        if not isinstance(storage.key, memoryview):
            raise KeyError(storage.key)
        return len(storage.key)

    def _storage(self, storage: Storage) -> memoryview:
        return storage.key


class _Unpickler(Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return lambda data: _storage(data)
        return super().find_class(module, name)

    def persistent_load(self, pid: Any) -> Storage:
        raise UserError("refers to a storage in a way that is not torch's")


class _StorageUnpickler(Unpickler):
    def persistent_load(self, pid: Any) -> Storage:
        match pid:
            case ("storage", str() as kind, str() as key, str(), int() as size, None):
                return Storage(kind.removeprefix("torch."), key, size)
        raise UserError("refers to a storage in a way that is not torch's")


def _storage(data: Any) -> Storage:
    """A storage from the bytes that torch pickles it as; its ``key`` is its numbers."""
    if not isinstance(data, bytes):
        raise UserError("holds a storage that is not bytes")
    parts, start = [], 0
    for _ in range(5):
        head = data[start : start + _HEAD]
        end = check_opcodes(head)
        parts.append(_StorageUnpickler(io.BytesIO(head[:end])).load())
        start += end
    magic, version, machine, storage, keys = parts
    rest = memoryview(data)[start:]  # no copy: a pickle may ask for one storage any number of times
    if magic != _MAGIC or version != _VERSION or not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise UserError("holds a storage that torch did not write, or a big-endian machine did")
    if not isinstance(storage, Storage) or keys != [storage.key] or rest[:8] != storage.size.to_bytes(8, "little", signed=True):
        raise UserError("holds a storage that contradicts itself")
    return Storage(storage.kind, rest[8:], storage.size)


def _unfolded(path: Path) -> bytes:
    size = path.stat().st_size
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    if not packed:
        return path.read_bytes()
    limit = MAX_GROWTH * size + SLACK
    try:
        with gzip.open(path) as file:
            data = file.read(limit + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: damaged or cut short: {one_line(error)}") from None
    if len(data) > limit:
        raise UserError(f"{path}: unfolds to more than {MAX_GROWTH} times its {size} bytes, which weights never do")
    return data
