"""One-bit codes on disk: eight latents a byte, the first in the lowest bit.

A file is a safetensors file with the bytes, ``bits`` [rows, ceil(N / 8)], and with ``width`` and the bytes' SHA-256 in its header.
"""

import hashlib
from pathlib import Path

import numpy as np
from jaxtyping import Bool, UInt8

from dlmscope_jax.errors import UserError

from .files import write_whole


def pack_bits(values: Bool[np.ndarray, "*batch N"]) -> UInt8[np.ndarray, "*batch bytes"]:
    """Eight bits a byte along the last axis; the last byte is filled up with zeros."""
    return np.packbits(np.asarray(values, bool), axis=-1, bitorder="little")


def unpack_bits(packed: UInt8[np.ndarray, "*batch bytes"], width: int) -> Bool[np.ndarray, "*batch N"]:
    """The inverse of ``pack_bits`` for ``width`` latents.

    Raises:
      UserError: bytes that are not those of so many latents.
    """
    packed = np.asarray(packed, np.uint8)
    if packed.shape[-1] != -(-width // 8):
        raise UserError(f"unpack_bits: {width} latents are {-(-width // 8)} bytes a row, got {packed.shape}")
    return np.unpackbits(packed, axis=-1, count=width, bitorder="little").astype(bool)


def save_bits(path: str | Path, values: Bool[np.ndarray, "rows N"]) -> None:
    """Writes codes (``Bits.values``), whole or not at all.

    Raises:
      UserError: an array that is not [rows, N] bool, a disk that is full.
    """
    import safetensors.numpy

    values = np.asarray(values)
    if values.ndim != 2 or values.dtype != bool:
        raise UserError(f"{path}: codes must be [rows, width] bool, got {list(values.shape)} {values.dtype}")
    packed = pack_bits(values)
    header = {"width": str(values.shape[1]), "sha256": hashlib.sha256(packed.tobytes()).hexdigest()}
    write_whole(Path(path), lambda to: safetensors.numpy.save_file({"bits": packed}, str(to), metadata=header))


def load_bits(path: str | Path) -> Bool[np.ndarray, "rows N"]:
    """Reads what ``save_bits`` wrote.

    Raises:
      UserError: no such file, one that is damaged or holds something else.
    """
    import safetensors

    if not Path(path).is_file():
        raise UserError(f"{path}: no such file of packed codes")
    try:
        with safetensors.safe_open(str(path), framework="numpy") as file:
            header, packed = file.metadata() or {}, file.get_tensor("bits") if "bits" in file.keys() else None
    except safetensors.SafetensorError as error:
        raise UserError(f"{path}: not a file of packed codes: {error}") from None
    width = header.get("width", "")
    if packed is None or packed.dtype != np.uint8 or packed.ndim != 2 or not (width.isdecimal() and len(width) < 20):
        raise UserError(f"{path}: not a file of packed codes: it should hold 'bits', [rows, bytes] uint8, and its width")
    if hashlib.sha256(packed.tobytes()).hexdigest() != header.get("sha256"):
        raise UserError(f"{path}: its bits do not have the SHA-256 in its header: damaged")
    return unpack_bits(packed, int(width))
