"""Autoregressive sampling token for token against NumPy, and where it stops."""

import dataclasses

import numpy as np
import pytest

from dlmscope_jax.diffusion import ARSampler, Collect, generate

ROWS, LENGTH, NEW = 16, 7, 6


def autoregressive(ref, read, prompt, keep, sampler, gumbels, stops, pad):
    """One row: temperature, then the k largest, then the nucleus (the order of ``transformers``), until a stop token."""
    x, conf, when = prompt, [], []
    for s in range(NEW):
        if any(token in stops for token in x[LENGTH:]):
            x, conf, when = np.append(x, pad), [*conf, 0.0], [*when, NEW]
            continue
        # the stub weighs by length; what follows is not read by a causal model
        filled = np.concatenate([x, np.zeros(NEW - s, np.int32)])
        real = np.concatenate([keep, np.ones(NEW, bool)])
        raw = read(filled, real)[len(x) - 1].astype(np.float64)
        choice = raw.argmax()
        if sampler.temperature:
            scaled = raw / sampler.temperature
            if sampler.top_k:
                scaled = np.where(scaled < np.sort(scaled)[-sampler.top_k], -1e300, scaled)
            if sampler.top_p:
                scaled = ref.nucleus(scaled, sampler.top_p)
            choice = (scaled + gumbels[s, 0]).argmax()
        conf.append(ref.softmax(raw)[choice])
        when.append(s)
        x = np.append(x, choice).astype(np.int32)
    when, conf = np.array([-1] * LENGTH + when), np.array([0.0] * LENGTH + conf)
    history = np.stack([np.where(when < s, x, pad) for s in range(NEW + 1)])
    return x, history, when, conf


CASES = [
    ARSampler(NEW),
    ARSampler(NEW, temperature=0.8, top_p=0.9, top_k=5),
    ARSampler(NEW, temperature=1.5, top_p=0.7),
    ARSampler(NEW, stop_ids=(4, 9, 15)),
    ARSampler(NEW, temperature=1.2, top_k=6, stop_ids=(4, 8, 11)),
]


@pytest.mark.some(2)
@pytest.mark.parametrize("sampler", CASES, ids=str)
def test_token_for_token(stubs, ref, sampler):
    model, stopped = stubs.ar, 0
    for seed in range(4):
        prompt, keep = ref.prompts(seed, ROWS, LENGTH)
        key = ref.key(seed)
        trace = generate(model, model.params, prompt, sampler, key=key, attention_mask=keep)
        gumbels = ref.draws(ref.gumbel, key, None, ROWS, 0, NEW, 1, 23) if sampler.temperature else [None] * ROWS
        for row in range(ROWS):
            stops = sampler.stop_ids or ()
            ref.compare(trace, row, autoregressive(ref, model.read, prompt[row], keep[row], sampler, gumbels[row], stops, pad=2))
        stopped += int((np.asarray(trace.commit_step) == NEW).any(axis=1).sum())
    assert (stopped > 10) == bool(sampler.stop_ids)


def test_stops_when_every_row_has(stubs, ref):
    """The longest row decides how many passes run; what is collected of the others is zero."""
    model = stubs.ar
    prompt, _ = ref.prompts(0, 1, LENGTH)
    plain = np.asarray(generate(model, model.params, prompt, ARSampler(NEW)).tokens)[0, LENGTH:]
    third = int(plain[2])
    length = 1 + int(np.argmax(plain == third))
    run = lambda **k: generate(model, model.params, prompt, ARSampler(NEW, **k), collect=("resid_post@0",))  # noqa: E731
    trace = run(stop_ids=(third,))
    assert int(trace.forwards) == length < NEW
    np.testing.assert_array_equal(trace.tokens[0, LENGTH:], np.where(np.arange(NEW) < length, plain, 2))
    taps = np.asarray(trace.taps["resid_post"][0])
    assert (taps[:length] != 0).any(axis=(1, 2, 3)).all() and (taps[length:] == 0).all()
    chosen = generate(
        model, model.params, prompt, ARSampler(NEW, stop_ids=(third,)), collect=Collect(("resid_post@0",), steps=(0, NEW - 1))
    )
    np.testing.assert_array_equal(chosen.taps["resid_post"][0], taps[[0, NEW - 1]])


def test_the_models_own_end(stubs, ref):
    """By default the model's ``eos_id`` ends a row; () goes on."""
    model = stubs.new(seed=2)
    prompt, _ = ref.prompts(0, 1, LENGTH)
    plain = generate(model, model.params, prompt, ARSampler(NEW))
    assert int(plain.forwards) == NEW
    model.config = dataclasses.replace(model.config, eos_id=int(plain.tokens[0, LENGTH]))
    model = _copy(model)
    assert int(generate(model, model.params, prompt, ARSampler(NEW)).forwards) == 1
    assert int(generate(model, model.params, prompt, ARSampler(NEW, stop_ids=())).forwards) == NEW


def _copy(stub):
    """Another object, since a jitted function knows a stub by its identity."""
    twin = object.__new__(type(stub))
    twin.__dict__.update(stub.__dict__)
    return twin
