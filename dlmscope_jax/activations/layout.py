"""Rows on disk: one sharded zarr3 array for each site and each column, written a whole shard at a time.

A shard is the unit of writing and committing, an inner chunk (with its CRC-32C) the unit of reading. Row ``r`` of shard ``s`` lies at
``s * shard_rows + r``; what is beyond a shard's row count is padding that nobody reads. Nothing is compressed: bf16 activations lose about
a fifth at several times the cost of the copy.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from ..errors import UserError
from .manifest import Header, Shard, context, storage_errors

if TYPE_CHECKING:
    import tensorstore as ts

CHUNK_BYTES, SHARD_BYTES = 128 << 10, 32 << 20
DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16), "float32": np.dtype(np.float32)}


def default_rows(sites: Mapping[str, int], dtype: str) -> tuple[int, int]:
    """``(shard_rows, chunk_rows)`` for these widths: chunks of about 128 KiB, shards of about 32 MiB of the widest site.

    Small chunks make a better shuffle (a chunk's rows stay together until they are permuted within a group), chunks much below 100 KiB
    make reading slow. A chunk's rows are a power of two, so that a shard is a whole number of chunks.
    """
    row = max(sites.values()) * DTYPES[dtype].itemsize
    chunk = 1 << max(0, (CHUNK_BYTES // row).bit_length() - 1)
    return chunk * max(1, SHARD_BYTES // (row * chunk)), chunk


class Arrays:
    """The arrays of one store, opened when first touched."""

    def __init__(self, kv: "ts.KvStore", shown: str, header: Header):
        self.kv, self.shown, self.header = kv, shown, header
        self._open: dict[str, ts.TensorStore] = {}

    def dtype(self, key: str) -> np.dtype:
        """The dtype of a site or a column."""
        header = self.header
        return DTYPES[header.dtype] if key in header.sites else np.dtype((header.columns or {})[key])

    def keys(self) -> list[str]:
        """Sites, then columns."""
        return [*self.header.sites, *(self.header.columns or {})]

    def write_shard(self, index: int, rows: Mapping[str, np.ndarray]) -> Shard:
        """Writes one shard durably and returns its line of the manifest, which the caller has to commit.

        ``rows`` has an array [n, D] for each site and [n] for each column, already of the stored dtype, n at most ``shard_rows``. When the
        write fails (a full disk), what there is of the shard is removed and ``UserError`` says so.
        """
        header = self.header
        n = len(next(iter(rows.values())))
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
                digest = row_digest(rows, self.keys())
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
        return Shard(index, n, digest)

    def read_many(self, key: str, places: Sequence[tuple[int, int, int]]) -> list[np.ndarray]:
        """Reads ``(shard, first row, last row + 1)`` for each place, all at once.

        Raises ``UserError`` that names the shard where a checksum does not match or a file is missing.
        """
        import tensorstore as ts

        if not places:
            return []
        with self._damage(key, places[0][0]):
            target = self._array(key)
        size = self.header.shard_rows
        # the reads of a batch share their look-ups of the shards' indices
        with self._damage(key, places[0][0]), ts.Batch() as batch:
            futures = [target[shard * size + start : shard * size + stop].read(batch=batch) for shard, start, stop in places]
        found = []
        for (shard, _, _), future in zip(places, futures, strict=True):
            with self._damage(key, shard):
                found.append(np.asarray(future.result()))
        return found

    def trim(self, rows: int) -> None:
        """Ends every array after ``rows`` rows, padding between shards included."""
        with storage_errors(f"cannot write {self.shown}"):
            for key in self.keys():
                target = self._array(key)
                if target.shape[0] != rows:
                    self._open[key] = target.resize(exclusive_max=[rows, *target.shape[1:]]).result()

    def _damage(self, key: str, shard: int) -> Any:
        return storage_errors(
            f"shard {shard} of {key} in {self.shown} is damaged or missing",
            "ActivationStore.open(...).forget(verify()) drops such shards, and the same harvest then computes them again",
        )

    def _chunk_rows(self, key: str) -> int:
        """Columns are so small, and read so much at once, that a whole shard of one is a single chunk."""
        return self.header.chunk_rows if key in self.header.sites else self.header.shard_rows

    def _remove(self, key: str, index: int) -> None:
        # writing None deletes
        self.kv.write(f"{self._folder(key)}c/{index}" + ("/0" if key in self.header.sites else ""), None).result()

    def _folder(self, key: str) -> str:
        return f"{'sites' if key in self.header.sites else 'columns'}/{key}/"

    def _array(self, key: str, at_least: int = 0) -> "ts.TensorStore":
        """The array of a key; with ``at_least`` for writing: created where it is missing, and grown."""
        import tensorstore as ts

        if key not in self._open:
            folder = self.kv / self._folder(key)
            spec = {
                "driver": "zarr3",
                "kvstore": folder.spec().to_json(),
                # a missing chunk is damage here, never zeros
                "fill_missing_data_reads": False,
                "store_data_equal_to_fill_value": True,
            }
            create = bool(at_least) and folder.read("zarr.json").result().state != "value"
            if create:
                spec["metadata"] = self._metadata(key, at_least)
            self._open[key] = ts.open(spec, open=not create, create=create, context=context()).result()
            self._check(key, self._open[key])
        target = self._open[key]
        if target.shape[0] < at_least:
            # doubled, so that a store of unknown length rewrites its metadata rarely
            target = target.resize(exclusive_max=[max(at_least, 2 * target.shape[0]), *target.shape[1:]]).result()
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
            raise UserError(f"{self.shown}: the array {self._folder(key)} is not what the header says; delete the store and make it again")


def row_digest(rows: Mapping[str, np.ndarray], keys: Sequence[str]) -> str:
    """SHA-256 over the rows of all arrays."""
    total = hashlib.sha256()
    for key in sorted(keys):
        values = np.ascontiguousarray(rows[key])
        total.update(f"{key} {values.dtype.name} {values.shape}\n".encode())
        total.update(values.view(np.uint8).data if values.size else b"")
    return total.hexdigest()
