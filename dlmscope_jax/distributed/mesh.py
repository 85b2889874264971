"""Meshes, and how named dimensions of arrays are laid out on them.

A mesh has the axes ``("data", "model")``, with ``"replica"`` before them where there are several slices. Rows of batches and
sequences are divided over ``replica`` and ``data``; over ``model`` lie what one device cannot hold: latents, heads, MLP neurons, the
vocabulary. The weights of a language model are divided over ``data`` as well. Each weight names its dimensions where it is declared;
``RULES`` is the only place that says which mesh axis a name goes to.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dlmscope_jax.errors import UserError

Logical = tuple[str | None, ...]  # the names of an array's dimensions; None is never divided

RULES: dict[str, str | None] = {
    # of language models
    "vocab": "model",
    "heads": "model",
    "kv_heads": "model",
    "mlp": "model",
    "embed": "data",
    "layer": None,
    # of dictionaries
    "latent": "model",
    "entry": None,
}
# these stay whole where the mesh does not divide them: vocabularies such as GPT-2's 50,257
MAY_STAY_WHOLE = ("vocab",)


def make_mesh(data: int | None = None, model: int = 1, replica: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh ``("data", "model")`` over all devices, or ``("replica", "data", "model")``.

    Devices of one process lie side by side along ``model`` first. Where the devices are of several slices (TPU slices that only a data
    centre's network joins), ``replica`` runs over the slices, and with ``replica=1`` it is set to their number.

    Args:
      data: parts of the rows within a replica; None: whatever remains.
      model: parts of the latents and of the model's width.
      replica: copies of the whole, each with rows of its own.
      devices: default all, of all processes.

    Raises:
      UserError: sizes that do not multiply to the number of devices, or do not fit the slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1 and replica == 1:
        replica = slices
    for name, size in (("data", data), ("model", model), ("replica", replica)):
        if size is not None and size < 1:
            raise UserError(f"mesh: {name} = {size} must be at least 1")
    if data is None:
        if len(devices) % (model * replica):
            asked = f"{f'replica {replica} x ' if replica > 1 else ''}model {model}"
            raise UserError(f"mesh: {asked} does not divide the {len(devices)} devices that there are: use a divisor of {len(devices)}")
        data = len(devices) // (model * replica)
    if replica * data * model != len(devices):
        asked = f"{f'replica {replica} x ' if replica > 1 else ''}data {data} x model {model}"
        raise UserError(f"mesh: {asked} is for {replica * data * model} devices, there are {len(devices)}: leave data out to use all")
    if slices > 1:
        if replica % slices:
            raise UserError(f"mesh: replica = {replica} must be a multiple of the {slices} slices that the devices are in")
        from jax.experimental import mesh_utils

        array = mesh_utils.create_hybrid_device_mesh(
            (replica // slices, data, model), (slices, 1, 1), devices, allow_split_physical_axes=True
        )
    elif devices[0].platform == "tpu":
        from jax.experimental import mesh_utils

        array = mesh_utils.create_device_mesh((replica, data, model), devices, allow_split_physical_axes=True)
    else:
        array = np.asarray(devices).reshape(replica, data, model)
    if replica == 1:
        return Mesh(array[0], ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    return Mesh(array, ("replica", "data", "model"), axis_types=(AxisType.Auto,) * 3)


def row_axes(mesh: Mesh) -> tuple[str, ...]:
    """The mesh axes that divide rows, major first: ``("data",)`` or ``("replica", "data")``."""
    return tuple(axis for axis in ("replica", "data") if axis in mesh.axis_names)


def row_parts(mesh: Mesh) -> int:
    """Into how many parts rows are divided."""
    return math.prod(mesh.shape[axis] for axis in row_axes(mesh))


def row_sharding(mesh: Mesh) -> NamedSharding:
    """How a batch [B, ...] lies on a mesh: divided along its first dimension, the same on all of ``model``."""
    return NamedSharding(mesh, PartitionSpec(row_axes(mesh)))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def local_rows(mesh: Mesh) -> tuple[int, int]:
    """``(index, count)``: this process holds part ``index`` of ``count`` equal parts of the rows of every batch.

    Processes that share their rows, because ``model`` runs over several of them, have the same part.

    Raises:
      UserError: this process holds no one stretch of the rows.
    """
    parts = row_parts(mesh)
    here = jax.process_index()
    rows = mesh.devices.reshape(parts, -1)
    mine = [i for i, row in enumerate(rows) if any(device.process_index == here for device in row)]
    n = len(mine)
    if not n or mine != list(range(mine[0], mine[0] + n)) or parts % n or mine[0] % n:
        raise UserError(
            f"mesh: process {here} holds the parts {mine} of {parts} parts of the rows, which is no one stretch of equal size: "
            "choose model so that it divides the devices of a process, or is a multiple of them"
        )
    return mine[0] // n, parts // n


def to_global(rows: Any, mesh: Mesh) -> Any:
    """Makes batches out of the parts that the processes hold: a tree of local arrays [B / count, ...] -> global ones [B, ...]."""
    sharding, (_, count) = row_sharding(mesh), local_rows(mesh)
    return jax.tree.map(lambda part: jax.make_array_from_process_local_data(sharding, part, (count * len(part), *part.shape[1:])), rows)


def partition_specs(axes: Mapping[str, Logical], arrays: Any, mesh: Mesh, rules: Mapping[str, str | None] = RULES) -> Any:
    """The ``PartitionSpec`` of every array of a tree.

    Args:
      axes: the dimensions' names of each array, by the last key of its path.
      arrays: a tree of dicts of arrays or shapes.
      mesh: a rule whose mesh axis it does not have divides nothing.
      rules: from a dimension's name to a mesh axis.

    Raises:
      UserError: an array whose dimensions have no names, or the wrong number of them; a name without a rule; two dimensions on one mesh
        axis; a dimension that the mesh does not divide.
    """

    def spec(path: tuple, leaf: Any) -> PartitionSpec:
        where = f"parameter {jax.tree_util.keystr(path)}"
        names = axes.get(path[-1].key)
        if names is None:
            raise UserError(f"{where} has no declared axes")
        if len(names) != len(leaf.shape):
            raise UserError(f"{where} has {len(leaf.shape)} dimensions and {len(names)} declared axes ({names})")
        placed: list[str | None] = []
        for size, name in zip(leaf.shape, names, strict=True):
            if name is not None and name not in rules:
                raise UserError(f"{where}: there is no rule for the axis {name!r}: one of {', '.join(rules)}")
            axis = None if name is None else rules[name]
            if axis is None or axis not in mesh.axis_names or (name in MAY_STAY_WHOLE and size % mesh.shape[axis]):
                placed.append(None)
                continue
            if axis in placed:
                raise UserError(f"{where}: two of its dimensions {names} would lie on the mesh axis {axis!r}: change one of the rules")
            if size % mesh.shape[axis]:
                raise UserError(f"{where}: dimension {size} ({name}) is not divisible by mesh axis {axis!r} of {mesh.shape[axis]}")
            placed.append(axis)
        return PartitionSpec(*placed)

    return jax.tree.map_with_path(spec, arrays)
