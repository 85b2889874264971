"""``dlmscope cache info | verify | repair``: what a store of activations holds, whether it is sound, and mending it.

    info(where)      prints a table of the stores, and of a single one its meta
    verify(where)    reads everything, names what is damaged, and raises UserError (exit code 2) where anything is
    repair(run)      harvests again what is damaged or missing in the run's stores, and verifies them

``where`` is the URL of one store (a folder, ``gs://``, ``s3://``) or a ``Run``, which means all of its stores.
"""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dlmscope_jax.activations import ActivationStore
from dlmscope_jax.activations.checking import Damage, Findings, examine, keep
from dlmscope_jax.errors import UserError
from dlmscope_jax.training import Progress

from .configs import Run

if TYPE_CHECKING:
    from .work import Work

_INFO = ("store", "state", "rows", "shards", "sites", "stored as", "columns", "size")
_DAMAGE = ("store", "shard", "file", "what is wrong")
_SHOWN = 40  # damaged files of a store that are listed one by one


def info(where: Run | str) -> None:
    """Prints what there is in the stores; of a single one also what its maker said about its rows.

    Raises:
      UserError: there is no store, or its header or manifest is damaged.
    """
    stores = [(label, ActivationStore.open(url, allow_incomplete=True)) for label, url in _stores(where)]
    print(_table([_INFO, *((label, *_described(store)) for label, store in stores)], numbers=(2, 3, 7)))
    for _, store in stores if len(stores) == 1 else []:
        print(*(f"{key}: {json.dumps(value)}" for key, value in store.meta.items()), sep="\n")


def verify(where: Run | str) -> None:
    """Reads every byte of the stores and prints a table of the damaged files.

    Raises:
      UserError: there is no store, anything is damaged, or a store was not finished.
    """
    found = {label: _examined(label, url) for label, url in _stores(where)}
    _print_damage(found)
    if wrong := _wrong(found):
        advice = "dlmscope cache repair CONFIG makes them again" if isinstance(where, str) else "dlmscope cache repair makes them again"
        raise UserError(f"cache verify: {wrong}: {advice}")
    rows = sum(shard.rows for findings in found.values() for shard in findings.sound.values())
    print(f"{len(found)} {'store is' if len(found) == 1 else 'stores are'} sound: {rows:,} rows")


def repair(run: Run | str) -> None:
    """Harvests again the shards of a run's stores that are damaged or missing, and those alone, then verifies the stores.

    Where the header is damaged, nothing says what the shards hold, and all of them are made again. Of a synthetic world's rows, which are
    appended, all after the first damaged shard are.

    Raises:
      UserError: a URL was given, the stores were made with another configuration, or they are damaged still.
    """
    if isinstance(run, str):
        raise UserError(f"cache repair needs the config of the run that made {run}, to harvest its rows again")
    from .pipeline import harvest_model
    from .work import SIDES, Work

    work = Work(run)
    for name in work.names:
        mended = False
        for side in SIDES:
            label, url = _label(work, name, side), work.store_url(name, side)
            if not url.exists():
                continue
            found = _examined(label, str(url))
            if found.damaged or not found.finished:
                _print_damage({label: found})
                keep(url, found, in_order=work.world(name) is not None)
                mended = True
        if mended:
            harvest_model(work, name)
    verify(run)


def _stores(where: Run | str) -> list[tuple[str, str]]:
    """What the stores are called and where they are."""
    if isinstance(where, str):
        return [(where.rstrip("/").rsplit("/", 1)[-1], where)]
    from .work import SIDES, Work

    work = Work(where)
    found = [(_label(work, name, side), str(work.store_url(name, side))) for name in work.names for side in SIDES]
    found = [(label, url) for label, url in found if work.folder.joinpath("harvest", label).exists()]
    if not found:
        raise UserError(f"there are no activations in {work.folder} yet: run dlmscope harvest with the same config first")
    return found


def _label(work: "Work", name: str, side: str) -> str:
    return f"{work.labels[name]}/{side}"


def _described(store: ActivationStore) -> tuple[str, ...]:
    sites = ", ".join(f"{site} [{width}]" for site, width in store.sites.items())
    of = f" of {store.expected_shards}" if store.expected_shards and not store.complete else ""
    state = "complete" if store.complete else "not finished"
    return (
        state,
        f"{store.rows:,}",
        f"{len(store.shards)}{of}",
        sites,
        store.stored_dtype.name,
        str(len(store.columns)),
        _size(store.nbytes),
    )


def _examined(label: str, url: str) -> Findings:
    try:
        rows = ActivationStore.open(url, allow_incomplete=True).rows
    except UserError:  # the examination says what it is
        rows = 0
    with Progress(f"verify {label}", total=rows, unit="rows") as bar:
        return examine(url, bar.advance)


def _print_damage(found: dict[str, Findings]) -> None:
    lines: list[tuple[str, ...]] = [_DAMAGE]
    for label, findings in found.items():
        for damage in findings.damaged[:_SHOWN]:
            lines.append((label, "-" if damage.shard is None else str(damage.shard), damage.file, damage.reason))
        if more := len(findings.damaged) - _SHOWN:
            lines += [(label, "", f"and {more} more", "")] * (more > 0)
        if not findings.finished:
            lines.append((label, "-", "COMPLETE", "missing: the harvest did not finish, or the file was removed"))
    if len(lines) > 1:
        print(_table(lines))


def _wrong(found: dict[str, Findings]) -> str:
    damaged: list[Damage] = [damage for findings in found.values() for damage in findings.damaged]
    shards = {(label, d.shard) for label, findings in found.items() for d in findings.damaged if d.shard is not None}
    unfinished = sum(not findings.finished for findings in found.values())
    parts = []
    if damaged:
        parts.append(f"{_count(len(damaged), 'damaged file')}, in {_count(len(shards), 'shard')}")
    if unfinished:
        parts.append(f"{_count(unfinished, 'store')} not finished")
    return " and ".join(parts)


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def _size(nbytes: float) -> str:
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if nbytes < 1000 or unit == "TB":
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    raise AssertionError


def _table(lines: Sequence[Sequence[Any]], numbers: Sequence[int] = ()) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    cells = lambda line: (str.rjust(c, w) if i in numbers else str.ljust(c, w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))  # noqa: E731
    return "\n".join("  ".join(cells(line)).rstrip() for line in lines)
