"""Meshes over devices, and processes that work together."""

from .mesh import (
    MAY_STAY_WHOLE,
    RULES,
    Logical,
    local_rows,
    make_mesh,
    partition_specs,
    replicated,
    row_axes,
    row_parts,
    row_sharding,
    to_global,
)

__all__ = [
    "MAY_STAY_WHOLE",
    "RULES",
    "Logical",
    "local_rows",
    "make_mesh",
    "partition_specs",
    "replicated",
    "row_axes",
    "row_parts",
    "row_sharding",
    "to_global",
]
