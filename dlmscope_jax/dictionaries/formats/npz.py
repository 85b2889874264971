"""The arrays of NumPy's ``.npz`` files, read without ``np.load``: sizes are checked first, pickled objects are refused."""

import io
import math
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from dlmscope_jax.errors import UserError

from .bare_pickle import MAX_GROWTH, SLACK
from .tensors import Tensors
from .torch_pickle import one_line

_HEADER = 64 * 1024  # far longer than the header of any array


@contextmanager
def open_npz(path: Path) -> Iterator[Tensors]:
    """The arrays of an ``.npz`` file, none of them read yet.

    Raises:
      UserError: no such file, damaged or cut short, arrays of objects, sizes that do not fit the bytes, an entry that unfolds to more
        than eight times its size.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            if len(entries) != len(archive.infolist()):
                raise UserError(f"{path}: holds several arrays of one name")
            described = {name: _describe(path, archive, info) for name, info in entries.items()}

            def get(name: str) -> np.ndarray:
                shape, fortran, dtype, start = described[name]
                with archive.open(entries[name]) as file:
                    flat = np.frombuffer(file.read(entries[name].file_size), np.uint8)
                return flat[start:].view(dtype).reshape(shape, order="F" if fortran else "C")

            yield Tensors(path, {name: shape for name, (shape, _, _, _) in described.items()}, get)
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError) as error:
        raise UserError(f"{path}: damaged, cut short or not an .npz file: {one_line(error)}") from None


def _describe(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Shape, order, dtype and where the values start, which must fill the rest of the entry."""

    def wrong(what: str) -> UserError:
        return UserError(f"{path}: entry {info.filename:.80} {what}")

    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise wrong("is compressed in a way that NumPy does not use")
    if info.compress_size > path.stat().st_size or info.file_size > MAX_GROWTH * info.compress_size + SLACK:
        raise wrong(f"claims {info.file_size} bytes in {info.compress_size}, which weights never do")
    with archive.open(info) as file:
        head = io.BytesIO(file.read(_HEADER))
    try:
        version = np.lib.format.read_magic(head)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"version {version}")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(head)
    except (ValueError, EOFError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise wrong(f"is not an array of NumPy: {one_line(error)}") from None
    if dtype.kind not in "fiub":
        raise wrong(f"holds {'Python objects' if dtype.hasobject else dtype}, should hold floating-point numbers")
    if not all(type(n) is int and n >= 0 for n in shape):
        raise wrong("has an impossible shape")
    if math.prod(shape) * dtype.itemsize != info.file_size - head.tell():
        raise wrong(f"should hold {list(shape)} numbers of {dtype}, has {info.file_size - head.tell()} bytes")
    return shape, fortran, dtype, head.tell()
