"""Damage: which files of a store are not what was written, and how to leave only the sound ones."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count, takewhile
from os import PathLike
from typing import TYPE_CHECKING

from ..errors import UserError
from . import manifest
from .layout import Arrays, row_digest
from .manifest import COMPLETE, HEADER, MANIFEST, Header, Shard

if TYPE_CHECKING:
    import tensorstore as ts

_AT_ONCE = 2  # shards that are read and hashed together


@dataclass(frozen=True)
class Damage:
    """A file that is not what was written, in the store's folder; the shard's place where it holds one."""

    file: str
    shard: int | None
    reason: str


@dataclass(frozen=True)
class Findings:
    """What an examination found.

    Attributes:
      header: None where it cannot be read; nothing else is known then.
      sound: the committed shards whose rows are what was committed.
      damaged: every file that is not; where it cannot be said which of a shard's files it is, all of them.
      finished: whether there is a marker of completeness, sound or not.
    """

    header: Header | None
    sound: dict[int, Shard]
    damaged: tuple[Damage, ...]
    finished: bool


def examine(url: str | PathLike[str], progress: Callable[[int], None] | None = None) -> Findings:
    """Reads everything in a store, finished or not, and compares it with what was committed.

    Args:
      url: where it is.
      progress: called with the number of rows that were examined.

    Raises:
      UserError: there is no store.
    """
    shown, kv = manifest.open_location(url)
    try:
        header = manifest.read_header(kv, shown)
    except UserError as error:
        return Findings(None, {}, (Damage(HEADER, None, _reason(error)),), manifest.read_key(kv, COMPLETE, shown) is not None)
    changed = manifest.changed(kv, shown)
    if header is None:
        if changed is None and manifest.read_key(kv, MANIFEST, shown) is None:
            raise UserError(f"there is no activation store at {shown}: harvest one there first, or check the path")
        return Findings(None, {}, (Damage(HEADER, None, "it is missing"),), changed is not None)
    damaged = [Damage(file, None, "it changed after the store was finished") for file in changed or ()]
    if any(HEADER in damage.file for damage in damaged):  # what it says may be wrong
        return Findings(None, {}, tuple(damaged), changed is not None)
    shards = _listed(kv, shown, changed is not None, damaged)
    arrays = Arrays(kv, shown, header)
    for key, file in zip(arrays.keys(), arrays.descriptions(), strict=True) if shards else ():
        try:
            if file not in (changed or ()):
                arrays.check(key)
                continue
        except UserError as error:
            damaged.append(Damage(file, None, _reason(error)))
        arrays.assume(key, 1 + max(shards))
    sound = {}
    for shard, found in _examined(arrays, shards):
        damaged += found
        if not found:
            sound[shard.shard] = shard
        if progress is not None:
            progress(shard.rows)
    return Findings(header, sound, tuple(damaged), changed is not None)


def keep(url: str | PathLike[str], findings: Findings, in_order: bool = False) -> None:
    """Leaves a store of which only the sound shards count, unfinished: the same harvest then makes the others again.

    Without a sound header nothing counts. A description of an array is written anew from the header. ``in_order`` also drops the
    shards after the first that is missing, for a store whose rows were appended.
    """
    shown, kv = manifest.open_location(url)
    sound = findings.sound
    if in_order:
        sound = {place: sound[place] for place in takewhile(sound.__contains__, count())}
    manifest.clear(kv, shown)
    if findings.header is None:
        manifest.delete(kv, [HEADER], shown)
        return
    manifest.write_shards(kv, sound, shown)
    arrays = Arrays(kv, shown, findings.header)
    damaged = {damage.file for damage in findings.damaged}
    manifest.delete(kv, [file for file in arrays.descriptions() if file in damaged], shown)
    if findings.header.columns is not None:
        arrays.create(1 + max(sound, default=0))


def _listed(kv: "ts.KvStore", shown: str, finished: bool, damaged: list[Damage]) -> dict[int, Shard]:
    """The shards that the manifest's readable lines list; parts that have others are damaged."""
    shards: dict[int, Shard] = {}
    for key in [MANIFEST] if finished else manifest.part_keys(kv, shown):
        raw = manifest.read_key(kv, key, shown) or b""
        found, wrong = manifest.readable(raw)
        if wrong and key not in {damage.file for damage in damaged}:
            damaged.append(Damage(key, None, wrong[0]))
        shards |= found
    return {place: shards[place] for place in sorted(shards)}


def _examined(arrays: Arrays, shards: dict[int, Shard]) -> Iterator[tuple[Shard, list[Damage]]]:
    waiting: deque[tuple[Shard, Future[list[Damage]]]] = deque()
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for shard in shards.values():
            waiting.append((shard, pool.submit(_damage_of, arrays, shard, shards)))
            if len(waiting) > _AT_ONCE:
                first, future = waiting.popleft()
                yield first, future.result()
        for first, future in waiting:
            yield first, future.result()


def _damage_of(arrays: Arrays, shard: Shard, shards: dict[int, Shard]) -> list[Damage]:
    damaged, rows = [], {}
    for key in arrays.keys():
        try:
            (rows[key],) = arrays.read_many(key, [(shard.shard, 0, shard.rows)], shards)
        except UserError as error:
            damaged.append(Damage(arrays.file(key, shard.shard), shard.shard, _reason(error)))
    if not damaged and row_digest(rows, arrays.keys()) != shard.digest:
        reason = "the shard's rows are not those that were committed; it is in one of its files"
        damaged = [Damage(arrays.file(key, shard.shard), shard.shard, reason) for key in arrays.keys()]
    return damaged


def _reason(error: UserError) -> str:
    """What the storage layer said, without the advice around it."""
    return manifest.reason(error.__cause__ or error)
