"""How the blocks of a harvest are divided over devices and processes: pieces, which make shards, and passes, which take pieces.

A piece is what one part of the mesh's rows takes in one forward pass: consecutive blocks of one shard, always the same ones. A group is
one process, or the processes that hold the same rows because the mesh's ``model`` runs over them. A group has shards of its own and feeds
their pieces to its own devices in order; all groups make the same number of passes.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from .. import distributed
from ..data import Blocks

Outputs = Any  # a tree of arrays [blocks of a piece, ...] on one device


@dataclass
class OpenShard:
    """A shard of which a piece was begun: its number, its blocks, and its rows as far as they are there.

    ``rows`` holds the arrays of the whole shard, of which the first ``filled`` rows are written.
    """

    number: int
    blocks: Blocks
    rows: dict[str, np.ndarray] = field(default_factory=dict)
    filled: int = 0


@dataclass(frozen=True)
class Cut:
    """Which blocks make a piece, which pieces a shard, and whose shards are whose: arithmetic, the same on all processes.

    Attributes:
      blocks: of the whole harvest.
      per_shard: blocks of a shard.
      per: blocks of a piece.
      done: shards that are committed.
      groups: how many groups there are.
    """

    blocks: int
    per_shard: int
    per: int
    done: frozenset[int]
    groups: int

    @property
    def shards(self) -> int:
        """The number of all shards."""
        return -(-self.blocks // self.per_shard)

    def blocks_of(self, shard: int) -> range:
        """The indices of a shard's blocks."""
        return range(shard * self.per_shard, min((shard + 1) * self.per_shard, self.blocks))

    def pieces(self, group: int) -> list[tuple[int, range]]:
        """``(shard, indices of its blocks)`` of all pieces of a group.

        A shard's number alone says whose it is: blocks that come in windows are read in lanes, and a lane has one reader.
        """
        mine = [shard for shard in range(group, self.shards, self.groups) if shard not in self.done]
        return [(shard, blocks[at : at + self.per]) for shard in mine for blocks in [self.blocks_of(shard)] for at in self.starts(shard)]

    def starts(self, shard: int) -> range:
        """Where in a shard its pieces begin."""
        return range(0, len(self.blocks_of(shard)), self.per)

    def passes(self, at_once: int) -> int:
        """How many forward passes there are when each takes ``at_once`` pieces of every group."""
        return max(-(-len(self.pieces(group)) // at_once) for group in range(self.groups))


def group_of(mesh: Mesh | None) -> tuple[int, int, bool]:
    """``(index, count, writes)``: this process's group, how many there are, and whether it is the one of its group that writes."""
    if mesh is None:
        return 0, 1, True
    index, count = distributed.local_rows(mesh)
    devices = mesh.devices.reshape(count, -1)[index]
    return index, count, jax.process_index() == min(device.process_index for device in devices)


def at_once(mesh: Mesh | None) -> int:
    """How many pieces a group feeds in one pass: the parts of the rows that lie on its devices."""
    return 1 if mesh is None else distributed.row_parts(mesh) // distributed.local_rows(mesh)[1]


def passes(
    run: Callable[[Any, Any, Any], Outputs],
    take: Callable[[range], Blocks],
    length: int,
    cut: Cut,
    mesh: Mesh | None,
    asked: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[OpenShard, range, Outputs]]:
    """This group's pieces with what the forward pass says of them, one pass always ahead of the copy to the host.

    A piece that the end of its shard cuts short is filled up with its own last block, and a pass with pieces of no meaning: one compiled
    shape, and the same arithmetic for a block whenever and wherever its shard is computed.

    Args:
      run: ``(tokens [B, T], real [B, T], indices [B])`` -> arrays [B, ...] divided over the mesh's rows.
      take: the blocks of a shard.
      length: T.
      cut: the division.
      mesh: None for one device.
      asked: called before each pass, in all processes alike; whether to begin no more of them.

    Yields:
      The shard, the indices of the piece's blocks, and the piece's part of the arrays; of each pass in all processes, to those that write.
    """
    group, _, writes = group_of(mesh)
    n, mine = at_once(mesh), cut.pieces(group)
    ahead: deque[list[tuple[OpenShard, range, Outputs]]] = deque()
    shard: OpenShard | None = None
    for turn in range(cut.passes(n)):
        if asked():
            break
        fed = []
        tokens = np.zeros((n, cut.per, length), np.int32)
        real, indices = np.ones(tokens.shape, bool), np.zeros((n, cut.per), np.int32)
        for place, (number, piece) in enumerate(mine[turn * n : (turn + 1) * n]):
            if shard is None or number != shard.number:
                shard = OpenShard(number, take(cut.blocks_of(number)))
            filled = np.minimum(np.arange(piece.start, piece.start + cut.per), piece.stop - 1)
            within = filled - cut.blocks_of(number).start
            tokens[place], indices[place] = shard.blocks.tokens[within], filled
            real[place] = shard.blocks.documents[within] >= 0
            fed.append((shard, piece))
        arrays = tuple(array.reshape(-1, *array.shape[2:]) for array in (tokens, real, indices))
        with distributed.together():
            outputs = run(*(arrays if mesh is None else distributed.to_global(arrays, mesh)))
            if writes:
                ahead.append([(*one, part) for one, part in zip(fed, _parts(outputs, n), strict=False)])
            else:
                jax.block_until_ready(outputs)  # programs that nobody waits for pile up
            if len(ahead) == 2:
                yield from ahead.popleft()
    with distributed.together():
        for last in ahead:
            yield from last


def _parts(outputs: Outputs, n: int) -> list[Outputs]:
    """The parts of the rows that lie on this process's devices, in order, each once; their copies to the host begin."""
    leaves, structure = jax.tree.flatten(outputs)
    parts = []
    for leaf in leaves:
        found: dict[int, Array] = {}
        for shard in leaf.addressable_shards:
            found.setdefault(shard.index[0].start or 0, shard.data)
        parts.append([found[start] for start in sorted(found)])
        if len(parts[-1]) != n:
            raise ValueError(f"{len(parts[-1])} parts of the rows lie here, not {n}")
        for part in parts[-1]:
            part.copy_to_host_async()
    return [jax.tree.unflatten(structure, part) for part in zip(*parts, strict=True)]
