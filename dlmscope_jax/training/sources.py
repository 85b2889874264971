"""Where training rows come from: a store, a model, arrays in memory, or anybody's iterator; all as batches by step."""

import hashlib
import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from dlmscope_jax import distributed
from dlmscope_jax.activations import ActivationStore, ActivationStream, BatchIterator
from dlmscope_jax.errors import UserError

from .spec import Select

Batch = dict[str, Any]  # site -> rows [B, D], on the host or on devices
_HALF_BITS = 2


class Growing(NamedTuple):
    """A store that is still being written, as a source: its first epoch is read as it grows, and waits for what is not there yet.

    Its order is not that of the finished store as a source, but the same whether it still grows or not (``batches(follow=True)``).
    """

    store: ActivationStore


class Source:
    """Batches of one order, shared by several dictionaries.

    Attributes:
      sites: width of the rows of each site; a source without names has the one site "".
      meta: what is known about the rows.
      fingerprint: changes when the rows do, as far as that can be told.
    """

    sites: dict[str, int]
    meta: dict[str, Any]
    fingerprint: str

    def batches(self, start_step: int, sites: list[str], process: tuple[int, int] = (0, 1)) -> Iterator[Batch]:
        """The batches from ``start_step`` on, ``{site: [B, D]}``; of several processes, ``(i, n)``, the i-th stretch [B / n, D] of each.

        A source whose rows are on the devices gives whole batches, divided over the mesh's rows.
        """
        raise NotImplementedError

    def check_mesh(self, mesh: Mesh | None) -> None:
        """Raises ``UserError`` where its rows are on other devices than the training will be."""

    def site(self, wanted: str | None) -> str:
        """The name of the site that a training asks for; a source without names has what is wanted.

        Raises:
          UserError: there is no such site, or none was named and there are several.
        """
        if len(self.sites) == 1 and (wanted is None or "" in self.sites):
            return next(iter(self.sites))
        if wanted is None:
            raise UserError(f"the source has the sites {', '.join(self.sites)}: say which one with TrainSpec(..., site=...)")
        return self.target(wanted)

    def target(self, wanted: str) -> str:
        """The name of the site that a transcoder writes.

        Raises:
          UserError: there is no such site.
        """
        if wanted not in self.sites:
            has = "its rows have no name" if "" in self.sites else f"it has {', '.join(self.sites)}"
            raise UserError(f"the source has no site {wanted!r}: {has}")
        return wanted

    def sample(self, rows: int, batch_size: int, sites: tuple[str, ...]) -> Batch:
        """The first ``rows`` rows of the training order (fewer where an epoch has fewer), float32; sites row by row together."""
        raise NotImplementedError


def open_source(source: Any, batch_size: int, seed: int, select: Select) -> Source:
    """Recognises a source.

    Args:
      source: an ``ActivationStore``, or ``Growing`` around one; an ``ActivationStream``; an array [rows, D] or a mapping from sites to
        such arrays with equal numbers of rows; or an iterable of batches [batch_size, D], or of mappings from sites to them.
      batch_size, seed: of the order.
      select: which rows of a store or a stream.

    Raises:
      UserError: something else, arrays that are empty, misshapen or not floats, fewer rows than one batch.
    """
    if isinstance(source, ActivationStore):
        return _StoreSource(source, batch_size, seed, select)
    if isinstance(source, Growing):
        return _GrowingSource(source.store, batch_size, seed, select)
    if isinstance(source, ActivationStream):
        return _StreamSource(source, batch_size, seed, select)
    if isinstance(source, str | bytes) or hasattr(source, "__fspath__"):
        raise UserError(f"train: {source!r} is a path: give the opened store, ActivationStore.open(...), or an array")
    if select != "all":
        raise UserError(f"train: select={select!r} needs a store with columns; choose the rows of arrays before and leave select at 'all'")
    if isinstance(source, Mapping):
        return _ArraySource({str(name): value for name, value in source.items()}, batch_size, seed)
    if hasattr(source, "__array__"):
        return _ArraySource({"": source}, batch_size, seed)
    if isinstance(source, Iterable):
        return _IteratorSource(iter(source), batch_size)
    raise UserError(f"train: cannot read rows from a {type(source).__name__}: give a store, an array [rows, D] or an iterable of batches")


class _StoreSource(Source):
    def __init__(self, store: ActivationStore, batch_size: int, seed: int, select: Select):
        self._store, self._batch_size, self._seed, self._select = store, batch_size, seed, select
        self.sites, self.meta = store.sites, store.meta
        shards = "".join(f"{s.shard} {s.rows} {s.digest}\n" for s in store.shards)
        self.fingerprint = hashlib.sha256(shards.encode()).hexdigest()

    def batches(self, start_step: int, sites: list[str], process: tuple[int, int] = (0, 1)) -> BatchIterator:
        return self._store.batches(self._batch_size, self._seed, start_step, sites, self._select, columns=(), process=process)

    def sample(self, rows: int, batch_size: int, sites: tuple[str, ...]) -> Batch:
        batches = self.batches(0, list(sites))
        try:
            return _sample(batches, rows, batch_size, batches.steps_per_epoch)
        finally:
            batches.close()


class _GrowingSource(_StoreSource):
    def __init__(self, store: ActivationStore, batch_size: int, seed: int, select: Select):
        super().__init__(store, batch_size, seed, select)
        self.fingerprint = f"growing {store.identity}"  # its rows are not all there yet

    def batches(self, start_step: int, sites: list[str], process: tuple[int, int] = (0, 1)) -> BatchIterator:
        store = self._store
        return store.batches(self._batch_size, self._seed, start_step, sites, self._select, columns=(), process=process, follow=True)


class _StreamSource(Source):
    """Its batches are on the devices of the stream's mesh, which is to be the training's."""

    def __init__(self, stream: ActivationStream, batch_size: int, seed: int, select: Select):
        self._stream, self._batch_size, self._seed, self._select = stream, batch_size, seed, select
        self.sites, self.meta = stream.sites, stream.meta
        self.fingerprint = stream.identity

    def check_mesh(self, mesh: Mesh | None) -> None:
        here, there = (None if one is None else dict(one.shape) for one in (self._stream.mesh, mesh))
        if self._stream.mesh != mesh and (self._stream.mesh or mesh).size > 1:
            raise UserError(
                f"train: the stream's model is on {here or 'one device'}, the training on {there or 'one device'}: use one mesh"
            )

    def batches(self, start_step: int, sites: list[str], process: tuple[int, int] = (0, 1)) -> Iterator[Batch]:
        return self._stream.batches(self._batch_size, self._seed, start_step, sites, self._select)

    def sample(self, rows: int, batch_size: int, sites: tuple[str, ...]) -> Batch:
        """As above; these few rows are the only ones that leave the devices."""
        batches = self._stream.batches(self._batch_size, self._seed, 0, sorted(set(sites)), self._select)
        n = min(-(-rows // batch_size), batches.rows // batch_size)
        try:
            return _joined([distributed.to_host(batch) for batch in itertools.islice(batches, n)], rows)
        finally:
            batches.close()


class _ArraySource(Source):
    """The order: each epoch a permutation drawn from (seed, epoch); what does not fill a batch at its end is dropped."""

    def __init__(self, arrays: dict[str, Any], batch_size: int, seed: int):
        self._arrays = {name: _checked(value, f"the array {name!r}" if name else "the array") for name, value in arrays.items()}
        if not self._arrays:
            raise UserError("train: the mapping of arrays is empty: give at least one site")
        lengths = {name: len(array) for name, array in self._arrays.items()}
        if len(set(lengths.values())) > 1:
            raise UserError(f"train: the sites have different numbers of rows ({', '.join(f'{n}: {v}' for n, v in lengths.items())})")
        self._rows = next(iter(lengths.values()))
        if self._rows < batch_size:
            raise UserError(f"train: {self._rows} rows are fewer than one batch of {batch_size}: give more rows or a smaller batch_size")
        self._batch_size, self._seed = batch_size, seed
        self.sites = {name: array.shape[1] for name, array in self._arrays.items()}
        self.meta = {}
        self._per_epoch = self._rows // batch_size
        self.fingerprint = _fingerprint(self._arrays)

    def batches(self, start_step: int, sites: list[str], process: tuple[int, int] = (0, 1)) -> Iterator[Batch]:
        current, order = -1, np.zeros(0, np.int64)
        for step in itertools.count(start_step):
            epoch, index = divmod(step, self._per_epoch)
            if epoch != current:
                current, order = epoch, np.random.default_rng([self._seed, epoch]).permutation(self._rows)
            rows = _part(order[index * self._batch_size : (index + 1) * self._batch_size], process)
            yield {site: _rows_of(self._arrays[site], rows) for site in sites}

    def sample(self, rows: int, batch_size: int, sites: tuple[str, ...]) -> Batch:
        return _sample(self.batches(0, list(sites)), rows, batch_size, self._per_epoch)


class _IteratorSource(Source):
    """The order is the iterator's own; to resume, the same iterator is read from its start again."""

    def __init__(self, iterator: Iterator[Any], batch_size: int):
        self._iterator, self._batch_size, self._pulled = iterator, batch_size, 0
        self._waiting: deque[Batch] = deque()
        self.sites = {}
        self._pull()
        self.sites = {name: rows.shape[1] for name, rows in self._waiting[0].items()}
        self.meta, self.fingerprint = {}, "iterator"

    def batches(self, start_step: int, sites: list[str], process: tuple[int, int] = (0, 1)) -> Iterator[Batch]:
        for step in itertools.count():
            if not self._waiting:
                self._pull()
            batch = self._waiting.popleft()
            if step >= start_step:
                yield {site: _part(batch[site], process) for site in sites}

    def sample(self, rows: int, batch_size: int, sites: tuple[str, ...]) -> Batch:
        """As above, from batches that wait for the training to read them once more."""
        for _ in range(-(-rows // batch_size) - len(self._waiting)):
            try:
                self._pull()
            except UserError:  # it has fewer; whether that is enough shows when training reads them
                break
        return _joined([{site: batch[site] for site in sites} for batch in self._waiting], rows)

    def _pull(self) -> None:
        what = f"batch {self._pulled} of the iterator"
        try:
            item = next(self._iterator)
        except StopIteration:
            raise UserError(
                f"train: the iterator ended after {self._pulled} batches of {self._batch_size}: give more rows or fewer steps"
            ) from None
        named = item if isinstance(item, Mapping) else {"": item}
        # copied, because the maker may fill the same buffer again while the step still reads it
        batch = {str(name): np.array(_checked(rows, f"{what} ({name})" if name else what)) for name, rows in named.items()}
        widths = {name: rows.shape[1] for name, rows in batch.items()}
        if self.sites and widths != self.sites:
            raise UserError(f"train: {what} has the sites and widths {widths}, the first one had {self.sites}")
        for rows in batch.values():
            if len(rows) != self._batch_size:
                raise UserError(f"train: {what} has {len(rows)} rows, TrainSpec says batch_size={self._batch_size}")
        self._waiting.append(batch)
        self._pulled += 1


def _part(rows: np.ndarray, process: tuple[int, int]) -> np.ndarray:
    index, count = process
    size = len(rows) // count
    return rows[index * size : (index + 1) * size]


def _sample(batches: Iterator[Batch], rows: int, batch_size: int, per_epoch: int) -> Batch:
    return _joined(list(itertools.islice(batches, min(-(-rows // batch_size), per_epoch))), rows)


def _joined(batches: list[Batch], rows: int) -> Batch:
    return {site: np.concatenate([np.asarray(batch[site], np.float32) for batch in batches])[:rows] for site in batches[0]}


def _checked(value: Any, what: str) -> np.ndarray:
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"train: {what} cannot be made a NumPy array ({' '.join(str(error).split())[:100]})") from None
    if array.ndim != 2 or not array.size:
        raise UserError(f"train: {what} has shape {list(array.shape)}: it must be [rows, D], neither of them 0")
    # bfloat16 is of kind V for NumPy, and says what it is by name
    if array.dtype.kind != "f" and array.dtype.name != "bfloat16":
        raise UserError(f"train: {what} holds {array.dtype}: activations are floats")
    return array


def _rows_of(array: np.ndarray, rows: np.ndarray) -> np.ndarray:
    if array.dtype.itemsize == _HALF_BITS and array.dtype.kind != "f":
        return array.view(np.uint16)[rows].view(array.dtype)  # NumPy copies bfloat16 element by element
    return array[rows]


def _fingerprint(arrays: dict[str, np.ndarray]) -> str:
    """Of shapes, dtypes and up to 256 rows from all over each array: whole arrays may be far larger than memory."""
    total = hashlib.sha256()
    for name, array in arrays.items():
        total.update(f"{name} {array.dtype.name} {array.shape}\n".encode())
        rows = np.ascontiguousarray(array[np.linspace(0, len(array) - 1, min(256, len(array)), dtype=np.int64)])
        total.update(rows.view(np.uint8).data)
    return total.hexdigest()
