"""The verbs on tiny models: what they leave behind, that nothing is done twice, and that a mistake leaves nothing."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dlmscope_jax import config
from dlmscope_jax.activations import ActivationStore
from dlmscope_jax.cli import main
from dlmscope_jax.dictionaries import DictionaryMeta, TopK, load_dictionary, save_dictionary
from dlmscope_jax.errors import UserError
from dlmscope_jax.recipes import pipeline, work
from dlmscope_jax.recipes.configs import Released, Run
from dlmscope_jax.recipes.quickstart import quickstart

ROOT = Path(__file__).resolve().parent.parent.parent


def files(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in sorted(folder.rglob("*")) if p.is_file()}


def changed(before: dict[str, int], after: dict[str, int]) -> set[str]:
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


def test_the_whole_way(finished):
    run, out = finished
    folder = Path(run.root) / run.name
    report = folder / "report.html"
    assert str(report.resolve()) in out and str(folder.resolve()) in out
    for model in ("llada", "llama", "dream"):
        for layer in (0, 1):
            assert f"{model}/resid_post@{layer}_k4" in out
            spec, params, meta = load_dictionary(folder / "dictionaries" / model / f"resid_post@{layer}_k4")
            assert (spec.width, spec.k, spec.d_in, meta.layer) == (32, 4, 16, layer)
            assert np.isfinite(np.asarray(params["W_dec"])).all()
        train = ActivationStore.open(folder / "harvest" / model / "train")
        test = ActivationStore.open(folder / "harvest" / model / "test")
        assert train.rows >= run.harvest.train_rows and test.rows >= run.harvest.test_rows
        assert train.meta["blocks"]["side"] == "train" and test.meta["blocks"]["side"] == "test"
        policy = "clean" if model == "llama" else "rate"
        assert train.meta["corruption"]["policy"] == policy
        kinds = {json.loads(p.read_text())["kind"] for p in (folder / "results").glob(f"{model}.*.json")}
        assert kinds == {"fidelity", "delta_loss", "features", "steered_generation"}
    summary = json.loads((folder / "results" / "run.json").read_text())
    assert [m["objective"] for m in summary["models"]] == ["diffusion", "shifted diffusion", "autoregressive"]
    assert config.load(Run, folder / "config.yaml") == run
    assert b"http" not in b"".join(line for line in report.read_bytes().split(b"\n") if b"src=" in line)


def test_a_run_can_fold_the_weights(small_run, model_folders):
    run = dataclasses.replace(small_run, models=(model_folders["llama"],), weight_processing="folded")
    pipeline.harvest(run)
    pipeline.train(run)
    folder = Path(run.root) / run.name
    assert ActivationStore.open(folder / "harvest" / "llama" / "train").meta["weight_processing"] == "folded"
    assert load_dictionary(folder / "dictionaries" / "llama" / "resid_post@0_k4")[2].weight_processing == "folded"
    pipeline.evaluate(run)
    with pytest.raises(UserError, match="weight.processing|folded"):
        pipeline.evaluate(dataclasses.replace(run, weight_processing="raw"))


def test_a_second_run_reuses_what_is_there(finished_copy):
    run, folder = finished_copy
    summary = json.loads((folder / "results" / "run.json").read_text())
    before = files(folder)
    quickstart(run)
    rewritten = changed(before, files(folder))
    assert rewritten <= {"config.yaml", "report.html", "results/run.json"}, rewritten
    assert json.loads((folder / "results" / "run.json").read_text())["times"] == summary["times"]


def test_the_verbs_one_by_one_do_what_the_quickstart_does(finished_copy, model_folders, tmp_path):
    run, _ = finished_copy
    other = dataclasses.replace(run, name="verbs", models=(model_folders["llada"],))
    path = tmp_path / "verbs.yaml"
    path.write_text(config.dump(other))
    for verb in ("harvest", "train", "evaluate", "report"):
        assert main([verb, str(path)]) == 0
    for result in ("fidelity", "delta_loss"):
        name = f"results/llada.resid_post@1_k4.{result}.json"
        one, two = (json.loads((Path(run.root) / n / name).read_text()) for n in (run.name, "verbs"))
        assert one == two


def test_the_report_goes_on_with_a_plan_beside_it(finished_copy):
    run, folder = finished_copy
    (folder / "results" / "plan.json").write_text(json.dumps({"kind": "plan", "version": 1}))
    pipeline.report(run)


def test_a_changed_setting_measures_again_only_what_depends_on_it(finished_copy, model_folders):
    run, folder = finished_copy
    run = dataclasses.replace(run, models=(model_folders["llama"],))
    before = files(folder)
    pipeline.evaluate(dataclasses.replace(run, evaluate=dataclasses.replace(run.evaluate, blocks=3)))
    rewritten = changed(before, files(folder)) - {"config.yaml", "results/run.json"}
    assert rewritten and all(name.endswith("delta_loss.json") for name in rewritten), rewritten


def test_a_damaged_result_is_measured_again(finished_copy, model_folders):
    run, folder = finished_copy
    path = folder / "results" / "llama.resid_post@0_k4.fidelity.json"
    whole = json.loads(path.read_text())
    path.write_text(path.read_text()[:100])
    pipeline.evaluate(dataclasses.replace(run, models=(model_folders["llama"],)))
    assert json.loads(path.read_text()) == whole


@pytest.mark.some(1)
@pytest.mark.parametrize("family", ["llada", "dream"])
def test_the_open_configs_examine_a_released_dictionary(family, model_folders, corpus, tmp_path, capsys):
    """The real files' layout, made here; the real config, pointed at it."""
    real = config.load(Run, ROOT / "configs" / f"open_dlm_scope_{family}.yaml")
    (released,) = real.released
    subfolder = released.subfolder.replace(released.site.replace("@", "_layer_"), "resid_post_layer_1")
    spec = TopK(d_in=16, width=24, k=3)
    import jax

    meta = DictionaryMeta(model=real.models[0], site="resid_post@1", layer=1, select="masked")
    save_dictionary(tmp_path / "sae" / subfolder, spec, spec.init(jax.random.key(0)), meta, format="dictionary_learning")
    overrides = [
        f"--root={tmp_path / 'runs'}", f"--models=[{model_folders[family]}]", f"--data.path={corpus}", "--data.block_length=32",
        "--harvest.sites=[resid_post@1]", "--harvest.test_rows=500", "--evaluate.blocks=3", "--evaluate.rates=[0.45]",
        f"--released=[{{path: {tmp_path / 'sae'}, subfolder: {subfolder}, site: resid_post@1, select: masked}}]", "--report.new_tokens=4",
    ]  # fmt: skip
    assert main(["quickstart", str(ROOT / "configs" / f"open_dlm_scope_{family}.yaml"), *overrides]) == 0
    folder = tmp_path / "runs" / real.name
    assert (folder / "report.html").is_file() and not (folder / "dictionaries").exists()
    assert not (folder / "harvest" / family / "train").exists()
    fidelity = json.loads((folder / "results" / f"{family}.resid_post@1_k3.fidelity.json").read_text())
    assert fidelity["own"] == "masked" and 0 < fidelity["sets"]["masked"]["rows"] < fidelity["sets"]["all"]["rows"]
    features = json.loads((folder / "results" / f"{family}.resid_post@1_k3.features.json").read_text())
    assert features["select"] == "masked" and 1 <= len(features["records"]) <= 50
    assert main(["train", str(ROOT / "configs" / f"open_dlm_scope_{family}.yaml"), *overrides]) == 2
    assert "nothing to train" in capsys.readouterr().err


def test_a_released_dictionary_of_another_layer_is_refused(small_run, model_folders, tmp_path):
    import jax

    spec = TopK(d_in=16, width=24, k=3)
    meta = DictionaryMeta(model="m", site="resid_post@2", layer=2)
    save_dictionary(tmp_path / "sae", spec, spec.init(jax.random.key(0)), meta)
    run = dataclasses.replace(small_run, models=(model_folders["llada"],), released=(Released(str(tmp_path / "sae"), "resid_post@1"),))
    pipeline.harvest(run)
    with pytest.raises(UserError, match="resid_post@2.*resid_post@1"):
        pipeline.evaluate(run)


def test_released_dictionaries_that_cannot_be_told_apart_or_belong_elsewhere_are_refused(small_run, model_folders, tmp_path):
    import jax

    spec = TopK(d_in=16, width=24, k=3)
    for name, trained_on in (("one", "m"), ("two", "m"), ("other", "owner/another-model")):
        meta = DictionaryMeta(model=trained_on, site="resid_post@1", layer=1)
        save_dictionary(tmp_path / name, spec, spec.init(jax.random.key(0)), meta)
    both = tuple(Released(str(tmp_path / name), "resid_post@1") for name in ("one", "two"))
    run = dataclasses.replace(small_run, models=(model_folders["llada"],), released=both)
    pipeline.harvest(run)
    with pytest.raises(UserError, match="two dictionaries of resid_post@1 with k = 3"):
        pipeline.evaluate(run)
    with pytest.raises(UserError, match="owner/another-model"):
        pipeline._check_model("owner/this-model", "sae", "owner/another-model")


def test_training_at_a_site_that_was_not_harvested_is_refused(small_run, model_folders):
    run = dataclasses.replace(small_run, models=(model_folders["llada"],), name="sites")
    pipeline.harvest(run)
    elsewhere = dataclasses.replace(run, harvest=dataclasses.replace(run.harvest, sites=("mlp_out@0",)))
    with pytest.raises(UserError, match="mlp_out@0 was not harvested"):
        pipeline.train(elsewhere)


def one_line(capsys, *arguments: str) -> str:
    assert main(list(arguments)) == 2
    error = capsys.readouterr().err.splitlines()
    assert error[-1].startswith("dlmscope: ") and not any("Traceback" in line for line in error)
    return error[-1]


def test_mistakes_of_a_run_are_one_line_and_leave_nothing_half_written(small_run, model_folders, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(config.dump(dataclasses.replace(small_run, models=(model_folders["llada"],))))
    folder = Path(small_run.root) / small_run.name

    assert "no such folder" in one_line(capsys, "harvest", str(path), "--models=[nowhere/at/all]")
    assert "resid_post@7" in one_line(capsys, "harvest", str(path), "--harvest.sites=[resid_post@7]")
    assert "/no/text" in one_line(capsys, "harvest", str(path), "--data.path=/no/text")
    (tmp_path / "empty").mkdir()
    assert "empty" in one_line(capsys, "harvest", str(path), f"--data.path={tmp_path / 'empty'}")
    assert "harvest" in one_line(capsys, "train", str(path))
    assert not list(folder.glob("harvest/*/*/manifest*")) and not (folder / "dictionaries").exists()

    assert main(["harvest", str(path)]) == 0
    assert "dlmscope train" in one_line(capsys, "evaluate", str(path))
    assert "dlmscope" in one_line(capsys, "report", str(path))
    # the same folder, asked for something else
    assert "seed" in one_line(capsys, "harvest", str(path), "--seed=5")
    leftovers = [p for p in folder.rglob("*") if p.name.endswith((".part", ".tmp"))]
    assert not leftovers


def test_a_store_of_another_model_is_refused(small_run, model_folders, tmp_path, capsys):
    """The weights change under a run's feet."""
    import shutil

    import jax

    from dlmscope_jax.models import init_params, load_model, save_model

    mine = tmp_path / "llada"
    shutil.copytree(model_folders["llada"], mine)
    path = tmp_path / "run.yaml"
    path.write_text(config.dump(dataclasses.replace(small_run, models=(str(mine),))))
    assert main(["harvest", str(path)]) == 0 and main(["train", str(path)]) == 0
    model, _ = load_model(mine)
    save_model(mine, model, init_params(model, jax.random.key(9)))
    capsys.readouterr()
    assert "model" in one_line(capsys, "harvest", str(path))
    assert "model" in one_line(capsys, "evaluate", str(path))


@pytest.mark.slow
def test_a_run_killed_at_any_moment_goes_on(small_run, model_folders, tmp_path):
    """A real kill -9 in the middle of harvest or training, then the same command."""
    run = dataclasses.replace(small_run, models=(model_folders["llada"],), name="killed")
    run = dataclasses.replace(run, train=dataclasses.replace(run.train, steps=40, checkpoint_every=5))
    path = tmp_path / "run.yaml"
    path.write_text(config.dump(run))
    folder = Path(run.root) / run.name
    for verb, waits_for in (("harvest", "harvest/llada/train/*"), ("train", "dictionaries/llada/*/checkpoints/*")):
        command = [sys.executable, "-m", "dlmscope_jax.cli", verb, str(path)]
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        start = time.monotonic()
        while not list(folder.glob(waits_for)) and process.poll() is None and time.monotonic() - start < 120:
            time.sleep(0.01)
        process.kill()
        assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    undisturbed = dataclasses.replace(run, name="undisturbed")
    pipeline.harvest(undisturbed)
    pipeline.train(undisturbed)
    for site in ("resid_post@0", "resid_post@1"):
        one, two = (load_dictionary(folder.parent / name / "dictionaries" / "llada" / f"{site}_k4") for name in ("killed", "undisturbed"))
        for leaf in one[1]:
            np.testing.assert_array_equal(np.asarray(one[1][leaf]), np.asarray(two[1][leaf]))


def test_a_result_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "results" / "a.json"
    work.write_whole(path, "old")

    def fail(*_):
        raise OSError("no space")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError):
        work.write_whole(path, "new")
    assert path.read_text() == "old" and [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_models_that_would_share_a_folder_are_refused(small_run):
    with pytest.raises(UserError, match="share a folder"):
        work.Work(dataclasses.replace(small_run, models=("a/same", "b/same")))


def test_the_choice_of_blocks(small_run):
    at_work = work.Work(small_run)
    name = small_run.models[0]
    few = at_work.some_blocks(name, "train", 500)
    assert 500 <= (few.documents >= 0).sum() < 500 + 2 * 32
    again = at_work.some_blocks(name, "train", 500)
    np.testing.assert_array_equal(few.tokens, again.tokens)
    whole = at_work.blocks(name, "train")
    more = at_work.some_blocks(name, "train", 3 * (whole.documents >= 0).sum(), repeat=True)
    assert len(more) >= 3 * len(whole) - 1
    assert len(at_work.some_blocks(name, "test", 10**9)) == len(at_work.blocks(name, "test"))
