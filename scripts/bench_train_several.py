"""What several dictionaries on one layer cost together: DLM-Scope's six k's against six separate steps.

    python scripts/bench_train_several.py --d 256 --width 2048 --batch 512

A step is: the batch goes to the device, gradient, optimiser. ``separate`` is the sum of six steps that each move their own batch and are
waited for; ``joint`` is what ``train`` does, one batch and six steps in flight; ``one program`` compiles all six steps into one.
Then six seeds of one k, whose program is the same: ``calls`` runs it six times, which is what ``train`` does, ``stacked`` keeps the
six states in one array each and scans over them. Rounds are interleaved, one of each kind after the other; medians.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dlmscope_jax.dictionaries import TopK
from dlmscope_jax.training import TrainSpec, init_state, make_step
from dlmscope_jax.training.program import program_of
from dlmscope_jax.training.step import _step

K = (50, 80, 160, 320, 520, 820)


def main() -> None:
    """Reads the arguments and prints two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d", type=int, default=256, help="width of a row (DLM-Scope: 3584)")
    parser.add_argument("--width", type=int, default=2048, help="latents (DLM-Scope: 16384)")
    parser.add_argument("--batch", type=int, default=512, help="rows a step (DLM-Scope: 2048)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2, help="steps a round")
    arguments = parser.parse_args()
    rows = np.random.default_rng(0).normal(size=(arguments.batch, arguments.d)).astype(np.float32)
    print(f"{jax.devices()[0].device_kind}: d {arguments.d}, {arguments.width} latents, {arguments.batch} rows, Adam, AuxK on, none dead")

    spec = lambda k, seed=0: TrainSpec(TopK(arguments.d, arguments.width, k), steps=10**6, batch_size=arguments.batch, seed=seed)  # noqa: E731
    specs = [spec(min(k, arguments.width)) for k in K]
    times = rounds(arguments, rows, {"separate": separate(specs), "joint": joint(specs), "one program": one_program(specs)})
    print(f"six k's {K}, milliseconds a step of all six, median of {arguments.rounds} rounds (least)")
    show(times, "separate")
    seeds = [spec(K[0], seed) for seed in range(len(K))]
    times = rounds(arguments, rows, {"calls": joint(seeds), "stacked": stacked(seeds)})
    print(f"six seeds of k = {K[0]}")
    show(times, "calls")


Run = Callable[[np.ndarray], None]


def separate(specs: list[TrainSpec]) -> Run:
    """Six trainings, one after the other, each with its own batch."""
    steps, states = [make_step(spec) for spec in specs], [init_state(spec) for spec in specs]

    def run(rows: np.ndarray) -> None:
        for i, step in enumerate(steps):
            states[i], metrics = step(states[i], jax.device_put(rows))
            jax.block_until_ready((states[i], metrics))

    return run


def joint(specs: list[TrainSpec]) -> Run:
    """One batch for all, waited for at the end: ``train``."""
    steps, states = [make_step(spec) for spec in specs], [init_state(spec) for spec in specs]

    def run(rows: np.ndarray) -> None:
        batch, metrics = jax.device_put(rows), []
        for i, step in enumerate(steps):
            states[i], found = step(states[i], batch)
            metrics.append(found)
        jax.block_until_ready((states, metrics))

    return run


def one_program(specs: list[TrainSpec]) -> Run:
    """All steps in one jitted function."""
    bodies = [functools.partial(_step, program_of(spec)) for spec in specs]
    step = jax.jit(lambda states, batch: [body(state, batch) for body, state in zip(bodies, states, strict=True)], donate_argnums=0)
    held = [[init_state(spec) for spec in specs]]

    def run(rows: np.ndarray) -> None:
        found = step(held[0], jax.device_put(rows))
        held[0] = [state for state, _ in found]
        jax.block_until_ready(found)

    return run


def stacked(specs: list[TrainSpec]) -> Run:
    """States on a leading axis, the step scanned over it."""
    body = functools.partial(_step, program_of(specs[0]))

    def all_of_them(states: Any, batch: Any) -> Any:
        return jax.lax.scan(lambda _, state: (None, body(state, batch)), None, states)[1]

    step = jax.jit(all_of_them, donate_argnums=0)
    held = [jax.tree.map(lambda *leaves: jnp.stack(leaves), *[init_state(spec) for spec in specs])]

    def run(rows: np.ndarray) -> None:
        held[0], metrics = step(held[0], jax.device_put(rows))
        jax.block_until_ready((held[0], metrics))

    return run


def rounds(arguments: argparse.Namespace, rows: np.ndarray, runs: dict[str, Run]) -> dict[str, list[float]]:
    """Seconds a step of each kind, a round of one after a round of the other; the first, which compiles, is not counted."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run(rows)
    for _ in range(arguments.rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            for _ in range(arguments.steps):
                run(rows)
            times[name].append((time.perf_counter() - start) / arguments.steps)
    return times


def show(times: dict[str, list[float]], base: str) -> None:
    """A line for each kind, with its ratio to ``base``: of the medians, and the median and range of the ratios round by round."""
    median = {name: statistics.median(values) for name, values in times.items()}
    for name, values in times.items():
        ratios = [value / against for value, against in zip(values, times[base], strict=True)]
        print(
            f"  {name:<12} {1e3 * median[name]:9.1f} ({1e3 * min(values):.1f})   {median[name] / median[base]:.2f} of {base}, "
            f"by rounds {statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
        )


if __name__ == "__main__":
    main()
