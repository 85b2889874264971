"""How a language model is laid out on a mesh: the names of every weight's dimensions (``distributed.RULES`` places them)."""

from typing import Any

from jax.sharding import Mesh

from dlmscope_jax import distributed

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


def partition_specs(params: Any, mesh: Mesh) -> Any:
    """The ``PartitionSpec`` of every parameter: tensor-parallel over ``model``, fully sharded over ``data``, whole in each ``replica``.

    Args:
      params: a tree of arrays or shapes, as inside ``{"params": ...}``.
      mesh: has the axes ``data`` and ``model``, and may have ``replica``.

    Raises:
      UserError: for a parameter without declared axes, or a dimension other than the vocabulary that the mesh does not divide.
    """
    return distributed.partition_specs(AXES, params, mesh)
