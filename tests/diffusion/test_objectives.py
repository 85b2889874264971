"""Losses against closed forms and a plain float64 reference."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlmscope_jax.diffusion import align_logits, corrupt, diffusion_loss, elbo, head_loss, next_token_loss, token_loss, training_rates
from dlmscope_jax.errors import UserError
from dlmscope_jax.models import DiffusionSpec, Head, ModelOutput


def _dense(head, hidden, targets):
    """Cross-entropy in float64, [V, D] head."""
    logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64).T
    logits -= logits.max(-1, keepdims=True)
    return np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, np.asarray(targets)[..., None], -1)[..., 0]


@pytest.mark.parametrize("chunk", [None, 1, 7, 10, 36, 37, 100])
def test_head_loss_is_the_same_however_it_is_cut(chunk):
    keys = jax.random.split(jax.random.key(0), 3)
    head, hidden = 4 * jax.random.normal(keys[0], (37, 5)), jax.random.normal(keys[1], (2, 20, 5))
    targets = jax.random.randint(keys[2], (2, 20), 0, 37).at[0, 0].set(36).at[0, 1].set(0)
    np.testing.assert_allclose(head_loss(Head(head), hidden, targets, chunk), _dense(head, hidden, targets), atol=2e-5)


def test_head_loss_gradient_is_softmax_minus_one():
    keys = jax.random.split(jax.random.key(1), 3)
    head, hidden = jax.random.normal(keys[0], (37, 5)), jax.random.normal(keys[1], (20, 5))
    targets = jax.random.randint(keys[2], (20,), 0, 37)
    d_head, d_hidden = jax.grad(lambda w, h: head_loss(Head(w), h, targets, 10).sum(), argnums=(0, 1))(head, hidden)
    logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64).T
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True) - np.eye(37)[np.asarray(targets)]
    np.testing.assert_allclose(d_head, p.T @ np.asarray(hidden), atol=1e-5)
    np.testing.assert_allclose(d_hidden, p @ np.asarray(head), atol=1e-5)


def test_chunked_loss_never_holds_all_logits():
    """[rows, V] does not occur in the compiled program, forward and backward, where the vocabulary is cut."""
    head, hidden, targets = jnp.zeros((9001, 4)), jnp.zeros((123, 4)), jnp.zeros(123, jnp.int32)
    grad = jax.grad(lambda w, h: head_loss(Head(w), h, targets).sum(), argnums=(0, 1))
    text = jax.jit(grad).lower(head, hidden).as_text()
    assert "123x8192xf32" in text and "123x9001x" not in text
    assert "123x9001x" in jax.jit(lambda w, h: head_loss(Head(w), h, targets, 9001)).lower(head, hidden).as_text()


def test_bfloat16_is_scored_in_float32():
    hidden = jax.random.normal(jax.random.key(0), (6, 8)).astype(jnp.bfloat16)
    head = jax.random.normal(jax.random.key(1), (50, 8)).astype(jnp.bfloat16)
    loss = head_loss(Head(head), hidden, jnp.arange(6))
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, _dense(head, hidden, np.arange(6)), atol=1e-5)


@pytest.mark.parametrize("kind", ["llada", "dream", "ar"])
def test_token_loss_scores_token_i_at_i(stubs, kind):
    model = getattr(stubs, kind)
    tokens = jax.random.randint(jax.random.key(0), (3, 12), 4, 23)
    targets = jax.random.randint(jax.random.key(1), (3, 12), 4, 23)
    mask = jax.random.bernoulli(jax.random.key(2), 0.6, (3, 12)).at[:, 0].set(True)
    loss = np.asarray(token_loss(model, model.params, tokens, targets, mask))
    raw = np.asarray(model.apply(model.params, tokens).logits, np.float64)
    log_p = raw - np.log(np.exp(raw).sum(-1, keepdims=True))
    expected = np.zeros((3, 12))
    for b, i in itertools.product(range(3), range(12)):
        source = i if kind == "llada" else i - 1
        if mask[b, i] and source >= 0:
            expected[b, i] = -log_p[b, source, targets[b, i]]
    np.testing.assert_allclose(loss, expected, atol=1e-5)

    aligned, valid = align_logits(jnp.asarray(raw), model)
    assert valid.tolist() == [kind == "llada"] + [True] * 11
    np.testing.assert_array_equal(aligned[:, 1:], raw[:, 1:] if kind == "llada" else raw[:, :-1])


def test_diffusion_loss_is_lladas(stubs):
    """sum(CE / p) / (B L), with the rates and masks that the key gives."""
    for model in (stubs.llada, stubs.dream):
        tokens = jax.random.randint(jax.random.key(0), (4, 10), 4, 23)
        key = jax.random.key(7)
        training = jax.value_and_grad(diffusion_loss, argnums=1, has_aux=True)
        (loss, parts), grads = training(model, model.params, tokens, key)
        rate_key, mask_key = jax.random.split(key)
        rate = np.asarray(training_rates(rate_key, 4, model.diffusion))
        corrupted, is_masked = corrupt(mask_key, tokens, rate, model.diffusion)
        each = np.asarray(token_loss(model, model.params, corrupted, tokens, is_masked))
        np.testing.assert_allclose(loss, (each / rate[:, None]).sum() / 40, rtol=1e-5)
        np.testing.assert_allclose(parts["masked_ce"], each.sum() / is_masked.sum(), rtol=1e-5)
        assert all(np.isfinite(g).all() and np.abs(g).max() > 0 for g in jax.tree.leaves(grads))


def test_padding_is_neither_masked_nor_counted(stubs):
    model, tokens = stubs.dream, jax.random.randint(jax.random.key(0), (2, 12), 4, 23)
    real = jnp.arange(12)[None] >= jnp.array([[0], [5]])
    key = jax.random.key(1)
    for loss in (lambda t: diffusion_loss(model, model.params, t, key, attention_mask=real)[0],
                 lambda t: elbo(model, model.params, t, key, attention_mask=real)):  # fmt: skip
        np.testing.assert_allclose(loss(tokens), loss(jnp.where(real, tokens, 9)), rtol=1e-6)


def test_next_token_loss(stubs):
    model, tokens = stubs.ar, jax.random.randint(jax.random.key(0), (2, 9), 4, 23)
    raw = np.asarray(model.apply(model.params, tokens).logits, np.float64)
    log_p = raw - np.log(np.exp(raw).sum(-1, keepdims=True))
    each = -np.take_along_axis(log_p[:, :-1], np.asarray(tokens)[:, 1:, None], -1)[..., 0]
    loss, parts = next_token_loss(model, model.params, tokens)
    np.testing.assert_allclose(loss, each.mean(), rtol=1e-5)
    assert parts["scored"] == 16
    real = jnp.arange(9)[None] >= jnp.array([[0], [4]])
    assert next_token_loss(model, model.params, tokens, attention_mask=real)[1]["scored"] == 8 + 4


class Categorical:
    """Tokens are drawn independently; each position knows that, and nothing else."""

    def __init__(self, shift):
        self.diffusion = DiffusionSpec(0, shift=shift)
        self.p = np.array([0.0, 0.5, 0.3, 0.2])

    def output_head(self, params):
        return Head(params[:, None])

    def apply(self, params, tokens, attention_mask=None, logits=False, collect=(), edits=()):
        return ModelOutput(logits=None, taps={"final_norm": {1: jnp.ones((*tokens.shape, 1))}})


@pytest.mark.parametrize("shift", [False, True])
def test_elbo_of_independent_tokens_is_their_entropy(shift):
    """The bound is tight for an independent model: every estimate has the row's NLL as its mean, here in closed form."""
    model = Categorical(shift)
    log_p = jnp.asarray(np.log(model.p + 1e-30), jnp.float32)
    rows, length = 40, 33
    tokens = jnp.asarray(np.random.default_rng(0).choice(4, size=(rows, length), p=model.p).astype(np.int32))
    exact = -np.asarray(log_p)[np.asarray(tokens)[:, 1:]].mean(axis=1)
    estimates = np.asarray(jax.vmap(lambda key: elbo(model, log_p, tokens, key, samples=4))(jax.random.split(jax.random.key(0), 200)))
    error = estimates.mean(axis=0) - exact
    assert np.abs(error / (estimates.std(axis=0) / np.sqrt(200))).max() < 4.5
    assert abs(error.mean()) < 0.004


def test_elbo_is_the_mean_over_all_orders(stubs):
    """On a short row the bound can be summed over every set of masks; it is above the NLL of any one factorisation's mean."""
    model = stubs.llada
    tokens = jnp.array([[5, 11, 7, 19]], jnp.int32)
    total = 0.0
    for count in (1, 2, 3):
        sets = list(itertools.combinations((1, 2, 3), count))
        for chosen in sets:
            mask = jnp.zeros((1, 4), bool).at[0, jnp.array(chosen)].set(True)
            each = token_loss(model, model.params, jnp.where(mask, 3, tokens), tokens, mask)
            total += float(each.sum()) / count / len(sets) / 3
    keys = jax.random.split(jax.random.key(0), 400)
    estimates = np.asarray(jax.jit(jax.vmap(lambda key: elbo(model, model.params, tokens, key, samples=3)))(keys))[:, 0]
    assert abs(estimates.mean() - total) < 4 * estimates.std() / 20
    # with a prompt of two, one order of one or two tokens is left
    prompt = jnp.array([[True, True, False, False]])
    assert np.isfinite(elbo(model, model.params, tokens, keys[0], protect=prompt)).all()


def test_mistakes(stubs):
    tokens = jnp.ones((1, 4), jnp.int32)
    with pytest.raises(UserError, match="autoregressive"):
        diffusion_loss(stubs.ar, stubs.ar.params, tokens, jax.random.key(0))
    with pytest.raises(UserError, match="autoregressive"):
        elbo(stubs.ar, stubs.ar.params, tokens, jax.random.key(0))
    with pytest.raises(UserError, match="diffusion model"):
        next_token_loss(stubs.dream, stubs.dream.params, tokens)
