"""What the verbs do for a synthetic world: its rows as a store, and whether dictionaries found its features."""

import dataclasses
from typing import Any

import jax
import numpy as np

from dlmscope_jax.activations import ActivationStore
from dlmscope_jax.analysis.densities import is_binary
from dlmscope_jax.analysis.recovery import binary_entropy, recovery
from dlmscope_jax.data.worlds import World
from dlmscope_jax.errors import UserError
from dlmscope_jax.training import Progress

from .work import SIDES, Side, Work, say

ROWS = "rows@0"  # the one site of a world
_TEST_FROM = 1 << 32  # rows of the test side: further on than any training reads
_SHARD = 1 << 16
_EXAMINED = 1 << 14  # test rows whose true activations are compared with the codes


def harvest_world(work: Work, name: str) -> None:
    """Writes a world's rows, as if a model had had them; each row is a document of its own, because rows are independent.

    Raises:
      UserError: another world's rows lie there.
    """
    run, world = work.run, _world(work, name)
    for side in SIDES:
        rows = run.harvest.train_rows if side == "train" else run.harvest.test_rows
        meta = {"model": name, "world": dataclasses.asdict(world), "seed": run.seed, "blocks": {"side": side, "count": rows}}
        with work.stage(f"harvest {side} rows of", name) as stage:
            stage.rows, stage.reused = rows, False
            store = _store(work, name, side, world, meta)
            if store.complete:
                stage.reused = True
                say(f"harvest {side} {name}: {rows:,} rows are there")
                continue
            first = 0 if side == "train" else _TEST_FROM
            with Progress(f"harvest {side} {name}", total=rows, unit="rows") as bar:
                bar.skip(store.rows)
                for start in range(store.rows, rows, _SHARD):
                    count = min(_SHARD, rows - start)
                    x, _ = world.rows(run.seed, first + start, count)
                    store.append({ROWS: x}, {"document": np.arange(start, start + count, dtype=np.int32)})
                    bar.advance(count)
                store.finish()
    describe_world(work, name)


def evaluate_world(work: Work, name: str, found: dict[str, Any], marks: dict[str, Any], kinds: dict[str, Any]) -> None:
    """Which share of a world's features each dictionary recovered, and how well its activations say where they are on.

    In a world of ``directions``, also the entropy of binary codes beside the true one, and that of the same dictionary untrained.
    """
    run, world = work.run, _world(work, name)
    truth = world.directions(run.seed)
    rows = codes = None
    with work.stage("measure recovery in", name) as stage:
        stage.reused = True
        for key, (spec, params, _) in found.items():
            inputs = {"world": dataclasses.asdict(world), "seed": run.seed, "dictionary": marks[key], "rows": run.harvest.test_rows}
            in_bits = world.kind == "directions" and is_binary(spec)
            if work.read("recovery", key, inputs) is not None and (not in_bits or work.read("entropy", key, inputs) is not None):
                continue
            stage.reused = False
            if rows is None:
                rows, codes = world.rows(run.seed, _TEST_FROM, min(run.harvest.test_rows, _EXAMINED))
            work.write("recovery", key, inputs, recovery(spec, params, truth, rows, codes) | kinds[key] | {"world": world.kind})
            if in_bits:
                untrained = binary_entropy(spec, spec.init(jax.random.key(run.seed)), rows)
                found_bits = binary_entropy(spec, params, rows) | {"truth": world.bits, "true_features": world.features}
                work.write("entropy", key, inputs, found_bits | kinds[key] | {"untrained": untrained})


def describe_world(work: Work, name: str) -> None:
    """The world's line in the run's summary."""
    run, world = work.run, _world(work, name)
    entry = {"name": name, "objective": "synthetic", "d_model": world.dimension, "world": dataclasses.asdict(world)}
    rows = {"train": {"rows": run.harvest.train_rows}, "test": {"rows": run.harvest.test_rows}}
    work.note(
        name=run.name, seed=run.seed, device=f"{jax.device_count()} {jax.devices()[0].device_kind}", models=[entry],
        corpus={"name": "synthetic rows with known features", "sides": rows},
    )  # fmt: skip


def _world(work: Work, name: str) -> World:
    world = work.world(name)
    assert world is not None
    return world


def _store(work: Work, name: str, side: Side, world: World, meta: dict[str, Any]) -> ActivationStore:
    """The store of one side: as it lies there, complete or not, or a new one."""
    url = work.store_url(name, side)
    try:
        store = ActivationStore.open(url, allow_incomplete=True)
    except UserError:
        return ActivationStore.create(url, {ROWS: world.dimension}, meta, dtype="float32", shard_rows=_SHARD)
    if dict(store.meta) != meta:
        raise UserError(f"{url} holds rows of another world, seed or number: choose another name for the run, or delete it")
    return store
