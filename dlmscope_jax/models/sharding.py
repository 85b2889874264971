"""How a language model is laid out on a mesh: logical axes of every weight, and one table from them to mesh axes."""

from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from dlmscope_jax.errors import UserError

AXES: dict[str, tuple[str | None, ...]] = {
    "embed": ("vocab", "embed"),
    "head": ("vocab", "embed"),
    "final_norm": ("embed",),
    "attn_norm": ("layer", "embed"),
    "mlp_norm": ("layer", "embed"),
    "q": ("layer", "embed", "heads"),
    "k": ("layer", "embed", "kv_heads"),
    "v": ("layer", "embed", "kv_heads"),
    "o": ("layer", "heads", "embed"),
    "q_bias": ("layer", "heads"),
    "k_bias": ("layer", "kv_heads"),
    "v_bias": ("layer", "kv_heads"),
    "gate": ("layer", "embed", "mlp"),
    "up": ("layer", "embed", "mlp"),
    "down": ("layer", "mlp", "embed"),
}
RULES = {"vocab": "model", "heads": "model", "kv_heads": "model", "mlp": "model", "embed": "data", "layer": None}


def partition_specs(params: Any, mesh: Mesh) -> Any:
    """The ``PartitionSpec`` of every parameter: tensor-parallel over ``model``, fully sharded over ``data``.

    Args:
      params: a tree of arrays or shapes, as inside ``{"params": ...}``.
      mesh: has the axes ``data`` and ``model``.

    Raises:
      UserError: for a parameter without declared axes, or a dimension that the mesh does not divide.
    """

    def spec(path: tuple, leaf: Any) -> PartitionSpec:
        name = path[-1].key
        if name not in AXES:
            raise UserError(f"parameter {jax.tree_util.keystr(path)} has no declared axes")
        placed = tuple(RULES[axis] if RULES[axis] in mesh.axis_names else None for axis in AXES[name])
        for size, axis in zip(leaf.shape, placed, strict=True):
            if axis is not None and size % mesh.shape[axis]:
                where = jax.tree_util.keystr(path)
                raise UserError(f"parameter {where}: dimension {size} is not divisible by mesh axis {axis!r} of {mesh.shape[axis]}")
        return PartitionSpec(*placed)

    return jax.tree.map_with_path(spec, params)
