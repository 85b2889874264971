"""What a store says about itself: its header, the list of committed shards, and the marker that it is complete.

Small keys beside the arrays:

* ``store.json``: what the arrays are and where the rows came from; written when the store is made.
* ``manifest.jsonl``: one line for each committed shard. A shard counts when its line is here and not before, so whatever a killed
  writer left behind in the arrays is never read. Where several processes write one store, each but the first has a part of its own,
  ``manifest-00001.jsonl`` and so on, so that no two write one key; readers merge the parts. Finishing gathers them into the first.
* ``COMPLETE``: written last, with the digests of the header, the manifest and each array's ``zarr.json``, as ``sha256sum -c`` reads them.

Every write replaces a whole key. The key-value stores do that atomically (the file one writes a temporary file, syncs it, renames it and
syncs the folder; object stores by nature), which is why a part is rewritten for each shard rather than extended in place.
"""

import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import UserError

if TYPE_CHECKING:
    import tensorstore as ts

HEADER, MANIFEST, COMPLETE = "store.json", "manifest.jsonl", "COMPLETE"
FORMAT, VERSION = "dlmscope-activations", 2
ANSWER = 20.0  # seconds
_LOCAL = ("file://", "memory://")
STORED = ("bfloat16", "float16", "float32", "int8")
OLDEST = 1  # without int8, several writers and marks


@dataclass(frozen=True)
class Header:
    """The constant part of a store.

    ``sites`` maps a site to its width D; ``columns`` maps a column to its numpy dtype, None until the first rows decide it; a shard has
    room for ``shard_rows`` rows and is read in chunks of ``chunk_rows``; ``meta`` is the maker's own JSON; ``shards`` is how many shards
    there will be, where that was known beforehand.
    """

    sites: dict[str, int]
    dtype: str
    shard_rows: int
    chunk_rows: int
    columns: dict[str, str] | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    shards: int | None = None


@dataclass(frozen=True)
class Shard:
    """A committed shard: its place in the arrays, how many of its rows are real, and the SHA-256 of those rows over all arrays.

    ``marks`` has eight hexadecimal digits for each array, in sorted order of their keys: of its first chunk. A reader compares them when
    it first touches a shard, so that a sound file in the wrong place is noticed without reading all of it.
    """

    shard: int
    rows: int
    digest: str
    marks: str = ""


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
        raise UserError(f"{what}: {reason(error)}{'; ' + advice if advice else ''}") from error


def reason(error: BaseException) -> str:
    """What the storage layer says, without the specification and the places in its source that it adds."""
    text = " ".join(str(error).split())
    return re.sub(r" ?\[(tensorstore_spec|source locations)=.*", "", text)[:300]


def open_location(url: str | os.PathLike[str]) -> "tuple[str, ts.KvStore]":
    """The key-value store behind a plain path or any URL that tensorstore knows (``file://``, ``gs://``, ``s3://``, ``memory://``).

    Returns the URL as shown to people (a plain path stays one) and the opened store.

    Raises:
      UserError: an unknown scheme, or a server that does not answer within ``ANSWER`` seconds: without a network, a bucket or credentials
        tensorstore would go on trying for minutes.
    """
    import tensorstore as ts

    shown = os.fspath(url)
    if not shown:
        raise UserError("the location of an activation store is empty: give a folder or a URL")
    full = shown if "://" in shown else "file://" + _quote(os.path.abspath(shown))
    with storage_errors(f"cannot open {shown!r} as a location for activations"):
        kv = ts.KvStore.open(full.rstrip("/") + "/", context=context()).result()
    if not full.startswith(_LOCAL):
        advice = "check the name of the bucket, the network, and the credentials of this machine"
        with storage_errors(f"cannot read {shown}", advice):
            answer = kv.read(HEADER)
            try:
                answer.result(timeout=ANSWER)
            except TimeoutError:
                answer.cancel()
                raise UserError(f"{shown} did not answer within {ANSWER:g} s: {advice}") from None
    return shown, kv


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
        if version not in range(OLDEST, VERSION + 1):
            raise UserError(f"{shown}: the store has format version {version}, this package reads {OLDEST} to {VERSION}")
        return _checked(Header(**found))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{shown}: {HEADER} is damaged ({error}); delete the store and make it again") from error


def _checked(header: Header) -> Header:
    """Raises ``ValueError`` or ``TypeError`` for what no writer of a header wrote."""
    numbers = [header.shard_rows, header.chunk_rows, *header.sites.values(), *([] if header.shards is None else [header.shards])]
    if header.dtype not in STORED or not all(type(n) is int and n > 0 for n in numbers) or header.shard_rows % header.chunk_rows:
        raise ValueError("these are not the dtype, sites and numbers of rows of a store")
    for dtype in (header.columns or {}).values():
        np.dtype(dtype)
    return header


def write_header(kv: "ts.KvStore", header: Header, shown: str) -> None:
    """Writes the header; ``UserError`` where ``meta`` is not JSON or the location cannot be written."""
    try:
        text = json.dumps({"format": FORMAT, "version": VERSION, **asdict(header)}, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UserError(f"the meta of an activation store must be JSON: {error}") from error
    write_key(kv, HEADER, text.encode() + b"\n", shown)


def part_of(writer: int) -> str:
    """The key in which a writer lists its shards."""
    return MANIFEST if writer == 0 else f"manifest-{writer:05d}.jsonl"


def part_keys(kv: "ts.KvStore", shown: str) -> list[str]:
    """The keys of an unfinished store's manifest, the first part last: finishing gathers the others there before it deletes them."""
    import tensorstore as ts

    try:
        keys = [key.decode() for key in kv.list(ts.KvStore.KeyRange("manifest", "manifest/")).result()]
    except (NotImplementedError, ValueError):  # a store over http cannot be listed
        keys = []
    except OSError as error:
        raise UserError(f"cannot list {shown}: {reason(error)}") from error
    return [*sorted((key for key in keys if _PART.fullmatch(key)), reverse=True), MANIFEST]


def read_parts(kv: "ts.KvStore", shown: str) -> dict[str, dict[int, Shard]]:
    """The parts of an unfinished store's manifest, each as its shards by place."""
    parts = {}
    for key in part_keys(kv, shown):
        raw = read_key(kv, key, shown)
        if raw is not None:
            parts[key] = parsed(raw, key, shown)
    return parts


_PART = re.compile(r"manifest-\d{5,}\.jsonl")


def merged(parts: dict[str, dict[int, Shard]], shown: str) -> dict[int, Shard]:
    """All shards by place; ``UserError`` where two parts contradict each other."""
    found: dict[int, Shard] = {}
    for shards in parts.values():
        for index, shard in shards.items():
            if found.setdefault(index, shard) != shard:
                raise UserError(
                    f"{shown}: shard {index} was committed twice with different rows, by harvests that ran at one time: "
                    "delete the store and make it again"
                )
    return {index: found[index] for index in sorted(found)}


def read_shards(kv: "ts.KvStore", shown: str, complete: bool = False) -> dict[int, Shard]:
    """The committed shards by their place, of all writers; empty where nothing is committed."""
    if complete:  # no part but the first counts then
        return merged({MANIFEST: parsed(read_key(kv, MANIFEST, shown) or b"", MANIFEST, shown)}, shown)
    return merged(read_parts(kv, shown), shown)


def parsed(raw: bytes, key: str, shown: str) -> dict[int, Shard]:
    """The shards that a part lists; ``UserError`` where a line is not as it was written."""
    found, wrong = readable(raw)
    if wrong:
        raise UserError(f"{shown}: {key} is damaged ({wrong[0]}); `dlmscope cache repair CONFIG` makes what it listed there again")
    return found


def readable(raw: bytes) -> tuple[dict[int, Shard], list[str]]:
    """The shards that a part lists in lines that are as they were written, and what is wrong with the others."""
    found: dict[int, Shard] = {}
    *lines, rest = raw.split(b"\n")
    wrong = ["its last line is cut off"] if rest else []
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            check = entry.pop("check", None)
            shard = Shard(**entry)
            if check != (_check(shard) if shard.marks else None):
                raise ValueError("it is not what was written")
            found[shard.shard] = shard
        except (TypeError, AttributeError, ValueError) as error:
            wrong.append(f"line {number}: {error}")
    return found, wrong


def write_shards(kv: "ts.KvStore", shards: dict[int, Shard], shown: str, part: str = MANIFEST) -> None:
    """Replaces a part of the list of committed shards, in the order of their places."""
    lines = []
    for index in sorted(shards):
        entry = asdict(shards[index])
        if entry["marks"]:
            entry["check"] = _check(shards[index])
        else:
            del entry["marks"]
        lines.append(json.dumps(entry, sort_keys=True) + "\n")
    write_key(kv, part, "".join(lines).encode(), shown)


def gather(kv: "ts.KvStore", shards: dict[int, Shard], shown: str) -> None:
    """Puts the shards of all parts into the first one, and removes the others."""
    write_shards(kv, shards, shown)
    delete(kv, [key for key in part_keys(kv, shown) if key != MANIFEST], shown)


def clear(kv: "ts.KvStore", shown: str) -> None:
    """Removes what there is of a manifest without a header, before another store begins there."""
    delete(kv, [COMPLETE, *part_keys(kv, shown)], shown)


def delete(kv: "ts.KvStore", keys: Iterable[str], shown: str) -> None:
    """Removes keys, those that there are."""
    with storage_errors(f"cannot write {shown}"):
        for key in keys:
            if kv.read(key).result().state == "value":  # a deletion would make the folder
                kv.write(key, None).result()  # None deletes


def changed(kv: "ts.KvStore", shown: str) -> list[str] | None:
    """The files that are not what they were when the store was finished; None where it was not finished."""
    raw = read_key(kv, COMPLETE, shown)
    if raw is None:
        return None
    if re.fullmatch(rb"[0-9a-f]{64}\s*", raw):  # version 1: one digest of both
        parts = [hashlib.sha256(read_key(kv, key, shown) or b"").digest() for key in (HEADER, MANIFEST)]
        return [] if raw.decode().strip() == hashlib.sha256(b"\0".join(parts)).hexdigest() else [f"{HEADER} or {MANIFEST}"]
    *lines, own = raw.split(b"\n")[:-1] or [b""]
    if own.decode(errors="replace") != _line(b"".join(line + b"\n" for line in lines), COMPLETE) or not raw.endswith(b"\n"):
        return [COMPLETE]
    keys = [line.decode().split("  ", 1)[1] for line in lines]
    found = read_keys(kv, keys, shown)
    return [key for key, line in zip(keys, lines, strict=True) if line.decode() != _line(found[key] or b"", key)]


def is_complete(kv: "ts.KvStore", shown: str) -> bool:
    """Whether the store was finished; ``UserError`` that names the header, the manifest or what else of it changed after that."""
    found = changed(kv, shown)
    if found:
        raise UserError(
            f"{shown}: {' and '.join(found)} changed after the store was finished; `dlmscope cache repair` mends the store of a run, "
            "any other has to be made again"
        )
    return found is not None


def mark_complete(kv: "ts.KvStore", shown: str, arrays: Sequence[str]) -> None:
    """Says that nothing will be added any more; ``arrays`` are the keys of their descriptions."""
    keys = (HEADER, MANIFEST, *arrays)
    found = read_keys(kv, keys, shown)
    lines = "".join(_line(found[key] or b"", key) + "\n" for key in keys).encode()
    write_key(kv, COMPLETE, lines + _line(lines, COMPLETE).encode() + b"\n", shown)


def mark_incomplete(kv: "ts.KvStore", shown: str) -> None:
    """Takes the marker away, before anything that it vouches for changes."""
    delete(kv, [COMPLETE], shown)


def _check(shard: Shard) -> str:
    return _sha(json.dumps(asdict(shard), sort_keys=True).encode())[:8]


def _line(raw: bytes, key: str) -> str:
    return f"{_sha(raw)}  {key}"


def _sha(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()


def read_keys(kv: "ts.KvStore", keys: Iterable[str], shown: str) -> dict[str, bytes | None]:
    """The bytes of several keys, read at once; None for those that do not exist."""
    with storage_errors(f"cannot read {shown}"):
        pending = {key: kv.read(key) for key in keys}
        results = {key: one.result() for key, one in pending.items()}
    return {key: result.value if result.state == "value" else None for key, result in results.items()}


def read_key(kv: "ts.KvStore", key: str, shown: str) -> bytes | None:
    """The bytes of a key, None where it does not exist."""
    with storage_errors(f"cannot read {key} of {shown}"):
        result = kv.read(key).result()
    return result.value if result.state == "value" else None


def write_key(kv: "ts.KvStore", key: str, value: bytes, shown: str) -> None:
    """Replaces a key atomically and durably."""
    with storage_errors(f"cannot write {key} of {shown}", "make room or check the permissions, then run it again"):
        kv.write(key, value).result()
