"""Generation with keys and values kept: equal to reading the whole text where it is exact, and to a reference where it is not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlmscope_jax.diffusion import ARSampler, Collect, ParallelSampler, generate, readers
from dlmscope_jax.diffusion.generate import _loop
from dlmscope_jax.errors import UserError
from dlmscope_jax.models import Edit, Transformer, init_params


def whole(monkeypatch):
    """Makes ``generate`` read the whole text, whatever the sampler asks for."""
    monkeypatch.setattr(readers, "NextToken", lambda text: readers.WholeText(text, ARSampler(1), jnp.arange(text.given, text.total), None))


def assert_same(a, b, atol=2e-5):
    np.testing.assert_array_equal(a.tokens, b.tokens)
    np.testing.assert_array_equal(a.commit_step, b.commit_step)
    np.testing.assert_allclose(a.confidence, b.confidence, atol=atol)


@pytest.mark.some(2)
@pytest.mark.parametrize(
    ("padded", "positions"),
    [(True, "rotary"), (True, "learned"), *(pytest.param(False, name, marks=pytest.mark.slow) for name in ("rotary", "learned"))],
)
def test_autoregressive_cache_is_exact(tiny, monkeypatch, padded, positions):
    model, params = tiny.network("causal", positions=positions, n_kv_heads=1)
    prompt = tiny.prompts(5, 7)
    keep = jnp.arange(7)[None] >= jnp.array([[0], [3], [5], [1], [0]]) if padded else None
    edits = (
        Edit("add", "resid_post@0", jax.random.normal(jax.random.key(1), (16,)), strength=2.0),
        Edit("scale", "mlp_out@1", 0.5, positions="response"),
        Edit("set", "z@1", jnp.ones((4, 4)), positions=jnp.arange(16)[None] == 8),
        Edit("add", "resid_mid@1", jax.random.normal(jax.random.key(2), (16, 16))),  # a value per token
        Edit("add", "v@0", jax.random.normal(jax.random.key(3), (16, 1, 4))),  # and of the one head that keys and values have
    )
    sampler, layer = ARSampler(9, stop_ids=()), int(padded)  # layers past the last that is collected are read all the same
    sites = (f"q@{layer}", "attn_pattern@0")
    run = lambda: generate(model, params, prompt, sampler, attention_mask=keep, edits=edits, collect=sites)  # noqa: E731
    cached = run()
    whole(monkeypatch)
    _loop.clear_cache()
    plain = run()
    _loop.clear_cache()
    assert_same(cached, plain)
    for s in range(9):  # the activations of what was known at the step
        known = np.arange(16)[None] < 7 + s
        known = np.broadcast_to(known, (5, 16)) & (np.arange(16)[None] >= (0 if keep is None else np.asarray(keep).argmax(1)[:, None]))
        np.testing.assert_allclose(cached.taps["q"][layer][s][known], plain.taps["q"][layer][s][known], atol=2e-5)
        last = 6 + s
        np.testing.assert_allclose(cached.taps["attn_pattern"][0][s][:, :, last], plain.taps["attn_pattern"][0][s][:, :, last], atol=2e-5)


def test_step_dependent_edits_read_the_whole_text(tiny):
    model, params = tiny.network("causal")
    late = Edit("add", "resid_post@0", jnp.ones(16), schedule=np.arange(5.0))
    trace = generate(model, params, tiny.prompts(2, 4), ARSampler(5, stop_ids=()), edits=(late,), collect=("resid_post@0",))
    tap = trace.taps["resid_post"][0]
    np.testing.assert_allclose(tap[3][:, 0] - tap[0][:, 0], 3.0, atol=1e-4)  # an early token is read again, with the new strength


def test_a_cached_pass_is_over_one_token(tiny):
    """No product is over the whole text: the sizes of all are those of one token, or of the prompt without its last."""
    model, params = tiny.network("causal")
    text = jax.jit(lambda p, t: generate(model, p, t, ARSampler(11, stop_ids=())).tokens).lower(params, tiny.prompts(2, 7)).as_text()
    assert "tensor<2x6x32xf32>" in text and "tensor<2x1x32xf32>" in text and "tensor<2x18x32xf32>" not in text


BLOCKS = [(shift, sub, threshold, factor) for shift in (False, True) for sub in (4, 2) for threshold, factor in ((0.5, None), (0.9, 1.2))]


DEFAULT = (BLOCKS[0], BLOCKS[-1])  # each value of each option in one of the two; the others with --full


@pytest.mark.some(2)
@pytest.mark.parametrize("shift, sub, threshold, factor", [b if b in DEFAULT else pytest.param(*b, marks=pytest.mark.slow) for b in BLOCKS])
def test_block_cache_is_exact(tiny, shift, sub, threshold, factor):
    """Prompts of every length modulo the block, with padding, against the same sampler on the whole text."""
    model, params = tiny.network("block_causal", shift=shift, block_length=4)
    prompt, keep = tiny.prompts(6, 9), jnp.arange(9)[None] >= jnp.array([[0], [1], [2], [3], [4], [8]])
    sampler = ParallelSampler(11, sub, threshold=threshold, factor=factor)
    plain = generate(model, params, prompt, sampler, attention_mask=keep)
    cached = generate(model, params, prompt, dataclasses.replace(sampler, cache="blocks"), attention_mask=keep, collect=("resid_post@1",))
    np.testing.assert_array_equal(cached.tokens, plain.tokens)
    np.testing.assert_allclose(cached.confidence, plain.confidence, atol=2e-5)
    order = lambda trace: np.asarray(trace.commit_step)  # noqa: E731
    for row in range(6):  # the same order, though passes that settle a block lie between
        same = np.unique(order(plain)[row], return_inverse=True)[1], np.unique(order(cached)[row], return_inverse=True)[1]
        np.testing.assert_array_equal(*same)
    assert not cached.approximate and (np.asarray(cached.tokens) != 3).all()
    # once a block is settled its activations are those of the finished text
    final = model.apply(
        params, cached.tokens, attention_mask=jnp.pad(keep, ((0, 0), (0, 11)), constant_values=True),
        position_ids=jnp.maximum(jnp.cumsum(jnp.pad(keep, ((0, 0), (0, 11)), constant_values=True), axis=1) - 1, 0),
        logits=False, collect=("resid_post@1",),
    )  # fmt: skip
    ran = int(cached.forwards) - 1
    np.testing.assert_allclose(cached.taps["resid_post"][1][ran][0, :12], final.taps["resid_post"][1][0, :12], atol=5e-5)


@pytest.mark.slow
def test_a_row_alone_and_in_company_with_a_block_cache(tiny):
    model, params = tiny.network("block_causal", shift=True, block_length=4)
    prompt, keep = tiny.prompts(3, 9), jnp.arange(9)[None] >= jnp.array([[0], [2], [5]])
    sampler = ParallelSampler(8, 4, threshold=0.6, cache="blocks")
    together = generate(model, params, prompt, sampler, attention_mask=keep)
    for row, start in enumerate((0, 2, 5)):
        alone = generate(model, params, prompt[row : row + 1, start:], sampler)
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[row, start:])


def reference_dual(model, params, prompt, sampler, shift):
    """Fast-dLLM's dual cache, one row: within a block all keys and values outside of it are held at those of its first pass.

    Written without a cache: full forward passes in which ``k`` and ``v`` are set to the old values.
    """
    row = np.concatenate([prompt, np.full(sampler.gen_length, 3)])
    sites = tuple(f"{name}@{layer}" for name in "kv" for layer in range(model.config.n_layers))
    passes = 0
    read = jax.jit(lambda row, edits: model.apply(params, row[None], edits=edits, collect=sites))

    def commit(logits, where):
        nonlocal row
        logits = np.asarray(logits, np.float64)
        p = np.exp(logits - logits.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        tokens, confidence = p.argmax(-1), p.max(-1)
        confidence = np.where(where, confidence, -1)
        surest = confidence.argmax()
        write = where & ((confidence >= sampler.threshold) | (np.arange(len(row)) == surest))
        if sampler.factor is not None:
            ranked, left = np.argsort(-confidence, kind="stable"), int(where.sum())
            passed = 1
            while passed < left and confidence[ranked[passed]] >= 1 - sampler.factor / (passed + 2):
                passed += 1
            write = np.isin(np.arange(len(row)), ranked[: left if passed == left - 1 else passed])
        row = np.where(write, tokens, row)

    align = lambda logits: np.concatenate([logits[:1], logits[:-1]]) if shift else logits  # noqa: E731
    for first in range(len(prompt), len(row), sampler.block_length):
        inside = (np.arange(len(row)) >= first) & (np.arange(len(row)) < first + sampler.block_length)
        out = read(jnp.asarray(row), ())
        passes += 1
        commit(align(np.asarray(out.logits[0])), (np.arange(len(row)) == first) if shift else inside & (row == 3))
        frozen = tuple(
            Edit("set", f"{name}@{layer}", out.taps[name][layer], positions=jnp.asarray(~inside)[None])
            for name in "kv" for layer in range(model.config.n_layers)
        )  # fmt: skip
        while (inside & (row == 3)).any():
            logits = np.asarray(read(jnp.asarray(row), frozen).logits[0])
            passes += 1
            commit(align(logits), inside & (row == 3))
    return row, passes


@pytest.mark.some(1)
@pytest.mark.parametrize("shift, factor", [(False, 1.2), (True, None)])
def test_dual_cache_is_the_published_approximation(tiny, shift, factor):
    model, params = tiny.network("bidirectional", shift=shift, seed=1)
    sampler = ParallelSampler(12, 4, threshold=0.5, factor=factor, cache="dual")
    prompt = tiny.prompts(4, 6, seed=2)
    trace = generate(model, params, prompt, sampler)
    exact = generate(model, params, prompt, dataclasses.replace(sampler, cache="none"))
    passes = []
    for row in range(4):
        tokens, ran = reference_dual(model, params, np.asarray(prompt[row]), sampler, shift)
        passes.append(ran)
        np.testing.assert_array_equal(trace.tokens[row], tokens)
        alone = generate(model, params, prompt[row : row + 1], sampler)
        np.testing.assert_array_equal(alone.tokens[0], tokens)
        assert int(alone.forwards) == ran
    assert max(passes) <= int(trace.forwards) <= 12
    assert trace.approximate and not exact.approximate
    assert (np.asarray(trace.tokens) != np.asarray(exact.tokens)).any()  # the approximation is seen here


def test_dual_cache_without_anything_outside_the_block_is_exact(tiny):
    model, params = tiny.network("bidirectional", shift=False, positions="learned")  # rotary ones leave masks alone among themselves equal
    sampler = ParallelSampler(8, 8, threshold=0.5)
    empty = jnp.zeros((3, 0), jnp.int32)
    edit = Edit("add", "resid_post@0", jax.random.normal(jax.random.key(5), (16,)), strength=jnp.array([0.0, 1.0, 3.0]), positions="masked")
    plain, dual = (
        generate(model, params, empty, dataclasses.replace(sampler, cache=cache), edits=(edit,), collect=("z@1",))
        for cache in ("none", "dual")
    )
    assert_same(plain, dual)
    np.testing.assert_allclose(plain.taps["z"][1], dual.taps["z"][1], atol=2e-5)


@pytest.mark.some(1)
@pytest.mark.parametrize("given", [0, 3])
def test_a_block_cache_without_a_block_to_begin_with(tiny, given):
    model, params = tiny.network("block_causal", shift=False, block_length=4, positions="learned")
    prompt, sampler = tiny.prompts(2, given), ParallelSampler(10, 4, 0.5)
    plain = generate(model, params, prompt, sampler)
    cached = generate(model, params, prompt, dataclasses.replace(sampler, cache="blocks"), collect=("resid_post@0",))
    np.testing.assert_array_equal(plain.tokens, cached.tokens)
    assert not np.asarray(cached.taps["resid_post"][0][0, :, 4:]).any()  # nothing is read past the first block


def test_one_program_for_all_prompts_and_edits(tiny):
    model, params = tiny.network("block_causal", shift=False, block_length=4)
    sampler = ParallelSampler(6, 4, cache="blocks", temperature=1.0)
    before = _loop._cache_size()
    for seed in range(3):
        edit = Edit("add", f"resid_post@{seed % 2}", jnp.full(16, float(seed)), strength=seed, positions="masked")
        generate(model, params, tiny.prompts(2, 5, seed), sampler, key=jax.random.key(seed), edits=(edit,))
    assert _loop._cache_size() == before + 1


def test_mistakes_are_named(tiny):
    causal, block = tiny.network("bidirectional", shift=False), tiny.network("block_causal", shift=False, block_length=4)
    for (model, params), sampler, word in [
        (causal, ParallelSampler(8, 4, cache="blocks"), "'dual'"),
        (block, ParallelSampler(8, 4, cache="dual"), "'blocks'"),
        (block, ParallelSampler(8, 3, cache="blocks"), "must divide"),
    ]:
        with pytest.raises(UserError, match=word):
            generate(model, params, tiny.prompts(1, 4), sampler)
    with pytest.raises(UserError, match="multiple of 4"):
        ParallelSampler(9, 4, cache="dual")
    with pytest.raises(UserError, match="holds masks"):
        generate(*causal, tiny.prompts(1, 4).at[0, 2].set(3), ParallelSampler(8, 4, cache="dual"))
    held = Edit("set", "attn_pattern@0", jnp.ones((1, 4, 12, 12)) / 12)
    with pytest.raises(UserError, match="attn_pattern"):
        generate(*causal, tiny.prompts(1, 4), ParallelSampler(8, 4, cache="dual"), edits=(held,))


def test_a_block_cache_says_which_edits_make_it_approximate(tiny):
    """Fixed edits and those of unknown tokens give what the whole text gives; what moves or is scheduled is flagged."""
    model, params = tiny.network("block_causal", shift=True, block_length=4)
    prompt, keep = tiny.prompts(3, 6), jnp.arange(6)[None] >= jnp.array([[0], [1], [4]])
    direction = lambda seed: jax.random.normal(jax.random.key(seed), (16,))  # noqa: E731
    run = lambda cache, *edits: generate(  # noqa: E731
        model, params, prompt, ParallelSampler(8, 4, 0.5, steps=11, cache=cache), attention_mask=keep, edits=edits
    )
    exact = (
        Edit("add", "resid_post@0", direction(1), strength=2.0, positions="masked"),
        Edit("add", "resid_post@0", direction(2), positions="response"),
        Edit("scale", "attn_pattern@1", 0.5),
    )
    plain, cached = run("none", *exact), run("blocks", *exact)
    np.testing.assert_array_equal(cached.tokens, plain.tokens)
    np.testing.assert_allclose(cached.confidence, plain.confidence, atol=2e-5)
    assert (np.asarray(plain.tokens) != np.asarray(run("none").tokens)).any() and not cached.approximate
    for moving in (
        {"schedule": np.linspace(0, 3, 11)},
        {"positions": "just_committed"},
        {"positions": "masked_prev"},
        {"positions": "masked", "schedule": np.ones(11)},
    ):
        edit = Edit("add", "resid_post@0", direction(1), **moving)
        assert _shape_of_run(model, params, prompt, edit).approximate, moving
    assert _shape_of_run(model, params, prompt, Edit("add", "attn_pattern@0", 0.1)).approximate


def _shape_of_run(model, params, prompt, *edits):
    """The trace's shapes and what it says of itself; nothing is compiled."""
    return jax.eval_shape(lambda: generate(model, params, prompt, ParallelSampler(8, 4, steps=11, cache="blocks"), edits=edits))


def test_edits_of_patterns_under_a_cache(tiny):
    """Keys that are not written yet count in a pattern: only a factor is the same with and without them."""
    assert readers.cuts(Edit("scale", "attn_pattern@0", 0.5))
    for kind, value in (("add", 0.1), ("set", 0.1), ("scale", jnp.full(7, 0.5)), ("set", jnp.ones((7, 7)) / 7)):
        assert not readers.cuts(Edit(kind, "attn_pattern@0", value)), (kind, value)
    block, weights = tiny.network("block_causal", shift=False, block_length=4)
    held = Edit("set", "attn_pattern@0", jnp.ones(7) / 7)
    with pytest.raises(UserError, match="attn_pattern with an array"):
        generate(block, weights, tiny.prompts(1, 4), ParallelSampler(3, 4, cache="blocks"), edits=(held,))


def test_an_autoregressive_step_does_not_copy_the_cache(tiny):
    """Four layers, 512 columns: room for keys and for values, for one layer of each, for the history; a copy would need two more."""
    config = dataclasses.replace(tiny.config, n_layers=4, n_heads=1, n_kv_heads=1, head_dim=512, max_positions=512)
    model = Transformer(config)
    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    tokens, key = jax.ShapeDtypeStruct((2, 512), jnp.int32), jax.eval_shape(lambda: jax.random.key(0))
    program = _loop.lower(model, ARSampler(504, stop_ids=()), Collect(()), 8, False, params, tokens, key, None, ())
    keys = 4 * 2 * 512 * config.n_kv_heads * config.head_dim * 4
    assert 2 <= program.compile().memory_analysis().temp_size_in_bytes / keys < 4


def test_stops_with_a_cache(tiny):
    """Rows of different lengths, two tokens that end them: what is written and collected before is as it is without an end."""
    model, params = tiny.network("causal")
    prompt, keep = tiny.prompts(3, 6), jnp.arange(6)[None] >= jnp.array([[0], [3], [5]])
    run = lambda stops: generate(  # noqa: E731
        model, params, prompt, ARSampler(9, stop_ids=stops), attention_mask=keep, collect=("z@1", "resid_post@0")
    )
    plain = run(())
    said = np.asarray(plain.tokens)[:, 6:]
    stops = (int(said[0, 5]), int(said[1, 2]))
    trace = run(stops)
    hits = np.isin(said, stops)
    length = np.where(hits.any(axis=1), hits.argmax(axis=1) + 1, 9)
    assert len(set(length)) > 1
    written = np.arange(9) < length[:, None]
    np.testing.assert_array_equal(trace.tokens[:, 6:], np.where(written, said, 2))
    np.testing.assert_array_equal(trace.commit_step[:, 6:], np.where(written, np.arange(9), 9))
    ran = int(trace.forwards)
    assert ran == length.max()
    for name, layer in (("z", 1), ("resid_post", 0)):
        tap, whole = np.asarray(trace.taps[name][layer]), np.asarray(plain.taps[name][layer])
        assert tap[:ran].any(axis=tuple(range(1, tap.ndim))).all() and not tap[ran:].any()
        for row, end in enumerate(length):
            np.testing.assert_allclose(tap[:end, row], whole[:end, row], atol=2e-5)


@pytest.mark.some(1)
@pytest.mark.parametrize("cache, attention", [("dual", "bidirectional"), ("blocks", "block_causal")])
def test_temperature_with_a_cache(tiny, cache, attention):
    model, params = tiny.network(attention, shift=True, block_length=4 if cache == "blocks" else None)
    sampler = ParallelSampler(8, 4, 0.5, temperature=0.8, steps=24, cache=cache)
    draw = lambda seed: np.asarray(generate(model, params, tiny.prompts(3, 5), sampler, key=jax.random.key(seed)).tokens)  # noqa: E731
    first = draw(0)
    np.testing.assert_array_equal(first, draw(0))
    assert (first != 3).all() and (first != draw(1)).any()


def test_a_block_cache_under_jit(tiny):
    """A traced prompt may hold masks: those before the block in which it ends are left alone, and hold nothing back."""
    model, params = tiny.network("block_causal", shift=False, block_length=4)
    sampler, prompt = ParallelSampler(6, 4, 0.5, cache="blocks"), tiny.prompts(2, 6)
    jitted = jax.jit(lambda prompt: generate(model, params, prompt, sampler))
    eager = generate(model, params, prompt, sampler)
    np.testing.assert_array_equal(jitted(prompt).history, eager.history)
    tokens = np.asarray(jitted(prompt.at[0, 1].set(3).at[1, 5].set(3)).tokens)
    assert tokens[0, 1] == 3 and (np.delete(tokens.reshape(-1), 1) != 3).all()


def test_more_text_than_the_context_is_named(tiny):
    """With a cache no single pass is too long: the whole has to be."""
    model, params = tiny.network("causal", positions="learned")
    with pytest.raises(UserError, match="more than this model's context of 64"):
        generate(model, params, tiny.prompts(1, 60), ARSampler(5, stop_ids=()))
