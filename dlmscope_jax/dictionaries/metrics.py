"""Fidelity of a dictionary over a stream of rows: one pass, fixed memory, sums that stay exact over millions of rows.

Definitions are METHODS.md, "Dictionaries". Explained variance over the evaluated rows E is

    1 - sum |y - y_hat|^2 / (sum |y|^2 - |sum y|^2 / n),

computed from sums about a fixed shift (a centre of the first batch), because activations have means and single
dimensions far larger than their spread and the textbook difference would cancel. Sums over batches are carried as
pairs of float32 (value and rounding error, Knuth's two-sum), about 48 bits, so that the whole state stays on the device
and inside ``jit``; the few final divisions happen in float64 on the host.

The variant "without position 0 and without rows above 10 times the median norm" needs a median that is only known at
the end. Rows are therefore summed by their norm in logarithmic bins of 7.5 %, and whole bins are left out when the
results are read: the limit is exact to one bin, and ``norm_limit`` says where it fell.

Of one-bit codes (``Bits``) a latent's *rarer* value counts as its firing, because a bit that is always 1 says no more than
one that is always 0: with p_j the share of ones, L0 is ``sum_j min(p_j, 1 - p_j)``, and "dead" is a bit that never changes.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from dlmscope_jax.errors import UserError

from .codes import Bits, Codes
from .entropy import marginal_entropy

_RATE_EDGES = tuple(round(0.1 * i, 1) for i in range(11))
_NORM_LOG10, _NORM_PER_DECADE = (-4.0, 8.0), 32
_ERROR_LOG10, _ERROR_PER_DECADE = (-4.0, 2.0), 128
_OUTLIER = 10.0


@struct.dataclass
class Sum:
    """A running float32 sum with its rounding error kept beside it; elementwise over arrays."""

    high: Array
    low: Array

    @classmethod
    def zeros(cls, *shape: int) -> "Sum":
        return cls(jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.float32))

    def add(self, value: Array) -> "Sum":
        """Two-sum gives the exact error of the addition; it joins what is carried, and the pair is made disjoint again."""
        total = self.high + value
        part = total - self.high
        low = self.low + ((self.high - (total - part)) + (value - part))
        high = total + low
        return Sum(high, low - (high - total))

    def float64(self) -> np.ndarray:
        return np.asarray(self.high, np.float64) + np.asarray(self.low, np.float64)


@struct.dataclass
class _Moments:
    """Sums that explained variance needs, for G groups of rows: counts, squared errors, first and second moments about a shift."""

    rows: Int[Array, " G"]
    error: Sum
    square: Sum
    first: Sum

    @classmethod
    def zeros(cls, groups: int, width: int) -> "_Moments":
        return cls(jnp.zeros(groups, jnp.int32), Sum.zeros(groups), Sum.zeros(groups), Sum.zeros(groups, width))

    def add(self, group: Array, counted: Array, error: Array, square: Array, centred: Array) -> "_Moments":
        def by_group(value):
            shape = (self.rows.shape[0], *value.shape[1:])
            return jnp.zeros(shape, value.dtype).at[group].add(value)

        return _Moments(
            self.rows + by_group(counted.astype(jnp.int32)),
            self.error.add(by_group(error)),
            self.square.add(by_group(square)),
            self.first.add(by_group(centred)),
        )

    def host(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        return np.asarray(self.rows, np.int64), self.error.float64(), self.square.float64(), self.first.float64()


@struct.dataclass
class StreamingFidelity:
    """Running fidelity of one dictionary; ``init`` -> ``update`` per batch -> ``finish``.

    A pytree: ``update`` is pure and can run inside ``jit`` or ``lax.scan``.
    """

    shift: Float[Array, " D"]
    rows: Int[Array, ""]
    by_rate: _Moments
    by_norm: _Moments
    active: Sum
    cosine: Sum
    relative_error: Int[Array, "R E"]
    fired: Int[Array, " N"]
    binary: Bool[Array, ""]  # whether the codes are bits
    rate_edges: tuple[float, ...] = struct.field(pytree_node=False, default=_RATE_EDGES)

    @classmethod
    def init(cls, width: int, d_out: int, rate_edges: tuple[float, ...] = _RATE_EDGES) -> "StreamingFidelity":
        """Empty sums.

        Args:
          width: number of latents, N; 0 for reconstructions without codes (controls), whose L0 and shares are then None.
          d_out: width of the rows that are reconstructed.
          rate_edges: ascending edges of the corruption-rate bins [e_i, e_{i+1}), the last one closed.

        Raises:
          UserError: edges that do not ascend.
        """
        if len(rate_edges) < 2 or any(b <= a for a, b in zip(rate_edges, rate_edges[1:], strict=False)):
            raise UserError(f"rate_edges {rate_edges} must be at least two ascending numbers")
        groups = len(rate_edges)  # one more than bins: rows without a rate, or outside of all bins
        return cls(
            shift=jnp.zeros(d_out, jnp.float32),
            rows=jnp.int32(0),
            by_rate=_Moments.zeros(groups, d_out),
            by_norm=_Moments.zeros(_bins(_NORM_LOG10, _NORM_PER_DECADE), d_out),
            active=Sum.zeros(),
            cosine=Sum.zeros(),
            relative_error=jnp.zeros((groups, _bins(_ERROR_LOG10, _ERROR_PER_DECADE)), jnp.int32),
            fired=jnp.zeros(width, jnp.int32),
            binary=jnp.asarray(False),
            rate_edges=tuple(rate_edges),
        )

    def update(
        self,
        spec: Any,
        params: dict,
        x: Float[Array, "B D"],
        target: Float[Array, "B D_out"] | None = None,
        rate: Float[Array, " B"] | None = None,
        position: Int[Array, " B"] | None = None,
        valid: Bool[Array, " B"] | None = None,
    ) -> "StreamingFidelity":
        """Encodes and decodes one batch and adds it; compiled once for each spec and shape.

        Args:
          spec, params: a dictionary.
          x: raw rows.
          target: what it should produce; None: ``x``.
          rate: the rows' corruption rate; None: not binned.
          position: the rows' positions; position 0 is left out of the filtered variant. None: none is position 0.
          valid: False for rows that only pad the batch.

        Raises:
          UserError: shapes that do not fit.
        """
        return _update(self, spec, params, x, target, rate, position, valid)

    def add(
        self,
        target: Float[Array, "B D_out"],
        output: Float[Array, "B D_out"],
        codes: Codes | None = None,
        rate: Float[Array, " B"] | None = None,
        position: Int[Array, " B"] | None = None,
        valid: Bool[Array, " B"] | None = None,
    ) -> "StreamingFidelity":
        """Adds reconstructions made elsewhere (controls have no ``codes``); other arguments as for ``update``."""
        y, y_hat = target.astype(jnp.float32), output.astype(jnp.float32)
        if y.ndim != 2 or y.shape != y_hat.shape or y.shape[1] != self.shift.shape[0]:
            raise UserError(f"fidelity: rows must be [rows, {self.shift.shape[0]}], got {list(y.shape)} and {list(y_hat.shape)}")
        n = y.shape[0]
        valid = jnp.ones(n, bool) if valid is None else valid
        keep = valid.astype(jnp.float32)
        count = valid.sum(dtype=jnp.int32)
        # padding may hold anything, NaN included, so it is replaced and not multiplied away
        y, y_hat = jnp.where(valid[:, None], y, 0.0), jnp.where(valid[:, None], y_hat, 0.0)
        norm, norm_hat = jnp.linalg.norm(y, axis=1), jnp.linalg.norm(y_hat, axis=1)
        shift = jnp.where(self.rows == 0, _centre(y, norm, keep), self.shift)
        centred = (y - shift) * keep[:, None]
        error = jnp.square(y - y_hat).sum(axis=1)
        square = jnp.square(centred).sum(axis=1)
        rate_group = self._rate_group(n, rate)
        inner = valid if position is None else valid & (position != 0)
        inside = inner.astype(jnp.float32)
        relative = jnp.sqrt(error) / jnp.maximum(norm, 1e-30)
        product = norm * norm_hat
        cosine = jnp.where(product > 0, (y * y_hat).sum(axis=1) / jnp.where(product > 0, product, 1.0), 0.0)
        active, fired = _activity(codes, valid, self.fired.shape[0])
        return dataclasses.replace(
            self,
            shift=shift,
            rows=self.rows + count,
            by_rate=self.by_rate.add(rate_group, valid, error, square, centred),
            by_norm=self.by_norm.add(
                _log_bin(norm, _NORM_LOG10, _NORM_PER_DECADE), inner, error * inside, square * inside, centred * inside[:, None]
            ),
            active=self.active.add(active),
            cosine=self.cosine.add((cosine * keep).sum()),
            relative_error=self.relative_error.at[rate_group, _log_bin(relative, _ERROR_LOG10, _ERROR_PER_DECADE)].add(
                valid.astype(jnp.int32)
            ),
            fired=self.fired + fired,
            binary=self.binary | isinstance(codes, Bits),
        )

    def _rate_group(self, n: int, rate: Array | None) -> Array:
        bins = len(self.rate_edges) - 1
        if rate is None:
            return jnp.full(n, bins, jnp.int32)
        rate, edges = rate.astype(jnp.float32), jnp.asarray(self.rate_edges, jnp.float32)
        group = jnp.searchsorted(edges, rate, side="right").astype(jnp.int32) - 1
        group = jnp.where(rate == edges[-1], bins - 1, group)
        return jnp.where((group >= 0) & (group < bins), group, bins)

    def density(self) -> np.ndarray:
        """[N] float64: the share of rows on which each latent fired; of bits, on which it had its rarer value."""
        fired, rows = np.asarray(self.fired, np.int64), int(self.rows)
        return (np.minimum(fired, rows - fired) if self.binary else fired) / max(rows, 1)

    def finish(self) -> dict[str, Any]:
        """The results, as plain numbers (JSON-ready); an empty variant has None.

        Keys: ``rows``; ``l0``; ``explained_variance``; ``cosine``; ``relative_error`` {q25, median, q75};
        ``filtered`` {rows, explained_variance, norm_median, norm_limit}; ``dead`` (count), ``dead_share``,
        ``dense_share_1pct``, ``dense_share_10pct``, all three over ``rows`` rows; ``by_rate``: a list, one entry for each
        bin with rows, {low, high, rows, explained_variance (own mean), explained_variance_global_mean, relative_error}; for
        one-bit codes also ``marginal_entropy`` {bits, plug_in, live}, see ``entropy.marginal_entropy``.
        """
        rows, error, square, first = self.by_rate.host()
        n, density = int(self.rows), self.density()
        counted = bool(n and density.size)
        mean = first.sum(axis=0) / max(n, 1)
        histogram = np.asarray(self.relative_error, np.int64)
        by_rate = []
        for i, (low, high) in enumerate(zip(self.rate_edges[:-1], self.rate_edges[1:], strict=True)):
            if rows[i]:
                about_global = square[i] - 2 * mean @ first[i] + rows[i] * mean @ mean
                by_rate.append(
                    {
                        "low": low,
                        "high": high,
                        "rows": int(rows[i]),
                        "explained_variance": _explained(rows[i], error[i], square[i], first[i]),
                        "explained_variance_global_mean": float(1 - error[i] / about_global) if about_global > 0 else None,
                        "relative_error": _quartiles(histogram[i]),
                    }
                )
        bits = counted and bool(self.binary)
        l0 = density.sum() if bits else self.active.float64() / max(n, 1)
        return {
            "rows": n,
            "l0": float(l0) if counted else None,
            "explained_variance": _explained(n, error.sum(), square.sum(), first.sum(axis=0)),
            "cosine": float(self.cosine.float64()) / n if n else None,
            "relative_error": _quartiles(histogram.sum(axis=0)),
            "filtered": self._filtered(),
            "dead": int((density == 0).sum()) if counted else None,
            "dead_share": float((density == 0).mean()) if counted else None,
            "dense_share_1pct": float((density > 0.01).mean()) if counted else None,
            "dense_share_10pct": float((density > 0.10).mean()) if counted else None,
            "by_rate": by_rate,
            **({"marginal_entropy": marginal_entropy(np.asarray(self.fired), n)} if bits else {}),
        }

    def _filtered(self) -> dict[str, Any]:
        rows, error, square, first = self.by_norm.host()
        edges = 10.0 ** np.linspace(*_NORM_LOG10, len(rows) + 1)
        median = _quantile(rows, edges, 0.5)
        if median is None:
            return {"rows": 0, "explained_variance": None, "norm_median": None, "norm_limit": None}
        kept = edges[:-1] < _OUTLIER * median
        return {
            "rows": int(rows[kept].sum()),
            "explained_variance": _explained(rows[kept].sum(), error[kept].sum(), square[kept].sum(), first[kept].sum(axis=0)),
            "norm_median": median,
            "norm_limit": float(edges[1:][kept][-1]),
        }


@partial(jax.jit, static_argnames="spec")
def _update(state: StreamingFidelity, spec, params, x, target, rate, position, valid) -> StreamingFidelity:
    codes = spec.encode(params, x)
    output = spec.decode(params, codes, x=x)
    return state.add(x if target is None else target, output, codes, rate, position, valid)


def _centre(y: Array, norm: Array, keep: Array) -> Array:
    """A mean in which rows of outlying norm weigh little: near it, the usual rows' sums lose no digits to a few huge ones."""
    scale = (norm * keep).sum() / jnp.maximum(keep.sum(), 1.0)
    weight = keep / jnp.maximum(norm + scale, 1e-30)
    return weight @ y / jnp.maximum(weight.sum(), 1e-30)


def _bins(log10: tuple[float, float], per_decade: int) -> int:
    return round((log10[1] - log10[0]) * per_decade)


def _log_bin(value: Array, log10: tuple[float, float], per_decade: int) -> Array:
    place = jnp.floor((jnp.log10(jnp.maximum(value, 1e-30)) - log10[0]) * per_decade)
    return jnp.clip(jnp.nan_to_num(place), 0, _bins(log10, per_decade) - 1).astype(jnp.int32)


def _activity(codes: Codes | None, valid: Array, width: int) -> tuple[Array, Array]:
    """Summed number of active latents over the batch (float32) and rows in which each latent fired [N]."""
    if codes is None:
        return jnp.float32(0), jnp.zeros(width, jnp.int32)
    active = jnp.where(valid, codes.count(), 0)
    return active.sum().astype(jnp.float32), codes.fired(width, valid)


def _explained(n, error, square, first) -> float | None:
    variance = square - first @ first / max(n, 1)
    return float(1 - error / variance) if n and variance > 0 else None


def _quantile(counts: np.ndarray, edges: np.ndarray, q: float) -> float | None:
    """Quantile of a histogram, interpolated in the logarithm inside its bin."""
    total = counts.sum()
    if not total:
        return None
    cumulative = np.cumsum(counts)
    i = int(np.searchsorted(cumulative, q * total))
    inside = (q * total - (cumulative[i] - counts[i])) / counts[i]
    return float(edges[i] * (edges[i + 1] / edges[i]) ** inside)


def _quartiles(counts: np.ndarray) -> dict[str, float | None]:
    edges = 10.0 ** np.linspace(*_ERROR_LOG10, len(counts) + 1)
    return {name: _quantile(counts, edges, q) for name, q in (("q25", 0.25), ("median", 0.5), ("q75", 0.75))}
