"""Cross-layer transcoders: several sites of one row side by side, a scale for each, and what they save on features that persist."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from dlmscope_jax.activations import ActivationStore
from dlmscope_jax.dictionaries import CrossLayer, JumpReLU, LossSettings, TopK, load_dictionary
from dlmscope_jax.errors import UserError
from dlmscope_jax.training import Checkpoints, TrainSpec, init_state, train

from .conftest import assert_same_bits
from .test_resume import StopAt, Stopped, files_of

LAYERS, D, FEATURES, ACTIVE = 3, 16, 24, 2
RNG = np.random.default_rng(0)


def unit(*shape):
    drawn = RNG.normal(size=shape)
    return drawn / np.linalg.norm(drawn, axis=-1, keepdims=True)


READS, WRITES = unit(LAYERS, FEATURES, D), unit(LAYERS, FEATURES, D)
CENTRES = 0.2 * RNG.normal(size=(2, LAYERS, D))
NORMS = np.array([[1.0, 10.0, 0.3], [5.0, 0.2, 40.0]])  # layers differ in norm


def rows(n, seed):
    """A feature of the first layer is there in all three, in another direction, and each layer's MLP writes something of it."""
    rng = np.random.default_rng(seed)
    codes = np.zeros((n, FEATURES))
    chosen = np.argsort(rng.random((n, FEATURES)), axis=1)[:, :ACTIVE]
    np.put_along_axis(codes, chosen, rng.uniform(0.5, 1.5, (n, ACTIVE)), axis=1)
    found = {}
    for layer in range(LAYERS):
        found[f"mlp_in@{layer}"] = (NORMS[0, layer] * (codes @ READS[layer] + CENTRES[0, layer])).astype(np.float32)
        found[f"mlp_out@{layer}"] = (NORMS[1, layer] * (codes @ WRITES[layer] + CENTRES[1, layer])).astype(np.float32)
    return found


SOURCE, FRESH = rows(20_000, 1), rows(4_000, 2)


def spec_of(layers=(0, 1, 2), activation="relu", **changes):
    n = len(layers)
    fields = {"steps": 24, "batch_size": 64, "lr": 1e-2, "sample_rows": 256, "settings": LossSettings(aux=0.0, sparsity=0.1)}
    fields |= {name: tuple(f"mlp_{way}@{layer}" for layer in layers) for name, way in (("site", "in"), ("target", "out"))}
    return TrainSpec(CrossLayer(n * D, n * FEATURES, n, n * D, activation), **fields | changes)


def beside(source, way, layers=(0, 1, 2)):
    return np.concatenate([source[f"mlp_{way}@{layer}"] for layer in layers], axis=1)


def measured(trained, layers):
    """L0, and explained variance of each layer, on rows that were not trained on."""
    x, y = (beside(FRESH, way, layers).reshape(4_000, -1) for way in ("in", "out"))
    codes = trained.spec.encode(trained.params, x)
    error = np.square(y - np.asarray(trained.spec.decode(trained.params, codes))).reshape(-1, len(layers), D).sum(axis=(0, 2))
    return float(codes.count().mean()), 1 - error / np.square(y - y.mean(0)).reshape(-1, len(layers), D).sum(axis=(0, 2))


@pytest.mark.slow
def test_features_that_persist_take_one_latent_in_place_of_three(tmp_path):
    """As many latents, more of them active, and three transcoders of single layers still explain less than one across them."""
    length = {"steps": 800, "batch_size": 256, "sparsity_warmup": 266}
    single = [(0,), (1,), (2,)]
    across, *alone = train([spec_of(**length), *(spec_of(layers, **length) for layers in single)], SOURCE, tmp_path)
    assert across.spec.width == sum(trained.spec.width for trained in alone)
    l0, explained = measured(across, (0, 1, 2))
    parts = [measured(trained, layers) for trained, layers in zip(alone, single, strict=True)]
    l0_alone, explained_alone = sum(part[0] for part in parts), np.concatenate([part[1] for part in parts])
    assert l0 < 0.6 * l0_alone
    assert (explained > 0.9).all() and (explained > explained_alone + 0.05).all()
    assert explained.mean() > explained_alone.mean() + 0.1
    # most of the map stands in the first layer's latents: each writes one feature's three outputs
    written = (np.asarray(across.params["W_dec_0"]) / NORMS[1][:, None]).reshape(FEATURES, -1)
    written /= np.maximum(np.linalg.norm(written, axis=1, keepdims=True), 1e-9)
    truth = WRITES.transpose(1, 0, 2).reshape(FEATURES, -1) / np.sqrt(LAYERS)
    assert ((truth @ written.T).max(axis=1) > 0.9).mean() > 0.7


def test_each_site_has_a_scale_of_its_own(final_states, tmp_path):
    spec = spec_of(activation="jumprelu")
    [trained] = train(spec, SOURCE, tmp_path)
    state = final_states[spec.name]
    for scale, way in ((state.input_scale, "in"), (state.output_scale, "out")):
        want = [np.sqrt(np.square(SOURCE[f"mlp_{way}@{layer}"]).sum(axis=1).mean()) for layer in range(LAYERS)]
        np.testing.assert_allclose(scale, want, rtol=0.1)
    read, written = np.repeat(state.input_scale, D), np.repeat(state.output_scale, D)
    x = beside(FRESH, "in")[:500]
    inner = spec.dictionary.reconstruct({name: jnp.asarray(value) for name, value in state.params.items()}, x / read)
    np.testing.assert_allclose(trained.spec.reconstruct(trained.params, x) / written, inner, atol=1e-5)

    meta = trained.meta
    assert (meta.site, meta.layer, meta.target) == ("mlp_in@0+mlp_in@1+mlp_in@2", 0, "mlp_out@0+mlp_out@1+mlp_out@2")
    assert meta.input_scale is None and meta.scale_folded
    assert meta.extra["transcoder"]["input_scale"] == state.input_scale.tolist()
    assert meta.extra["transcoder"]["output_scale"] == state.output_scale.tolist()
    assert trained.path.name == "mlp_in@0..mlp_in@2_to_mlp_out@0..mlp_out@2_cross_layer_s0.1"
    assert load_dictionary(trained.path)[0] == spec.dictionary


def test_without_scales(final_states, tmp_path):
    spec = spec_of(normalize="none")
    [trained] = train(spec, SOURCE, tmp_path)
    state = final_states[spec.name]
    np.testing.assert_array_equal(state.input_scale, np.ones(LAYERS))
    assert_same_bits(trained.params, state.params)


def test_biases_start_on_each_layers_rows():
    some = {name: value[:2_000] for name, value in SOURCE.items()}
    state = init_state(spec_of(), sample=beside(some, "in"), targets=beside(some, "out"))
    for layer in range(LAYERS):
        mine = slice(layer * D, (layer + 1) * D)
        inputs = some[f"mlp_in@{layer}"] / float(state.input_scale[layer])
        outputs = some[f"mlp_out@{layer}"] / float(state.output_scale[layer])
        np.testing.assert_allclose([np.square(part).sum(axis=1).mean() for part in (inputs, outputs)], 1.0, rtol=1e-5)
        off = outputs - np.asarray(state.params["b_dec"])[mine]
        assert np.linalg.norm((off / np.linalg.norm(off, axis=1, keepdims=True)).mean(axis=0)) < 2e-3


@pytest.mark.slow
def test_stopped_and_resumed_among_others(final_states, tmp_path):
    """Bit for bit, beside a dictionary of one site, which is what it is alone."""
    other = TrainSpec(TopK(D, 32, 2), steps=24, batch_size=64, lr=1e-2, sample_rows=256, site="mlp_in@1")
    specs = [spec_of(activation="jumprelu"), other]
    train(specs, SOURCE, tmp_path / "whole", checkpoints=Checkpoints(every=5))
    whole = {name: final_states.pop(name) for name in list(final_states)}
    with pytest.raises(Stopped):
        train(specs, SOURCE, tmp_path / "stopped", checkpoints=Checkpoints(every=5), progress=StopAt(13))
    train(specs, SOURCE, tmp_path / "stopped", checkpoints=Checkpoints(every=5))
    assert_same_bits(final_states, whole)
    assert files_of(tmp_path / "stopped") == files_of(tmp_path / "whole")
    [alone] = train(other, SOURCE, tmp_path / "alone")
    assert_same_bits(alone.params, load_dictionary(tmp_path / "whole" / other.name)[1])


def test_from_a_store(tmp_path):
    names = [f"mlp_{way}@{layer}" for way in ("in", "out") for layer in range(LAYERS)]
    store = ActivationStore.create(tmp_path / "rows", dict.fromkeys(names, D), {"model": "m"}, shard_rows=2048, chunk_rows=64)
    store.append({name: SOURCE[name][:4_096] for name in names})
    [trained] = train(spec_of(steps=300, batch_size=128), store.finish(), tmp_path / "run")
    assert (measured(trained, (0, 1, 2))[1] > 0.3).all()  # rows of other sites would not be learned
    last = json.loads((trained.path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["loss"] == pytest.approx(last["loss_reconstruction"] + last["loss_sparsity"], rel=1e-4)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: spec_of(site="mlp_in@0"), "site = 'mlp_in@0' must be a tuple of 3 sites, one for each layer of the CrossLayer"),
        (lambda: spec_of(target=("mlp_out@0", "mlp_out@1")), "must be a tuple of 3 sites"),
        (lambda: TrainSpec(TopK(D, 32, 2), steps=9, site=("a@0", "a@1")), "belongs to a cross-layer transcoder; a TopK has one"),
        (lambda: spec_of(resample_every=5), "resample_every is not for CrossLayer"),
        (lambda: spec_of(activation="jumprelu", normalize="none"), "leaves JumpReLU's window without a unit"),
        (lambda: train(spec_of(site=("mlp_in@0", "mlp_in@1", "mlp_in@7")), SOURCE, "nowhere"), "no site 'mlp_in@7'"),
        (
            lambda: train(spec_of(), {name: value[:, :8] if name == "mlp_in@1" else value for name, value in SOURCE.items()}, "nowhere"),
            "mlp_in@1 has rows of 8 entries, the dictionary mlp_in@0..mlp_in@2_to_mlp_out@0..mlp_out@2_cross_layer_s0.1 reads 16",
        ),
    ],
)
def test_mistakes_are_one_clear_line(make, says):
    with pytest.raises(UserError) as caught:
        make()
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_defaults_are_those_of_jumprelu_in_one_layer():
    """The same loss on the same units, so the same rates and weights."""
    spec = spec_of(lr=None, settings=None, activation="jumprelu")
    single = TrainSpec(JumpReLU(D, FEATURES, d_out=D, penalty="tanh"), steps=24, site="mlp_in@0", target="mlp_out@0")
    assert spec.settings_used == single.settings_used
    assert (spec.lr_used, spec.betas_used, spec.sparsity_warmup_used) == (single.lr_used, single.betas_used, single.sparsity_warmup_used)
    assert spec.dictionary.window == single.dictionary.window
