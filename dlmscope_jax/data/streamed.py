"""Text that is read bit by bit, from the hub or from a folder: row groups of parquet and lines of JSON, as far as they are needed.

A fixed number of lanes share the files. Lane ``l`` packs its own documents one after the other, and window ``w`` of blocks, which becomes
one shard of a store, is window ``w // LANES`` of lane ``w % LANES``. So no block depends on how many processes read: a process asks for
windows, and reads only the lanes that these belong to. Where a window begins in the files is noted (a cursor of a few bytes), so that a
harvest that was killed begins again there, and a shard that was damaged can be made again.

A document's side comes from the hash of its content, as in ``documents``; near-duplicates are not looked for, because that takes the
whole collection: only equal texts are sure to share a side.
"""

import gzip
import hashlib
import io
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np

from ..errors import UserError
from .documents import Side, bucket_side
from .packing import Blocks
from .tokenizer import Tokenizer, padding_id

LANES = 64
HUB = "hf://"
_TYPES = (".parquet", ".jsonl", ".jsonl.gz", ".json.gz")
_AT_ONCE = 64  # documents tokenized in one call
_ROWS = 256  # rows of a row group decoded at once


@dataclass(frozen=True)
class Cursor:
    """Where a window begins.

    Attributes:
      epoch: how often the lane has read through parts of files.
      unit: which of those that it is reading.
      at: where in it: the row of a parquet file, the byte of a JSON file, -1 for its beginning.
      token: tokens of the document there that earlier windows have.
      documents: how many of the lane's documents began before.
    """

    epoch: int = 0
    unit: int = 0
    at: int = -1
    token: int = 0
    documents: int = 0


class Files(Protocol):
    """A collection of files: what is there, and their bytes."""

    mark: str  # changes when the files do, as far as that is known

    def listing(self) -> list[tuple[str, int]]:
        """Name and size of every file."""

    def open(self, name: str) -> BinaryIO:
        """A file to read and seek in."""


class LocalFiles:
    """The files of a folder, or one file."""

    mark = ""

    def __init__(self, path: str | Path):
        self._root = Path(path)
        if not self._root.exists():
            raise UserError(f"{path} does not exist: give a file or a folder with {', '.join(_TYPES)} files")

    def listing(self) -> list[tuple[str, int]]:
        """Name and size of every visible file."""
        if self._root.is_file():
            return [(self._root.name, self._root.stat().st_size)]
        found = ((f, f.relative_to(self._root)) for f in self._root.rglob("*") if f.is_file())
        return [(name.as_posix(), f.stat().st_size) for f, name in found if not any(part.startswith(".") for part in name.parts)]

    def open(self, name: str) -> BinaryIO:
        """A file to read and seek in."""
        return open(self._root if self._root.is_file() else self._root / name, "rb")


class HubFiles:
    """The files of a dataset on the hub, ``hf://datasets/OWNER/NAME[@REVISION][/FOLDER]``, as they are in one commit."""

    def __init__(self, url: str, system: Any = None, api: Any = None):
        """``system`` and ``api`` stand for huggingface_hub's ``HfFileSystem`` and ``HfApi``.

        Raises:
          UserError: the hub does not give it.
        """
        if system is None or api is None:
            from huggingface_hub import HfApi, HfFileSystem

            system, api = HfFileSystem(), HfApi()
        self._system, self._url = system, url
        with _answers(url):
            found = system.resolve_path(url.removeprefix(HUB))
            # a branch moves: what is read is the commit that it names now
            self.mark = api.dataset_info(found.repo_id, revision=found.revision).sha
        self._root = "/".join(part for part in (f"datasets/{found.repo_id}@{self.mark}", found.path_in_repo) if part)

    def listing(self) -> list[tuple[str, int]]:
        """Name and size of every file."""
        with _answers(self._url):
            found = self._system.find(self._root, detail=True)
        if list(found) == [self._root]:  # one file
            self._root = self._root.rpartition("/")[0]
        return [(name.removeprefix(self._root).lstrip("/"), int(info["size"])) for name, info in found.items()]

    def open(self, name: str) -> BinaryIO:
        """A file to read and seek in."""
        with _answers(f"{self._url}/{name}"):
            return self._system.open(f"{self._root}/{name}", "rb")


class _answers:
    """Turns what the hub's client raises, which is of many kinds, into one line."""

    def __init__(self, what: str):
        self._what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, UserError):
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            raise UserError(f"{self._what} cannot be had from the hub ({reason}): the same command goes on from here") from error


class _Document(NamedTuple):
    epoch: int
    unit: int
    at: int
    after: int
    text: str


class StreamedBlocks:
    """Token blocks of one side of a stream, by window: what a harvest takes in place of ``Blocks``.

    Attributes:
      length: tokens of a block.
      window: blocks of a window.
      side: train, dev or test.
      digest: changes when the blocks do.
      padded: whether blocks may hold padding.
    """

    def __init__(
        self,
        files: Files | str | Path,
        tokenizer: Tokenizer,
        block_length: int,
        side: Side,
        count: int,
        window: int,
        column: str = "text",
        repeat: bool = False,
        notes: str | Path | None = None,
    ):
        """Args:
          files: a folder, a file, ``hf://datasets/OWNER/NAME`` or a collection of one's own.
          tokenizer: of the model.
          block_length: tokens of a block.
          side: which documents are read.
          count: blocks in all.
          window: consecutive blocks that one lane makes, those of one shard.
          column: of the text.
          repeat: a lane whose text has ended reads another's, and in the end its own again; otherwise the rest of its blocks are padding.
          notes: a folder where the cursors are kept, None: in memory.

        Raises:
          UserError: nothing there can be read.
        """
        if isinstance(files, str | Path):
            files = HubFiles(str(files)) if str(files).startswith(HUB) else LocalFiles(files)
        if block_length < 2:
            raise UserError(f"block_length is {block_length}: it must be at least 2")
        self._files, self._tokenizer, self._column, self._repeat = files, tokenizer, column, repeat
        self.length, self.window, self._side, self._count = block_length, window, side, count
        self.side: str = side
        found = sorted((name, size) for name, size in files.listing() if name.lower().endswith(_TYPES))
        if not found:
            raise UserError(f"data.path: the stream holds no {', '.join(_TYPES)} file")
        self._parts = -(-LANES // len(found))
        self._names = [name for name, _ in found]
        self._sizes = dict(found)
        what = [found, files.mark, column, side, repeat, block_length, window, LANES, tokenizer.digest]
        self.digest = hashlib.sha256(json.dumps(what).encode()).hexdigest()
        self.padded = not repeat
        self._cursors = Cursors(None if notes is None else Path(notes) / self.digest[:16])
        self._reading: dict[int, tuple[Cursor, Iterator[tuple[_Document, np.ndarray]]]] = {}

    def __len__(self) -> int:
        return self._count

    def take(self, rows: slice) -> Blocks:
        """The blocks of (the beginning of) one window.

        ``documents`` [n, T] holds numbers that no other document of the side has; there are no names.
        """
        index, first = divmod(rows.start, self.window)
        if first or rows.stop - rows.start > self.window:
            raise ValueError(f"{rows} is not the beginning of a window of {self.window} blocks")
        lane, place = index % LANES, index // LANES
        known, cursor = self._cursors.before(lane, place)
        for missing in range(known, place):  # a note was lost: the lane is read again from the last one that is there
            _, cursor = self._read(lane, cursor)
            self._cursors.note(lane, missing + 1, cursor)
        blocks, following = self._read(lane, cursor)
        self._cursors.note(lane, place + 1, following)
        return blocks.take(slice(rows.stop - rows.start))

    def _read(self, lane: int, cursor: Cursor) -> tuple[Blocks, Cursor]:
        """One window of a lane, and where the next one begins."""
        tokenizer = self._tokenizer
        body = self.length - (tokenizer.bos_id is not None)
        need, filled = self.window * body, 0
        flat = np.full(need, padding_id(tokenizer), np.int32)
        owner = np.full(need, -1, np.int32)
        left = self._reading.pop(lane, None)
        documents = left[1] if left is not None and left[0] == cursor else self._encoded(self._documents(lane, cursor))
        number, start = cursor.documents, cursor.token
        following = cursor
        for document, ids in documents:
            part = ids[start : start + need - filled]
            flat[filled : filled + len(part)] = part
            owner[filled : filled + len(part)] = number * LANES + lane
            filled += len(part)
            if start + len(part) < len(ids):  # the rest belongs to the next window, which needs this document again
                following = Cursor(document.epoch, document.unit, document.at, start + len(part), number)
                documents = _again(document, ids, documents)
            else:
                number += 1
                following = Cursor(document.epoch, document.unit, document.after, 0, number)
            start = 0
            if filled == need:
                break
        self._reading[lane] = (following, documents)
        return self._blocks(flat.reshape(self.window, body), owner.reshape(self.window, body)), following

    def _blocks(self, tokens: np.ndarray, owner: np.ndarray) -> Blocks:
        bos = self._tokenizer.bos_id
        if bos is not None:
            tokens = np.concatenate([np.full((len(tokens), 1), bos, np.int32), tokens], axis=1)
            owner = np.concatenate([owner[:, :1], owner], axis=1)
        return Blocks(tokens, owner, (), self._side)

    def _encoded(self, documents: Iterator[_Document]) -> Iterator[tuple[_Document, np.ndarray]]:
        end = [] if self._tokenizer.eos_id is None else [self._tokenizer.eos_id]
        while some := [document for document, _ in zip(documents, range(_AT_ONCE), strict=False)]:
            for document, ids in zip(some, self._tokenizer.encode_plain(d.text for d in some), strict=True):
                yield document, np.asarray(ids + end, np.int32)

    def _documents(self, lane: int, cursor: Cursor) -> Iterator[_Document]:
        """The lane's documents of this side, from the cursor on; without end where they are read again.

        Each time it has read all of a lane's parts, it goes on with the next lane's, so that one without text has some too.
        """
        epoch, unit, at, empty = cursor.epoch, cursor.unit, cursor.at, 0
        while self._repeat or epoch == 0:
            mine, any_here = range((lane + epoch) % LANES, len(self._names) * self._parts, LANES), False
            for place in range(unit, len(mine)):
                file, part = divmod(mine[place], self._parts)
                for where, after, text in self._texts(self._names[file], part, at):
                    if text.strip() and _side(text) == self._side:
                        any_here = True
                        yield _Document(epoch, place, where, after, text)
                at = -1
            epoch, unit, at, empty = epoch + 1, 0, -1, 0 if any_here else empty + 1
            if empty > LANES:
                raise UserError(f"data.path: no text of the stream is on the {self._side} side: give more")

    def _texts(self, name: str, part: int, at: int) -> Iterator[tuple[int, int, str]]:
        """``(at, after, text)`` of the documents of one part of a file, from the one at ``at`` on."""
        if name.lower().endswith(".parquet"):
            return self._table(name, part, at)
        return self._lines(name, part, at)

    def _table(self, name: str, part: int, at: int) -> Iterator[tuple[int, int, str]]:
        import pyarrow
        import pyarrow.parquet

        try:
            with self._files.open(name) as file, pyarrow.parquet.ParquetFile(file) as table:
                names, groups = table.schema_arrow.names, table.num_row_groups
                if self._column not in names:
                    raise UserError(f"{name} has no column {self._column!r} (its columns are {', '.join(names)})")
                row = 0
                for group in range(groups * (part + 1) // self._parts):
                    size = table.metadata.row_group(group).num_rows
                    if group >= groups * part // self._parts and row + size > at:
                        for batch in table.iter_batches(_ROWS, [group], [self._column]):
                            for value in batch.column(0).to_pylist():
                                if row >= at and value is not None:
                                    yield row, row + 1, _text(value, f"{name}, row {row}", self._column)
                                row += 1
                    else:
                        row += size
        except (pyarrow.ArrowException, OSError, EOFError) as error:
            raise UserError(f"{name} is not a readable parquet file: {(str(error) or 'it ends early').splitlines()[0]}") from None

    def _lines(self, name: str, part: int, at: int) -> Iterator[tuple[int, int, str]]:
        packed = name.lower().endswith(".gz")
        if packed and part:  # only its beginning can be found in it
            return
        size = self._sizes[name]
        first, last = (0, None) if packed else (size * part // self._parts, size * (part + 1) // self._parts)
        try:
            with self._files.open(name) as raw:
                file: Any = gzip.GzipFile(fileobj=raw) if packed else raw if raw.seekable() else io.BytesIO(raw.read())
                if at < 0 and first:
                    file.seek(first - 1)
                    at = first - 1 + len(file.readline())  # the line that began before is the part's before
                at = max(at, 0)
                file.seek(at)
                while (last is None or at < last) and (line := file.readline()):
                    after = at + len(line)
                    if line.strip():
                        yield at, after, self._value(line, f"{name}, byte {at}")
                    at = after
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{name} cannot be read: {error or 'it ends early'}") from None

    def _value(self, line: bytes, where: str) -> str:
        try:
            value = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where}, is not JSON: {error}") from None
        if not isinstance(value, dict) or self._column not in value:
            has = f"its columns are {', '.join(map(str, value))}" if isinstance(value, dict) else f"it holds a {type(value).__name__}"
            raise UserError(f"{where}, has no column {self._column!r} ({has})")
        return _text(value[self._column] or "", where, self._column)


class Cursors:
    """Where windows begin, by lane: one line a window, with a checksum, in one file a lane; a lane has one writer."""

    def __init__(self, folder: Path | None):
        self._folder = folder
        self._known: dict[int, dict[int, Cursor]] = {}

    def before(self, lane: int, window: int) -> tuple[int, Cursor]:
        """The last window up to ``window`` of which it is known where it begins, and where."""
        known = self._lane(lane)
        place = max(w for w in known if w <= window)
        return place, known[place]

    def note(self, lane: int, window: int, cursor: Cursor) -> None:
        """Keeps where a window begins, durably."""
        known = self._lane(lane)
        if known.get(window) == cursor:
            return
        known[window] = cursor
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            with open(self._file(lane), "ab") as file:
                file.write(_line({"window": window, **asdict(cursor)}))
                file.flush()
                os.fsync(file.fileno())

    def _lane(self, lane: int) -> dict[int, Cursor]:
        if lane not in self._known:
            self._known[lane] = {0: Cursor()}
            if self._folder is not None and self._file(lane).is_file():
                for line in self._file(lane).read_bytes().split(b"\n"):
                    if (entry := _entry(line)) is not None:
                        window = entry.pop("window")
                        self._known[lane][window] = Cursor(**entry)
        return self._known[lane]

    def _file(self, lane: int) -> Path:
        return self._folder / f"lane-{lane:02}.jsonl"


def _line(entry: dict[str, int]) -> bytes:
    text = json.dumps(entry).encode()
    return b"\n%08x %s\n" % (zlib.crc32(text), text)  # begun with a new line, whatever a killed writer left


def _entry(line: bytes) -> dict[str, int] | None:
    """What a line says, None where it is empty or damaged."""
    digest, _, text = line.partition(b" ")
    return json.loads(text) if digest == b"%08x" % zlib.crc32(text) else None


def _again(document: _Document, ids: np.ndarray, rest: Iterator) -> Iterator[tuple[_Document, np.ndarray]]:
    yield document, ids
    yield from rest


def _side(text: str) -> Side:
    return bucket_side(int(hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest(), 16) % 100)


def _text(value: Any, where: str, column: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: column {column!r} holds {type(value).__name__}, not text")
    return value
