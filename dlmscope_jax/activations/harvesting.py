"""Harvest: a model over token blocks, every wanted site in one forward pass, into a store.

What a block contributes depends on (seed, index of the block) alone, and a shard holds a fixed range of blocks. So a harvest that was
killed computes the shards that are not in the manifest, and ends with the store that it would have made undisturbed.
"""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from .. import __version__
from ..data import Blocks
from ..diffusion import corrupt
from ..errors import UserError
from ..models import Transformer, canonical_site, model_identity, parse_site, site_rows, site_width
from . import manifest
from .corruption import Corruption
from .layout import DTYPES, default_rows
from .store import COLUMNS, ActivationStore

STRATA = 16  # consecutive blocks whose rates cover the range evenly
PAPER_BATCH = 8  # consecutive blocks with one rate, policy batch_rate
_UNRECORDED = {"weight_processing": "raw"}  # what older stores do not say


def harvest(
    model: Transformer,
    params: dict,
    blocks: Blocks,
    url: str | os.PathLike[str],
    sites: Sequence[str],
    corruption: Corruption,
    seed: int = 0,
    batch_size: int = 32,
    meta: Mapping[str, Any] | None = None,
    progress: Callable[[int], None] | None = None,
    dtype: str = "bfloat16",
    shard_blocks: int | None = None,
) -> ActivationStore:
    """Writes the activations of every real position of ``blocks`` to a store, in the order of the blocks.

    Masked and visible positions are all kept (the reader selects), position 0 too; padding is left out. The same call again continues
    where a killed one was, and returns at once where everything is there.

    Args:
      model, params: the language model.
      blocks: token blocks [n, T].
      url: where the store goes, a folder or a tensorstore URL.
      sites: ``("resid_post@3", ...)``, aliases accepted; stored under their canonical names.
      corruption: which tokens the model does not see; must be ``clean`` for an autoregressive model.
      seed: of rates and masks.
      batch_size: blocks of one forward pass; does not change which rows there are.
      meta: more JSON for the store's meta, such as the model's name and the tokenizer's digest; a store made with another is refused.
        The model's identity and whether its weights are raw or folded (``process_weights``) are written without being asked.
      progress: called with the number of rows that were added (first with those that were there already).
      dtype: of the stored activations.
      shard_blocks: blocks that are written and committed together (default: about 32 MiB for each site).

    Returns:
      The finished store.

    Raises:
      UserError: the store there was made by another model, from other blocks or with other settings; an unknown site; corruption of an
        autoregressive model; tokens that the model does not have; a write that failed.
    """
    names = tuple(sorted({canonical_site(site, model.config) for site in sites}))
    if not names:
        raise UserError('harvest needs at least one site, such as "resid_post@3"')
    widths = {name: site_width(name, model.config) for name in names}
    _check(model, blocks, corruption, seed, batch_size, dtype)
    real = blocks.documents >= 0
    padded = not real.all()
    run = partial(
        _forward, model, params, jax.random.key(seed), low=corruption.low, high=corruption.high, sites=names, policy=corruption.policy,
        padded=padded, dtype=dtype,
    )  # fmt: skip
    length = blocks.tokens.shape[1]
    origin = {
        **(meta or {}),
        "weight_processing": model.config.weight_processing,
        "model_identity": model_identity(model, params),
        "sites": list(names),
        "corruption": {"policy": corruption.policy, "low": corruption.low, "high": corruption.high},
        "seed": seed,
        "dtype": dtype,
        "blocks": {"digest": blocks_digest(blocks), "count": len(blocks), "length": length, "side": blocks.side},
        "versions": {"dlmscope_jax": __version__, "jax": jax.__version__, "numpy": np.__version__},
    }
    store, per_shard = _open_or_create(url, widths, origin, dtype, length, batch_size, shard_blocks)
    if store.complete:
        return store
    done = {s.shard for s in store.shards}
    if progress is not None and store.rows:
        progress(store.rows)
    shift = model.diffusion is not None and model.diffusion.shift
    for shard in range(-(-len(blocks) // per_shard)):
        if shard in done:
            continue
        first, last = shard * per_shard, min((shard + 1) * per_shard, len(blocks))
        n = int(real[first:last].sum())
        rows = {name: np.empty((n, width), DTYPES[dtype]) for name, width in store.sites.items()}
        rows |= {name: np.empty(n, kind) for name, kind in COLUMNS.items()}
        at = 0
        for indices, (taps, corrupted, is_masked, rate) in _batches(run, blocks, first, last, batch_size):
            keep = real[indices]
            part = slice(at, at + int(keep.sum()))
            for name, tap in taps.items():
                values = np.asarray(tap)[: len(indices)]
                rows[name][part] = values.reshape(-1, values.shape[-1]) if keep.all() else values[keep]
            for name, column in _columns(blocks, indices, np.asarray(corrupted), np.asarray(is_masked), np.asarray(rate), shift).items():
                rows[name][part] = column[keep]
            if progress is not None:
                progress(part.stop - at)
            at = part.stop
        store.write_shard(shard, rows)
    return store.finish()


def rows_of(blocks: Blocks) -> int:
    """How many rows a harvest of these blocks has: their positions without padding."""
    return int((blocks.documents >= 0).sum())


def blocks_digest(blocks: Blocks) -> str:
    """SHA-256 of what a harvest reads of the blocks: tokens, documents, names and side."""
    total = hashlib.sha256()
    for part in (blocks.tokens, blocks.documents):
        total.update(f"{part.shape} {part.dtype}\n".encode())
        total.update(np.ascontiguousarray(part).view(np.uint8).data if part.size else b"")
    for text in (*blocks.names, blocks.side):
        total.update(hashlib.sha256(text.encode()).digest())
    return total.hexdigest()


def block_rates(
    policy: str, key: Key[Array, ""], indices: Int[Array, " B"], low: float | Float[Array, ""], high: float | Float[Array, ""]
) -> Float[Array, " B"]:
    """The corruption rate of each block, a function of the key and its index alone."""
    if policy == "clean":
        return jnp.zeros(indices.shape, jnp.float32)
    each = jax.vmap(jax.random.fold_in, (None, 0))
    if policy == "batch_rate":
        place = jax.vmap(jax.random.uniform)(each(key, indices // PAPER_BATCH))
    else:
        orders = jax.vmap(lambda k: jax.random.permutation(k, STRATA))(each(jax.random.fold_in(key, 0), indices // STRATA))
        stratum = jnp.take_along_axis(orders, (indices % STRATA)[:, None], axis=1)[:, 0]
        place = (stratum + jax.vmap(jax.random.uniform)(each(jax.random.fold_in(key, 1), indices))) / STRATA
    return low + (high - low) * place.astype(jnp.float32)


@partial(jax.jit, static_argnums=0, static_argnames=("sites", "policy", "padded", "dtype"))
def _forward(
    model: Transformer,
    params: dict,
    key: Key[Array, ""],
    tokens: Int[Array, "B T"],
    real: Bool[Array, "B T"],
    indices: Int[Array, " B"],
    *,
    low: float,
    high: float,
    sites: tuple[str, ...],
    policy: str,
    padded: bool,
    dtype: str,
) -> tuple[dict[str, Float[Array, "B T D"]], Int[Array, "B T"], Bool[Array, "B T"], Float[Array, " B"]]:
    """Corrupts the blocks and runs the model: taps in the stored dtype, what the model read, where it is masked, the rates."""
    rate = block_rates(policy, jax.random.fold_in(key, 0), indices, low, high)
    if policy == "clean":
        corrupted, is_masked = tokens, jnp.zeros(tokens.shape, bool)
    else:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, 1), indices)
        one = lambda k, t, p, r: corrupt(k, t[None], p, model.diffusion, protect=~r[None])  # noqa: E731
        corrupted, is_masked = (a[:, 0] for a in jax.vmap(one)(keys, tokens, rate, real))
    out = model.apply(params, corrupted, attention_mask=real if padded else None, logits=False, collect=sites)
    places = {site: parse_site(site, model.config) for site in sites}
    row = lambda tap: site_rows(tap).astype(dtype)  # noqa: E731
    return {site: row(out.taps[name][layer]) for site, (name, layer) in places.items()}, corrupted, is_masked, rate


def _batches(
    run: Callable[..., Any], blocks: Blocks, first: int, last: int, batch_size: int
) -> Iterator[tuple[np.ndarray, tuple[dict[str, Array], Array, Array, Array]]]:
    """The forward passes of one shard's blocks, one of them always ahead of the copy to the host.

    A batch never spans two shards, and the last one is filled up with its own last block: one compiled shape, and the same arithmetic for a
    block whenever its shard is computed.
    """
    ahead: deque[tuple[np.ndarray, Any]] = deque()
    for start in range(first, last, batch_size):
        indices = np.arange(start, min(start + batch_size, last))
        filled = np.minimum(np.arange(start, start + batch_size), last - 1)
        out = run(blocks.tokens[filled], blocks.documents[filled] >= 0, filled.astype(np.int32))
        for leaf in jax.tree.leaves(out):
            leaf.copy_to_host_async()
        ahead.append((indices, out))
        if len(ahead) == 2:
            yield ahead.popleft()
    yield from ahead


def _columns(
    blocks: Blocks, indices: np.ndarray, corrupted: np.ndarray, is_masked: np.ndarray, rate: np.ndarray, shift: bool
) -> dict[str, np.ndarray]:
    """The columns of some blocks, each [len(indices), T]."""
    n, length = len(indices), blocks.tokens.shape[1]
    is_masked = is_masked[:n]
    predicts = np.concatenate([is_masked[:, 1:], np.zeros((n, 1), bool)], axis=1) if shift else is_masked
    return {
        "token": corrupted[:n],
        "original": blocks.tokens[indices],
        "document": blocks.documents[indices],
        "position": np.broadcast_to(np.arange(length, dtype=np.int32), (n, length)),
        "block": np.broadcast_to(indices[:, None], (n, length)),
        "rate": np.broadcast_to(rate[:n, None], (n, length)),
        "is_masked": is_masked,
        "predicts_masked": predicts,
    }


def _check(model: Transformer, blocks: Blocks, corruption: Corruption, seed: int, batch_size: int, dtype: str) -> None:
    if model.diffusion is None and corruption.policy != "clean":
        raise UserError(f"harvest: an autoregressive model has no mask token, so {str(corruption)!r} is not possible: use 'clean'")
    if batch_size < 1 or seed < 0:
        raise UserError(f"harvest: batch_size {batch_size} and seed {seed}: batch_size must be at least 1, seed at least 0")
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} cannot be stored: use one of {', '.join(DTYPES)}")
    if not len(blocks) or not rows_of(blocks):
        raise UserError("harvest: there are no blocks with text in them")
    if not 0 <= int(blocks.tokens.min()) <= int(blocks.tokens.max()) < model.config.vocab_size:
        raise UserError(
            f"harvest: the blocks have token ids {blocks.tokens.min()} to {blocks.tokens.max()}, the model has {model.config.vocab_size} "
            "entries: they were made with another tokenizer"
        )


def _open_or_create(
    url: str | os.PathLike[str], sites: dict[str, int], origin: dict, dtype: str, length: int, batch_size: int, shard_blocks: int | None
) -> tuple[ActivationStore, int]:
    """The store to fill and how many blocks each of its shards holds."""
    shown, kv = manifest.open_location(url)
    if manifest.read_header(kv, shown) is None:
        shard_rows, chunk_rows = default_rows(sites, dtype)
        if shard_blocks is None:
            # whole batches, where a shard holds that many
            shard_blocks = max(shard_rows // length // batch_size, 1) * batch_size
        elif shard_blocks < 1:
            raise UserError(f"harvest: shard_blocks is {shard_blocks}: it must be at least 1")
        room = -(-shard_blocks * length // chunk_rows) * chunk_rows
        store = ActivationStore.create(url, sites, {**origin, "shard_blocks": shard_blocks}, dtype, room, chunk_rows)
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


def _as_json(value: Any) -> Any:
    import json

    return json.loads(json.dumps(value))


def _short(value: Any) -> str:
    if isinstance(value, dict) and "digest" in value:
        value = f"{value['count']} x {value['length']} {value['side']} ({value['digest'][:12]})"
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 80 else text[:77] + "..."
