"""``dlmscope plan`` on this machine's device, what it advises, and ``dlmscope profile``."""

import dataclasses
import importlib.util
import json
import re
import shutil
from pathlib import Path

import jax
import pytest

from dlmscope_jax import config
from dlmscope_jax.errors import UserError
from dlmscope_jax.models import load_model, read_model
from dlmscope_jax.recipes import meshes, pipeline, plan
from dlmscope_jax.recipes.advice import Bytes, changes, scaled
from dlmscope_jax.recipes.configs import Dictionary, Mesh, Run, Synthetic, Train
from dlmscope_jax.recipes.profile import profile
from dlmscope_jax.recipes.work import Work
from dlmscope_jax.training import chips
from dlmscope_jax.training.planning import Parts

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def bare(model_folders, tmp_path) -> str:
    """A model's folder with nothing but its ``config.json``."""
    folder = tmp_path / "bare" / "llada"
    folder.mkdir(parents=True)
    shutil.copy(Path(model_folders["llada"]) / "config.json", folder)
    return str(folder)


def test_a_plan_needs_no_weights_and_says_what_there_will_be(small_run, bare, model_folders, capsys, monkeypatch):
    tiny = dataclasses.replace(chips.chip_of("TPU v5 lite"), memory=40e3)
    monkeypatch.setattr(plan, "chip_of", lambda kind: tiny)
    run = dataclasses.replace(small_run, models=(bare,), dictionary=Dictionary(width=32, k=(4, 8)))
    found = plan.plan(run)
    assert json.loads((Path(run.root) / run.name / "results" / "plan.json").read_text()) == json.loads(json.dumps(found))
    (model,) = found["models"]
    harvest, train = model["programs"]
    _, params = load_model(model_folders["llada"])
    assert harvest["bytes"]["parameters"] == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert harvest["rows"] == 16 * 32 and harvest["steps"] == pytest.approx(2600 / 512) and harvest["bytes"]["temporary"] > 0
    one = 4 * (2 * 32 * 16 + 32 + 16)  # of the four dictionaries
    assert train["bytes"]["parameters"] == 4 * one and train["bytes"]["optimiser"] == 4 * (2 * one + 4 * 32)
    assert train["bytes"]["saving"] == train["bytes"]["parameters"] + train["bytes"]["optimiser"]
    assert train["seconds"] == pytest.approx(6 * train["step_seconds"]) and not train["collectives"]
    assert not train["fits"] and not harvest["fits"] and model["store_bytes"] == 2600 * (2 * 16 * 2 + 26)
    printed = capsys.readouterr()
    for words in ("GB on one device", "train 4 dictionaries", "time at the makers' peaks", "does not fit"):
        assert words in printed.out
    assert printed.err.count("plan: compiling") == 2


def test_advice_is_what_fits(tmp_path):
    """Dream-7B's 36 dictionaries on 256 chips: every change that is named makes it fit, and is one that the configuration takes."""
    run = config.load(Run, ROOT / "configs" / "dream_v5e_256.yaml")
    widths = dict.fromkeys(run.harvest.sites, 3584)
    parts, measured = Parts(64, 4), Bytes(12.7e9, 12.7e9, 0.1e9, 1.5e9)
    found = changes(run, None, widths, measured, parts, 15.2e9, "train")
    assert found and any("mesh.model=16" in words or "mesh.model=8" in words for words in found)
    for words in found:
        said = re.findall(r"--([\w.]+=(?:\[[^]]*\]|\S+))", words)
        (size,) = re.findall(r"\((\d+\.\d) GB\)", words)
        changed = config.load(Run, ROOT / "configs" / "dream_v5e_256.yaml", said)
        new = Parts(changed.mesh.data, changed.mesh.model)
        assert scaled(run, changed, None, widths, measured, parts, new, "train").total == pytest.approx(1e9 * float(size), abs=0.06e9)
        assert float(size) <= 15.2
    # where no single change is enough, two are; where none are, nothing is said
    pairs = changes(run, None, widths, measured, parts, 3.65e9, "train")
    assert len(pairs) == 1 and " and --" in pairs[0]
    one = dataclasses.replace(run, dictionary=dataclasses.replace(run.dictionary, k=(50,)))
    assert changes(one, None, {"resid_post@1": 3584}, measured, parts, 1e6, "train") == []


def test_advice_for_a_harvest_keeps_the_heads_whole(tmp_path):
    folder = tmp_path / "dream"
    folder.mkdir()
    from published_configs import PUBLISHED

    (folder / "config.json").write_text(json.dumps(PUBLISHED["Dream-v0-Base-7B"].keys))
    model = read_model(folder, "bfloat16")
    run = dataclasses.replace(config.load(Run, ROOT / "configs" / "dream_v5e_256.yaml"), mesh=Mesh(256, 1))
    measured = Bytes(0.06e9, 0, 0.3e9, 18e9)
    found = changes(run, model, dict.fromkeys(run.harvest.sites, 3584), measured, Parts(256, 1), 15.2e9, "harvest")
    assert found and not any(f"mesh.model={n}" in words for n in (8, 16, 32) for words in found)  # 4 key heads
    assert not any("batch_size" in words for words in found)  # a block a device already


def test_what_cannot_be_planned_is_one_line(small_run, bare, monkeypatch, tmp_path):
    run = dataclasses.replace(small_run, models=(bare,))
    with pytest.raises(UserError, match="harvest.batch_size = 16 .* multiple of 3"):
        plan._harvest(Work(run), bare, jax.devices()[0], Parts(3), "cpu")
    with pytest.raises(UserError, match="train.batch_size = 128 .* multiple of 3"):
        plan._train(run, plan.specs_of(run, {site: 16 for site in run.harvest.sites}), jax.devices()[0], Parts(3), "cpu")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"libtpu.*pip install 'dlmscope_jax\[tpu\]'"):
        plan.devices_of("v5e:4x4")
    with pytest.raises(UserError, match="owner/name"):
        plan.network(Work(dataclasses.replace(run, models=("owner/name",))), "owner/name")


def test_the_mesh_of_a_run():
    here = jax.devices()
    assert meshes.mesh_of(Mesh(), here[:1]) is None and meshes.mesh_of(Mesh(data=1)) is None
    assert meshes.mesh_of(Mesh(parallel="jit")) is None
    with pytest.raises(UserError, match="mesh"):
        meshes.mesh_of(Mesh(data=2, model=2), here[:1])
    with pytest.raises(UserError, match="model 3 does not divide the 1 device"):
        meshes.mesh_of(Mesh(model=3), here[:1])


def test_profile_says_where_the_time_goes_and_changes_nothing(tmp_path, capsys):
    run = Run(
        name="world", root=str(tmp_path), synthetic=(Synthetic("one", dimension=8, features=16),), dictionary=Dictionary(width=16, k=(2,)),
        train=Train(steps=40, batch_size=64),
    )  # fmt: skip
    run = dataclasses.replace(run, harvest=dataclasses.replace(run.harvest, train_rows=2000, test_rows=100))
    pipeline.harvest(run)
    found = profile(run)
    assert set(found) == {"data", "copy", "step", "serial", "overlapped"}
    assert 0 < found["overlapped"] <= found["serial"] == pytest.approx(found["data"] + found["copy"] + found["step"])
    out = capsys.readouterr().out
    assert "waiting for a batch" in out and "xprof" in out
    assert list((tmp_path / "world" / "profile").rglob("*.xplane.pb"))
    assert not (tmp_path / "world" / "dictionaries").exists()
