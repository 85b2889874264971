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
from .processes import barrier, broadcast, end, gather, is_first, on_first, preemption, start, to_host, together

__all__ = [
    "MAY_STAY_WHOLE",
    "RULES",
    "Logical",
    "barrier",
    "broadcast",
    "end",
    "gather",
    "is_first",
    "local_rows",
    "make_mesh",
    "on_first",
    "partition_specs",
    "preemption",
    "replicated",
    "row_axes",
    "row_parts",
    "row_sharding",
    "start",
    "to_global",
    "to_host",
    "together",
]
