"""What every implementation of an operation is held against: the same cases for all, those of absent hardware interpreted.

An implementation joins by one line in its table.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from dlmscope_jax.kernels import topk
from dlmscope_jax.kernels.topk import pallas_gpu, pallas_tpu

# (x [B, N], k) -> values, indices
TOPK = {
    "reference": partial(topk, implementation="reference"),
    "grouped": partial(topk, implementation="grouped"),
    "threshold": partial(topk, implementation="threshold"),
    "pallas_tpu": partial(pallas_tpu.topk, interpret=True),
    "pallas_gpu": partial(pallas_gpu.topk, interpret=True),
}
INTERPRETED = ("pallas_tpu", "pallas_gpu")

# Few distinct values, so that rows are full of ties: signed zeros, infinities, NaN of both signs and of two payloads, numbers at the ends.
SPECIAL = np.array([0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 1.2e-38, 3.4e38, -3.4e38, 3.5], np.float32)
SPECIAL = np.concatenate([SPECIAL, np.array([0xFFC00000, 0xFFFFFFFF, 0x7FFFFFFF], np.uint32).view(np.float32)])
KINDS = ("normal", "special", "two values", "one value", "ascending", "descending", "one group", "lowest")


def rows(kind: str, shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    """A float32 matrix: ``special`` values, values that tie, winners that come late, come early or lie side by side, lowest NaN."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape).astype(np.float32)
    if kind == "special":
        return SPECIAL[rng.integers(0, len(SPECIAL), shape)]
    if kind == "two values":
        return np.where(rng.random(shape) < 0.05, 1.0, -0.0).astype(np.float32)
    if kind == "one value":
        return np.full(shape, rng.choice([0.0, -np.inf, 2.5]), np.float32)
    if kind in ("ascending", "descending"):
        x = np.sort(x, axis=1)
        return x if kind == "ascending" else x[:, ::-1].copy()
    if kind == "one group":
        x[:, shape[1] // 2 : shape[1] // 2 + 40] += 100.0
    if kind == "lowest":  # padding must not come before these, nor tie with what is above them
        x[:] = SPECIAL[-2]
        x[:, :: shape[1] // 2 + 1] = -np.inf
    return x


def bits(x: jax.Array) -> np.ndarray:
    """The bits of floats; all NaN of one sign are one NaN in half precision, whose payloads a conversion does not keep."""
    x = np.asarray(x)
    if x.dtype != np.float32:
        x = np.where(np.isnan(x.astype(np.float32)), np.copysign(np.float32(np.nan), x.astype(np.float32)), x.astype(np.float32))
    return x.view(np.int32)


def check_topk(run, x: jax.Array, k: int) -> None:
    """``run(x, k)`` is ``lax.top_k(x, k)``, bit for bit."""
    values, indices = run(x, k)
    want_values, want_indices = jax.lax.top_k(x.astype(jnp.float32), k)  # XLA's CPU call knows float32 only
    assert values.dtype == x.dtype and indices.dtype == jnp.int32 and values.shape == indices.shape == (x.shape[0], k)
    np.testing.assert_array_equal(np.asarray(indices), np.asarray(want_indices))
    np.testing.assert_array_equal(bits(values), bits(want_values.astype(x.dtype)))
