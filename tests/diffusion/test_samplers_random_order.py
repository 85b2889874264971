"""MDLM's and DiffuGPT's samplers token for token against NumPy versions of the published algorithms (reference/backbones.md 3.4).

Both draw order and tokens at random; the references are given the uniforms and Gumbels that the documented keys give.
"""

import jax
import numpy as np
import pytest

from dlmscope_jax.diffusion import Collect, DiffuGPTSampler, MDLMSampler, generate
from dlmscope_jax.models import Edit

MASK, ROWS, LENGTH = 3, 16, 7


def mdlm(ref, read, prompt, keep, sampler, uniforms, gumbels):
    """MDLM's ``_sample`` with ``_ddpm_update`` for one row: a mask stays where the uniform is below ``s / t``."""
    x = np.concatenate([prompt, np.full(sampler.gen_length, MASK)]).astype(np.int32)
    keep = np.concatenate([keep, np.ones(sampler.gen_length, bool)])
    n = sampler.steps + sampler.noise_removal
    times, dt = np.linspace(1, sampler.eps, sampler.steps + 1), (1 - sampler.eps) / sampler.steps
    history, when, conf_at = [x.copy()], np.where(x != MASK, -1, n), np.zeros(len(x))
    for i in range(n):
        logits = read(x, keep).astype(np.float64)
        logits[:, MASK] = -np.inf
        p = ref.softmax(logits)
        if i < sampler.steps:
            x0 = (logits + gumbels[i]).argmax(-1)
            write = uniforms[i] >= (times[i] - dt) / times[i]
        else:
            x0, write = logits.argmax(-1), np.ones(len(x), bool)
        for j in np.flatnonzero((x == MASK) & write):
            x[j], when[j], conf_at[j] = x0[j], i, p[j, x0[j]]
        history.append(x.copy())
    return x, np.stack(history), when, conf_at


def diffugpt(ref, read, prompt, keep, sampler, uniforms, gumbels):
    """DiffuGPT's ``generate_samples`` for one row, in its own order: predict, show some of it, predict again."""
    x = np.concatenate([prompt, np.full(sampler.max_new_tokens, MASK)]).astype(np.int32)
    keep = np.concatenate([keep, np.ones(sampler.max_new_tokens, bool)])
    maskable, steps = x == MASK, sampler.steps
    history, when, conf_at = [x.copy()], np.where(maskable, steps, -1), np.zeros(len(x))

    def predict(i):
        logits = read(x, keep).astype(np.float64)
        logits = np.concatenate([logits[:1], logits[:-1]])
        logits = logits / sampler.temperature if sampler.temperature else logits
        logits = np.stack([ref.nucleus(row, sampler.top_p) if sampler.top_p else row for row in logits])
        x0 = (logits + gumbels[i] if sampler.temperature else logits).argmax(-1)
        return x0, ref.softmax(logits)[np.arange(len(x)), x0]

    def show(i, where, x0, p):
        x[where] = x0[where]
        when[where], conf_at[where] = i, p[where]
        history.append(x.copy())

    x0, p = predict(0)
    for t in range(steps - 1, 0, -1):
        i = steps - 1 - t
        shown = maskable & (uniforms[i] < np.float32(1 / (t + 1)))
        show(i, shown, x0, p)
        maskable = maskable & ~shown
        x0, p = predict(i + 1)
    show(steps - 1, maskable, x0, p)
    return x, np.stack(history), when, conf_at


MDLM = [
    (MDLMSampler(6, 8), 0),
    (MDLMSampler(20, 8, eps=1e-2), 2),
    (MDLMSampler(5, 8, noise_removal=False, eps=0.3), 0),
    (MDLMSampler(5, 8, eps=0.3), 2),
    (MDLMSampler(6, 8, cached=False), 0),
]


@pytest.mark.some(2)
@pytest.mark.parametrize("sampler, masks", MDLM, ids=str)
def test_mdlm_token_for_token(stubs, ref, sampler, masks):
    model = stubs.llada
    total, first = LENGTH + 8, 0 if masks else LENGTH
    for seed in range(3):
        prompt, keep = ref.prompts(seed, ROWS, LENGTH, masks)
        key = ref.key(seed)
        trace = generate(model, model.params, prompt, sampler, key=key, attention_mask=keep)
        uniforms = ref.draws(jax.random.uniform, key, 1, ROWS, first, sampler.steps, total)
        gumbels = ref.draws(ref.gumbel, key, 0, ROWS, first, sampler.steps, total, 23)
        for row in range(ROWS):
            ref.compare(trace, row, mdlm(ref, model.read, prompt[row], keep[row], sampler, uniforms[row], gumbels[row]))
        if sampler.noise_removal:
            assert not (trace.tokens == MASK).any()


@pytest.mark.some(1)
@pytest.mark.parametrize("steps, rows", [(30, 1), (30, 4)])
def test_cached_steps_run_no_forward_pass(stubs, ref, steps, rows):
    """The same text; a pass runs where something is masked and, but for the first step, the step before changed a token."""
    model = stubs.llada
    skipped = 0
    for seed in range(4):
        prompt, _ = ref.prompts(seed, rows, LENGTH)
        run = lambda **k: generate(model, model.params, prompt, MDLMSampler(steps, 8, **k), key=ref.key(seed))  # noqa: B023, E731
        cached, plain = run(), run(cached=False)
        history = np.asarray(plain.history)
        for field in ("tokens", "history", "commit_step"):
            np.testing.assert_array_equal(getattr(cached, field), getattr(plain, field))
        np.testing.assert_allclose(cached.confidence, plain.confidence, atol=1e-6)
        busy = (history[:-1] == MASK).any(axis=(1, 2))
        changed = np.append(True, (history[1:-1] != history[:-2]).any(axis=(1, 2)))
        assert int(plain.forwards) == busy.sum() and int(cached.forwards) == (busy & changed).sum()
        skipped += int(plain.forwards - cached.forwards)
    assert skipped > 20


@pytest.mark.slow
def test_what_keeps_a_cached_step_from_being_skipped(stubs, ref):
    """Collected steps run, and edits that change from step to step forbid reuse; others do not."""
    model, prompt = stubs.llada, ref.prompts(0, 1, LENGTH)[0]
    collected = Collect(("resid_post@0",), steps=(3, 4, 5, 6))
    push = lambda **k: (Edit("add", "resid_post@0", np.linspace(-1, 1, 16, dtype=np.float32), **k),)  # noqa: E731

    def run(cached, edits=(), collect=()):
        sampler = MDLMSampler(30, 8, cached=cached)
        return generate(model, model.params, prompt, sampler, key=ref.key(0), edits=edits, collect=collect)

    cached, plain = (run(flag, push(positions="masked")) for flag in (True, False))
    np.testing.assert_array_equal(cached.history, plain.history)
    assert cached.forwards < plain.forwards
    for edits in (push(positions="just_committed"), push(schedule=np.linspace(0, 1, 31, dtype=np.float32))):
        cached = run(True, edits)
        assert int(cached.forwards) == ref.busy_steps(cached.history)

    cached = run(True, collect=collected)
    for step, tap in zip(collected.steps, cached.taps["resid_post"][0], strict=True):
        read = model.apply(model.params, cached.history[step], logits=False, collect=collected.sites)
        np.testing.assert_allclose(tap, read.taps["resid_post"][0], atol=1e-6)
    assert int(cached.forwards) < ref.busy_steps(cached.history)


def test_mdlm_begins_with_nothing(stubs, ref):
    trace = generate(stubs.llada, stubs.llada.params, np.zeros((3, 0), np.int32), MDLMSampler(8, 6), key=ref.key(0))
    assert trace.tokens.shape == (3, 6) and (trace.commit_step <= 8).all() and len(np.unique(trace.tokens)) > 4


DIFFUGPT = [
    (DiffuGPTSampler(6, 8), 0),
    (DiffuGPTSampler(1, 8), 0),
    (DiffuGPTSampler(20, 8, temperature=0.5, top_p=0.6), 2),
    (DiffuGPTSampler(6, 8, temperature=0.0, top_p=None), 2),
]


@pytest.mark.some(2)
@pytest.mark.parametrize("sampler, masks", DIFFUGPT, ids=str)
def test_diffugpt_token_for_token(stubs, ref, sampler, masks):
    model, never = stubs.new(diffusion=stubs.dream.diffusion), -100.0 * (np.arange(23) == MASK)
    model.unembed = lambda params, x: x @ params["head"].T + never.astype(np.float32)  # the mask is not predicted: the one deviation
    read = lambda x, keep: model.read(x, keep) + never  # noqa: E731
    total, first = LENGTH + 8, 0 if masks else LENGTH
    for seed in range(3):
        prompt, keep = ref.prompts(seed, ROWS, LENGTH, masks)
        key = ref.key(seed)
        trace = generate(model, model.params, prompt, sampler, key=key, attention_mask=keep)
        uniforms = ref.draws(jax.random.uniform, key, 1, ROWS, first, sampler.steps, total)
        gumbels = ref.draws(ref.gumbel, key, 0, ROWS, first, sampler.steps, total, 23)
        for row in range(ROWS):
            ref.compare(trace, row, diffugpt(ref, read, prompt[row], keep[row], sampler, uniforms[row], gumbels[row]))


def test_diffugpt_draws_a_predicted_mask_again(stubs, ref):
    """The deviation: where the mask is drawn every other time, half of the original's text stays masked, but less of ours."""
    model = stubs.new(diffusion=stubs.dream.diffusion)
    model.unembed = lambda params, x: np.log(22).astype(np.float32) * jax.nn.one_hot(np.full(x.shape[:-1], MASK), 23)
    trace = generate(model, model.params, np.full((64, 1), 7), DiffuGPTSampler(20, 8, 1.0, None), key=ref.key(0))
    is_mask = np.asarray(trace.tokens)[:, 1:] == MASK
    # masked at the last step, and then again: the product of 1 - 1 / 2(t + 1) over t = 19..0
    share = np.prod(1 - 0.5 / np.arange(1, 21))
    assert abs(is_mask.mean() - share) < 4 * np.sqrt(share / is_mask.size) < 0.25
    np.testing.assert_array_equal(np.asarray(trace.commit_step)[:, 1:] == 20, is_mask)
