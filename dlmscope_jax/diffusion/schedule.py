"""How many tokens each denoising step commits: plain NumPy, computed once on the host.

The arithmetic is float32 in the order in which the original implementations do it: a schedule that is one rounding off
commits a token one step earlier or later.
"""

import numpy as np

from dlmscope_jax.errors import UserError


def transfer_counts(masks: int, steps: int) -> np.ndarray:
    """LLaDA's schedule: ``masks`` tokens over ``steps`` steps as evenly as possible, the surplus first.

    Returns:
      [steps] int32; ``transfer_counts(10, 4)`` is 3, 3, 2, 2.
    """
    if steps < 1 or masks < 0:
        raise UserError(f"transfer_counts: {masks} masks in {steps} steps: give masks >= 0 and steps >= 1")
    base, surplus = divmod(masks, steps)
    return np.array([base + (i < surplus) for i in range(steps)], np.int32)


def dream_timesteps(steps: int, eps: float = 1e-3) -> np.ndarray:
    """Dream's (and MDLM's) times from 1 down to ``eps``, [steps + 1] float32, as ``torch.linspace(1, eps, steps + 1)`` has them.

    torch fills the second half from the end; ``np.linspace`` does not, and gives other counts for some lengths. torch's
    own values vary in the last bit with the vector width of the processor; the counts do not (see the tests).
    """
    if steps < 1:
        raise UserError(f"dream_timesteps: steps is {steps}: at least 1")
    n, start, end = steps + 1, np.float32(1.0), np.float32(eps)
    stride = (end - start) / np.float32(n - 1)
    index = np.arange(n, dtype=np.float32)
    return np.where(np.arange(n) < n // 2, start + stride * index, end - stride * (np.float32(n - 1) - index)).astype(np.float32)


def dream_fractions(steps: int, eps: float = 1e-3) -> np.ndarray:
    """Share of the remaining masks that each of Dream's steps commits: ``1 - s / t``, and 1 at the last; [steps] float32."""
    times = dream_timesteps(steps, eps)
    fractions = np.float32(1.0) - times[1:] / times[:-1]
    fractions[-1] = 1.0
    return fractions


def dream_counts(masks: int, steps: int, eps: float = 1e-3) -> np.ndarray:
    """Tokens that Dream's confidence algorithms commit at each step, [steps] int32, from ``masks`` masks.

    The first step commits none when ``steps == masks`` (``eps`` keeps it just under one token) and the last step two.
    """
    counts, left = [], masks
    for fraction in dream_fractions(steps, eps):
        counts.append(int(np.float32(left) * fraction))
        left -= counts[-1]
    return np.array(counts, np.int32)


def mdlm_stays(steps: int, eps: float = 1e-5) -> np.ndarray:
    """Probability ``s / t`` with which a masked token stays masked at each of MDLM's steps, [steps] float32.

    t as in ``dream_timesteps``; s is ``t - (1 - eps) / steps`` and not the next t, which may differ in the last bit.
    """
    times = dream_timesteps(steps, eps)[:-1]
    return np.maximum(times - np.float32((1 - eps) / steps), np.float32(0.0)) / times
