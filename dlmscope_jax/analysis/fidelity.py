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
from dlmscope_jax.models import canonical_site

from .intervals import bootstrap
from .match import Dictionary, check_match, raw

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
      dictionary: ``(spec, params, meta)``.
      store: an ``ActivationStore`` of test rows that holds the dictionary's site.
      batch_size: rows at a time; results do not depend on it beyond rounding.
      seed: of the bootstrap.
      force: go on in spite of a mismatch between the dictionary and the store; the mismatch is then in the result.
      progress: called with the number of rows done.

    Returns:
      A dict for ``json``: ``sets`` {"all", and "masked", "visible", "predicting" where there are such rows: what
      ``StreamingFidelity.finish`` gives, with ``by_rate``, and ``intervals`` {explained_variance, l0, cosine} over documents}; ``own``, the
      set that the dictionary was trained on, where its dead share counts; ``enough_rows``, whether that set has the
      100,000 rows that a statement about dead latents needs. The interval of explained variance holds the mean fixed.

    Raises:
      UserError: when the store does not hold the site at this width, or (without ``force``) another model wrote it.
    """
    forced = check_match(dictionary, store=store, force=force)
    spec, params, meta = raw(dictionary)
    site = canonical_site(meta.site)
    read_as = next(name for name in store.sites if canonical_site(name) == site)
    columns = {name: store.column(name) for name in _COLUMNS if name in store.columns}
    groups = _groups(columns, store.rows)
    own = meta.select or "all"
    if own not in groups:
        raise UserError(f"dictionary for {meta.site}: it was trained on {own} rows and the store has none of them")
    states = {name: StreamingFidelity.init(spec.width, spec.d_in) for name in groups}
    tally = _ByDocument(columns.get("document"), list(groups), spec.d_in)
    for start in range(0, store.rows, batch_size):
        stop = min(start + batch_size, store.rows)
        x = _filled(store.read(read_as, start, stop).astype(np.float32), batch_size)
        take = lambda column: _filled(column[start:stop], batch_size)  # noqa: B023, E731
        valid = {name: take(chosen) for name, chosen in groups.items()}
        rate, position = (take(columns[name]) if name in columns else None for name in ("rate", "position"))
        states, per_row = _add(states, spec, params, x, rate, position, valid)
        tally.add(slice(start, stop), x[: stop - start], {k: v[: stop - start] for k, v in valid.items()}, [np.asarray(a) for a in per_row])
        if progress:
            progress(stop - start)
    sets = {name: {**state.finish(), "intervals": tally.intervals(name, seed)} for name, state in states.items()}
    return {
        "kind": "fidelity", "version": VERSION, "model": meta.model, "site": site, "k": getattr(spec, "k", None), "width": spec.width,
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


@functools.partial(jax.jit, static_argnames="spec")
def _add(
    states: dict[str, StreamingFidelity],
    spec: Any,
    params: Any,
    x: Float[Array, "b D"],
    rate: Float[Array, " b"] | None,
    position: Any,
    valid: dict[str, Bool[Array, " b"]],
) -> tuple[dict[str, StreamingFidelity], tuple[Array, Array, Array]]:
    codes = spec.encode(params, x)
    output = spec.decode(params, codes, x=x)
    states = {name: state.add(x, output, codes, rate, position, valid[name]) for name, state in states.items()}
    product = jnp.linalg.norm(x, axis=1) * jnp.linalg.norm(output, axis=1)
    cosine = jnp.where(product > 0, (x * output).sum(axis=1) / jnp.where(product > 0, product, 1.0), 0.0)
    return states, (jnp.square(x - output).sum(axis=1), codes.count(), cosine)


class _ByDocument:
    """Sums by document and set of rows, for the intervals; float64 on the host."""

    def __init__(self, documents: np.ndarray | None, sets: list[str], width: int):
        self.units = None
        if documents is not None and len(documents):
            names, units = np.unique(documents, return_inverse=True)
            self.units = units % _MAX_UNITS
            n = min(len(names), _MAX_UNITS)
            self.scalars = {name: np.zeros((n, 5)) for name in sets}  # rows, error, |x - shift|^2, active, cosine
            self.first = {name: np.zeros((n, width)) for name in sets}  # sum of x - shift
        self.shift: np.ndarray | None = None

    def add(self, rows: slice, x: np.ndarray, valid: dict[str, np.ndarray], per_row: list[np.ndarray]) -> None:
        if self.units is None:
            return
        if self.shift is None:  # activations have means far larger than their spread: sums about zero would cancel
            self.shift = x.mean(axis=0, dtype=np.float64)
        centred, units = x - self.shift, self.units[rows]
        error, active, cosine = (values[: len(x)].astype(np.float64) for values in per_row)
        columns = np.stack([np.ones(len(x)), error, np.square(centred).sum(axis=1), active, cosine], axis=1)
        for name, chosen in valid.items():
            if chosen.any():
                order = np.argsort(units[chosen], kind="stable")
                found, begin = np.unique(units[chosen][order], return_index=True)
                self.scalars[name][found] += np.add.reduceat(columns[chosen][order], begin, axis=0)
                self.first[name][found] += np.add.reduceat(centred[chosen][order], begin, axis=0)

    def intervals(self, name: str, seed: int) -> dict[str, dict]:
        if self.units is None:
            return {}
        rows, error, square, active, cosine = self.scalars[name].T
        mean = self.first[name].sum(axis=0) / rows.sum()
        spread = square - 2 * self.first[name] @ mean + rows * (mean @ mean)
        return {
            "explained_variance": bootstrap(error, spread, offset=1.0, sign=-1.0, seed=seed).to_json(),
            "l0": bootstrap(active, rows, seed=seed).to_json(),
            "cosine": bootstrap(cosine, rows, seed=seed).to_json(),
        }
