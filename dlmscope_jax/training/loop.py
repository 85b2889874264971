"""``train``: one pass over a source, several dictionaries, everything on disk that another process needs to go on."""

import dataclasses
import functools
import json
import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dlmscope_jax.activations import Corruption
from dlmscope_jax.config import to_mapping
from dlmscope_jax.dictionaries import Dictionary, DictionaryMeta, load_dictionary, save_dictionary
from dlmscope_jax.errors import UserError

from .checkpoints import difference, load_latest, remove_checkpoints, save_checkpoint
from .heap import release_freed_memory
from .metrics import MetricsFile
from .progress import Progress
from .sources import Batch, Source, open_source
from .spec import TrainSpec
from .state import TrainState, final_params, init_state
from .step import Metrics, Rows, Step, make_step

# Unblocked programs pile up memory, and on virtual CPU devices their collectives can deadlock.
_IN_FLIGHT = 2
_BAD_IN_A_ROW = 20
_CHECKPOINTS, _METRICS = "checkpoints", "metrics.jsonl"
_log = logging.getLogger(__name__)


class Trained(NamedTuple):
    """A trained dictionary; ``params`` act on raw rows. ``path`` is its folder, with ``metrics.jsonl`` beside the weights."""

    spec: Dictionary
    params: dict
    meta: DictionaryMeta
    path: Path


def train(
    specs: TrainSpec | Iterable[TrainSpec],
    source: Any,
    run_dir: str | Path,
    meta: Mapping[str, Any] | None = None,
    checkpoint_every: int = 1000,
    progress: Progress | None = None,
) -> list[Trained]:
    """Trains one or several dictionaries from one pass over ``source`` and saves each in ``run_dir/<spec.name>``.

    Each batch is read and moved once, and dictionaries of one program are compiled once. A dictionary comes out as if it had been
    trained alone: on CPU bit for bit, on accelerators, whose scatters add in no fixed order, up to rounding. Their steps are separate
    calls: states stacked in one array and scanned over would have to be copied out of it and back, parameters and moments, in each
    step (scripts/bench_train_several.py measures both).

    The same call again goes on where a killed one was, equal in the same sense, and loads what is finished. Checkpoints are removed
    when their dictionary is saved. An iterator must then give the same batches from its start.

    Args:
      specs: trainings with equal ``steps``, ``batch_size``, ``seed`` and ``select``, of different ``name``.
      source: an ``ActivationStore``; an array [rows, D] or a mapping from sites to arrays; an iterable of batches [batch_size, D].
      run_dir: the folder of the run.
      meta: fields of ``DictionaryMeta`` that the source does not know (``model``, ``layer``, ``tokenizer``, ...).
      checkpoint_every: steps between two checkpoints.
      progress: counts steps; earlier runs' steps are skipped.

    Returns:
      The trained dictionaries in the order of ``specs``.

    Raises:
      UserError: specs that do not fit each other or the source; another training's files in ``run_dir``; checkpoints of which
        none is whole; a source that ends early; 20 batches in a row that are not finite; a full disk.
    """
    wanted = [specs] if isinstance(specs, TrainSpec) else list(specs)
    _check(wanted, checkpoint_every)
    first = wanted[0]
    rows = open_source(source, first.batch_size, first.seed, first.select)
    runs = [_Run(spec, rows, Path(run_dir) / spec.name, meta or {}) for spec in wanted]
    unfinished = [run for run in runs if not run.finished()]
    # dictionaries of one site, which usually stand together, start from the same sample
    sample = functools.lru_cache(maxsize=1)(rows.sample)
    for run in unfinished:
        run.begin(sample)
    try:
        _loop(unfinished, rows, first.steps, checkpoint_every, progress)
    finally:
        for run in unfinished:
            run.metrics.close()
    if progress is not None and not unfinished:
        progress.skip(first.steps)
    return [run.result() for run in runs]


def _loop(runs: list["_Run"], rows: Source, steps: int, checkpoint_every: int, progress: Progress | None) -> None:
    if not runs:
        return
    start = min(run.start for run in runs)
    if progress is not None and start:
        progress.skip(start)
    sites = sorted({site for run in runs for site in run.sites})
    batches = rows.batches(start, sites)
    waiting: deque[tuple[int, list[tuple[_Run, Metrics]]]] = deque()

    def settle(most: int) -> None:
        """Reads the metrics of the oldest steps, which waits for them, until at most so many are in flight."""
        while len(waiting) > most:
            step, found = waiting.popleft()
            for run, metrics in found:
                run.note(step, jax.device_get(metrics))
            if progress is not None:
                progress.note(_words([run.latest for run in runs if run.latest]))
                progress.advance()

    try:
        for step in range(start, steps):
            batch = jax.device_put(next(batches))
            waiting.append((step, [(run, run.update(batch)) for run in runs if run.start <= step]))
            settle(_IN_FLIGHT - 1)
            if (step + 1) % checkpoint_every == 0 and step + 1 < steps:
                settle(0)
                for run in runs:
                    if run.start <= step:
                        run.checkpoint(step + 1)
        settle(0)
    finally:
        close = getattr(batches, "close", None)
        if close is not None:
            close()
    for run in runs:
        run.finish()


class _Run:
    """One dictionary of a call to ``train``: its state, and its files."""

    state: TrainState
    metrics: MetricsFile
    step: Step

    def __init__(self, spec: TrainSpec, rows: Source, folder: Path, meta: Mapping[str, Any]):
        self.spec, self.folder = spec, folder
        dictionary = spec.dictionary
        self.reads = tuple(map(rows.target, spec.site)) if isinstance(spec.site, tuple) else (rows.site(spec.site),)
        self.writes = tuple(map(rows.target, (spec.target,) if isinstance(spec.target, str) else spec.target or ()))
        _check_width(rows, self.reads, spec, "reads", "d_in", dictionary.d_in)
        _check_width(rows, self.writes, spec, "writes", "d_out", dictionary.out)
        # what makes this training this training; a site's label does not matter where there is only one
        training = to_mapping(spec)
        training["dictionary"] = {"kind": dictionary.KIND, **training["dictionary"]}
        self.identity = {"training": json.loads(json.dumps(training)), "source": rows.fingerprint}
        self.meta = _meta(spec, self.reads, rows.meta, meta, {**self.identity, "rows": spec.steps * spec.batch_size})
        self.start, self.bad = 0, 0
        self.latest: tuple[float, float] | None = None  # explained variance and dead share, for the progress line

    def finished(self) -> bool:
        """Whether this very training is already saved.

        Raises:
          UserError: another dictionary is saved there.
        """
        if not (self.folder / "config.json").exists():
            return False
        there = load_dictionary(self.folder)[2].extra
        found = {name: there.get(name) for name in self.identity}
        if found != self.identity:
            raise UserError(
                f"{self.folder} holds a dictionary of another training ({difference(found, self.identity)}): "
                "choose another run_dir or delete it"
            )
        remove_checkpoints(self.folder / _CHECKPOINTS)  # a process killed at the very end leaves them
        return True

    @property
    def sites(self) -> tuple[str, ...]:
        """Every site that it needs of a batch."""
        return self.reads + self.writes

    def begin(self, sample: Callable[[int, int, tuple[str, ...]], Batch]) -> None:
        """The state of the newest checkpoint, or a fresh one."""
        spec = self.spec
        self.step, self.compiled = make_step(spec), False
        found = load_latest(self.folder / _CHECKPOINTS, jax.eval_shape(lambda: init_state(spec)), self.identity)
        if found is None:
            some = sample(spec.sample_rows, spec.batch_size, self.sites)
            self.state = init_state(spec, sample=_rows_of(some, self.reads), targets=_rows_of(some, self.writes) if self.writes else None)
        else:
            self.start, self.state = found
            _log.info("%s goes on from step %d", self.folder, self.start)
        self.metrics = MetricsFile(self.folder / _METRICS, spec.steps, spec.batch_size, self.start)

    def update(self, batch: Mapping[str, jax.Array]) -> Metrics:
        """Starts a step; its metrics are there when it is done."""
        read = _rows_of(batch, self.reads)
        rows: Rows = (read, _rows_of(batch, self.writes)) if self.writes else read
        self.state, metrics = self.step(self.state, rows)
        if not self.compiled:
            release_freed_memory()  # what compiling leaves behind
            self.compiled = True
        return metrics

    def note(self, step: int, metrics: dict[str, tuple[Any, Any]]) -> None:
        """Takes the metrics of 0-based ``step``; says so when its batch was bad."""
        values = {name: (float(total), float(count)) for name, (total, count) in metrics.items()}
        if values["skipped"][0]:
            self.bad += 1
            _log.warning("%s: batch of step %d skipped: its loss or gradient is not finite", self.folder, step)
            if self.bad == _BAD_IN_A_ROW:
                raise UserError(
                    f"train: the last {self.bad} batches of {self.spec.name} (to step {step}) were skipped because loss or gradient is not "
                    "finite: look for NaN or infinity in the rows, or lower lr"
                )
        else:
            self.bad = 0
        means = self.metrics.add(step + 1, values)
        if means is not None and means["explained_variance"] is not None and means["dead"] is not None:
            self.latest = means["explained_variance"], means["dead"]

    def checkpoint(self, step: int) -> None:
        """Everything so far becomes durable."""
        self.metrics.sync()
        save_checkpoint(self.folder / _CHECKPOINTS, step, self.state, self.identity)

    def finish(self) -> None:
        """Saves the dictionary, folded so that it acts on raw rows; the checkpoints have served."""
        self.metrics.sync()
        dictionary, params = self.spec.dictionary, final_params(self.spec, self.state)
        scale, out_scale = (np.asarray(scale).tolist() for scale in (self.state.input_scale, self.state.output_scale))
        if dictionary.row_norm == "none":  # the norm of each row takes any scale away, and then there is none
            params = dictionary.fold(params, scale, out_scale)
        extra = {**self.meta.extra, "skipped_batches": int(self.state.skipped)}
        if self.writes:
            subtracted = "b_in" if dictionary.input_bias else None
            extra["transcoder"] = {
                "target": "+".join(self.writes),
                "input_scale": scale,
                "output_scale": out_scale,
                "folded": True,
                "subtracted": subtracted,
            }
        # the scales of several sites stand in "transcoder"
        meta = dataclasses.replace(self.meta, input_scale=scale if isinstance(scale, float) else None, scale_folded=True, extra=extra)
        save_dictionary(self.folder, dictionary, params, meta)
        remove_checkpoints(self.folder / _CHECKPOINTS)
        del self.state  # moments and all: what is saved will be read back beside the others' states

    def result(self) -> Trained:
        """What is saved, read back: what the caller gets is what anybody will load."""
        spec, params, meta = load_dictionary(self.folder)
        return Trained(spec, params, meta, self.folder)


def _words(latest: list[tuple[float, float]]) -> str:
    """How the dictionaries do, in a few words however many they are."""
    if not latest:
        return ""
    low, high, dead = min(ev for ev, _ in latest), max(ev for ev, _ in latest), max(dead for _, dead in latest)
    several = len(latest) > 1
    return f"EV {low:.2f}{f' to {high:.2f}' if several else ''}, dead {'at most ' if several else ''}{100 * dead:.1f} %"


def _rows_of(batch: Mapping[str, Any], sites: tuple[str, ...]) -> Any:
    """The rows of a site, or of several side by side."""
    return batch[sites[0]] if len(sites) == 1 else jnp.concatenate([batch[site] for site in sites], axis=1)


def _check_width(rows: Source, sites: tuple[str, ...], spec: TrainSpec, verb: str, field: str, expected: int) -> None:
    for site in sites:
        width, n = rows.sites[site], len(sites)
        if width * n != expected:
            raise UserError(
                f"train: {site or 'the array'} has rows of {width} entries, the dictionary {spec.name} {verb} {expected // n}: "
                f"use {field}={width * n}"
            )


def _check(specs: list[TrainSpec], checkpoint_every: int) -> None:
    if not specs:
        raise UserError("train: no dictionary to train: give at least one TrainSpec")
    if checkpoint_every < 1:
        raise UserError(f"train: checkpoint_every = {checkpoint_every} must be at least 1 step")
    for field in ("steps", "batch_size", "seed", "select"):
        values = {getattr(spec, field) for spec in specs}
        if len(values) > 1:
            shown = ", ".join(sorted(map(str, values)))
            raise UserError(f"train: dictionaries of one pass share their {field}, got {shown}: call train once for each")
    names = [spec.name for spec in specs]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"train: two dictionaries are called {name!r}: give one of them a label")


def _meta(
    spec: TrainSpec, sites: tuple[str, ...], known: Mapping[str, Any], given: Mapping[str, Any], extra: dict[str, Any]
) -> DictionaryMeta:
    """The card, from what the source says of its rows and what the caller adds."""
    name = "+".join(sites) or str(spec.site or "unknown")
    layer = name.partition("+")[0].rpartition("@")[2]
    corruption = known.get("corruption")
    if isinstance(corruption, Mapping):
        corruption = str(Corruption(**corruption))
    fields = {
        "model": "unknown",
        "site": name,
        "layer": int(layer) if layer.isdigit() else -1,
        "corruption": corruption,
        "select": spec.select,
        "seed": spec.seed,
        "steps": spec.steps,
        **{field: known[field] for field in ("model", "model_identity", "tokenizer", "weight_processing") if field in known},
        **{field: value for field, value in given.items() if field != "extra"},
    }
    allowed = {field.name for field in dataclasses.fields(DictionaryMeta)} - {"input_scale", "scale_folded"}
    for field in fields:
        if field not in allowed:
            raise UserError(f"train: meta has no field {field!r}: there are {', '.join(sorted(allowed))}")
    return DictionaryMeta(**fields, extra={**given.get("extra", {}), **extra})
