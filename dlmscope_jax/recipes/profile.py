"""``dlmscope profile``: some steps of the configured training under jax's profiler, and where their time goes."""

import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from dlmscope_jax import distributed
from dlmscope_jax.training import init_state, make_step
from dlmscope_jax.training.sources import open_source

from .configs import Run
from .dictionaries import planned
from .pipeline import source_of
from .table import aligned
from .work import Work, say

_STEPS, _FIRST = 20, 3  # steps that are timed, and those before, which compile and fill buffers


def profile(run: Run) -> dict[str, float]:
    """Runs the first steps of the training of a run's first model, one part after the other, and prints the medians.

    Nothing of the run is changed: the weights are thrown away. Training itself reads and moves the next batch while a step runs, so its
    step takes as long as the longer of the two.

    Returns:
      Median seconds: ``data`` (waiting for a batch), ``copy`` (of it to the devices), ``step`` (of all dictionaries), ``serial`` (all of
      that), ``overlapped`` (as in training).

    Raises:
      UserError: as ``dlmscope train``.
    """
    work = Work(run)
    name, mesh = work.names[0], work.mesh
    widths, source = source_of(work, name)
    specs = [plan.spec for plan in planned(run, widths)]
    rows = open_source(source, specs[0].batch_size, specs[0].seed, specs[0].select)
    # one site each: configurations have no cross-layer transcoders
    places = [(str(spec.site), str(spec.target) if spec.target else None) for spec in specs]
    sites = sorted({site for pair in places for site in pair if site})
    steps = [make_step(spec, mesh, run.mesh.parallel) for spec in specs]
    samples = {site: rows.sample(specs[0].sample_rows, specs[0].batch_size, (site,))[site] for site in sites}
    states = [
        init_state(spec, sample=samples[read], targets=samples[written] if written else None, mesh=mesh)
        for spec, (read, written) in zip(specs, places, strict=True)
    ]
    batches = rows.batches(0, sites, (0, 1) if mesh is None else distributed.local_rows(mesh))
    times: dict[str, list[float]] = {"data": [], "copy": [], "step": []}
    folder = work.folder / "profile"

    def one(number: int) -> dict[str, float]:
        marks = [time.perf_counter()]
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            with jax.profiler.TraceAnnotation("data"):
                batch = next(batches)
            marks.append(time.perf_counter())
            with jax.profiler.TraceAnnotation("copy"):
                placed = jax.block_until_ready(_placed(batch, mesh))
            marks.append(time.perf_counter())
            for i, ((read, written), step) in enumerate(zip(places, steps, strict=True)):
                states[i], metrics = step(states[i], (placed[read], placed[written]) if written else placed[read])
                jax.block_until_ready(metrics)
            marks.append(time.perf_counter())
        return dict(zip(times, (after - before for before, after in zip(marks, marks[1:], strict=False)), strict=True))

    try:
        for number in range(_FIRST):
            say(f"profile: step {number + 1} of {_FIRST} that compile and fill buffers")
            one(number)
        say(f"profile: {_STEPS} steps of {_dictionaries(len(specs))}")
        with jax.profiler.trace(str(folder)):
            for number in range(_FIRST, _FIRST + _STEPS):
                for part, seconds in one(number).items():
                    times[part].append(seconds)
    finally:
        if (close := getattr(batches, "close", None)) is not None:
            close()
    found = {part: statistics.median(seconds) for part, seconds in times.items()}
    found |= {"serial": sum(found.values()), "overlapped": max(found["step"], found["data"] + found["copy"])}
    if distributed.is_first():
        print(_shown(found, run, len(specs), folder))
    return found


def _placed(batch: Mapping[str, Any], mesh: Any) -> Mapping[str, Any]:
    """A batch on the devices; one that is there already stays as it is."""
    if all(isinstance(rows, jax.Array) for rows in batch.values()):
        return batch
    return jax.tree.map(jnp.asarray, batch) if mesh is None else distributed.to_global(batch, mesh)


def _dictionaries(count: int) -> str:
    return "1 dictionary" if count == 1 else f"{count} dictionaries"


def _shown(found: dict[str, float], run: Run, dictionaries: int, folder: Path) -> str:
    words = {
        "data": "waiting for a batch", "copy": "copying it to the devices", "step": f"the step of {_dictionaries(dictionaries)}",
        "serial": "all of that", "overlapped": "in training, which reads ahead",
    }  # fmt: skip
    lines: list[tuple[str, ...]] = [(f"median of {_STEPS} steps", "ms", "rows/s")]
    lines += [(words[part], f"{1e3 * seconds:.2f}", f"{run.train.batch_size / max(seconds, 1e-9):,.0f}") for part, seconds in found.items()]
    traces = sorted(folder.rglob("*.xplane.pb"))
    where = traces[-1].parent if traces else folder
    opening = "pip install xprof, then: xprof --logdir"
    return f"{aligned(lines)}\n\ntrace: {where.resolve()}\nto open it: {opening} {folder.resolve()}"
