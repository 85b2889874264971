"""Whether a dictionary found the features that a synthetic world is made of, and how many bits a binary one uses for them."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from scipy.optimize import linear_sum_assignment

from dlmscope_jax.dictionaries.entropy import marginal_entropy
from dlmscope_jax.errors import UserError

from .densities import is_binary

VERSION = 1
RECOVERED = 0.9  # the cosine from which a feature counts as found
_BATCH = 4096


def recovery(
    spec: Any,
    params: dict,
    truth: Float[np.ndarray, "F D"],
    rows: Float[np.ndarray, "n D"] | None = None,
    codes: Float[np.ndarray, "n F"] | None = None,
) -> dict:
    """Matches every true feature with one latent and says how well they agree.

    Features and latents are assigned one to one so that the sum of cosines between decoder rows and true directions is largest
    (Hungarian): two features cannot share a latent, nor does a second copy of a latent count. Cosines keep their sign: the
    activations of a sparse dictionary are not negative, so a latent that points the other way is another feature. Only where
    the code has no sign (``Binary``, whose bit may as well say that a feature is absent) or two (TopK that keeps negative
    values) the size of the cosine counts. A latent that is dead on ``rows`` is matched with nothing.

    Args:
      spec, params: a dictionary that acts on raw rows.
      truth: the features' directions, of any length but 0.
      rows, codes: held-out rows and their true coefficients, for what is said about activations.

    Returns:
      A dict for ``json``: ``features`` and ``latents``, their numbers; ``recovered``, the share of features whose cosine is at
      least ``threshold``; ``mean_cosine`` over all features; ``cosine`` and ``latent`` of each (0 and -1 where it has none).
      With rows also ``rows``; ``dead``, the share of latents that never fire (of bits: never change); ``l0`` (of bits: rarer values);
      ``explained_variance``; and how well the matched latent says when its feature is on: ``f1`` and ``correlation`` of each
      feature (None where the feature is on in no row), ``mean_f1`` and ``mean_correlation``.

    Raises:
      UserError: shapes that do not fit, a direction of length 0, rows without codes.
    """
    truth = np.asarray(truth, np.float64)
    if truth.ndim != 2 or truth.shape[1] != spec.out:
        raise UserError(f"recovery: the true directions must be [features, {spec.out}], got {list(truth.shape)}")
    if not (np.linalg.norm(truth, axis=1) > 0).all():
        raise UserError("recovery: a true direction has length 0: leave it out")
    if (rows is None) != (codes is None):
        raise UserError("recovery: rows and codes belong together: give both or neither")
    result: dict[str, Any] = {"kind": "recovery", "version": VERSION, "features": len(truth), "latents": spec.width}
    alive, activations = np.ones(spec.width, bool), None
    if rows is not None:
        rows, codes = np.asarray(rows, np.float32), np.asarray(codes)
        if rows.ndim != 2 or not len(rows) or codes.shape != (len(rows), len(truth)):
            raise UserError(f"recovery: rows {list(rows.shape)} and codes {list(codes.shape)} must be [n, d] and [n, {len(truth)}]")
        activations, error = _activations(spec, params, rows)
        alive = (activations != activations[0]).any(axis=0) if _binary(spec) else (activations != 0).any(axis=0)
        density = (activations != 0).mean(axis=0)
        density = np.minimum(density, 1 - density) if is_binary(spec) else density
        result |= {
            "rows": len(rows),
            "dead": float(1 - alive.mean()),
            "l0": float(density.sum()),
            "explained_variance": _explained(rows, error),
        }
    cosine, latent, sign = match(np.asarray(params["W_dec"]), truth, alive, either_sign=_either_sign(spec))
    result |= {
        "signed": not _either_sign(spec),
        "threshold": RECOVERED,
        "recovered": float((cosine >= RECOVERED).mean()),
        "mean_cosine": float(cosine.mean()),
        "cosine": [round(float(value), 4) for value in cosine],
        "latent": [int(i) for i in latent],
    }
    if activations is not None:
        result |= _detection(activations, codes, latent, sign, _binary(spec))
    return result


def binary_entropy(spec: Any, params: dict, rows: Float[np.ndarray, "n D"]) -> dict:
    """The summed marginal entropy of a binary dictionary's code over all ``rows``, to be held against ``World.bits``.

    The sum is an upper bound of the code's joint entropy: copies of a latent, and latents that complement each other, count as
    often as they occur. So it is the truth only where features were found and copies were not kept.

    Args:
      spec, params: a binary dictionary that acts on raw rows.
      rows: held-out rows.

    Returns:
      A dict for ``json``: ``bits`` and ``plug_in`` (with and without the correction for few rows), ``live`` latents (those that take
      both values), ``latents``, ``rows`` and ``explained_variance``: entropies at unequal reconstruction do not compare.

    Raises:
      UserError: a dictionary of another kind, rows of another width, no rows.
    """
    if not _binary(spec):
        raise UserError(f"binary_entropy: entropy in bits is for binary dictionaries, not for {type(spec).__name__}")
    rows = np.asarray(rows, np.float32)
    if rows.ndim != 2 or not len(rows):
        raise UserError(f"binary_entropy: rows must be [n, {spec.d_in}] with n of at least 1, got {list(rows.shape)}")
    fired, error = np.zeros(spec.width, np.int64), 0.0
    for start in range(0, len(rows), _BATCH):
        batch = rows[start : start + _BATCH]
        activations, y = _run(spec)(params, jnp.asarray(batch))
        fired += np.asarray((activations != 0).sum(axis=0), np.int64)
        error += float(np.square(batch.astype(np.float64) - np.asarray(y)).sum())
    return {
        "kind": "binary_entropy",
        "version": VERSION,
        **marginal_entropy(fired, len(rows)),
        "latents": spec.width,
        "rows": len(rows),
        "explained_variance": _explained(rows, error),
    }


def match(
    weight: Float[np.ndarray, "N D"], truth: Float[np.ndarray, "F D"], alive: np.ndarray | None = None, either_sign: bool = False
) -> tuple[Float[np.ndarray, " F"], Int[np.ndarray, " F"], Float[np.ndarray, " F"]]:
    """``(cosine, latent, sign)`` of every feature under the best one-to-one assignment; 0, -1 and 1 where no latent is left.

    Args:
      weight: decoder rows; those of length 0 agree with nothing.
      truth: true directions.
      alive: [N], the latents that may be matched; None: all.
      either_sign: the size of the cosine counts, and ``sign`` says which way the latent points.
    """
    unit = weight / np.maximum(np.linalg.norm(weight, axis=1, keepdims=True), 1e-30)
    cosines = truth / np.linalg.norm(truth, axis=1, keepdims=True) @ unit.T.astype(np.float64)
    allowed = np.flatnonzero(np.ones(len(weight), bool) if alive is None else alive)
    gain = np.abs(cosines[:, allowed]) if either_sign else cosines[:, allowed]
    features, chosen = linear_sum_assignment(gain, maximize=True)
    cosine, latent, sign = np.zeros(len(truth)), np.full(len(truth), -1), np.ones(len(truth))
    cosine[features], latent[features] = gain[features, chosen], allowed[chosen]
    if either_sign:
        sign[features] = np.where(cosines[features, allowed[chosen]] < 0, -1.0, 1.0)
    return cosine, latent, sign


def _explained(rows: np.ndarray, error: float) -> float | None:
    variation = float(np.square(rows - rows.mean(axis=0, dtype=np.float64)).sum())
    return 1 - error / variation if variation > 0 else None


def _binary(spec: Any) -> bool:
    return spec.KIND == "binary"


def _either_sign(spec: Any) -> bool:
    return _binary(spec) or getattr(spec, "rule", "") in ("raw", "magnitude")


def _activations(spec: Any, params: dict, rows: np.ndarray) -> tuple[np.ndarray, float]:
    """All activations [n, N] of the rows, and the summed squared error of their reconstructions."""
    run, parts, error = _run(spec), [], 0.0
    for start in range(0, len(rows), _BATCH):
        batch = rows[start : start + _BATCH]
        activations, y = run(params, jnp.asarray(batch))
        parts.append(np.asarray(activations))
        error += float(np.square(batch.astype(np.float64) - np.asarray(y)).sum())
    return np.concatenate(parts), error


@functools.cache
def _run(spec: Any) -> Callable[[dict, Array], tuple[Array, Array]]:
    def run(params: dict, x: Array) -> tuple[Array, Array]:
        codes = spec.encode(params, x)
        return spec.dense(codes), spec.decode(params, codes, x=x)

    return jax.jit(run)


def _detection(activations: np.ndarray, codes: np.ndarray, latent: np.ndarray, sign: np.ndarray, binary: bool) -> dict:
    """F1 and correlation of each matched latent with its feature; an unmatched feature has 0 in both."""
    found = latent >= 0
    values = np.where(found, activations[:, latent].astype(np.float64), 0.0)
    # a bit whose direction is reversed says where its feature is absent
    values = np.where(sign > 0, values, 1.0 - values if binary else -values)
    on, fires = codes > 0, values > 0
    both, either = (on & fires).sum(axis=0), on.sum(axis=0) + fires.sum(axis=0)
    f1 = 2 * both / np.maximum(1, either)
    centred, truth = values - values.mean(axis=0), codes - codes.mean(axis=0, dtype=np.float64)
    spread = np.sqrt(np.square(centred).sum(axis=0) * np.square(truth).sum(axis=0))
    correlation = (centred * truth).sum(axis=0) / np.where(spread > 0, spread, 1.0)
    seen = np.asarray(on.any(axis=0))

    def listed(values: np.ndarray) -> list[float | None]:
        return [round(float(value), 4) if seen[i] else None for i, value in enumerate(values)]

    def mean(values: np.ndarray) -> float | None:
        return float(values[seen].mean()) if seen.any() else None

    return {"f1": listed(f1), "correlation": listed(correlation), "mean_f1": mean(f1), "mean_correlation": mean(correlation)}
