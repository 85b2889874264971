"""From the section ``mesh`` of a configuration to the mesh of a run."""

from collections.abc import Sequence
from typing import Any

import jax

from dlmscope_jax import distributed

from .configs import Mesh


def mesh_of(section: Mesh, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh | None:
    """The mesh that a run divides its work over; None where that is one device.

    Args:
      section: sizes; a process alone uses only as many of its devices as they ask for.
      devices: default all, of all processes.

    Raises:
      UserError: sizes that the devices do not have.
    """
    here = devices is None
    devices = list(jax.devices() if devices is None else devices)
    if section.parallel == "jit":
        return None
    if here and section.data is not None and jax.process_count() == 1:
        devices = devices[: section.data * section.model * section.replica]
    if len(devices) == 1 and section.data in (None, 1) and section.model == section.replica == 1:
        return None
    return distributed.make_mesh(section.data, section.model, section.replica, devices)
