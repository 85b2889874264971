"""The row-local update for NVIDIA GPUs: a row of the matrix is a program, and stays in registers from its gradient to its new norm.

Compiled from plain array operations, the sums over a row (its radial part before the update, its norm after it) cut the update into
several kernels with a pass over memory each, and XLA copies the weight and both moments first, also where the caller donates them:
compiled for an H200 the reference takes 151 MB of temporary memory at [16384, 768], and 4,295 MB at [131072, 4096] with bfloat16
moments; this takes none. Pallas, Triton backend.

Memory traffic: weight, both moments and gradient read once, weight and both moments written once: 28 bytes an element in float32, 20
with bfloat16 moments. In place where the caller donates.

Range: rows of up to 8,192 entries (16 a thread with 16 warps), any number of them, float32 weights and gradients, float32 or bfloat16
moments. Outside of it, ``refuses`` says why. Moments in bfloat16 are rounded as everywhere (``rounding``).

XLA cannot divide a kernel: what ``jit`` holds on several devices is gathered first. Inside ``shard_map`` nothing is moved.

Not measured: no such device was at hand. Held against the reference in Pallas' interpreter and compiled ahead of time for an H200.
"""

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from dlmscope_jax.compat import result, triton_params

from ..dispatch import Problem
from .reference import TINY, moments
from .rounding import stored

_LONGEST = 8192


def refuses(problem: Problem, platform: str) -> str | None:
    """Why this kernel cannot do a problem, as a clause; None if it can."""
    if platform != "cuda":
        return f"is a kernel for NVIDIA GPUs, this is {platform}"
    if problem.depth > _LONGEST:
        return f"takes rows of up to {_LONGEST} entries, got {problem.depth}"
    return None


def row_update(
    weight: Array, mu: Array, nu: Array, gradient: Array, rate: Array, count: Array, scale: Array, keep: Array,
    *, b1: float, b2: float, eps: float, unit: bool, interpret: bool = False,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """[N, D] four times and four scalars -> the weight and both moments."""
    width, depth = weight.shape
    held = 1 << (depth - 1).bit_length()
    step = count.astype(jnp.float32)
    numbers = jnp.stack([rate, scale, 1 - b1**step, 1 - b2**step])
    whole = jnp.stack([count, keep.astype(jnp.int32)])

    def kernel(weight_ref, mu_ref, nu_ref, gradient_ref, numbers_ref, whole_ref, weight_out, mu_out, nu_out):
        row, column = pl.program_id(0), jnp.arange(held, dtype=jnp.int32)
        there = column < depth
        w, m, v, g = (plt.load(ref.at[row, column], mask=there, other=0) for ref in (weight_ref, mu_ref, nu_ref, gradient_ref))
        rate, scale, correction1, correction2 = (numbers_ref[i] for i in range(4))
        count, keep = whole_ref[0], whole_ref[1] != 0
        if unit:
            g = g - (g * w).sum() / jnp.maximum((w * w).sum(), TINY) * w
        first, second = moments(m, v, g * scale, b1, b2)
        new = w - rate * (first / correction1) / (jnp.sqrt(second / correction2) + eps)
        if unit:
            new = new / jnp.sqrt(jnp.maximum((new * new).sum(), TINY))
        at = row * depth  # of the row's first element among all, which rounding goes by
        for ref, old, value in (
            (weight_out, w, new),
            (mu_out, m, stored(first, mu.dtype, count, at)),
            (nu_out, v, stored(second, nu.dtype, count, at)),
        ):
            plt.store(ref.at[row, column], jnp.where(keep, value, old), mask=there)

    arrays = (weight, mu, nu)
    out = pl.pallas_call(
        kernel,
        grid=(width,),
        out_shape=tuple(result(a.shape, a.dtype, *arrays, gradient) for a in arrays),
        input_output_aliases={0: 0, 1: 1, 2: 2},
        compiler_params=triton_params(max(1, min(16, held // 512)), 1),
        interpret=interpret,
        name="row_update",
    )(*arrays, gradient, numbers, whole)
    return tuple(out)
