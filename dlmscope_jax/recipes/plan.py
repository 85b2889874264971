"""``dlmscope plan``: what a run takes on devices that may not be here: memory, traffic between devices, time, and what to change.

The programs are compiled for the devices with arrays that have a shape and nothing else. Of what the compiler says, memory alone is taken;
arithmetic and traffic come from ``training.planning``, time from the makers' peaks (``training.chips``). A real run takes longer.
"""

import dataclasses
import importlib.util
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dlmscope_jax import distributed
from dlmscope_jax.activations.forward import forward
from dlmscope_jax.errors import UserError
from dlmscope_jax.models import Transformer, canonical_site, init_params, parse_site, read_model, site_width
from dlmscope_jax.models.sharding import partition_specs
from dlmscope_jax.training import TrainSpec, init_state, make_step, planning
from dlmscope_jax.training.chips import chip_of
from dlmscope_jax.training.planning import Cost, Parts
from dlmscope_jax.training.state import state_shardings

from .advice import Bytes, changes
from .configs import Run
from .dictionaries import planned
from .meshes import mesh_of
from .plan_table import Program, as_json, heading, tables
from .work import Work, say, write_whole
from .worlds import ROWS

_COLUMNS = 26  # bytes of a row's columns in a store
_ITEM = {"bfloat16": 2, "float16": 2, "float32": 4, "int8": 1}
_ROOM = 0.95  # of a chip's memory may be taken: the rest is the runtime's


def plan(run: Run) -> dict[str, Any]:
    """Prints what every program of a run takes on one device, and writes it to ``results/plan.json``.

    Args:
      run: ``topology`` names devices that are not here; empty are this machine's.

    Raises:
      UserError: an unknown topology, or no compiler for it; a mesh, batch or width that do not go together.
    """
    work = Work(run)
    devices = devices_of(run.topology)
    mesh = mesh_of(run.mesh, devices)
    chip, parts = chip_of(devices[0].device_kind), parts_of(mesh)
    found: dict[str, Any] = {
        "kind": "plan", "version": 1, "topology": run.topology or "this machine", "devices": parts.devices,
        "device": devices[0].device_kind, "chip": None if chip is None else dataclasses.asdict(chip),
        "mesh": dataclasses.asdict(parts), "models": [],
    }  # fmt: skip
    for name in work.names:
        programs, refused = _programs(work, name, mesh or devices[0], parts, devices[0].platform)
        limit = _ROOM * chip.memory if chip is not None else None
        advice = [line for program in programs for line in _advice(work, name, program, parts, limit)] if limit else []
        advice = refused + advice
        entry = {
            "name": work.labels[name],
            "programs": [as_json(program, chip, limit) for program in programs],
            "store_bytes": store_bytes(work, name),
            "advice": advice,
        }
        if not found["models"]:  # after what a mistake would stop
            print(heading(run.name, devices[0].device_kind, chip, parts))
        found["models"].append(entry)
        print(tables(programs, entry))
    write_whole(work.folder / "results" / "plan.json", json.dumps(found, indent=1))
    return found


def devices_of(topology: str) -> list[Any]:
    """The devices of a topology, or those of this machine.

    Args:
      topology: ``v5e:16x16``; ``v5e:16x16*2`` are two slices; empty: this machine.

    Raises:
      UserError: the TPU compiler is not installed, or does not know the topology.
    """
    if not topology:
        return jax.devices()
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"topology: {topology} needs the TPU compiler, libtpu, which works on any machine: pip install 'dlmscope_jax[tpu]', "
            "best into an environment of its own, then give the same command there"
        )
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # it would ask the cloud's machine for what it is
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    name, _, slices = topology.partition("*")
    try:
        more = {"num_slices": int(slices)} if slices else {}
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **more).devices)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"topology: {topology!r} is not known ({reason}): such as v5e:4x4, v5p:2x2x1, v6e:8x8, v5e:16x16*2") from None


def parts_of(mesh: Mesh | None) -> Parts:
    """The sizes of a mesh."""
    return Parts() if mesh is None else Parts(mesh.shape["data"], mesh.shape["model"], mesh.shape.get("replica", 1))


def specs_of(run: Run, widths: dict[str, int]) -> list[TrainSpec]:
    """The trainings of a run on one model."""
    return [one.spec for one in planned(run, widths)]


def store_bytes(work: Work, name: str) -> int:
    """What the rows of both sides take on disk."""
    run, widths = work.run, _widths(work, name)
    if run.train.source == "model":
        rows = run.harvest.test_rows
    else:
        rows = run.harvest.train_rows + run.harvest.test_rows
    dtype = "float32" if work.world(name) is not None else run.harvest.dtype
    scales = 4 * len(widths) if dtype == "int8" else 0
    return rows * (sum(widths.values()) * _ITEM[dtype] + scales + _COLUMNS)


def _programs(work: Work, name: str, where: Any, parts: Parts, platform: str) -> tuple[list[Program], list[str]]:
    """The forward pass and the dictionary step of one model (or the latter of one world), and why one of them is not possible.

    Each verb may have a mesh of its own, so one that the mesh does not divide is no mistake while the other is.

    Raises:
      UserError: neither is.
    """
    run = work.run
    platform = {"gpu": "cuda"}.get(platform, platform)
    specs = [] if run.released else specs_of(run, _widths(work, name))
    makers = {"harvest": lambda: _harvest(work, name, where, parts, platform)} if work.world(name) is None else {}
    makers |= {"train": lambda: _train(run, specs, where, parts, platform)} if specs else {}
    found, refused = [], []
    for verb, make in makers.items():
        try:
            found.append(make())
        except UserError as error:
            refused.append(f"{verb} is not possible on this mesh: {error}")
    refused += _split_heads(network(work, name), parts) if "harvest" in makers else []
    if not found:
        raise UserError("; ".join(refused))
    if len(found) == 2 and run.train.source == "model":
        forward, step = found
        found.append(_together(run, forward, step, _widths(work, name), parts))
    return found, refused


def _split_heads(model: Transformer, parts: Parts) -> list[str]:
    heads, of_keys = model.config.n_heads, model.config.n_kv_heads
    if heads % parts.model == of_keys % parts.model == 0:
        return []
    return [
        f"mesh.model = {parts.model} cuts through heads ({heads} of queries, {of_keys} of keys): the language model then sends more than "
        "is told here and takes longer; harvest with a smaller mesh.model, each verb may have its own mesh"
    ]


def _harvest(work: Work, name: str, where: Any, parts: Parts, platform: str) -> Program:
    run, model = work.run, network(work, name)
    sites = tuple(sorted({canonical_site(site, model.config) for site in run.harvest.sites}))
    batch, length = run.harvest.batch_size, run.data.block_length
    if batch % parts.rows:
        raise UserError(
            f"harvest.batch_size = {batch} blocks do not divide into the mesh's {parts.rows} parts: use a multiple of {parts.rows}"
        )
    layers = max(parse_site(site, model.config)[1] + 1 for site in sites)
    compiled = _compiled(f"harvest of {work.labels[name]}", lambda: _trace_forward(run, model, sites, where))
    memory = compiled.memory_analysis()
    params = _bytes_here(_abstract_params(model, where))
    rows = run.harvest.test_rows + (0 if run.train.source == "model" else run.harvest.train_rows)
    return Program(
        "harvest", f"harvest {work.labels[name]}", params, 0, 2 * (5 * batch * length // parts.rows + memory.output_size_in_bytes),
        memory.temp_size_in_bytes, 0, planning.forward_cost(model, batch, length, min(layers, model.config.n_layers), parts, platform),
        batch * length, rows / (batch * length),
    )  # fmt: skip


def _train(run: Run, specs: list[TrainSpec], where: Any, parts: Parts, platform: str) -> Program:
    if run.train.batch_size % (parts.rows * run.train.micro_batches):
        raise UserError(
            f"train.batch_size = {run.train.batch_size} rows do not divide into {parts.rows} parts of {run.train.micro_batches} "
            f"micro-batches: use a multiple of {parts.rows * run.train.micro_batches}"
        )
    largest = max(specs, key=lambda spec: planning.step_memory(spec, parts))
    compiled = _compiled(f"the step of {largest.name}, the largest of {len(specs)}", lambda: _trace_step(largest, where, run.mesh.parallel))
    memory = compiled.memory_analysis()
    states = [planning.state_bytes(spec, parts) for spec in specs]
    params, optimiser = (sum(sizes) for sizes in zip(*states, strict=True))
    costs = [planning.step_cost(spec, parts, platform) for spec in specs]
    # rows of all sites that are read, of this batch and the one that is on its way
    sites = {
        site: width for spec in specs for site, width in ((spec.site, spec.dictionary.d_in), (spec.target, spec.dictionary.out)) if site
    }
    batch = 2 * run.train.batch_size // parts.rows * sum(sites.values()) * _ITEM[run.harvest.dtype]
    shown = f"train {len(specs)} dictionaries" if len(specs) > 1 else "train 1 dictionary"
    return Program(
        "train",
        shown,
        params,
        optimiser,
        batch,
        memory.temp_size_in_bytes,
        params + optimiser,
        _sum(costs),
        run.train.batch_size,
        run.train.steps,
    )


def _together(run: Run, forward: Program, step: Program, widths: dict[str, int], parts: Parts) -> Program:
    """Training straight from the model: both are there, and a buffer of rows."""
    buffer = run.train.buffer_rows // parts.rows * sum(widths.values()) * 2
    passes = run.train.batch_size / forward.rows / _share(run)
    cost = _sum([step.cost, _scaled(forward.cost, passes)])
    return Program(
        "both", "train from the model", forward.parameters + step.parameters, step.optimiser,
        forward.activations + step.activations + buffer, max(forward.temporary, step.temporary), step.saving, cost, step.rows, step.steps,
    )  # fmt: skip


def _share(run: Run) -> float:
    """The share of a diffusion model's rows that training uses."""
    masked = (run.harvest.low + run.harvest.high) / 2 if run.harvest.policy != "clean" else 0.0
    return {"all": 1.0, "masked": masked, "predicting": masked, "visible": 1 - masked}[run.train.select] or 1.0


def network(work: Work, name: str) -> Transformer:
    """The network of a model, from its ``config.json`` alone; of a hub id, only that file is fetched."""
    if name.count("/") == 1 and "://" not in name and not Path(name).is_dir() and not name.startswith((".", "/", "~")):
        import huggingface_hub

        try:
            name = str(Path(huggingface_hub.hf_hub_download(name, "config.json")).parent)
        except Exception as error:  # the hub client raises many kinds; all mean the same to the user
            raise UserError(
                f"models: {name}: its config.json is not to be had from the hub ({str(error).splitlines()[0][:120]}): name a folder with it"
            ) from error
    return read_model(name, work.run.dtype)


def _widths(work: Work, name: str) -> dict[str, int]:
    world = work.world(name)
    if world is not None:
        return {ROWS: world.dimension}
    config = network(work, name).config
    return {canonical_site(site, config): site_width(canonical_site(site, config), config) for site in work.run.harvest.sites}


def _compiled(what: str, trace: Callable[[], Any]) -> Any:
    say(f"plan: compiling {what}; a minute or some")
    started = time.monotonic()
    try:
        compiled = trace().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = " ".join(str(error).split())
        raise UserError(
            f"plan: {what} does not fit, the compiler gave up ({reason[:160]}): use a smaller batch_size or a larger mesh.model"
        ) from None
    say(f"plan: compiled in {time.monotonic() - started:.0f} s")
    return compiled


def _trace_forward(run: Run, model: Transformer, sites: tuple[str, ...], where: Any) -> Any:
    model = model.clone(mesh=where if isinstance(where, Mesh) else None)
    batch, length = run.harvest.batch_size, run.data.block_length
    words = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    policy = run.harvest.policy if model.diffusion is not None else "clean"
    return forward.trace(
        model, _abstract_params(model, where), _placed(words, where), _rows(where, (batch, length), jnp.int32),
        _rows(where, (batch, length), jnp.bool_), _rows(where, (batch,), jnp.int32), low=run.harvest.low, high=run.harvest.high,
        sites=sites, policy=policy, padded=True, dtype="bfloat16" if run.harvest.dtype == "int8" else run.harvest.dtype,
    ).lower(lowering_platforms=(_platform(where),))  # fmt: skip


def _trace_step(spec: TrainSpec, where: Any, parallel: str | None) -> Any:
    mesh = where if isinstance(where, Mesh) else None
    state = jax.eval_shape(lambda: init_state(spec))
    if mesh is None:
        state = jax.tree.map(lambda leaf: _placed(leaf, where), state)
    else:
        state = jax.tree.map(lambda leaf, sharding: _struct(leaf, sharding), state, state_shardings(spec, mesh))
    read = _rows(where, (spec.batch_size, spec.dictionary.d_in), jnp.bfloat16)
    batch = (read, _rows(where, (spec.batch_size, spec.dictionary.out), jnp.bfloat16)) if spec.target else read
    step: Any = make_step(spec, mesh)  # pmap divides the same way
    return step.trace(state, batch).lower(lowering_platforms=(_platform(where),))


def _abstract_params(model: Transformer, where: Any) -> Any:
    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, model.dtype), params)
    if not isinstance(where, Mesh):
        return jax.tree.map(lambda leaf: _placed(leaf, where), params)
    specs = {"params": partition_specs(params["params"], where)}
    return jax.tree.map(lambda leaf, spec: _struct(leaf, NamedSharding(where, spec)), params, specs)


def _placed(leaf: Any, where: Any) -> jax.ShapeDtypeStruct:
    """Whole on every device of a mesh, or on one device."""
    sharding = NamedSharding(where, PartitionSpec()) if isinstance(where, Mesh) else jax.sharding.SingleDeviceSharding(where)
    return _struct(leaf, sharding)


def _rows(where: Any, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """Divided as the rows of a batch are."""
    leaf = jax.ShapeDtypeStruct(shape, dtype)
    return _struct(leaf, distributed.row_sharding(where)) if isinstance(where, Mesh) else _placed(leaf, where)


def _struct(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _platform(where: Any) -> str:
    platform = (where.devices.flat[0] if isinstance(where, Mesh) else where).platform
    return {"gpu": "cuda"}.get(platform, platform)


def _bytes_here(tree: Any) -> int:
    """Bytes of the part of a tree of placed shapes that one device holds."""
    return sum(int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _sum(costs: list[Cost]) -> Cost:
    """Of several programs; equal kinds of collectives are added up."""
    together: dict[tuple, Any] = {}
    for collective in (c for cost in costs for c in cost.collectives):
        key = (collective.what, collective.op, collective.axis, collective.bytes)
        before = together.get(key)
        together[key] = collective if before is None else dataclasses.replace(collective, count=collective.count + before.count)
    return Cost(sum(c.bfloat16 for c in costs), sum(c.float32 for c in costs), sum(c.bytes for c in costs), tuple(together.values()))


def _scaled(cost: Cost, times: float) -> Cost:
    collectives = tuple(dataclasses.replace(c, count=c.count * times) for c in cost.collectives)
    return Cost(cost.bfloat16 * times, cost.float32 * times, cost.bytes * times, collectives)


def _advice(work: Work, name: str, program: Program, parts: Parts, limit: float) -> list[str]:
    """What to change where a program does not fit: the first changes that alone, or else together, make it fit by the formulas."""
    if program.total <= limit:
        return []
    state = program.parameters + program.optimiser
    measured = Bytes(state, program.saving, program.activations, program.temporary)
    model = None if work.world(name) is not None else network(work, name)
    found = changes(work.run, model, _widths(work, name), measured, parts, limit, program.kind)
    over = f"{program.name} does not fit: {program.total / 1e9:.1f} of {limit / 1e9:.1f} GB that may be taken"
    if not found:
        return [f"{over}, and nothing that was tried is enough: use more devices"]
    return [f"{over}. It would with {'; or with '.join(found)}"]
