"""Feature records from a store: which latents to show, where they fire, and what surrounds them."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dlmscope_jax.errors import UserError
from dlmscope_jax.models import logit_lens, model_identity

from .densities import BATCH, Firing, batches_of, firing, own_rows
from .match import Dictionary, check_match, raw
from .records import FeatureRecord, Window

N_LATENTS = 50
_LENS, _ENRICHED, _NEIGHBOURS = 10, 10, 5
_PRIOR = 1000.0  # pseudo-counts of the Dirichlet prior: a token needs some tens of occurrences to stand out
_NEEDED = ("token", "original", "block", "position")


def collect_records(
    model: Any,
    params: dict,
    dictionary: Dictionary,
    store: Any,
    tokenizer: Any = None,
    *,
    latents: Sequence[int] | None = None,
    documents: Sequence[str] | None = None,
    counted: Firing | None = None,
    top: int = 8,
    per_decile: int = 1,
    radius: int = 12,
    seed: int = 0,
    batch_size: int = BATCH,
    force: bool = False,
    progress: Callable[[int], None] | None = None,
) -> list[FeatureRecord]:
    """Records of latents that are a fair sample of the dictionary: 50, stratified by density decile, not the best ones.

    The store is read once for the densities of all latents (unless ``counted`` has them) and once for the chosen ones' windows.

    Args:
      model, params: the language model of the dictionary, for the logit lens and its identity.
      dictionary: ``(spec, params, meta)``.
      store: an ``ActivationStore`` of test rows with the columns token, original, block and position.
      tokenizer: gives the text of tokens; without it records hold ids only.
      latents: which ones instead of the sample.
      documents: names of the store's documents (``blocks.names``); default their numbers.
      counted: what ``firing`` gave for this dictionary and store.
      top: windows with the largest activations; two of them are never about places closer than ``radius``.
      per_decile: windows from each tenth (equal count) of the rows where the latent fires, weakest to strongest.
      radius: tokens on each side of the peak.
      seed: of the sample of latents and of windows.
      batch_size: rows at a time.
      force: go on in spite of a mismatch.
      progress: called with the number of rows done; the total is ``store.rows``, or twice that without ``counted``.

    Raises:
      UserError: on a mismatch, a missing column, a latent that does not exist, or a dictionary of which nothing fires here.
    """
    check_match(dictionary, model=model, identity=model_identity(model, params), store=store, tokenizer=tokenizer, force=force)
    missing = [name for name in _NEEDED if name not in store.columns]
    if missing:
        raise UserError(f"feature records need the store's columns {', '.join(_NEEDED)}; it lacks {', '.join(missing)}")
    spec, weights, meta = raw(dictionary)
    counted = counted or firing(dictionary, store, batch_size=batch_size, force=force, progress=progress)
    chosen = stratified(counted, N_LATENTS, seed) if latents is None else np.asarray(latents, np.int64)
    if len(chosen) == 0:
        raise UserError(f"dictionary for {meta.site}: no latent fires on any {counted.select} row of this store")
    if chosen.min() < 0 or chosen.max() >= spec.width:
        raise UserError(f"latents {chosen.min()} to {chosen.max()}: this dictionary has 0 to {spec.width - 1}")
    usual = None if counted.usual is None else counted.usual[chosen]
    rows, values = _where_they_fire(spec, weights, store, meta.site, chosen, usual, batch_size, progress)
    text = _Text(store, own_rows(store, meta.select), documents)
    lens = _lens(model, params, spec, weights, chosen)
    near = _neighbours(spec, weights, chosen)
    deciles, masked, visible = counted.deciles(), counted.by_state(True), counted.by_state(False)
    records = []
    for i, latent in enumerate(chosen.tolist()):
        own = text.own[rows[i]]
        windows = _windows(text, rows[i], values[i], own, top, per_decile, radius, np.random.default_rng([seed, latent]))
        enriched = text.enriched(rows[i][own])
        used = {t for w in windows for t in (*w.tokens, *w.original)} | {t for t, _, _ in enriched}
        used |= {int(t) for side in lens[i].values() for t, _ in side}
        pieces = dict(zip(sorted(used), tokenizer.pieces(sorted(used)), strict=True)) if tokenizer else {}
        fired = int(counted.fired[latent])
        records.append(
            FeatureRecord(
                model=meta.model, site=meta.site, latent=latent, select=counted.select, rows=counted.n_rows,
                density=float(counted.density[latent]), density_by_rate=counted.by_rate(latent), decile=int(deciles[latent]),
                density_masked=None if masked is None else float(masked[latent]),
                density_visible=None if visible is None else float(visible[latent]),
                max_activation=float(counted.largest[latent]),
                mean_activation=float(counted.total[latent] / fired) if fired else 0.0,
                windows=windows, logit_lens=lens[i], enriched=enriched, neighbours=near[i], pieces=pieces,
            )
        )  # fmt: skip
    return records


def stratified(counted: Firing, n: int, seed: int) -> Int[np.ndarray, " n"]:
    """``n`` living latents, equally many from each density decile (METHODS: a fair sample), in order of density decile and index.

    A decile with too few gives all it has. The same seed chooses the same latents.
    """
    deciles, found = counted.deciles(), []
    for i in range(10):
        members = np.flatnonzero(deciles == i)
        share = n // 10 + (i < n % 10)
        found.append(np.sort(np.random.default_rng([seed, i]).permutation(members)[:share]))
    return np.concatenate(found)


def _where_they_fire(
    spec: Any,
    params: Any,
    store: Any,
    site: str,
    latents: np.ndarray,
    usual: np.ndarray | None,
    batch_size: int,
    progress: Callable[[int], None] | None,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """For each latent the rows where it fires, ascending, and its activations there (1 where a bit has its rarer value)."""
    found = []
    for start, stop, x in batches_of(store, site, batch_size):
        active = np.asarray(_activations(spec, params, x, jnp.asarray(latents, jnp.int32)))[: stop - start]
        active = active if usual is None else ((active != 0) != usual).astype(np.float32)
        where, which = np.nonzero(active)
        found.append((where + start, which, active[where, which]))
        if progress:
            progress(stop - start)
    rows, which, values = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return [rows[which == i] for i in range(len(latents))], [values[which == i] for i in range(len(latents))]


@functools.partial(jax.jit, static_argnames="spec")
def _activations(spec: Any, params: Any, x: Float[Array, "b D"], latents: Int[Array, " L"]) -> Float[Array, "b L"]:
    codes = spec.encode(params, x)
    return jax.lax.map(codes.latent, latents).T


class _Text:
    """The columns of a store, and the way from a row to its neighbours in the block, whatever order the rows are in."""

    def __init__(self, store: Any, own: Bool[np.ndarray, " rows"], documents: Sequence[str] | None):
        self.own, self.names = own, documents
        self.token, self.original, self.block, self.position = (store.column(name).astype(np.int64) for name in _NEEDED)
        optional = {name: store.column(name) for name in ("is_masked", "rate", "document") if name in store.columns}
        self.masked = optional["is_masked"].astype(np.int64) if "is_masked" in optional else np.zeros(store.rows, np.int64)
        self.rate, self.document = optional.get("rate"), optional.get("document")
        self.order = np.lexsort((self.position, self.block))
        self.place = np.empty(store.rows, np.int64)
        self.place[self.order] = np.arange(store.rows)
        self.background = np.bincount(self.original[own]).astype(np.float64)

    def around(self, row: int, radius: int) -> np.ndarray:
        """Rows of the same block at most ``radius`` positions away, in order."""
        place = self.place[row]
        near = self.order[max(place - radius, 0) : place + radius + 1]
        return near[(self.block[near] == self.block[row]) & (np.abs(self.position[near] - self.position[row]) <= radius)]

    def window(self, row: int, radius: int, rows: np.ndarray, values: np.ndarray, group: str, decile: int | None = None) -> Window:
        near = self.around(row, radius)
        at = np.minimum(np.searchsorted(rows, near), len(rows) - 1)
        activations = np.where(rows[at] == near, values[at], 0.0)
        document = -1 if self.document is None else int(self.document[row])
        name = str(document) if self.names is None or document < 0 else self.names[document]
        ints = lambda column: tuple(int(v) for v in column[near])  # noqa: E731
        return Window(
            group=group, document=name, position=int(self.position[row]),
            rate=None if self.rate is None else round(float(self.rate[row]), 4),
            tokens=ints(self.token), original=ints(self.original), is_masked=ints(self.masked),
            activations=tuple(float(f"{v:.5g}") for v in activations), peak=int(np.flatnonzero(near == row)[0]), decile=decile,
        )  # fmt: skip

    def enriched(self, rows: np.ndarray) -> tuple[tuple[int, float, int], ...]:
        """Original tokens over-represented at ``rows`` against all other own rows: log-odds with an informative Dirichlet prior, as z."""
        if len(rows) == 0:
            return ()
        here = np.bincount(self.original[rows], minlength=len(self.background)).astype(np.float64)
        rest = self.background - here
        prior = _PRIOR * self.background / self.background.sum()
        seen = np.flatnonzero(here)
        a, b, p = here[seen] + prior[seen], rest[seen] + prior[seen], _PRIOR
        logit = np.log(a / (here.sum() + p - a)) - np.log(b / (rest.sum() + p - b))
        z = logit / np.sqrt(1 / a + 1 / b)
        best = np.argsort(-z, kind="stable")[:_ENRICHED]
        return tuple((int(seen[i]), round(float(z[i]), 2), int(here[seen[i]])) for i in best if z[i] > 0)


def _windows(
    text: _Text, rows: np.ndarray, values: np.ndarray, own: np.ndarray, top: int, per_decile: int, radius: int, rng: np.random.Generator
) -> tuple[Window, ...]:
    """Windows about own rows only; the activations inside them are those of all rows."""
    peaks, heights = rows[own], values[own]
    order = np.argsort(-np.abs(heights), kind="stable")
    taken: list[int] = []
    for i in order:
        if len(taken) == top:
            break
        chosen, row = peaks[np.asarray(taken, np.int64)], peaks[i]
        if not ((text.block[chosen] == text.block[row]) & (np.abs(text.position[chosen] - text.position[row]) <= radius)).any():
            taken.append(int(i))
    windows = [text.window(int(peaks[i]), radius, rows, values, "top") for i in taken]
    rising = order[::-1]
    for decile, part in enumerate(np.array_split(rising, 10)):
        fresh = part[~np.isin(part, taken)]
        for i in rng.permutation(fresh)[:per_decile]:
            windows.append(text.window(int(peaks[i]), radius, rows, values, "sampled", decile))
    return tuple(windows)


def _lens(model: Any, params: dict, spec: Any, weights: Any, latents: np.ndarray) -> list[dict[str, list[list[float]]]]:
    directions = jax.vmap(lambda i: spec.direction(weights, i))(jnp.asarray(latents))
    if directions.shape[-1] != model.config.d_model:
        return [{} for _ in latents]
    scores = np.asarray(logit_lens(model, params, directions, norm="frozen"), np.float32)
    sides = {"top": np.argsort(-scores, axis=1, kind="stable")[:, :_LENS], "bottom": np.argsort(scores, axis=1, kind="stable")[:, :_LENS]}
    return [
        {side: [[int(t), round(float(scores[i, t]), 4)] for t in tokens[i]] for side, tokens in sides.items()} for i in range(len(latents))
    ]


def _neighbours(spec: Any, weights: Any, latents: np.ndarray) -> list[tuple[tuple[int, float], ...]]:
    rows = np.asarray(jax.vmap(lambda i: spec.direction(weights, i))(jnp.arange(spec.width)), np.float32)
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    cosines = rows[latents] @ rows.T
    cosines[np.arange(len(latents)), latents] = -np.inf
    best = np.argsort(-cosines, axis=1, kind="stable")[:, :_NEIGHBOURS]
    return [tuple((int(j), round(float(cosines[i, j]), 4)) for j in best[i] if np.isfinite(cosines[i, j])) for i in range(len(latents))]
