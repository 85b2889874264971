"""Synthetic activations whose features are known: sums of fixed directions, switched on and off by a stated law.

    x = sum_i c_i w_i + noise,   |w_i| = 1

A dictionary is good where it finds the w_i again. Rows are a pure function of (seed, row number), so a test side is simply a range
of rows that no training reads.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from dlmscope_jax.errors import UserError

Kind = Literal["independent", "correlated", "hierarchical", "directions"]
KINDS = ("independent", "correlated", "hierarchical", "directions")

_BLOCK = 1024  # rows that are drawn at once; part of what a seed means
_TRIES = 1000
_LOW, _HIGH = 0.5, 1.5  # magnitudes are uniform between them


@dataclass(frozen=True)
class World:
    """A law of rows with known features.

    Attributes:
      kind: which features are on together.
        ``"independent"``: each with probability ``l0 / features``, alone.
        ``"correlated"``: the same rates, but groups of ``group`` features fire together: feature i is on where a standard normal
          ``sqrt(rho) g_group + sqrt(1 - rho) e_i`` is among its largest values (a Gaussian copula).
        ``"hierarchical"``: the first of every ``group`` features is a parent, the others are its children. A child is on only
          where its parent is, then with probability ``child``; with the defaults a parent is alone in a third of its rows.
        ``"directions"``: every coefficient is 1 with probability ``q`` and otherwise 0, or -1 where ``signed``: the binary
          autoencoder's benchmark, whose entropy is ``features * h(q)`` bits. ``l0`` says nothing there.
      dimension: width of a row, d.
      features: number of features, F.
      l0: mean number of features that are on in a row. Magnitudes are uniform in [0.5, 1.5].
      coherence: no two directions have a cosine of this size or more.
      noise: standard deviation of Gaussian noise on each entry.
      group: features of a group, or of a parent with its children.
      rho: correlation of the normals within a group.
      child: probability of a child where its parent is on.
      q: probability of a 1.
      signed: the other value is -1.

    Raises:
      UserError: a kind that is not known, or a number outside of its range.
    """

    kind: Kind
    dimension: int = 64
    features: int = 256
    l0: float = 4.0
    coherence: float = 0.5
    noise: float = 0.0
    group: int = 4
    rho: float = 0.8
    child: float = 0.3
    q: float = 0.5
    signed: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"World: kind {self.kind!r} is not known: {', '.join(KINDS[:-1])} or {KINDS[-1]}")
        for name in ("dimension", "features", "group"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"World: {name} = {value!r} must be a positive integer")
        ranges = {
            "l0": 0 < self.l0 < self.features, "coherence": 0 < self.coherence <= 1, "noise": 0 <= self.noise < math.inf,
            "rho": 0 <= self.rho < 1, "child": 0 < self.child <= 1, "q": 0 < self.q < 1,
        }  # fmt: skip
        where = {"l0": f"between 0 and the {self.features} features", "noise": "0 or above", "coherence": "in (0, 1]", "child": "in (0, 1]"}
        for name, holds in ranges.items():
            if not holds and not (name == "l0" and self.kind == "directions"):
                raise UserError(f"World: {name} = {getattr(self, name)!r} must be {where.get(name, 'between 0 and 1')}")
        if self.kind in ("correlated", "hierarchical") and self.features % self.group:
            raise UserError(f"World: group = {self.group} must divide the {self.features} features")
        if self.kind == "hierarchical" and max(self.rates) > 1:
            raise UserError(f"World: l0 = {self.l0:g} needs parents that fire in more than every row: lower l0, or more features")

    @property
    def parents(self) -> Int[np.ndarray, " F"]:
        """The parent of each feature, -1 where it has none."""
        index = np.arange(self.features)
        if self.kind != "hierarchical":
            return np.full(self.features, -1)
        return np.where(index % self.group == 0, -1, index - index % self.group)

    @property
    def rates(self) -> Float[np.ndarray, " F"]:
        """In what share of the rows each feature is on (``"directions"``: is 1)."""
        if self.kind == "directions":
            return np.full(self.features, self.q)
        if self.kind != "hierarchical":
            return np.full(self.features, self.l0 / self.features)
        families, children = self.features // self.group, self.group - 1
        parent = self.l0 / (families * (1 + children * self.child))
        return np.where(self.parents < 0, parent, parent * self.child)

    @property
    def bits(self) -> float:
        """Entropy of a row's coefficients in bits, for ``"directions"``.

        Raises:
          UserError: another kind, whose magnitudes are continuous.
        """
        if self.kind != "directions":
            raise UserError(f"World: bits belong to the kind directions, whose coefficients are binary; this is {self.kind}")
        return self.features * -(self.q * math.log2(self.q) + (1 - self.q) * math.log2(1 - self.q))

    def directions(self, seed: int = 0) -> Float[np.ndarray, "F D"]:
        """The features' unit directions, float32: uniform on the sphere, drawn one after another, again where too close to an earlier one.

        Raises:
          UserError: so many directions with so little coherence do not fit.
        """
        rng, found = np.random.default_rng([seed, 1]), np.zeros((self.features, self.dimension))
        for i in range(self.features):
            for _ in range(_TRIES):
                row = rng.standard_normal(self.dimension)
                found[i] = row / np.linalg.norm(row)
                if i == 0 or np.abs(found[:i] @ found[i]).max() < self.coherence:
                    break
            else:
                raise UserError(
                    f"World: found no place for direction {i} of {self.features} in {self.dimension} dimensions with every "
                    f"|cosine| below {self.coherence:g}: raise coherence or dimension"
                )
        return found.astype(np.float32)

    def rows(self, seed: int = 0, start: int = 0, count: int = _BLOCK) -> tuple[Float[np.ndarray, "n D"], Float[np.ndarray, "n F"]]:
        """Rows ``start .. start + count`` and their coefficients, float32.

        However a range is cut into calls, its rows are the same.

        Raises:
          UserError: a negative range.
        """
        if start < 0 or count < 0:
            raise UserError(f"World.rows: start = {start} and count = {count} must be 0 or above")
        if count == 0:
            return np.zeros((0, self.dimension), np.float32), np.zeros((0, self.features), np.float32)
        directions = self.directions(seed)
        first, last = start // _BLOCK, (start + count - 1) // _BLOCK
        blocks = [self._block(seed, block, directions) for block in range(first, last + 1)]
        cut = slice(start - first * _BLOCK, start - first * _BLOCK + count)
        rows, codes = zip(*blocks, strict=True)
        return np.concatenate(rows)[cut], np.concatenate(codes)[cut]

    def _block(self, seed: int, block: int, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng([seed, 2, block])
        on = self._on(rng)
        if self.kind == "directions":
            codes = np.where(on, 1.0, -1.0 if self.signed else 0.0).astype(np.float32)
        else:
            codes = np.zeros(on.shape, np.float32)
            codes[on] = rng.uniform(_LOW, _HIGH, int(on.sum()))
        rows = codes @ directions
        if self.noise:
            rows += rng.normal(0.0, self.noise, rows.shape).astype(np.float32)
        return rows, codes

    def _on(self, rng: np.random.Generator) -> np.ndarray:
        """Which features are on in each row of a block."""
        shape, rates = (_BLOCK, self.features), self.rates
        if self.kind == "correlated":
            shared = rng.standard_normal((_BLOCK, self.features // self.group), np.float32).repeat(self.group, axis=1)
            own = rng.standard_normal(shape, np.float32)
            return math.sqrt(self.rho) * shared + math.sqrt(1 - self.rho) * own > NormalDist().inv_cdf(1 - rates[0])
        uniform = rng.random(shape, np.float32)
        if self.kind != "hierarchical":
            return uniform < rates
        parents = self.parents
        root = parents < 0
        on = uniform < np.where(root, rates, self.child)
        return on & (root | on[:, np.where(root, 0, parents)])
