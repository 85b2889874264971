"""The one way this package puts an interval on a number: a paired bootstrap over documents of a ratio of sums."""

import dataclasses
import functools

import numpy as np
from jaxtyping import Float, Int

from dlmscope_jax.errors import UserError

MIN_UNITS = 30  # METHODS.md: with fewer, an interval would promise more than the data hold
DRAWS = 2000
LEVEL = 0.95
_CHUNK = 2_000_000  # weights held at once


@dataclasses.dataclass(frozen=True)
class Interval:
    """A ratio of sums with its interval.

    Attributes:
      value: sum of the numerators over sum of the denominators; None where that is not a number.
      low, high: percentile bounds; None where there is no interval, ``note`` says why.
      units: number of resampled units (documents that hold any scored token).
      draws: bootstrap draws.
      note: empty, or why there is no interval.
    """

    value: float | None
    low: float | None
    high: float | None
    units: int
    draws: int
    note: str = ""

    def to_json(self) -> dict:
        """A plain dict that ``json`` can write; absent bounds are None."""
        return dataclasses.asdict(self)


def bootstrap(
    numerator: Float[np.ndarray, "units"],
    denominator: Float[np.ndarray, "units"] | None = None,
    *,
    offset: float = 0.0,
    sign: float = 1.0,
    draws: int = DRAWS,
    level: float = LEVEL,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap of ``offset + sign * sum(numerator) / sum(denominator)`` over resampled units.

    A unit is a document (never a token): tokens of one document are not independent. Comparisons are paired by giving
    the difference as numerator. The same ``seed`` and number of units give the same resampling weights, so several
    quantities of one run share their draws.

    Args:
      numerator: one sum a unit, for instance the loss difference summed over the document's scored tokens.
      denominator: one sum a unit, for instance its number of scored tokens; None means 1 each (a mean over units).
      offset, sign: ``1 - a / b`` (explained variance) is offset 1, sign -1.
      draws: number of resamples.
      level: coverage of the interval.
      seed: of the resampling.

    Returns:
      The ``Interval``. With fewer than 30 units, or where a resample has no defined ratio, it has no bounds and says so.

    Raises:
      UserError: when the two arrays differ in shape, or are not one-dimensional.
    """
    top = np.asarray(numerator, np.float64)
    bottom = np.ones_like(top) if denominator is None else np.asarray(denominator, np.float64)
    if top.ndim != 1 or top.shape != bottom.shape:
        raise UserError(f"bootstrap: numerator {top.shape} and denominator {bottom.shape} must be one value a unit each")
    present = (top != 0) | (bottom != 0)  # a document without a scored token is not a unit of this quantity
    top, bottom = top[present], bottom[present]
    units = len(top)
    value = _ratio(top.sum(), bottom.sum())
    value = None if value is None else offset + sign * value
    if units < MIN_UNITS:
        return Interval(value, None, None, units, 0, f"no interval: {units} units, fewer than {MIN_UNITS}")
    sums = _resampled_sums(np.stack([top, bottom], axis=1), draws, seed)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = offset + sign * sums[:, 0] / sums[:, 1]
    if value is None or not np.isfinite(ratios).all() or (np.sign(sums[:, 1]) != np.sign(bottom.sum())).any():
        return Interval(value, None, None, units, draws, "no interval: the denominator is not bounded away from zero")
    low, high = np.quantile(ratios, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high), units, draws)


def sum_by(groups: Int[np.ndarray, "rows"], values: Float[np.ndarray, "rows"], n_groups: int) -> Float[np.ndarray, "n_groups"]:
    """Sums of ``values`` within each group (document); negative groups (padding) are left out."""
    keep = groups >= 0
    return np.bincount(groups[keep], weights=np.asarray(values, np.float64)[keep], minlength=n_groups)


def _ratio(top: float, bottom: float) -> float | None:
    return float(top / bottom) if bottom != 0 else None


def _resampled_sums(columns: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """[draws, K] sums of [units, K] columns under multinomial weights: what resampling with replacement amounts to."""
    units = len(columns)
    if units * draws <= _CHUNK:  # the many quantities of one run share their weights
        return _weights(units, draws, seed).astype(np.float64) @ columns
    rng, step, out = np.random.default_rng([seed, units]), max(1, _CHUNK // units), []
    for start in range(0, draws, step):
        out.append(_draw(rng, units, min(step, draws - start)).astype(np.float64) @ columns)
    return np.concatenate(out)


@functools.lru_cache(maxsize=16)
def _weights(units: int, draws: int, seed: int) -> np.ndarray:
    return _draw(np.random.default_rng([seed, units]), units, draws).astype(np.uint16)


def _draw(rng: np.random.Generator, units: int, draws: int) -> np.ndarray:
    return rng.multinomial(units, np.full(units, 1.0 / units), size=draws)
