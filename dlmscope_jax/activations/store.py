"""``ActivationStore``: rows of activations on disk, from this package's models or from anybody's."""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Shaped

from ..errors import UserError
from . import manifest
from .layout import DTYPES, Arrays, default_rows, row_digest
from .manifest import Header, Shard
from .reader import BUFFER_ROWS, BatchIterator, Select, start_batches

if TYPE_CHECKING:
    import tensorstore as ts

# The columns that a harvest writes; the same names in somebody's own rows mean the same.
COLUMNS = {
    "token": np.dtype(np.int32),  # what the model read at this position
    "original": np.dtype(np.int32),  # what stood there before the corruption
    "document": np.dtype(np.int32),  # index into the names of the blocks
    "position": np.dtype(np.int32),  # 0-based place in the block
    "block": np.dtype(np.int32),  # index of the block
    "rate": np.dtype(np.float32),  # corruption rate of the block, 0 where clean
    "is_masked": np.dtype(np.bool_),  # the model read a mask here
    "predicts_masked": np.dtype(np.bool_),  # the model predicts a masked token from here (one to the left where logits are shifted)
}


class ActivationStore:
    """Rows of activations, a matrix [rows, D] for each site, with columns that say where each row comes from.

    ``create``, ``append`` and ``finish`` write; ``open``, ``read``, ``column`` and ``batches`` read. Only committed shards count: a
    writer that dies loses at most the rows of the shard it was filling. One process writes a store at a time.
    """

    def __init__(self, kv: "ts.KvStore", shown: str, header: Header, shards: dict[int, Shard], complete: bool):
        """Use ``create`` or ``open``."""
        self._kv, self._shown, self._header = kv, shown, header
        self._shards, self._complete = shards, complete
        self._arrays = Arrays(kv, shown, header)
        self._buffer: list[dict[str, np.ndarray]] = []
        self._buffered = 0
        self._writer: ThreadPoolExecutor | None = None
        self._writing: Future[None] | None = None

    # -- making and opening

    @classmethod
    def create(
        cls,
        url: str | os.PathLike[str],
        sites: Mapping[str, int],
        meta: Mapping[str, Any] | None = None,
        dtype: str = "bfloat16",
        shard_rows: int | None = None,
        chunk_rows: int | None = None,
    ) -> "ActivationStore":
        """Makes an empty store.

        Args:
          url: a folder, or any tensorstore URL (``gs://bucket/path``, ``s3://...``, ``memory://...``).
          sites: the width D of each site, ``{"resid_post@5": 192}``. The names are free; those of this package let its other functions
            find the layer.
          meta: JSON about the origin of the rows.
          dtype: what is stored, ``bfloat16``, ``float16`` or ``float32``.
          shard_rows: rows that are written and committed together (default: about 32 MiB), a multiple of ``chunk_rows``.
          chunk_rows: rows that are read together (default: about 128 KiB); fewer shuffle better, more read faster.

        Raises:
          UserError: there is a store already, or an argument is not as described.
        """
        if dtype not in DTYPES:
            raise UserError(f"dtype {dtype!r} cannot be stored: use one of {', '.join(DTYPES)}")
        if not sites:
            raise UserError('an activation store needs at least one site, such as {"resid_post@5": 192}')
        for site, width in sites.items():
            if not site or set(site) - _NAME_CHARACTERS or site.startswith("."):
                raise UserError(f"site name {site!r}: use letters, digits and _ . @ - only")
            if not isinstance(width, (int, np.integer)) or width < 1:
                raise UserError(f"site {site!r} has width {width!r}: it must be a positive integer")
        default_shard, default_chunk = default_rows(sites, dtype)
        if chunk_rows is None:
            chunk_rows = default_chunk if shard_rows is None else int(np.gcd(default_chunk, shard_rows))
        if shard_rows is None:
            shard_rows = max(1, default_shard // chunk_rows) * chunk_rows
        if chunk_rows < 1 or shard_rows < 1 or shard_rows % chunk_rows:
            raise UserError(f"shard_rows {shard_rows} must be a multiple of chunk_rows {chunk_rows}, both positive")
        kv, shown = _location(url)
        if manifest.read_header(kv, shown) is not None:
            raise UserError(f"there is already an activation store at {shown}: open it, or choose another place")
        header = Header({k: int(v) for k, v in sites.items()}, dtype, int(shard_rows), int(chunk_rows), None, dict(meta or {}))
        manifest.write_header(kv, header, shown)
        return cls(kv, shown, header, {}, False)

    @classmethod
    def open(cls, url: str | os.PathLike[str], allow_incomplete: bool = False) -> "ActivationStore":
        """Opens a finished store, or with ``allow_incomplete`` what is committed of one (to read it, or to ``append`` further).

        Raises:
          UserError: nothing there, not finished, or the header or manifest is damaged.
        """
        kv, shown = _location(url)
        header = manifest.read_header(kv, shown)
        if header is None:
            raise UserError(f"there is no activation store at {shown}: harvest one there first, or check the path")
        complete = manifest.is_complete(kv, shown)
        store = cls(kv, shown, header, manifest.read_shards(kv, shown), complete)
        if not complete and not allow_incomplete:
            raise UserError(
                f"the activation store at {shown} is not finished ({store.rows} rows are committed): run the same harvest again to finish "
                "it, or open it with allow_incomplete=True to use those"
            )
        return store

    # -- what there is

    @property
    def url(self) -> str:
        """The location, as it was given."""
        return self._shown

    @property
    def rows(self) -> int:
        """Committed rows."""
        return sum(s.rows for s in self._shards.values())

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The committed shards in row order."""
        return tuple(self._shards[i] for i in sorted(self._shards))

    @property
    def sites(self) -> dict[str, int]:
        """The width D of each site."""
        return dict(self._header.sites)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns."""
        return tuple(self._header.columns or ())

    @property
    def meta(self) -> dict[str, Any]:
        """What the maker said about the rows; a harvest says model identity, tokenizer, corruption, seed, sites, blocks and versions."""
        return dict(self._header.meta)

    @property
    def dtype(self) -> np.dtype:
        """The stored dtype of the sites."""
        return DTYPES[self._header.dtype]

    @property
    def shard_rows(self) -> int:
        """Rows that a shard has room for."""
        return self._header.shard_rows

    @property
    def chunk_rows(self) -> int:
        """Rows that are read together."""
        return self._header.chunk_rows

    @property
    def complete(self) -> bool:
        """Whether the store was finished."""
        return self._complete

    def __repr__(self) -> str:
        state = "complete" if self._complete else "not finished"
        return f"ActivationStore({self._shown!r}, {self.rows} rows, {self.sites}, {state})"

    # -- writing

    def append(self, rows: Mapping[str, Any], columns: Mapping[str, Any] | None = None) -> None:
        """Adds rows after those that are there.

        Rows wait in memory until a shard is full; it is then written and committed in the background. ``finish`` writes the rest.

        Args:
          rows: for each site an array [n, D] of floats (NumPy, JAX, or anything that NumPy converts).
          columns: for each column an array [n]; the first call decides which there are and their dtypes.

        Raises:
          UserError: a site is missing, a shape or dtype does not fit, the store is finished, or a write failed (at this call or at the
            next one, because writing is in the background).
        """
        if self._complete:
            raise UserError(f"the activation store at {self._shown} is finished: nothing can be appended; make a new one")
        ready = self._ready_rows(rows, columns or {})
        size = self._header.shard_rows
        n = len(next(iter(ready.values())))
        at = 0
        while at < n:
            take = min(n - at, size - self._buffered)
            # copied: the caller may reuse its arrays
            self._buffer.append({key: values[at : at + take].copy() for key, values in ready.items()})
            self._buffered += take
            at += take
            if self._buffered == size:
                self._write_buffer()

    def write_shard(self, index: int, rows: Mapping[str, np.ndarray]) -> None:
        """Writes one whole shard at its place and commits it, in the background; its arrays must not change afterwards.

        For writers that know which rows a shard holds, and so can make any of them again. ``rows`` has sites and columns.
        """
        self._settle()
        if self._writer is None:
            self._writer = ThreadPoolExecutor(1, thread_name_prefix="activation-writer")
        self._writing = self._writer.submit(self._write_and_commit, index, rows)

    def flush(self) -> None:
        """Waits until every full shard is committed. Rows that do not fill a shard stay in memory."""
        self._settle()

    def finish(self) -> "ActivationStore":
        """Writes what is buffered and marks the store complete; returns the store.

        Raises:
          UserError: nothing was ever written, or a write failed.
        """
        if self._complete:
            return self
        if self._buffered:
            self._write_buffer()
        self._settle()
        if self._writer is not None:
            self._writer.shutdown()
            self._writer = None
        if not self._shards:
            raise UserError(f"the activation store at {self._shown} has no rows: append some before finish")
        last = max(self._shards)
        self._arrays.trim(last * self._header.shard_rows + self._shards[last].rows)
        manifest.mark_complete(self._kv, self._shown)
        self._complete = True
        return self

    def set_columns(self, columns: Mapping[str, np.dtype]) -> None:
        """Fixes the columns and their dtypes before the first rows."""
        wanted = {name: np.dtype(dtype).name for name, dtype in columns.items()}
        if self._header.columns is None:
            self._header = replace(self._header, columns=wanted)
            manifest.write_header(self._kv, self._header, self._shown)
            self._arrays = Arrays(self._kv, self._shown, self._header)
        elif self._header.columns != wanted:
            raise UserError(f"{self._shown} has the columns {_listed(self._header.columns)}, not {_listed(wanted)}")

    def _write_buffer(self) -> None:
        pieces, self._buffer, self._buffered = self._buffer, [], 0
        self._settle()
        index = max(self._shards, default=-1) + 1
        self.write_shard(index, {key: np.concatenate([p[key] for p in pieces]) for key in pieces[0]})

    def _write_and_commit(self, index: int, rows: Mapping[str, np.ndarray]) -> None:
        shards = {**self._shards, index: self._arrays.write_shard(index, rows)}
        manifest.write_shards(self._kv, shards, self._shown)
        self._shards = shards

    def _settle(self) -> None:
        """Waits for the shard that is being written, and raises what went wrong with it."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def _ready_rows(self, rows: Mapping[str, Any], columns: Mapping[str, Any]) -> dict[str, np.ndarray]:
        if set(rows) != set(self._header.sites):
            raise UserError(f"append got the sites {_listed(rows)}, the store at {self._shown} has {_listed(self._header.sites)}")
        ready: dict[str, np.ndarray] = {}
        n = None
        for site, width in self._header.sites.items():
            values = _array(rows[site], f"site {site!r}")
            if values.dtype.kind != "f" and values.dtype not in DTYPES.values():
                raise UserError(f"site {site!r} got rows of dtype {values.dtype}: activations are floats")
            if values.ndim != 2 or values.shape[1] != width:
                raise UserError(f"site {site!r} got rows of shape {values.shape}: it must be [n, {width}]")
            n = len(values) if n is None else n
            if len(values) != n:
                raise UserError(f"site {site!r} got {len(values)} rows where the first site got {n}: all sites need the same number")
            ready[site] = values.astype(self.dtype, copy=False)
        arrays = {name: _array(values, f"column {name!r}") for name, values in columns.items()}
        for name, values in arrays.items():
            if values.shape != (n,):
                raise UserError(f"column {name!r} has shape {values.shape}: it must be [{n}], one entry for each row")
        if self._header.columns is None:
            self.set_columns({name: _column_dtype(name, values) for name, values in arrays.items()})
        known = self._header.columns or {}
        if set(arrays) != set(known):
            raise UserError(f"append got the columns {_listed(arrays)}, the store at {self._shown} has {_listed(known)}")
        for name, values in arrays.items():
            dtype = np.dtype(known[name])
            if not _fits(values, dtype):
                raise UserError(f"column {name!r} got {values.dtype} values that do not fit its dtype {dtype}")
            ready[name] = values.astype(dtype)
        return ready

    # -- reading

    def read(self, site: str, start: int = 0, stop: int | None = None) -> Shaped[np.ndarray, "n D"]:
        """Rows ``start:stop`` of a site, in the stored dtype.

        Raises:
          UserError: an unknown site, a range outside of the committed rows, or a damaged shard (which it names).
        """
        if site not in self._header.sites:
            raise UserError(f"the store at {self._shown} has no site {site!r}: it has {_listed(self._header.sites)}")
        stop = self.rows if stop is None else stop
        if not 0 <= start <= stop <= self.rows:
            raise UserError(f"rows {start}:{stop} are outside of the {self.rows} rows of {self._shown}")
        pieces = self._arrays.read_many(site, self._places(start, stop))
        return np.concatenate(pieces) if pieces else np.zeros((0, self._header.sites[site]), self.dtype)

    def column(self, name: str) -> Shaped[np.ndarray, " rows"]:
        """A column, all rows.

        Raises:
          UserError: an unknown column or a damaged shard.
        """
        if name not in self.columns:
            raise UserError(f"the store at {self._shown} has no column {name!r}: it has {_listed(self.columns)}")
        pieces = self._arrays.read_many(name, self._places(0, self.rows))
        return np.concatenate(pieces) if pieces else np.zeros(0, self._arrays.dtype(name))

    def read_chunks(self, site: str, chunks: Sequence[tuple[int, int, int]]) -> list[np.ndarray]:
        """Several ``(shard, first, last + 1)`` ranges of a site at once, for the reader."""
        return self._arrays.read_many(site, chunks)

    def batches(
        self,
        batch_size: int,
        seed: int,
        start_step: int = 0,
        sites: Sequence[str] | None = None,
        select: Select = "all",
        epochs: int | None = None,
        columns: Sequence[str] | None = None,
        buffer_rows: int = BUFFER_ROWS,
        process: tuple[int, int] = (0, 1),
    ) -> BatchIterator:
        """Globally shuffled batches, read ahead by a thread; the batch of a step is a function of ``(seed, step)`` alone.

        Chunks are permuted by (seed, epoch) over the whole store and dealt to lanes; a batch takes equally many rows from each lane, and
        each lane permutes its rows within groups of chunks. Every selected row comes exactly once an epoch, except the last
        ``selected rows % batch_size`` of that epoch's order, which are dropped (other ones each epoch). ``reader.py`` has the details.

        Args:
          batch_size: rows of a batch, over all processes. Multiples of 256 shuffle best.
          seed: non-negative.
          start_step: first step; the batches from there on are those of an iterator that began at 0.
          sites: which to read, default all.
          select: ``all`` rows; those the model read ``masked`` or ``visible``; those that are ``predicting`` a masked token.
          epochs: passes over the store, None for no end.
          columns: which to return, default all; they are held in memory for the whole store.
          buffer_rows: rows that are in memory at a time, about; more shuffle better. Part of what determines a batch.
          process: ``(index, count)``: return this process's slice of each batch and read only what it needs.

        Returns:
          An iterator of ``{site: [batch_size / count, D], column: [batch_size / count]}`` with ``steps_per_epoch``, ``rows`` (selected
          ones) and ``close()``.

        Raises:
          UserError: no such site or column, fewer selected rows than a batch, or a damaged shard.
        """
        return start_batches(self, batch_size, seed, start_step, sites, select, epochs, columns, buffer_rows, process)

    # -- damage

    def verify(self) -> tuple[int, ...]:
        """Reads everything and returns the shards whose rows are not what was committed; empty when all is well."""
        damaged = []
        for shard in self.shards:
            try:
                place = [(shard.shard, 0, shard.rows)]
                rows = {key: self._arrays.read_many(key, place)[0] for key in self._arrays.keys()}
                if row_digest(rows, self._arrays.keys()) != shard.digest:
                    damaged.append(shard.shard)
            except UserError:
                damaged.append(shard.shard)
        return tuple(damaged)

    def forget(self, shards: Sequence[int]) -> None:
        """Takes shards out of the manifest, and the mark of completeness off: the same harvest then makes only these again."""
        if unknown := set(shards) - set(self._shards):
            raise UserError(f"the store at {self._shown} has no committed shard {min(unknown)}")
        if shards:
            manifest.mark_incomplete(self._kv, self._shown)
            self._complete = False
            kept = {i: s for i, s in self._shards.items() if i not in set(shards)}
            manifest.write_shards(self._kv, kept, self._shown)
            self._shards = kept

    def _places(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        places, before = [], 0
        for shard in self.shards:
            low, high = max(start - before, 0), min(stop - before, shard.rows)
            if low < high:
                places.append((shard.shard, low, high))
            before += shard.rows
        return places


_NAME_CHARACTERS = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.@-")


def _location(url: str | os.PathLike[str]) -> "tuple[ts.KvStore, str]":
    shown, kv = manifest.open_location(url)
    return kv, shown


def _listed(names: Any) -> str:
    return ", ".join(sorted(names)) or "none"


def _array(values: Any, what: str) -> np.ndarray:
    try:
        found = np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{what} cannot be made a NumPy array ({error}): give floats that NumPy knows, such as float32") from error
    if found.dtype == object:
        raise UserError(f"{what} is not a rectangular array of numbers")
    return found


def _column_dtype(name: str, values: np.ndarray) -> np.dtype:
    if not name or set(name) - _NAME_CHARACTERS or name.startswith("."):
        raise UserError(f"column name {name!r}: use letters, digits and _ . @ - only")
    if values.dtype.kind not in "biuf" or values.dtype.itemsize > 8:
        raise UserError(f"column {name!r} has dtype {values.dtype}: columns hold booleans, integers or floats")
    return COLUMNS.get(name, values.dtype.newbyteorder("="))


def _fits(values: np.ndarray, dtype: np.dtype) -> bool:
    if "b" in (dtype.kind, values.dtype.kind):
        return values.dtype == dtype
    if dtype.kind in "iu":
        info = np.iinfo(dtype)
        return values.dtype.kind in "iu" and (not len(values) or (values.min() >= info.min and values.max() <= info.max))
    return values.dtype.kind in "iuf"
