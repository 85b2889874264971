"""LLaDA's and Dream's samplers token for token against plain NumPy versions of the published algorithms (reference/backbones.md
3.1, 3.2, 11).

Both sides read the logits of the same stub. Where an algorithm draws, the reference is given the uniforms or Gumbels that
the documented keys give. A case is a row with its own prompt; a call has ``ROWS`` of them.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlmscope_jax.diffusion import ARSampler, DiffuGPTSampler, DreamSampler, LLaDASampler, MDLMSampler, ParallelSampler, generate
from dlmscope_jax.diffusion.samplers import keep_top_k, keep_top_p
from dlmscope_jax.errors import UserError
from dlmscope_jax.models import ModelConfig, ModelOutput

MASK, EOS, EOT = 3, 5, 6
ROWS, LENGTH = 16, 7


def llada(ref, read, prompt, keep, sampler, order, gumbel):
    """LLaDA's ``generate`` for one row; ``order[s]`` replaces the confidence, ``gumbel[s]`` is added to the logits.

    The original's two names for one array at temperature 0 are kept: that is how its EOS option works.
    """
    x = np.concatenate([prompt, np.full(sampler.gen_length, MASK)]).astype(np.int32)
    keep = np.concatenate([keep, np.ones(sampler.gen_length, bool)])
    prompt_index = x != MASK
    history, conf_at, when = [x.copy()], np.zeros(len(x)), np.where(prompt_index, -1, sampler.steps)
    blocks = sampler.gen_length // sampler.block_length
    per_block = sampler.steps // blocks
    step = 0
    for b in range(blocks):
        end = len(prompt) + (b + 1) * sampler.block_length
        m = int((x[end - sampler.block_length : end] == MASK).sum())
        counts = [m // per_block + (1 if i < m % per_block else 0) for i in range(per_block)]
        for n in counts:
            logits = read(x, keep).astype(np.float64)
            if (cfg := sampler.cfg_scale) > 0:
                blind = read(np.where(prompt_index, MASK, x).astype(np.int32), keep).astype(np.float64)
                logits = blind + (cfg + 1) * (logits - blind)
            if sampler.logits_eos_inf:
                logits[:, EOS] = -np.inf
            noisy = logits if sampler.temperature == 0 else logits + sampler.temperature * gumbel[step]
            x0 = noisy.argmax(-1)
            if sampler.confidence_eos_eot_inf:
                noisy[:, EOS] = logits[:, EOT] = -np.inf
            p = ref.softmax(logits)[np.arange(len(x)), x0]
            conf = p.copy() if sampler.remasking == "low_confidence" else order[step].astype(np.float64)
            conf[end:] = -np.inf
            conf[x != MASK] = -np.inf
            for i in ref.first_best(conf, n):
                x[i] = x0[i]
                if x0[i] != MASK:
                    when[i], conf_at[i] = step, p[i]
            history.append(x.copy())
            step += 1
    return x, np.stack(history), when, conf_at


def sample_tokens(ref, logits, sampler, gumbel):
    """Dream's ``sample_tokens``: the confidence that its algorithm wants, the tokens, and the probability of these."""
    if sampler.temperature > 0:
        logits = logits / sampler.temperature
    if sampler.top_p is not None and sampler.top_p < 1:
        logits = np.stack([ref.nucleus(row, sampler.top_p) for row in logits])
    if sampler.top_k is not None:
        kth = np.sort(logits, -1)[:, -min(sampler.top_k, logits.shape[-1])]
        logits = np.where(logits < kth[:, None], -1e300, logits)
    p = ref.softmax(logits)
    x0 = p.argmax(-1) if sampler.temperature == 0 else (logits + gumbel).argmax(-1)
    chosen = p[np.arange(len(p)), x0]
    ranked = np.sort(p, -1)
    conf = {"topk_margin": ranked[:, -1] - ranked[:, -2], "entropy": (p * np.log(p + 1e-10)).sum(-1)}
    return conf.get(sampler.algorithm, chosen), x0


def dream(ref, read, prompt, keep, sampler, order, gumbel):
    """Dream's ``diffusion_generate`` for one row (shift included).

    ``gumbel[s]`` draw the token; ``order[s]``: uniforms of ``origin`` or Gumbels of ``alg_temp``.
    """
    x = np.concatenate([prompt, np.full(sampler.max_new_tokens, MASK)]).astype(np.int32)
    keep = np.concatenate([keep, np.ones(sampler.max_new_tokens, bool)])
    steps = sampler.steps
    times = np.linspace(1, sampler.eps, steps + 1)
    history, when, conf_at = [x.copy()], np.where(x != MASK, -1, steps), np.zeros(len(x))
    for i in range(steps):
        logits = read(x, keep).astype(np.float64)
        conf, x0 = sample_tokens(ref, np.concatenate([logits[:1], logits[:-1]]), sampler, gumbel[i] if sampler.temperature else None)
        masked = x == MASK
        share = 1 - times[i + 1] / times[i] if i < steps - 1 else 1.0
        if sampler.algorithm == "origin":
            write = np.flatnonzero(masked & (order[i] < share))
        else:
            n = int(np.float32(masked.sum()) * np.float32(share))
            score = conf / sampler.alg_temp + order[i] if sampler.alg_temp else conf
            write = ref.first_best(np.where(masked, score, -np.inf), n)
        for j in write:
            x[j] = x0[j]
            if x0[j] != MASK:
                when[j], conf_at[j] = i, conf[j]
        history.append(x.copy())
    return x, np.stack(history), when, conf_at


def dream_batch(ref, read, prompt, keep, sampler):
    """Dream's original over a batch at temperature 0: one number of commits for all rows, their mean; any position is written."""
    new = np.full((len(prompt), sampler.max_new_tokens), MASK)
    x = np.concatenate([prompt, new], axis=1).astype(np.int32)
    keep = np.concatenate([keep, np.ones(new.shape, bool)], axis=1)
    times = np.linspace(np.float32(1), np.float32(sampler.eps), sampler.steps + 1)
    history = [x.copy()]
    for i in range(sampler.steps):
        mean = np.float32((x == MASK).sum()) / np.float32(len(x))
        n = int(mean * np.float32(1 - times[i + 1] / times[i])) if i < sampler.steps - 1 else int(mean)
        before = x.copy()
        for row in range(len(x)):
            logits = read(before[row], keep[row]).astype(np.float64)
            conf, x0 = sample_tokens(ref, np.concatenate([logits[:1], logits[:-1]]), sampler, None)
            masked = before[row] == MASK
            filled = np.where(masked, x0, MASK)
            for j in ref.first_best(np.where(masked, conf, -np.inf), n):
                x[row, j] = filled[j]
        history.append(x.copy())
    return np.stack(history)


# each with a number of masks inside the prompt
IDS = {"eos_id": EOS, "eot_id": EOT}
LLADA = [
    (LLaDASampler(8, 8, 8), 0),
    (LLaDASampler(4, 8, 4), 2),
    (LLaDASampler(6, 8, 8), 2),
    (LLaDASampler(12, 4, 2), 0),  # more steps than tokens
    (LLaDASampler(12, 4, 2), 2),
    (LLaDASampler(4, 8, 4, cfg_scale=1.5), 2),
    (LLaDASampler(6, 12, 6, remasking="random"), 0),
    (LLaDASampler(4, 8, 2, temperature=0.5, cfg_scale=0.7, remasking="random"), 0),
    (LLaDASampler(6, 12, 6, logits_eos_inf=True, **IDS), 2),
    (LLaDASampler(6, 12, 6, confidence_eos_eot_inf=True, **IDS), 2),
    (LLaDASampler(6, 12, 6, temperature=0.8, confidence_eos_eot_inf=True, **IDS), 2),
    (LLaDASampler(4, 8, 8, temperature=0.8, logits_eos_inf=True, confidence_eos_eot_inf=True, cfg_scale=0.5, **IDS), 0),
]


@pytest.mark.some(4)
@pytest.mark.parametrize("sampler, masks", LLADA, ids=lambda value: str(value).replace("LLaDASampler", ""))
def test_llada_token_for_token(stubs, ref, sampler, masks):
    model = stubs.llada
    total, first = LENGTH + sampler.gen_length, 0 if masks else LENGTH
    for seed in range(3):
        prompt, keep = ref.prompts(seed, ROWS, LENGTH, masks)
        key = ref.key(seed)
        trace = generate(model, model.params, prompt, sampler, key=key, attention_mask=keep)
        order = gumbel = [None] * ROWS
        if sampler.remasking == "random":
            order = ref.draws(jax.random.uniform, key, 1, ROWS, first, sampler.steps, total)
        if sampler.temperature:
            gumbel = ref.draws(ref.gumbel, key, 0, ROWS, first, sampler.steps, total, 23)
        for row in range(ROWS):
            ref.compare(trace, row, llada(ref, model.read, prompt[row], keep[row], sampler, order[row], gumbel[row]))
        assert int(trace.forwards) == ref.busy_steps(trace.history) * (2 if sampler.cfg_scale else 1)


def test_llada_eos_options_matter(stubs, ref):
    """Of the cases above: EOS appears without them, never with the first, and last with the second."""
    model = stubs.llada
    prompt, keep = ref.prompts(0, 64, LENGTH)
    run = lambda **k: generate(model, model.params, prompt, LLaDASampler(12, 12, 12, **k, **IDS), attention_mask=keep)  # noqa: E731
    plain, never, late = run(), run(logits_eos_inf=True), run(confidence_eos_eot_inf=True)
    assert (plain.tokens[:, LENGTH:] == EOS).any() and not (never.tokens[:, LENGTH:] == EOS).any()
    when = np.asarray(late.commit_step)[:, LENGTH:]
    is_end = np.isin(np.asarray(late.tokens)[:, LENGTH:], (EOS, EOT))
    assert (np.asarray(late.confidence)[:, LENGTH:][is_end] == 0).all() and is_end.any()
    assert when[is_end].mean() > np.asarray(plain.commit_step)[:, LENGTH:][np.isin(plain.tokens[:, LENGTH:], (EOS, EOT))].mean() + 1


DREAM = [
    (DreamSampler(8, 8, "maskgit_plus"), 0),
    (DreamSampler(5, 12, "topk_margin"), 2),
    (DreamSampler(6, 12, "entropy"), 2),
    (DreamSampler(20, 8, "entropy"), 0),  # more steps than tokens
    (DreamSampler(6, 12, "maskgit_plus", top_k=3), 2),
    (DreamSampler(6, 12, "entropy", top_p=0.5, eps=1e-2), 0),
    (DreamSampler(6, 12, "topk_margin", temperature=0.7, top_p=0.9, top_k=4), 2),
    (DreamSampler(6, 12, "entropy", alg_temp=0.3), 2),
    (DreamSampler(6, 12, "maskgit_plus", temperature=0.4, alg_temp=0.1), 0),
    (DreamSampler(6, 12, "origin"), 2),
    (DreamSampler(6, 12, "origin", temperature=0.5, top_p=0.8), 0),
]


@pytest.mark.some(4)
@pytest.mark.parametrize("sampler, masks", DREAM, ids=lambda value: str(value).replace("DreamSampler", ""))
def test_dream_token_for_token(stubs, ref, sampler, masks):
    model = stubs.dream
    total, first = LENGTH + sampler.max_new_tokens, 0 if masks else LENGTH
    for seed in range(3):
        prompt, keep = ref.prompts(seed, ROWS, LENGTH, masks)
        key = ref.key(seed)
        trace = generate(model, model.params, prompt, sampler, key=key, attention_mask=keep)
        order = gumbel = [None] * ROWS
        if sampler.algorithm == "origin" or sampler.alg_temp:
            draw = jax.random.uniform if sampler.algorithm == "origin" else ref.gumbel
            order = ref.draws(draw, key, 1, ROWS, first, sampler.steps, total)
        if sampler.temperature:
            gumbel = ref.draws(ref.gumbel, key, 0, ROWS, first, sampler.steps, total, 23)
        for row in range(ROWS):
            ref.compare(trace, row, dream(ref, model.read, prompt[row], keep[row], sampler, order[row], gumbel[row]))
        assert int(trace.forwards) == ref.busy_steps(trace.history)


@pytest.mark.parametrize("algorithm", ["maskgit_plus", "topk_margin", "entropy"])
def test_dream_equals_the_original_batch_where_rows_have_equal_masks(stubs, ref, algorithm):
    """The original takes the mean number of masks over the batch and writes anywhere: the same where no row differs."""
    model, sampler = stubs.new(diffusion=stubs.dream.diffusion, seed=4), DreamSampler(7, 12, algorithm, top_k=5)
    model.params["head"] = model.params["head"].at[MASK].set(0.0)  # never predicted: a row that does has more masks than others
    for seed in range(4):
        prompt, keep = ref.prompts(seed, ROWS, LENGTH, masks=2)
        trace = generate(model, model.params, prompt, sampler, attention_mask=keep)
        np.testing.assert_array_equal(trace.history, dream_batch(ref, model.read, prompt, keep, sampler))


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


class _Flat:
    """Everything equally likely: only the rule for ties decides."""

    def __init__(self, diffusion):
        self.diffusion, self.config = diffusion, ModelConfig("flat", 9, 8, 1, 1, 1, 8, 8, 1e-5, 1e4, 64, "bidirectional")

    def apply(self, params, tokens, logits=True, **_):
        return ModelOutput(logits=jnp.zeros((*logits.shape, 9)), taps={})


@pytest.mark.parametrize(
    "sampler",
    [LLaDASampler(4, 4, 4), DreamSampler(5, 4, "entropy"), DreamSampler(5, 4, "topk_margin"), ParallelSampler(4, 4)],
    ids=str,
)
def test_ties_resolve_to_the_lowest_index(stubs, sampler):
    trace = generate(_Flat(stubs.llada.diffusion), {}, jnp.full((2, 3), 5), sampler)
    assert trace.tokens[:, 3:].tolist() == [[0] * 4] * 2
    when = np.asarray(trace.commit_step)[:, 3:]
    assert (np.diff(when, axis=1) >= 0).all() and when.max() == sampler.n_steps - 1


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
        (lambda: LLaDASampler(8, 8, 8, eos_id=-1), "eos_id"),
        (lambda: DreamSampler(8, 8.0), "max_new_tokens"),
        (lambda: DreamSampler(8, 8, "greedy"), "maskgit_plus"),
        (lambda: DreamSampler(8, 8, top_p=0.0), "top_p"),
        (lambda: DreamSampler(8, 8, top_k=0), "top_k"),
        (lambda: DreamSampler(8, 8, alg_temp=-1.0), "alg_temp"),
        (lambda: DreamSampler(8, 8, eps=0.0), "eps"),
        (lambda: ARSampler(-1), "max_new_tokens"),
        (lambda: ARSampler(4, top_p=1.5), "top_p"),
        (lambda: ARSampler(4, stop_ids=[1]), "a tuple of token ids"),
        (lambda: MDLMSampler(4, 8, eps=1.0), "eps"),
        (lambda: MDLMSampler(True, 8), "steps is True"),
        (lambda: DiffuGPTSampler(4, 8, top_p=2), "top_p"),
        (lambda: ParallelSampler(8, 4, threshold=1.1), "threshold"),
        (lambda: ParallelSampler(8, 4, factor=-1.0), "factor"),
        (lambda: ParallelSampler(8, 0), "block_length"),
        (lambda: ParallelSampler(8, 4, cache="prefix"), "none, dual, blocks"),
    ],
)
def test_mistakes(make, names):
    with pytest.raises(UserError, match=names):
        make()


def test_eos_id_must_be_a_token(stubs):
    with pytest.raises(UserError, match="eot_id is 126348.*0 to 22"):
        generate(stubs.llada, stubs.llada.params, np.full((1, 3), 7), LLaDASampler(2, 2, 2, confidence_eos_eot_inf=True, eos_id=4))
