#!/usr/bin/env python
"""Every kernel primitive, implementation by implementation: median seconds, bytes moved, share of the measured bandwidth.

Implementations of a primitive take turns, so that what else the machine does falls on all of them, and a triad of large arrays
(a + 2 b, two read and one written) runs in every round: its bandwidth is the measure of the others. The bytes of a primitive are
those that it cannot avoid, whatever an implementation moves in truth: its operands read and its result written once, of a table as
many rows as the code names; the formula stands above each table. A share above 1 means that a cache served the rows. Beside ours,
marked with a star: `lax.top_k`, and with CUDA torch.topk and sparsify (its Triton decoder among it) where they are installed.

    .venv/bin/python scripts/bench_kernels.py [--primitives topk ...] [--implementations grouped ...] [--shapes 2048,768,16384,32 ...]
                                              [--dtype float32|bfloat16] [--rounds 7] [--quick] [--json FILE]

A shape is rows B, width of a row d, latents N, active latents k. On a GPU or TPU two large ones are added, in bfloat16.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from bench_step import SHAPES, parsed

from dlmscope_jax import kernels
from dlmscope_jax.kernels import dispatch
from dlmscope_jax.kernels.row_update import IMPLEMENTATIONS as ROW_UPDATE
from dlmscope_jax.kernels.sparse_matmul import products
from dlmscope_jax.kernels.topk import IMPLEMENTATIONS as TOPK
from dlmscope_jax.kernels.topk.encoded import IMPLEMENTATIONS as ENCODED
from dlmscope_jax.kernels.topk.encoded import product, select_encoded

LARGE = ("8192,4096,65536,64", "8192,4096,131072,64")
QUICK = "16,32,256,4"
TRIAD, TRIAD_QUICK = 1 << 26, 1 << 16  # float32 entries of an array


class Shape(NamedTuple):
    """B rows of width d, N latents, k of them active; the dtype of the data."""

    b: int
    d: int
    n: int
    k: int
    dtype: str

    @property
    def size(self) -> int:
        return jnp.dtype(self.dtype).itemsize

    def __str__(self) -> str:
        return f"B {self.b}, d {self.d}, N {self.n}, k {self.k}, {self.dtype}"


class Side(NamedTuple):
    """One contestant: its name, with a star where it is not ours, and what is timed."""

    name: str
    run: Callable[[], Any]


class Primitive(NamedTuple):
    """Bytes as text and as a function of a shape, and the contestants at a shape (or the reason why one is left out)."""

    formula: str
    moved: Callable[[Shape], int]
    sides: Callable[[Shape], Iterator[Side | str]]


def drawn(seed: int, shape: tuple[int, ...], dtype: str = "float32") -> jax.Array:
    return jax.jit(lambda: jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype))()


def code(s: Shape) -> tuple[jax.Array, jax.Array]:
    """Values and indices [B, k]: some latents fire much more often than others, as in a dictionary in training."""

    def make() -> tuple[jax.Array, jax.Array]:
        at = jax.random.uniform(jax.random.key(1), (s.b, s.k)) ** 2 * s.n
        values = jax.random.normal(jax.random.key(2), (s.b, s.k), jnp.float32).astype(s.dtype)
        return values, jnp.clip(at.astype(jnp.int32), 0, s.n - 1)

    return jax.jit(make)()


def flat_code(s: Shape) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The same as M = k B pairs in the order of rows: values, rows, latents."""
    values, indices = code(s)
    return values.reshape(-1), jnp.repeat(jnp.arange(s.b, dtype=jnp.int32), s.k), indices.reshape(-1)


def taking(table: dispatch.Table, problem: dispatch.Problem) -> Iterator[tuple[str, str | None]]:
    """The implementations of a table, each with the reason why it refuses the problem here, or None."""
    for name, implementation in table.items():
        yield name, implementation.refuses(problem, dispatch.platform_here())


def named(table: dispatch.Table, problem: dispatch.Problem, call: Callable[..., Any], *args: Any) -> Iterator[Side | str]:
    """``call(*args, implementation=name)`` for every implementation of a table, or why one is left out."""
    for name, reason in taking(table, problem):
        yield Side(name, partial(jax.jit(partial(call, implementation=name)), *args)) if reason is None else f"{name} {reason}"


def torch_side(name: str, make: Callable[..., Callable[[], Any]], *arrays: jax.Array) -> Iterator[Side]:
    """Somebody else's function of the same arrays, where CUDA and torch (and what ``make`` imports) are there."""
    if dispatch.platform_here() != "cuda" or importlib.util.find_spec("torch") is None:
        return
    import torch

    if not torch.cuda.is_available():
        return
    try:
        run = make(torch, *(torch.from_dlpack(a) for a in arrays))
    except ImportError:
        return

    def wait() -> None:
        with torch.no_grad():
            run()
        torch.cuda.synchronize()

    yield Side(f"{name} *", wait)


# --- primitives: the contestants at a shape


def rows_sides(s: Shape) -> Iterator[Side | str]:
    x = drawn(0, (s.b, s.n), s.dtype)
    problem = dispatch.Problem(s.b, s.n, s.k, 0, x.dtype)
    yield from named(TOPK, problem, partial(kernels.topk, k=s.k), x)
    yield Side("lax.top_k *", partial(jax.jit(jax.lax.top_k, static_argnums=1), x, s.k))
    yield from torch_side("torch.topk", lambda torch, x: lambda: torch.topk(x, s.k, dim=1, sorted=False), x)


def batch_sides(s: Shape) -> Iterator[Side | str]:
    x = drawn(0, (s.b, s.n), s.dtype)
    yield Side("counting", partial(jax.jit(kernels.topk_batch, static_argnums=1), x, s.b * s.k))
    yield Side("lax.top_k *", partial(jax.jit(lambda x: jax.lax.top_k(x.reshape(-1), s.b * s.k)), x))
    yield from torch_side("torch.topk", lambda torch, x: lambda: torch.topk(x.flatten(), s.b * s.k, sorted=False), x)


def encode_sides(s: Shape) -> Iterator[Side | str]:
    x, weight, bias = drawn(0, (s.b, s.d), s.dtype), drawn(1, (s.n, s.d), s.dtype), drawn(2, (s.n,), s.dtype)
    yield Side("product", partial(jax.jit(partial(product, shift=None, dtype=x.dtype)), x, weight, bias))
    problem = dispatch.Problem(s.b, s.n, s.k, s.d, x.dtype)
    yield from named(ENCODED, problem, partial(select_encoded, shift=None, k=s.k, dtype=x.dtype), x, weight, bias)

    def fused(torch, x, weight, bias):
        from sparsify.fused_encoder import fused_encoder

        return lambda: fused_encoder(x, weight, bias, s.k, "topk")

    yield from torch_side("sparsify", fused, x, weight, bias)


def combine_sides(s: Shape) -> Iterator[Side | str]:
    values, indices = code(s)
    weight = drawn(1, (s.n, s.d), s.dtype)
    yield from named(products.COMBINE, problem_of(s), products.combine, values, indices, weight)

    def decoder(torch, values, indices, weight):
        from sparsify.utils import decoder_impl

        return lambda: decoder_impl(indices, values, weight.mT)

    yield from torch_side("sparsify", decoder, values, indices, weight)


def dots_sides(s: Shape) -> Iterator[Side | str]:
    _, indices = code(s)
    rows, weight = drawn(0, (s.b, s.d), s.dtype), drawn(1, (s.n, s.d), s.dtype)
    yield from named(products.DOTS, problem_of(s), products.dots, rows, indices, weight)


def outer_sides(s: Shape) -> Iterator[Side | str]:
    values, indices = code(s)
    rows = drawn(0, (s.b, s.d), s.dtype)
    yield from named(products.OUTER, problem_of(s), partial(products.outer, width=s.n), values, indices, rows)


def combine_flat_sides(s: Shape) -> Iterator[Side | str]:
    weight = drawn(1, (s.n, s.d), s.dtype)
    call = partial(products.combine_flat, n_rows=s.b)
    yield from named(products.COMBINE_FLAT, problem_of(s), call, *flat_code(s), weight)


def dots_flat_sides(s: Shape) -> Iterator[Side | str]:
    _, rows, latents = flat_code(s)
    left, weight = drawn(0, (s.b, s.d), s.dtype), drawn(1, (s.n, s.d), s.dtype)
    yield from named(products.DOTS_FLAT, problem_of(s), products.dots_flat, left, rows, latents, weight)


def outer_flat_sides(s: Shape) -> Iterator[Side | str]:
    left = drawn(0, (s.b, s.d), s.dtype)
    call = partial(products.outer_flat, width=s.n)
    yield from named(products.COMBINE_FLAT, problem_of(s), call, *flat_code(s), left)


def row_update_sides(s: Shape) -> Iterator[Side | str]:
    """Weights and gradient in float32, moments in the dtype of the shape; each call goes on from the last, as training does."""
    gradient = drawn(3, (s.n, s.d))
    settings: dict[str, Any] = {"rate": 1e-4, "count": 1, "b1": 0.9, "b2": 0.999, "eps": 1e-8, "unit": True}
    problem = dispatch.Problem(1, s.n, 1, s.d, jnp.dtype(s.dtype))
    for name, reason in taking(ROW_UPDATE, problem):
        if reason is not None:
            yield f"{name} {reason}"
            continue
        step = jax.jit(partial(kernels.row_update, implementation=name, **settings), donate_argnums=(0, 1, 2))
        moments = (jnp.zeros((s.n, s.d), s.dtype), jnp.zeros((s.n, s.d), s.dtype))
        state = [(drawn(1, (s.n, s.d)), *moments)]

        def run(step=step, state=state) -> Any:
            state[0] = step(*state[0], gradient)
            return state[0]

        yield Side(name, run)


def problem_of(s: Shape) -> dispatch.Problem:
    return dispatch.Problem(s.b, s.n, s.k, s.d, jnp.dtype(s.dtype))


# s: bytes of the data's dtype. Results of products are float32, indices int32.
PRIMITIVES = {
    "topk": Primitive("B N s + B k (s + 4)", lambda s: s.b * s.n * s.size + s.b * s.k * (s.size + 4), rows_sides),
    "topk_batch": Primitive("B N s + B k (s + 8)", lambda s: s.b * s.n * s.size + s.b * s.k * (s.size + 8), batch_sides),
    "select_encoded": Primitive(
        "(B d + N d + N) s + 8 B k", lambda s: (s.b * s.d + s.n * s.d + s.n) * s.size + 8 * s.b * s.k, encode_sides
    ),
    "combine": Primitive("B k (d s + s + 4) + 4 B d", lambda s: s.b * s.k * (s.d * s.size + s.size + 4) + 4 * s.b * s.d, combine_sides),
    "dots": Primitive("B k (d s + 8) + B d s", lambda s: s.b * s.k * (s.d * s.size + 8) + s.b * s.d * s.size, dots_sides),
    "outer": Primitive("B k (d s + s + 4) + 4 N d", lambda s: s.b * s.k * (s.d * s.size + s.size + 4) + 4 * s.n * s.d, outer_sides),
    "combine_flat": Primitive(
        "B k (d s + s + 8) + 4 B d", lambda s: s.b * s.k * (s.d * s.size + s.size + 8) + 4 * s.b * s.d, combine_flat_sides
    ),
    "dots_flat": Primitive("B k (d s + 12) + B d s", lambda s: s.b * s.k * (s.d * s.size + 12) + s.b * s.d * s.size, dots_flat_sides),
    "outer_flat": Primitive(
        "B k (d s + s + 8) + 4 N d", lambda s: s.b * s.k * (s.d * s.size + s.size + 8) + 4 * s.n * s.d, outer_flat_sides
    ),
    "row_update": Primitive("N d (12 + 4 s)", lambda s: s.n * s.d * (12 + 4 * s.size), row_update_sides),
}  # fmt: skip


# --- measuring


def seconds_of(side: Side, least: float) -> Callable[[], float]:
    """A timer of one call's seconds, which makes as many calls as take ``least`` seconds; compiles it first."""
    jax.block_until_ready(side.run())

    def timed(calls: int) -> float:
        begun = time.perf_counter()
        for _ in range(calls - 1):
            side.run()
        jax.block_until_ready(side.run())
        return (time.perf_counter() - begun) / calls

    calls = min(1000, max(1, round(least / timed(1))))
    return partial(timed, calls)


def measure(primitive: Primitive, shape: Shape, only: list[str] | None, rounds: int, quick: bool) -> dict:
    """All contestants of a primitive at a shape, and a triad, in turn."""
    least, entries = (0.0, TRIAD_QUICK) if quick else (0.02, TRIAD)
    a, b = drawn(3, (entries,)), drawn(4, (entries,))
    triad = jax.jit(lambda a, b: a + 2 * b)
    timers = {"": seconds_of(Side("", partial(triad, a, b)), least)}
    refused = []
    for side in primitive.sides(shape):
        if isinstance(side, str):
            refused.append(side)
        elif only is None or side.name.removesuffix(" *") in only:
            try:
                timers[side.name] = seconds_of(side, least)
            except jax.errors.JaxRuntimeError as error:
                refused.append(f"{side.name}: {str(error).splitlines()[0]}")
    times: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(rounds):
        for name, timer in timers.items():
            times[name].append(timer())
    bandwidth = 12 * entries / statistics.median(times.pop(""))
    moved = primitive.moved(shape)
    sides = []
    for name, taken in times.items():
        median = statistics.median(taken)
        sides.append({"name": name, "seconds": median, "all_seconds": taken, "of_bandwidth": moved / median / bandwidth})
    return {
        "shape": shape._asdict(), "formula": primitive.formula, "bytes": moved, "bandwidth": bandwidth, "rounds": rounds,
        "implementations": sides, "refused": refused,
    }  # fmt: skip


def table(name: str, result: dict) -> str:
    """One primitive at one shape."""
    shape = Shape(**result["shape"])
    head = f"{name}: {shape}; {result['bytes'] / 1e6:.1f} MB = {result['formula']}; triad {result['bandwidth'] / 1e9:.1f} GB/s"
    lines = [head, f"  {'':20}{'ms':>10}{'GB/s':>9}{'of triad':>10}"]
    for side in result["implementations"]:
        rate = result["bytes"] / side["seconds"] / 1e9
        lines.append(f"  {side['name']:20}{1e3 * side['seconds']:10.3f}{rate:9.1f}{side['of_bandwidth']:10.2f}")
    return "\n".join(lines + [f"  left out: {reason}" for reason in result["refused"]])


def shapes_of(given: list[str] | None, dtype: str | None, quick: bool) -> list[Shape]:
    """What was asked for, or the four shapes, and on accelerators the large ones."""
    if given is None and not quick:
        usual = [Shape(*parsed(text), dtype or "float32") for text in SHAPES]
        large = [] if jax.default_backend() == "cpu" else [Shape(*parsed(text), dtype or "bfloat16") for text in LARGE]
        return usual + large
    return [Shape(*parsed(text), dtype or "float32") for text in given or [QUICK]]


def known_implementations() -> set[str]:
    tables = (TOPK, ENCODED, ROW_UPDATE, products.COMBINE, products.DOTS, products.OUTER, products.COMBINE_FLAT, products.DOTS_FLAT)
    return {"counting", "product", "lax.top_k", "torch.topk", "sparsify"}.union(*tables)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--primitives", nargs="+", default=list(PRIMITIVES), metavar="NAME", help=", ".join(PRIMITIVES))
    parser.add_argument("--implementations", nargs="+", metavar="NAME", help="all that there are, where it is not given")
    parser.add_argument("--shapes", nargs="+", metavar="B,D,N,K")
    parser.add_argument("--dtype", help="float32 or bfloat16, of the data; float32, of the large shapes bfloat16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="a tiny shape and one round, to see that everything runs")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    known = {"primitives": set(PRIMITIVES), "implementations": known_implementations(), "dtype": {"float32", "bfloat16"}}
    for option, names in known.items():
        given = getattr(args, option) or []
        for name in [given] if isinstance(given, str) else given:
            if name not in names:
                parser.exit(2, f"bench_kernels: --{option} {name!r} is not known: one of {', '.join(sorted(names))}\n")
    if args.rounds < 1:
        parser.exit(2, "bench_kernels: --rounds must be at least 1\n")
    try:
        shapes = shapes_of(args.shapes, args.dtype, args.quick)
    except argparse.ArgumentTypeError as error:
        parser.exit(2, f"bench_kernels: --shapes: {error}\n")
    packages = [name for name in ("jax", "jaxlib", "torch", "triton", "eai-sparsify") if importlib.util.find_spec(name.split("-")[-1])]
    where = {
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }
    print(f"{where['device']}, {where['cores']} cores, {', '.join(f'{name} {version}' for name, version in where['versions'].items())}")
    results: dict[str, list[dict]] = {name: [] for name in args.primitives}
    for shape in shapes:
        for name in args.primitives:
            found = measure(PRIMITIVES[name], shape, args.implementations, 1 if args.quick else args.rounds, args.quick)
            results[name].append(found)
            print(table(name, found), flush=True)
    if args.json:
        args.json.write_text(json.dumps(where | {"results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
