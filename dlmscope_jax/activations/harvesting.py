"""Harvest: a model over token blocks, every wanted site in one forward pass, into a store.

What a block contributes depends on (seed, index of the block) alone, and a shard holds a fixed range of blocks. So a harvest that was
killed computes the shards that are not in the manifest, and ends with the store that it would have made undisturbed.

On a mesh every process feeds the blocks of its own shards to its own devices, reads back what lies there and writes it (``pieces.py``).
"""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from .. import __version__, distributed
from ..data import Blocks
from ..errors import Preempted, UserError
from ..models import Transformer, canonical_site, model_identity, site_width
from . import manifest
from .corruption import Corruption
from .forward import check_corruption, check_tokens, forward, key_words, on_mesh
from .layout import DTYPES, default_rows, row_dtype
from .pieces import Cut, OpenShard, Outputs, group_of, passes
from .store import COLUMNS, ActivationStore

_UNRECORDED = {"weight_processing": "raw"}  # what older stores do not say


class Windows(Protocol):
    """Blocks that come a window at a time, such as ``data.StreamedBlocks``; a window of them is a shard of the store.

    Attributes:
      length: tokens of a block.
      window: blocks of a window.
      side: train, dev or test.
      digest: changes when the blocks do.
      padded: whether blocks may hold padding.
    """

    length: int
    window: int
    side: str
    digest: str
    padded: bool

    def __len__(self) -> int:
        """The number of blocks."""
        ...

    def take(self, rows: slice) -> Blocks:
        """The blocks of one window. Windows with the same number modulo 64 are asked for by one process and in order."""
        ...


def harvest(
    model: Transformer,
    params: dict,
    blocks: Blocks | Windows,
    url: str | os.PathLike[str],
    sites: Sequence[str],
    corruption: Corruption,
    seed: int = 0,
    batch_size: int = 32,
    meta: Mapping[str, Any] | None = None,
    progress: Callable[[int], None] | None = None,
    dtype: str = "bfloat16",
    shard_blocks: int | None = None,
    mesh: Mesh | None = None,
) -> ActivationStore:
    """Writes the activations of every real position of ``blocks`` to a store, in the order of the blocks.

    Masked and visible positions are all kept (the reader selects), position 0 too; padding is left out. The same call again continues
    where a killed one was, on any mesh and with any number of processes, and returns at once where everything is there. Rows, their
    order and columns do not depend on the mesh; values do by the rounding of the forward pass, and not at all on an equal mesh.
    SIGTERM ends the harvest after the pass in flight; shards that are full by then are committed, others are begun again.

    Args:
      model, params: the language model.
      blocks: token blocks [n, T], or blocks that come a window at a time.
      url: where the store goes, a folder or a tensorstore URL.
      sites: ``("resid_post@3", ...)``, aliases accepted; stored under their canonical names.
      corruption: which tokens the model does not see; must be ``clean`` for an autoregressive model.
      seed: of rates and masks.
      batch_size: blocks of one forward pass, on all devices together; does not change which rows there are.
      meta: more JSON for the store's meta, such as the model's name and the tokenizer's digest; a store made with another is refused.
        The model's identity and whether its weights are raw or folded (``process_weights``) are written without being asked.
      progress: called with the number of rows that this process added (first with those that were there already).
      dtype: of the stored activations.
      shard_blocks: blocks that are written and committed together (default: about 32 MiB for each site).
      mesh: the devices to run on (default: those that the model was loaded to). Every process of the mesh calls ``harvest`` alike.

    Returns:
      The finished store.

    Raises:
      UserError: the store there was made by another model, from other blocks or with other settings; an unknown site; corruption of an
        autoregressive model; tokens that the model does not have; a ``batch_size`` that the mesh does not divide; a write that failed.
      Preempted: SIGTERM came.
      PeerLost: another process is gone.
    """
    names = tuple(sorted({canonical_site(site, model.config) for site in sites}))
    if not names:
        raise UserError('harvest needs at least one site, such as "resid_post@3"')
    widths = {name: site_width(name, model.config) for name in names}
    model, params = on_mesh(model, params, mesh)
    mesh = model.mesh
    parts = 1 if mesh is None else distributed.row_parts(mesh)
    _check(model, blocks, corruption, seed, batch_size, dtype, parts)
    origin = origin_of(model, params, blocks, names, corruption, seed, dtype, meta)
    length = origin["blocks"]["length"]
    if not isinstance(blocks, Blocks):
        if shard_blocks not in (None, blocks.window):
            raise UserError(f"harvest: shard_blocks is {shard_blocks}, but the blocks come in windows of {blocks.window}: leave it out")
        shard_blocks = blocks.window
    store, per_shard = _open_on_all(url, widths, origin, batch_size, shard_blocks)
    if store.complete:
        return store
    padded = bool((blocks.documents < 0).any()) if isinstance(blocks, Blocks) else blocks.padded
    run = partial(
        forward, model, params, key_words(jax.random.key(seed)), low=corruption.low, high=corruption.high, sites=names,
        policy=corruption.policy, padded=padded, dtype=row_dtype(dtype).name,
    )  # fmt: skip

    def take(of_shard: range) -> Blocks:
        part = blocks.take(slice(of_shard.start, of_shard.stop))
        check_tokens(model, part.tokens, "harvest")
        return part

    group, groups, writes = group_of(mesh)
    if progress is not None and store.rows and group == 0 and writes:
        progress(store.rows)
    shift = model.diffusion is not None and model.diffusion.shift
    cut = Cut(len(blocks), per_shard, batch_size // parts, frozenset(s.shard for s in store.shards), groups)
    preempted = False
    with distributed.preemption() as asked:

        def stop() -> bool:
            nonlocal preempted
            preempted = asked()
            return preempted

        for shard, piece, outputs in passes(run, take, length, cut, mesh, stop):
            added = _fill(shard, piece, outputs, cut, store, shift)
            if progress is not None:
                progress(added)
            if piece.stop == cut.blocks_of(shard.number).stop:
                store.write_shard(shard.number, shard.rows)
        store.flush()
        distributed.barrier("harvest: all shards are written")
        if preempted:
            store.refresh()
            raise Preempted(f"SIGTERM: {len(store.shards):,} of {cut.shards:,} shards are harvested; the same command goes on from there")
        distributed.on_first(lambda: _finish(store))
        if not distributed.is_first():
            store.refresh()
        if asked():
            raise Preempted("SIGTERM: this harvest is done; the same command goes on from there")
    return store


def rows_of(blocks: Blocks) -> int:
    """How many rows a harvest of these blocks has: their positions without padding."""
    return int((blocks.documents >= 0).sum())


def origin_of(
    model: Transformer,
    params: dict,
    blocks: Blocks | Windows,
    sites: Sequence[str],
    corruption: Corruption,
    seed: int,
    dtype: str,
    meta: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """What is said of rows that come from a model: the meta of their store."""
    if isinstance(blocks, Blocks):
        digest, length = blocks_digest(blocks), blocks.tokens.shape[1]
    else:
        digest, length = blocks.digest, blocks.length
    return {
        **(meta or {}),
        "weight_processing": model.config.weight_processing,
        "model_identity": model_identity(model, params),
        "sites": list(sites),
        "corruption": {"policy": corruption.policy, "low": corruption.low, "high": corruption.high},
        "seed": seed,
        "dtype": dtype,
        "blocks": {"digest": digest, "count": len(blocks), "length": length, "side": blocks.side},
        "versions": {"dlmscope_jax": __version__, "jax": jax.__version__, "numpy": np.__version__},
    }


def blocks_digest(blocks: Blocks) -> str:
    """SHA-256 of what a harvest reads of the blocks: tokens, documents, names and side."""
    total = hashlib.sha256()
    for part in (blocks.tokens, blocks.documents):
        total.update(f"{part.shape} {part.dtype}\n".encode())
        total.update(np.ascontiguousarray(part).view(np.uint8).data if part.size else b"")
    for text in (*blocks.names, blocks.side):
        total.update(hashlib.sha256(text.encode()).digest())
    return total.hexdigest()


def _fill(shard: OpenShard, piece: range, outputs: Outputs, cut: Cut, store: ActivationStore, shift: bool) -> int:
    """Puts what a pass says of a piece into its shard's rows; returns how many they are."""
    taps, corrupted, is_masked, rate = outputs
    if not shard.rows:
        n = rows_of(shard.blocks)
        shard.rows = {name: np.empty((n, width), store.dtype) for name, width in store.sites.items()}
        shard.rows |= {name: np.empty(n, kind) for name, kind in COLUMNS.items()}
    first = cut.blocks_of(shard.number).start
    here = shard.blocks.take(slice(piece.start - first, piece.stop - first))
    keep = here.documents >= 0
    to = slice(shard.filled, shard.filled + int(keep.sum()))
    for name, tap in taps.items():
        values = np.asarray(tap)[: len(piece)]
        shard.rows[name][to] = values.reshape(-1, values.shape[-1]) if keep.all() else values[keep]
    read = np.asarray(corrupted), np.asarray(is_masked), np.asarray(rate)
    for name, column in _columns(here, np.asarray(piece), *read, shift).items():
        shard.rows[name][to] = column[keep]
    shard.filled = to.stop
    return to.stop - to.start


def _columns(
    blocks: Blocks, indices: np.ndarray, corrupted: np.ndarray, is_masked: np.ndarray, rate: np.ndarray, shift: bool
) -> dict[str, np.ndarray]:
    """The columns of blocks with these indices, each [len(blocks), T]; the other arrays may have more blocks at their end."""
    n, length = len(indices), blocks.tokens.shape[1]
    is_masked = is_masked[:n]
    predicts = np.concatenate([is_masked[:, 1:], np.zeros((n, 1), bool)], axis=1) if shift else is_masked
    return {
        "token": corrupted[:n],
        "original": blocks.tokens,
        "document": blocks.documents,
        "position": np.broadcast_to(np.arange(length, dtype=np.int32), (n, length)),
        "block": np.broadcast_to(indices[:, None], (n, length)),
        "rate": np.broadcast_to(rate[:n, None], (n, length)),
        "is_masked": is_masked,
        "predicts_masked": predicts,
    }


def _check(
    model: Transformer, blocks: Blocks | Windows, corruption: Corruption, seed: int, batch_size: int, dtype: str, parts: int
) -> None:
    check_corruption(model, corruption, "harvest")
    if batch_size < 1 or seed < 0:
        raise UserError(f"harvest: batch_size {batch_size} and seed {seed}: batch_size must be at least 1, seed at least 0")
    if batch_size % parts:
        raise UserError(f"harvest: batch_size {batch_size} cannot be divided over the {parts} parts of the mesh's rows: use a multiple")
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} cannot be stored: use one of {', '.join(DTYPES)}")
    if not len(blocks) or (isinstance(blocks, Blocks) and not rows_of(blocks)):
        raise UserError("harvest: there are no blocks with text in them")
    if isinstance(blocks, Blocks):
        check_tokens(model, blocks.tokens, "harvest")


def _open_on_all(
    url: str | os.PathLike[str], sites: dict[str, int], origin: dict, batch_size: int, shard_blocks: int | None
) -> tuple[ActivationStore, int]:
    """The store to fill and how many blocks each of its shards holds; process 0 makes it where there is none, the others open it then."""
    made: list[ActivationStore] = []

    def first() -> int:
        store, per_shard = _open_or_create(url, sites, origin, batch_size, shard_blocks)
        made.append(store)
        return per_shard

    per_shard = distributed.on_first(first)
    if not made:
        made.append(ActivationStore.open(url, allow_incomplete=True, writer=jax.process_index()))
    distributed.barrier("harvest: the store is open")  # nobody commits a shard that another one takes for missing
    return made[0], per_shard


def _open_or_create(
    url: str | os.PathLike[str], sites: dict[str, int], origin: dict, batch_size: int, shard_blocks: int | None
) -> tuple[ActivationStore, int]:
    shown, kv = manifest.open_location(url)
    dtype, facts = origin["dtype"], origin["blocks"]
    if manifest.read_header(kv, shown) is None:
        shard_rows, chunk_rows = default_rows(sites, dtype)
        if shard_blocks is None:
            # whole batches, where a shard holds that many
            shard_blocks = max(shard_rows // facts["length"] // batch_size, 1) * batch_size
        elif shard_blocks < 1:
            raise UserError(f"harvest: shard_blocks is {shard_blocks}: it must be at least 1")
        room = -(-shard_blocks * facts["length"] // chunk_rows) * chunk_rows
        shards = -(-facts["count"] // shard_blocks)
        store = ActivationStore.create(url, sites, {**origin, "shard_blocks": shard_blocks}, dtype, room, chunk_rows, COLUMNS, shards)
    else:
        store = ActivationStore.open(url, allow_incomplete=True)
        for name, wanted in origin.items():
            # what NumPy or jax is newer does not make another store; what was asked does
            if name != "versions" and (found := store.meta.get(name, _UNRECORDED.get(name))) != _as_json(wanted):
                raise UserError(
                    f"the store at {shown} was made with {name.replace('_', ' ')} {_short(found)}, this harvest has {_short(wanted)}: "
                    "choose another place, or delete the store"
                )
        shard_blocks = store.meta.get("shard_blocks")
        if not isinstance(shard_blocks, int):
            raise UserError(f"the store at {shown} was not made by a harvest: choose another place")
        store.set_columns(COLUMNS)
    return store, shard_blocks


def _finish(store: ActivationStore) -> None:
    store.finish()


def _as_json(value: Any) -> Any:
    import json

    return json.loads(json.dumps(value))


def _short(value: Any) -> str:
    if isinstance(value, dict) and "digest" in value:
        value = f"{value['count']} x {value['length']} {value['side']} ({value['digest'][:12]})"
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 80 else text[:77] + "..."
