"""What a dictionary's training step costs a chip as chips, rows and latents grow together: compiled ahead of time, nothing is run.

    python scripts/weak_scaling.py [--dictionaries topk batch_topk jumprelu binary transcoder] [--chips 4 16 64 256] [--topk threshold]
    python scripts/weak_scaling.py --memory [--topology v5p:4x4x4] [--models 16 64]

Needs libtpu (``scripts/test --aot`` installs it) and no chip. Prints a Markdown table.

The rule: a chip of v5e has 512 rows and 4,096 latents of width 2,048, k = 32. The mesh is as square as it can be, so that both the rows
and the latents of a step grow with the square root of the number of chips. Bytes are those of the operands of all collectives of the
compiled program, times the trips of the loops around them, that one chip gives in one step; of branches (AuxK in steps with and
without dead latents, a batch that has no room) all are counted.

``--memory`` compiles the step for v5p, d = 4,096 and N = 2^20 latents, where only memory is read.

``--topk threshold`` has every selection of a row made by that implementation: the default one takes the compiler minutes. What moves
between chips does not depend on it.
"""

import argparse
import importlib
import math
import os
import sys
import time
from pathlib import Path

os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "kernels"))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from programs import collectives  # noqa: E402

from dlmscope_jax.dictionaries import BatchTopK, Binary, JumpReLU, LossSettings, TopK  # noqa: E402
from dlmscope_jax.distributed import make_mesh, row_sharding  # noqa: E402
from dlmscope_jax.training import TrainSpec, init_state, make_step, state_shardings  # noqa: E402

ROWS, LATENTS, DEPTH, K = 512, 4096, 2048, 32
TOPOLOGIES = {4: "v5e:2x2", 16: "v5e:4x4", 64: "v5e:8x8", 256: "v5e:16x16"}
DICTIONARIES = {
    "topk": lambda d, n: (TopK(d, n, K), {}),
    "topk without AuxK": lambda d, n: (TopK(d, n, K), {"settings": LossSettings(aux=0.0)}),
    "batch_topk": lambda d, n: (BatchTopK(d, n, K), {}),
    "batch_topk without AuxK": lambda d, n: (BatchTopK(d, n, K), {"settings": LossSettings(aux=0.0)}),
    "jumprelu": lambda d, n: (JumpReLU(d, n), {}),
    "binary": lambda d, n: (Binary(d, n), {"settings": LossSettings(entropy=1e-7, covariance=1e-7)}),
    "transcoder": lambda d, n: (TopK(d, n, K, d_out=d, skip=True), {"target": "mlp_out@0"}),
}
GIB = 2**30


def compiled(kind: str, topology: str, data: int, model: int, rows: int, latents: int, depth: int):
    """The step of a dictionary, compiled for a mesh of chips that are not here."""
    chips = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = make_mesh(data, model, devices=chips)
    dictionary, options = DICTIONARIES[kind](depth, latents)
    spec = TrainSpec(dictionary, steps=10_000, batch_size=rows, **options)
    state = jax.tree.map(
        lambda leaf, there: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=there),
        jax.eval_shape(lambda: init_state(spec)),
        state_shardings(spec, mesh),
    )
    batch = jax.ShapeDtypeStruct((rows, depth), jnp.bfloat16, sharding=row_sharding(mesh))
    arguments = state, (batch, batch) if dictionary.transcoder else batch
    return make_step(spec, mesh).trace(*arguments).lower(lowering_platforms=("tpu",)).compile()


def select_by(name: str) -> None:
    """Takes this implementation of top-k wherever none is named, in this process."""
    selection = importlib.import_module("dlmscope_jax.kernels.topk")  # the package, and not its function of the same name
    selection.default = lambda problem, platform: name


def memory(program) -> tuple[float, float]:
    """GiB of the state and batch, and of what a step needs beside them; the state is given away and made anew in its place."""
    found = program.memory_analysis()
    return found.argument_size_in_bytes / GIB, (found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes) / GIB


def scaling(kinds: list[str], chips: list[int]) -> None:
    print("| dictionary | chips | data x model | rows | latents | MB given a chip and step | collectives | GiB state | GiB beside it |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for kind in kinds:
        for count in chips:
            began, side = time.perf_counter(), math.isqrt(count)
            program = compiled(kind, TOPOLOGIES[count], side, side, ROWS * side, LATENTS * side, DEPTH)
            found = collectives(program.as_text())
            given, times = sum(c.operand_bytes * c.trips for c in found), sum(c.trips for c in found)
            held, beside = memory(program)
            size = f"{ROWS * side:,} | {LATENTS * side:,}"
            print(f"| {kind} | {count} | {side} x {side} | {size} | {given / 1e6:.2f} | {times} | {held:.2f} | {beside:.2f} |", flush=True)
            print(f"  {kind}, {count} chips: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)


def million(kinds: list[str], topology: str, models: list[int]) -> None:
    depth, latents, rows_here = 4096, 2**20, 512
    print(f"| dictionary | {topology}: data x model | rows | latents a chip | GiB state | GiB beside it | GiB together |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for kind in kinds:
        for model in models:
            began, data = time.perf_counter(), math.prod(int(n) for n in topology.split(":")[1].split("x")) // model
            held, beside = memory(compiled(kind, topology, data, model, rows_here * data, latents, depth))
            size = f"{rows_here * data:,} | {latents // model:,}"
            print(f"| {kind} | {data} x {model} | {size} | {held:.2f} | {beside:.2f} | {held + beside:.2f} |", flush=True)
            print(f"  {kind}, {data} x {model}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dictionaries", nargs="+", default=["topk", "batch_topk", "jumprelu", "binary"], choices=DICTIONARIES)
    parser.add_argument("--chips", type=int, nargs="+", default=list(TOPOLOGIES), choices=TOPOLOGIES)
    parser.add_argument("--memory", action="store_true", help="a million latents on v5p")
    parser.add_argument("--topology", default="v5p:4x4x4")
    parser.add_argument("--models", type=int, nargs="+", default=[16, 64], help="with --memory: parts of the latents")
    parser.add_argument("--topk", help="the implementation of top-k; default: that of the package")
    args = parser.parse_args()
    if args.topk:
        select_by(args.topk)
    if args.memory:
        million(args.dictionaries, args.topology, args.models)
    else:
        scaling(args.dictionaries, args.chips)


if __name__ == "__main__":
    main()
