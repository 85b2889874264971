#!/usr/bin/env python
"""Kills harvest and training at random moments with SIGKILL, resumes each with the same command, and compares with undisturbed runs.

Rows with their columns, trained parameters and metrics must be the same bit by bit, every time. Of several processes one, chosen at
random, is killed; the others must then stop by themselves. Moments are uniform over the time from the first call of the package to
the end, compilation included. Everything is tiny, so that thirty kills take minutes. Exit code 1 if anything differs or hangs.

    JAX_PLATFORMS=cpu .venv/bin/python scripts/kill_and_resume.py [--kills 30] [--seed 0] [--only harvest train harvest_x2 train_x2]
"""

import argparse
import dataclasses
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
# what is done, by how many processes
SCENARIOS = {"harvest": ("harvest", 1), "train": ("train", 1), "harvest_x2": ("harvest", 2), "train_x2": ("train", 2)}
BLOCKS, LENGTH, VOCABULARY, WIDTH, SITE = 192, 16, 50, 16, "resid_post@1"
STEPS, EVERY, BATCH = 120, 10, 64
PATIENCE = 60.0  # seconds in which the others must have stopped


def work(what: str, folder: Path, steps: int, model: int, cluster: tuple[str | None, int | None, int | None]) -> None:
    """One process of a harvest into ``folder/store``, or of a training from there into ``folder/run``; mesh: data x ``model``.

    Says when it begins, and which step is done.
    """
    from dlmscope_jax import distributed

    print("begin", flush=True)
    distributed.start(*cluster)
    import jax

    mesh = distributed.make_mesh(model=model) if jax.device_count() > 1 else None
    if what == "harvest":
        harvest(folder, mesh)
    else:
        from dlmscope_jax.activations import ActivationStore
        from dlmscope_jax.training import Checkpoints, train

        policy = Checkpoints(every=EVERY, best="loss")
        train(specs(steps), ActivationStore.open(folder / "store"), folder / "run", checkpoints=policy, progress=Steps(), mesh=mesh)


def harvest(folder: Path, mesh: Any, progress: Callable[[int], None] | None = None) -> None:
    """Harvests a tiny model into ``folder/store``."""
    import jax

    from dlmscope_jax import activations
    from dlmscope_jax.models import DiffusionSpec, ModelConfig, Transformer, init_params

    config = ModelConfig("llama", VOCABULARY, WIDTH, 2, 2, 2, 8, 32, 1e-5, 10_000.0, LENGTH, "bidirectional", bos_id=0, eos_id=1, pad_id=2)
    model = Transformer(config, DiffusionSpec(3, False))
    some, half = blocks(), activations.Corruption("rate", 0.3, 0.7)
    params = init_params(model, jax.random.key(0))
    activations.harvest(model, params, some, folder / "store", [SITE], half, batch_size=4, shard_blocks=4, mesh=mesh, progress=progress)


class Steps:
    """A progress that says the number of every step."""

    done = 0

    def skip(self, count: int) -> None:
        self.done += count

    def note(self, text: str) -> None:
        pass

    def advance(self, count: int = 1) -> None:
        self.done += count
        print(self.done, flush=True)


def blocks() -> Any:
    """Text that is none."""
    from dlmscope_jax.data import Blocks

    tokens = np.random.default_rng(0).integers(4, VOCABULARY, (BLOCKS, LENGTH)).astype(np.int32)
    documents = np.repeat(np.arange(BLOCKS, dtype=np.int32)[:, None], LENGTH, axis=1)
    documents[::5, LENGTH - 3 :] = -1
    return Blocks(tokens, documents, tuple(f"document {i}" for i in range(BLOCKS)), "train")


def specs(steps: int = STEPS) -> list[Any]:
    """What is trained: a plain dictionary, and one with an average and resampling."""
    from dlmscope_jax.dictionaries import TopK
    from dlmscope_jax.training import TrainSpec

    common = {"steps": steps, "site": SITE, "batch_size": BATCH, "lr": 1e-3, "sample_rows": 256, "dead_rows": 640}
    return [TrainSpec(TopK(WIDTH, 64, 4), **common), TrainSpec(TopK(WIDTH, 32, 2), ema=0.9, resample_every=17, label="averaged", **common)]


def outcome(what: str, folder: Path) -> dict[str, str]:
    """Digests of everything that must not depend on what happened on the way."""
    if what == "harvest":
        from dlmscope_jax.activations import ActivationStore

        store = ActivationStore.open(folder / "store")
        assert store.complete
        arrays = {**{site: store.read(site) for site in store.sites}, **{name: store.column(name) for name in store.columns}}
        return {name: _digest(np.ascontiguousarray(values).view(np.uint8).data) for name, values in arrays.items()}
    files = sorted(path for path in (folder / "run").rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): _digest(path.read_bytes()) for path in files}


def launch(
    what: str, folder: Path, processes: int, devices: int = 1, model: int = 1, steps: int = STEPS, cache: Path | None = None
) -> list[subprocess.Popen]:
    """Starts the processes; what they say on stderr goes to ``folder/stderr-<process>``."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_COMPILATION", "JAX_PERSISTENT"))}
    environment |= {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    if cache is not None:  # filled by the first run; what is killed does not write to it
        environment |= {
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1e9" if any(cache.iterdir()) else "0",
        }
    with socket.create_server(("localhost", 0)) as free:
        coordinator = f"localhost:{free.getsockname()[1]}"
    folder.mkdir(parents=True, exist_ok=True)
    started = []
    for process in range(processes):
        cluster = [coordinator, str(processes), str(process)] if processes > 1 else []
        command = [sys.executable, __file__, "--work", what, str(folder), str(steps), str(model), *cluster]
        with open(folder / f"stderr-{process}", "wb") as stderr:
            started.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=stderr))
    return started


def finish(processes: list[subprocess.Popen], folder: Path, seconds: float = 300.0) -> None:
    """Waits for processes that must end well."""
    codes = [process.wait(timeout=seconds) for process in processes]
    for process in processes:
        process.stdout.close()
    said = "\n".join((folder / f"stderr-{number}").read_text()[:2000] for number in range(len(codes)))
    assert not any(codes), f"processes ended with {codes}:\n{said}"


@dataclasses.dataclass
class Kill:
    """What happened at one kill; ``stopped``: seconds and exit codes of the others."""

    moment: float
    victim: int
    there: str
    stopped: list[tuple[float, int]]
    message: str
    same: bool


def kill_once(what: str, processes: int, folder: Path, wanted: dict[str, str], moment: float, victim: int, cache: Path | None) -> Kill:
    """Kills one process so many seconds after all have begun, waits for the others, resumes, and compares."""
    running = launch(what, folder, processes, cache=cache)
    for process in running:
        assert process.stdout.readline() == b"begin\n"
    time.sleep(moment)
    os.kill(running[victim].pid, signal.SIGKILL)
    start, stopped = time.monotonic(), []
    for number, process in enumerate(running):
        try:
            code = process.wait(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait() + 1000
        process.stdout.close()
        if number != victim:
            stopped.append((time.monotonic() - start, code))
    said = [(folder / f"stderr-{number}").read_text().splitlines() for number in range(processes) if number != victim]
    message = "; ".join(line for lines in said for line in lines[-1:])
    there = _progress(what, folder)
    finish(launch(what, folder, processes, cache=cache), folder)
    return Kill(moment, victim, there, stopped, message, outcome(what, folder) == wanted)


def trials(name: str, folder: Path, kills: int, seed: int, show: bool = True) -> list[Kill]:
    """The undisturbed run of a scenario, then its kills."""
    what, processes = SCENARIOS[name]
    cache = folder / "cache"
    cache.mkdir(parents=True)
    before = folder / "before"
    if what == "train":
        finish(launch("harvest", before, processes), before)
    whole = folder / "undisturbed"
    for _ in range(2):  # the first one compiles
        shutil.rmtree(whole, ignore_errors=True)
        if what == "train":
            shutil.copytree(before, whole)
        running = launch(what, whole, processes, cache=cache)
        for process in running:
            process.stdout.readline()
        start = time.monotonic()
        finish(running, whole)
        length = time.monotonic() - start
    wanted = outcome(what, whole)
    if show:
        print(f"{name}: undisturbed {length:.1f} s after the start of Python, {len(wanted)} digests")
    generator = np.random.default_rng([seed, list(SCENARIOS).index(name)])
    found = []
    for number in range(kills):
        moment, victim = float(generator.uniform(0, length)), int(generator.integers(processes))
        place = folder / "killed"
        shutil.rmtree(place, ignore_errors=True)
        if what == "train":
            shutil.copytree(before, place)
        kill = kill_once(what, processes, place, wanted, moment, victim, cache)
        found.append(kill)
        if show:
            others = ", ".join(f"others stopped after {seconds:.1f} s ({code})" for seconds, code in kill.stopped)
            same = "same" if kill.same else "DIFFERENT"
            print(f"  {number + 1:3}  {kill.moment:5.2f} s  process {victim}  {kill.there:<60} {others:<36} {same}")
            sys.stdout.flush()
    return found


def _progress(what: str, folder: Path) -> str:
    """What the killed run left."""
    if what == "harvest":
        lines = sum(len(path.read_text().splitlines()) for path in (folder / "store").glob("manifest*.jsonl"))
        return f"{lines} of {BLOCKS // 4} shards" + (", complete" if (folder / "store" / "COMPLETE").exists() else "")
    found = []
    for spec in specs():
        place = folder / "run" / spec.name
        steps = sorted(path.name.replace("step_0", "").lstrip("0") for path in (place / "checkpoints").glob("*"))
        found.append("done" if (place / "config.json").exists() else "+".join(steps) or "nothing")
    return " | ".join(found)


def _digest(content: Any) -> str:
    return hashlib.sha256(content).hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, help="of each scenario")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=list(SCENARIOS), default=list(SCENARIOS))
    parser.add_argument("--json", type=Path, help="where to write the table")
    given = parser.parse_args()
    table: dict[str, list[Kill]] = {}
    for name in given.only:
        with tempfile.TemporaryDirectory() as folder:
            table[name] = trials(name, Path(folder), given.kills, given.seed)
    bad = 0
    print(f"\n{'scenario':<12} kills  same  others stopped by themselves  longest wait")
    for name, kills in table.items():
        stopped = [one for kill in kills for one in kill.stopped]
        themselves = [one for one in stopped if one[1] < 1000]
        same = sum(kill.same for kill in kills)
        bad += len(kills) - same + len(stopped) - len(themselves)
        wait = f"{max(seconds for seconds, _ in stopped):.1f} s" if stopped else ""
        print(f"{name:<12} {len(kills):5}  {same:4}  {f'{len(themselves)} of {len(stopped)}' if stopped else '':<28}  {wait}")
    if given.json:
        given.json.write_text(json.dumps({name: [dataclasses.asdict(kill) for kill in kills] for name, kills in table.items()}, indent=1))
    return int(bad > 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        from dlmscope_jax.errors import PeerLost, Preempted

        verb, place, steps, model, *where = sys.argv[2:]
        cluster = (where[0], int(where[1]), int(where[2])) if where else (None, None, None)
        try:
            work(verb, Path(place), int(steps), int(model), cluster)
        except (PeerLost, Preempted) as error:
            print(error, file=sys.stderr)
            code = 75 if isinstance(error, Preempted) else 1
            if code == 1:
                from dlmscope_jax import distributed

                distributed.end(code, str(error))
            sys.exit(code)
    else:
        sys.exit(main())
