"""Documents: a named text that belongs to one side (train, dev or test), and how files become documents."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import UserError

Side = Literal["train", "dev", "test"]
SIDES: tuple[Side, ...] = ("train", "dev", "test")

_PLAIN = (".txt", ".md", ".py")
_TABLES = (".jsonl", ".parquet")


@dataclass(frozen=True)
class Document:
    """One text. ``name`` is unique within its collection; ``side`` says what the text may be used for (METHODS.md, Data)."""

    name: str
    text: str
    side: Side


def read_documents(path: str | Path, text_column: str = "text") -> list[Document]:
    """Read a file, or every file below a folder: one document per .txt, .md or .py, one per row of .jsonl and .parquet.

    Names are the path below the folder, with ``:row`` (from 0) for tables. Texts without a word are left out, other file types and
    hidden files are passed over. Sides (80 / 10 / 10) come from the content, and near-duplicates share one (``assign_sides``).
    Raises ``UserError`` for a missing path, a single file of another type, a table without ``text_column``, an unreadable file
    and for an empty corpus.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist: give a file or a folder with {_types()} files")
    if path.is_file():
        if path.suffix.lower() not in _PLAIN + _TABLES:
            raise UserError(f"{path} has the unknown file type {path.suffix or '(none)'!r}: {_types()} can be read")
        files, root = [path], path.parent
    else:
        root = path
        visible = [f for f in sorted(path.rglob("*")) if f.is_file() and not any(p.startswith(".") for p in f.relative_to(root).parts)]
        files = [f for f in visible if f.suffix.lower() in _PLAIN + _TABLES]
        if not files:
            found = sorted({f.suffix or f.name for f in visible})[:5]
            raise UserError(f"{path} holds no {_types()} file" + (f" (found {', '.join(found)})" if found else " (it is empty)"))
    named = [
        (name, text) for file in files for name, text in _read_file(file, file.relative_to(root).as_posix(), text_column) if text.strip()
    ]
    if not named:
        raise UserError(f"{path} is an empty corpus: its {len(files)} file(s) hold no text")
    sides = assign_sides([text for _, text in named])
    return [Document(name, text, side) for (name, text), side in zip(named, sides, strict=True)]


def assign_sides(texts: list[str]) -> list[Side]:
    """A side per text by the hash of its content; near-duplicates (> 30 % shared 13-grams) get that of the smallest hash among them.

    So a side does not depend on names, on order, or on unrelated texts that are added later.
    """
    from .duplicates import near_duplicate_groups  # numpy is not needed for the built-in corpus

    digests = [hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest() for text in texts]
    groups = near_duplicate_groups(texts).tolist()
    smallest: dict[int, str] = {}
    for group, digest in zip(groups, digests, strict=True):
        smallest[group] = min(smallest.get(group, digest), digest)
    return [bucket_side(int(smallest[group], 16) % 100) for group in groups]


def bucket_side(bucket: int) -> Side:
    """Side of a bucket in 0..99: 80 / 10 / 10."""
    return "train" if bucket < 80 else "dev" if bucket < 90 else "test"


def on_side(documents: Iterable[Document], side: Side) -> list[Document]:
    """The documents of one side. Raises ``UserError`` where there are none (a corpus of a few documents may miss a side)."""
    documents = list(documents)
    chosen = [d for d in documents if d.side == side]
    if not chosen:
        raise UserError(f"none of the {len(documents)} documents falls on the {side} side: give more documents, or split large files")
    return chosen


def _types() -> str:
    return ", ".join(_PLAIN + _TABLES)


def _read_file(file: Path, name: str, text_column: str) -> Iterator[tuple[str, str]]:
    if file.suffix.lower() in _PLAIN:
        yield name, _read_text(file)
        return
    rows = _jsonl_rows(file, text_column) if file.suffix.lower() == ".jsonl" else _parquet_rows(file, text_column)
    for row, text in rows:
        yield f"{name}:{row}", text


def _read_text(file: Path) -> str:
    try:
        return file.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 (byte {error.start}): convert it or leave it out") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None


def _jsonl_rows(file: Path, column: str) -> Iterator[tuple[int, str]]:
    for row, line in enumerate(_read_text(file).split("\n")):  # not splitlines: U+2028 may stand inside a JSON string
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise UserError(f"{file}, line {row + 1}, is not JSON: {error}") from None
        if not isinstance(value, dict) or column not in value:
            has = f"its columns are {', '.join(map(str, value))}" if isinstance(value, dict) else f"it holds a {type(value).__name__}"
            raise UserError(f"{file}, line {row + 1}, has no column {column!r} ({has})")
        yield from _row(file, row, value[column], column)


def _parquet_rows(file: Path, column: str) -> Iterator[tuple[int, str]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            if column not in names:
                raise UserError(f"{file} has no column {column!r} (its columns are {', '.join(names)})")
            row = 0
            for batch in table.iter_batches(batch_size=1024, columns=[column]):
                for value in batch.column(0).to_pylist():
                    yield from _row(file, row, value, column)
                    row += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file} is not a readable parquet file: {str(error).splitlines()[0]}") from None


def _row(file: Path, row: int, value: object, column: str) -> Iterator[tuple[int, str]]:
    if value is None:
        return
    if not isinstance(value, str):
        raise UserError(f"{file}, row {row}: column {column!r} holds {type(value).__name__}, not text")
    yield row, value
