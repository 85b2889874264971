"""Batches of prompts of different lengths, when generation stops, what is compiled anew, and how much memory a trace takes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlmscope_jax.diffusion import (
    ARSampler,
    Collect,
    DiffuGPTSampler,
    DreamSampler,
    LLaDASampler,
    MDLMSampler,
    ParallelSampler,
    generate,
)
from dlmscope_jax.diffusion.generate import _loop
from dlmscope_jax.models import DiffusionSpec, Edit, ModelConfig, Transformer, init_params

PROMPT = jnp.asarray(np.random.default_rng(0).integers(4, 23, size=(3, 6)), jnp.int32)
GPT2 = {"norm": "layer", "norm_bias": True, "positions": "learned", "gated": False, "activation": "gelu_tanh"}
MODELS = {
    "llada": ("bidirectional", False, {}),
    "dream": ("bidirectional", True, {}),
    "gpt2": ("causal", None, GPT2),
    "diffugpt": ("bidirectional", True, GPT2),
    "mdlm": ("bidirectional", False, GPT2),
    "sdar": ("block_causal", False, {"block_length": 4}),
    "fast_dllm_v2": ("block_causal", True, {"block_length": 4}),
}


@pytest.fixture(scope="module")
def network(tiny):
    """A tiny transformer of a family, or one that is built like another."""

    def make(family, like=None):
        attention, shift, changes = MODELS[like or family]
        return tiny.network(attention, shift, family=family, **changes)

    return make


@pytest.mark.some(3)
@pytest.mark.parametrize(
    "family, sampler",
    [
        ("llada", ParallelSampler(8, 4, threshold=0.5)),
        ("dream", ParallelSampler(8, 4, factor=1.2)),
        ("gpt2", ARSampler(6)),
        ("diffugpt", DreamSampler(6, 8, "entropy")),
        ("diffugpt", ParallelSampler(8, 4, factor=1.2, cache="dual")),
        ("sdar", ParallelSampler(8, 4, threshold=0.5)),
        ("fast_dllm_v2", ParallelSampler(8, 2, threshold=0.5)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_padded_rows_equal_rows_alone(network, family, sampler):
    """Learned positions and the blocks of block-causal attention count from a row's first real token."""
    model, params = network(family)
    keep = jnp.arange(6)[None] >= jnp.array([[0], [3], [5]])
    together = generate(model, params, jnp.where(keep, PROMPT, 2), sampler, attention_mask=keep)
    alone = generate(model, params, PROMPT[1:2, 3:], sampler)
    np.testing.assert_array_equal(together.history[:, 1, 3:], alone.history[:, 0])
    np.testing.assert_array_equal(together.commit_step[1, 3:], alone.commit_step[0])
    np.testing.assert_allclose(together.confidence[1, 3:], alone.confidence[0], atol=2e-5)


@pytest.mark.some(1)
@pytest.mark.parametrize("family, sampler", [("mdlm", MDLMSampler(4, 8)), ("diffugpt", DiffuGPTSampler(4, 8))], ids=["mdlm", "diffugpt"])
def test_more_padding_changes_nothing(network, family, sampler):
    """For samplers that draw: the draws are those of as many rows and new tokens, however far the prompts are padded."""
    model, params = network(family)
    keep = jnp.arange(6)[None] >= jnp.array([[0], [3], [5]])
    narrow = generate(model, params, jnp.where(keep, PROMPT, 2), sampler, key=jax.random.key(4), attention_mask=keep)
    wide = lambda a, fill: jnp.pad(a, ((0, 0), (2, 0)), constant_values=fill)  # noqa: E731
    trace = generate(model, params, wide(jnp.where(keep, PROMPT, 2), 7), sampler, key=jax.random.key(4), attention_mask=wide(keep, False))
    np.testing.assert_array_equal(trace.history[:, :, 2:], narrow.history)
    np.testing.assert_array_equal(trace.commit_step[:, 2:], narrow.commit_step)
    np.testing.assert_allclose(trace.confidence[:, 2:], narrow.confidence, atol=2e-5)
    assert not (trace.tokens[:, 8:] == 3).any()


def test_llada_counts_padding(network):
    """Its own code knows no position ids: a padded row stands where it stands. Learned positions make it visible."""
    keep, sampler = jnp.arange(6)[None] >= jnp.array([[3]]), DreamSampler(6, 8, "entropy")
    for family, same in (("llada", False), ("diffugpt", True)):
        model, params = network(family, like="diffugpt")
        padded = generate(model, params, jnp.where(keep, PROMPT[:1], 2), sampler, attention_mask=keep)
        alone = generate(model, params, PROMPT[:1, 3:], sampler)
        assert (np.abs(padded.confidence[0, 6:] - alone.confidence[0, 3:]).max() < 2e-5) == same


STOPPING = [
    ("llada", LLaDASampler(12, 4, 2)),  # six steps for the two tokens of a block
    ("dream", DreamSampler(40, 8)),
    ("dream", DreamSampler(40, 8, "topk_margin")),  # never before the last step: that is its schedule
    ("llada", ParallelSampler(8, 4, threshold=0.3, steps=12)),
]


@pytest.mark.some(2)
@pytest.mark.parametrize("family, sampler", STOPPING, ids=lambda value: value if isinstance(value, str) else type(value).__name__)
def test_stops_when_every_row_is_done(network, family, sampler):
    model, params = network(family)
    trace = generate(model, params, PROMPT, sampler, key=jax.random.key(2), collect=("resid_post@1",))
    ran = int(trace.forwards)
    assert ran == 1 + int(np.asarray(trace.commit_step).max()) <= sampler.n_steps
    assert (ran < sampler.n_steps) == (getattr(sampler, "algorithm", "") != "topk_margin")
    assert (np.asarray(trace.history)[ran:] == np.asarray(trace.tokens)).all()
    assert trace.history.shape[0] == sampler.n_steps + 1 and not (trace.tokens == 3).any()
    taps = np.asarray(trace.taps["resid_post"][1])
    assert (taps[:ran] != 0).any(axis=(2, 3)).all() and (taps[ran:] == 0).all()


@pytest.mark.some(2)
@pytest.mark.parametrize(
    "family, sampler",
    [
        ("llada", LLaDASampler(4, 4, 4, temperature=0.5)),
        ("llada", MDLMSampler(4, 4)),
        ("dream", ParallelSampler(4, 2)),
        ("gpt2", ARSampler(3)),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_one_compilation_for_all_values(network, family, sampler):
    """Prompts, keys, padding, and an edit's value, layer, strength, schedule and mask are data."""
    model, params = network(family)
    before, results = _loop._cache_size(), []
    for i in range(3):
        keep = np.arange(6)[None] >= np.array([[i], [0], [2 * i]])
        edit = Edit(
            "add",
            f"resid_post@{i % 2}",
            np.full(16, i, np.float32),
            strength=float(i),
            schedule=np.linspace(i, 1, sampler.n_steps, dtype=np.float32),
            positions=np.arange(6 + sampler.length)[None] > i,
        )
        prompt = jnp.where(keep, PROMPT + i, 2)
        results.append(generate(model, params, prompt, sampler, key=jax.random.key(i), attention_mask=keep, edits=(edit,)).tokens)
    assert _loop._cache_size() == before + 1
    assert (results[0] != results[2]).any()


def test_a_trace_holds_only_what_was_chosen():
    """128 steps: what is compiled returns the chosen steps and positions, and needs no room for the others while it runs."""
    config = ModelConfig("llada", 40, 64, 2, 2, 1, 8, 32, 1e-5, 1e4, 256, "bidirectional", pad_id=2)
    model = Transformer(config, DiffusionSpec(3, shift=False))
    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    tokens, key = jax.ShapeDtypeStruct((4, 16 + 128), jnp.int32), jax.eval_shape(lambda: jax.random.key(0))

    def sizes(collect):
        program = _loop.lower(model, LLaDASampler(128, 128, 128), collect, 16, False, params, tokens, key, None, ())
        memory = program.compile().memory_analysis()
        return np.array([memory.output_size_in_bytes, memory.temp_size_in_bytes])

    nothing, site = sizes(Collect(())), ("resid_post@1",)
    one_step = 4 * 144 * 64 * 4
    output, room = sizes(Collect(site, steps=(0, 64, 127), positions=(3, 20))) - nothing
    assert 3 * 4 * 2 * 64 * 4 <= output < 3 * 4 * 2 * 64 * 4 + 64 and room < 4 * one_step
    output, room = sizes(Collect(site)) - nothing
    assert 128 * one_step <= output < 128 * one_step + 64 and room < 4 * one_step
