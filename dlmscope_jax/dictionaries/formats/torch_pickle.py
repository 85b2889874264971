"""Reading and writing torch's zip files (``.pt``) without torch, and without running anything that they contain.

A ``.pt`` file is a zip archive: a pickle that describes containers and tensors, and one entry of raw bytes a storage. A
pickle is a program, so it is read under three restrictions:

- its instructions are checked first (``pickle_check``);
- every name that it asks for must be one of a handful, each of which builds plain data: tensors come out as
  ``LazyTensor``, device, storage and dtype names as text, the one class of configurations that published files hold as ``Inert``;
- a tensor's storage, offset, shape and strides are checked against the bytes in the archive when it is read, before
  anything is allocated. Tensors that nobody reads (an optimiser's, beside the weights) cost nothing.

Entries must be stored, not compressed, which is what torch writes; a small file can then not unfold into a huge one.
The zip's own CRC-32 catches damaged bytes.
"""

import io
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dlmscope_jax.errors import UserError

from .pickle_check import check_opcodes

_MAX_PICKLE_BYTES = 64 * 2**20
_MAX_AXES = 8
_STORAGES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
_STORAGE_NAMES = {dtype: name for name, dtype in _STORAGES.items()}
_DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")


@dataclass(frozen=True)
class Storage:
    """Where a tensor's numbers lie, as the file claims it."""

    kind: Any
    key: Any
    size: Any


@dataclass(frozen=True)
class LazyTensor:
    """A tensor of a ``.pt`` file that has been described but not read. Nothing about it is trusted until ``TorchFile.read``."""

    storage: Any
    offset: Any
    shape: Any
    stride: Any


class Inert:
    """An object of a class that is not here: its attributes as plain data (``vars``), none of its code."""


def _rebuild_tensor(storage, offset, shape, stride, *rest):
    return LazyTensor(storage, offset, shape, stride)


def _rebuild_parameter(data, *rest):
    return data


# What is built here can be handed in again: a result that may be longer than its arguments would double in every few bytes of a pickle.
def _device(*arguments):
    if len(arguments) > 2 or not all(type(a) is int or (isinstance(a, str) and len(a) < 20) for a in arguments):
        raise UserError("names a device that is none")
    return ":".join(str(a) for a in arguments)


def _size(entries=()):
    if not isinstance(entries, tuple | list) or len(entries) > _MAX_AXES:
        raise UserError("holds a size that is none")
    return tuple(entries)


_CALLABLE: dict[tuple[str, str], Callable] = {
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch", "device"): _device,
    ("torch", "Size"): _size,
}
# transcoder_circuits pickles its configuration beside the weights
_INERT = {("sae_training.config", "LanguageModelSAERunnerConfig")}
_NAMED = {("torch", name): f"torch.{name}" for name in (*_STORAGES, *_DTYPES)}


class Unpickler(pickle.Unpickler):
    """Builds plain data from the allowed names, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return lambda: OrderedDict()  # filled afterwards, by instructions whose keys have been checked
        if (module, name) in _NAMED:
            return _NAMED[module, name]
        # New objects each time: BUILD may set attributes of what it is given, and ours must stay as they are.
        if (module, name) in _INERT:
            return type(name, (Inert,), {})
        if function := _CALLABLE.get((module, name)):
            return lambda *arguments: function(*arguments)
        raise UserError(f"asks for {module:.80}.{name:.80}, which a file of tensors does not need; it was not run")

    def persistent_load(self, pid: Any) -> Storage:
        match pid:
            case ("storage", str() as kind, str() as key, str(), int() as size):
                return Storage(kind.removeprefix("torch."), key, size)
        raise UserError("refers to a storage in a way that is not torch's")


class TorchFile:
    """An open ``.pt`` file: ``contents`` is the pickled object with ``LazyTensor`` leaves, ``read`` loads one of them.

    Raises:
      UserError: no such file, not a zip archive (the format before torch 1.6, or a damaged file), compressed entries, a
        pickle that asks for more than tensors and plain data.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"{self.path}: no such file")
        with open(self.path, "rb") as file:
            magic = file.read(4)
        if magic != b"PK\x03\x04":
            raise UserError(
                f"{self.path}: not a zip archive; files from before torch 1.6 are not read, because nothing in them can be checked"
                " before it is loaded: open it in torch and torch.save it again"
            )
        try:
            self._zip = zipfile.ZipFile(self.path)
            pickles = [i for i in self._zip.infolist() if i.filename == "data.pkl" or i.filename.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise UserError(f"{self.path}: holds {len(pickles)} data.pkl, a file of torch.save has one")
            self._prefix = pickles[0].filename.removesuffix("data.pkl")
            if "/" in self._prefix[:-1] or self._prefix.startswith((".", "/")):
                raise UserError(f"{self.path}: its entries lie in {self._prefix!r:.80}, which torch.save never writes")
            order = f"{self._prefix}byteorder"
            if order in self._zip.namelist() and self._bytes(order, 16) != b"little":
                raise UserError(f"{self.path}: written on a big-endian machine, which is not read")
            self.contents = self._unpickle(self._bytes(pickles[0].filename, _MAX_PICKLE_BYTES))
        except BaseException as error:
            self.close()
            if isinstance(error, zipfile.BadZipFile | OSError | EOFError | ValueError | RuntimeError) and not isinstance(error, UserError):
                raise UserError(f"{self.path}: damaged or cut short: {one_line(error)}") from None
            raise

    def __enter__(self) -> "TorchFile":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Closes the archive; tensors can no longer be read."""
        if hasattr(self, "_zip"):
            self._zip.close()

    def shape(self, tensor: Any, name: str = "tensor") -> tuple[int, ...]:
        """The shape that one tensor of ``contents`` claims; ``read`` checks it against the bytes.

        Raises:
          UserError: it is no tensor, or claims what no tensor can have.
        """
        if not isinstance(tensor, LazyTensor) or not isinstance(tensor.storage, Storage):
            raise UserError(f"{self.path}: {name}: is not a tensor")
        shape, stride, numbers = tensor.shape, tensor.stride, (tensor.offset, tensor.storage.size)
        if not (_naturals(shape) and _naturals(stride) and _naturals(numbers) and len(shape) == len(stride) <= _MAX_AXES):
            raise UserError(f"{self.path}: {name}: impossible shape, strides or offset")
        return tuple(shape)

    def read(self, tensor: Any, name: str = "tensor") -> np.ndarray:
        """The values of one tensor of ``contents``, a new array in the file's dtype.

        Raises:
          UserError: what ``tensor`` claims does not fit the bytes in the file, or those are damaged.
        """

        def wrong(what: str) -> UserError:
            return UserError(f"{self.path}: {name}: {what}")

        shape = self.shape(tensor, name)
        kind, size = tensor.storage.kind, tensor.storage.size
        if not isinstance(kind, str) or kind not in _STORAGES:
            raise wrong("its storage is of a kind that is not read")
        dtype = _STORAGES[kind]
        stride, offset = tensor.stride, tensor.offset
        try:
            held = self._storage_bytes(tensor.storage)
        except KeyError:
            raise wrong("its storage is not in the file") from None
        if held != size * dtype.itemsize:
            raise wrong(f"its storage has {held} bytes, {size} entries of {dtype} are {size * dtype.itemsize}")
        count = math.prod(shape)
        last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) if count else offset - 1
        # More entries than the storage has means that strides of zero repeat some: no dictionary needs it, and it can ask for any size.
        if last >= size or count > size:
            raise wrong(f"shape {list(shape)} with strides {list(stride)} reaches past the {size} entries of its storage")
        try:
            flat = np.frombuffer(self._storage(tensor.storage), dtype)
        except (zipfile.BadZipFile, OSError, EOFError, RuntimeError) as error:  # RuntimeError: encrypted
            raise wrong(f"damaged: {one_line(error)}") from None
        strides = tuple(s * dtype.itemsize for s in stride)
        return np.lib.stride_tricks.as_strided(flat[offset:], shape, strides, writeable=False).copy()

    def _storage_bytes(self, storage: Storage) -> int:
        return self._zip.getinfo(self._storage_entry(storage)).file_size

    def _storage(self, storage: Storage) -> bytes | memoryview:
        return self._bytes(self._storage_entry(storage), self._storage_bytes(storage))

    def _storage_entry(self, storage: Storage) -> str:
        return f"{self._prefix}data/{storage.key:.100}"

    def _bytes(self, entry: str, limit: int) -> bytes:
        info = self._zip.getinfo(entry)
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise UserError(f"{self.path}: entry {entry} is compressed, which torch.save never does")
        if info.file_size > min(limit, self.path.stat().st_size):
            raise UserError(f"{self.path}: entry {entry} claims {info.file_size} bytes, more than it can have")
        return self._zip.read(info)

    def _unpickle(self, data: bytes) -> Any:
        try:
            check_opcodes(data)
            return Unpickler(io.BytesIO(data)).load()
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from None
        except Exception as error:  # a hostile pickle can fail in any way; all that matters is that it is refused
            raise UserError(f"{self.path}: not a pickle that torch writes: {type(error).__name__}: {one_line(error)}") from None


def one_line(error: BaseException) -> str:
    """The beginning of what an error says; a damaged file may have put anything into it."""
    return " ".join(str(error).split())[:200]


def _naturals(values: Any) -> bool:
    return isinstance(values, tuple | list) and all(type(v) is int and 0 <= v < 2**62 for v in values)


def save(path: str | Path, contents: Mapping[str, Any]) -> None:
    """Writes a mapping of NumPy arrays and plain data as a ``.pt`` file that ``torch.load(weights_only=True)`` reads.

    Args:
      path: written in place; callers that need atomicity write to a temporary name and rename.
      contents: nested mappings (written as dict, or OrderedDict where they are one), lists, tuples, text, numbers, None,
        bool, and arrays of the dtypes that torch has storages for.

    Raises:
      UserError: a value that cannot be written.
    """
    pickler = _Pickler()
    pickler.write(contents)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:

        def put(name: str, data) -> None:
            # a fixed date makes equal contents equal files
            archive.writestr(zipfile.ZipInfo(f"archive/{name}", (1980, 1, 1, 0, 0, 0)), data)

        put("data.pkl", b"\x80\x02" + bytes(pickler.out) + b".")
        put("byteorder", b"little")
        for i, array in enumerate(pickler.arrays):
            put(f"data/{i}", array.reshape(-1).view(np.uint8).data)
        put("version", b"3\n")


class _Pickler:
    """Emits pickle protocol 2 for plain data and tensors; the standard pickler would have to import torch for its names."""

    def __init__(self):
        self.out, self.arrays = bytearray(), []

    def write(self, value: Any) -> None:
        out = self.out
        if value is None:
            out += b"N"
        elif value is True or value is False:
            out += b"\x88" if value else b"\x89"
        elif isinstance(value, np.ndarray | np.generic):
            self._tensor(np.asarray(value))
        elif isinstance(value, int) and -(2**31) <= value < 2**31:
            out += b"J" + struct.pack("<i", value)
        elif isinstance(value, int):
            data = pickle.encode_long(value)
            out += b"\x8a" + bytes([len(data)]) + data
        elif isinstance(value, float):
            out += b"G" + struct.pack(">d", value)
        elif isinstance(value, str):
            data = value.encode()
            out += b"X" + struct.pack("<I", len(data)) + data
        elif isinstance(value, Mapping):
            if isinstance(value, OrderedDict):
                out += b"ccollections\nOrderedDict\n)R"
            else:
                out += b"}"
            out += b"("
            for key, entry in value.items():
                self.write(key)
                self.write(entry)
            out += b"u"
        elif isinstance(value, list | tuple):
            out += b"](" if isinstance(value, list) else b"("
            for entry in value:
                self.write(entry)
            out += b"e" if isinstance(value, list) else b"t"
        else:
            raise UserError(f"cannot write {type(value).__name__} into a .pt file: only arrays and plain data")

    def _tensor(self, array: np.ndarray) -> None:
        if array.dtype not in _STORAGE_NAMES:
            raise UserError(f"cannot write an array of {array.dtype} into a .pt file")
        shape = array.shape
        array = np.ascontiguousarray(array)
        stride = [1] * len(shape)
        for i in range(len(shape) - 2, -1, -1):
            stride[i] = stride[i + 1] * max(shape[i + 1], 1)
        self.out += b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\n" + _STORAGE_NAMES[array.dtype].encode() + b"\n"
        for part in (str(len(self.arrays)), "cpu", array.size):
            self.write(part)
        self.out += b"tQ"
        for argument in (0, tuple(shape), tuple(stride), False, OrderedDict()):
            self.write(argument)
        self.out += b"tR"
        self.arrays.append(array)
