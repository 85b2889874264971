"""What every implementation of a sparse product must do: cases, and the formulas in NumPy, float64, pair by pair.

Contract: duplicates add; a zero in the code still multiplies (0 times NaN is NaN); what is not finite reaches the results of its own
pairs and no other, but for ``reference``, whose dense product spreads it; float32 results whatever the dtype of the dictionary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dlmscope_jax.kernels.sparse_matmul import products

TABLES = {
    "combine": products.COMBINE, "dots": products.DOTS, "outer": products.OUTER,
    "combine_flat": products.COMBINE_FLAT, "dots_flat": products.DOTS_FLAT,
}  # fmt: skip
ROW_SPARSE, FLAT = ("combine", "dots", "outer"), ("combine_flat", "outer_flat", "dots_flat")


class Case(NamedTuple):
    """A code [B, k], a dictionary [N, D] and rows [B, D]; the pairs of the flat form are the same ones in another order."""

    values: np.ndarray
    indices: np.ndarray
    weight: Any
    rows: Any

    def flat(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Values, rows and latents [M], shuffled, without those of the last row."""
        b, k = self.indices.shape
        order = np.random.default_rng(0).permutation(max(1, b - 1) * k)
        rows = np.repeat(np.arange(b, dtype=np.int32), k)
        return self.values.reshape(-1)[order], rows[order], self.indices.reshape(-1)[order]


def case(b: int, k: int, n: int, d: int, dtype: Any = jnp.float32, distinct: bool = True, seed: int = 0) -> Case:
    """Normal entries; latents of a row are distinct or drawn with replacement, early ones more often."""
    rng = np.random.default_rng(seed)
    if distinct:
        indices = rng.random((b, n)).argsort(axis=1)[:, :k]
    else:
        indices = np.minimum(rng.integers(0, n, (b, k)), rng.integers(0, n, (b, k)))
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    values = draw(b, k)
    values[:, 0] = rng.choice([0.0, -0.0, 1.5], b)
    return Case(values, indices.astype(np.int32), jnp.asarray(draw(n, d), dtype), jnp.asarray(draw(b, d), dtype))


CASES = {
    "usual": case(7, 4, 24, 5),
    "duplicates": case(9, 6, 5, 4, distinct=False),
    "bf16": case(8, 4, 24, 6, jnp.bfloat16),
    "k = 1": case(6, 1, 9, 3),
    "k = N": case(5, 8, 8, 3),
    "N = 1": case(5, 3, 1, 4, distinct=False),
    "D = 1": case(6, 3, 10, 1),
    "D = 131, one row": case(1, 3, 12, 131),
    "one latent in every row": case(70, 2, 3, 2, distinct=False),
}


def inputs(op: str, c: Case) -> tuple[tuple, dict]:
    """Arguments and static arguments of a primitive for a case."""
    width, n_rows = c.weight.shape[0], c.indices.shape[0]
    values, rows, latents = c.flat()
    return {
        "combine": ((c.values, c.indices, c.weight), {}),
        "dots": ((c.rows, c.indices, c.weight), {}),
        "outer": ((c.values, c.indices, c.rows), {"width": width}),
        "combine_flat": ((values, rows, latents, c.weight), {"n_rows": n_rows}),
        "outer_flat": ((values, latents, rows, c.rows), {"n_rows": width}),
        "dots_flat": ((c.rows, rows, latents, c.weight), {}),
    }[op]


def wanted(op: str, c: Case) -> np.ndarray:
    """The formula, one pair after the other."""
    weight, table = np.asarray(c.weight, np.float64), np.asarray(c.rows, np.float64)
    if op in ROW_SPARSE:
        b, k = c.indices.shape
        values, rows, latents = c.values.reshape(-1), np.repeat(np.arange(b), k), c.indices.reshape(-1)
    else:
        values, rows, latents = c.flat()
    with np.errstate(invalid="ignore"):
        if op.startswith("dots"):
            out = (table[rows] * weight[latents]).sum(axis=1)
            return out.reshape(c.indices.shape) if op == "dots" else out
        outer = op.startswith("outer")
        out = np.zeros(weight.shape if outer else table.shape)
        np.add.at(out, latents if outer else rows, values[:, None].astype(np.float64) * (table[rows] if outer else weight[latents]))
        return out


def jitted(op: str, name: str) -> Callable:
    """An implementation as it runs in a program."""
    run = TABLES["combine_flat" if op == "outer_flat" else op][name].run
    static = {"outer": ("width",), "combine_flat": ("n_rows",), "outer_flat": ("n_rows",)}.get(op, ())
    return jax.jit(run, static_argnames=(*static, "interpret") if name.startswith("pallas") else static)
