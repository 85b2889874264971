"""Rows that somebody gives to a store: what is accepted, and what is wrong with the rest."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..errors import UserError
from .layout import DTYPES, row_dtype
from .manifest import Header

# The columns that a harvest writes; the same names in somebody's own rows mean the same.
COLUMNS = {
    "token": np.dtype(np.int32),  # what the model read at this position
    "original": np.dtype(np.int32),  # what stood there before the corruption
    "document": np.dtype(np.int32),  # index into the names of the blocks
    "position": np.dtype(np.int32),  # 0-based place in the block
    "block": np.dtype(np.int32),  # index of the block
    "rate": np.dtype(np.float32),  # corruption rate of the block, 0 where clean
    "is_masked": np.dtype(np.bool_),  # the model read a mask here
    "predicts_masked": np.dtype(np.bool_),  # the model predicts a masked token from here (one to the left where logits are shifted)
}
_NAME_CHARACTERS = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.@-")


def check_sites(sites: Mapping[str, int], dtype: str) -> None:
    """Raises ``UserError`` unless a store can have these sites and this dtype."""
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} cannot be stored: use one of {', '.join(DTYPES)}")
    if not sites:
        raise UserError('an activation store needs at least one site, such as {"resid_post@5": 192}')
    for site, width in sites.items():
        if not _is_name(site):
            raise UserError(f"site name {site!r}: use letters, digits and _ . @ - only")
        if not isinstance(width, (int, np.integer)) or width < 1:
            raise UserError(f"site {site!r} has width {width!r}: it must be a positive integer")


def checked_columns(columns: Mapping[str, Any], sites: Mapping[str, int]) -> dict[str, str]:
    """The columns of a header; ``UserError`` where one cannot be stored."""
    for name, dtype in columns.items():
        if not _is_name(name):
            raise UserError(f"column name {name!r}: use letters, digits and _ . @ - only")
        if name in sites:
            raise UserError(f"column {name!r} has the name of a site: choose another one")
        if np.dtype(dtype).kind not in "biuf" or np.dtype(dtype).itemsize > 8:
            raise UserError(f"column {name!r} has dtype {np.dtype(dtype)}: columns hold booleans, integers or floats")
    return {name: np.dtype(dtype).name for name, dtype in columns.items()}


def ready_rows(rows: Mapping[str, Any], header: Header, shown: str) -> dict[str, np.ndarray]:
    """The rows of each site as arrays [n, D] of the store's row dtype."""
    if set(rows) != set(header.sites):
        raise UserError(f"append got the sites {listed(rows)}, the store at {shown} has {listed(header.sites)}")
    ready: dict[str, np.ndarray] = {}
    n = None
    for site, width in header.sites.items():
        values = _array(rows[site], f"site {site!r}")
        # bfloat16 is of kind V for NumPy
        if values.dtype.kind != "f" and values.dtype != DTYPES["bfloat16"]:
            raise UserError(f"site {site!r} got rows of dtype {values.dtype}: activations are floats")
        if values.ndim != 2 or values.shape[1] != width:
            raise UserError(f"site {site!r} got rows of shape {values.shape}: it must be [n, {width}]")
        n = len(values) if n is None else n
        if len(values) != n:
            raise UserError(f"site {site!r} got {len(values)} rows where the first site got {n}: all sites need the same number")
        ready[site] = values.astype(row_dtype(header.dtype), copy=False)
    return ready


def column_arrays(columns: Mapping[str, Any], n: int) -> dict[str, np.ndarray]:
    """The columns as arrays [n]."""
    arrays = {name: _array(values, f"column {name!r}") for name, values in columns.items()}
    for name, values in arrays.items():
        if values.shape != (n,):
            raise UserError(f"column {name!r} has shape {values.shape}: it must be [{n}], one entry for each row")
    return arrays


def column_dtypes(arrays: Mapping[str, np.ndarray]) -> dict[str, np.dtype]:
    """The dtypes that the first rows decide: those of the harvest's columns, and what the others came with."""
    return {name: COLUMNS.get(name, values.dtype.newbyteorder("=")) for name, values in arrays.items()}


def ready_columns(arrays: Mapping[str, np.ndarray], header: Header, shown: str) -> dict[str, np.ndarray]:
    """The columns in their stored dtypes."""
    known = header.columns or {}
    if set(arrays) != set(known):
        raise UserError(f"append got the columns {listed(arrays)}, the store at {shown} has {listed(known)}")
    ready = {}
    for name, values in arrays.items():
        dtype = np.dtype(known[name])
        if not _fits(values, dtype):
            raise UserError(f"column {name!r} got {values.dtype} values that do not fit its dtype {dtype}")
        ready[name] = values.astype(dtype)
    return ready


def listed(names: Any) -> str:
    """Names for a message."""
    return ", ".join(sorted(names)) or "none"


def _is_name(name: str) -> bool:
    return bool(name) and not set(name) - _NAME_CHARACTERS and not name.startswith(".")


def _array(values: Any, what: str) -> np.ndarray:
    try:
        found = np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{what} cannot be made a NumPy array ({error}): give floats that NumPy knows, such as float32") from error
    if found.dtype == object:
        raise UserError(f"{what} is not a rectangular array of numbers")
    return found


def _fits(values: np.ndarray, dtype: np.dtype) -> bool:
    if "b" in (dtype.kind, values.dtype.kind):
        return values.dtype == dtype
    if dtype.kind in "iu":
        info = np.iinfo(dtype)
        return values.dtype.kind in "iu" and (not len(values) or (values.min() >= info.min and values.max() <= info.max))
    return values.dtype.kind in "iuf"
