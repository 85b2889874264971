"""Writing a store: whole shards, in the background, each committed in its writer's own part of the manifest.

    process 0:      create(..., shards=n)     barrier     write_shard, flush     barrier     finish
    process i > 0:                            barrier     open(writer=i), write_shard, flush     barrier

No two processes write one key: shards are files of their own, and every writer has its own part of the manifest. The arrays have their
whole length from the start, so nobody changes it while others write.
"""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from ..errors import UserError
from . import manifest
from .layout import Arrays
from .manifest import Header, Shard

if TYPE_CHECKING:
    import tensorstore as ts


class Writer:
    """One process's way into a store: writes a shard in the background while the caller makes the next one."""

    def __init__(self, kv: "ts.KvStore", shown: str, number: int):
        self._kv, self._shown, self._number = kv, shown, number
        self._listed: dict[int, Shard] | None = None  # in this writer's part; read before the first write
        self._pool: ThreadPoolExecutor | None = None
        self._writing: Future[None] | None = None

    @property
    def shards(self) -> dict[int, Shard]:
        """The shards of this writer's part, once it has written."""
        return self._listed or {}

    def write(self, arrays: Arrays, index: int, rows: Mapping[str, np.ndarray]) -> None:
        """Begins to write a shard, after the one before it is committed."""
        self.settle()
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="activation-writer")
        self._writing = self._pool.submit(self._write_and_commit, arrays, index, rows)

    def settle(self) -> None:
        """Waits for the shard that is being written, and raises what went wrong with it."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def close(self) -> None:
        """Waits as ``settle`` does and lets the thread go."""
        self.settle()
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def forget(self) -> None:
        """Reads the list of its shards again before the next write, because it was changed."""
        self._listed = None

    def _write_and_commit(self, arrays: Arrays, index: int, rows: Mapping[str, np.ndarray]) -> None:
        part = manifest.part_of(self._number)
        if self._listed is None:
            self._listed = manifest.parsed(manifest.read_key(self._kv, part, self._shown) or b"", part, self._shown)
        shards = {**self._listed, index: arrays.write_shard(index, rows)}
        manifest.write_shards(self._kv, shards, self._shown, part)
        self._listed = shards


def finish(kv: "ts.KvStore", shown: str, header: Header, arrays: Arrays, shards: dict[int, Shard]) -> None:
    """Gathers the manifest's parts, ends the arrays after their last row and marks the store complete.

    Raises:
      UserError: nothing was written, or not all of the shards that there were to be.
    """
    if not shards:
        raise UserError(f"the activation store at {shown} has no rows: append some before finish")
    if missing := sorted(set(range(header.shards or 0)) - set(shards)):
        raise UserError(f"{shown}: {len(missing)} of {header.shards} shards are not written, the first is {missing[0]}: run the same again")
    manifest.gather(kv, shards, shown)
    last = max(shards)
    arrays.trim(last * header.shard_rows + shards[last].rows)
    manifest.mark_complete(kv, shown, arrays.descriptions())
