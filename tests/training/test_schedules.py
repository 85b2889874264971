"""What changes along a run: rate, penalties, active latents."""

import dataclasses

import jax
import numpy as np
import pytest

from dlmscope_jax.dictionaries import BatchTopK, Binary, Gated, JumpReLU, LossSettings, Matryoshka, ReLU, TopK
from dlmscope_jax.errors import UserError
from dlmscope_jax.training import TrainSpec, init_state, learning_rate, make_step, train
from dlmscope_jax.training.defaults import defaults
from dlmscope_jax.training.program import numbers_of, program_of
from dlmscope_jax.training.schedules import active, loss_settings

from .conftest import small_spec, sparse_rows


def rates(**changes):
    spec = small_spec(steps=100, lr=0.5, **changes)
    return np.array([float(learning_rate(spec, step)) for step in range(101)])


def test_cosine_and_constant():
    cosine = rates(schedule="cosine", warmup_steps=10)
    np.testing.assert_allclose(cosine[:10], 0.5 * np.arange(1, 11) / 10, rtol=1e-6)
    np.testing.assert_allclose(cosine[10:], 0.25 * (1 + np.cos(np.pi * np.arange(91) / 90)), atol=1e-6)
    constant = rates(schedule="constant", warmup_steps=10)
    np.testing.assert_array_equal(constant[9:], 0.5)
    np.testing.assert_allclose(constant[:10], 0.5 * np.arange(1, 11) / 10, rtol=1e-6)


def test_penalties_rise_and_begin():
    settings = LossSettings(aux=0.25, sparsity=2.0, preactivation=0.5, target_l0=7.0, entropy=3.0, covariance=4.0)
    numbers = numbers_of(small_spec(settings=settings, sparsity_warmup=8, entropy_start=5))
    for step in range(12):
        now = loss_settings(numbers, step)
        assert float(now.sparsity) == 2.0 * min(1, step / 8)
        assert float(now.entropy) == (3.0 if step >= 5 else 0.0)
        assert (float(now.aux), float(now.preactivation), float(now.target_l0), float(now.covariance)) == (0.25, 0.5, 7.0, 4.0)
        assert now.k is None
    at_once = loss_settings(numbers_of(small_spec(settings=settings, sparsity_warmup=0)), 0)
    assert float(at_once.sparsity) == 2.0


def test_active_latents_fall_to_k_and_stay():
    spec = small_spec(k_start=20, k_anneal_steps=8)
    found = [int(active(numbers_of(spec), step)) for step in range(12)]
    assert found == [20, 18, 16, 14, 12, 10, 8, 6, 4, 4, 4, 4]
    assert program_of(spec).dictionary.k == 20 and spec.dictionary.k == 4
    assert small_spec(k_start=20, steps=200).k_anneal_used == 20


def test_annealing_compiles_once_and_ends_as_the_dictionary_says(tmp_path):
    rows, _ = sparse_rows(1_000)
    spec = small_spec(dictionary=TopK(16, 64, 3), k_start=12, k_anneal_steps=10)
    step = make_step(spec)
    before = step._cache_size()
    state = init_state(spec, sample=rows[:256])
    l0, k = [], []
    for i in range(14):
        state, metrics = step(state, rows[64 * i : 64 * (i + 1)])
        l0.append(float(metrics["l0"][0]))
        k.append(float(metrics["k"][0]))
    assert step._cache_size() - before <= 1
    assert k == [round(12 - 0.9 * i) for i in range(10)] + [3.0] * 4
    assert (np.array(l0) <= np.array(k)).all() and l0[0] > 8 and l0[-1] > 2.5
    [trained] = train(spec, rows, tmp_path)
    assert trained.spec == TopK(16, 64, 3) and trained.path.name == "k3"
    assert trained.spec.encode(trained.params, rows).indices.shape == (1_000, 3)


def test_annealing_at_its_end_is_the_step_without_it():
    rows, _ = sparse_rows(64)
    plain, annealed = small_spec(), small_spec(k_start=12, k_anneal_steps=1)
    states = []
    for spec in (plain, annealed):
        state = init_state(spec, sample=rows)
        state, metrics = make_step(spec)(dataclasses.replace(state, step=state.step + 5), rows)
        states.append((jax.device_get(state.params), float(metrics["loss"][0])))
    assert states[0][1] == pytest.approx(states[1][1], rel=1e-6)
    for name, value in states[0][0].items():
        np.testing.assert_allclose(states[1][0][name], value, atol=2e-6, err_msg=name)


def test_the_table_of_defaults():
    wide = TopK(3584, 2**14, 80)
    assert defaults(wide) == defaults(BatchTopK(3584, 2**14, 80)) == defaults(Matryoshka(3584, 2**14, 80))
    row = defaults(wide)
    assert (row.lr, row.betas, row.eps, row.settings.aux) == (2e-4, (0.9, 0.999), 6.25e-10, 1 / 32)
    jump = TrainSpec(JumpReLU(64, 256), steps=200_000)
    assert (jump.lr_used, jump.betas_used, jump.eps_used) == (7e-5, (0.0, 0.999), 1e-8)
    assert (jump.warmup_used, jump.sparsity_warmup_used) == (1_000, 10_000)
    tanh = TrainSpec(JumpReLU(64, 256, penalty="tanh"), steps=500)
    assert tanh.sparsity_warmup_used == 500 and tanh.settings_used.preactivation == 3e-6 / 8
    gated = TrainSpec(Gated(64, 256), steps=200_000)
    assert (gated.lr_used, gated.betas_used) == (5e-5, (0.0, 0.999))
    paper = TrainSpec(ReLU(768, 24_576, d_out=768, error="over_norm", input_bias=True), steps=14_648, target="mlp_out@8")
    assert (paper.lr_used, paper.settings_used.sparsity, paper.warmup_used, paper.sparsity_warmup_used) == (4e-4, 1.4e-4, 4_980, 0)
    binary = TrainSpec(Binary(64, 256), steps=2_000)
    assert (binary.lr_used, binary.settings_used.entropy, binary.settings_used.covariance, binary.warmup_used) == (5e-4, 1e-7, 1e-7, 0)
    assert TrainSpec(TopK(8, 64, 2), steps=40, optimizer="lion", lr=None).betas_used == (0.9, 0.99)
    assert TrainSpec(JumpReLU(8, 64), steps=40, optimizer="lion").lr_used == pytest.approx(0.3 * 7e-5)
    assert TrainSpec(JumpReLU(8, 64), steps=40, optimizer="schedule_free").betas_used == (0.9, 0.999)


def test_names():
    name = lambda dictionary, **more: TrainSpec(dictionary, steps=9, **{"site": "resid_post@5", **more}).name  # noqa: E731
    assert name(TopK(8, 16, 4)) == "resid_post@5_k4" and name(TopK(8, 16, 4), site=None) == "k4"
    assert name(BatchTopK(8, 16, 4)) == "resid_post@5_batch_topk_k4"
    assert name(ReLU(8, 16), settings=LossSettings(sparsity=0.03)) == "resid_post@5_relu_s0.03"
    assert name(JumpReLU(8, 16, penalty="target"), settings=LossSettings(sparsity=1.0, target_l0=20.0)) == "resid_post@5_jumprelu_l20"
    assert name(Binary(8, 16)) == "resid_post@5_binary_e1e-07_c1e-07"
    assert name(TopK(8, 16, 4, d_out=8), site="mlp_in@5", target="mlp_out@5") == "mlp_in@5_to_mlp_out@5_k4"
    assert name(TopK(8, 16, 4), label="mine") == "mine"


TOPK, GROUPS = TopK(16, 64, 4), TopK(16, 64, 4, rule="groups")
MISTAKES = {
    "transcoder without target": (dict(dictionary=TopK(16, 64, 4, d_out=16)), "a transcoder .d_out. needs the site that it writes"),
    "target of an autoencoder": (dict(target="a"), "target='a' belongs to a transcoder"),
    "unknown optimizer": (dict(optimizer="sgd"), "optimizer 'sgd' is not known: one of adam, adam_bf16"),
    "unknown schedule": (dict(schedule="wave"), "schedule 'wave' is not known: one of linear, cosine, constant"),
    "k in settings": (dict(settings=LossSettings(k=3)), "settings.k is set by the training"),
    "negative weight": (dict(settings=LossSettings(sparsity=-1.0)), "settings.sparsity = -1.0 must be 0 or above"),
    "no target L0": (dict(dictionary=JumpReLU(16, 64, penalty="target")), "needs a target"),
    "k_start without k": (dict(dictionary=ReLU(16, 64), k_start=9), "k_start is for dictionaries with a k, not for ReLU"),
    "k_start below k": (dict(k_start=3), "k_start = 3 must lie between k = 4 and width = 64"),
    "k_start of groups": (dict(dictionary=GROUPS, k_start=8), "does not go with the rule 'groups'"),
    "annealing too long": (dict(k_start=8, k_anneal_steps=24), "k_anneal_steps = 24 must leave steps at the final k: below 24"),
    "annealing without start": (dict(k_anneal_steps=4), "give k_start as well"),
    "ema": (dict(ema=1.0), "ema = 1.0 is the decay of an average"),
    "two averages": (dict(ema=0.9, optimizer="schedule_free"), "ema does not go with optimizer='schedule_free'"),
    "no share": (dict(betas=(0.0, 0.9), optimizer="schedule_free"), "needs a first beta above 0"),
    "label": (dict(label="a/b"), "label 'a/b' should be the name of a folder"),
    "resample": (dict(resample_every=0), "resample_every = 0 must be an integer of at least 1"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake):
    changes, message = MISTAKES[mistake]
    with pytest.raises(UserError, match=message) as error:
        small_spec(**changes)
    assert "\n" not in str(error.value)
