"""``train`` from its different sources, and what it says of mistakes."""

import itertools
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlmscope_jax.activations import ActivationStore
from dlmscope_jax.dictionaries import LossSettings, TopK, load_dictionary
from dlmscope_jax.errors import UserError
from dlmscope_jax.training import Checkpoints, init_state, make_step, read_metrics, run, train

from .conftest import assert_same_bits, small_spec, sparse_rows

ROWS, _ = sparse_rows(1_000)
OTHER, _ = sparse_rows(1_000, seed=1)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    store = ActivationStore.create(
        tmp_path_factory.mktemp("store") / "rows",
        {"resid_post@2": 16, "resid_post@4": 16},
        {
            "model": "pocket-dlm", "model_identity": "abc", "tokenizer": "def", "weight_processing": "folded",
            "corruption": {"policy": "rate", "low": 0.05, "high": 1.0},
        },
        shard_rows=512,
        chunk_rows=64,
    )  # fmt: skip
    store.append({"resid_post@2": ROWS, "resid_post@4": OTHER}, {"is_masked": np.arange(1_000) % 2 == 0})
    return store.finish()


def test_several_together_are_each_alone(store, final_states, tmp_path):
    specs = [
        small_spec(site="resid_post@2"),
        small_spec(site="resid_post@2", dictionary=TopK(16, 64, 6)),
        small_spec(site="resid_post@4"),
        # of the first one's program, with other numbers and other first weights
        small_spec(site="resid_post@2", label="other_weights", init_seed=7),
        small_spec(site="resid_post@2", label="other_rate", lr=1e-3, settings=LossSettings(aux=0.1), dead_rows=64),
    ]
    assert make_step(specs[0]) is make_step(specs[3]) is make_step(specs[4])
    together = train(specs, store, tmp_path / "together")
    states = dict(final_states)
    assert list(states) == ["resid_post@2_k4", "resid_post@2_k6", "resid_post@4_k4", "other_weights", "other_rate"]
    for spec, trained in zip(specs, together, strict=True):
        final_states.clear()
        [alone] = train(spec, store, tmp_path / "alone")
        assert_same_bits(final_states[spec.name], states[spec.name])
        assert_same_bits(alone.params, trained.params)
        for name in ("config.json", "weights.safetensors", "metrics.jsonl"):
            assert (alone.path / name).read_bytes() == (trained.path / name).read_bytes()
    assert len({trained.params["W_dec"].tobytes() for trained in map(_on_host, together)}) == 5


def _on_host(trained):
    return trained._replace(params={name: np.asarray(value) for name, value in trained.params.items()})


def test_what_is_saved_acts_on_raw_rows_and_says_where_it_belongs(store, final_states, tmp_path):
    spec = small_spec(site="resid_post@4", select="visible", steps=300, batch_size=64)
    [trained] = train(spec, store, tmp_path)
    visible = OTHER[1::2].astype(jnp.bfloat16).astype(np.float32)
    scale = np.sqrt(np.square(visible.astype(np.float64)).sum(1).mean())
    meta = trained.meta
    assert (meta.model, meta.model_identity, meta.tokenizer, meta.weight_processing) == ("pocket-dlm", "abc", "def", "folded")
    assert (meta.site, meta.layer, meta.select, meta.corruption) == ("resid_post@4", 4, "visible", "rate U[0.05, 1]")
    assert (meta.seed, meta.steps, meta.scale_folded) == (0, 300, True)
    # the sample is the first 256 of the visible rows
    np.testing.assert_allclose(meta.input_scale, scale, rtol=0.05)
    state = final_states["resid_post@4_k4"]
    inner = trained.spec.reconstruct(jax.tree.map(jnp.asarray, state.params), visible / meta.input_scale)
    outer = np.asarray(trained.spec.reconstruct(trained.params, visible))
    np.testing.assert_allclose(outer / meta.input_scale, inner, atol=1e-4)
    unexplained = np.square(visible - outer).sum() / np.square(visible - visible.mean(0)).sum()
    assert unexplained < 0.4
    spec_there, params_there, meta_there = load_dictionary(tmp_path / "resid_post@4_k4")
    assert spec_there == trained.spec and meta_there == meta
    assert_same_bits(params_there, trained.params)


def test_a_finished_training_gives_its_memory_back_before_any_is_read(monkeypatch, tmp_path):
    runs, result = [], run.Run.result
    real = run.Run.__init__
    monkeypatch.setattr(run.Run, "__init__", lambda self, *arguments: (runs.append(self), real(self, *arguments))[1])
    monkeypatch.setattr(run.Run, "result", lambda self: (seen.append([hasattr(run, "state") for run in runs]), result(self))[1])
    seen = []
    train([small_spec(), small_spec(lr=1e-3, label="other")], ROWS, tmp_path)
    assert seen == [[False, False], [False, False]]


def test_first_weights_have_a_seed_of_their_own():
    weights = lambda **seeds: np.asarray(init_state(small_spec(**seeds)).params["W_enc"])  # noqa: E731
    np.testing.assert_array_equal(weights(seed=3), weights(init_seed=3))
    np.testing.assert_array_equal(weights(seed=3), weights(seed=5, init_seed=3))
    assert (weights(seed=3) != weights(seed=3, init_seed=4)).any()


def test_metrics_are_means_over_intervals_without_times(tmp_path):
    [trained] = train(small_spec(steps=24), ROWS, tmp_path)
    lines = read_metrics(trained.path / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 25))
    assert lines[-1]["rows"] == 24 * 64
    names = {
        "aux",
        "dead",
        "explained_variance",
        "grad_norm",
        "l0",
        "learning_rate",
        "loss",
        "loss_aux",
        "loss_reconstruction",
        "reconstruction",
        "skipped",
    }
    assert all(set(line) == {"step", "rows"} | names for line in lines)
    assert lines[-1]["reconstruction"] < 0.7 * lines[0]["reconstruction"]


def test_a_second_call_loads_what_is_there(tmp_path):
    [first] = train(small_spec(), ROWS, tmp_path)
    before = (first.path / "weights.safetensors").stat().st_mtime_ns
    (first.path / "checkpoints" / "step_00000020").mkdir(parents=True)  # left by a process that was killed at the very end
    [second] = train(small_spec(), ROWS, tmp_path)
    assert (first.path / "weights.safetensors").stat().st_mtime_ns == before
    assert_same_bits(first.params, second.params)
    assert not (first.path / "checkpoints").exists()
    with pytest.raises(UserError, match=r"dictionary of another training \(training.seed is 0 there and 1 here\): choose another run_dir"):
        train(small_spec(seed=1), ROWS, tmp_path)


def test_sources_of_every_kind(store, tmp_path):
    spec = small_spec()
    order = [np.random.default_rng([0, epoch]).permutation(1_000)[:960].reshape(15, 64) for epoch in range(2)]
    batches = [ROWS[rows] for rows in np.concatenate(order)]

    def reused():
        """One buffer that is filled again and again, as a careless generator does."""
        buffer = np.empty((64, 16), np.float32)
        for batch in batches:
            buffer[:] = batch
            yield buffer

    [array] = train(spec, ROWS, tmp_path / "array")
    for name, source in {
        "jax": jnp.asarray(ROWS),
        "generator": reused(),
        "batches": [{"mlp_out@1": batch} for batch in batches],
        "mapping": {"mlp_out@1": ROWS},
    }.items():
        [found] = train(spec, source, tmp_path / name)
        assert_same_bits(found.params, array.params)
    assert found.meta.site == "mlp_out@1" and found.meta.layer == 1
    assert array.meta.model == "unknown" and array.meta.layer == -1
    [half] = train(spec, ROWS.astype(jnp.bfloat16), tmp_path / "bfloat16", meta={"model": "mine", "layer": 3, "extra": {"note": 1}})
    np.testing.assert_allclose(half.params["W_dec"], array.params["W_dec"], atol=0.05)
    assert half.meta.model == "mine" and half.meta.layer == 3 and half.meta.extra["note"] == 1


def test_an_iterator_resumes_from_its_start(tmp_path):
    spec = small_spec()
    make = lambda: (ROWS[rows] for rows in np.random.default_rng(0).integers(1_000, size=(24, 64)))  # noqa: E731
    [whole] = train(spec, make(), tmp_path / "whole")
    with pytest.raises(UserError, match="the iterator ended after 14 batches of 64: give more rows or fewer steps"):
        train(spec, itertools.islice(make(), 14), tmp_path / "parts", checkpoints=Checkpoints(every=5))
    [parts] = train(spec, make(), tmp_path / "parts", checkpoints=Checkpoints(every=5))
    assert_same_bits(parts.params, whole.params)


def test_bad_batches_are_skipped_and_reported(tmp_path, caplog):
    rows = np.random.default_rng(0).integers(1_000, size=(24, 64))
    batches = [ROWS[r].copy() for r in rows]
    batches[9][5, 3] = np.nan
    batches[2][0, 0] = np.inf  # within the sample
    with caplog.at_level(logging.WARNING):
        [trained] = train(small_spec(), batches, tmp_path)
    assert [r.message.split("batch of ")[1] for r in caplog.records] == [
        f"step {step} skipped: its loss or gradient is not finite" for step in (2, 9)
    ]
    assert trained.meta.extra["skipped_batches"] == 2
    lines = read_metrics(trained.path / "metrics.jsonl")
    assert [line["step"] for line in lines if line["skipped"]] == [3, 10]
    assert lines[9]["loss"] is None
    assert all(np.isfinite(value).all() for value in trained.params.values())


def test_nothing_but_bad_batches_stops(tmp_path):
    bad = np.full_like(ROWS, np.nan)
    with pytest.raises(UserError, match="none of its first 256 rows is finite"):
        train(small_spec(), bad, tmp_path / "all")
    bad = ROWS.copy()
    bad[::10, 3] = np.nan
    with pytest.raises(UserError, match=r"the last 20 batches of k4 \(to step 19\) were skipped"):
        train(small_spec(), bad, tmp_path / "some")
    with pytest.raises(UserError, match="all zero"):
        train(small_spec(), np.zeros_like(ROWS), tmp_path / "zero")


class _NoSource:
    pass


MISTAKES = {
    "width": (lambda: small_spec(dictionary=TopK(24, 64, 4)), ROWS, "rows of 16 entries, the dictionary k4 reads 24: use d_in=16"),
    "k above N": (lambda: small_spec(dictionary=TopK(16, 8, 9)), ROWS, "k = 9 is more than the 8 latents"),
    "empty": (small_spec, np.zeros((0, 16), np.float32), r"shape \[0, 16\]: it must be \[rows, D\]"),
    "no width": (small_spec, np.zeros((10, 0), np.float32), r"shape \[10, 0\]"),
    "one dimension": (small_spec, ROWS[0], r"shape \[16\]"),
    "integers": (small_spec, ROWS.astype(np.int32), "holds int32: activations are floats"),
    "too few": (small_spec, ROWS[:63], "63 rows are fewer than one batch of 64"),
    "path": (small_spec, "runs/x", "'runs/x' is a path: give the opened store"),
    "no source": (small_spec, _NoSource(), "cannot read rows from a _NoSource"),
    "no rows": (small_spec, [], "the iterator ended after 0 batches"),
    "other batch": (small_spec, [ROWS[:32]], "batch 0 of the iterator has 32 rows, TrainSpec says batch_size=64"),
    "no site": (lambda: small_spec(site="resid_post@9"), {"a": ROWS}, "no site 'resid_post@9': it has a"),
    "which site": (small_spec, {"a": ROWS, "b": ROWS}, "the sites a, b: say which one"),
    "lengths": (lambda: small_spec(site="a"), {"a": ROWS, "b": ROWS[:500]}, r"different numbers of rows \(a: 1000, b: 500\)"),
    "select": (lambda: small_spec(select="masked"), ROWS, "select='masked' needs a store"),
    "none": (lambda: [], ROWS, "no dictionary to train"),
    "names": (lambda: [small_spec(), small_spec(lr=1e-4)], ROWS, "two dictionaries are called 'k4'"),
    "steps": (lambda: [small_spec(), small_spec(steps=9)], ROWS, "share their steps, got 24, 9"),
    "no steps": (lambda: small_spec(steps=0), ROWS, "steps = 0 must be an integer of at least 1"),
    "rate": (lambda: small_spec(lr=float("nan")), ROWS, "lr = nan must be above 0"),
    "decay": (lambda: small_spec(decay_start=0.0), ROWS, "decay_start = 0.0 is a share"),
    "transcoder": (lambda: small_spec(dictionary=TopK(16, 64, 4, d_out=16)), ROWS, "a transcoder"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_clear_line(mistake, tmp_path):
    make, source, message = MISTAKES[mistake]
    with pytest.raises(UserError, match=message) as error:
        train(make(), source, tmp_path)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_mistakes_with_a_store(store, tmp_path):
    with pytest.raises(UserError, match="500 rows to select as 'masked': fewer than one batch of 600"):
        train(small_spec(site="resid_post@2", select="masked", batch_size=600), store, tmp_path)
    with pytest.raises(UserError, match="needs the column 'predicts_masked'"):
        train(small_spec(site="resid_post@2", select="predicting"), store, tmp_path)
    with pytest.raises(UserError, match="meta has no field 'modle'"):
        train(small_spec(site="resid_post@2"), store, tmp_path, meta={"modle": "x"})
    assert not list(tmp_path.iterdir())


def test_a_foreign_dictionary_is_not_overwritten(tmp_path):
    (tmp_path / "k4").mkdir()
    (tmp_path / "k4" / "config.json").write_text(json.dumps({"something": 1}))
    with pytest.raises(UserError, match="k4"):
        train(small_spec(), ROWS, tmp_path)
    assert json.loads((tmp_path / "k4" / "config.json").read_text()) == {"something": 1}
