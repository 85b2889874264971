"""The tensors of a model's safetensors files: headers, checked before anything is believed, and parts of tensors by byte range.

A file is eight bytes with the length of its header, the header (JSON: name -> dtype, shape, first and last byte) and the data,
little-endian, row by row, without holes.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from dlmscope_jax.errors import UserError

from .folders import LocalFolder, RemoteFolder

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F64": np.float64}  # what weights may be
_OTHERS = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "I32": 4, "U32": 4, "I64": 8, "U64": 8, "C64": 8}
_SIZES = {name: np.dtype(dtype).itemsize for name, dtype in DTYPES.items()} | _OTHERS
_LONGEST = 100_000_000  # bytes of a header, the format's own limit
_BLOCK = 8 << 20  # bytes read at once where what lies between two ranges is read along

Runs = Sequence[tuple[int, int]]  # ranges, start and stop


@dataclass(frozen=True)
class Stored:
    """A tensor of a file: ``start`` is its first byte, ``dtype`` as the format spells it."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int


class Weights:
    """The tensors of a folder, by name.

    Attributes:
      tensors: name -> where it lies.
      header_bytes: how many bytes were read to know that; ``folder.bytes_read`` goes on counting.
    """

    def __init__(self, folder: LocalFolder | RemoteFolder):
        """Reads the headers of all files. Raises ``UserError`` for a file that is missing, damaged or names a tensor twice."""
        self.folder = folder
        self.tensors: dict[str, Stored] = {}
        before = folder.bytes_read
        for file in _files(folder):
            for name, stored in _header(folder, file).items():
                if name in self.tensors:
                    raise UserError(f"{folder.where}: {name} is in both {self.tensors[name].file} and {file}")
                self.tensors[name] = stored
        self.header_bytes = folder.bytes_read - before

    def itemsize(self, name: str) -> int:
        """Bytes of one element of a tensor."""
        return _SIZES[self.tensors[name].dtype]

    def read(self, name: str, rows: Runs, columns: Runs) -> np.ndarray:
        """Rows and columns of a tensor ``[R, C]``, in its own dtype; one of one axis is a single column ``[R, 1]``.

        Whole rows that lie together are one read. Of parts of rows, each is a read of its own unless no more than
        ``folder.gap`` bytes lie between one and the next: then those are read along and left out.
        """
        stored = self.tensors[name]
        dtype = np.dtype(DTYPES[stored.dtype])
        width = math.prod(stored.shape[1:])
        rows, columns = _joined(rows), _joined(columns)
        out = np.empty((_length(rows), _length(columns)), dtype)
        whole = columns == [(0, width)]
        near = max([width - columns[-1][1] + columns[0][0], *(b - a for (_, a), (b, _) in zip(columns, columns[1:], strict=False))])
        at = 0
        for first, last in rows:
            into = out[at : at + last - first]
            at += last - first
            if whole:
                self._fill(stored, first * width, into)
            elif near * dtype.itemsize <= self.folder.gap:
                self._sift(stored, width, first, columns, into)
            else:
                for row, line in enumerate(into, first):
                    for place, (left, _) in _places(columns):
                        self._fill(stored, row * width + left, line[place])
        return out

    def _sift(self, stored: Stored, width: int, first: int, columns: Runs, out: np.ndarray) -> None:
        """Rows from ``first`` on, from the first wanted column of each block of rows to the last."""
        left, right = columns[0][0], columns[-1][1]
        step = max(1, _BLOCK // (width * out.itemsize))
        for at in range(0, len(out), step):
            into = out[at : at + step]
            block = np.empty((len(into), width), out.dtype)
            self._fill(stored, (first + at) * width + left, block.reshape(-1)[: (len(into) - 1) * width + right - left])
            for place, (a, b) in _places(columns):
                into[:, place] = block[:, a - left : b - left]

    def _fill(self, stored: Stored, element: int, out: np.ndarray) -> None:
        self.folder.read_into(stored.file, stored.start + element * out.itemsize, out.reshape(-1).view(np.uint8))


def _joined(runs: Runs) -> list[tuple[int, int]]:
    """The same ranges, those that touch made one."""
    out: list[tuple[int, int]] = []
    for start, stop in runs:
        if out and out[-1][1] == start:
            out[-1] = (out[-1][0], stop)
        else:
            out.append((start, stop))
    return out


def _length(runs: Runs) -> int:
    return sum(stop - start for start, stop in runs)


def _places(runs: Runs) -> Iterator[tuple[slice, tuple[int, int]]]:
    """Each range with its place when they are put one after another."""
    at = 0
    for start, stop in runs:
        yield slice(at, at := at + stop - start), (start, stop)


def _files(folder: LocalFolder | RemoteFolder) -> list[str]:
    """The files that hold the tensors: those of the index, or the one file, or whatever there is."""
    raw = folder.read(INDEX)
    if raw is None:
        names = [name for name in folder.names() if name.endswith(".safetensors")]
        if not names:
            raise UserError(f"{folder.where} holds no .safetensors file")
        return [WEIGHTS] if WEIGHTS in names else names
    try:
        names = sorted(set(json.loads(raw)["weight_map"].values()))
        if not all(name.endswith(".safetensors") and "/" not in name for name in names) or not names:
            raise ValueError("a name of no file")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{folder.where}/{INDEX} is damaged: it should map tensor names to .safetensors files under weight_map") from None
    for name in names:
        if not folder.holds(name, 1):
            raise UserError(f"{folder.where}: {name} is named by {INDEX} but is not there")
    return names


def _header(folder: LocalFolder | RemoteFolder, file: str) -> dict[str, Stored]:
    """The tensors of a file. Nothing is allocated and nothing read further before the sizes that it claims are known to be true."""

    def damaged(why: str) -> UserError:
        return UserError(f"{folder.where}/{file} is damaged or not a safetensors file: {why}")

    if not folder.holds(file, 10):
        raise damaged("it is shorter than the shortest header")
    length = np.zeros(8, np.uint8)
    folder.read_into(file, 0, length)
    size = int(length.view("<u8")[0])
    if size > _LONGEST or not folder.holds(file, 8 + size):
        raise damaged(f"its header claims {size} bytes")
    raw = np.empty(size, np.uint8)
    folder.read_into(file, 8, raw)
    try:
        entries = json.loads(raw.tobytes(), object_pairs_hook=_no_doubles)
        entries.pop("__metadata__", None)
        tensors = {name: _entry(file, name, entry, 8 + size) for name, entry in entries.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise damaged(f"its header does not make sense ({' '.join(str(error).split())[:200]})") from None
    end = 8 + size
    for name, stored in sorted(tensors.items(), key=lambda item: (item[1].start, math.prod(item[1].shape))):
        if stored.start != end:
            raise damaged(f"{name} begins at byte {stored.start}, not at {end} where the one before ends")
        end += math.prod(stored.shape) * _SIZES[stored.dtype]
    if not folder.holds(file, end):
        raise damaged(f"it ends before byte {end}, where its last tensor ends")
    return tensors


def _entry(file: str, name: str, entry: Any, base: int) -> Stored:
    dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in _SIZES:
        raise ValueError(f"{name} has dtype {dtype!r}")
    if not all(type(n) is int and n >= 0 for n in (*shape, start, stop)) or len(shape) > 8:
        raise ValueError(f"{name} has shape {shape} and bytes {start} to {stop}")
    if stop - start != math.prod(shape) * _SIZES[dtype]:
        raise ValueError(f"{name} has {stop - start} bytes for a shape of {shape} in {dtype}")
    return Stored(file, dtype, tuple(shape), base + start)


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a name stands there twice")
    return dict(pairs)
