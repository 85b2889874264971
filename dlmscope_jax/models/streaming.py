"""From the tensors of files to arrays on devices, a few megabytes at a time and no byte twice.

An array of ours is allocated where it will live, one buffer a device, and filled in place: a chunk of a layer's rows is read,
sent to the devices that hold it and written there by a donated update. No layer, let alone the stack of them, exists in host
memory. All devices of this process are filled together by one program, so there is one compilation for a shape of buffer; what
several devices hold alike is read once.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from .families import Tensor
from .weights import Runs, Weights

Region = tuple[tuple[int, int], ...]  # start and stop along every axis


class Part(NamedTuple):
    """The part of a file's tensor ``[R, C]`` that one device holds: ranges of rows and of columns, in our order."""

    rows: Runs
    columns: Runs


def part_of(tensor: Tensor, region: Region) -> Part:
    """Where a region of one of our arrays (without the layer axis) lies in the file; vectors lie along the rows."""
    spread = lambda run: (run,) if tensor.fused is None else tuple(tensor.fused.runs(*run))  # noqa: E731
    if len(region) == 1:
        return Part(spread(region[0]), ((0, 1),))
    if tensor.transposed:
        return Part(spread(region[1]), (region[0],))
    return Part((region[0],), spread(region[1]))


def chunks(weights: Weights, name: str, parts: Sequence[Part]) -> Iterator[tuple[int, list[np.ndarray]]]:
    """Reads parts of one tensor together, about ``folder.chunk`` bytes at a time; every part has the same number of rows.

    Parts that have their rows in common (the three of GPT-2's ``c_attn``, the devices of one column of a mesh) are served by one
    read of all columns that any of them needs. All chunks are equally long: the last one repeats rows of the one before it, which
    are kept, not read again.

    Yields:
      The first row of the chunk within the parts, and the rows of each part from there on, ``[r, C]``.
    """
    needed: dict[Runs, list[tuple[int, int]]] = {}
    for part in parts:
        needed[part.rows] = _union([*needed.get(part.rows, []), *part.columns])
    total = sum(stop - start for start, stop in parts[0].rows)
    width = sum(stop - start for columns in needed.values() for start, stop in columns)
    n_chunks = max(1, math.ceil(total * width * weights.itemsize(name) / weights.folder.chunk))
    step = math.ceil(total / n_chunks)
    held: dict[Runs, np.ndarray] = {}
    for start in range(0, total, step):
        begin = min(start, total - step)
        for rows, columns in needed.items():
            new = weights.read(name, _cut(rows, start, begin + step), columns)
            held[rows] = np.concatenate([held[rows][begin - start :], new]) if begin < start else new
        yield begin, [_select(held[part.rows], needed[part.rows], part.columns) for part in parts]


def load_arrays(
    weights: Weights,
    tensors: Sequence[Tensor],
    shapes: Sequence[tuple[int, ...]],
    shardings: Sequence[Sharding],
    stacked: bool,
    dtype: jnp.dtype,
) -> list[jax.Array]:
    """Arrays of ours that lie in the same tensors of the files, on their devices.

    Args:
      tensors: where each of them lies; all have the same name and, in the file, the same number of rows.
      shapes: their shapes, ``[L, ...]`` when ``stacked``: then layer ``l`` comes from the tensor whose name has that number.
      shardings: how each is laid out; the layer axis is whole on every device.
    """
    places = [sharding.addressable_devices_indices_map(shape) for sharding, shape in zip(shardings, shapes, strict=True)]
    devices = list(places[0])
    regions = [[_region(place[device], shape)[stacked:] for device in devices] for place, shape in zip(places, shapes, strict=True)]
    parts = [part_of(tensor, region) for tensor, of_devices in zip(tensors, regions, strict=True) for region in of_devices]
    mesh = Mesh(np.array(devices), ("device",), axis_types=(AxisType.Auto,))
    local = NamedSharding(mesh, PartitionSpec("device"))
    side_by_side = lambda one: (len(devices) * one[0], *one[1:])  # noqa: E731
    buffers = [
        jnp.zeros(side_by_side(sharding.shard_shape(shape)), dtype, device=local) for sharding, shape in zip(shardings, shapes, strict=True)
    ]
    for layer in range(shapes[0][0] if stacked else 1):
        for start, read in chunks(weights, tensors[0].name.format(layer=layer), parts):
            for i, tensor in enumerate(tensors):
                of_devices = read[i * len(devices) : (i + 1) * len(devices)]
                sent = jax.device_put([rows[:, 0] if len(regions[i][0]) == 1 else rows for rows in of_devices], devices)
                chunk = jax.make_array_from_single_device_arrays(side_by_side(sent[0].shape), local, sent)
                chunk = _turned(chunk, mesh) if tensor.transposed else chunk
                buffers[i] = write_rows(buffers[i], chunk, np.int32(layer), np.int32(start), mesh, stacked, -1 if tensor.transposed else 0)
            jax.block_until_ready(buffers)  # or chunks would pile up
    return [
        jax.make_array_from_single_device_arrays(shape, sharding, _of_devices(buffer, devices))
        for shape, sharding, buffer in zip(shapes, shardings, buffers, strict=True)
    ]


@functools.partial(jax.jit, donate_argnums=0, static_argnames=("mesh", "stacked", "axis"))
def write_rows(buffer: jax.Array, rows: jax.Array, layer: jax.Array, start: jax.Array, mesh: Mesh, stacked: bool, axis: int) -> jax.Array:
    """Writes rows, from ``start`` on along ``axis``, into one layer of the buffer of every device, in the buffer's own memory."""

    def write(buffer: jax.Array, rows: jax.Array, layer: jax.Array, start: jax.Array) -> jax.Array:
        at = [jnp.int32(0)] * rows.ndim
        at[axis] = start
        rows = rows.astype(buffer.dtype)
        rows, at = (rows[None], [layer, *at]) if stacked else (rows, at)
        if buffer.dtype != jnp.bfloat16:
            return jax.lax.dynamic_update_slice(buffer, rows, at)
        # as bits: the compiler for CPUs would carry the whole buffer to float32 and back
        bits = jax.lax.dynamic_update_slice(
            jax.lax.bitcast_convert_type(buffer, jnp.uint16), jax.lax.bitcast_convert_type(rows, jnp.uint16), at
        )
        return jax.lax.bitcast_convert_type(bits, jnp.bfloat16)

    each, same = PartitionSpec("device"), PartitionSpec()
    return jax.shard_map(write, mesh=mesh, in_specs=(each, each, same, same), out_specs=each)(buffer, rows, layer, start)


@functools.partial(jax.jit, static_argnames="mesh")
def _turned(rows: jax.Array, mesh: Mesh) -> jax.Array:
    """Every device's rows as columns; within ``write_rows`` the compiler for CPUs would do this element by element."""
    each = PartitionSpec("device")
    return jax.shard_map(jnp.transpose, mesh=mesh, in_specs=each, out_specs=each)(rows)


def _of_devices(buffer: jax.Array, devices: Sequence[jax.Device]) -> list[jax.Array]:
    of_device = {shard.device: shard.data for shard in buffer.addressable_shards}
    return [of_device[device] for device in devices]


def _region(index: tuple[slice, ...], shape: tuple[int, ...]) -> Region:
    return tuple(one.indices(size)[:2] for one, size in zip(index, shape, strict=True))


def _union(runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The ranges that cover these, in ascending order."""
    out: list[tuple[int, int]] = []
    for start, stop in sorted(runs):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(stop, out[-1][1]))
        else:
            out.append((start, stop))
    return out


def _cut(runs: Runs, start: int, stop: int) -> list[tuple[int, int]]:
    """The ranges that hold the elements ``start .. stop``, counted through all of them."""
    out, at = [], 0
    for a, b in runs:
        first, last = max(a, a + start - at), min(b, a + stop - at)
        if first < last:
            out.append((first, last))
        at += b - a
    return out


def _select(rows: np.ndarray, held: Runs, wanted: Runs) -> np.ndarray:
    """The wanted columns of rows that hold the columns ``held``."""
    pieces = []
    for start, stop in wanted:
        at = 0
        for a, b in held:
            if a <= start and stop <= b:
                pieces.append(rows[:, at + start - a : at + stop - a])
            at += b - a
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=1)
