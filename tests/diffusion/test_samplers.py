"""Samplers token for token against plain NumPy versions of the published algorithms (reference/backbones.md 3.1, 3.2).

The references below work on one row at a time in float64 and know nothing of the package; both sides read the logits of
the same stub. Where an algorithm draws, the reference is given the uniforms or Gumbels that the documented keys give.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlmscope_jax.diffusion import ARSampler, DreamSampler, LLaDASampler, generate
from dlmscope_jax.diffusion.samplers import keep_top_k, keep_top_p
from dlmscope_jax.errors import UserError

MASK = 3


def _softmax(logits):
    logits = np.asarray(logits, np.float64)
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _first_best(conf, n):
    return sorted(range(len(conf)), key=lambda i: (-conf[i], i))[:n]


def llada(read, prompt, keep, steps, gen, block, cfg=0.0, order=None, gumbel=None, temperature=0.0):
    """LLaDA's ``generate`` for one row; ``order[s]`` replaces the confidence, ``gumbel[s]`` is added to the logits."""
    x = np.concatenate([prompt, np.full(gen, MASK)]).astype(np.int32)
    keep = np.concatenate([keep, np.ones(gen, bool)])
    prompt_index = x != MASK
    history, conf_at, when = [x.copy()], np.zeros(len(x)), np.where(prompt_index, -1, steps)
    blocks = gen // block
    per_block = steps // blocks
    step = 0
    for b in range(blocks):
        end = len(prompt) + (b + 1) * block
        m = int((x[end - block : end] == MASK).sum())
        counts = [m // per_block + (1 if i < m % per_block else 0) for i in range(per_block)]
        for n in counts:
            logits = read(x, keep).astype(np.float64)
            if cfg > 0:
                blind = read(np.where(prompt_index, MASK, x).astype(np.int32), keep).astype(np.float64)
                logits = blind + (cfg + 1) * (logits - blind)
            noisy = logits if gumbel is None else logits + temperature * gumbel[step]
            x0 = noisy.argmax(-1)
            p = _softmax(logits)[np.arange(len(x)), x0]
            conf = p.copy() if order is None else order[step].astype(np.float64)
            conf[end:] = -np.inf
            conf[x != MASK] = -np.inf
            for i in _first_best(conf, n):
                x[i] = x0[i]
                if x0[i] != MASK:
                    when[i], conf_at[i] = step, p[i]
            history.append(x.copy())
            step += 1
    return x, np.stack(history), when, conf_at


def dream(read, prompt, keep, steps, new, alg, eps=1e-3, temperature=0.0, top_p=None, top_k=None, alg_temp=None, tokens=None, order=None):
    """Dream's ``diffusion_generate`` for one row (shift included).

    ``tokens[s]``: Gumbels that draw the token; ``order[s]``: uniforms of ``origin`` or Gumbels of ``alg_temp``.
    """
    x = np.concatenate([prompt, np.full(new, MASK)]).astype(np.int32)
    keep = np.concatenate([keep, np.ones(new, bool)])
    times = np.linspace(1, eps, steps + 1)
    history, when, conf_at = [x.copy()], np.where(x != MASK, -1, steps), np.zeros(len(x))
    for i in range(steps):
        logits = read(x, keep).astype(np.float64)
        logits = np.concatenate([logits[:1], logits[:-1]])
        if temperature > 0:
            logits = logits / temperature
        kept = np.ones_like(logits, bool)
        if top_p is not None and top_p < 1:
            for j in range(len(x)):
                by_size = np.argsort(-logits[j], kind="stable")
                over = np.cumsum(_softmax(logits[j])[by_size]) > top_p
                over = np.concatenate([[False], over[:-1]])
                kept[j, by_size[over]] = False
        logits = np.where(kept, logits, -1e300)
        if top_k is not None:
            kth = np.sort(logits, -1)[:, -min(top_k, logits.shape[-1])]
            logits = np.where(logits < kth[:, None], -1e300, logits)
        p = _softmax(logits)
        x0 = p.argmax(-1) if temperature == 0 else (logits + tokens[i]).argmax(-1)
        chosen = p[np.arange(len(x)), x0]
        ranked = np.sort(p, -1)
        conf = {"topk_margin": ranked[:, -1] - ranked[:, -2], "entropy": (p * np.log(p + 1e-10)).sum(-1)}.get(alg, chosen)
        masked = x == MASK
        share = 1 - times[i + 1] / times[i] if i < steps - 1 else 1.0
        if alg == "origin":
            write = np.flatnonzero(masked & (order[i] < share))
        else:
            n = int(np.float32(masked.sum()) * np.float32(share))
            score = conf / alg_temp + order[i] if alg_temp else conf
            write = _first_best(np.where(masked, score, -np.inf), n)
        for j in write:
            x[j] = x0[j]
            if x0[j] != MASK:
                when[j], conf_at[j] = i, conf[j]
        history.append(x.copy())
    return x, np.stack(history), when, conf_at


def _prompts(seed, rows, length, masks=0):
    """Prompts of different lengths, padded on the left, with the mask of real tokens; ``masks`` of them unknown."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(4, 23, size=(rows, length)).astype(np.int32)
    keep = np.arange(length)[None] >= rng.integers(0, length - 3, size=(rows, 1))
    keep[0] = True
    tokens = np.where(keep, tokens, 2).astype(np.int32)
    for row in range(rows):
        tokens[row, rng.choice(np.arange(length - 3, length), size=masks, replace=False)] = MASK
    return tokens, keep


def _draws(draw, key, which, rows, first, *shape):
    """What a sampler draws, [S, rows, T, ...]: ``fold_in(key, step)``, split into tokens (0) and order (1)."""
    steps, total, *rest = shape
    keys = jax.vmap(lambda s: jax.random.split(jax.random.fold_in(key, s))[which])(jnp.arange(steps))
    drawn = np.zeros((steps, rows, total, *rest))
    drawn[:, :, first:] = jax.vmap(lambda k: draw(k, (rows, total - first, *rest)))(keys)
    return drawn


def _compare(trace, row, reference):
    tokens, history, when, conf = reference
    np.testing.assert_array_equal(trace.history[:, row], history)
    np.testing.assert_array_equal(trace.tokens[row], tokens)
    np.testing.assert_array_equal(trace.commit_step[row], when)
    np.testing.assert_allclose(trace.confidence[row], conf, atol=2e-5)


# each with a number of masks inside the prompt
LLADA = [
    (LLaDASampler(8, 8, 8), 0),
    (LLaDASampler(4, 8, 4), 2),
    (LLaDASampler(6, 8, 8), 2),
    (LLaDASampler(12, 12, 4), 0),
    (LLaDASampler(12, 4, 2), 2),  # more steps than tokens
    (LLaDASampler(4, 8, 4, cfg_scale=1.5), 2),
    (LLaDASampler(6, 12, 6, remasking="random"), 0),
    (LLaDASampler(4, 8, 2, temperature=0.5, cfg_scale=0.7, remasking="random"), 0),
]


@pytest.mark.parametrize("sampler, masks", LLADA, ids=str)
def test_llada_token_for_token(stubs, sampler, masks):
    model, rows, length = stubs.llada, 6, 7
    total, first = length + sampler.gen_length, 0 if masks else length
    for seed in range(4):
        prompt, keep = _prompts(seed, rows, length, masks)
        key = jax.random.key(seed)
        trace = generate(model, model.params, prompt, sampler, key=key, attention_mask=keep)
        order = gumbel = [None] * rows
        if sampler.remasking == "random":
            order = _draws(jax.random.uniform, key, 1, rows, first, sampler.steps, total).swapaxes(0, 1)
        if sampler.temperature:
            gumbel = _draws(jax.random.gumbel, key, 0, rows, first, sampler.steps, total, 23).swapaxes(0, 1)
        for row in range(rows):
            _compare(trace, row, llada(
                model.read, prompt[row], keep[row], sampler.steps, sampler.gen_length, sampler.block_length, sampler.cfg_scale,
                order[row], gumbel[row], sampler.temperature,
            ))  # fmt: skip


DREAM = [
    (DreamSampler(8, 8, "maskgit_plus"), 0),
    (DreamSampler(5, 12, "topk_margin"), 2),
    (DreamSampler(6, 12, "entropy"), 2),
    (DreamSampler(20, 8, "entropy"), 0),  # more steps than tokens
    (DreamSampler(6, 12, "maskgit_plus", top_k=3), 2),
    (DreamSampler(6, 12, "entropy", top_p=0.5), 0),
    (DreamSampler(6, 12, "topk_margin", temperature=0.7, top_p=0.9, top_k=4), 2),
    (DreamSampler(6, 12, "entropy", alg_temp=0.3), 2),
    (DreamSampler(6, 12, "origin"), 2),
    (DreamSampler(6, 12, "origin", temperature=0.5, top_p=0.8), 0),
]


@pytest.mark.parametrize("sampler, masks", DREAM, ids=str)
def test_dream_token_for_token(stubs, sampler, masks):
    model, rows, length = stubs.dream, 6, 7
    total, first = length + sampler.max_new_tokens, 0 if masks else length
    for seed in range(4):
        prompt, keep = _prompts(seed, rows, length, masks)
        key = jax.random.key(seed)
        trace = generate(model, model.params, prompt, sampler, key=key, attention_mask=keep)
        order = gumbel = [None] * rows
        if sampler.algorithm == "origin" or sampler.alg_temp:
            draw = jax.random.uniform if sampler.algorithm == "origin" else jax.random.gumbel
            order = _draws(draw, key, 1, rows, first, sampler.steps, total).swapaxes(0, 1)
        if sampler.temperature:
            gumbel = _draws(jax.random.gumbel, key, 0, rows, first, sampler.steps, total, 23).swapaxes(0, 1)
        for row in range(rows):
            _compare(trace, row, dream(
                model.read, prompt[row], keep[row], sampler.steps, sampler.max_new_tokens, sampler.algorithm, sampler.eps,
                sampler.temperature, sampler.top_p, sampler.top_k, sampler.alg_temp, gumbel[row], order[row],
            ))  # fmt: skip


def test_dream_rows_with_unequal_masks_keep_what_they_have(stubs):
    """The original takes the batch's mean count and writes masks over known tokens of the row that has fewer."""
    model = stubs.dream
    prompt = np.random.default_rng(0).integers(4, 23, size=(2, 10)).astype(np.int32)
    prompt[0, 2:9] = MASK
    trace = generate(model, model.params, prompt, DreamSampler(4, 2, "maskgit_plus"))
    given = prompt != MASK
    np.testing.assert_array_equal(np.asarray(trace.tokens)[:, :10][given], prompt[given])
    for row in range(2):
        alone = generate(model, model.params, prompt[row : row + 1], DreamSampler(4, 2, "maskgit_plus"))
        np.testing.assert_array_equal(trace.history[:, row], alone.history[:, 0])


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_ar_token_for_token(stubs, temperature):
    model = stubs.ar
    read = model.read
    sampler = ARSampler(6, temperature=temperature, top_p=0.9, top_k=5)
    for seed in range(4):
        prompt, keep = _prompts(seed, 3, 7)
        key = jax.random.key(seed)
        trace = generate(model, model.params, prompt, sampler, key=key, attention_mask=keep)
        gumbels = [np.asarray(jax.random.gumbel(jax.random.fold_in(key, s), (3, 1, 23))) for s in range(6)]
        for row in range(3):
            x, conf = prompt[row], []
            for s in range(6):
                real = np.concatenate([keep[row], np.ones(s, bool)])
                # the stub weighs by length; what follows is not read by a causal model
                filled = np.concatenate([x, np.zeros(6 - s, np.int32)])
                raw = read(filled, np.concatenate([real, np.ones(6 - s, bool)]))[len(x) - 1].astype(np.float64)
                choice = raw.argmax()
                if temperature:
                    scaled = raw / temperature
                    scaled = np.where(scaled < np.sort(scaled)[-5], -1e300, scaled)
                    by_size = np.argsort(-scaled, kind="stable")
                    over = np.concatenate([[False], np.cumsum(_softmax(scaled)[by_size])[:-1] > 0.9])
                    scaled[by_size[over]] = -1e300
                    choice = (scaled + gumbels[s][row, 0]).argmax()
                conf.append(_softmax(raw)[choice])
                x = np.concatenate([x, [choice]]).astype(np.int32)
            np.testing.assert_array_equal(trace.tokens[row], x)
            np.testing.assert_array_equal(trace.commit_step[row], [-1] * 7 + list(range(6)))
            np.testing.assert_allclose(trace.confidence[row, 7:], conf, atol=1e-5)


class _Flat:
    """Everything equally likely: only the rule for ties decides."""

    def __init__(self, diffusion):
        from types import SimpleNamespace

        self.diffusion, self.config = diffusion, SimpleNamespace(vocab_size=9, n_layers=1, pad_id=None)

    def apply(self, params, tokens, logits=True, **_):
        from dlmscope_jax.models import ModelOutput

        return ModelOutput(logits=jnp.zeros((*logits.shape, 9)), taps={})


@pytest.mark.parametrize("sampler", [LLaDASampler(4, 4, 4), DreamSampler(5, 4, "entropy"), DreamSampler(5, 4, "topk_margin")], ids=str)
def test_ties_resolve_to_the_lowest_index(stubs, sampler):
    trace = generate(_Flat(stubs.llada.diffusion), {}, jnp.full((2, 3), 5), sampler)
    assert trace.tokens[:, 3:].tolist() == [[0] * 4] * 2
    when = np.asarray(trace.commit_step)[:, 3:]
    assert (np.diff(when, axis=1) >= 0).all() and when.max() == sampler.steps - 1


def test_filters():
    p = jnp.array([[0.5, 0.3, 0.15, 0.05]])
    kept = lambda x: np.flatnonzero(np.asarray(x[0]) > -1e30).tolist()  # noqa: E731
    assert kept(keep_top_p(jnp.log(p), 0.4)) == [0]
    assert kept(keep_top_p(jnp.log(p), 0.6)) == [0, 1]
    assert kept(keep_top_p(jnp.log(p), 0.81)) == [0, 1, 2]
    assert kept(keep_top_p(jnp.log(p), 1.0)) == kept(keep_top_p(jnp.log(p), None)) == [0, 1, 2, 3]
    assert kept(keep_top_k(jnp.log(p[:, ::-1]), 2)) == [2, 3]
    assert kept(keep_top_k(jnp.log(p), 9)) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "make, names",
    [
        (lambda: LLaDASampler(8, 10, 4), "gen_length 10.*block_length 4"),
        (lambda: LLaDASampler(3, 8, 4), "steps 3.*2 blocks"),
        (lambda: LLaDASampler(0, 8, 4), "steps is 0"),
        (lambda: LLaDASampler(8, 8, 8, temperature=-1), "temperature"),
        (lambda: LLaDASampler(8, 8, 8, temperature=float("nan")), "temperature"),
        (lambda: LLaDASampler(8, 8, 8, remasking="best"), "low_confidence, random"),
        (lambda: DreamSampler(8, 8.0), "max_new_tokens"),
        (lambda: DreamSampler(8, 8, "greedy"), "maskgit_plus"),
        (lambda: DreamSampler(8, 8, top_p=0.0), "top_p"),
        (lambda: DreamSampler(8, 8, top_k=0), "top_k"),
        (lambda: DreamSampler(8, 8, eps=0.0), "eps"),
        (lambda: ARSampler(-1), "max_new_tokens"),
        (lambda: ARSampler(4, top_p=1.5), "top_p"),
    ],
)
def test_mistakes(make, names):
    with pytest.raises(UserError, match=names):
        make()
