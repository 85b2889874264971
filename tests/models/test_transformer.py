"""Taps, edits and partial forwards: what is asked for, no more, and without new compilations."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlmscope_jax.errors import UserError
from dlmscope_jax.models import Edit, InDictionary, Transformer, canonical_site, init_params, logit_lens, parse_site


@pytest.fixture
def model_and_params(family, tiny_model):
    return tiny_model(family)


def taps_of(model, params, tokens, site, **kwargs):
    name, layer = parse_site(site)
    return model.apply(params, tokens, logits=False, collect=(site,), **kwargs).taps[name][layer]


@pytest.mark.some(1)
def test_both_forms_of_the_linear_maps_have_the_same_gradients(model_and_params, tokens):
    model, params = model_and_params
    loss = lambda model: lambda p: jax.nn.logsumexp(model.apply(p, tokens).logits, axis=-1).mean()  # noqa: E731
    plain, fast = jax.grad(loss(model))(params), jax.grad(loss(model.clone(trains=True)))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6 * max(1.0, float(jnp.abs(a).max()))), plain, fast)


def test_forward_mode_is_the_transpose_of_reverse_mode(tiny_model, tokens):
    model, params = tiny_model("dream")
    out = lambda v: model.apply(params, tokens, edits=(Edit("add", "resid_post@0", v),)).logits[0, 3, :5]  # noqa: E731
    start = jnp.zeros(32)
    np.testing.assert_allclose(jax.jacfwd(out)(start), jax.jacrev(out)(start), atol=1e-5)


def test_the_gradient_of_a_tap_does_not_keep_the_weights(tiny_model):
    """A backward pass through a prefix of the layers cuts their weights out of the stack again."""
    config = dataclasses.replace(tiny_model("llama")[0].config, n_layers=12, d_mlp=512)
    model = Transformer(config)
    params = init_params(model, jax.random.key(0))
    tokens = jnp.zeros((1, 4), jnp.int32)
    edit = lambda v: (Edit("add", "resid_post@0", v),)  # noqa: E731
    tap = lambda v, p: model.apply(p, tokens, logits=False, collect=("resid_post@10",), edits=edit(v)).taps["resid_post"][10].sum()  # noqa: E731
    used = jax.jit(jax.grad(tap)).lower(jnp.zeros(32), params).compile().memory_analysis().temp_size_in_bytes
    stack = sum(leaf.nbytes for leaf in jax.tree.leaves(params["params"]["blocks"]))
    assert used < stack / 2, (used, stack)


def test_an_edit_past_the_last_layer_is_named(tiny_model, tokens):
    model, params = tiny_model("llama")
    with pytest.raises(UserError, match="resid_post@3: this model has layers 0 to 2"):
        model.apply(params, tokens, edits=(Edit("scale", "resid_post@3", 2.0),))
    with pytest.raises(UserError, match="mlp_out@1 or mlp_raw@1"):
        Edit("scale", "model.layers.1.mlp", 2.0)


def test_positions_asked_for(model_and_params, tokens):
    model, params = model_and_params
    full = model.apply(params, tokens).logits
    where = jnp.array([[1, 4], [0, 10]])
    some = model.apply(params, tokens, logits=where).logits
    np.testing.assert_allclose(some, np.take_along_axis(np.asarray(full), np.asarray(where)[:, :, None], 1), atol=1e-6)
    assert model.apply(params, tokens, logits=False).logits is None


@pytest.mark.some(2)
def test_nothing_past_the_last_tap_is_computed(model_and_params, tokens):
    model, params = model_and_params
    broken = jax.tree.map(lambda x: x, params)
    broken["params"]["blocks"]["down"] = broken["params"]["blocks"]["down"].at[2].set(jnp.nan)
    broken["params"]["final_norm"] = broken["params"]["final_norm"] * jnp.nan
    tap = taps_of(model, broken, tokens, "resid_post@1")
    np.testing.assert_allclose(tap, model.apply(params, tokens, collect=("resid_post@1",)).taps["resid_post"][1], atol=1e-6)


@pytest.mark.some(2)
def test_prefix_and_whole_agree(model_and_params, tokens):
    """The two ways of reading the stacked weights (indexed for a prefix, scanned for all) give the same values."""
    model, params = model_and_params
    whole = model.apply(params, tokens, collect=("mlp_in@0", "mlp_out@1")).taps
    part = model.apply(params, tokens, logits=False, collect=("mlp_in@0", "mlp_out@1")).taps
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), whole, part)


def test_causal_and_bidirectional(model_and_params, tokens):
    model, params = model_and_params
    changed = tokens.at[:, -1].set(5)
    moved = jnp.abs(model.apply(params, tokens).logits - model.apply(params, changed).logits)[:, 0].max()
    assert (moved > 1e-4) == (model.config.attention == "bidirectional")


def test_only_differences_of_positions_matter(model_and_params, tokens):
    model, params = model_and_params
    shifted = jnp.broadcast_to(jnp.arange(tokens.shape[1]) + 9, tokens.shape)
    a, b = model.apply(params, tokens).logits, model.apply(params, tokens, position_ids=shifted).logits
    np.testing.assert_allclose(a, b, atol=2e-4)


@pytest.mark.some(2)
def test_add_set_scale_project(model_and_params, tokens):
    model, params = model_and_params
    clean = taps_of(model, params, tokens, "resid_post@1")
    direction = jax.random.normal(jax.random.key(3), (32,))
    edited = lambda *a, **k: taps_of(model, params, tokens, "resid_post@1", edits=(Edit(*a, **k),))  # noqa: E731
    np.testing.assert_allclose(edited("add", "resid_post@1", direction, 2.0), clean + 2 * direction, atol=1e-5)
    np.testing.assert_allclose(edited("set", "resid_post@1", direction), jnp.broadcast_to(direction, clean.shape), atol=1e-5)
    np.testing.assert_allclose(edited("scale", "resid_post@1", 3.0), 3 * clean, atol=1e-4)
    flat = edited("project_out", "resid_post@1", direction)
    np.testing.assert_allclose(flat @ direction, jnp.zeros(clean.shape[:2]), atol=1e-3)
    np.testing.assert_allclose(edited("add", "resid_post@1", direction, 0.0), clean, atol=0)
    assert jnp.abs(edited("add", "resid_post@0", direction) - clean).max() > 1e-2
    np.testing.assert_allclose(edited("add", "resid_post@2", direction), clean, atol=0)


@pytest.mark.some(2)
def test_mask_confines_an_edit(model_and_params, tokens):
    model, params = model_and_params
    where = jnp.zeros(tokens.shape, bool).at[1, 4].set(True)
    clean = taps_of(model, params, tokens, "mlp_out@2")
    out = taps_of(model, params, tokens, "mlp_out@2", edits=(Edit("add", "mlp_out@2", jnp.ones(32), positions=where),))
    np.testing.assert_allclose(out - clean, jnp.zeros_like(clean).at[1, 4].set(1.0), atol=1e-5)


@pytest.mark.some(2)
def test_dictionary_edits_keep_or_drop_the_error(model_and_params, tokens, dictionary):
    model, params = model_and_params
    spec, weights = dictionary
    clean = taps_of(model, params, tokens, "resid_post@1")
    codes = spec.encode(weights, clean)
    edited = lambda kind, **k: taps_of(  # noqa: E731
        model, params, tokens, "resid_post@1", edits=(Edit(kind, "resid_post@1", InDictionary(spec, weights, **k)),)
    )
    np.testing.assert_allclose(edited("replace_by_dictionary"), spec.decode(weights, codes), atol=1e-5)
    change = (4.0 - codes.latent(2))[..., None] * spec.direction(weights, 2)
    np.testing.assert_allclose(edited("clamp_code", latent=2, target=4.0), clean + change, atol=1e-5)
    np.testing.assert_allclose(edited("ablate_code", latent=2), clean - codes.latent(2)[..., None] * spec.direction(weights, 2), atol=1e-5)


@pytest.mark.some(2)
def test_transcoder_reads_one_site_and_writes_another(model_and_params, tokens, dictionary):
    model, params = model_and_params
    spec, weights = dictionary
    read = taps_of(model, params, tokens, "mlp_in@1")
    edit = Edit("replace_by_dictionary", "mlp_out@1", InDictionary(spec, weights), read_site="mlp_in@1")
    written = taps_of(model, params, tokens, "mlp_out@1", edits=(edit,))
    np.testing.assert_allclose(written, spec.decode(weights, spec.encode(weights, read)), atol=1e-5)


@pytest.mark.some(2)
def test_new_values_layers_masks_and_strengths_do_not_retrace(model_and_params, tokens):
    model, params = model_and_params
    traces = []

    @jax.jit
    def run(params, tokens, edits):
        traces.append(1)
        return model.apply(params, tokens, edits=edits).logits

    for layer, strength, seed in [(0, 1.0, 0), (2, -3.0, 1), (1, 0.0, 2)]:
        value = jax.random.normal(jax.random.key(seed), (32,))
        where = jax.random.bernoulli(jax.random.key(seed), 0.5, tokens.shape)
        run(params, tokens, (Edit("add", f"resid_post@{layer}", value, strength, where),))
    assert len(traces) == 1
    run(params, tokens, (Edit("set", "resid_post@0", value, strength, where),))
    assert len(traces) == 2


def test_a_dictionary_edit_runs_under_cond(model_and_params, tokens, dictionary):
    """Not under ``where``, which would run the dictionary at every layer."""
    model, params = model_and_params
    spec, weights = dictionary
    edit = Edit("replace_by_dictionary", "resid_post@1", InDictionary(spec, weights))
    jaxpr = str(jax.make_jaxpr(lambda p, t, e: model.apply(p, t, edits=(e,)).logits)(params, tokens, edit))
    layers = jaxpr[jaxpr.index("scan[") :]
    dictionary_at = layers.rindex(" sin ")
    assert "cond[" in layers[:dictionary_at] and "sin" not in layers[: layers.index("cond[")]


@pytest.mark.some(2)
def test_gradient_reaches_the_edit_and_equals_a_difference(model_and_params, tokens):
    model, params = model_and_params
    loss = lambda v: model.apply(params, tokens, edits=(Edit("add", "resid_post@0", v),)).logits[0, 3, 5]  # noqa: E731
    value = jnp.zeros(32)
    slope = jax.grad(loss)(value)
    step = jax.random.normal(jax.random.key(0), (32,)) * 1e-2
    difference = (loss(step) - loss(-step)) / 2
    np.testing.assert_allclose(float(difference), float(slope @ step), rtol=2e-2, atol=1e-5)


def test_edit_mistakes_are_named():
    for make, word in [
        (lambda: Edit("multiply", "resid_post@1", jnp.ones(4)), "multiply"),
        (lambda: Edit("add", "resid_pots@1", jnp.ones(4)), "resid_pots"),
        (lambda: Edit("add", "resid_post@1", jnp.ones(4), positions="maskd"), "maskd"),
        (lambda: Edit("clamp_code", "resid_post@1", jnp.ones(4)), "InDictionary"),
        (lambda: Edit("replace_by_dictionary", "mlp_in@1", InDictionary(None, None), read_site="mlp_out@1"), "mlp_out@1"),
    ]:
        with pytest.raises(UserError, match=word):
            make()


def test_unknown_site_and_layer_are_named(tiny_model, tokens):
    model, params = tiny_model("llama")
    with pytest.raises(UserError, match="layers 0 to 2"):
        model.apply(params, tokens, collect=("resid_post@3",))
    with pytest.raises(UserError, match="resid_psot"):
        model.apply(params, tokens, collect=("resid_psot@1",))


def test_more_tokens_than_the_context(tiny_model):
    model, params = tiny_model("llama")
    with pytest.raises(UserError, match="65 tokens are more than this model's context of 64"):
        model.apply(params, jnp.zeros((1, 65), jnp.int32))


@pytest.mark.parametrize(
    ("alias", "site"),
    [
        ("blocks.5.hook_resid_post", "resid_post@5"), ("model.layers.3", "resid_post@3"), ("model.layers.3.mlp", "mlp_out@3"),
        ("model.transformer.blocks.4", "resid_post@4"), ("resid_post_layer_27", "resid_post@27"), ("blocks.2.mlp.hook_post", "mlp_act@2"),
        ("resid_mid@1", "resid_mid@1"), ("model.transformer.blocks.0.ff_norm", "mlp_in@0"),
    ],
)  # fmt: skip
def test_aliases(alias, site):
    assert canonical_site(alias) == site


def test_schedules_and_positions_at_a_step(tokens):
    prompt = jnp.zeros(tokens.shape, bool).at[:, :3].set(True)
    masked = jnp.zeros(tokens.shape, bool).at[:, 5:7].set(True)
    recent = jnp.zeros(tokens.shape, bool).at[:, 4].set(True)
    at = lambda positions, **k: (  # noqa: E731
        Edit("add", "resid_post@0", jnp.ones(32), 2.0, positions, **k).at_step(1, 3, prompt=prompt, masked=masked, just_committed=recent)
    )
    assert at("prompt").mask[0].nonzero()[0].tolist() == [0, 1, 2]
    assert at("response").mask[0].nonzero()[0].tolist() == list(range(3, 11))
    assert at("masked").mask[0].nonzero()[0].tolist() == [5, 6]
    assert at("masked_prev").mask[0].nonzero()[0].tolist() == [4, 5]
    assert at("just_committed").mask[0].nonzero()[0].tolist() == [4]
    assert at("all").mask.all()
    assert float(at("all", schedule=jnp.array([1.0, 0.25, 0.0])).strength) == 0.5
    with pytest.raises(UserError, match="2 entries"):
        at("all", schedule=jnp.ones(2))


def test_logit_lens(tiny_model, tokens):
    model, params = tiny_model("llada")
    out = model.apply(params, tokens, collect=("resid_post@2",))
    np.testing.assert_allclose(logit_lens(model, params, out.taps["resid_post"][2]), out.logits, atol=1e-5)
    direction = jnp.ones(32)
    tree = params["params"]
    np.testing.assert_allclose(logit_lens(model, params, direction, norm="frozen"), tree["head"] @ tree["final_norm"], atol=1e-4)


def test_pure_under_vmap(tiny_model, tokens):
    model, params = tiny_model("dream")
    one = lambda t: model.apply(params, t[None]).logits[0]  # noqa: E731
    np.testing.assert_allclose(jax.vmap(one)(tokens), model.apply(params, tokens).logits, atol=1e-5)


def test_init_is_seeded(tiny_model):
    model, _ = tiny_model("llama")
    a, b = init_params(model, jax.random.key(1)), init_params(model, jax.random.key(1))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert not np.allclose(a["params"]["blocks"]["q"][0], a["params"]["blocks"]["q"][1])
