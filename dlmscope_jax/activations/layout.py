"""Rows on disk: one sharded zarr3 array for each site and each column, written a whole shard at a time.

A shard is the unit of writing and committing, an inner chunk (with its CRC-32C) the unit of reading. Row ``r`` of shard ``s`` lies at
``s * shard_rows + r``; what is beyond a shard's row count is padding that nobody reads. Nothing is compressed: bf16 activations lose about
a fifth at several times the cost of the copy. Rows in int8 have their scales in an array [rows] of their own.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from ..errors import UserError
from .int8 import quantise
from .manifest import STORED, Header, Shard, context, storage_errors

if TYPE_CHECKING:
    import tensorstore as ts

CHUNK_BYTES, SHARD_BYTES = 512 << 10, 32 << 20
CHUNK_ROWS, LEAST_BYTES = 256, 64 << 10
MARK = 8  # hexadecimal digits
DTYPES = {name: np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name) for name in STORED}
SCALE = "#scale"  # after a site's name, which has no such character: the key of its scales


def row_dtype(stored: str) -> np.dtype:
    """The dtype in which rows are given to a store and come back from it: the stored one, float32 where that is int8."""
    return DTYPES["float32" if stored == "int8" else stored]


def default_rows(sites: Mapping[str, int], dtype: str) -> tuple[int, int]:
    """``(shard_rows, chunk_rows)`` for these widths: shards of about 32 MiB of the widest site, chunks of up to 512 KiB and 256 rows.

    Small chunks make a better shuffle (a chunk's rows stay together until they are permuted within a group), large ones are read
    faster: of 512 KiB about half again as fast as of 128 (scripts/bench_store.py). Narrow rows have chunks of at least 32 KiB. A
    chunk's rows are a power of two, so that a shard is a whole number of chunks.
    """
    row = max(sites.values()) * DTYPES[dtype].itemsize
    chunk = 1 << max(0, min(CHUNK_BYTES // row, max(CHUNK_ROWS, LEAST_BYTES // row)).bit_length() - 1)
    return chunk * max(1, SHARD_BYTES // (row * chunk)), chunk


class Arrays:
    """The arrays of one store, opened when first touched."""

    def __init__(self, kv: "ts.KvStore", shown: str, header: Header):
        self.kv, self.shown, self.header = kv, shown, header
        self._open: dict[str, ts.TensorStore] = {}
        self._seen: set[tuple[str, int]] = set()  # arrays and shards whose mark was compared

    def dtype(self, key: str) -> np.dtype:
        """The dtype of a site or a column."""
        header = self.header
        if key.endswith(SCALE):
            return np.dtype(np.float32)
        return DTYPES[header.dtype] if key in header.sites else np.dtype((header.columns or {})[key])

    def keys(self) -> list[str]:
        """Sites, then their scales, then columns."""
        scales = [site + SCALE for site in self.header.sites] if self.header.dtype == "int8" else []
        return [*self.header.sites, *scales, *(self.header.columns or {})]

    def descriptions(self) -> list[str]:
        """Where the arrays' metadata lies."""
        return [self.folder(key) + "zarr.json" for key in self.keys()]

    def create(self, shards: int) -> None:
        """Makes every array with room for so many shards; those that are there may have more."""
        with storage_errors(f"cannot write {self.shown}"):
            for key in self.keys():
                self._array(key, shards * self.header.shard_rows)

    def check(self, key: str) -> None:
        """Raises ``UserError`` unless the array of a key can be opened and is what the header says."""
        with storage_errors(f"{self.shown}: the array {self.folder(key)} cannot be opened"):
            self._array(key)

    def assume(self, key: str, shards: int) -> None:
        """Reads the array of a key as the header describes it, whatever its own description says."""
        import tensorstore as ts

        constant = {"zarr_format": 3, "node_type": "array", "chunk_key_encoding": {"name": "default"}}
        spec = self._spec(key) | {"metadata": constant | self._metadata(key, shards * self.header.shard_rows)}
        with storage_errors(f"{self.shown}: the array {self.folder(key)} cannot be opened"):
            self._open[key] = ts.open(spec, open=True, assume_metadata=True, context=context()).result()

    def _spec(self, key: str) -> dict[str, Any]:
        return {
            "driver": "zarr3",
            "kvstore": (self.kv / self.folder(key)).spec().to_json(),
            # a missing chunk is damage here, never zeros
            "fill_missing_data_reads": False,
            "store_data_equal_to_fill_value": True,
        }

    def write_shard(self, index: int, rows: Mapping[str, np.ndarray]) -> Shard:
        """Writes one shard durably and returns its line of the manifest, which the caller has to commit.

        ``rows`` has an array [n, D] for each site and [n] for each column, n at most ``shard_rows``, already of the stored dtype; sites of
        an int8 store in any floating-point dtype. When the write fails (a full disk), what there is of the shard is removed and
        ``UserError`` says so.
        """
        header = self.header
        if header.shards is not None and not 0 <= index < header.shards:
            raise UserError(f"{self.shown} was made for {header.shards} shards: there is no shard {index} in it")
        rows = self._as_stored(rows)
        n = len(next(iter(rows.values())))
        if n > header.shard_rows:
            raise UserError(f"shard {index} of {self.shown} would have {n} rows: there is room for {header.shard_rows}")
        start = index * header.shard_rows
        advice = f"shard {index} does not count, the shards before it are safe: make room or check the permissions, then run it again"
        pending: list[Any] = []
        try:
            with storage_errors(f"cannot write shard {index} of {self.shown}", advice):
                for key in self.keys():
                    chunk = self._chunk_rows(key)
                    stored = -(-n // chunk) * chunk
                    if stored < header.shard_rows:
                        # tensorstore would merge a part of a shard into what a killed writer left there
                        self._remove(key, index)
                    target = self._array(key, start + header.shard_rows)
                    values = rows[key]
                    if n < stored:
                        values = np.concatenate([values, np.zeros((stored - n, *values.shape[1:]), values.dtype)])
                    pending.append(target[start : start + stored].write(values))
                digest, marks = row_digest(rows, self.keys()), "".join(self._mark(key, rows[key]) for key in sorted(self.keys()))
                for one in pending:
                    one.result()
        except UserError:
            for one in pending:
                one.exception()  # waits: a write that is still under way would outlive the removal
            for key in self.keys():
                try:
                    self._remove(key, index)
                except (OSError, ValueError, RuntimeError):  # what cannot be removed is not counted either
                    pass
            raise
        return Shard(index, n, digest, marks)

    def read_many(self, key: str, places: Sequence[tuple[int, int, int]], shards: Mapping[int, Shard]) -> list[np.ndarray]:
        """Reads ``(shard, first row, last row + 1)`` for each place, all at once and as they are stored.

        ``shards`` are the committed ones. Raises ``UserError`` that names the shard where a checksum does not match, a file is missing, or
        the shard is not the one that was committed: the first chunk of each is compared with its mark when it is first touched.
        """
        unseen = [shard for shard in dict.fromkeys(shard for shard, _, _ in places) if (key, shard) not in self._seen]
        # a column is one chunk, and a whole one is read
        ends = {shard: min(shards[shard].rows, self._chunk_rows(key)) for shard in unseen}
        first = {(shard, 0, end): -1 for shard, end in ends.items() if shards[shard].marks and end}
        first |= {place: i for i, place in enumerate(places) if place in first}
        extra = [place for place, i in first.items() if i < 0]
        found = self._read(key, [*places, *extra])
        first |= {place: len(places) + i for i, place in enumerate(extra)}
        at = sorted(self.keys()).index(key) * MARK
        for (shard, _, _), i in first.items():
            with self._damage(key, shard):
                if self._mark(key, found[i]) != shards[shard].marks[at : at + MARK]:
                    raise ValueError("these are rows of another place")
        self._seen |= {(key, shard) for shard in unseen}
        return found[: len(places)]

    def _read(self, key: str, places: Sequence[tuple[int, int, int]]) -> list[np.ndarray]:
        import tensorstore as ts

        if not places:
            return []
        size = self.header.shard_rows
        with self._damage(key, places[0][0]):
            target = self._array(key)
            if target.shape[0] < max(shard * size + stop for shard, _, stop in places):  # it grew since it was opened
                del self._open[key]
                target = self._array(key)
        # the reads of a batch share their look-ups of the shards' indices
        with self._damage(key, places[0][0]), ts.Batch() as batch:
            futures = [target[shard * size + start : shard * size + stop].read(batch=batch) for shard, start, stop in places]
        found: list[np.ndarray] = []
        for place, future in zip(places, futures, strict=True):
            if future.exception() is None:  # thousands of places: the context manager costs as much as the look-up
                found.append(np.asarray(future.result()))
            else:
                with self._damage(key, place[0]):
                    future.result()
        return found

    def trim(self, rows: int) -> None:
        """Ends every array after ``rows`` rows, padding between shards included."""
        with storage_errors(f"cannot write {self.shown}"):
            for key in self.keys():
                self._open.pop(key, None)  # another process may have given it another length
                target = self._array(key)
                if target.shape[0] != rows:
                    self._open[key] = target.resize(exclusive_max=[rows, *target.shape[1:]]).result()

    def _damage(self, key: str, shard: int) -> Any:
        return storage_errors(
            f"shard {shard} of {key} in {self.shown} is damaged or missing",
            "`dlmscope cache repair CONFIG` computes such shards again, ActivationStore.open(...).forget(verify()) drops them",
        )

    def _as_stored(self, rows: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        found = dict(rows)
        if self.header.dtype == "int8":
            for site in self.header.sites:
                if found[site].dtype.kind in "biu":
                    raise UserError(f"site {site!r} got rows of dtype {found[site].dtype}: activations are floats")
                found[site], found[site + SCALE] = quantise(found[site])
        return found

    def _mark(self, key: str, values: np.ndarray) -> str:
        return row_digest({key: values[: self._chunk_rows(key)]}, [key])[:MARK]

    def _chunk_rows(self, key: str) -> int:
        """Columns are so small, and read so much at once, that a whole shard of one is a single chunk."""
        return self.header.chunk_rows if key in self.header.sites else self.header.shard_rows

    def _remove(self, key: str, index: int) -> None:
        # writing None deletes
        self.kv.write(self.file(key, index), None).result()

    def file(self, key: str, shard: int) -> str:
        """Where a shard of a site, of its scales or of a column lies."""
        return f"{self.folder(key)}c/{shard}" + ("/0" if key in self.header.sites else "")

    def folder(self, key: str) -> str:
        """Where the array of a key lies."""
        if key.endswith(SCALE):
            return f"scales/{key.removesuffix(SCALE)}/"
        return f"{'sites' if key in self.header.sites else 'columns'}/{key}/"

    def _array(self, key: str, at_least: int = 0) -> "ts.TensorStore":
        """The array of a key; with ``at_least`` for writing: created where it is missing, and grown."""
        import tensorstore as ts

        if key not in self._open:
            spec = self._spec(key)
            create = bool(at_least) and self.kv.read(self.folder(key) + "zarr.json").result().state != "value"
            if create:
                at_least = max(at_least, (self.header.shards or 0) * self.header.shard_rows)
                spec["metadata"] = self._metadata(key, at_least)
            # of several processes that create it at one time all but one open it
            self._open[key] = ts.open(spec, open=True, create=create, context=context()).result()
            self._check(key, self._open[key])
        target = self._open[key]
        if target.shape[0] < at_least:
            # doubled, so that a store of unknown length rewrites its metadata rarely
            known = self.header.shards
            length = known * self.header.shard_rows if known else max(at_least, 2 * target.shape[0])
            target = target.resize(exclusive_max=[length, *target.shape[1:]], expand_only=True).result()
            self._open[key] = target
        return target

    def _metadata(self, key: str, rows: int) -> dict[str, Any]:
        header = self.header
        tail = [header.sites[key]] if key in header.sites else []
        plain = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
        if self.dtype(key).itemsize == 1:
            plain[0] = {"name": "bytes"}
        sharding = {
            "chunk_shape": [self._chunk_rows(key), *tail],
            "codecs": plain,
            "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
            "index_location": "end",
        }
        return {
            "shape": [rows, *tail],
            "data_type": self.dtype(key).name,
            "fill_value": False if self.dtype(key).kind == "b" else 0,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [header.shard_rows, *tail]}},
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            "dimension_names": ["row", "feature"][: 1 + len(tail)],
        }

    def _check(self, key: str, target: "ts.TensorStore") -> None:
        header = self.header
        tail = (header.sites[key],) if key in header.sites else ()
        if (
            target.shape[1:] != tail
            or target.dtype.numpy_dtype != self.dtype(key)
            or target.chunk_layout.write_chunk.shape[0] != header.shard_rows
            or target.chunk_layout.read_chunk.shape[0] != self._chunk_rows(key)
        ):
            raise UserError(f"{self.shown}: the array {self.folder(key)} is not what the header says; delete the store and make it again")


def row_digest(rows: Mapping[str, np.ndarray], keys: Sequence[str]) -> str:
    """SHA-256 over the rows of all arrays."""
    total = hashlib.sha256()
    for key in sorted(keys):
        values = np.ascontiguousarray(rows[key])
        total.update(f"{key} {values.dtype.name} {values.shape}\n".encode())
        total.update(values.view(np.uint8).data if values.size else b"")
    return total.hexdigest()
