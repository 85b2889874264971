"""Synthetic worlds: their laws are those that they state, and rows are a function of (seed, row number)."""

import math
from collections import Counter

import numpy as np
import pytest

from dlmscope_jax.data.worlds import KINDS, World
from dlmscope_jax.errors import UserError

N = 40_000
SPARSE = ("independent", "correlated", "hierarchical")


@pytest.fixture(scope="module")
def on() -> dict[str, np.ndarray]:
    return {kind: World(kind).rows(0, 0, N)[1] != 0 for kind in SPARSE}


@pytest.mark.parametrize("kind", SPARSE)
def test_rates_are_those_stated(on, kind):
    world = World(kind)
    assert world.rates.sum() == pytest.approx(4.0)
    # each within five standard errors, and together unbiased
    errors = np.sqrt(world.rates * (1 - world.rates) / N)
    deviations = (on[kind].mean(axis=0) - world.rates) / errors
    assert np.abs(deviations).max() < 5 and 0.8 < np.square(deviations).mean() < 1.25
    assert on[kind].sum(axis=1).mean() == pytest.approx(4.0, abs=0.08)


def test_magnitudes_are_uniform():
    codes = World("independent").rows(1, 0, N)[1]
    values = codes[codes != 0]
    assert values.min() >= 0.5 and values.max() <= 1.5
    assert values.mean() == pytest.approx(1.0, abs=0.005) and values.var() == pytest.approx(1 / 12, abs=0.002)


def test_independent_features_are_independent(on):
    assert np.abs(_correlations(on["independent"])).max() < 6 / math.sqrt(N)


@pytest.mark.parametrize("rho", [0.0, 0.8])
def test_features_of_a_group_fire_together(rho):
    """As often as the two normals of the copula do, by quadrature over what they share; across groups as by chance."""
    world = World("correlated", features=64, l0=4.0, rho=rho)
    found = _correlations(world.rows(3, 0, N)[1] != 0)
    group = np.arange(64) // 4
    same = group[:, None] == group
    p, cut = 4 / 64, 1.5341205443525459  # the normal's quantile of 1 - p
    shared = np.linspace(-8, 8, 4001)
    density = np.exp(-(shared**2) / 2) / math.sqrt(2 * math.pi)
    given = np.array([0.5 * math.erfc((cut - math.sqrt(rho) * z) / math.sqrt(1 - rho) / math.sqrt(2)) for z in shared])
    together = float((density * given**2).sum() * (shared[1] - shared[0]))
    expected = (together - p * p) / (p * (1 - p))
    pairs = same & ~np.eye(64, dtype=bool)
    assert found[pairs].mean() == pytest.approx(expected, abs=0.01) and (expected > 0.4) == (rho == 0.8)
    assert abs(found[~same].mean()) < 0.002 and np.abs(found[~same]).max() < 0.04


def test_a_child_fires_only_with_its_parent(on):
    world, fires = World("hierarchical"), on["hierarchical"]
    child = np.flatnonzero(world.parents >= 0)
    assert len(child) == 192 and set(world.parents[child]) == set(range(0, 256, 4))
    parent = world.parents[child]
    assert not (fires[:, child] & ~fires[:, parent]).any()
    given = (fires[:, child] & fires[:, parent]).sum() / fires[:, parent].sum()
    assert given == pytest.approx(0.3, abs=0.01)
    alone = fires[:, ::4] & ~fires.reshape(N, 64, 4)[:, :, 1:].any(axis=2)
    assert alone.sum() / fires[:, ::4].sum() == pytest.approx(0.7**3, abs=0.01)


@pytest.mark.parametrize("kind", ["independent", "correlated", "directions"])
def test_other_features_have_no_parent(kind):
    assert (World(kind).parents == -1).all()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_directions_are_unit_and_far_apart(seed):
    found = World("independent").directions(seed)
    assert found.shape == (256, 64) and found.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1.0, atol=1e-6)
    cosines = np.abs(found @ found.T)[~np.eye(256, dtype=bool)]
    assert cosines.max() < 0.5
    # and otherwise random: nothing was made orthogonal
    assert np.square(cosines).mean() == pytest.approx(1 / 64, rel=0.05)


def test_the_bound_on_coherence_binds():
    """Drawn without it, these directions come closer than it allows."""
    free, bound = (World("independent", features=200, dimension=32, coherence=c).directions(0) for c in (1.0, 0.6))
    largest = [np.abs(d @ d.T)[~np.eye(200, dtype=bool)].max() for d in (free, bound)]
    assert largest[0] > 0.6 > largest[1]


def test_directions_that_do_not_fit():
    with pytest.raises(UserError, match=r"direction 4 of 6 in 2 dimensions with every \|cosine\| below 0.8"):
        World("independent", dimension=2, features=6, l0=1, coherence=0.8).directions(1)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_a_function_of_seed_and_number(kind):
    world = World(kind, noise=0.1)
    rows, codes = world.rows(5, 0, 2100)
    assert rows.shape == (2100, 64) and codes.shape == (2100, 256) and rows.dtype == codes.dtype == np.float32
    for start, count in ((0, 7), (1020, 10), (1024, 1024), (2090, 10), (1500, 1)):
        part, part_codes = world.rows(5, start, count)
        np.testing.assert_array_equal(part, rows[start : start + count])
        np.testing.assert_array_equal(part_codes, codes[start : start + count])
    assert not np.array_equal(world.rows(6, 0, 10)[1], codes[:10])
    assert len(np.unique(rows, axis=0)) == 2100  # no row comes back


def test_no_rows():
    assert [part.shape for part in World("independent").rows(0, 5, 0)] == [(0, 64), (0, 256)]
    with pytest.raises(UserError, match="start = -1"):
        World("independent").rows(0, -1, 5)


def test_rows_are_sums_of_directions():
    world = World("correlated")
    rows, codes = world.rows(2, 100, 50)
    np.testing.assert_allclose(rows, codes.astype(np.float64) @ world.directions(2), atol=1e-5)


def test_noise_is_added_to_every_entry():
    quiet, noisy = (World("independent", noise=noise).rows(0, 0, 4000) for noise in (0.0, 0.25))
    np.testing.assert_array_equal(quiet[1], noisy[1])
    error = noisy[0] - quiet[0]
    assert error.std() == pytest.approx(0.25, rel=0.01) and abs(error.mean()) < 0.003
    assert np.abs(np.corrcoef(error[:, :8].T) - np.eye(8)).max() < 0.08


@pytest.mark.parametrize("q, signed", [(0.5, False), (0.5, True), (0.2, False)])
def test_entropy_of_directions_by_counting(q, signed):
    """The joint entropy of all patterns that occur, not a sum over coefficients: it is r bits only if they are independent."""
    world = World("directions", dimension=16, features=4, q=q, signed=signed)
    codes = world.rows(0, 0, N)[1]
    assert set(np.unique(codes)) == ({-1.0, 1.0} if signed else {0.0, 1.0})
    counts = np.array(list(Counter(map(bytes, codes)).values())) / N
    assert -(counts * np.log2(counts)).sum() == pytest.approx(world.bits, abs=0.01)
    assert world.bits == pytest.approx(4.0 if q == 0.5 else 4 * 0.7219280948873623)


def test_bits_of_another_kind():
    with pytest.raises(UserError, match="directions"):
        World("independent").bits  # noqa: B018


@pytest.mark.parametrize(
    "change, message",
    [
        ({"kind": "sparse"}, "independent, correlated, hierarchical or directions"),
        ({"features": 0}, "features = 0"),
        ({"dimension": 2.5}, "dimension = 2.5"),
        ({"group": True}, "group = True"),
        ({"l0": 0.0}, "l0 = 0.0 must be between 0 and the 256 features"),
        ({"l0": 256}, "l0 = 256"),
        ({"coherence": 0.0}, "coherence"),
        ({"noise": -1.0}, "noise"),
        ({"rho": 1.0}, "rho"),
        ({"child": 0.0}, "child"),
        ({"q": 1.0}, "q = 1.0"),
        ({"kind": "correlated", "group": 5}, "group = 5 must divide the 256 features"),
        ({"kind": "hierarchical", "l0": 200.0}, "l0 = 200 needs parents"),
        ({"noise": float("nan")}, "noise"),
    ],
)
def test_mistakes_are_named(change, message):
    with pytest.raises(UserError, match=message) as caught:
        World(**({"kind": "independent"} | change))
    assert "\n" not in str(caught.value)


def test_directions_do_not_mind_l0():
    assert World("directions", features=2).rows(0, 0, 5)[0].shape == (5, 64)


def _correlations(on: np.ndarray) -> np.ndarray:
    found = np.corrcoef(on.T)
    np.fill_diagonal(found, 0.0)
    return found
