"""Transcoders: pairs of rows, two scales, and the paper's recipe on a map that is known."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlmscope_jax.activations import ActivationStore
from dlmscope_jax.dictionaries import ReLU, TopK, load_dictionary
from dlmscope_jax.errors import UserError
from dlmscope_jax.training import TrainSpec, init_state, sources, train

from .conftest import assert_same_bits, sparse_rows

D, OUT, FEATURES = 16, 24, 32
X, READS = sparse_rows(20_000, D, FEATURES, active=2)
RNG = np.random.default_rng(5)
WRITES = RNG.normal(size=(FEATURES, OUT))
WRITES /= np.linalg.norm(WRITES, axis=1, keepdims=True)


def mlp(x):
    """An MLP with a hidden unit for each direction of the input: 40 ReLU(a_i (x - c) - b) w_i + 3."""
    centre = X.astype(np.float64).mean(0)
    return (40.0 * np.maximum((x - centre) @ READS.T - 3.0, 0) @ WRITES + 3.0).astype(np.float32)


Y = mlp(X)
SOURCE = {"mlp_in@3": X, "mlp_out@3": Y}


def paper(**changes):
    """ReLU, the normalised error, both biases, warm-up: the recipe of the transcoder paper's code, at a size for a test."""
    dictionary = ReLU(D, 128, d_out=OUT, error="over_norm", input_bias=True)
    fields = {"dictionary": dictionary, "steps": 1_500, "batch_size": 256, "lr": 4e-3, "warmup_steps": 300}
    fields |= {"site": "mlp_in@3", "target": "mlp_out@3"}
    return TrainSpec(**fields | changes)


def explained(trained, x, y):
    error = np.square(y - np.asarray(trained.spec.reconstruct(trained.params, x))).sum()
    return 1 - error / np.square(y - y.mean(0)).sum()


def test_the_papers_recipe_finds_a_known_map(tmp_path):
    [trained] = train(paper(), SOURCE, tmp_path)
    fresh, _ = sparse_rows(24_000, D, FEATURES, active=2)
    fresh = fresh[20_000:]
    assert explained(trained, fresh, mlp(fresh)) > 0.88  # shrinkage by the penalty is most of what is missing
    # each unit of the map is a latent that reads its direction and writes its output
    decoder = np.asarray(trained.params["W_dec"])
    best = (WRITES @ decoder.T).argmax(1)
    assert ((WRITES * decoder[best]).sum(1) > 0.9).mean() > 0.9
    encoder = np.asarray(trained.params["W_enc"])[best]
    encoder /= np.linalg.norm(encoder, axis=1, keepdims=True)
    assert ((READS * encoder).sum(1) > 0.8).mean() > 0.8

    meta = trained.meta
    assert (meta.site, meta.layer, meta.scale_folded) == ("mlp_in@3", 3, True)
    found = meta.extra["transcoder"]
    assert found["target"] == "mlp_out@3" and found["folded"] and found["subtracted"] == "b_in"
    assert found["input_scale"] == meta.input_scale == pytest.approx(np.sqrt(np.square(X).sum(1).mean()), rel=0.05)
    assert found["output_scale"] == pytest.approx(np.sqrt(np.square(Y).sum(1).mean()), rel=0.05)
    assert trained.path.name == "mlp_in@3_to_mlp_out@3_relu_s0.00448"
    _, params, _ = load_dictionary(trained.path)
    assert_same_bits(params, trained.params)


def test_folded_it_acts_on_raw_rows(final_states, tmp_path):
    spec = TrainSpec(TopK(D, 64, 4, d_out=OUT, skip=True), steps=30, batch_size=128, site="mlp_in@3", target="mlp_out@3", lr=3e-3)
    [trained] = train(spec, SOURCE, tmp_path)
    state = final_states[spec.name]
    inner = spec.dictionary.reconstruct(jax.tree.map(jnp.asarray, state.params), X[:500] / state.input_scale)
    np.testing.assert_allclose(trained.spec.reconstruct(trained.params, X[:500]) / state.output_scale, inner, atol=1e-5)
    assert trained.meta.extra["transcoder"]["subtracted"] is None


def test_biases_start_on_the_rows():
    spec = paper()
    state = init_state(spec, sample=X[:2_000], targets=Y[:2_000])
    inputs, outputs = X[:2_000] / float(state.input_scale), Y[:2_000] / float(state.output_scale)
    for name, rows in (("b_in", inputs), ("b_dec", outputs)):
        offsets = rows - np.asarray(state.params[name])
        assert np.linalg.norm((offsets / np.maximum(1e-9, np.linalg.norm(offsets, axis=1, keepdims=True))).mean(0)) < 2e-3
    np.testing.assert_allclose(np.square(inputs).sum(1).mean(), 1, rtol=1e-5)
    np.testing.assert_allclose(np.square(outputs).sum(1).mean(), 1, rtol=1e-5)
    # without a bias of its own, pre-activations are centred by the encoder's
    spec = paper(dictionary=ReLU(D, 128, d_out=OUT))
    params = init_state(spec, sample=X[:2_000], targets=Y[:2_000]).params
    np.testing.assert_allclose(params["b_enc"], -np.asarray(params["W_enc"]) @ np.asarray(state.params["b_in"]), atol=1e-5)


@pytest.mark.slow
def test_pairs_from_every_source_are_the_same(tmp_path):
    spec = TrainSpec(TopK(D, 64, 4, d_out=OUT), steps=12, batch_size=64, site="mlp_in@3", target="mlp_out@3", sample_rows=128)
    [array] = train(spec, {name: rows[:640] for name, rows in SOURCE.items()}, tmp_path / "array")
    order = np.concatenate([np.random.default_rng([0, epoch]).permutation(640).reshape(10, 64) for epoch in range(2)])
    [batches] = train(spec, [{name: rows[r] for name, rows in SOURCE.items()} for r in order], tmp_path / "batches")
    assert_same_bits(array.params, batches.params)
    # a store has its own order; pairs stay pairs, so shuffled targets would not be learned
    store = ActivationStore.create(tmp_path / "rows", {"mlp_in@3": D, "mlp_out@3": OUT}, {"model": "m"}, shard_rows=2048, chunk_rows=64)
    store.append({name: rows[:8_192] for name, rows in SOURCE.items()})
    long = TrainSpec(TopK(D, 64, 4, d_out=OUT), steps=300, batch_size=128, site="mlp_in@3", target="mlp_out@3", lr=5e-3)
    [stored] = train(long, store.finish(), tmp_path / "store")
    assert explained(stored, X[8_192:], Y[8_192:]) > 0.5


@pytest.mark.slow
def test_a_site_is_read_once_for_all(tmp_path, monkeypatch):
    asked = []
    batches = sources._ArraySource.batches

    def watched(self, step, sites):
        asked.append((step, sites))
        return batches(self, step, sites)

    monkeypatch.setattr(sources._ArraySource, "batches", watched)
    common = {"steps": 3, "batch_size": 64, "sample_rows": 64}
    both = {"site": "mlp_in@3", "target": "mlp_out@3"}
    specs = [
        TrainSpec(TopK(D, 64, 4, d_out=OUT), **common, **both),
        TrainSpec(TopK(D, 64, 8, d_out=OUT), **common, **both),
        TrainSpec(TopK(D, 64, 4), site="mlp_in@3", **common),
        TrainSpec(TopK(OUT, 64, 4), site="mlp_out@3", **common),
    ]
    train(specs, SOURCE, tmp_path)
    assert asked[-1] == (0, ["mlp_in@3", "mlp_out@3"])
    assert [sites for _, sites in asked[:-1]] == [["mlp_in@3", "mlp_out@3"], ["mlp_in@3"], ["mlp_out@3"]]  # samples


def test_mistakes(tmp_path):
    spec = TrainSpec(TopK(D, 64, 4, d_out=OUT + 1), steps=3, batch_size=64, site="mlp_in@3", target="mlp_out@3")
    with pytest.raises(UserError, match="mlp_out@3 has rows of 24 entries, the dictionary .* writes 25: use d_out=24"):
        train(spec, SOURCE, tmp_path)
    with pytest.raises(UserError, match="no site 'mlp_out@4': it has mlp_in@3, mlp_out@3"):
        train(TrainSpec(TopK(D, 64, 4, d_out=OUT), steps=3, batch_size=64, site="mlp_in@3", target="mlp_out@4"), SOURCE, tmp_path)
    with pytest.raises(UserError, match="no site 'mlp_out@3': its rows have no name"):
        train(TrainSpec(TopK(D, 64, 4, d_out=OUT), steps=3, batch_size=64, target="mlp_out@3"), X, tmp_path)
    with pytest.raises(UserError, match="a transcoder needs rows of its output"):
        init_state(paper(), sample=X)
    with pytest.raises(UserError, match="the sample has 20000 rows, targets has 5"):
        init_state(paper(), sample=X, targets=Y[:5])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_its_identity_says_which_kind_it_is(tmp_path):
    spec = TrainSpec(TopK(D, 64, 4, d_out=OUT), steps=3, batch_size=64, site="mlp_in@3", target="mlp_out@3", label="one")
    train(spec, SOURCE, tmp_path)
    training = json.loads((tmp_path / "one" / "config.json").read_text())
    assert '"kind": "topk"' in json.dumps(training)
    from dlmscope_jax.dictionaries import BatchTopK

    other = TrainSpec(BatchTopK(D, 64, 4, d_out=OUT), steps=3, batch_size=64, site="mlp_in@3", target="mlp_out@3", label="one")
    with pytest.raises(UserError, match="training.dictionary.kind is 'topk' there and 'batch_topk' here"):
        train(other, SOURCE, tmp_path)
