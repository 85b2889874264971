"""Recovery: one latent for each feature, and how well it detects it."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from dlmscope_jax.analysis.recovery import binary_entropy, match, recovery
from dlmscope_jax.data.worlds import World
from dlmscope_jax.dictionaries import TopK
from dlmscope_jax.dictionaries.binary import Binary
from dlmscope_jax.dictionaries.relu import ReLU
from dlmscope_jax.errors import UserError

# few features in many dimensions: W_enc = truth detects them almost exactly
WORLD = World("independent", dimension=256, features=32, l0=2.0, coherence=0.3)
TRUTH = WORLD.directions(0)


def parameters(weight: np.ndarray, bias: float = 0.0) -> dict:
    n, d = weight.shape
    zero = jnp.zeros
    return {"W_enc": jnp.asarray(weight), "W_dec": jnp.asarray(weight), "b_enc": zero(n) + bias, "b_dec": zero(d)}


def relu(weight: np.ndarray, bias: float = -0.4) -> tuple[ReLU, dict]:
    """A dictionary with these decoder rows that fires above 0.4."""
    return ReLU(weight.shape[1], len(weight)), parameters(weight, bias)


def test_the_exact_truth_scores_one():
    result = recovery(*relu(TRUTH), TRUTH, *WORLD.rows(0, 0, 3000))
    assert result["recovered"] == 1.0 and result["mean_cosine"] == pytest.approx(1.0, abs=1e-6)
    assert result["latent"] == list(range(32)) and result["dead"] == 0.0
    assert result["mean_f1"] > 0.97 and result["mean_correlation"] > 0.95
    assert result["l0"] == pytest.approx(2.0, abs=0.2)
    assert (result["kind"], result["version"], result["features"], result["latents"], result["rows"]) == ("recovery", 1, 32, 32, 3000)
    assert json.loads(json.dumps(result)) == result


def test_order_and_length_of_rows_do_not_matter():
    rng = np.random.default_rng(0)
    order = rng.permutation(32)
    weight = (TRUTH * rng.uniform(0.1, 9.0, (32, 1)).astype(np.float32))[order]
    result = recovery(*relu(weight), 3.0 * TRUTH)
    assert result["recovered"] == 1.0 and result["mean_cosine"] == pytest.approx(1.0, abs=1e-6)
    assert [order[i] for i in result["latent"]] == list(range(32))


def test_a_latent_that_points_the_other_way_is_another_feature():
    result = recovery(*relu(-TRUTH), TRUTH)
    assert result["signed"] and result["recovered"] == 0.0 and result["mean_cosine"] < 0.3


@pytest.mark.parametrize("spec", [Binary(256, 32), TopK(256, 32, 2, rule="raw"), TopK(256, 32, 2, rule="magnitude")])
def test_a_code_without_sign_may_point_either_way(spec):
    sign = np.where(np.arange(32) % 2, -1.0, 1.0).astype(np.float32)[:, None]
    result = recovery(spec, parameters(TRUTH * sign), TRUTH)
    assert not result["signed"] and result["recovered"] == 1.0 and result["mean_cosine"] == pytest.approx(1.0, abs=1e-6)


def test_signed_codes_detect_with_their_sign():
    """Latents reversed in W_enc and W_dec: their activations are negative where the feature is on."""
    spec = TopK(256, 32, 4, rule="magnitude")
    rows, codes = WORLD.rows(0, 0, 2000)
    results = [recovery(spec, parameters(sign * TRUTH), TRUTH, rows, codes) for sign in (1, -1)]
    assert results[1]["mean_correlation"] == pytest.approx(results[0]["mean_correlation"], abs=1e-3)
    assert results[1]["mean_correlation"] > 0.8
    assert results[0]["f1"] == pytest.approx(results[1]["f1"], abs=0.02)


def test_a_reversed_bit_says_where_its_feature_is_absent():
    spec = Binary(256, 32)
    rows, codes = WORLD.rows(0, 0, 2000)
    on, off = parameters(TRUTH, -0.4), parameters(-TRUTH, 0.4)
    results = [recovery(spec, params, TRUTH, rows, codes) for params in (on, off)]
    assert results[0]["mean_f1"] > 0.95 and results[1]["mean_f1"] == pytest.approx(results[0]["mean_f1"], abs=0.01)
    assert results[1]["mean_correlation"] == pytest.approx(results[0]["mean_correlation"], abs=0.01)


def test_copies_of_a_latent_count_once():
    """Half of the features, each twice: as many latents as features, but only half are found."""
    result = recovery(*relu(np.concatenate([TRUTH[:16], TRUTH[:16]])), TRUTH)
    assert result["recovered"] == 0.5
    assert len(set(result["latent"])) == 32


def test_one_latent_cannot_match_two_features():
    """A row between two features agrees with both, and counts for one of them."""
    between = (TRUTH[0] + TRUTH[1]) / np.linalg.norm(TRUTH[0] + TRUTH[1])
    twins = np.stack([between + 0.01 * TRUTH[0], between + 0.01 * TRUTH[1]])
    result = recovery(*relu(between[None]), twins)
    assert result["recovered"] == 0.5 and sorted(result["latent"]) == [-1, 0] and sorted(result["cosine"])[0] == 0.0
    assert result["mean_cosine"] == pytest.approx(0.5, abs=1e-3)


def test_the_assignment_is_the_best_one_and_not_a_greedy_one():
    """Greedy takes 0.95 first and leaves 0.1; the best sum is 0.9 + 0.9."""
    truth = np.eye(2)
    weight = np.array([[0.95, 0.9], [0.9, 0.1]])
    cosine, latent, _ = match(weight / np.linalg.norm(weight, axis=1, keepdims=True), truth)
    unit = weight / np.linalg.norm(weight, axis=1, keepdims=True)
    assert latent.tolist() == [1, 0] and cosine.sum() == pytest.approx(unit[1, 0] + unit[0, 1])


def test_random_directions_are_not_recovered():
    rng = np.random.default_rng(3)
    result = recovery(*relu(rng.standard_normal((512, 256)).astype(np.float32)), TRUTH)
    assert result["recovered"] == 0.0 and result["mean_cosine"] < 0.25


def test_the_threshold_is_nine_tenths():
    """Rows turned away from the truth until their cosine is a little above and a little below."""
    rng = np.random.default_rng(0)
    aside = rng.standard_normal(TRUTH.shape)
    aside -= (aside * TRUTH).sum(axis=1, keepdims=True) * TRUTH
    aside /= np.linalg.norm(aside, axis=1, keepdims=True)
    cosine = np.where(np.arange(32) < 20, 0.905, 0.895)[:, None]
    weight = cosine * TRUTH + np.sqrt(1 - cosine**2) * aside
    result = recovery(*relu(weight.astype(np.float32)), TRUTH)
    assert result["recovered"] == 20 / 32 and result["threshold"] == 0.9
    assert result["mean_cosine"] == pytest.approx(cosine.mean(), abs=1e-4)


def test_a_dead_latent_recovers_nothing():
    """The right direction is no recovery where the latent never fires; latents of length 0 neither."""
    spec, params = relu(TRUTH)
    params["b_enc"] = params["b_enc"].at[:8].set(-100.0)
    params["W_dec"] = params["W_dec"].at[8:10].set(0.0)
    result = recovery(spec, params, TRUTH, *WORLD.rows(0, 0, 2000))
    assert result["dead"] == 8 / 32 and result["recovered"] == 22 / 32
    assert result["latent"][:8] == [-1] * 8 or set(result["latent"]).isdisjoint(range(8))
    assert max(result["f1"][:10]) < 0.5


def test_bits_are_dead_when_they_never_change():
    params = parameters(TRUTH, -0.4)
    params["b_enc"] = params["b_enc"].at[:4].set(-100.0).at[4:10].set(100.0)
    assert recovery(Binary(256, 32), params, TRUTH, *WORLD.rows(0, 0, 2000))["dead"] == 10 / 32


def test_detection_by_hand():
    """Latent 0 fires in rows 0, 1; its feature is on in 0, 2. Latent 1 is never asked for."""
    weight = np.eye(2, dtype=np.float32)
    rows = np.array([[1, 0], [2, 0], [-1, 0], [-3, 1]], np.float32)
    codes = np.array([[1, 0], [0, 0], [1, 0], [0, 0]], np.float32)
    result = recovery(ReLU(2, 2), parameters(weight), weight, rows, codes)
    assert result["f1"] == [0.5, None] and result["mean_f1"] == 0.5
    assert result["correlation"][0] == pytest.approx(np.corrcoef([1, 2, 0, 0], [1, 0, 1, 0])[0, 1], abs=1e-4)
    assert result["correlation"][1] is None and result["mean_correlation"] == pytest.approx(result["correlation"][0], abs=1e-4)
    assert result["l0"] == 0.75
    # the reconstruction is max(row, 0): what is lost is 1 + 9; deviations from the mean (-1/4, 1/4) are 14.75 + 0.75
    assert result["explained_variance"] == pytest.approx(1 - 10 / 15.5)


def test_many_rows_are_read_in_pieces():
    """The last batch is smaller; nothing is lost at the seam."""
    rows, codes = WORLD.rows(0, 0, 9000)
    whole = recovery(*relu(TRUTH), TRUTH, rows, codes)
    fires = np.maximum(rows @ TRUTH.T - 0.4, 0)
    y = fires @ TRUTH
    assert whole["l0"] == pytest.approx((fires > 0).sum(axis=1).mean(), abs=1e-3)
    expected = 1 - np.square(rows - y).sum() / np.square(rows - rows.mean(axis=0)).sum()
    assert whole["explained_variance"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"truth": TRUTH[:, :5]}, r"must be \[features, 256\], got \[32, 5\]"),
        ({"truth": np.zeros((2, 256))}, "length 0"),
        ({"rows": np.zeros((4, 256))}, "give both or neither"),
        ({"rows": np.zeros((4, 256)), "codes": np.zeros((3, 32))}, r"codes \[3, 32\] must be \[n, d\] and \[n, 32\]"),
        ({"rows": np.zeros((0, 256)), "codes": np.zeros((0, 32))}, r"rows \[0, 256\]"),
    ],
)
def test_mistakes_are_named(change, message):
    spec, params = relu(TRUTH)
    with pytest.raises(UserError, match=message):
        recovery(spec, params, **({"truth": TRUTH} | change))


BITS = World("directions", dimension=64, features=5, q=0.3)


def exact_bits(copies: int = 1) -> tuple[Binary, dict]:
    """A code whose first 5 x copies bits are the world's coefficients, the next 3 always 1 and the next 2 never."""
    inverse = np.linalg.pinv(BITS.directions(0)).T  # W_enc x is c itself
    weight = np.concatenate([inverse] * copies + [np.zeros((5, 64))]).astype(np.float32)
    bias = np.concatenate([np.full(5 * copies, -0.5), [1.0] * 3, [-1.0] * 2]).astype(np.float32)
    decoder = np.concatenate([BITS.directions(0) / copies] * copies + [np.zeros((5, 64))]).astype(np.float32)
    params = {"W_enc": weight, "W_dec": decoder, "b_enc": bias, "b_dec": np.zeros(64, np.float32)}
    return Binary(64, len(weight)), {name: jnp.asarray(value) for name, value in params.items()}


def test_entropy_of_the_exact_code_is_the_worlds():
    """And 9000 rows are read in three pieces."""
    rows, codes = BITS.rows(0, 0, 9000)
    result = binary_entropy(*exact_bits(), rows)
    assert result["bits"] == pytest.approx(BITS.bits, abs=0.02) and BITS.bits == pytest.approx(5 * 0.8812908992306927)
    p = codes.mean(axis=0, dtype=np.float64)
    assert result["plug_in"] == pytest.approx(-(p * np.log2(p) + (1 - p) * np.log2(1 - p)).sum(), abs=1e-6)
    assert (result["live"], result["latents"], result["rows"]) == (5, 10, 9000)
    assert result["explained_variance"] == pytest.approx(1.0, abs=1e-6)
    assert json.loads(json.dumps(result)) == result and (result["kind"], result["version"]) == ("binary_entropy", 1)


def test_copies_of_a_bit_cost_as_often_as_they_occur():
    rows = BITS.rows(0, 0, 2000)[0]
    single, double = (binary_entropy(*exact_bits(copies), rows)["bits"] for copies in (1, 2))
    assert double == pytest.approx(2 * single, rel=1e-9)


def test_entropy_is_for_bits():
    with pytest.raises(UserError, match="not for ReLU"):
        binary_entropy(*relu(TRUTH), np.zeros((3, 256)))
    with pytest.raises(UserError, match=r"got \[0, 64\]"):
        binary_entropy(*exact_bits(), np.zeros((0, 64)))


def test_the_rarer_value_of_a_bit_is_what_is_active():
    """Three bits of the exact code are always 1 and count as little as the two that are always 0."""
    rows, codes = BITS.rows(0, 0, 3000)
    result = recovery(*exact_bits(), BITS.directions(0), rows, codes)
    assert result["l0"] == pytest.approx(codes.mean(axis=0).sum(), abs=1e-3) and codes.mean() < 0.5
    assert result["dead"] == 0.5 and result["recovered"] == 1.0
