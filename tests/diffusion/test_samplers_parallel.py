"""Parallel decoding token for token against a NumPy version of Fast-dLLM's released code (reference/backbones.md 3.3)."""

import dataclasses

import jax
import numpy as np
import pytest

from dlmscope_jax.diffusion import ParallelSampler, generate
from dlmscope_jax.errors import UserError
from dlmscope_jax.models import DiffusionSpec

MASK, ROWS, LENGTH = 3, 16, 7


def transfer(ref, logits, eligible, sampler, gumbel):
    """``get_transfer_index`` and ``get_transfer_index_dynamic``: what is chosen, where it is written, how sure it is."""
    x0 = (logits if gumbel is None else logits + sampler.temperature * gumbel).argmax(-1)
    p = ref.softmax(logits)[np.arange(len(logits)), x0]
    conf = np.where(eligible, p, -np.inf)
    m = int(eligible.sum())
    ranked = ref.first_best(conf, m)
    if sampler.factor is None:
        chosen = [j for k, j in enumerate(ranked) if k == 0 or conf[j] >= sampler.threshold]
    else:
        needed = [1 - sampler.factor / (n + 1) for n in range(1, m + 1)]
        needed[0] = -1
        for top in range(m):
            if conf[ranked[top]] < needed[top]:
                break
        if top == 0 or top == m - 1:
            top += 1
        chosen = ranked[:top]
    return x0, chosen, p


def fast_dllm(ref, read, prompt, keep, sampler, shift=False, gumbels=None, blocks=None):
    """``generate`` of Fast-dLLM without a cache for one row; ``blocks``: ends of the blocks, where they are not the sampler's own."""
    x = np.concatenate([prompt, np.full(sampler.gen_length, MASK)]).astype(np.int32)
    keep = np.concatenate([keep, np.ones(sampler.gen_length, bool)])
    n, step = sampler.n_steps, 0
    history, when, conf_at = [x.copy()], np.where(x != MASK, -1, n), np.zeros(len(x))
    first = len(prompt)
    for end in blocks or range(first + sampler.block_length, len(x) + sampler.block_length, sampler.block_length):
        while (x[first:end] == MASK).any() and step < n:
            logits = read(x, keep).astype(np.float64)
            logits = np.concatenate([logits[:1], logits[:-1]]) if shift else logits
            eligible = x == MASK
            eligible[end:] = False
            x0, chosen, p = transfer(ref, logits, eligible, sampler, None if gumbels is None else gumbels[step])
            for j in chosen:
                x[j] = x0[j]
                if x0[j] != MASK:
                    when[j], conf_at[j] = step, p[j]
            history.append(x.copy())
            step += 1
        first = end
    history += [x.copy()] * (n - step)
    return x, np.stack(history), when, conf_at


# each with a number of masks inside the prompt, and whether the model is a shifted one
CASES = [
    (ParallelSampler(8, 8, threshold=0.6), 0, False),
    (ParallelSampler(12, 4, threshold=0.3), 0, False),
    (ParallelSampler(12, 4, threshold=0.3), 2, False),
    (ParallelSampler(12, 4, threshold=0.3), 2, True),
    (ParallelSampler(12, 6, threshold=0.5, steps=5), 2, False),
    (ParallelSampler(10, 4, threshold=0.4), 0, True),  # the last block is shorter
    (ParallelSampler(12, 6, factor=1.0), 0, False),
    (ParallelSampler(12, 4, factor=1.4), 2, True),
    (ParallelSampler(12, 6, factor=0.0), 0, False),
    (ParallelSampler(12, 6, threshold=0.4, temperature=0.6), 0, True),
    (ParallelSampler(12, 6, factor=1.2, temperature=0.6), 2, False),
]


@pytest.mark.some(4)
@pytest.mark.parametrize("sampler, masks, shift", CASES, ids=lambda value: str(value).replace("ParallelSampler", ""))
def test_token_for_token(stubs, ref, sampler, masks, shift):
    model = stubs.dream if shift else stubs.llada
    total, first = LENGTH + sampler.gen_length, 0 if masks else LENGTH
    together = 0
    for seed in range(3):
        prompt, keep = ref.prompts(seed, ROWS, LENGTH, masks)
        key = ref.key(seed)
        trace = generate(model, model.params, prompt, sampler, key=key, attention_mask=keep)
        gumbels = [None] * ROWS
        if sampler.temperature:
            gumbels = ref.draws(ref.gumbel, key, None, ROWS, first, sampler.n_steps, total, 23)
        for row in range(ROWS):
            ref.compare(trace, row, fast_dllm(ref, model.read, prompt[row], keep[row], sampler, shift, gumbels[row]))
        assert int(trace.forwards) == ref.busy_steps(trace.history, slice(LENGTH, None))
        steps = np.asarray(trace.commit_step)
        together += sum(len(row[row >= 0]) - len(np.unique(row[row >= 0])) for row in steps)
    assert together > 20  # tokens that shared a step with another


def test_factor_commits_the_last_with_the_others(stubs, ref):
    """The released code's rule: where only the least sure fails, it is committed too; some cases above turn on it."""
    model, sampler = stubs.llada, ParallelSampler(4, 2, factor=1.0)
    prompt, keep = ref.prompts(0, 64, LENGTH)
    trace = generate(model, model.params, prompt, sampler, attention_mask=keep)
    # of two tokens the second always goes with the first, however unsure
    assert int(trace.forwards) == 2
    assert (np.asarray(trace.confidence)[:, LENGTH:] < 1 - 1 / 3).any()


def test_rows_go_at_their_own_pace(stubs, ref):
    model, sampler = stubs.dream, ParallelSampler(12, 4, threshold=0.3)
    prompt, keep = ref.prompts(3, 8, LENGTH)
    together = generate(model, model.params, prompt, sampler, attention_mask=keep)
    alone = [generate(model, model.params, prompt[i : i + 1], sampler, attention_mask=keep[i : i + 1]) for i in range(8)]
    for i, row in enumerate(alone):
        np.testing.assert_array_equal(together.history[:, i], row.history[:, 0])
    assert len({int(row.forwards) for row in alone}) > 1
    assert int(together.forwards) == max(int(row.forwards) for row in alone)


@pytest.mark.parametrize("block_length", [4, 2])
def test_blocks_of_a_block_causal_model_count_from_position_zero(stubs, ref, block_length):
    """The prompt's end lies inside a block, in each row at another place; sub-blocks divide the model's blocks."""
    model = stubs.new(diffusion=DiffusionSpec(MASK, shift=False))
    model.config = dataclasses.replace(model.config, attention="block_causal", block_length=4)
    sampler = ParallelSampler(10, block_length, threshold=0.5)
    prompt, keep = ref.prompts(1, ROWS, LENGTH)
    trace = generate(model, model.params, prompt, sampler, attention_mask=keep)
    for row in range(ROWS):
        padding = int((~keep[row]).sum())
        ends = [end for end in range(padding, LENGTH + 14, block_length) if end > LENGTH]
        ref.compare(trace, row, fast_dllm(ref, model.read, prompt[row], keep[row], sampler, blocks=ends))
    with pytest.raises(UserError, match="block_length 3 must divide this block-causal model's 4"):
        generate(model, model.params, prompt, ParallelSampler(9, 3))


def test_a_model_that_predicts_only_masks_ends(stubs):
    model = stubs.new(diffusion=DiffusionSpec(MASK, shift=False))
    model.unembed = lambda params, x: 10.0 * jax.nn.one_hot(np.full(x.shape[:-1], MASK), 23)
    trace = generate(model, model.params, np.full((2, 3), 7), ParallelSampler(6, 3))
    assert (trace.tokens[:, 3:] == MASK).all() and (trace.commit_step[:, 3:] == 6).all() and int(trace.forwards) == 6
