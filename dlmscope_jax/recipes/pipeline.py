"""The verbs: each one takes a run's configuration, does its part for every model, and leaves it in the run's folder.

    runs/<name>/{config.yaml, harvest/<model>/<side>/, dictionaries/<model>/<site>_k<k>/, results/*.json, report.html}

A dictionary of another architecture than TopK has it in its folder's name, ``<site>_relu_s0.01``, and a transcoder what it writes,
``mlp_in@3_to_mlp_out_topk_k16``. A synthetic world stands where a model does.

What is there already is not done again, so every verb may be given twice, or killed and given again.
"""

import dataclasses
import hashlib
import importlib.metadata
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dlmscope_jax import config, distributed
from dlmscope_jax.activations import ActivationStore, Corruption, rows_of
from dlmscope_jax.activations import harvest as harvest_rows
from dlmscope_jax.activations.layout import default_rows
from dlmscope_jax.activations.stream import ActivationStream
from dlmscope_jax.analysis import delta_losses
from dlmscope_jax.analysis import evaluate as fidelity
from dlmscope_jax.data import Blocks, StreamedBlocks
from dlmscope_jax.data.streamed import LANES
from dlmscope_jax.dictionaries import load_dictionary
from dlmscope_jax.errors import UserError
from dlmscope_jax.models import canonical_site, model_identity, site_width
from dlmscope_jax.report import report as write_report
from dlmscope_jax.training import Checkpoints, Progress
from dlmscope_jax.training import train as train_dictionaries
from dlmscope_jax.training.sources import Growing

from .configs import Run
from .dictionaries import Planned, planned
from .features import record_features, steer_one
from .table import trained
from .work import SIDES, Side, Work, say
from .worlds import ROWS, describe_world, evaluate_world, harvest_world

_PATIENCE = 600  # seconds that a training waits for the harvest to begin
Dictionaries = dict[str, tuple[Any, Any, Any]]  # folder below dictionaries/ -> (spec, params, meta)


def harvest(run: Run) -> None:
    """Runs every model over the text and keeps its activations, to train on and to test on (released dictionaries are only tested)."""
    work = Work(run)
    for name in work.names:
        harvest_model(work, name)


def train(run: Run) -> None:
    """Trains the dictionaries of every model (or world) from one pass over its rows, and prints where they ended."""
    work = Work(run)
    for name in work.names:
        train_model(work, name)
    if distributed.is_first():
        print(trained(work.folder))


def evaluate(run: Run) -> None:
    """Measures every dictionary on the test side: fidelity, what its insertion costs (with controls), and records of its latents."""
    work = Work(run)
    for name in work.names:
        evaluate_model(work, name)


def report(run: Run) -> None:
    """Writes ``report.html`` and prints where it is.

    Raises:
      UserError: nothing was measured in this run yet.
    """
    work = Work(run)
    if not list((work.folder / "results").glob("*.fidelity.json")):
        raise UserError(f"report: nothing was measured in {work.folder} yet: run dlmscope evaluate with the same config first")
    print(write_report(work.folder))


def harvest_model(work: Work, name: str) -> None:
    """The stores of one model, or of one world."""
    run = work.run
    wanted = run.harvest
    if work.world(name) is not None:
        planned(run, {ROWS: run.synthetic[0].dimension})
        return harvest_world(work, name)
    model, params = work.model(name)
    if not run.released:  # a mistake in the dictionaries shows now, not after the harvest
        planned(run, {site: site_width(site, model.config) for site in _sites(run)})
    corruption = _corruption(run, model)
    tokenizer = work.tokenizer(name)
    for side in SIDES:
        if side == "train" and (run.released or run.train.source == "model"):
            continue
        rows = wanted.train_rows if side == "train" else wanted.test_rows
        with work.stage(f"harvest {side} rows of", name) as stage:
            blocks = _blocks_to_harvest(work, name, side, rows)
            stage.rows = rows_of(blocks) if isinstance(blocks, Blocks) else len(blocks) * blocks.length
            stage.reused = _is_complete(work, name, side)
            label = f"harvest {side} {work.labels[name]}"
            # a process counts its own rows, and one of them shows how far it is
            bar = Progress(label, total=stage.rows // jax.process_count(), unit="rows")
            with nullcontext() if stage.reused or not distributed.is_first() else bar:
                harvest_rows(
                    model, params, blocks, work.store_url(name, side), wanted.sites, corruption, seed=run.seed,
                    batch_size=wanted.batch_size, progress=bar.advance if distributed.is_first() else None,
                    meta={"model": name, "tokenizer": tokenizer.digest}, dtype=wanted.dtype, mesh=work.mesh,
                )  # fmt: skip
            if stage.reused:
                say(f"{label}: {stage.rows:,} rows are there")
    _describe(work, name)


def _blocks_to_harvest(work: Work, name: str, side: Side, rows: int) -> Blocks | StreamedBlocks:
    """Blocks with so many rows: of the text in memory, or of a stream, whose windows are the shards of the store."""
    if not work.run.data.stream:
        return work.some_blocks(name, side, rows, repeat=side == "train")
    wanted, model = work.run.harvest, work.model(name)[0]
    shard_rows, _ = default_rows({site: site_width(site, model.config) for site in _sites(work.run)}, wanted.dtype)
    length, batch = work.run.data.block_length, wanted.batch_size
    # whole batches, whatever the mesh: a shard of the usual size, or less, so that more lanes of the stream are read
    window = max(1, min(shard_rows, rows // LANES) // length // batch) * batch
    return work.stream(name, side, rows, window, work.store_url(name, side).parent / f"{side}-cursors")


def train_model(work: Work, name: str) -> None:
    """The dictionaries of one model, or of one world."""
    run, recipe = work.run, work.run.train
    if run.released:
        raise UserError(f"released: {run.name} examines dictionaries that somebody else trained; there is nothing to train")
    widths, source = source_of(work, name)
    plans = planned(run, widths)
    specs = [plan.spec for plan in plans]
    with work.stage("train dictionaries of", name) as stage:
        stage.rows = recipe.steps * recipe.batch_size
        stage.reused = all((work.dictionaries(name) / spec.name / "config.json").is_file() for spec in specs)
        checkpoints = Checkpoints(recipe.checkpoint_every, recipe.keep, recipe.best)
        bar = Progress(f"train {work.labels[name]}", total=recipe.steps, unit="steps")
        with bar if distributed.is_first() else nullcontext():
            train_dictionaries(
                specs, source, work.dictionaries(name), checkpoints=checkpoints, progress=bar, mesh=work.mesh, parallel=run.mesh.parallel
            )


def source_of(work: Work, name: str) -> tuple[dict[str, int], Any]:
    """Where a model's training rows come from, and the widths of its sites."""
    if work.run.train.source == "model":
        return _stream(work, name)
    url = work.store_url(name, "train")
    if work.run.train.source == "growing":
        store = _begun(url)
        return _site_widths(work, name, store), Growing(store)
    store = ActivationStore.open(url)
    return _site_widths(work, name, store), store


def _begun(url: Path) -> ActivationStore:
    """A store that another process is writing, once it has begun to; the trainer waits for its rows by itself."""
    for waited in range(_PATIENCE):
        try:
            return ActivationStore.open(url, allow_incomplete=True)
        except UserError:
            if waited == 0:
                say(f"train: waiting for the harvest to begin {url}")
            time.sleep(1)
    raise UserError(
        f"train.source: growing, but nothing was harvested to {url} in {_PATIENCE} s: start dlmscope harvest with the same config"
    )


def _stream(work: Work, name: str) -> tuple[dict[str, int], Any]:
    """A model's rows straight from its forward passes."""
    run = work.run
    model, params = work.model(name)
    sites = _sites(run)
    blocks = work.some_blocks(name, "train", run.harvest.train_rows, repeat=True)
    stream = ActivationStream(
        model, params, blocks, sites, _corruption(run, model), seed=run.seed, batch_size=run.harvest.batch_size,
        buffer_rows=run.train.buffer_rows, mesh=work.mesh, meta={"model": name, "tokenizer": work.tokenizer(name).digest},
    )  # fmt: skip
    return {site: site_width(site, model.config) for site in sites}, stream


def evaluate_model(work: Work, name: str) -> None:
    """The results of one model's dictionaries, or one world's."""
    run = work.run
    found = dictionaries_of(work, name)
    store = ActivationStore.open(work.store_url(name, "test"))
    kinds = _kinds(work, name, found, store)
    marks = {key: _mark(dictionary) for key, dictionary in found.items()}
    with work.stage("measure fidelity of", name) as stage:
        stage.reused, stage.rows = True, store.rows
        for key, dictionary in found.items():
            inputs = {"store": store.meta, "dictionary": marks[key], "seed": run.seed}
            if work.read("fidelity", key, inputs) is None:
                stage.reused = False
                with Progress(f"fidelity {key}", total=store.rows, unit="rows") as bar:
                    work.write("fidelity", key, inputs, fidelity(dictionary, store, seed=run.seed, progress=bar.advance) | kinds[key])
    if work.world(name) is not None:
        evaluate_world(work, name, found, marks, kinds)
        return describe_world(work, name)
    model, params = work.model(name)
    about = {"model": model_identity(model, params), "data": config.to_mapping(run.data), "seed": run.seed, "dtype": run.dtype}
    with work.stage("measure insertion into", name) as stage:
        wanted = run.evaluate
        rates = wanted.rates if model.diffusion is not None else None
        scored = {key: {**about, "dictionary": mark, "blocks": wanted.blocks, "rates": rates} for key, mark in marks.items()}
        missing = {key: found[key] for key in found if work.read("delta_loss", key, scored[key]) is None}
        stage.reused = not missing
        for positions in sorted({_replaced_at(dictionary) for dictionary in missing.values()}):
            together = {key: dictionary for key, dictionary in missing.items() if _replaced_at(dictionary) == positions}
            calibration, blocks = (
                work.some_blocks(name, side, wanted.blocks * run.data.block_length, purpose=1).take(slice(wanted.blocks)) for side in SIDES
            )
            with Progress(f"insertion {work.labels[name]}", total=len(rates or (0,)) * len(blocks), unit="blocks") as bar:
                results = delta_losses(
                    model, params, together, blocks, rates=rates, seed=run.seed, batch_size=wanted.batch_size,
                    positions=positions, calibration=calibration, progress=bar.advance,
                )  # fmt: skip
            for key, result in results.items():
                work.write("delta_loss", key, scored[key], result | kinds[key])
    if run.report.latents:
        _record(work, name, found, {key: {**about, "dictionary": marks[key], "store": store.meta} for key in found})
    _describe(work, name)


def _record(work: Work, name: str, found: Dictionaries, inputs: dict[str, dict[str, Any]]) -> None:
    """Records of latents, and one generation with a latent of the last dictionary."""
    with work.stage("record latents of", name) as stage:
        stage.reused = True
        for key, dictionary in found.items():
            recorded, new = record_features(work, name, key, dictionary, inputs[key])
            stage.reused &= not new
        # the last one: one generation a model is for show
        stage.reused &= not steer_one(work, name, key, dictionary, recorded, inputs[key])


def dictionaries_of(work: Work, name: str) -> Dictionaries:
    """The dictionaries of a model in this run: released ones, or those that were trained.

    Raises:
      UserError: none is there, or a released one says that it belongs elsewhere.
    """
    run, label = work.run, work.labels[name]
    found = {}
    for released in run.released:
        spec, params, meta = load_dictionary(released.path, released.subfolder or None)
        site = canonical_site(released.site)
        if meta.layer >= 0 and meta.layer != int(site.rpartition("@")[2]):
            raise UserError(f"released.site: {released.path}/{released.subfolder} says that it reads {meta.site}, the config says {site}")
        if meta.select not in (None, released.select):
            where = f"{released.path}/{released.subfolder}"
            raise UserError(f"released.select: {where} was trained on {meta.select} rows, the config says {released.select}")
        meta = dataclasses.replace(meta, site=site, layer=int(site.rpartition("@")[2]), select=released.select)
        _check_model(name, released.path, meta.model)
        size = f"k{spec.k}" if hasattr(spec, "k") else spec.KIND
        said = f"k = {spec.k}" if hasattr(spec, "k") else spec.KIND
        key = f"{label}/{site}_{size}"
        if key in found:
            raise UserError(f"released: two dictionaries of {site} with {said}; examine them in runs of their own, with another name")
        found[key] = (spec, params, meta)
    for plan in () if run.released else _planned(work, name, ActivationStore.open(work.store_url(name, "test"))):
        folder = work.dictionaries(name) / plan.spec.name
        if not folder.is_dir():
            raise UserError(f"{folder}: no such dictionary; train it first, with dlmscope train and the same config")
        found[f"{label}/{plan.spec.name}"] = load_dictionary(folder)
    return found


def _planned(work: Work, name: str, store: ActivationStore) -> list[Planned]:
    """The dictionaries of a model or world, as its store has the sites."""
    return planned(work.run, _site_widths(work, name, store))


def _site_widths(work: Work, name: str, store: ActivationStore) -> dict[str, int]:
    sites = [ROWS] if work.world(name) is not None else _sites(work.run)
    for site in sites:
        if site not in store.sites:
            raise UserError(f"harvest.sites: {site} was not harvested from {name} in this run; there are {', '.join(store.sites)}")
    return {site: store.sites[site] for site in sites}


def _corruption(run: Run, model: Any) -> Corruption:
    """What a model does not see; an autoregressive one sees everything."""
    wanted = run.harvest
    if model.diffusion is None or wanted.policy == "clean":
        return Corruption("clean")
    return Corruption(wanted.policy, wanted.low, wanted.high)


def _kinds(work: Work, name: str, found: Dictionaries, store: ActivationStore) -> dict[str, dict[str, Any]]:
    """What a result says of its dictionary beside its numbers: architecture, level of sparsity, seed."""
    if work.run.released:
        return {key: {"architecture": spec.KIND, "variant": spec.KIND} for key, (spec, _, _) in found.items()}
    return {f"{work.labels[name]}/{plan.spec.name}": plan.about for plan in _planned(work, name, store)}


def _replaced_at(dictionary: tuple[Any, Any, Any]) -> str:
    """Where a dictionary is inserted: at the mask state that it was trained on, everywhere if that is no one state."""
    select = dictionary[2].select
    return select if select in ("masked", "visible") else "all"


def _check_model(name: str, path: str, trained_on: str | None) -> None:
    """Compares hub ids where both are known: a released dictionary carries no hash of its model."""
    if trained_on and trained_on.count("/") == 1 and name.count("/") == 1 and not Path(name).is_dir():
        if trained_on.lower() != name.lower():
            raise UserError(f"released: {path} says that it was trained on {trained_on}, models names {name}")


def _sites(run: Run) -> list[str]:
    return sorted({canonical_site(site) for site in run.harvest.sites})


def _is_complete(work: Work, name: str, side: str) -> bool:
    try:
        return ActivationStore.open(work.store_url(name, side)).complete
    except UserError:
        return False


def _mark(dictionary: tuple[Any, Any, Any]) -> dict[str, Any]:
    """What tells one dictionary from another: its shape, its card and a sum over its weights."""
    spec, params, meta = dictionary
    weights = hashlib.sha256()
    for key in sorted(params):
        weights.update(key.encode() + np.asarray(params[key]).tobytes())
    return {"spec": config.to_mapping(spec), "meta": config.to_mapping(meta), "weights": weights.hexdigest()}


def _describe(work: Work, name: str) -> None:
    """The run's summary: its models, its text, what it ran on."""
    run = work.run
    model, params = work.model(name)
    shape, diffusion = model.config, model.diffusion
    objective = "autoregressive" if diffusion is None else "shifted diffusion" if diffusion.shift else "diffusion"
    entry = {
        "name": work.labels[name], "family": shape.family, "objective": objective, "identity": model_identity(model, params),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)), "n_layers": shape.n_layers, "d_model": shape.d_model,
        "vocab_size": shape.vocab_size, "widths": {site: site_width(site, shape) for site in _sites(run)},
    }  # fmt: skip
    sides = {}
    for side in SIDES:
        if _is_complete(work, name, side):
            store = ActivationStore.open(work.store_url(name, side))
            sides[side] = {"blocks": store.meta["blocks"]["count"], "rows": store.rows}
    packages = ("dlmscope_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorstore", "numpy")
    work.note(
        name=run.name, seed=run.seed, device=f"{jax.device_count()} {jax.devices()[0].device_kind}", models=[entry],
        command=" ".join(["dlmscope", *sys.argv[1:]]),
        corpus={"name": run.data.path, "tokenizer": work.tokenizer(name).digest, "block_length": run.data.block_length, "sides": sides},
        versions={package: importlib.metadata.version(package) for package in packages},
    )  # fmt: skip
