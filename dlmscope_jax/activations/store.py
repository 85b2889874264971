"""``ActivationStore``: rows of activations on disk, from this package's models or from anybody's."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Shaped

from ..errors import UserError
from . import given, manifest, writing
from .given import COLUMNS, listed
from .int8 import restore
from .layout import DTYPES, SCALE, Arrays, default_rows, row_digest, row_dtype
from .manifest import Header, Shard
from .reader import BUFFER_ROWS, PATIENCE, BatchIterator, Select, start_batches

if TYPE_CHECKING:
    import tensorstore as ts

__all__ = ["COLUMNS", "ActivationStore"]


class ActivationStore:
    """Rows of activations, a matrix [rows, D] for each site, with columns that say where each row comes from.

    ``create``, ``append`` and ``finish`` write; ``open``, ``read``, ``column`` and ``batches`` read. Only committed shards count: a
    writer that dies loses at most the rows of the shard it was filling.

    Several processes may write one store, each its own shards at their places:

    * the first makes it with ``create(..., columns=..., shards=n)``, or opens what a killed run left, ``open(allow_incomplete=True)``;
    * after a barrier the others ``open(allow_incomplete=True, writer=i)``;
    * each one writes those of its shards that are not in ``shards``, which lists those of all writers, and calls ``flush``;
    * after a second barrier the first one calls ``finish``, after a third the others ``refresh``.

    A later run may have another number of processes. A finished store is the same, whoever wrote it.
    """

    def __init__(self, kv: "ts.KvStore", shown: str, header: Header, complete: bool, writer: int = 0):
        """Use ``create`` or ``open``."""
        self._kv, self._shown, self._header = kv, shown, header
        self._complete, self._number = complete, writer
        self._arrays = Arrays(kv, shown, header)
        self._buffer: list[dict[str, np.ndarray]] = []
        self._buffered = 0
        self._others = manifest.read_shards(kv, shown, complete)
        self._writer = writing.Writer(kv, shown, writer)

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
        columns: Mapping[str, Any] | None = None,
        shards: int | None = None,
    ) -> "ActivationStore":
        """Makes an empty store.

        Args:
          url: a folder, or any tensorstore URL (``gs://bucket/path``, ``s3://...``, ``memory://...``).
          sites: the width D of each site, ``{"resid_post@5": 192}``. The names are free; those of this package let its other functions
            find the layer.
          meta: JSON about the origin of the rows.
          dtype: what is stored: ``bfloat16``, ``float16``, ``float32``, or ``int8``, which has a float32 scale for each row
            (``int8.py``); its rows are given as any floats and come back as float32.
          shard_rows: rows that are written and committed together (default: about 32 MiB), a multiple of ``chunk_rows``.
          chunk_rows: rows that are read together (default: up to 512 KiB and 256 rows); fewer shuffle better, more read faster.
          columns: the dtype of each column (default: the first rows decide).
          shards: how many shards there will be, where ``write_shard`` writes them in any order or from several processes: with
            ``columns`` every array is made with its whole length now, and ``finish`` refuses to end a store that lacks one.

        Raises:
          UserError: there is a store already, or an argument is not as described.
        """
        given.check_sites(sites, dtype)
        if shards is not None and (shards < 1 or columns is None):
            raise UserError(f"shards is {shards}: it must be at least 1, with the columns named")
        known = None if columns is None else given.checked_columns(columns, sites)
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
        header = Header({k: int(v) for k, v in sites.items()}, dtype, int(shard_rows), int(chunk_rows), known, dict(meta or {}), shards)
        manifest.clear(kv, shown)
        manifest.write_header(kv, header, shown)
        store = cls(kv, shown, header, False)
        if shards is not None:
            store._arrays.create(shards)
        return store

    @classmethod
    def open(cls, url: str | os.PathLike[str], allow_incomplete: bool = False, writer: int = 0) -> "ActivationStore":
        """Opens a finished store, or with ``allow_incomplete`` what is committed of one (to read it, follow it, or write further).

        Args:
          url: where it is.
          allow_incomplete: whether an unfinished one will do.
          writer: which of the processes that write it this one is; 0 where there is one, or where it only reads.

        Raises:
          UserError: nothing there, not finished, the header or manifest is damaged, or several writers of a store that was not made
            for them.
        """
        kv, shown = _location(url)
        header = manifest.read_header(kv, shown)
        if header is None:
            raise UserError(f"there is no activation store at {shown}: harvest one there first, or check the path")
        complete = manifest.is_complete(kv, shown)
        if writer and not complete and header.shards is None:
            raise UserError(f"the activation store at {shown} was made for one writer: several need create(..., columns=..., shards=...)")
        store = cls(kv, shown, header, complete, writer)
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
        return sum(s.rows for s in self.shards)

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The committed shards in row order: of all writers when the store was opened or refreshed, and what this one added."""
        found = self._committed()
        return tuple(found[i] for i in sorted(found))

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
        """The dtype in which rows of the sites come back: float32 where they are stored as int8, else the stored one."""
        return row_dtype(self._header.dtype)

    @property
    def stored_dtype(self) -> np.dtype:
        """The dtype of the sites on disk."""
        return DTYPES[self._header.dtype]

    @property
    def identity(self) -> str:
        """SHA-256 of what the store is and where its rows come from: known before the first row, the same however far it has grown."""
        constant = asdict(self._header) | {"columns": None}
        return hashlib.sha256(json.dumps(constant, sort_keys=True).encode()).hexdigest()

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

    @property
    def expected_shards(self) -> int | None:
        """How many shards there will be, where the maker said so."""
        return self._header.shards

    @property
    def nbytes(self) -> int:
        """Bytes of the committed rows, over all sites, scales and columns."""
        sites = self._header.sites
        row = sum(self._arrays.dtype(key).itemsize * sites.get(key, 1) for key in self._arrays.keys())
        return self.rows * row

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
        if self._complete:
            raise UserError(f"the activation store at {self._shown} is finished: nothing can be written to it")
        self._writer.write(self._arrays, index, rows)

    def flush(self) -> None:
        """Waits until every full shard is committed. Rows that do not fill a shard stay in memory."""
        self._writer.settle()

    def refresh(self) -> None:
        """Reads again what other processes have committed since, and whether the store was finished.

        Raises:
          UserError: the store is not there any more, is another one, or its header or manifest is damaged.
        """
        header = manifest.read_header(self._kv, self._shown)
        if header is None or replace(header, columns=None) != replace(self._header, columns=None):
            raise UserError(f"{self._shown}: the activation store was deleted or replaced by another one while it was open")
        complete = manifest.is_complete(self._kv, self._shown)
        others = manifest.read_shards(self._kv, self._shown, complete)
        if header != self._header or complete != self._complete:
            self._header = header
            self._arrays = Arrays(self._kv, self._shown, header)
        self._others, self._complete = others, complete

    def finish(self) -> "ActivationStore":
        """Writes what is buffered and marks the store complete; returns the store.

        Where several processes write, the first one calls it, once all the others have come back from ``flush``.

        Raises:
          UserError: nothing was ever written, a write failed, or one of the ``shards`` that were promised is missing.
        """
        if self._complete:
            return self
        if self._number:
            raise UserError(f"writer {self._number} of {self._shown} cannot finish it: writer 0 does, once all others have flushed")
        if self._buffered:
            self._write_buffer()
        self._writer.close()
        self._others = {**manifest.read_shards(self._kv, self._shown), **self._writer.shards}
        writing.finish(self._kv, self._shown, self._header, self._arrays, self._others)
        self._complete = True
        return self

    def set_columns(self, columns: Mapping[str, np.dtype]) -> None:
        """Fixes the columns and their dtypes before the first rows."""
        wanted = given.checked_columns(columns, self._header.sites)
        if self._header.columns is None:
            self._header = replace(self._header, columns=wanted)
            manifest.write_header(self._kv, self._header, self._shown)
            self._arrays = Arrays(self._kv, self._shown, self._header)
        elif self._header.columns != wanted:
            raise UserError(f"{self._shown} has the columns {listed(self._header.columns)}, not {listed(wanted)}")

    def _write_buffer(self) -> None:
        pieces, self._buffer, self._buffered = self._buffer, [], 0
        self._writer.settle()
        index = max(self._committed(), default=-1) + 1
        self.write_shard(index, {key: np.concatenate([p[key] for p in pieces]) for key in pieces[0]})

    def _committed(self) -> dict[int, Shard]:
        return self._others if self._complete else {**self._others, **self._writer.shards}

    def _ready_rows(self, rows: Mapping[str, Any], columns: Mapping[str, Any]) -> dict[str, np.ndarray]:
        ready = given.ready_rows(rows, self._header, self._shown)
        arrays = given.column_arrays(columns, len(next(iter(ready.values()))))
        if self._header.columns is None:
            self.set_columns(given.column_dtypes(arrays))
        return ready | given.ready_columns(arrays, self._header, self._shown)

    # -- reading

    def read(self, site: str, start: int = 0, stop: int | None = None) -> Shaped[np.ndarray, "n D"]:
        """Rows ``start:stop`` of a site, in the stored dtype; float32 where that is int8.

        Raises:
          UserError: an unknown site, a range outside of the committed rows, or a damaged shard (which it names).
        """
        if site not in self._header.sites:
            raise UserError(f"the store at {self._shown} has no site {site!r}: it has {listed(self._header.sites)}")
        stop = self.rows if stop is None else stop
        if not 0 <= start <= stop <= self.rows:
            raise UserError(f"rows {start}:{stop} are outside of the {self.rows} rows of {self._shown}")
        places = self._places(start, stop)
        pieces = self.read_chunks(site, places)
        rows = pieces[0] if len(pieces) == 1 else np.concatenate([*pieces, np.zeros((0, self._header.sites[site]), self.stored_dtype)])
        if self._header.dtype != "int8":
            return rows
        scales = [self._values(site + SCALE, [self._committed()[shard]])[low:high] for shard, low, high in places]
        return restore(rows, np.concatenate([*scales, np.zeros(0, np.float32)]))

    def column(self, name: str) -> Shaped[np.ndarray, " rows"]:
        """A column, all rows.

        Raises:
          UserError: an unknown column or a damaged shard.
        """
        if name not in self.columns:
            raise UserError(f"the store at {self._shown} has no column {name!r}: it has {listed(self.columns)}")
        return self._values(name, self.shards)

    def read_chunks(self, site: str, chunks: Sequence[tuple[int, int, int]]) -> list[np.ndarray]:
        """Several ``(shard, first, last + 1)`` ranges of a site at once, as they are stored, for the reader."""
        return self._arrays.read_many(site, chunks, self._committed())

    def values(self, name: str, shards: Sequence[Shard]) -> Shaped[np.ndarray, " rows"]:
        """A column of some shards, or a site's scales where rows are stored as int8; for the reader."""
        return self._values(name + SCALE if name in self._header.sites else name, shards)

    def _values(self, key: str, shards: Sequence[Shard]) -> np.ndarray:
        places = [(shard.shard, 0, shard.rows) for shard in shards if shard.rows]
        pieces = self._arrays.read_many(key, places, self._committed())
        return np.concatenate(pieces) if pieces else np.zeros(0, self._arrays.dtype(key))

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
        follow: bool = False,
        patience: float = PATIENCE,
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
          follow: read the first epoch in the order in which a store grows, and wait for what is not committed yet (``following.py``).
            The batch of a step is then a function of ``(seed, step)`` and of what the store will hold in the end, not of when who
            wrote what; the same call on the finished store gives the same batches. The shuffle is weaker in that epoch: rows mix
            within windows of about ``buffer_rows`` consecutive ones. Later epochs wait for the store to be finished and are those of
            any other reading. While it grows ``steps_per_epoch`` and ``rows`` are not known and say ``sys.maxsize``; who wants the
            rows of one epoch at most says ``epochs=1``.
          patience: with ``follow``, seconds to wait for the next shard to be committed.

        Returns:
          An iterator of ``{site: [batch_size / count, D], column: [batch_size / count]}`` with ``steps_per_epoch``, ``rows`` (selected
          ones) and ``close()``.

        Raises:
          UserError: no such site or column, fewer selected rows than a batch, or a damaged shard; with ``follow``, from the iterator,
            where nothing was committed for so long that the writer must be gone.
        """
        return start_batches(
            self, batch_size, seed, start_step, sites, select, epochs, columns, buffer_rows, process, follow, patience
        )  # fmt: skip

    # -- damage

    def verify(self) -> tuple[int, ...]:
        """Reads everything and returns the shards whose rows are not what was committed; empty when all is well."""
        damaged, committed = [], self._committed()
        for shard in self.shards:
            try:
                place = [(shard.shard, 0, shard.rows)]
                rows = {key: self._arrays.read_many(key, place, committed)[0] for key in self._arrays.keys()}
                if row_digest(rows, self._arrays.keys()) != shard.digest:
                    damaged.append(shard.shard)
            except UserError:
                damaged.append(shard.shard)
        return tuple(damaged)

    def forget(self, shards: Sequence[int]) -> None:
        """Takes shards out of the manifest, and the mark of completeness off: the same harvest then makes only these again."""
        if unknown := set(shards) - set(self._committed()):
            raise UserError(f"the store at {self._shown} has no committed shard {min(unknown)}")
        if shards:
            self._writer.settle()
            manifest.mark_incomplete(self._kv, self._shown)
            self._complete = False
            for part, held in manifest.read_parts(self._kv, self._shown).items():
                kept = {i: shard for i, shard in held.items() if i not in set(shards)}
                if kept != held:
                    manifest.write_shards(self._kv, kept, self._shown, part)
            self._writer.forget()
            self.refresh()

    def _places(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        places, before = [], 0
        for shard in self.shards:
            low, high = max(start - before, 0), min(stop - before, shard.rows)
            if low < high:
                places.append((shard.shard, low, high))
            before += shard.rows
        return places


def _location(url: str | os.PathLike[str]) -> "tuple[ts.KvStore, str]":
    shown, kv = manifest.open_location(url)
    return kv, shown
