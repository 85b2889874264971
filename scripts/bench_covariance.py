"""Times the covariance term of binary autoencoders, value and gradient: in strips against the dense formula.

    python scripts/bench_covariance.py [--rows 512] [--widths 4096 8192] [--blocks 512] [--repeats 5]

Prints, for each width, medians of wall and processor time, temporary memory of the compiled programs, and by how much the
results are from the closed form. The two take turns, so that other work on the machine meets both.
"""

import argparse
import statistics
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from dlmscope_jax.kernels import offdiagonal_covariance


def dense(codes: jax.Array) -> jax.Array:
    """The formula as the released code has it, an [N, N] covariance."""
    centred = codes - codes.mean(axis=0)
    covariance = jnp.matmul(centred.T, centred, precision=jax.lax.Precision.HIGHEST) / (codes.shape[0] - 1)
    return jnp.abs(covariance).sum() - jnp.abs(jnp.diagonal(covariance)).sum()


def closed_form(codes: np.ndarray) -> tuple[float, np.ndarray]:
    """Value and gradient from whole counts, which float32 holds exactly; as in torch, and not in jax, the slope of |0| is 0."""
    n, ones = len(codes), codes.sum(axis=0)
    counts = n * (codes.T @ codes) - np.outer(ones, ones)
    np.fill_diagonal(counts, 0.0)
    value = np.abs(counts).sum(dtype=np.float64) / (n * (n - 1))
    return value, (codes - ones / n) @ np.sign(counts) * np.float32(2 / (n - 1))


def timed(program, codes: jax.Array) -> tuple[float, float]:
    """Seconds of wall and of processor time."""
    wall, processor = time.perf_counter(), time.process_time()
    jax.block_until_ready(program(codes))
    return time.perf_counter() - wall, time.process_time() - processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--widths", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--blocks", type=int, nargs="+", default=[512])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    for width in args.widths:
        codes = (jax.random.uniform(jax.random.key(0), (args.rows, width)) < 0.3).astype(jnp.float32)
        functions = {"dense": dense} | {f"strips of {b}": partial(offdiagonal_covariance, block=b) for b in args.blocks}
        programs = {name: jax.jit(jax.value_and_grad(f)).lower(codes).compile() for name, f in functions.items()}
        results = {name: program(codes) for name, program in programs.items()}
        times = {name: [] for name in programs}
        for _ in range(args.repeats):
            for name, program in programs.items():
                times[name].append(timed(program, codes))
        print(f"n = {args.rows}, N = {width}, {jax.default_backend()}")
        medians = {name: [statistics.median(column) for column in zip(*taken, strict=True)] for name, taken in times.items()}
        value, gradient = closed_form(np.asarray(codes))
        for name, (wall, processor) in medians.items():
            by_wall, by_processor = wall / medians["dense"][0], processor / medians["dense"][1]
            memory = programs[name].memory_analysis().temp_size_in_bytes / 2**20
            off = abs(float(results[name][0]) / value - 1), np.abs(results[name][1] - gradient).max() / np.abs(gradient).max()
            gradient_off = "" if name == "dense" else f", gradient by {off[1]:.0e}"
            print(
                f"  {name:15} {wall:7.3f} s wall ({by_wall:.2f}), {processor:7.3f} s processor ({by_processor:.2f}), {memory:7.0f} MiB, "
                f"value off by {off[0]:.0e}{gradient_off}"
            )


if __name__ == "__main__":
    main()
