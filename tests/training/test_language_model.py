"""The language-model trainer: order of tokens, accumulation, resumption, and that both objectives learn."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlmscope_jax.errors import UserError
from dlmscope_jax.models import DiffusionSpec, ModelConfig, Transformer, init_params
from dlmscope_jax.training import language_model as lm

SHAPE = ModelConfig(
    family="llama", vocab_size=12, d_model=16, n_layers=1, n_heads=2, n_kv_heads=2, head_dim=8, d_mlp=24, norm_eps=1e-5, rope_theta=100.0,
    max_positions=16, attention="causal",
)  # fmt: skip
AR = Transformer(SHAPE)
DLM = Transformer(dataclasses.replace(SHAPE, attention="bidirectional"), DiffusionSpec(mask_id=3, shift=False))


def cyclic(n: int, length: int = 16) -> np.ndarray:
    """Sequences that count upwards modulo 8 from a random start: one neighbour tells a token exactly."""
    start = np.random.default_rng(0).integers(0, 8, (n, 1))
    return (4 + (start + np.arange(length)) % 8).astype(np.int32)


def run(model, spec, state, tokens, first, last):
    step = lm.make_language_model_step(model, spec)
    keep = np.ones(tokens.shape, bool)
    losses = []
    for i in range(first, last):
        rows = lm.batch_rows(spec, i, len(tokens))
        state, metrics = step(state, tokens[rows], keep[rows])
        losses.append(float(metrics["loss"]))
    return state, losses


def test_batches_are_permutations_of_an_epoch_and_pure():
    spec = lm.LanguageModelSpec(steps=20, batch_size=4, micro_batch=2, seed=5)
    epoch = np.concatenate([lm.batch_rows(spec, i, 22) for i in range(5)])
    assert len(set(epoch)) == 20
    np.testing.assert_array_equal(lm.batch_rows(spec, 7, 22), lm.batch_rows(spec, 7, 22))
    assert set(lm.batch_rows(spec, 0, 22)) != set(lm.batch_rows(spec, 5, 22))
    with pytest.raises(UserError, match="3 blocks are fewer"):
        lm.batch_rows(spec, 0, 3)


def test_accumulation_equals_one_pass():
    tokens = cyclic(8)
    states = []
    for micro in (2, 8):
        spec = lm.LanguageModelSpec(steps=10, batch_size=8, micro_batch=micro)
        state = lm.init_language_model(spec, init_params(AR, jax.random.key(0)))
        states.append(run(AR, spec, state, tokens, 0, 2)[0].params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), *states)


def test_resumed_equals_uninterrupted():
    tokens = cyclic(16)
    spec = lm.LanguageModelSpec(steps=6, batch_size=4, micro_batch=4)
    fresh = lambda: lm.init_language_model(spec, init_params(DLM, jax.random.key(0)))  # noqa: E731
    whole, _ = run(DLM, spec, fresh(), tokens, 0, 6)
    half, _ = run(DLM, spec, fresh(), tokens, 0, 3)
    half = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), half)  # through the host, as a checkpoint goes
    resumed, _ = run(DLM, spec, half, tokens, 3, 6)
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)


@pytest.mark.some(1)
@pytest.mark.parametrize("model", [AR, DLM], ids=["next token", "masked diffusion"])
def test_learns_a_deterministic_language(model):
    tokens = cyclic(64)
    spec = lm.LanguageModelSpec(steps=150, batch_size=16, micro_batch=16, learning_rate=1e-2)
    state, losses = run(model, spec, lm.init_language_model(spec, init_params(model, jax.random.key(0))), tokens, 0, spec.steps)
    # the first token of a sequence (and a wholly masked one) cannot be known; the rest can
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:3])
    evaluate = lm.make_evaluation(model)
    again = [evaluate(state.params, tokens[:16], np.ones((16, 16), bool)) for _ in range(2)]
    assert again[0] == again[1] < 1.2


def test_norms_and_biases_do_not_decay():
    model = Transformer(dataclasses.replace(SHAPE, qkv_bias=True))
    spec = lm.LanguageModelSpec(steps=100, weight_decay=1.0, learning_rate=1e-2, warmup=0.0)
    params = jax.tree.map(jnp.ones_like, init_params(model, jax.random.key(0)))
    optimizer = lm.make_optimizer(spec)
    state = optimizer.init(params)
    for _ in range(3):
        updates, state = optimizer.update(jax.tree.map(jnp.zeros_like, params), state, params)
    blocks = updates["params"]["blocks"]
    assert (blocks["q"] < 0).all() and (updates["params"]["embed"] < 0).all()
    assert not blocks["attn_norm"].any() and not blocks["q_bias"].any() and not updates["params"]["final_norm"].any()


def test_micro_batch_must_divide():
    with pytest.raises(UserError, match="micro_batch 3"):
        lm.LanguageModelSpec(steps=1, batch_size=8, micro_batch=3)
