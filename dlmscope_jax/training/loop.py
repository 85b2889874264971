"""``train``: one pass over a source, several dictionaries, everything on disk that another process needs to go on."""

import dataclasses
import functools
import json
import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dlmscope_jax import distributed
from dlmscope_jax.activations import Corruption
from dlmscope_jax.config import to_mapping
from dlmscope_jax.dictionaries import Dictionary, DictionaryMeta, load_dictionary, save_dictionary
from dlmscope_jax.errors import PeerLost, Preempted, UserError

from .checkpoints import (
    MEASURED,
    Checkpoints,
    Damaged,
    begin_checkpoint,
    best_checkpoint,
    difference,
    load_checkpoint,
    load_latest,
    read_digests,
    remove_checkpoints,
)
from .heap import release_freed_memory
from .metrics import MetricsFile
from .progress import Progress
from .sources import Batch, Source, open_source
from .spec import TrainSpec
from .state import TrainState, final_params, init_state, state_shardings
from .step import Metrics, Parallel, Rows, Step, make_step

# Unblocked programs pile up memory, and on virtual CPU devices their collectives can deadlock.
_IN_FLIGHT = 2
_BAD_IN_A_ROW = 20
_CHECKPOINTS, _METRICS, _BEST = "checkpoints", "metrics.jsonl", "best"
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
    checkpoints: Checkpoints = Checkpoints(),  # noqa: B008  # frozen
    progress: Progress | None = None,
    mesh: Mesh | None = None,
    parallel: Parallel | None = None,
) -> list[Trained]:
    """Trains one or several dictionaries from one pass over ``source`` and saves each in ``run_dir/<spec.name>``.

    Each batch is read and moved once, and dictionaries of one program are compiled once. A dictionary comes out as if it had been
    trained alone: on CPU bit for bit, on accelerators, whose scatters add in no fixed order, up to rounding. Their steps are separate
    calls: states stacked in one array and scanned over would have to be copied out of it and back, parameters and moments, in each
    step (scripts/bench_train_several.py measures both).

    The same call again goes on where a killed one was, equal in the same sense, and loads what is finished. Checkpoints are removed
    when their dictionary is saved. An iterator must then give the same batches from its start. SIGTERM ends the training after the step
    in flight, with a checkpoint.

    Several processes (``distributed.start``) make the same call with one mesh over all their devices and a ``run_dir`` that all of them
    see. Each reads its part of every batch; process 0 writes metrics and dictionaries.

    Args:
      specs: trainings with equal ``steps``, ``batch_size``, ``seed`` and ``select``, of different ``name``.
      source: an ``ActivationStore``, or ``Growing`` around one that is being written; an ``ActivationStream``; an array [rows, D] or a
        mapping from sites to arrays; an iterable of batches [batch_size, D].
      run_dir: the folder of the run.
      meta: fields of ``DictionaryMeta`` that the source does not know (``model``, ``layer``, ``tokenizer``, ...).
      checkpoints: when they are made and which are kept.
      progress: counts steps; earlier runs' steps are skipped.
      mesh, parallel: as for ``make_step``. Another mesh than the one that a checkpoint was written on goes on from the same bits.

    Returns:
      The trained dictionaries in the order of ``specs``.

    Raises:
      UserError: specs that do not fit each other or the source; another training's files in ``run_dir``; checkpoints of which
        none is whole; a source that ends early; 20 batches in a row that are not finite; a full disk; a mesh that does not divide a batch.
      Preempted: SIGTERM came.
      PeerLost: another process is gone.
    """
    wanted = [specs] if isinstance(specs, TrainSpec) else list(specs)
    _check(wanted, mesh)
    first = wanted[0]
    rows = open_source(source, first.batch_size, first.seed, first.select)
    rows.check_mesh(mesh)
    runs = [_Run(spec, rows, Path(run_dir) / spec.name, meta or {}, checkpoints, mesh, parallel) for spec in wanted]
    done = distributed.on_first(lambda: [run.finished() for run in runs])
    unfinished = [run for run, finished in zip(runs, done, strict=True) if not finished]
    progress = progress if distributed.is_first() else None
    # dictionaries of one site, which usually stand together, start from the same sample
    sample = functools.lru_cache(maxsize=1)(rows.sample)
    for run in unfinished:
        run.begin(sample)
    try:
        _loop(unfinished, rows, first.steps, checkpoints.every, progress, mesh)
    finally:
        for run in unfinished:
            run.metrics.close()
    if progress is not None and not unfinished:
        progress.skip(first.steps)
    return [run.result() for run in runs]


def _loop(runs: list["_Run"], rows: Source, steps: int, every: int, progress: Progress | None, mesh: Mesh | None) -> None:
    if not runs:
        return
    start = min(run.start for run in runs)
    if progress is not None and start:
        progress.skip(start)
    sites = sorted({site for run in runs for site in run.sites})
    batches = rows.batches(start, sites, (0, 1) if mesh is None else distributed.local_rows(mesh))
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

    step, preempted, late = start - 1, False, False
    try:
        with distributed.preemption() as asked, distributed.together():
            batch = _placed(next(batches), mesh) if start < steps else {}
            for step in range(start, steps):
                here = [run for run in runs if run.start <= step]
                waiting.append((step, [(run, run.update(batch)) for run in here]))
                preempted = asked()
                done = preempted or step + 1 == steps
                if not done:
                    batch = _placed(next(batches), mesh)  # read and moved while the step computes
                settle(_IN_FLIGHT - 1)
                if preempted or ((step + 1) % every == 0 and not done):
                    settle(0)
                    for run in here:
                        run.checkpoint(step + 1, regular=(step + 1) % every == 0)
                if done:
                    break
            settle(0)
            for run in runs:
                run.saved()
            late = not preempted and asked()
    except BaseException as error:
        if not isinstance(error, PeerLost):
            for run in runs:
                with suppress(Exception):
                    run.saved()
        raise
    finally:
        close = getattr(batches, "close", None)
        if close is not None:
            close()
    if preempted:
        raise Preempted(f"SIGTERM: training is saved at step {step + 1:,} of {steps:,}; the same command goes on from there")
    for run in runs:
        run.finish()
    if late:
        raise Preempted("SIGTERM: this training is done and saved; the same command goes on from there")


class _Run:
    """One dictionary of a call to ``train``: its state, and its files."""

    state: TrainState
    metrics: MetricsFile
    step: Step

    def __init__(
        self,
        spec: TrainSpec,
        rows: Source,
        folder: Path,
        meta: Mapping[str, Any],
        policy: Checkpoints,
        mesh: Mesh | None,
        parallel: Parallel | None,
    ):
        self.spec, self.folder, self.policy, self.mesh, self.parallel = spec, folder, policy, mesh, parallel
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
        self.since: dict[str, list[float]] = {name: [0.0, 0.0] for name in MEASURED}  # sum and count since the last checkpoint
        self.saving: Callable[[], Path] | None = None
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
        self.step, self.compiled = make_step(spec, self.mesh, self.parallel), False
        found = load_latest(self.folder / _CHECKPOINTS, self._like(), self.identity)
        carried: dict[str, dict[str, list[float]]] = {}
        if found is None:
            some = sample(spec.sample_rows, spec.batch_size, self.sites)
            targets = _rows_of(some, self.writes) if self.writes else None
            self.state = init_state(spec, sample=_rows_of(some, self.reads), targets=targets, mesh=self.mesh)
        else:
            self.start, self.state = found
            carried = read_digests(self.folder / _CHECKPOINTS, self.start)["carried"]
            self.since = carried.get("since", self.since)
            _log.info("%s goes on from step %d", self.folder, self.start)
        path = self.folder / _METRICS if distributed.is_first() else None
        self.metrics = MetricsFile(path, spec.steps, spec.batch_size, self.start, carried.get("metrics", {}))

    def _like(self) -> TrainState:
        """Shapes of the state, and how they lie on the mesh."""
        like = jax.eval_shape(lambda: init_state(self.spec))
        if self.mesh is None:
            return like
        place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)  # noqa: E731
        return jax.tree.map(place, like, state_shardings(self.spec, self.mesh))

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
        for name, sums in self.since.items():
            sums[0] += values[name][0]
            sums[1] += values[name][1]
        means = self.metrics.add(step + 1, values)
        if means is not None and means["explained_variance"] is not None and means["dead"] is not None:
            self.latest = means["explained_variance"], means["dead"]

    def checkpoint(self, step: int, regular: bool) -> None:
        """Everything so far becomes durable, the state in the background.

        One out of turn (not ``regular``) ends no interval of the metrics and is never the best: what is added up goes with it.
        """
        self.saved()
        carried = {} if regular else {"metrics": self.metrics.sums, "since": self.since}
        self.metrics.sync(ends=regular)
        measured = self._measured() if regular else {}
        folder = self.folder / _CHECKPOINTS
        self.saving = begin_checkpoint(folder, step, self.state, self.identity, self.policy, measured, carried)
        if regular:
            self.since = {name: [0.0, 0.0] for name in MEASURED}

    def saved(self) -> None:
        """Waits for a checkpoint that is being written."""
        if self.saving is not None:
            waits, self.saving = self.saving, None
            waits()

    def _measured(self) -> dict[str, float | None]:
        """Means since the last checkpoint."""
        return {name: total / count if count else None for name, (total, count) in self.since.items()}

    def finish(self) -> None:
        """Saves the dictionary, folded so that it acts on raw rows, and the best beside it; the checkpoints have served."""
        self.metrics.sync()
        folder, best = self.folder / _CHECKPOINTS, None
        last = self._folded(self.state)
        if self.policy.best is not None:
            best = distributed.on_first(lambda: best_checkpoint(folder, self.policy))
            value = self._measured()[self.policy.best]
            if best is None or self.policy.better(value, best[1]):
                best = [self.spec.steps, value]
        del self.state  # moments and all: what is saved will be read back beside the others' states
        chosen = last
        if best is not None and best[0] < self.spec.steps:
            try:
                chosen = self._folded(load_checkpoint(folder, best[0], self._like(), self.identity))
            except Damaged as damage:
                _log.warning("%s: the best checkpoint, of step %d, is damaged (%s): best/ is the last one", self.folder, best[0], damage)
                best = [self.spec.steps, value]

        def save() -> None:
            if best is not None:
                about = {"metric": self.policy.best, "value": best[1], "step": best[0]}
                _save(self.folder / _BEST, self.spec.dictionary, chosen, {"best": about})
            _save(self.folder, self.spec.dictionary, last, {})
            remove_checkpoints(folder)

        distributed.on_first(save)

    def _folded(self, state: TrainState) -> tuple[dict, DictionaryMeta]:
        """The dictionary that a state stands for, on the host, and its card."""
        dictionary, params = self.spec.dictionary, final_params(self.spec, state)
        scale, out_scale = (np.asarray(scale).tolist() for scale in (state.input_scale, state.output_scale))
        if dictionary.row_norm == "none":  # the norm of each row takes any scale away, and then there is none
            params = dictionary.fold(params, scale, out_scale)
        extra = {**self.meta.extra, "skipped_batches": int(state.skipped)}
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
        return distributed.to_host(params), meta

    def result(self) -> Trained:
        """What is saved, read back: what the caller gets is what anybody will load."""
        spec, params, meta = load_dictionary(self.folder)
        return Trained(spec, params, meta, self.folder)


def _save(folder: Path, dictionary: Dictionary, found: tuple[dict, DictionaryMeta], extra: dict[str, Any]) -> None:
    params, meta = found
    save_dictionary(folder, dictionary, params, dataclasses.replace(meta, extra={**meta.extra, **extra}))


def _placed(batch: Batch, mesh: Mesh | None) -> Any:
    """A batch on its way to the devices; one that is there stays."""
    if mesh is None:
        return jax.device_put(batch)
    if all(isinstance(rows, jax.Array) for rows in batch.values()):
        return jax.device_put(batch, distributed.row_sharding(mesh))
    return distributed.to_global(batch, mesh)


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


def _check(specs: list[TrainSpec], mesh: Mesh | None) -> None:
    if not specs:
        raise UserError("train: no dictionary to train: give at least one TrainSpec")
    if mesh is None and jax.process_count() > 1:
        raise UserError(f"train: {jax.process_count()} processes need a mesh over all their devices: give mesh=make_mesh()")
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
