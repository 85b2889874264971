"""Steering against the paper's encode, modify, decode, add-the-error-back, and its trace against single forward passes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlmscope_jax.analysis import steer, steered_generation
from dlmscope_jax.dictionaries import Dense
from dlmscope_jax.diffusion import ARSampler, DreamSampler, LLaDASampler, MDLMSampler, ParallelSampler, generate
from dlmscope_jax.errors import UserError

SITE = "resid_post@1"


def tap(model, params, tokens, edits=()):
    return np.asarray(model.apply(params, tokens, logits=False, collect=(SITE,), edits=edits).taps["resid_post"][1], np.float64)


@pytest.fixture(scope="module")
def setting(tiny):
    model, params = tiny.model("dlm")
    tokens = jnp.asarray(tiny.blocks(3).tokens)
    tokens = tokens.at[:, 4:7].set(tiny.mask)
    return model, params, tiny.topk(SITE), tokens


def busiest(spec, params, h):
    """A latent that fires somewhere and one that fires nowhere."""
    dense = np.asarray(spec.dense(spec.encode(params, jnp.asarray(h, jnp.float32))))
    fired = (dense > 0).reshape(-1, spec.width).sum(axis=0)
    return int(fired.argmax()), int(fired.argmin())


@pytest.mark.parametrize("alpha", [2.0, -0.7])
@pytest.mark.parametrize("silent", [False, True])
def test_row_max_is_the_papers_rule(setting, alpha, silent):
    model, params, (spec, weights, _), tokens = setting
    h = tap(model, params, tokens)
    latent = busiest(spec, weights, h)[silent]
    a = np.asarray(spec.dense(spec.encode(weights, jnp.asarray(h, jnp.float32))), np.float64)
    decode = lambda codes: np.asarray(spec.decode(weights, Dense(jnp.asarray(codes, jnp.float32))), np.float64)  # noqa: E731
    modified = a.copy()
    modified[..., latent] += alpha * a.max(axis=-1)  # the maximum over all latents, not this one's own
    expected = decode(modified) + (h - decode(a))
    got = tap(model, params, tokens, (steer(spec, weights, latent, SITE, alpha),))
    np.testing.assert_allclose(got, expected, rtol=2e-4, atol=2e-4)
    assert np.abs(got - h).max() > 0.1


def test_the_other_scales(setting):
    model, params, (spec, weights, _), tokens = setting
    weights = {**weights, "W_dec": weights["W_dec"] * 3.0}  # decoder rows need not have unit norm
    h = tap(model, params, tokens)
    v = np.asarray(weights["W_dec"][7], np.float64)
    unit = v / np.linalg.norm(v)
    change = lambda *args, **kw: tap(model, params, tokens, (steer(spec, weights, 7, SITE, *args, **kw),)) - h  # noqa: E731
    np.testing.assert_allclose(change(1.5, "unit"), np.broadcast_to(1.5 * unit, h.shape), atol=1e-4)
    np.testing.assert_allclose(change(0.5, "corpus_max", maximum=4.0), np.broadcast_to(2.0 * v, h.shape), atol=1e-4)
    shares = change(0.3, "resid_norm")
    np.testing.assert_allclose(np.linalg.norm(shares, axis=-1) / np.linalg.norm(h, axis=-1), 0.3, rtol=1e-3)
    np.testing.assert_allclose(change(-1.5, "unit"), -change(1.5, "unit"), atol=2e-4)
    assert not change(0.0, "row_max").any()
    where = np.asarray(tokens == 3)
    only = change(1.5, "unit", positions=jnp.asarray(where))
    assert not only[~where].any() and np.abs(only[where]).min(axis=-1).max() > 0


def test_latents_strengths_and_values_never_trace_again(setting):
    model, params, (spec, weights, _), tokens = setting
    traces = []

    @jax.jit
    def run(edit):
        traces.append(1)
        return model.apply(params, tokens, logits=False, collect=(SITE,), edits=(edit,)).taps["resid_post"][1]

    other = {**weights, "b_enc": weights["b_enc"] + 1}
    a, b = run(steer(spec, weights, 3, SITE, 1.0)), run(steer(spec, other, 9, SITE, -4.0))
    c = run(steer(spec, weights, 3, "resid_post@0", 1.0))
    assert len(traces) == 1 and not np.allclose(a, b) and not np.allclose(a, c)


def test_mistakes(setting):
    _, _, (spec, weights, _), _ = setting
    with pytest.raises(UserError, match="'loud'"):
        steer(spec, weights, 0, SITE, 1.0, "loud")
    with pytest.raises(UserError, match="0 to 31"):
        steer(spec, weights, 32, SITE, 1.0)
    with pytest.raises(UserError, match="maximum="):
        steer(spec, weights, 0, SITE, 1.0, "corpus_max")


def test_a_steered_generation_step_by_step(setting, tiny):
    model, params, dictionary, tokens = setting
    spec, weights, _ = dictionary
    prompt, sampler = tokens[:1, :4], LLaDASampler(steps=4, gen_length=4, block_length=4)
    latent = busiest(spec, weights, tap(model, params, tokens))[0]
    schedule = jnp.asarray([1.0, 0.0, 1.0, 2.0])
    edit = steer(spec, weights, latent, SITE, 0.5, "resid_norm", positions="masked", schedule=schedule)
    got = steered_generation(model, params, prompt, sampler, edit, dictionary, latent)
    for name, edits in (("plain", ()), ("steered", (edit,))):
        trace = generate(model, params, prompt, sampler, edits=edits)
        assert got[name]["history"] == np.asarray(trace.history)[:, 0].tolist()
        assert got[name]["commit_step"] == np.asarray(trace.commit_step)[0].tolist()
        np.testing.assert_allclose(got[name]["confidence"], np.asarray(trace.confidence)[0], rtol=1e-6)
        for step, state in enumerate(got[name]["history"][:-1]):
            codes = spec.encode(weights, jnp.asarray(tap(model, params, jnp.asarray([state]))[0], jnp.float32))
            np.testing.assert_allclose(got[name]["activation"][step], spec.dense(codes)[:, latent], atol=1e-3)
    assert got["relative_size"] == pytest.approx([0.5, 0.0, 0.5, 1.0], rel=1e-4)
    assert got["dose"] == pytest.approx(2.0, rel=1e-4)
    assert got["steps"] == 4 and got["prompt_length"] == 4 and got["mask_id"] == tiny.mask and got["site"] == SITE
    json.dumps(got, allow_nan=False)
    still = steered_generation(model, params, prompt, sampler, steer(spec, weights, latent, SITE, 0.0), dictionary, latent)
    assert still["plain"] == still["steered"] and still["dose"] == 0
    with pytest.raises(UserError, match="one row"):
        steered_generation(model, params, tokens, sampler, edit, dictionary, latent)


def test_an_autoregressive_model_too(tiny):
    model, params = tiny.model("ar")
    dictionary = tiny.topk(SITE)
    edit = steer(*dictionary[:2], 5, SITE, 3.0, "resid_norm", positions="masked")
    got = steered_generation(model, params, jnp.asarray([[0, 5, 6]]), ARSampler(max_new_tokens=3), edit, dictionary, 5)
    assert got["steps"] == 3 and got["mask_id"] is None and len(got["relative_size"]) == 3
    assert got["plain"]["commit_step"] == [-1, -1, -1, 0, 1, 2]


def test_only_steps_that_ran_are_counted(tiny):
    """A row that stops after 3 of 8 steps has 3 steps of activations and sizes, and their dose."""
    model, params = tiny.model("ar")
    dictionary, prompt = tiny.topk(SITE), jnp.asarray([[0, 5, 6]])
    tokens = generate(model, params, prompt, ARSampler(max_new_tokens=8, stop_ids=())).tokens[0, 3:].tolist()
    assert tokens[2] not in tokens[:2]
    edit = steer(*dictionary[:2], 5, SITE, 0.05, "resid_norm")
    sampler = ARSampler(max_new_tokens=8, stop_ids=(tokens[2],))
    got = steered_generation(model, params, prompt, sampler, edit, dictionary, 5)
    for name in ("plain", "steered"):
        assert got[name]["commit_step"] == [-1, -1, -1, 0, 1, 2, 8, 8, 8, 8, 8] and len(got[name]["history"]) == 9
        assert len(got[name]["activation"]) == 3
    assert got["steps"] == 8
    assert got["relative_size"] == pytest.approx([0.05] * 3, rel=1e-2) and got["dose"] == pytest.approx(0.15, rel=1e-2)


@pytest.mark.slow
def test_an_autoregressive_step_has_nothing_where_no_token_is_yet(tiny):
    model, params = tiny.model("ar")
    dictionary, prompt, sampler = tiny.topk(SITE), jnp.asarray([[0, 5, 6]]), ARSampler(max_new_tokens=4, stop_ids=())
    got = steered_generation(model, params, prompt, sampler, steer(*dictionary[:2], 5, SITE, 0.5, "unit"), dictionary, 5)
    for step, (state, line) in enumerate(zip(got["plain"]["history"], got["plain"]["activation"], strict=False)):
        h = tap(model, params, jnp.asarray([state]))[0]
        codes = dictionary[0].dense(dictionary[0].encode(dictionary[1], jnp.asarray(h, jnp.float32)))[:, 5]
        np.testing.assert_allclose(line[: 3 + step], codes[: 3 + step], atol=1e-3)
        assert not any(line[3 + step :])
    unread = steer(*dictionary[:2], 5, SITE, 0.5, "unit", positions="masked")  # places that no step reads
    assert steered_generation(model, params, prompt, sampler, unread, dictionary, 5)["relative_size"] == [0.0] * 4


@pytest.mark.some(2)
@pytest.mark.parametrize(
    ("sampler", "ran"),
    [
        (DreamSampler(steps=12, max_new_tokens=4, algorithm="origin"), 9),  # more steps than tokens: it is through before the last
        (LLaDASampler(steps=8, gen_length=4, block_length=4), 4),
        (LLaDASampler(steps=4, gen_length=4, block_length=4, cfg_scale=1.0), 4),  # two passes a step
        (ParallelSampler(gen_length=4, block_length=4, threshold=1e-6), 1),
        (MDLMSampler(steps=6, gen_length=4, eps=0.4, noise_removal=False), 5),  # two of its steps use the last logits again
        (MDLMSampler(steps=2, gen_length=4, eps=0.9, noise_removal=False), 2),  # masks are left: it would have gone on
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, int) else None,
)
def test_a_diffusion_run_that_is_done_early(tiny, sampler, ran):
    model, params = tiny.model("dlm")
    dictionary, prompt, key = tiny.topk(SITE), jnp.asarray([[0, 5, 6]]), jax.random.key(1)
    edit = steer(*dictionary[:2], 5, SITE, 0.05, "resid_norm")
    got = steered_generation(model, params, prompt, sampler, edit, dictionary, 5, key=key)
    assert (tiny.mask in got["plain"]["history"][-1]) == (sampler.n_steps == ran == 2)
    assert [tiny.mask in state for state in got["plain"]["history"][:-1]] == [step < ran for step in range(sampler.n_steps)]
    assert len(got["plain"]["activation"]) == ran
    moved = sum(tiny.mask in state for state in got["steered"]["history"][:-1])
    assert len(got["steered"]["activation"]) == moved
    assert got["relative_size"] == pytest.approx([0.05] * moved, rel=1e-2) and got["dose"] == pytest.approx(0.05 * moved, rel=1e-2)


def test_activations_that_no_pass_over_the_text_gives_are_refused(tiny):
    model, params = tiny.model("dlm")
    dictionary = tiny.topk(SITE)
    sampler = ParallelSampler(gen_length=4, block_length=4, cache="dual")
    edit = steer(*dictionary[:2], 5, SITE, 1.0)
    with pytest.raises(UserError, match="^steered_generation: .*ParallelSampler.*cache='none'$"):
        steered_generation(model, params, jnp.asarray([[0, 5, 6]]), sampler, edit, dictionary, 5)
