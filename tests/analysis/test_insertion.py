"""Insertion of dictionaries against direct computations through the whole model, and against closed forms."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlmscope_jax.analysis import controls, insertion
from dlmscope_jax.analysis.insertion import delta_loss, delta_losses
from dlmscope_jax.diffusion import token_loss
from dlmscope_jax.errors import UserError
from dlmscope_jax.models import Edit, InDictionary, model_identity, process_weights

pytestmark = pytest.mark.filterwarnings("ignore:.*donated.*")
CONDITIONS = controls.CONDITIONS


def by(result, condition, rate=None):
    (row,) = [r for r in result["rows"] if r["condition"] == condition and r["rate"] == rate]
    return row


def value(result, condition, quantity, rate=None):
    return by(result, condition, rate)[quantity]["value"]


def batches(model, blocks, seed=0, rates=(0.5,), size=64):
    """The corrupted batches that ``delta_losses`` makes, in one batch a rate."""
    key = jax.random.fold_in(jax.random.key(seed), 0)
    source = insertion._Batches(blocks, size, model.diffusion, key, bool((blocks.documents < 0).any()))
    return [next(iter(source.at(r, rate))) for r, rate in enumerate(rates)]


def direct(model, params, rate_batches, edits):
    """Mean loss by whole-model forwards and ``token_loss``, one batch a rate, every rate weighing the same."""
    found = []
    for batch in rate_batches:
        loss = token_loss(
            model, params, batch["tokens"], batch["targets"], batch["scored"], attention_mask=batch["attention"], edits=edits(batch)
        )
        found.append(float(loss.sum()) / float(batch["scored"].sum()))
    return np.mean(found)


@pytest.mark.some(1)
@pytest.mark.parametrize(("kind", "site"), [("dlm", "resid_post@1"), ("dream", "mlp_out@1"), ("ar", "resid_post@2")])
def test_a_perfect_dictionary_loses_exactly_nothing(tiny, kind, site):
    model, params = tiny.model(kind)
    spec = tiny.Perfect(tiny.width)
    rates = None if kind == "ar" else (0.2, 0.7)
    result = delta_loss(model, params, (spec, spec.init(None), tiny.Card(site)), tiny.blocks(5), rates=rates)
    for rate in result["rates"] + [None]:
        row = by(result, "spliced", rate)
        assert row["delta"]["value"] == 0 and row["kl"]["value"] == 0 and row["top1"]["value"] == pytest.approx(1, abs=1e-12)
        assert row["loss"] == by(result, "clean", rate)["loss"]
        assert by(result, "noise", rate)["delta"]["value"] == 0  # its own error is nothing, so is the noise
    assert value(result, "zero", "delta") != 0


@pytest.mark.some(3)
@pytest.mark.parametrize(
    ("kind", "site"),
    [
        ("dlm", "resid_post@1"), ("dlm", "resid_pre@0"), ("dream", "resid_post@2"), ("dream", "mlp_out@1"), ("ar", "resid_post@1"),
        ("ar", "z@1"),
    ],
)  # fmt: skip
def test_losses_equal_edits_of_the_whole_model(tiny, kind, site):
    """The upper layers alone give what the whole model gives, for splice, zero and clean; the last block is padded."""
    model, params = tiny.model(kind)
    dictionary = tiny.topk(site)
    blocks = tiny.blocks(5, pad=4)
    rates = None if kind == "ar" else (0.25, 0.75)
    result = delta_loss(model, params, dictionary, blocks, rates=rates)
    made = batches(model, blocks, rates=rates or (0.0,))
    edits = {
        "clean": lambda batch: (),
        "spliced": lambda batch: (Edit("replace_by_dictionary", site, InDictionary(dictionary[0], dictionary[1])),),
        "zero": lambda batch: (Edit("set", site, jnp.zeros(tiny.width)),),
    }
    for condition, make in edits.items():
        assert value(result, condition, "loss") == pytest.approx(direct(model, params, made, make), rel=2e-5)
    assert abs(value(result, "spliced", "delta")) > 1e-3


def test_the_copied_upper_layers_and_the_whole_model_agree(tiny, monkeypatch):
    model, params = tiny.model("dream")
    run = lambda: delta_loss(model, params, tiny.topk("resid_post@1"), tiny.blocks(4), rates=(0.5,))  # noqa: E731
    fast = run()
    monkeypatch.setattr(insertion, "_COPY_LIMIT", -1)
    slow = run()
    for condition in CONDITIONS:
        assert value(fast, condition, "loss") == pytest.approx(value(slow, condition, "loss"), rel=2e-5)
        assert value(fast, condition, "kl") == pytest.approx(value(slow, condition, "kl"), rel=1e-3, abs=1e-6)


def test_units_known_logits(tiny):
    """A model whose blocks add nothing: loss, KL and agreement by hand; zero puts the uniform distribution there."""
    model, params = tiny.model("dlm", wide=1.0)
    params = tiny.passthrough(model, params)
    blocks = tiny.blocks(4)
    result = delta_loss(model, params, tiny.topk("resid_post@1"), blocks, rates=(0.5,))
    embed, head = (np.asarray(params["params"][name], np.float64) for name in ("embed", "head"))
    hidden = embed[tiny.mask] / np.sqrt(np.mean(embed[tiny.mask] ** 2) + 1e-5)  # every scored position reads the mask token
    logits = head @ hidden
    logp = logits - np.log(np.exp(logits).sum())
    (batch,) = batches(model, blocks)
    scored, targets = np.asarray(batch["scored"]), np.asarray(batch["targets"])
    row = by(result, "clean", 0.5)
    assert row["tokens"] == scored.sum() == 4 * round(0.5 * (tiny.length - 1))
    assert row["loss"]["value"] == pytest.approx(-logp[targets[scored]].mean(), rel=1e-5)
    zero = by(result, "zero", 0.5)
    assert zero["loss"]["value"] == pytest.approx(np.log(tiny.vocab), rel=1e-6)
    p = np.exp(logp)
    assert zero["kl"]["value"] == pytest.approx((p * (logp + np.log(tiny.vocab))).sum(), rel=1e-5)
    assert zero["top1"]["value"] == float(np.argmax(logp) == 0)  # ties resolve to the lowest index


@pytest.mark.parametrize("kind", ["dream", "ar"])
def test_a_model_that_predicts_the_next_token_is_scored_there(tiny, kind):
    """Embedding and head such that the output at a token is about its successor: only the aligned loss is near zero."""
    model, params = tiny.model(kind)
    params = tiny.passthrough(model, params)
    tree = dict(params["params"])
    table = np.random.default_rng(0).normal(size=(tiny.vocab, tiny.width))
    tree["embed"] = jnp.asarray(table, jnp.float32)
    tree["head"] = jnp.asarray(np.roll(table, 1, axis=0) * 4, jnp.float32)  # row t + 1 of the head is row t of the embedding
    blocks = tiny.blocks(3)
    tokens = (np.arange(tiny.length)[None] + 5 + np.arange(3)[:, None] * 2).astype(np.int32)  # 5 to 20, each one more than the last
    blocks = dataclasses.replace(blocks, tokens=tokens)
    result = delta_loss(model, {"params": tree}, tiny.topk("resid_post@1"), blocks, rates=None if kind == "ar" else (0.05,))
    if kind == "ar":
        assert value(result, "clean", "loss") < 0.05
    else:  # one masked token a row; its left neighbour is visible and knows it, except where the run has ended
        assert result["predicts_next"] and value(result, "clean", "loss") < 0.05
    unshifted = dataclasses.replace(model.diffusion, shift=False) if kind == "dream" else None
    if unshifted:
        wrong = delta_loss(model.clone(diffusion=unshifted), {"params": tree}, tiny.topk("resid_post@1"), blocks, rates=(0.05,))
        assert value(wrong, "clean", "loss") > 1.0


def test_masks_are_exact_common_and_independent_of_the_batching(tiny):
    model, params = tiny.model("dlm")
    blocks = tiny.blocks(7)
    dictionary = tiny.topk("resid_post@1")
    rates = (0.05, 0.45, 0.95)
    results = [delta_loss(model, params, dictionary, blocks, rates=rates, batch_size=size) for size in (5, 8)]
    for rate in rates:
        counts = {by(results[0], condition, rate)["tokens"] for condition in CONDITIONS}
        assert counts == {7 * max(1, round(rate * (tiny.length - 1)))}
        for condition in CONDITIONS:
            a, b = (value(result, condition, "loss", rate) for result in results)
            assert a == pytest.approx(b, rel=1e-5)
    for quantity in ("loss", "delta", "kl", "top1"):  # all rates together: each weighs the same, however many tokens it masks
        assert value(results[0], "spliced", quantity) == pytest.approx(np.mean([value(results[0], "spliced", quantity, r) for r in rates]))
    other = delta_loss(model, params, dictionary, blocks, rates=rates, seed=1)
    assert value(other, "clean", "loss") != value(results[0], "clean", "loss")
    again = delta_loss(model, params, dictionary, blocks, rates=rates)
    assert again == results[1]


def test_noise_has_the_norm_of_this_rows_own_error():
    rng = np.random.default_rng(0)
    error = jnp.asarray(rng.normal(size=(2, 5, 16)) * rng.uniform(0.01, 30, size=(2, 5, 1)), jnp.float32)
    keys = controls.block_keys(jax.random.key(0), 3, jnp.arange(2))
    noise = controls.matched_noise(keys, error)
    np.testing.assert_allclose(np.linalg.norm(noise, axis=-1), np.linalg.norm(error, axis=-1), rtol=1e-5)
    many = controls.matched_noise(controls.block_keys(jax.random.key(0), 0, jnp.arange(40)), jnp.ones((40, 50, 16)))
    assert abs(float(many.mean())) < 0.02  # isotropic: no preferred direction
    cosines = (many * jnp.ones(16)).sum(-1) / (4 * jnp.linalg.norm(many, axis=-1))
    assert abs(float(cosines.mean())) < 0.02 and float(cosines.std()) == pytest.approx(0.25, rel=0.1)


def test_replacements_by_hand(tiny):
    spec, params, _ = tiny.topk()
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(2, 6, tiny.width)), jnp.float32)
    is_masked = jnp.asarray(rng.random((2, 6)) < 0.5)
    means = jnp.asarray(rng.normal(size=(2, tiny.width)), jnp.float32)
    untrained = spec.init(jax.random.key(9))
    where = is_masked
    values = controls.replacements(spec, params, untrained, x, is_masked, means, jax.random.split(jax.random.key(2), 2), where)
    got = dict(zip(CONDITIONS, values, strict=True))
    kept = ~np.asarray(where)
    for value_ in got.values():
        np.testing.assert_array_equal(value_[kept], x[kept])
    m = np.asarray(where)
    np.testing.assert_array_equal(got["clean"], x)
    np.testing.assert_array_equal(got["spliced"][m], spec.reconstruct(params, x)[m])
    np.testing.assert_array_equal(got["untrained"][m], spec.reconstruct(untrained, x)[m])
    assert not got["zero"][m].any()
    np.testing.assert_array_equal(got["mean"][m], np.broadcast_to(means[1], got["mean"][m].shape))
    np.testing.assert_allclose(
        np.linalg.norm(got["noise"] - x, axis=-1)[m], np.linalg.norm(spec.reconstruct(params, x) - x, axis=-1)[m], rtol=1e-5
    )
    everywhere = controls.mean_by_state(is_masked, means)
    np.testing.assert_array_equal(everywhere[kept], np.broadcast_to(means[0], everywhere[kept].shape))


def test_the_mean_control_is_the_mean_of_each_mask_state(tiny):
    model, params = tiny.model("dlm")
    blocks = tiny.blocks(3, pad=5)
    source = insertion._Batches(blocks, 8, model.diffusion, jax.random.key(0), True)
    means, samples = insertion._calibrate(model, params, source, (0.5,), ("resid_post@1",))
    (batch,) = source.at(0, 0.5)
    tap = np.asarray(insertion._taps(model, params, batch["tokens"], batch["attention"], ("resid_post@1",))["resid_post@1"])
    masked, real, tap = np.asarray(batch["is_masked"])[:3], blocks.documents >= 0, tap[:3]
    np.testing.assert_allclose(means["resid_post@1"][1], tap[masked].mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(means["resid_post@1"][0], tap[real & ~masked].mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(samples["resid_post@1"], tap[real])


def test_loss_recovered_names_its_baseline(tiny):
    model, params = tiny.model("dlm")
    result = delta_loss(model, params, tiny.topk(), tiny.blocks(40), rates=(0.5,))
    loss = {condition: value(result, condition, "loss", 0.5) for condition in CONDITIONS}
    for entry in result["loss_recovered"]:
        baseline = loss[entry["baseline"]]
        assert entry["value"] == pytest.approx((baseline - loss["spliced"]) / (baseline - loss["clean"]), rel=1e-6)
    assert {entry["baseline"] for entry in result["loss_recovered"]} == {"zero", "mean"}


def test_intervals_come_from_documents(tiny):
    model, params = tiny.model("dlm")
    few = delta_loss(model, params, tiny.topk(), tiny.blocks(10), rates=(0.5,))
    assert few["rows"][0]["documents"] == 10 and "10 units" in by(few, "spliced")["delta"]["note"]
    many = delta_loss(model, params, tiny.topk(), tiny.blocks(10, documents_per_block=4), rates=(0.5,))
    row = by(many, "spliced")
    assert row["documents"] > 30 and row["delta"]["low"] < row["delta"]["value"] < row["delta"]["high"]
    assert row["loss"]["value"] == pytest.approx(value(few, "spliced", "loss"), rel=1e-6)  # the same masks and tokens
    json.dumps(many, allow_nan=False)


def test_positions_masked_and_visible(tiny):
    model, params = tiny.model("dlm")
    dictionary, blocks = tiny.topk("resid_post@1"), tiny.blocks(4)
    (batch,) = batches(model, blocks)
    for positions, where in (("masked", batch["is_masked"]), ("visible", ~batch["is_masked"])):
        result = delta_loss(model, params, dictionary, blocks, rates=(0.5,), positions=positions)
        edit = Edit("replace_by_dictionary", "resid_post@1", InDictionary(*dictionary[:2]), positions=where)
        assert value(result, "spliced", "loss") == pytest.approx(direct(model, params, [batch], lambda b, e=edit: (e,)), rel=2e-5)
        assert result["positions"] == positions
        assert by(result, "zero")["relative_change_quartiles"] == pytest.approx([1, 1, 1])


def test_several_dictionaries_share_a_pass_and_equal_their_own(tiny):
    model, params = tiny.model("dlm")
    blocks = tiny.blocks(4)
    both = {"a": tiny.topk("resid_post@1"), "b": tiny.topk("resid_post@2", seed=9)}
    together = delta_losses(model, params, both, blocks, rates=(0.5,))
    for name, dictionary in both.items():
        alone = delta_loss(model, params, dictionary, blocks, rates=(0.5,))
        assert value(alone, "spliced", "loss") == pytest.approx(value(together[name], "spliced", "loss"), rel=1e-6)
        assert together[name]["site"] == dictionary[2].site


def test_new_values_do_not_compile_again(tiny):
    model, params = tiny.model("dlm")
    blocks = tiny.blocks(4)
    delta_loss(model, params, tiny.topk("resid_post@1"), blocks, rates=(0.3, 0.6))
    programs = [insertion._taps, insertion._conditions, insertion._score, insertion._corrupted]
    before = [program._cache_size() for program in programs]
    delta_loss(model, params, tiny.topk("resid_post@1", seed=8), blocks, rates=(0.1, 0.9), seed=3, positions="masked")
    assert [program._cache_size() for program in programs] == before


def test_mistakes_and_mismatches(tiny):
    model, params = tiny.model("dlm")
    blocks, good = tiny.blocks(2), tiny.topk()
    other = tiny.topk(model_identity="somebody else")
    with pytest.raises(UserError, match="trained on the model tiny"):
        delta_loss(model, params, other, blocks, rates=(0.5,))
    forced = delta_loss(model, params, other, blocks, rates=(0.5,), force=True)
    assert "somebody else" in forced["forced"][0]
    own = tiny.topk(model_identity=model_identity(model, params))
    assert delta_loss(model, params, own, blocks, rates=(0.5,))["forced"] == []
    with pytest.raises(UserError, match="trained on folded weights, this model has raw ones"):
        delta_loss(model, params, tiny.topk(weight_processing="folded"), blocks, rates=(0.5,))
    with pytest.raises(UserError, match="trained on raw weights, this model has folded ones"):
        delta_loss(*process_weights(model, params), tiny.topk(weight_processing="raw"), blocks, rates=(0.5,))
    with pytest.raises(UserError, match="between 0 and 1"):
        delta_loss(model, params, good, blocks, rates=(0.5, 1.5))
    with pytest.raises(UserError, match="'sometimes'"):
        delta_loss(model, params, good, blocks, positions="sometimes")
    with pytest.raises(UserError, match="no blocks"):
        delta_loss(model, params, good, blocks.take(slice(0, 0)))
    with pytest.raises(UserError, match="ids 0 to 22"):
        delta_loss(model, params, good, dataclasses.replace(blocks, tokens=blocks.tokens + 9))
    with pytest.raises(UserError, match="layers 0 to 2"):
        delta_loss(model, params, tiny.topk("resid_post@7"), blocks)
    with pytest.raises(UserError, match="width 16"):
        delta_loss(model, params, tiny.topk("mlp_act@1"), blocks)
    ar, ar_params = tiny.model("ar")
    with pytest.raises(UserError, match="autoregressive"):
        delta_loss(ar, ar_params, good, blocks, rates=(0.5,))
