"""``train``: one pass over a source, several dictionaries, and when what is saved."""

import functools
from collections import deque
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from dlmscope_jax import distributed
from dlmscope_jax.errors import PeerLost, Preempted, UserError

from .checkpoints import Checkpoints
from .progress import Progress
from .run import Run, Trained
from .sources import Batch, Source, open_source
from .spec import TrainSpec
from .step import Metrics, Parallel

# Unblocked programs pile up memory, and on virtual CPU devices their collectives can deadlock.
_IN_FLIGHT = 2


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
    runs = [Run(spec, rows, Path(run_dir) / spec.name, meta or {}, checkpoints, mesh, parallel) for spec in wanted]
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


def _loop(runs: list[Run], rows: Source, steps: int, every: int, progress: Progress | None, mesh: Mesh | None) -> None:
    if not runs:
        return
    start = min(run.start for run in runs)
    if progress is not None and start:
        progress.skip(start)
    sites = sorted({site for run in runs for site in run.sites})
    batches = rows.batches(start, sites, (0, 1) if mesh is None else distributed.local_rows(mesh))
    waiting: deque[tuple[int, list[tuple[Run, Metrics]]]] = deque()

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
