"""What is drawn has the right distribution: chi-square tests at a level of 0.001, with fixed seeds.

The model's logits are the same at every position and step, so that every row of a large batch is an independent draw.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlmscope_jax.diffusion import ARSampler, DiffuGPTSampler, DreamSampler, LLaDASampler, MDLMSampler, ParallelSampler, generate
from dlmscope_jax.diffusion.samplers.base import gumbel
from dlmscope_jax.models import DiffusionSpec, ModelConfig, ModelOutput

MASK, VOCAB, ROWS = 7, 8, 4000
LOGITS = np.array([1.0, 0.2, -0.5, 2.0, 0.0, -1.5, 1.6, -40.0], np.float32)  # the mask is never drawn


class Constant:
    """Reads nothing: the logits of position j are ``scale[j]`` times ``LOGITS``."""

    def __init__(self, shift=False, causal=False, scale=None):
        self.diffusion = None if causal else DiffusionSpec(MASK, shift=shift)
        self.config = ModelConfig("constant", VOCAB, 8, 1, 1, 1, 8, 8, 1e-5, 1e4, 64, "causal" if causal else "bidirectional")
        self.scale = np.ones(64, np.float32) if scale is None else scale

    def init_cache(self, batch, length):
        return ()

    def apply(self, params, tokens, logits=True, cache=None, start=None, **_):
        if logits is True:  # one token beside a cache
            logits = start[:, None]
        return ModelOutput(logits=jnp.asarray(self.scale)[logits][..., None] * jnp.asarray(LOGITS), taps={}, cache=cache)


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def fits(counts, probabilities):
    """Pearson's statistic below the 0.999 quantile of chi-square (Wilson-Hilferty); impossible cells must be empty."""
    counts, probabilities = np.asarray(counts, float).ravel(), np.asarray(probabilities, float).ravel()
    possible = probabilities > 1e-9
    assert counts[~possible].sum() == 0
    expected = counts.sum() * probabilities[possible] / probabilities[possible].sum()
    assert expected.min() > 5, "too few draws for the test"
    freedom = possible.sum() - 1
    limit = freedom * (1 - 2 / (9 * freedom) + 3.0902 * np.sqrt(2 / (9 * freedom))) ** 3
    statistic = ((counts[possible] - expected) ** 2 / expected).sum()
    assert statistic < limit, f"{statistic:.1f} of at most {limit:.1f}"


def run(model, sampler, seed=0):
    return generate(model, {}, np.full((ROWS, 1), 1), sampler, key=jax.random.key(seed))


def test_the_test_notices():
    with pytest.raises(AssertionError, match="of at most"):
        fits([1100, 900, 2000], [0.25, 0.25, 0.5])
    fits([1020, 980, 2000], [0.25, 0.25, 0.5])


def filtered(temperature=1.0, top_p=None, top_k=None):
    """Probabilities of Dream's order: temperature, nucleus, the k largest."""
    p = softmax(LOGITS / temperature)
    order = np.argsort(-p)
    if top_p:
        p[order[1:][np.cumsum(p[order])[:-1] > top_p]] = 0
    if top_k:
        p[order[top_k:]] = 0
    return p / p.sum()


# LLaDA and parallel decoding with all tokens in one step: with more, the sure ones come first, and with them their tokens
TOKENS = [
    (LLaDASampler(1, 2, 2, temperature=0.7), filtered(0.7)),
    (LLaDASampler(1, 2, 2, temperature=1.0, logits_eos_inf=True, eos_id=3), filtered() * (np.arange(VOCAB) != 3)),
    (DreamSampler(2, 2, temperature=1.3), filtered(1.3)),
    (DreamSampler(2, 2, "entropy", temperature=0.8, top_p=0.8), filtered(0.8, top_p=0.8)),
    (DreamSampler(2, 2, temperature=1.0, top_k=3), filtered(top_k=3)),
    (DreamSampler(2, 2, temperature=1.5, top_p=0.9, top_k=4), filtered(1.5, 0.9, 4)),
    (MDLMSampler(8, 2, noise_removal=False), filtered()),
    (DiffuGPTSampler(3, 2), filtered(0.95, top_p=0.9)),
    (ParallelSampler(2, 2, threshold=1e-6, temperature=0.6), filtered(0.6)),
    (ARSampler(2, temperature=0.9, top_k=5), filtered(0.9, top_k=5)),
]


@pytest.mark.some(4)
@pytest.mark.parametrize("sampler, probabilities", TOKENS, ids=lambda value: str(value) if not isinstance(value, np.ndarray) else "")
def test_tokens(sampler, probabilities):
    """Single tokens, and pairs of neighbours: the positions of a row are independent."""
    trace = run(Constant(causal=isinstance(sampler, ARSampler)), sampler)
    tokens = np.asarray(trace.tokens)[:, 1:]
    if isinstance(sampler, MDLMSampler):  # few masks are left over
        tokens = tokens[(tokens != MASK).all(axis=1)]
        assert len(tokens) > 0.99 * ROWS
    counts = np.zeros((VOCAB, VOCAB))
    np.add.at(counts, (tokens[:, 0], tokens[:, 1]), 1)
    for axis in (0, 1):
        fits(counts.sum(axis=axis), probabilities)
    likely = np.flatnonzero(probabilities / probabilities.sum() > 0.08)
    pairs = np.ix_(likely, likely)
    fits(counts[pairs], np.outer(probabilities, probabilities)[pairs])


@pytest.mark.some(1)
@pytest.mark.parametrize(
    "sampler, stay",
    [
        (DreamSampler(4, 3, eps=0.1), [s / t for t, s in itertools.pairwise(np.linspace(1, 0.1, 5))][:3] + [0.0]),
        (MDLMSampler(4, 3, eps=0.2), [s / t for t, s in itertools.pairwise(np.linspace(1, 0.2, 5))] + [0.0]),
        (DiffuGPTSampler(5, 3), [1 - 1 / (t + 1) for t in (4, 3, 2, 1, 0)]),
    ],
    ids=["origin", "mdlm", "diffugpt"],
)
def test_when_tokens_are_shown(sampler, stay):
    """A token is written at step i with the probability of staying masked until then times that of not staying at i."""
    when = np.asarray(run(Constant(), sampler).commit_step)[:, 1:]
    remains = np.cumprod([1.0, *stay])
    probabilities = remains[:-1] - remains[1:]
    for position in range(3):
        fits(np.bincount(when[:, position], minlength=len(stay)), probabilities)
    both = np.zeros((len(stay), len(stay)))
    np.add.at(both, (when[:, 0], when[:, 2]), 1)
    fits(both, np.outer(probabilities, probabilities))


def test_llada_random_order_is_uniform():
    when = np.asarray(run(Constant(), LLaDASampler(3, 3, 3, remasking="random")).commit_step)[:, 1:]
    orders = list(itertools.permutations(range(3)))
    fits([(when == order).all(axis=1).sum() for order in orders], np.ones(6) / 6)


@pytest.mark.parametrize("new", [4, 5])
def test_alg_temp_draws_without_replacement(new):
    """One of four and two of five positions at the first of two steps."""
    scale = np.array([1, 0.4, 0.8, 1.2, 1.6, 0.6] + [1] * 58, np.float32)
    when = np.asarray(run(Constant(scale=scale), DreamSampler(2, new, "maskgit_plus", alg_temp=0.3)).commit_step)[:, 1:]
    weight = softmax(np.array([softmax(s * LOGITS).max() for s in scale[1 : new + 1]]) / 0.3)
    count = int(new * 0.4995)
    assert ((when == 0).sum(axis=1) == count).all() and (when <= 1).all()
    if count == 1:
        fits([(when[:, i] == 0).sum() for i in range(new)], weight)
        return
    pairs = list(itertools.combinations(range(new), 2))
    # the probability of an unordered pair: either one first, the other among what is left
    likely = [weight[i] * weight[j] / (1 - weight[i]) + weight[j] * weight[i] / (1 - weight[j]) for i, j in pairs]
    fits([((when[:, i] == 0) & (when[:, j] == 0)).sum() for i, j in pairs], likely)


def test_gumbels_have_their_tail():
    """What is far less probable than others is drawn as often as it should be: jax's default Gumbels end at 16.7."""
    largest = jax.lax.map(lambda key: gumbel(key, (2**20,)).max(), jax.random.split(jax.random.key(0), 32))
    assert 1 <= (np.asarray(largest) > 16.8).sum() <= 8  # 32 (1 - exp(-exp(13.86 - 16.8))) = 1.7 are expected
