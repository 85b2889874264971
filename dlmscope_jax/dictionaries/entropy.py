"""Entropy of binary codes in bits, of one batch as a loss and of a whole set; and how much of an event each bit is."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dlmscope_jax.errors import UserError
from dlmscope_jax.kernels.axes import ALONE, Axes

_INSIDE_BURST = 1e-6
_INSIDE_LOG = 1e-10  # the released code's; it bounds the slope at log2(1e10) = 33.2


def batch_entropy(bits: Float[Array, "B N"], axes: Axes = ALONE) -> Float[Array, ""]:
    """``-sum_j p_j log2(p_j + 1e-10) + (1 - p_j) log2(1 - p_j + 1e-10)``, p_j the batch's share of ones: the released loss.

    Where ``axes`` divide the batch or the latents, it is that of all of them; a device gives 4 bytes for each latent that it holds.
    """
    rows = bits.shape[0] * axes.row_parts
    ones = axes.sum_rows(bits.sum(axis=0))
    p, q = ones / rows, (rows - ones) / rows  # not 1 - p: XLA would join that 1 with the 1e-10, where it is lost
    return axes.sum_latents(-(p * jnp.log2(p + _INSIDE_LOG) + q * jnp.log2(q + _INSIDE_LOG)).sum())


def burstiness(bits: Bool[Array, "*batch N"], prior: Float[Array, " N"]) -> Float[Array, "*batch N"]:
    """``log2(|B - p| + 1e-6)``: how rare a bit's value is, at most 0; the paper's activation of a binary latent.

    It orders the latents of a row as ``|B - p|`` does, so that a 0 of a bit that is mostly 1 is an event too.

    Args:
      bits: the values of a 1-bit code.
      prior: p, each bit's share of ones over a whole set of rows.
    """
    return jnp.log2(jnp.abs(bits.astype(jnp.float32) - prior) + _INSIDE_BURST)


def marginal_entropy(fired: Int[np.ndarray, " N"], rows: int) -> dict[str, float]:
    """Summed marginal entropy over a full set, in bits (METHODS.md, "Entropy").

    The plug-in estimate of a bit is too small by about 1 / (2 n ln 2) (Miller 1955), which is added for every bit that takes
    both values. The sum is an upper bound of the joint entropy, and equals it for independent bits.

    Args:
      fired: in how many rows each bit was 1; add up ``codes.fired(width)`` over batches.
      rows: n.

    Returns:
      ``bits``, ``plug_in`` (without the correction), ``live`` (how many bits take both values).

    Raises:
      UserError: counts that are not within 0 and ``rows``, no rows.
    """
    fired = np.asarray(fired, np.int64)
    if rows < 1 or (fired.size and not 0 <= fired.min() <= fired.max() <= rows):
        raise UserError(f"marginal_entropy: counts must lie between 0 and the number of rows, got rows = {rows}")
    p = fired[(fired > 0) & (fired < rows)] / rows
    plug_in = float(-(p * np.log2(p) + (1 - p) * np.log2(1 - p)).sum())
    return {"bits": plug_in + p.size / (2 * rows * np.log(2)), "plug_in": plug_in, "live": int(p.size)}
