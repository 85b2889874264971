"""How faithfully a dictionary reconstructs held-out rows: by mask state, by corruption rate, with intervals over documents."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from dlmscope_jax.dictionaries import StreamingFidelity
from dlmscope_jax.errors import UserError

from .densities import is_binary
from .intervals import bootstrap
from .match import Dictionary, check_match, output_width, place, raw, stored_as, written_site

VERSION = 1
ROWS_FOR_DEAD = 100_000  # METHODS.md: with fewer rows, "never fired" says little about a rare latent
_COLUMNS = ("rate", "position", "document", "is_masked", "predicts_masked")
_MAX_UNITS = 4096  # documents beyond this many are put together into groups: whole documents still, but bounded memory


def evaluate(
    dictionary: Dictionary,
    store: Any,
    *,
    batch_size: int = 4096,
    seed: int = 0,
    force: bool = False,
    progress: Callable[[int], None] | None = None,
) -> dict:
    """Held-out L0, explained variance, cosine, dead and dense shares (definitions: METHODS.md, "Dictionaries").

    Args:
      dictionary: ``(spec, params, meta)``; a transcoder is compared with the rows of the site that it writes.
      store: an ``ActivationStore`` of test rows that holds the dictionary's site, and a transcoder's target.
      batch_size: rows at a time; results do not depend on it beyond rounding.
      seed: of the bootstrap.
      force: go on in spite of a mismatch between the dictionary and the store; the mismatch is then in the result.
      progress: called with the number of rows done.

    Returns:
      A dict for ``json``: ``sets`` {"all", and "masked", "visible", "predicting" where there are such rows: what
      ``StreamingFidelity.finish`` gives, with ``by_rate``, and ``intervals`` {explained_variance, l0, cosine} over documents}; ``own``, the
      set that the dictionary was trained on, where its dead share counts; ``enough_rows``, whether that set has the
      100,000 rows that a statement about dead latents needs. The interval of explained variance holds the mean fixed. Of binary codes
      the rarer value of each latent within a set is what counts as active; the interval of L0 holds fixed which one that is.

    Raises:
      UserError: when the store does not hold the site at this width, or (without ``force``) another model wrote it.
    """
    forced = check_match(dictionary, store=store, force=force)
    spec, params, meta = raw(dictionary)
    read_as, written_as = stored_as(store, meta.site), stored_as(store, written_site(dictionary))
    columns = {name: store.column(name) for name in _COLUMNS if name in store.columns}
    groups = _groups(columns, store.rows)
    own = meta.select or "all"
    if own not in groups:
        raise UserError(f"dictionary for {meta.site}: it was trained on {own} rows and the store has none of them")
    width = output_width(spec)
    states = {name: StreamingFidelity.init(spec.width, width) for name in groups}
    tally = _ByDocument(columns.get("document"), list(groups), width)
    usual = _usual(spec, params, store, read_as, groups, batch_size) if is_binary(spec) else None
    for start in range(0, store.rows, batch_size):
        stop = min(start + batch_size, store.rows)
        x = _filled(store.read(read_as, start, stop).astype(np.float32), batch_size)
        y = x if written_as == read_as else _filled(store.read(written_as, start, stop).astype(np.float32), batch_size)
        take = lambda column: _filled(column[start:stop], batch_size)  # noqa: B023, E731
        valid = {name: take(chosen) for name, chosen in groups.items()}
        rate, position = (take(columns[name]) if name in columns else None for name in ("rate", "position"))
        states, (error, cosine, active) = _add(states, spec, params, x, y, rate, position, valid, usual)
        tally.add(
            slice(start, stop), y[: stop - start], {k: v[: stop - start] for k, v in valid.items()}, np.asarray(error), np.asarray(cosine),
            {k: np.asarray(v) for k, v in active.items()},
        )  # fmt: skip
        if progress:
            progress(stop - start)
    sets = {name: {**state.finish(), "intervals": tally.intervals(name, seed)} for name, state in states.items()}
    return {
        "kind": "fidelity", "version": VERSION, "model": meta.model, "site": place(meta.site), "target": written_site(dictionary),
        "architecture": getattr(spec, "KIND", None), "k": getattr(spec, "k", None), "width": spec.width,
        "own": own, "enough_rows": sets[own]["rows"] >= ROWS_FOR_DEAD, "rows_needed_for_dead": ROWS_FOR_DEAD,
        "side": (store.meta.get("blocks") or {}).get("side"), "forced": list(forced), "seed": seed, "sets": sets,
    }  # fmt: skip


def _groups(columns: dict[str, np.ndarray], rows: int) -> dict[str, Bool[np.ndarray, " rows"]]:
    """Named sets of rows; those without rows, and mask states of a store that knows none, are left out."""
    groups = {"all": np.ones(rows, bool)}
    if "is_masked" in columns and columns["is_masked"].any():
        groups |= {"masked": columns["is_masked"].astype(bool), "visible": ~columns["is_masked"].astype(bool)}
    elif "is_masked" in columns:
        groups["visible"] = groups["all"]
    if "predicts_masked" in columns and "is_masked" in columns and (columns["predicts_masked"] != columns["is_masked"]).any():
        groups["predicting"] = columns["predicts_masked"].astype(bool)
    return {name: chosen for name, chosen in groups.items() if chosen.any()}


def _filled(values: np.ndarray, size: int) -> np.ndarray:
    """The same, with zeros up to ``size`` rows, so that the last batch runs the same program."""
    if len(values) == size:
        return values
    return np.concatenate([values, np.zeros((size - len(values), *values.shape[1:]), values.dtype)])


def _usual(
    spec: Any, params: Any, store: Any, site: str, groups: dict[str, Bool[np.ndarray, " rows"]], batch_size: int
) -> dict[str, Bool[Array, " N"]]:
    """For each set of rows, which bits are on in more than half of them."""
    counts = {name: np.zeros(spec.width, np.int64) for name in groups}
    for start in range(0, store.rows, batch_size):
        stop = min(start + batch_size, store.rows)
        x = _filled(store.read(site, start, stop).astype(np.float32), batch_size)
        for name, found in _on(spec, params, x, {k: _filled(chosen[start:stop], batch_size) for k, chosen in groups.items()}).items():
            counts[name] += np.asarray(found)
    return {name: jnp.asarray(2 * counts[name] > chosen.sum()) for name, chosen in groups.items()}


@functools.partial(jax.jit, static_argnames="spec")
def _on(spec: Any, params: Any, x: Float[Array, "b D"], valid: dict[str, Bool[Array, " b"]]) -> dict[str, Array]:
    codes = spec.encode(params, x)
    return {name: codes.fired(spec.width, chosen) for name, chosen in valid.items()}


@functools.partial(jax.jit, static_argnames="spec")
def _add(
    states: dict[str, StreamingFidelity],
    spec: Any,
    params: Any,
    x: Float[Array, "b D"],
    y: Float[Array, "b D_out"],
    rate: Float[Array, " b"] | None,
    position: Any,
    valid: dict[str, Bool[Array, " b"]],
    usual: dict[str, Bool[Array, " N"]] | None = None,
) -> tuple[dict[str, StreamingFidelity], tuple[Array, Array, dict[str, Array]]]:
    """The sums so far, and of each row its squared error, its cosine and (as each set counts them) its active latents."""
    codes = spec.encode(params, x)
    output = spec.decode(params, codes, x=x)
    states = {name: state.add(y, output, codes, rate, position, valid[name]) for name, state in states.items()}
    product = jnp.linalg.norm(y, axis=1) * jnp.linalg.norm(output, axis=1)
    cosine = jnp.where(product > 0, (y * output).sum(axis=1) / jnp.where(product > 0, product, 1.0), 0.0)
    if usual is None:
        active = dict.fromkeys(valid, codes.count())
    else:
        on = spec.dense(codes) != 0
        active = {name: (on != usual[name]).sum(axis=1, dtype=jnp.int32) for name in valid}
    return states, (jnp.square(y - output).sum(axis=1), cosine, active)


class _ByDocument:
    """Sums by document and set of rows, for the intervals; float64 on the host."""

    def __init__(self, documents: np.ndarray | None, sets: list[str], width: int):
        self.units = None
        if documents is not None and len(documents):
            names, units = np.unique(documents, return_inverse=True)
            self.units = units % _MAX_UNITS
            n = min(len(names), _MAX_UNITS)
            self.scalars = {name: np.zeros((n, 5)) for name in sets}  # rows, error, |y - shift|^2, cosine, active
            self.first = {name: np.zeros((n, width)) for name in sets}  # sum of y - shift
        self.shift: np.ndarray | None = None

    def add(
        self,
        rows: slice,
        y: np.ndarray,
        valid: dict[str, np.ndarray],
        error: np.ndarray,
        cosine: np.ndarray,
        active: dict[str, np.ndarray],
    ) -> None:
        if self.units is None:
            return
        if self.shift is None:  # activations have means far larger than their spread: sums about zero would cancel
            self.shift = y.mean(axis=0, dtype=np.float64)
        centred, units = y - self.shift, self.units[rows]
        shared = [np.ones(len(y)), error[: len(y)], np.square(centred).sum(axis=1), cosine[: len(y)]]
        for name, chosen in valid.items():
            if chosen.any():
                columns = np.stack([*shared, active[name][: len(y)]], axis=1).astype(np.float64)
                order = np.argsort(units[chosen], kind="stable")
                found, begin = np.unique(units[chosen][order], return_index=True)
                self.scalars[name][found] += np.add.reduceat(columns[chosen][order], begin, axis=0)
                self.first[name][found] += np.add.reduceat(centred[chosen][order], begin, axis=0)

    def intervals(self, name: str, seed: int) -> dict[str, dict]:
        if self.units is None:
            return {}
        rows, error, square, cosine, active = self.scalars[name].T
        mean = self.first[name].sum(axis=0) / rows.sum()
        spread = square - 2 * self.first[name] @ mean + rows * (mean @ mean)
        return {
            "explained_variance": bootstrap(error, spread, offset=1.0, sign=-1.0, seed=seed).to_json(),
            "l0": bootstrap(active, rows, seed=seed).to_json(),
            "cosine": bootstrap(cosine, rows, seed=seed).to_json(),
        }
