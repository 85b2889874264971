"""The row-local update for TPU: a block of rows is brought into VMEM once, and leaves it when everything has happened to it.

Compiled from plain array operations, the sums over a row (its radial part before the update, its norm after it) cut the update into
several programs with a pass over memory each. Pallas, Mosaic backend; the arithmetic is that of ``reference.py``, on blocks.

Memory traffic: weight, both moments and gradient read once, weight and both moments written once: 28 bytes an element in float32, 20
with bfloat16 moments. In place where the caller donates.

Range: rows of up to 16,384 entries, any number of them, float32 weights and gradients, float32 or bfloat16 moments.

Not measured: no such device was at hand. Not the default; held against the reference in Pallas' interpreter, and libtpu compiles
it for v5e and v6e.
"""

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dlmscope_jax.compat import result

from ..dispatch import Problem
from .reference import moments, moved, without_radial
from .rounding import rounded

_LONGEST = 16384
_BLOCK = 2**18  # elements of a block: 1 MiB of each array
_LEAST_ROWS = 16  # what a tile of bfloat16 holds


def refuses(problem: Problem, platform: str) -> str | None:
    """Why this kernel cannot do a problem, as a clause; None if it can."""
    if platform != "tpu":
        return f"is a kernel for TPU, this is {platform}"
    if problem.depth > _LONGEST:
        return f"takes rows of up to {_LONGEST} entries, got {problem.depth}"
    return None


def row_update(
    weight: Array, mu: Array, nu: Array, gradient: Array, rate: Array, count: Array, scale: Array, keep: Array,
    *, b1: float, b2: float, eps: float, unit: bool, interpret: bool = False,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """[N, D] four times and four scalars -> the weight and both moments."""
    width, depth = weight.shape
    rows = max(_LEAST_ROWS, _BLOCK // depth // _LEAST_ROWS * _LEAST_ROWS)
    rows = min(rows, -(-width // _LEAST_ROWS) * _LEAST_ROWS)
    step = count.astype(jnp.float32)
    numbers = jnp.stack([rate, scale, 1 - b1**step, 1 - b2**step])
    whole = jnp.stack([count, keep.astype(jnp.int32)])

    def kernel(numbers_ref, whole_ref, weight_ref, mu_ref, nu_ref, gradient_ref, weight_out, mu_out, nu_out):
        rate, scale, correction1, correction2 = (numbers_ref[i] for i in range(4))
        w, g = weight_ref[...], gradient_ref[...]
        first, second = moments(mu_ref[...], nu_ref[...], (without_radial(g, w) if unit else g) * scale, b1, b2)
        new = moved(w, first, second, rate, (correction1, correction2), eps, unit)
        row = lax.broadcasted_iota(jnp.int32, g.shape, 0) + pl.program_id(0) * rows
        place = (row * depth + lax.broadcasted_iota(jnp.int32, g.shape, 1)).astype(jnp.uint32)

        def stored(moment, dtype):
            return rounded(moment, whole_ref[0], place) if dtype == jnp.bfloat16 else moment

        kept = whole_ref[1] == 0

        @pl.when(kept)
        def _():
            for ref, out in ((weight_ref, weight_out), (mu_ref, mu_out), (nu_ref, nu_out)):
                out[...] = ref[...]

        @pl.when(~kept)
        def _():
            weight_out[...] = new
            mu_out[...] = stored(first, mu.dtype)
            nu_out[...] = stored(second, nu.dtype)

    scalars, block = pl.BlockSpec(memory_space=pltpu.SMEM), pl.BlockSpec((rows, depth), lambda i: (i, 0))
    arrays = (weight, mu, nu)
    out = pl.pallas_call(
        kernel,
        grid=(pl.cdiv(width, rows),),
        in_specs=[scalars, scalars, *[block] * 4],
        out_specs=[block] * 3,
        out_shape=[result(a.shape, a.dtype, *arrays, gradient) for a in arrays],
        input_output_aliases={2: 0, 3: 1, 4: 2},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=48 * 2**20),
        interpret=interpret,
        name="row_update",
    )(numbers, whole, *arrays, gradient)
    return tuple(out)
