"""A small language model without layers, so that samplers and losses are tested apart from the transformer, and what
references of samplers share.
"""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlmscope_jax.models import DiffusionSpec, Head, ModelConfig, ModelOutput, Transformer, init_params
from dlmscope_jax.models.edits import apply_edits


class Stub:
    """Logits are a fixed smooth function of all visible tokens (of those before, when causal), so that no two tie.

    It speaks the language of ``Transformer``: one layer, the site ``resid_post@0``, a head, edits, a cache (of embeddings).
    ``traces`` counts how often it is traced.
    """

    def __init__(self, vocab: int = 23, length: int = 64, diffusion: DiffusionSpec | None = None, seed: int = 0):
        self.diffusion = diffusion
        attention = "bidirectional" if diffusion else "causal"
        self.config = ModelConfig("stub", vocab, 16, 1, 1, 1, 16, 16, 1e-5, 1e4, length, attention, pad_id=2)
        self.traces = 0
        keys = jax.random.split(jax.random.key(seed), 3)
        self.params = {
            "embed": jax.random.normal(keys[0], (vocab, 16)),
            "mix": jax.random.normal(keys[1], (2 * length,)),
            "head": 1.5 * jax.random.normal(keys[2], (vocab, 16)),
        }

    def read(self, tokens: np.ndarray, real: np.ndarray) -> np.ndarray:
        """Raw logits [T, V] of one row in NumPy, so that references need no JAX."""
        embed, mix, head = (np.asarray(self.params[name], np.float64) for name in ("embed", "mix", "head"))
        where = np.arange(len(tokens))
        weight = mix[where[:, None] - where[None] + len(mix) // 2]
        if self.diffusion is None:
            weight = np.tril(weight)
        return np.tanh(weight @ (embed[tokens] * real[:, None]) * len(tokens) ** -0.5) @ head.T

    def output_head(self, params):
        return Head(params["head"])

    def unembed(self, params, hidden):
        return hidden @ params["head"].T

    def init_cache(self, batch, length):
        return jnp.zeros((batch, length, 16))

    def apply(self, params, tokens, attention_mask=None, position_ids=None, logits=True, collect=(), edits=(), cache=None, start=None):
        self.traces += 1
        where = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape) + (0 if start is None else start[:, None])
        seen = params["embed"][tokens]
        if attention_mask is not None:
            seen = jnp.where(attention_mask[:, :, None], seen, 0.0)
        if cache is not None:
            seen = cache = cache.at[jnp.arange(len(tokens))[:, None], where].set(seen)
        apart = where[:, :, None] - jnp.arange(seen.shape[1])
        weight = params["mix"][apart + params["mix"].shape[0] // 2]
        if self.diffusion is None:
            weight = jnp.where(apart >= 0, weight, 0.0)
        x = jnp.tanh(jnp.einsum("bts,bsd->btd", weight, seen) * seen.shape[1] ** -0.5)
        x = apply_edits(edits, "resid_post", jnp.int32(0), x, {})
        taps = {"resid_post": {0: x}} if "resid_post@0" in collect else {}
        if "final_norm" in collect:
            taps["final_norm"] = {1: x}
        if logits is not False and logits is not True:
            x = jnp.take_along_axis(x, logits[:, :, None], axis=1)
        return ModelOutput(logits=None if logits is False else self.unembed(params, x), taps=taps, cache=cache)


MASK = 3


def softmax(logits):
    logits = np.asarray(logits, np.float64)
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def first_best(conf, n):
    """Indices of the n highest; ties resolve to the lowest index."""
    return sorted(range(len(conf)), key=lambda i: (-conf[i], i))[:n]


def nucleus(logits, top_p):
    """A row of logits with everything at -1e300 that is not needed for a probability above ``top_p``."""
    by_size = np.argsort(-logits, kind="stable")
    over = np.concatenate([[False], np.cumsum(softmax(logits)[by_size])[:-1] > top_p])
    kept = logits.copy()
    kept[by_size[over]] = -1e300
    return kept


def prompts(seed, rows, length, masks=0):
    """Prompts of different lengths, padded on the left, with the mask of real tokens; ``masks`` of them unknown."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(4, 23, size=(rows, length)).astype(np.int32)
    keep = np.arange(length)[None] >= rng.integers(0, length - 3, size=(rows, 1))
    keep[0] = True
    tokens = np.where(keep, tokens, 2).astype(np.int32)
    for row in range(rows):
        tokens[row, rng.choice(np.arange(length - 3, length), size=masks, replace=False)] = MASK
    return tokens, keep


def key(seed):
    """A key of a generator that compiles in half the time; a sampler is to work with any."""
    return jax.random.key(seed, impl="unsafe_rbg")


def gumbel(key, shape):
    return jax.random.gumbel(key, shape, mode="high")


@functools.cache
def _drawer(draw, shape):
    return jax.jit(lambda key: draw(key, shape))


def draws(draw, key, which, rows, first, steps, total, *rest):
    """What a sampler draws, [rows, S, T, ...]: ``fold_in(key, step)``, split into tokens (0) and order (1), or (None) not split."""
    drawn = np.zeros((rows, steps, total, *rest))
    for step in range(steps):
        folded = jax.random.fold_in(key, step)
        drawn[:, step, first:] = _drawer(draw, (rows, total - first, *rest))(folded if which is None else jax.random.split(folded)[which])
    return drawn


def compare(trace, row, reference):
    """A row of a trace with what a reference returns: tokens, history, steps of commits, confidences."""
    tokens, history, when, conf = reference
    np.testing.assert_array_equal(trace.history[:, row], history)
    np.testing.assert_array_equal(trace.tokens[row], tokens)
    np.testing.assert_array_equal(trace.commit_step[row], when)
    np.testing.assert_allclose(trace.confidence[row], conf, atol=2e-5)


def busy_steps(history, places=slice(None)):
    """How many steps of a trace read a text in which a mask was left at ``places``."""
    return int((np.asarray(history)[:-1, :, places] == MASK).any(axis=(1, 2)).sum())


@pytest.fixture(scope="session")
def ref() -> SimpleNamespace:
    """What references of samplers share; they work in float64, a row at a time, and know nothing of the package."""
    return SimpleNamespace(
        softmax=softmax, first_best=first_best, nucleus=nucleus, prompts=prompts, key=key, gumbel=gumbel, draws=draws, compare=compare,
        busy_steps=busy_steps,
    )  # fmt: skip


@dataclasses.dataclass
class Models:
    """One stub of each kind; mask id 3."""

    llada: Stub
    dream: Stub
    ar: Stub
    new: type[Stub] = Stub


@pytest.fixture(scope="session")
def stubs() -> Models:
    return Models(Stub(diffusion=DiffusionSpec(3, shift=False)), Stub(diffusion=DiffusionSpec(3, shift=True), seed=1), Stub(seed=2))


TINY = ModelConfig("llama", 40, 16, 2, 4, 2, 4, 32, 1e-5, 1e4, 64, "causal", bos_id=0, eos_id=1, pad_id=2)


@functools.cache
def network(attention, shift=None, seed=1, **changes):
    """A tiny transformer whose head has preferences, whose attention and positions matter, and which never predicts the mask."""
    model = Transformer(
        dataclasses.replace(TINY, attention=attention, **changes), None if shift is None else DiffusionSpec(MASK, shift=shift)
    )
    rng = np.random.default_rng(seed)
    draw = lambda path, leaf: jnp.asarray(  # noqa: E731
        rng.normal(size=leaf.shape) * leaf.shape[-2] ** -0.5 if leaf.ndim > 2 else np.ones(leaf.shape), jnp.float32
    )
    params = jax.tree_util.tree_map_with_path(draw, jax.eval_shape(lambda: init_params(model, jax.random.key(0))))
    weights = params["params"]
    for name, size in (("embed", 20.0), ("head", 1.0), ("positions", 10.0)):
        if name in weights:
            weights[name] = jnp.asarray(size * rng.normal(size=weights[name].shape), jnp.float32)
    weights["head"] = weights["head"].at[MASK].set(0.0)
    weights["blocks"] |= {name: 4 * weights["blocks"][name] for name in ("q", "k", "v", "o")}
    return model, params


def real_prompts(rows, length, seed=0):
    return jax.random.randint(jax.random.key(seed), (rows, length), 4, 40)


@pytest.fixture(scope="session")
def tiny() -> SimpleNamespace:
    """Small random transformers, made as their configuration says, and prompts for them; mask id 3."""
    return SimpleNamespace(config=TINY, network=network, prompts=real_prompts)
