"""How a language model is laid out on a mesh: logical axes of every weight, and one table from them to mesh axes."""

from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from dlmscope_jax.errors import UserError

AXES: dict[str, tuple[str | None, ...]] = {
    "embed": ("vocab", "embed"),
    "positions": (None, "embed"),
    "head": ("vocab", "embed"),
    "head_bias": ("vocab",),
    "final_norm": ("embed",),
    "final_norm_bias": ("embed",),
    "sigma_in": (None, None),
    "sigma_in_bias": (None,),
    "sigma_out": (None, None),
    "sigma_out_bias": (None,),
    "final_adaln": (None, "embed"),
    "final_adaln_bias": ("embed",),
    "attn_norm": ("layer", "embed"),
    "attn_norm_bias": ("layer", "embed"),
    "attn_post_norm": ("layer", "embed"),
    "mlp_norm": ("layer", "embed"),
    "mlp_norm_bias": ("layer", "embed"),
    "mlp_post_norm": ("layer", "embed"),
    "adaln": ("layer", None, "embed"),
    "adaln_bias": ("layer", "embed"),
    "q_norm": ("layer", None),
    "k_norm": ("layer", None),
    "q": ("layer", "embed", "heads"),
    "k": ("layer", "embed", "kv_heads"),
    "v": ("layer", "embed", "kv_heads"),
    "o": ("layer", "heads", "embed"),
    "q_bias": ("layer", "heads"),
    "k_bias": ("layer", "kv_heads"),
    "v_bias": ("layer", "kv_heads"),
    "o_bias": ("layer", "embed"),
    "gate_bias": ("layer", "mlp"),
    "up_bias": ("layer", "mlp"),
    "down_bias": ("layer", "embed"),
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
      UserError: for a parameter without declared axes, or a dimension other than the vocabulary that the mesh does not divide.
    """

    def spec(path: tuple, leaf: Any) -> PartitionSpec:
        name = path[-1].key
        if name not in AXES:
            raise UserError(f"parameter {jax.tree_util.keystr(path)} has no declared axes")
        placed: tuple[str | None, ...] = tuple(RULES.get(axis) if RULES.get(axis) in mesh.axis_names else None for axis in AXES[name])
        # a vocabulary such as GPT-2's 50,257 stays whole where it cannot be divided
        whole = [AXES[name][i] == "vocab" and axis is not None and leaf.shape[i] % mesh.shape[axis] for i, axis in enumerate(placed)]
        placed = tuple(None if keep else axis for axis, keep in zip(placed, whole, strict=True))
        for size, axis in zip(leaf.shape, placed, strict=True):
            if axis is not None and size % mesh.shape[axis]:
                where = jax.tree_util.keystr(path)
                raise UserError(f"parameter {where}: dimension {size} is not divisible by mesh axis {axis!r} of {mesh.shape[axis]}")
        return PartitionSpec(*placed)

    return jax.tree.map_with_path(spec, params)
