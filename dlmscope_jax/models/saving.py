"""Writing models as ordinary Hugging Face folders, in the layout of their family; the inverse of loading."""

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import jax
import numpy as np

from dlmscope_jax.errors import UserError

from .families import Tensor, family_of
from .transformer import Transformer
from .weights import DTYPES, INDEX, WEIGHTS

_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def save_model(folder: str | os.PathLike, model: Transformer, params: dict, dtype: str = "bfloat16") -> None:
    """Writes ``config.json`` and ``model.safetensors`` in the family's own layout; the inverse of ``load_model``.

    One tensor at a time is brought to the host. A file appears under its name when it is complete.

    Args:
      dtype: ``"bfloat16"``, ``"float32"`` or ``"float16"``, on disk.

    Raises:
      UserError: for another dtype, folded weights (``process_weights``), or a folder that is a URL, cannot be written, or
        holds a model in several files.
    """
    if dtype not in _NAMES:
        raise UserError(f"dtype {dtype!r} is not supported: {', '.join(map(repr, _NAMES))}")
    if "://" in os.fspath(folder):
        raise UserError(f"{os.fspath(folder)!r}: a model is saved to a folder of this machine; copy it to the bucket from there")
    if model.config.weight_processing != "raw":
        raise UserError(
            f"{os.fspath(folder)}: a model folder says nothing of folded weights: save the raw ones and fold them after loading"
        )
    folder = Path(folder)
    if (folder / INDEX).exists():
        raise UserError(f"{folder} holds a model in several files ({INDEX}): save to another folder")
    family = family_of(model.config.family, str(folder))
    config = json.dumps(family.write(model.config, model.diffusion) | {"torch_dtype": dtype}, indent=2) + "\n"
    table = family.tensors(model.config)
    flat = {tuple(key.key for key in path): leaf for path, leaf in jax.tree.leaves_with_path(params["params"])}
    stored: dict[str, list[tuple[Tensor, jax.Array, int | None]]] = {}  # a file's tensor -> the arrays that lie in it
    for path, tensor in table.items():
        for layer in range(len(flat[path])) if path[0] == "blocks" else [None]:
            stored.setdefault(tensor.name.format(layer=layer), []).append((tensor, flat[path], layer))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _whole(folder / WEIGHTS) as file:
            _write_header(file, stored, _NAMES[dtype])
            for name in sorted(stored):
                file.write(_assembled(stored[name], np.dtype(DTYPES[_NAMES[dtype]])).reshape(-1).view(np.uint8).data)
        with _whole(folder / "config.json") as file:
            file.write(config.encode())
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror or error}") from error


@contextmanager
def _whole(path: Path) -> Iterator[BinaryIO]:
    """A file that appears under its name when all of it is written, and not at all when that fails."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            yield file
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _write_header(file: BinaryIO, stored: dict, dtype: str) -> None:
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in sorted(stored):
        tensor, array, layer = stored[name][0]
        shape = tensor.stored_shape(array.shape if layer is None else array.shape[1:])
        after = at + math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, after]}
        at = after
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)


def _assembled(parts: list[tuple[Tensor, jax.Array, int | None]], dtype: np.dtype) -> np.ndarray:
    """A tensor as the file holds it, from the arrays that share it."""
    out = None
    for tensor, array, layer in parts:
        value = np.asarray(array if layer is None else array[layer])
        value = value.T if tensor.transposed else value
        if tensor.fused is None:
            return np.ascontiguousarray(value.astype(dtype))
        if out is None:
            out = np.empty(tensor.stored_shape(value.T.shape if tensor.transposed else value.shape), dtype)
        # the output axis goes first in both
        into, rows = (out, value) if tensor.transposed or value.ndim == 1 else (out.T, value.T)
        at = 0
        for start, stop in tensor.fused.runs(0, len(rows)):
            into[start:stop] = rows[at : at + stop - start]
            at += stop - start
    return out
