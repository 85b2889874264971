"""What a store says about itself: its header, the list of committed shards, and the marker that it is complete.

Three small keys beside the arrays:

* ``store.json``: what the arrays are and where the rows came from; written when the store is made.
* ``manifest.jsonl``: one line for each committed shard. A shard counts when its line is here and not before, so whatever a killed
  writer left behind in the arrays is never read.
* ``COMPLETE``: written last, with a digest of the other two.

Every write replaces a whole key. The key-value stores do that atomically (the file one writes a temporary file, syncs it, renames it and
syncs the folder; object stores by nature), which is why the manifest is rewritten for each shard rather than extended in place.
"""

import functools
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import UserError

if TYPE_CHECKING:
    import tensorstore as ts

HEADER, MANIFEST, COMPLETE = "store.json", "manifest.jsonl", "COMPLETE"
FORMAT, VERSION = "dlmscope-activations", 1


@dataclass(frozen=True)
class Header:
    """The constant part of a store.

    ``sites`` maps a site to its width D; ``columns`` maps a column to its numpy dtype, None until the first rows decide it; a shard has
    room for ``shard_rows`` rows and is read in chunks of ``chunk_rows``; ``meta`` is the maker's own JSON.
    """

    sites: dict[str, int]
    dtype: str
    shard_rows: int
    chunk_rows: int
    columns: dict[str, str] | None = None
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Shard:
    """A committed shard: its place in the arrays, how many of its rows are real, and the SHA-256 of those rows over all arrays."""

    shard: int
    rows: int
    digest: str


@functools.cache
def context() -> "ts.Context":
    """One tensorstore context for the process: ``memory://`` locations live in it, so that what was created can be opened."""
    import tensorstore as ts

    return ts.Context()


@contextmanager
def storage_errors(what: str, advice: str = "") -> Iterator[None]:
    """Turns what the storage layer raises (a full disk, a missing bucket, flipped bits) into one ``UserError`` line."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, NotImplementedError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{what}: {reason}{'; ' + advice if advice else ''}") from error


def open_location(url: str | os.PathLike[str]) -> "tuple[str, ts.KvStore]":
    """The key-value store behind a plain path or any URL that tensorstore knows (``file://``, ``gs://``, ``s3://``, ``memory://``).

    Returns the URL as shown to people (a plain path stays one) and the opened store. Raises ``UserError`` for an unknown scheme.
    """
    import tensorstore as ts

    shown = os.fspath(url)
    if not shown:
        raise UserError("the location of an activation store is empty: give a folder or a URL")
    full = shown if "://" in shown else "file://" + _quote(os.path.abspath(shown))
    with storage_errors(f"cannot open {shown!r} as a location for activations"):
        return shown, ts.KvStore.open(full.rstrip("/") + "/", context=context()).result()


def _quote(path: str) -> str:
    from urllib.parse import quote

    return quote(path)


def read_header(kv: "ts.KvStore", shown: str) -> Header | None:
    """The header, or None where there is no store; ``UserError`` where it cannot be understood."""
    raw = read_key(kv, HEADER, shown)
    if raw is None:
        return None
    try:
        found = json.loads(raw)
        if found.pop("format") != FORMAT:
            raise UserError(f"{shown}: {HEADER} is not of an activation store")
        version = found.pop("version")
        if version != VERSION:
            raise UserError(f"{shown}: the store has format version {version}, this package reads {VERSION}")
        return Header(**found)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{shown}: {HEADER} is damaged ({error}); delete the store and make it again") from error


def write_header(kv: "ts.KvStore", header: Header, shown: str) -> None:
    """Writes the header; ``UserError`` where ``meta`` is not JSON or the location cannot be written."""
    try:
        text = json.dumps({"format": FORMAT, "version": VERSION, **asdict(header)}, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UserError(f"the meta of an activation store must be JSON: {error}") from error
    write_key(kv, HEADER, text.encode() + b"\n", shown)


def read_shards(kv: "ts.KvStore", shown: str) -> dict[int, Shard]:
    """The committed shards by their place; empty where nothing is committed."""
    raw = read_key(kv, MANIFEST, shown)
    try:
        shards = [Shard(**json.loads(line)) for line in (raw or b"").decode().splitlines()]
    except (TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{shown}: {MANIFEST} is damaged ({error}); delete the store and make it again") from error
    return {s.shard: s for s in sorted(shards, key=lambda s: s.shard)}


def write_shards(kv: "ts.KvStore", shards: dict[int, Shard], shown: str) -> None:
    """Replaces the list of committed shards, in the order of their places."""
    lines = [json.dumps(asdict(shards[i]), sort_keys=True) for i in sorted(shards)]
    write_key(kv, MANIFEST, "".join(line + "\n" for line in lines).encode(), shown)


def is_complete(kv: "ts.KvStore", shown: str) -> bool:
    """Whether the store was finished; ``UserError`` where the header or the manifest changed after that."""
    raw = read_key(kv, COMPLETE, shown)
    if raw is None:
        return False
    if raw.decode(errors="replace").strip() != _digest(kv, shown):
        raise UserError(f"{shown}: {HEADER} or {MANIFEST} changed after the store was finished; delete the store and make it again")
    return True


def mark_complete(kv: "ts.KvStore", shown: str) -> None:
    """Says that nothing will be added any more."""
    write_key(kv, COMPLETE, _digest(kv, shown).encode() + b"\n", shown)


def mark_incomplete(kv: "ts.KvStore", shown: str) -> None:
    """Takes the marker away, before anything that it vouches for changes."""
    with storage_errors(f"cannot write {shown}"):
        kv.write(COMPLETE, None).result()  # None deletes


def _digest(kv: "ts.KvStore", shown: str) -> str:
    parts = [read_key(kv, key, shown) or b"" for key in (HEADER, MANIFEST)]
    return hashlib.sha256(b"\0".join(hashlib.sha256(p).digest() for p in parts)).hexdigest()


def read_key(kv: "ts.KvStore", key: str, shown: str) -> bytes | None:
    """The bytes of a key, None where it does not exist."""
    with storage_errors(f"cannot read {key} of {shown}"):
        result = kv.read(key).result()
    return result.value if result.state == "value" else None


def write_key(kv: "ts.KvStore", key: str, value: bytes, shown: str) -> None:
    """Replaces a key atomically and durably."""
    with storage_errors(f"cannot write {key} of {shown}", "make room or check the permissions, then run it again"):
        kv.write(key, value).result()
