"""What a model loses when a dictionary's reconstruction takes the place of its activations.

For every batch of blocks the model runs once up to the site; each condition (clean, spliced, controls) then puts its own
values there and only the layers above run again. The clean condition takes the same way as the others, so a dictionary
that reconstructs perfectly loses exactly nothing.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dlmscope_jax.diffusion import align_logits, corrupt, predicts_next
from dlmscope_jax.errors import UserError
from dlmscope_jax.models import Edit, model_identity, parse_site, site_rows
from dlmscope_jax.models.sites import BLOCK_SITES

from .controls import CONDITIONS, block_keys, replacements
from .intervals import bootstrap, sum_by
from .match import Dictionary, check_match, is_transcoder, place, raw, written_site

RATES = tuple(round(0.05 + 0.1 * i, 2) for i in range(10))
VERSION = 1
_COPY_LIMIT = 2 << 30  # bytes of upper-layer weights that are copied to save running the lower layers again
_CALIBRATION_TOKENS = 1 << 14
_SAMPLE = 4096  # rows that an untrained dictionary is initialised from, as a trained one is
_MEASURED = 1024  # of them, for its threshold


def delta_loss(model: Any, params: dict, dictionary: Dictionary, blocks: Any, **options: Any) -> dict:
    """``delta_losses`` of one dictionary; the same options, one result."""
    return delta_losses(model, params, {"it": dictionary}, blocks, **options)["it"]


def delta_losses(
    model: Any,
    params: dict,
    dictionaries: Mapping[str, Dictionary],
    blocks: Any,
    *,
    rates: tuple[float, ...] | None = None,
    seed: int = 0,
    batch_size: int = 8,
    positions: str = "all",
    calibration: Any = None,
    force: bool = False,
    progress: Callable[[int], None] | None = None,
) -> dict[str, dict]:
    """Loss, KL and agreement with every dictionary spliced in, and with the controls in its place.

    An autoencoder's reconstruction takes the place of what it read; what a transcoder makes of its input takes the place of the
    activations that it was trained to produce (``mlp_out`` of the layer whose ``mlp_in`` it reads), and so do its controls.

    A diffusion model is scored at exact-count corruption rates: sum of cross-entropies over masked tokens divided by
    their number, no 1/t weight, logits shifted where the model shifts. Every condition of a block sees the same masks.
    An autoregressive model is scored on next tokens of the clean text (one rate, 0.0). ``kl`` is
    KL(clean || condition) and ``top1`` the share of equal arg max, both at the scored positions. Definitions: METHODS.md.

    Args:
      model, params: the language model.
      dictionaries: name -> ``(spec, params, meta)``; all of this model. They share the lower layers' pass.
      blocks: test ``Blocks``; a token's document is the unit of every interval.
      rates: corruption rates; default ten, .05 to .95. Not for autoregressive models.
      seed: of masks, noise, the untrained dictionary and the bootstrap.
      batch_size: blocks a forward pass; results do not depend on it.
      positions: where values are replaced: ``"all"`` (the paper), ``"masked"`` or ``"visible"`` inputs.
      calibration: ``Blocks`` that the mean control and the untrained dictionary are fitted on; default the scored ones.
      force: go on in spite of a mismatch between a dictionary and the model; the mismatch is then in the result.
      progress: called with the number of blocks done; the total is ``len(rates) * len(blocks.tokens)``.

    Returns:
      For each name a plain dict that ``json`` can write: ``rows`` (one a rate and condition, with ``rate`` None for all
      rates together, each weighing the same: loss, delta, kl, top1 with their intervals, in nats a scored token),
      ``loss_recovered`` (one a rate and named baseline), the seed, the rates and what was scored.

    Raises:
      UserError: for an unknown ``positions``, rates outside (0, 1), empty blocks, or a dictionary of another model.
    """
    diffusion = model.diffusion
    rates = _checked_rates(rates, diffusion)
    if positions not in ("all", "masked", "visible"):
        raise UserError(f"delta_loss: positions {positions!r} is not known: 'all', 'masked' or 'visible'")
    if positions == "masked" and diffusion is None:
        raise UserError("delta_loss: an autoregressive model reads no masks: positions must be 'all' or 'visible'")
    if len(blocks.tokens) == 0:
        raise UserError("delta_loss: no blocks to score; the test side is empty")
    for given in (blocks, calibration):
        if given is not None and (np.min(given.tokens) < 0 or np.max(given.tokens) >= model.config.vocab_size):
            ids = f"ids 0 to {model.config.vocab_size - 1}"
            raise UserError(f"delta_loss: the blocks hold token {np.max(given.tokens)}, the model has {ids}: give blocks of its tokenizer")
    identity = model_identity(model, params)
    forced = {name: check_match(d, model=model, identity=identity, force=force) for name, d in dictionaries.items()}
    dictionaries = {name: raw(dictionary) for name, dictionary in dictionaries.items()}
    padded = bool((np.asarray(blocks.documents) < 0).any())
    plans = {name: _Plan.make(model, params, written_site(d, model.config)) for name, d in dictionaries.items()}
    reads = {name: place(meta.site, model.config) for name, (_, _, meta) in dictionaries.items()}
    collect = tuple(sorted({site for name, plan in plans.items() for site in (reads[name], *plan.taps)}))
    batches = _Batches(blocks, batch_size, diffusion, jax.random.fold_in(jax.random.key(seed), 0), padded)
    source = (
        batches
        if calibration is None
        else dataclasses.replace(batches, blocks=calibration, padded=bool((np.asarray(calibration.documents) < 0).any()))
    )
    means, samples = _calibrate(model, params, source, rates, collect)
    fresh = jax.random.fold_in(jax.random.key(seed), 2)
    untrained = {
        name: _untrained(spec, fresh, samples[plans[name].site], samples[reads[name]] if is_transcoder(spec) else None)
        for name, (spec, _, _) in dictionaries.items()
    }
    tallies = {name: _Tally(blocks, len(rates), positions) for name in dictionaries}
    noise_key = jax.random.fold_in(jax.random.key(seed), 1)
    for r, rate in enumerate(rates):
        for batch in batches.at(r, rate):
            taps = _taps(model, params, batch["tokens"], batch["attention"], collect)
            keys = block_keys(noise_key, r, jnp.asarray(batch["block"]))
            is_masked = batch["is_masked"]
            where = {"all": jnp.ones_like(is_masked), "masked": is_masked, "visible": ~is_masked}[positions]
            for name, (spec, weights, _) in dictionaries.items():
                plan = plans[name]
                hidden, size = _conditions(
                    plan.model, spec, plan.edit_site, plan.params, weights, untrained[name],
                    batch["tokens"] if plan.reads_tokens else jnp.zeros_like(batch["tokens"]), batch["attention"],
                    taps.get(plan.entry), taps[plan.site], is_masked, means[plan.site], keys, where,
                    taps[reads[name]] if reads[name] != plan.site else None,
                )  # fmt: skip
                scores = _score(model, params, hidden, batch["targets"], batch["scored"])
                tallies[name].add(r, batch, *(np.asarray(a) for a in (*scores, size)))
            if progress:
                progress(len(np.unique(batch["block"])))
    common = {
        "kind": "delta_loss", "version": VERSION, "model_identity": identity,
        "objective": "next token" if diffusion is None else "masked tokens", "unit": "nats per scored token",
        "predicts_next": predicts_next(model), "rates": list(rates), "positions": positions, "seed": seed,
        "blocks": len(blocks.tokens), "block_length": int(blocks.tokens.shape[1]), "side": blocks.side,
        "calibration": "the scored blocks" if calibration is None else f"{len(calibration.tokens)} other blocks ({calibration.side})",
    }  # fmt: skip
    results = {}
    for name, (spec, _, meta) in dictionaries.items():
        about = {"model": meta.model, "site": reads[name], "target": plans[name].site, "k": getattr(spec, "k", None)}
        results[name] = {**common, **about, "forced": list(forced[name]), **tallies[name].result(rates, seed)}
    return results


def _checked_rates(rates: tuple[float, ...] | None, diffusion: Any) -> tuple[float, ...]:
    if diffusion is None:
        if rates is not None:
            raise UserError("delta_loss: an autoregressive model has no corruption rates; leave rates out")
        return (0.0,)
    rates = RATES if rates is None else tuple(float(rate) for rate in rates)
    if not rates or not all(0 < rate < 1 for rate in rates):
        raise UserError(f"delta_loss: rates {rates} must lie between 0 and 1")
    return rates


@dataclasses.dataclass(frozen=True)
class _Plan:
    """How the layers above a site are run: which smaller model, what it is entered with and where it is edited.

    The smaller model holds the blocks from the site upward and an all-zero embedding of one token, so that setting
    ``resid_pre@0`` gives the values exactly. Where copying those blocks' weights would take more than ``_COPY_LIMIT``
    bytes the whole model is run instead.
    """

    model: Any
    params: dict
    site: str
    entry: str | None  # the tap that resid_pre@0 is set to; None where the replaced values themselves enter there
    edit_site: str | None
    reads_tokens: bool = False

    @property
    def taps(self) -> tuple[str, ...]:
        return (self.site,) if self.entry is None else (self.site, self.entry)

    @classmethod
    def make(cls, model: Any, params: dict, site: str) -> "_Plan":
        name, layer = parse_site(site, model.config)
        above = name == "resid_post" and layer + 1 < model.config.n_layers
        first = layer + 1 if above else layer
        if name not in BLOCK_SITES:
            raise UserError(f"delta_loss: {site} can be read but not replaced")
        tree = params["params"]
        copied = sum(w.nbytes // w.shape[0] * (w.shape[0] - first) for w in jax.tree.leaves(tree["blocks"])) if first else 0
        if copied > _COPY_LIMIT:
            return cls(model, params, site, None, site, reads_tokens=True)
        upper = {
            **tree,
            "embed": jnp.zeros((1, model.config.d_model), tree["embed"].dtype),
            "blocks": jax.tree.map(lambda w: w[first:], tree["blocks"]) if first else tree["blocks"],
        }
        whole = model.config
        config = dataclasses.replace(
            whole, n_layers=whole.n_layers - first, windowed=whole.windowed[first:], vocab_size=1, tied_head=True, head_bias=False
        )
        smaller = model.clone(config=config)
        return cls(smaller, {"params": upper}, site, None if above else f"resid_pre@{layer}", None if above else f"{name}@0")


@dataclasses.dataclass(frozen=True)
class _Batches:
    """Corrupted batches of one shape; the last one is filled up with rows that are not scored."""

    blocks: Any
    size: int
    diffusion: Any
    key: Array
    padded: bool

    def at(self, rate_index: int, rate: float) -> Iterator[dict[str, Any]]:
        """All blocks at one rate."""
        for start in range(0, len(self.blocks.tokens), self.size):
            yield self._make(np.arange(start, start + self.size), np.full(self.size, rate_index), np.full(self.size, rate))

    def spread(self, rates: tuple[float, ...]) -> Iterator[dict[str, Any]]:
        """The first blocks, as many as calibration takes, each at one of the rates in turn."""
        tokens = np.asarray(self.blocks.tokens)
        total = min(len(tokens), max(_CALIBRATION_TOKENS // tokens.shape[1], 1))
        for start in range(0, total, self.size):
            index = np.arange(start, start + self.size)
            which = index % len(rates)
            yield self._make(index, which, np.asarray(rates)[which], total)

    def _make(self, index: np.ndarray, rate_index: np.ndarray, rate: np.ndarray, total: int | None = None) -> dict[str, Any]:
        total = len(self.blocks.tokens) if total is None else total
        fresh, index = index < total, np.minimum(index, total - 1)
        tokens, documents = np.asarray(self.blocks.tokens)[index], np.asarray(self.blocks.documents)[index]
        real = documents >= 0
        if self.diffusion is None:
            read, is_masked, scored = tokens, np.zeros_like(real), real.copy()
            scored[:, 0] = False  # nothing comes before the first token
        else:
            keys = block_keys(self.key, jnp.asarray(rate_index), jnp.asarray(index))
            read, is_masked = _corrupted(keys, tokens, rate.astype(np.float32), self.diffusion, ~real)
            scored = is_masked
        return {
            "tokens": jnp.asarray(read), "targets": jnp.asarray(tokens), "is_masked": jnp.asarray(is_masked),
            "scored": jnp.asarray(scored) & fresh[:, None], "attention": jnp.asarray(real) if self.padded else None,
            "documents": np.where(fresh[:, None], documents, -1), "block": index,
        }  # fmt: skip


@functools.partial(jax.jit, static_argnames="diffusion")
def _corrupted(keys: Array, tokens: Array, rate: Array, diffusion: Any, protect: Array) -> tuple[Array, Array]:
    one = lambda key, row, rate, kept: corrupt(key, row[None], rate, diffusion, protect=kept[None], exact=True)  # noqa: E731
    read, is_masked = jax.vmap(one)(keys, tokens, rate, protect)
    return read[:, 0], is_masked[:, 0]


@functools.partial(jax.jit, static_argnames=("model", "collect"))
def _taps(model: Any, params: dict, tokens: Array, attention: Array | None, collect: tuple[str, ...]) -> dict[str, Array]:
    taps = model.apply(params, tokens, attention_mask=attention, logits=False, collect=collect).taps
    return {f"{name}@{layer}": site_rows(value) for name, layers in taps.items() for layer, value in layers.items()}


@functools.partial(jax.jit, static_argnames=("model", "spec", "site"))
def _conditions(
    model: Any,
    spec: Any,
    site: str | None,
    params: dict,
    weights: Any,
    untrained: Any,
    tokens: Int[Array, "B T"],
    attention: Bool[Array, "B T"] | None,
    entry: Float[Array, "B T D"] | None,
    x: Float[Array, "B T D"],
    is_masked: Bool[Array, "B T"],
    means: Float[Array, "2 D"],
    keys: Array,
    where: Bool[Array, "B T"],
    read: Float[Array, "B T D_in"] | None = None,
) -> tuple[Float[Array, "C B T D"], Float[Array, "C B T"]]:
    """What the head reads under every condition, and each row's ``||value - x|| / ||x||``."""
    values = replacements(spec, weights, untrained, x, is_masked, means, keys, where, read)

    def run(value: Array) -> Array:
        edits = () if site is None else (Edit("set", site, value),)
        lower = value if site is None else entry
        if lower is not None:
            edits = (Edit("set", "resid_pre@0", lower.astype(jnp.float32)), *edits)
        out = model.apply(params, tokens, attention_mask=attention, logits=False, collect=("final_norm",), edits=edits)
        return out.taps["final_norm"][model.config.n_layers]

    wide = x.astype(jnp.float32)
    size = jnp.linalg.norm(values - wide, axis=-1) / jnp.maximum(jnp.linalg.norm(wide, axis=-1), 1e-12)
    return jax.lax.map(run, values), size


@functools.partial(jax.jit, static_argnames="model")
def _score(
    model: Any, params: dict, hidden: Float[Array, "C B T D"], targets: Int[Array, "B T"], scored: Bool[Array, "B T"]
) -> tuple[Float[Array, "C B T"], Float[Array, "C B T"], Bool[Array, "C B T"]]:
    """Cross-entropy, KL(condition 0 || condition) and equal arg max at the scored positions, 0 elsewhere.

    Only scored positions meet the vocabulary: they are brought to the front and taken in pieces until none is left, a
    loop of data-dependent length, so that no rate needs a program of its own.
    """
    n_conditions, batch, length, width = hidden.shape
    hidden, valid = align_logits(hidden.reshape(n_conditions * batch, length, width), model)
    scored = scored & valid
    rows, flat_targets = hidden.reshape(n_conditions, batch * length, width), targets.reshape(-1)
    head = model.output_head(params)
    piece = min(int(np.clip((1 << 21) // model.config.vocab_size, 16, 256)), batch * length)
    order = jnp.argsort(~scored.reshape(-1), stable=True)
    order = jnp.concatenate([order, jnp.full(piece, batch * length)])  # past the end: dropped on writing
    n_scored = scored.sum()

    def body(state: tuple) -> tuple:
        start, out = state
        index = jax.lax.dynamic_slice(order, (start,), (piece,))
        index = jnp.where(start + jnp.arange(piece) < n_scored, index, batch * length)
        safe = jnp.minimum(index, batch * length - 1)
        logits = head.logits(rows[:, safe])
        logp = jax.nn.log_softmax(logits, axis=-1)
        loss = -jnp.take_along_axis(logp, flat_targets[safe][None, :, None], axis=-1)[..., 0]
        kl = jnp.sum(jnp.exp(logp[:1]) * (logp[:1] - logp), axis=-1)
        best = jnp.argmax(logits, axis=-1)
        new = (loss, kl, (best == best[:1]).astype(jnp.float32))
        return start + piece, tuple(o.at[:, index].set(n, mode="drop") for o, n in zip(out, new, strict=True))

    empty = tuple(jnp.zeros((n_conditions, batch * length), jnp.float32) for _ in range(3))
    _, out = jax.lax.while_loop(lambda state: state[0] < n_scored, body, (0, empty))
    return tuple(o.reshape(n_conditions, batch, length) for o in out)


def _calibrate(
    model: Any, params: dict, batches: _Batches, rates: tuple[float, ...], collect: tuple[str, ...]
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Means by mask state and a sample of rows at every site, from a few blocks spread over the rates."""
    sums = {site: np.zeros((2, 0)) for site in collect}
    counts, samples = np.zeros(2), {site: [] for site in collect}
    for batch in batches.spread(rates):
        real = (batch["documents"] >= 0).reshape(-1)
        states = np.asarray(batch["is_masked"]).reshape(-1)[real]
        counts += np.bincount(states, minlength=2)
        for site, tap in _taps(model, params, batch["tokens"], batch["attention"], collect).items():
            rows = np.asarray(tap.astype(jnp.float32)).reshape(-1, tap.shape[-1])[real]
            new = np.stack([rows[~states].sum(0, dtype=np.float64), rows[states].sum(0, dtype=np.float64)])
            sums[site] = new if sums[site].size == 0 else sums[site] + new
            samples[site].append(rows)
    means = {site: jnp.asarray(s / np.maximum(counts, 1)[:, None], jnp.float32) for site, s in sums.items()}
    every = max(1, int(counts.sum()) // _SAMPLE)
    return means, {site: jnp.asarray(np.concatenate(parts)[::every]) for site, parts in samples.items()}


def _untrained(spec: Any, key: Array, written: Float[Array, "S D"], read: Float[Array, "S D_in"] | None) -> dict:
    """What a training would begin with, for raw rows: thresholds and a transcoder's activations depend on the units that it is made in.

    What training measures (BatchTopK's threshold) is measured once: at 0 half of all latents would be active.
    """
    by_row = spec.row_norm != "none"
    out_size = jnp.float32(1) if by_row else _size(written)
    size = out_size if read is None or by_row else _size(read)
    target = written / out_size
    x = target if read is None else read / size
    params = spec.init(key, target) if read is None else spec.init(key, target, inputs=x)
    if spec.STATISTICS:
        _, parts = spec.loss(params, x[:_MEASURED], None if read is None else target[:_MEASURED])
        params = spec.update_statistics(params, parts.statistics)
    return params if by_row else spec.fold(params, size, out_size)


def _size(rows: Float[Array, "S D"]) -> Float[Array, ""]:
    """Root mean squared norm, as training scales rows; 1 where all are 0."""
    size = jnp.sqrt(jnp.square(rows).sum(axis=1).mean())
    return jnp.where(size > 0, size, 1.0)


class _Tally:
    """Sums by rate, condition and document."""

    def __init__(self, blocks: Any, n_rates: int, positions: str):
        self.positions = positions
        self.documents = len(blocks.names)
        shape = (n_rates, len(CONDITIONS), self.documents)
        self.loss, self.kl, self.top1 = np.zeros(shape), np.zeros(shape), np.zeros(shape)
        self.count = np.zeros((n_rates, self.documents))
        self.sizes = [[[] for _ in CONDITIONS] for _ in range(n_rates)]

    def add(self, r: int, batch: dict, loss: np.ndarray, kl: np.ndarray, top1: np.ndarray, size: np.ndarray) -> None:
        scored, is_masked = np.asarray(batch["scored"]), np.asarray(batch["is_masked"])
        documents, real = batch["documents"][scored], batch["documents"] >= 0
        replaced = real & {"all": real, "masked": is_masked, "visible": ~is_masked}[self.positions]
        self.count[r] += sum_by(documents, np.ones(len(documents)), self.documents)
        for c in range(len(CONDITIONS)):
            for total, values in ((self.loss, loss), (self.kl, kl), (self.top1, top1)):
                total[r, c] += sum_by(documents, values[c][scored], self.documents)
            self.sizes[r][c].append(size[c][replaced])

    def result(self, rates: tuple[float, ...], seed: int) -> dict:
        rows, recovered, zero = [], [], CONDITIONS.index("zero")
        for label, pick in [*((rate, [r]) for r, rate in enumerate(rates)), (None, list(range(len(rates))))]:
            # all rates together: each rate weighs the same, however many tokens it masked
            weight = 1.0 / np.maximum(self.count[pick].sum(axis=1), 1.0) if label is None else np.ones(1)
            loss, kl, top1 = (np.einsum("r,rcd->cd", weight, total[pick]) for total in (self.loss, self.kl, self.top1))
            count = weight @ self.count[pick]
            tokens = int(self.count[pick].sum())
            for c, condition in enumerate(CONDITIONS):
                measured = {
                    "loss": bootstrap(loss[c], count, seed=seed), "delta": bootstrap(loss[c] - loss[0], count, seed=seed),
                    "kl": bootstrap(kl[c], count, seed=seed), "top1": bootstrap(top1[c], count, seed=seed),
                }  # fmt: skip
                sizes = np.concatenate([part for r in pick for part in self.sizes[r][c]])
                quartiles = [float(q) for q in np.quantile(sizes, [0.25, 0.5, 0.75])]
                row = {"rate": label, "condition": condition, "tokens": tokens, "documents": int((count > 0).sum())}
                rows.append({**row, "relative_change_quartiles": quartiles, **{k: v.to_json() for k, v in measured.items()}})
            for baseline in (zero, CONDITIONS.index("mean")):
                got = bootstrap(loss[baseline] - loss[1], loss[baseline] - loss[0], seed=seed)
                recovered.append({"rate": label, "baseline": CONDITIONS[baseline], **got.to_json()})
        return {"conditions": list(CONDITIONS), "rows": rows, "loss_recovered": recovered}
