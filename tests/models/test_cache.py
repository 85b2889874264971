"""A forward pass over some tokens, with the others in a cache, is the forward pass over all of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import NETWORKS, random_network

from dlmscope_jax.errors import UserError

BATCH, LENGTH = 2, 12
CAUSAL = [name for name, config in NETWORKS.items() if config.attention == "causal"]
close = functools.partial(np.testing.assert_allclose, atol=2e-5, rtol=2e-5)


class Bench:
    """A network with its forward passes compiled, with and without a cache."""

    def __init__(self, name):
        self.model, self.params = random_network(NETWORKS[name])
        self.tokens = jax.random.randint(jax.random.key(7), (BATCH, LENGTH), 4, 97)
        self.plain = jax.jit(self.model.apply)
        self._step = jax.jit(lambda params, tokens, **k: (lambda out: (out.logits, out.cache))(self.model.apply(params, tokens, **k)))
        self.full = self.plain(self.params, self.tokens).logits

    def step(self, tokens, cache, start, **given):
        return self._step(self.params, tokens, cache=cache, start=jnp.broadcast_to(jnp.asarray(start, jnp.int32), (BATCH,)), **given)

    def by_chunks(self, tokens, chunks, cache=None):
        """Logits of all tokens, read in chunks one after the other."""
        cache, at, found = cache or self.model.init_cache(BATCH, LENGTH), 0, []
        for chunk in chunks:
            logits, cache = self.step(tokens[:, at : at + chunk], cache, at)
            found.append(logits)
            at += chunk
        assert at == LENGTH
        return jnp.concatenate(found, axis=1), cache


@functools.cache
def bench_of(name):
    return Bench(name)


@pytest.mark.some(3)
@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("chunks", [pytest.param((1,) * LENGTH, marks=pytest.mark.slow), (5, 1, 6)])
def test_causal_by_tokens_and_by_chunks(name, chunks):
    bench = bench_of(name)
    logits, cache = bench.by_chunks(bench.tokens, chunks)
    close(logits, bench.full)
    np.testing.assert_array_equal(cache.position, np.broadcast_to(np.arange(LENGTH), (BATCH, LENGTH)))


@pytest.mark.some(2)
@pytest.mark.parametrize("name", CAUSAL)
def test_rows_of_unequal_length(name):
    """Left padding in a first pass, then tokens one by one, against each row alone and without padding."""
    bench = bench_of(name)
    padding, prompt = jnp.array([3, 0]), 7
    kept = jnp.arange(LENGTH)[None] >= padding[:, None]
    ids = jnp.maximum(jnp.arange(LENGTH)[None] - padding[:, None], 0)
    cache = bench.model.init_cache(BATCH, LENGTH)
    first = {"attention_mask": kept[:, :prompt], "position_ids": ids[:, :prompt]}
    logits, cache = bench.step(bench.tokens[:, :prompt], cache, 0, **first)
    found = [logits]
    for i in range(prompt, LENGTH):
        logits, cache = bench.step(bench.tokens[:, i : i + 1], cache, i, position_ids=ids[:, i : i + 1])
        found.append(logits)
    found = jnp.concatenate(found, axis=1)
    np.testing.assert_array_equal(cache.position, jnp.where(kept, ids, -1))
    for row, hidden in enumerate(padding.tolist()):
        alone = bench.model.apply(bench.params, bench.tokens[row : row + 1, hidden:]).logits
        close(found[row, hidden:], alone[0])


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "qwen3"])
def test_rows_that_start_at_different_columns(name):
    """Right-padded prompts: each row goes on where its own prompt ends, over what padding left there."""
    bench = bench_of(name)
    lengths, prompt = jnp.array([4, 7]), 7
    cache = bench.model.init_cache(BATCH, LENGTH)
    kept = jnp.arange(prompt)[None] < lengths[:, None]
    _, cache = bench.step(bench.tokens[:, :prompt], cache, 0, attention_mask=kept)
    for i in range(5):
        own = jnp.take_along_axis(bench.tokens, lengths[:, None] + i, axis=1)
        logits, cache = bench.step(own, cache, lengths + i)  # positions follow from the columns
        close(logits[:, 0], jnp.take_along_axis(bench.full, (lengths + i)[:, None, None], axis=1)[:, 0])


def test_blocks_one_by_one_are_exact():
    bench = bench_of("blocks")
    close(bench.by_chunks(bench.tokens, (4, 4, 4))[0], bench.full)
    close(bench.by_chunks(bench.tokens, (8, 4))[0], bench.full)


def test_a_block_is_read_again_until_it_is_done():
    """What a block's unfinished readings left in the cache is overwritten, and blocks before it do not change."""
    bench = bench_of("blocks")
    _, cache = bench.step(bench.tokens[:, :4], bench.model.init_cache(BATCH, LENGTH), 0)
    for _ in range(2):
        _, cache = bench.step(jnp.full((BATCH, 4), 3), cache, 4)
    logits, cache = bench.step(bench.tokens[:, 4:8], cache, 4)
    close(logits, bench.full[:, 4:8])
    close(bench.step(bench.tokens[:, 8:], cache, 8)[0], bench.full[:, 8:])


@pytest.mark.some(1)
@pytest.mark.parametrize("name", ["mdlm", "dream"])
def test_bidirectional_window_between_what_was_read_before(name):
    """Fast-dLLM's dual cache: one pass over everything, then a window in the middle, exact while nothing changed."""
    bench = bench_of(name)
    logits, cache = bench.step(bench.tokens, bench.model.init_cache(BATCH, LENGTH), 0)
    close(logits, bench.full)
    window, cache = bench.step(bench.tokens[:, 4:9], cache, 4)
    close(window, bench.full[:, 4:9])
    changed = bench.tokens.at[:, 4:9].set(5)
    approximate, _ = bench.step(changed[:, 4:9], cache, 4)
    exact = bench.plain(bench.params, changed).logits[:, 4:9]
    assert jnp.abs(approximate - bench.full[:, 4:9]).max() > 0.05 and jnp.abs(approximate - exact).max() > 1e-3


def test_padding_of_a_bidirectional_prompt_is_not_seen():
    bench = bench_of("mdlm")
    kept = jnp.ones((BATCH, LENGTH), bool).at[0, :3].set(False)
    ids = jnp.maximum(jnp.cumsum(kept, axis=1) - 1, 0)
    cache = bench.model.init_cache(BATCH, LENGTH)
    logits, cache = bench.step(bench.tokens, cache, 0, attention_mask=kept, position_ids=ids)
    close(logits[0, 3:], bench.model.apply(bench.params, bench.tokens[:1, 3:]).logits[0])
    window, _ = bench.step(bench.tokens[:, 6:9], cache, 6, position_ids=ids[:, 6:9])
    close(window, logits[:, 6:9])


def test_what_is_not_written_is_not_seen():
    """A cache longer than the text, and whatever numbers are in its unwritten part."""
    bench = bench_of("mdlm")
    cache = bench.model.init_cache(BATCH, LENGTH + 5)
    cache = cache.replace(k=jnp.full_like(cache.k, 3.0), v=jnp.full_like(cache.v, 1e3))
    logits, cache = bench.step(bench.tokens, cache, 2, position_ids=jnp.broadcast_to(jnp.arange(LENGTH), (BATCH, LENGTH)))
    close(logits, bench.full)
    assert (cache.position[:, :2] == -1).all() and (cache.position[:, 2 + LENGTH :] == -1).all()


def test_a_cache_in_bfloat16():
    bench = bench_of("llama")
    empty = bench.model.init_cache(BATCH, LENGTH, jnp.bfloat16)
    logits, cache = bench.by_chunks(bench.tokens, (6, 6), empty)
    assert cache.k.dtype == cache.v.dtype == jnp.bfloat16 and logits.dtype == jnp.float32
    error = jnp.abs(logits - bench.full).max() / jnp.abs(bench.full).max()
    assert 1e-5 < error < 2e-2  # rounded, and no more than that
    model, params = random_network(NETWORKS["llama"], jnp.bfloat16)
    assert model.init_cache(BATCH, LENGTH).k.dtype == jnp.bfloat16
    out = model.apply(params, bench.tokens, cache=model.init_cache(BATCH, LENGTH), start=jnp.zeros(BATCH, jnp.int32))
    close(out.logits.astype(jnp.float32), model.apply(params, bench.tokens).logits.astype(jnp.float32), atol=0.1)


def test_patterns_over_a_cache():
    """[B, N, W, S]: the window's queries, the cache's keys."""
    bench = bench_of("qwen3")
    whole = bench.model.apply(bench.params, bench.tokens, logits=False, collect=("attn_pattern@1", "z@1")).taps
    _, cache = bench.step(bench.tokens[:, :8], bench.model.init_cache(BATCH, LENGTH), 0)
    start = jnp.full(BATCH, 8, jnp.int32)
    part = bench.model.apply(
        bench.params, bench.tokens[:, 8:], logits=False, collect=("attn_pattern@1", "z@1"), cache=cache, start=start
    ).taps
    close(part["attn_pattern"][1], whole["attn_pattern"][1][:, :, 8:])
    close(part["z"][1], whole["z"][1][:, 8:])


def test_a_pass_that_stops_early_fills_the_layers_that_it_ran():
    bench = bench_of("llama")
    start = jnp.zeros(BATCH, jnp.int32)
    given = {"cache": bench.model.init_cache(BATCH, LENGTH), "start": start}
    part = bench.model.apply(bench.params, bench.tokens, logits=False, collect=("resid_post@0",), **given).cache
    whole = bench.model.apply(bench.params, bench.tokens, **given).cache
    close(part.k[0], whole.k[0])
    assert not part.k[1:].any() and whole.k[1:].any()


def test_mistakes_are_named():
    bench = bench_of("llama")
    cache, start = bench.model.init_cache(BATCH, 8), jnp.zeros(BATCH, jnp.int32)
    with pytest.raises(UserError, match="a cache needs start"):
        bench.model.apply(bench.params, bench.tokens, cache=cache)
    with pytest.raises(UserError, match="12 tokens do not fit in a cache of 8"):
        bench.model.apply(bench.params, bench.tokens, cache=cache, start=start)
    with pytest.raises(UserError, match="start needs a cache"):
        bench.model.apply(bench.params, bench.tokens, start=start)
