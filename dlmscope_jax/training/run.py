"""One dictionary of a call to ``train``: everything on disk that another process needs to go on, and the dictionary at the end."""

import dataclasses
import json
import logging
from collections.abc import Callable, Mapping
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
from dlmscope_jax.errors import UserError

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
from .sources import Batch, Source
from .spec import TrainSpec
from .state import TrainState, final_params, init_state, state_shardings
from .step import Metrics, Parallel, Rows, Step, make_step

_BAD_IN_A_ROW = 20
_CHECKPOINTS, _METRICS, _BEST = "checkpoints", "metrics.jsonl", "best"
_log = logging.getLogger(__name__)


class Trained(NamedTuple):
    """A trained dictionary; ``params`` act on raw rows. ``path`` is its folder, with ``metrics.jsonl`` beside the weights."""

    spec: Dictionary
    params: dict
    meta: DictionaryMeta
    path: Path


class Run:
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
