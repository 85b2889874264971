"""The trace of a generation, its edits and taps, and that nothing new is compiled for new values."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlmscope_jax.diffusion import ARSampler, Collect, DreamSampler, LLaDASampler, generate
from dlmscope_jax.diffusion.generate import _loop
from dlmscope_jax.errors import UserError
from dlmscope_jax.models import DiffusionSpec, Edit, InDictionary, ModelConfig, Transformer, init_params

CONFIG = ModelConfig("llada", 40, 16, 2, 2, 1, 8, 32, 1e-5, 1e4, 64, "bidirectional", pad_id=2)
CAUSAL = ModelConfig("llama", 40, 16, 2, 2, 1, 8, 32, 1e-5, 1e4, 64, "causal", pad_id=2)
PROMPT = jnp.asarray(np.random.default_rng(0).integers(4, 23, size=(3, 6)), jnp.int32)


@functools.cache
def _transformer(kind):
    """A tiny transformer whose head has preferences and whose attention matters to them."""
    spec = {"llada": DiffusionSpec(3, shift=False), "dream": DiffusionSpec(3, shift=True), "ar": None}[kind]
    model = Transformer(CONFIG if spec else CAUSAL, spec)
    params = jax.jit(init_params, static_argnums=0)(model, jax.random.key(0))
    params["params"]["head"] = params["params"]["head"] * 40
    params["params"]["embed"] = params["params"]["embed"] * 20
    params["params"]["blocks"] |= {name: 4 * params["params"]["blocks"][name] for name in ("q", "k", "v", "o")}
    return model, params


CASES = {
    "llada": LLaDASampler(6, 8, 4),
    "dream": DreamSampler(6, 8, "entropy", temperature=0.5),
    "ar": ARSampler(5),
}


@pytest.mark.some(1)
@pytest.mark.parametrize("kind", CASES)
def test_trace_is_consistent(kind):
    """Every entry of the trace follows from the others and from one forward pass on what was read."""
    model, params = _transformer(kind)
    sampler = CASES[kind]
    trace = generate(model, params, PROMPT, sampler, key=jax.random.key(3), collect=("resid_post@1", "resid_pre@0", "final_norm"))
    n = sampler.n_steps
    history, when = np.asarray(trace.history), np.asarray(trace.commit_step)
    assert history.shape == (n + 1, 3, 6 + sampler.length)
    np.testing.assert_array_equal(history[-1], trace.tokens)
    np.testing.assert_array_equal(history[0, :, :6], PROMPT)
    blank = 3 if model.diffusion else 2
    assert (history[0, :, 6:] == blank).all()
    assert (when[:, :6] == -1).all() and (np.asarray(trace.confidence)[:, :6] == 0).all()
    for s in range(n + 1):
        np.testing.assert_array_equal(history[s], np.where(when < s, trace.tokens, blank))
    written = (when >= 0) & (when < n)
    assert written[:, 6:].all() and (np.asarray(trace.tokens)[written] != 3).all()
    assert (np.asarray(trace.confidence)[written] != 0).all()
    shape = (n, 3, 6 + sampler.length, 16)
    assert trace.taps["resid_post"][1].shape == trace.taps["resid_pre"][0].shape == trace.taps["final_norm"][2].shape == shape
    again = jax.jit(lambda tokens: model.apply(params, tokens, logits=False, collect=("resid_post@1",)))
    for s in (0, n - 1):
        out = again(history[s])
        known = 6 + sampler.length if model.diffusion else 6 + s  # what is not written yet is not read either
        expected = np.asarray(out.taps["resid_post"][1][:, :known])
        np.testing.assert_allclose(trace.taps["resid_post"][1][s][:, :known], expected, rtol=0, atol=1e-6 * np.abs(expected).max())
        assert not np.asarray(trace.taps["resid_post"][1][s][:, known:]).any()


@pytest.mark.some(1)
@pytest.mark.parametrize("kind", CASES)
def test_padded_rows_equal_rows_alone(kind):
    model, params = _transformer(kind)
    sampler = {"llada": CASES["llada"], "dream": DreamSampler(6, 8, "topk_margin"), "ar": CASES["ar"]}[kind]
    keep = jnp.arange(6)[None] >= jnp.array([[0], [3], [5]])
    together = generate(model, params, jnp.where(keep, PROMPT, 2), sampler, attention_mask=keep)
    seen = generate(model, params, jnp.where(keep, PROMPT, 2), sampler, attention_mask=jnp.ones_like(keep))
    assert (np.abs(seen.confidence - together.confidence)[1:].max(axis=1) > 1e-2).all()  # so padding would be noticed
    for row, start in ((1, 3), (2, 5)):
        alone = generate(model, params, PROMPT[row : row + 1, start:], sampler)
        np.testing.assert_array_equal(together.history[:, row, start:], alone.history[:, 0])
        np.testing.assert_array_equal(together.commit_step[row, start:], alone.commit_step[0])
        np.testing.assert_allclose(together.confidence[row, start:], alone.confidence[0], atol=2e-5)


def test_new_values_never_retrace(stubs):
    model = stubs.new(diffusion=DiffusionSpec(3, shift=False))
    sampler = LLaDASampler(2, 4, 4, temperature=0.5)

    def run(seed, value, strength, schedule, mask):
        edit = Edit("add", "resid_post@0", value, strength=strength, schedule=schedule, positions=mask)
        prompt = np.random.default_rng(seed).integers(4, 23, size=(2, 5))
        return generate(model, model.params, prompt, sampler, key=jax.random.key(seed), edits=(edit,))

    everywhere = np.ones((2, 9), bool)
    first = run(0, np.ones(16, np.float32), 1.0, np.array([1.0, 0.0]), everywhere)
    seen = model.traces
    second = run(1, -np.ones(16, np.float32), 7, np.array([0.5, 0.5]), ~everywhere)
    assert model.traces == seen
    assert (first.tokens != second.tokens).any()
    run(1, np.ones(16, np.float32), 1.0, "constant", everywhere)
    assert model.traces > seen  # the counter counts


def test_transformer_compiles_once():
    model, params = _transformer("dream")
    sampler = DreamSampler(3, 4, "entropy")
    before = _loop._cache_size()
    for layer, strength in ((0, 1.0), (1, 2.0), (1, -3.0)):
        edit = Edit("add", f"resid_post@{layer}", jnp.ones(16), strength=strength, positions="masked")
        generate(model, params, PROMPT + layer, sampler, edits=(edit,))
    assert _loop._cache_size() == before + 1


@pytest.mark.some(3)
@pytest.mark.parametrize("positions", ["all", "prompt", "response", "masked", "just_committed", "masked_prev"])
def test_positions_are_resolved_every_step(stubs, positions):
    model = stubs.llada
    edit = Edit("add", "resid_post@0", jnp.full(16, 100.0), positions=positions, schedule=jnp.array([1.0, 1.0, 0.0, 2.0]))
    # an even shift of the hidden state changes every logit by a constant of its token, so tokens still differ
    trace = generate(model, model.params, PROMPT, LLaDASampler(4, 8, 8), edits=(edit,), collect=("resid_post@0",))
    moved = np.round(np.asarray(trace.taps["resid_post"][0]).mean(axis=-1) / 100)  # the stub itself stays within -1..1
    masked = np.asarray(trace.history)[:4] == 3
    when = np.asarray(trace.commit_step)
    expected = {
        "all": np.ones_like(masked),
        "prompt": np.broadcast_to(when == -1, masked.shape),
        "response": np.broadcast_to(when != -1, masked.shape),
        "masked": masked,
        "just_committed": np.stack([(when == s - 1) & (when >= 0) for s in range(4)]),
        "masked_prev": np.concatenate([masked[:, :, 1:], np.zeros_like(masked[:, :, :1])], axis=2),
    }[positions]
    np.testing.assert_array_equal(moved, expected * np.array([1, 1, 0, 2])[:, None, None])


def test_edit_of_strength_zero_changes_nothing(stubs):
    model, sampler = stubs.dream, DreamSampler(4, 8, "maskgit_plus")
    plain = generate(model, model.params, PROMPT, sampler)
    edited = generate(model, model.params, PROMPT, sampler, edits=(Edit("add", "resid_post@0", jnp.ones(16), strength=0.0),))
    jax.tree.map(np.testing.assert_array_equal, plain, edited)
    pushed = generate(model, model.params, PROMPT, sampler, edits=(Edit("add", "resid_post@0", 3 * jnp.arange(16.0) - 20),))
    assert (pushed.tokens != plain.tokens).any()


def test_edit_applies_to_both_passes_of_guidance(stubs):
    """With an edit that replaces all hidden states, both passes agree and guidance cancels."""
    model, sampler = stubs.llada, LLaDASampler(4, 4, 4, cfg_scale=2.0)
    edit = Edit("set", "resid_post@0", jnp.linspace(-1, 1, 16))
    trace = generate(model, model.params, PROMPT, sampler, edits=(edit,))
    wins = int(jnp.argmax(model.unembed(model.params, jnp.linspace(-1, 1, 16))))
    assert (trace.tokens[:, 6:] == wins).all()
    p = jax.nn.softmax(model.unembed(model.params, jnp.linspace(-1, 1, 16)))[wins]
    np.testing.assert_allclose(trace.confidence[:, 6:], p, rtol=1e-4)


def test_collect_chooses_steps_and_positions(stubs):
    model, sampler = stubs.llada, LLaDASampler(4, 8, 8)
    everything = generate(model, model.params, PROMPT, sampler, collect=("resid_post@0",)).taps["resid_post"][0]
    some = generate(model, model.params, PROMPT, sampler, collect=Collect(("resid_post@0",), steps=(0, 3), positions=(13, 6)))
    assert some.taps["resid_post"][0].shape == (2, 3, 2, 16)
    np.testing.assert_array_equal(some.taps["resid_post"][0], np.asarray(everything)[[0, 3]][:, :, [13, 6]])
    assert generate(model, model.params, PROMPT, sampler).taps == {}
    listed = Collect(("resid_post@0",), steps=[0, 3], positions=np.array([13, 6]))
    assert listed == Collect(("resid_post@0",), steps=(0, 3), positions=(13, 6)) and hash(listed)


def test_positions_of_a_pattern_are_its_queries():
    model, params = _transformer("llada")
    sites = ("attn_pattern@1", "z@0")
    everything, some = (
        generate(model, params, PROMPT, LLaDASampler(1, 2, 2), collect=collect).taps
        for collect in (sites, Collect(sites, positions=(7, 0, 6)))
    )
    np.testing.assert_array_equal(some["attn_pattern"][1], np.asarray(everything["attn_pattern"][1])[:, :, :, [7, 0, 6]])
    np.testing.assert_array_equal(some["z"][0], np.asarray(everything["z"][0])[:, :, [7, 0, 6]])


def test_a_predicted_mask_is_not_a_commit(stubs):
    """The mask is a token like any other (backbones 11.5): it uses up quota, stays unknown, and shows as never written."""
    model = stubs.llada
    loves_masks = Edit("set", "resid_post@0", 10 * model.params["head"][3])
    trace = generate(model, model.params, PROMPT, LLaDASampler(4, 4, 4), edits=(loves_masks,))
    assert (trace.tokens[:, 6:] == 3).all() and (trace.commit_step[:, 6:] == 4).all() and (trace.confidence == 0).all()


def test_generate_can_be_jitted(stubs):
    model, sampler = stubs.dream, DreamSampler(4, 8, "maskgit_plus")
    jitted = jax.jit(lambda params, prompt: generate(model, params, prompt, sampler))(model.params, PROMPT)
    jax.tree.map(np.testing.assert_array_equal, jitted, generate(model, model.params, PROMPT, sampler))


def test_a_transformer_under_jit():
    """There the prompt may hold masks; at temperature 0, where nothing is drawn, it makes no difference."""
    model, params = _transformer("llada")
    sampler = LLaDASampler(4, 8, 4)
    jitted = jax.jit(lambda params, prompt: generate(model, params, prompt, sampler))(params, PROMPT)
    eager = generate(model, params, PROMPT, sampler)
    np.testing.assert_array_equal(jitted.history, eager.history)
    np.testing.assert_array_equal(jitted.commit_step, eager.commit_step)
    np.testing.assert_allclose(jitted.confidence, eager.confidence, atol=2e-5)


def test_same_key_same_text(stubs):
    model, sampler = stubs.dream, DreamSampler(4, 8, "entropy", temperature=1.0)
    draw = lambda seed: np.asarray(generate(model, model.params, PROMPT, sampler, key=jax.random.key(seed)).tokens)  # noqa: E731
    np.testing.assert_array_equal(draw(0), draw(0))
    assert (draw(0) != draw(1)).any()


def test_mistakes(stubs):
    llada, dream, ar = stubs.llada, stubs.dream, stubs.ar
    some_edit = lambda **k: (Edit("add", "resid_post@0", jnp.ones(16), **k),)  # noqa: E731
    site, target = "resid_post@0", InDictionary(None, None, 0, jnp.ones(3))
    fill, go = LLaDASampler(2, 4, 4), lambda model, *a, **k: generate(model, model.params, *a, **k)  # noqa: E731
    cases = [
        ("ARSampler", lambda: go(ar, PROMPT, fill)),
        ("LLaDASampler or DreamSampler", lambda: go(llada, PROMPT, ARSampler(2))),
        ("give generate a key", lambda: go(dream, PROMPT, DreamSampler(2, 4))),
        (r"\[rows, positions\]", lambda: go(llada, PROMPT[0], fill)),
        ("token ids", lambda: go(llada, PROMPT * 1.0, fill)),
        ("token 99.*0 to 22", lambda: go(llada, PROMPT.at[0, 0].set(99), fill)),
        (r"attention_mask is \[3, 4\]", lambda: go(llada, PROMPT, fill, attention_mask=jnp.ones((3, 4)))),
        ("padded on the left", lambda: go(llada, PROMPT, fill, attention_mask=jnp.arange(6) < jnp.array([[4], [6], [6]]))),
        ("the prompt is empty", lambda: go(dream, PROMPT[:, :0], DreamSampler(2, 4, "entropy"))),
        ("stop_ids has token 23; ids are 0 to 22", lambda: go(ar, PROMPT, ARSampler(2, stop_ids=(4, 23)))),
        ("stop_ids is .True.*tuple of token ids", lambda: ARSampler(2, stop_ids=(True,))),
        ("begins with the mask", lambda: go(dream, PROMPT.at[1, 0].set(3), DreamSampler(2, 4, "entropy"))),
        ("'nowhere@1'", lambda: go(llada, PROMPT, fill, collect=("nowhere@1",))),
        ("layers 0 to 0", lambda: go(llada, PROMPT, fill, collect=("resid_post@1",))),
        ("tuple of sites", lambda: go(llada, PROMPT, fill, collect="resid_post@0")),
        (r"0\.\.1", lambda: go(llada, PROMPT, fill, collect=Collect(("resid_post@0",), steps=(2,)))),
        (r"0\.\.9", lambda: go(llada, PROMPT, fill, collect=Collect(("resid_post@0",), positions=(10,)))),
        ("10 tokens", lambda: go(llada, PROMPT, fill, edits=some_edit(positions=jnp.ones((3, 6), bool)))),
        (r"\[6, 16\], for 6 tokens; .* 10 tokens", lambda: go(llada, PROMPT, fill, edits=(Edit("add", site, jnp.ones((6, 16))),))),
        (r"\[3, 16\], for 3 tokens", lambda: go(llada, PROMPT, fill, edits=(Edit("add", site, jnp.ones((3, 16))),))),
        (r"\[3\], for 3 tokens", lambda: go(llada, PROMPT, fill, edits=(Edit("clamp_code", site, target),))),
        (r"strength is \[2\].* 3 rows", lambda: go(llada, PROMPT, fill, edits=some_edit(strength=jnp.ones(2)))),
        ("layers 0 to 0", lambda: go(llada, PROMPT, fill, edits=(Edit("add", "resid_post@99", jnp.ones(16)),))),
        ("2 steps", lambda: go(llada, PROMPT, fill, edits=some_edit(schedule=jnp.ones(5)))),
    ]  # fmt: skip
    for message, call in cases:
        with pytest.raises(UserError, match=message):
            call()
