"""Several architectures, transcoders and synthetic worlds in one run: from the configuration to the report."""

import contextlib
import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from dlmscope_jax import config
from dlmscope_jax.activations import ActivationStore
from dlmscope_jax.cli import main
from dlmscope_jax.data.worlds import World
from dlmscope_jax.dictionaries import load_dictionary
from dlmscope_jax.errors import UserError
from dlmscope_jax.recipes import pipeline
from dlmscope_jax.recipes import worlds as at_worlds
from dlmscope_jax.recipes.configs import _OPTIONS, LEVELS, Dictionary, Harvest, Run, Synthetic
from dlmscope_jax.recipes.dictionaries import _KINDS, _OF_DICTIONARY, planned
from dlmscope_jax.recipes.quickstart import quickstart

WIDTHS = {"mlp_in@0": 16, "mlp_out@0": 16, "mlp_in@1": 16, "mlp_out@1": 16}


def run_of(*sections: dict, **fields) -> Run:
    return config.from_mapping(Run, {"dictionaries": list(sections), **fields})


def labels(*sections: dict, widths=WIDTHS, **fields) -> list[str]:
    return [plan.spec.name for plan in planned(run_of(*sections, **fields), widths)]


def test_a_section_is_the_cross_product_of_its_lists():
    assert labels({"architecture": "topk", "k": [4, 8], "seeds": [0, 1], "sites": ["mlp_out@0", "mlp_out@1"]}) == [
        f"mlp_out@{layer}_k{k}_seed{seed}" for layer in (0, 1) for k in (4, 8) for seed in (0, 1)
    ]
    found = planned(run_of({"architecture": "binary", "entropy": [0, 1e-7], "covariance": [1e-7, 1e-6], "sites": ["mlp_in@0"]}), WIDTHS)
    assert [(p.spec.settings.entropy, p.spec.settings.covariance) for p in found] == [(0, 1e-7), (0, 1e-6), (1e-7, 1e-7), (1e-7, 1e-6)]
    assert [p.spec.name for p in found][1] == "mlp_in@0_binary_e0_c1e-06"


def test_a_transcoder_reads_mlp_in_and_writes_its_target():
    (plan, skip) = planned(
        run_of(*({"k": [4], "target": "mlp_out", "skip": skip, "sites": ["mlp_in@1"]} for skip in (False, True))),
        WIDTHS,
    )
    assert (plan.spec.site, plan.spec.target, plan.spec.dictionary.d_out) == ("mlp_in@1", "mlp_out@1", 16)
    assert (plan.spec.name, skip.spec.name) == ("mlp_in@1_to_mlp_out_topk_k4", "mlp_in@1_to_mlp_out_skip_topk_k4")
    assert skip.spec.dictionary.skip and not plan.spec.dictionary.skip
    assert labels({"k": [4], "sites": ["rows@0"]}, widths={"rows@0": 16}) == ["rows@0_k4"], "a world's site may be named"
    assert labels({"k": [4], "target": "mlp_out"}) == [f"mlp_in@{layer}_to_mlp_out_topk_k4" for layer in (0, 1)]


def test_several_widths_and_names_tell_folders_apart():
    one = {"k": [4], "sites": ["mlp_out@0"]}
    assert labels({**one, "width": 32}, {**one, "width": 64}) == ["mlp_out@0_w32_k4", "mlp_out@0_w64_k4"]
    with pytest.raises(UserError, match="mlp_out@0_k4.*name="):
        labels(one, {**one, "multi_topk": True})
    assert labels(one, {**one, "multi_topk": True, "name": "multi"}) == ["mlp_out@0_k4", "mlp_out@0_multi_k4"]


def test_a_section_overrides_the_recipe_and_leaves_the_rest():
    section = {"architecture": "relu", "sparsity": [0.1], "lr": 3e-4, "sparsity_warmup": 7, "ghost": True, "sites": ["mlp_out@0"]}
    (plan,) = planned(run_of(section, train={"steps": 30, "ema": 0.9, "aux_alpha": 0.5}), WIDTHS)
    spec = plan.spec
    assert (spec.lr, spec.sparsity_warmup, spec.steps, spec.ema, spec.settings.sparsity) == (3e-4, 7, 30, 0.9, 0.1)
    assert spec.dictionary.ghost and spec.settings.aux == 1.0, "train.aux_alpha is AuxK's, not that of ghost gradients"
    (plan,) = planned(run_of({"k": [4], "sites": ["mlp_out@0"]}, train={"aux_alpha": 0.5}), WIDTHS)
    assert plan.spec.settings.aux == 0.5


def test_one_dictionary_section_is_what_it_was():
    """Folders of runs that were there before several architectures."""
    assert [plan.spec.name for plan in planned(Run(), {"resid_post@2": 16, "resid_post@4": 16})] == ["resid_post@2_k32", "resid_post@4_k32"]


def test_every_option_is_a_field_of_the_architectures_that_it_belongs_to():
    fields = {kind: {f.name for f in dataclasses.fields(cls)} for kind, cls in _KINDS.items()}
    assert set(LEVELS) == set(_KINDS)
    for option in _OF_DICTIONARY:
        takes = {kind for kind in _KINDS if option in fields[kind]}
        assert takes == set(_OPTIONS.get(option, _KINDS)), option
    for kind, names in fields.items():
        assert names - {"d_in", "width", "k", "d_out"} <= set(_OF_DICTIONARY), f"{kind} has options that no configuration can set"


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ([{"architecture": "relu"}], ["dictionaries[0].sparsity", "relu"]),
        ([{"architecture": "relu", "sparsity": [0.1], "k": [4]}], ["dictionaries[0].k", "relu", "sparsity"]),
        ([{"k": [4]}, {"k": [4], "sparsity": [0.1]}], ["dictionaries[1].sparsity", "topk", "k"]),
        ([{"architecture": "gated", "sparsity": [0.1], "bandwidth": 0.1}], ["dictionaries[0].bandwidth", "jumprelu", "gated"]),
        ([{"architecture": "jumprelu", "sparsity": [0.1], "target_l0": [8]}], ["target_l0", "penalty: target"]),
        ([{"architecture": "jumprelu", "penalty": "target"}], ["target_l0", "L0"]),
        ([{"architecture": "binary"}], ["entropy", "binary"]),
        ([{"k": [4], "skip": True}], ["skip", "target"]),
        ([{"architecture": "topK"}], ["architecture", "'topK'", "'topk'"]),
        ([{"k": [4], "target": "mlp_out", "sites": ["resid_post@0"]}], ["mlp_out@0", "harvest.sites"]),
        ([{"k": [4], "target": "mlp_out"}], ["mlp_in", "harvest.sites"]),
        ([{"k": [4]}, {"k": [4], "k_start": 2}], ["dictionaries[1]", "k_start = 2"]),
        ([{"architecture": "relu", "sparsity": [-0.1]}], ["dictionaries[0]", "sparsity = -0.1"]),
    ],
)
def test_mistakes_are_one_line(sections, words, tmp_path, capsys, model_folders):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"root": str(tmp_path), "models": [model_folders["llada"]], "dictionaries": sections,
                                    "harvest": {"sites": ["resid_post@0"]}}))  # fmt: skip
    assert main(["harvest", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(word in error for word in words), error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.yaml"]


def test_dictionary_and_dictionaries_exclude_each_other():
    with pytest.raises(UserError, match="dictionary: give it or dictionaries"):
        run_of({"k": [4]}, dictionary={"k": [8]})


SECTIONS = (
    Dictionary(width=32, k=(4, 8), sites=("mlp_out@1",)),
    Dictionary("batch_topk", width=32, k=(4,), sites=("mlp_out@1",)),
    Dictionary("relu", width=32, k=(32,), sparsity=(0.05,), seeds=(0, 1), sites=("mlp_out@1",)),
    Dictionary("binary", width=32, entropy=(1e-6,), covariance=(1e-8,), sites=("mlp_out@1",)),
    Dictionary(width=32, k=(4,), target="mlp_out"),
    Dictionary(width=32, k=(4,), target="mlp_out", skip=True),
)


@pytest.fixture(scope="module")
def several(model_folders, make_run, tmp_path_factory) -> tuple[Run, Path, str]:
    """A run of several architectures that has been through everything, its folder, and what training printed."""
    run = make_run(tmp_path_factory.mktemp("several"))
    run = dataclasses.replace(
        run, models=(model_folders["llada"],), harvest=dataclasses.replace(run.harvest, sites=("mlp_in@1", "mlp_out@1")),
        dictionary=Dictionary(), dictionaries=SECTIONS,
    )  # fmt: skip
    out = io.StringIO()
    pipeline.harvest(run)
    with contextlib.redirect_stdout(out):
        pipeline.train(run)
    pipeline.evaluate(run)
    pipeline.report(run)
    return run, Path(run.root) / run.name, out.getvalue()


NAMES = [
    "mlp_out@1_k4", "mlp_out@1_k8", "mlp_out@1_batch_topk_k4", "mlp_out@1_relu_s0.05_seed0", "mlp_out@1_relu_s0.05_seed1",
    "mlp_out@1_binary_e1e-06_c1e-08", "mlp_in@1_to_mlp_out_topk_k4", "mlp_in@1_to_mlp_out_skip_topk_k4",
]  # fmt: skip


@pytest.mark.slow
def test_every_architecture_goes_the_whole_way(several):
    run, folder, out = several
    assert sorted(p.name for p in (folder / "dictionaries" / "llada").iterdir()) == sorted(NAMES)
    for name in NAMES:
        assert f"llada/{name} " in out
        kinds = {json.loads(p.read_text())["kind"] for p in (folder / "results").glob(f"llada.{name}.*.json")}
        assert kinds - {"steered_generation"} == {"fidelity", "delta_loss", "features"}
    read = lambda name, kind: json.loads((folder / "results" / f"llada.{name}.{kind}.json").read_text())  # noqa: E731
    skip = read(NAMES[-1], "delta_loss")
    assert (skip["site"], skip["target"], skip["variant"], skip["level"]) == ("mlp_in@1", "mlp_out@1", "skip_topk", {"k": 4})
    assert [read(name, "fidelity")["init_seed"] for name in NAMES[3:5]] == [0, 1]
    one, two = (load_dictionary(folder / "dictionaries" / "llada" / name)[1] for name in NAMES[3:5])
    assert not np.array_equal(one["W_enc"], two["W_enc"])


@pytest.mark.slow
def test_fidelity_of_a_transcoder_is_that_of_what_it_writes(several):
    run, folder, _ = several
    spec, params, _ = load_dictionary(folder / "dictionaries" / "llada" / NAMES[-1])
    store = ActivationStore.open(folder / "harvest" / "llada" / "test")
    x, y = (np.asarray(store.read(site, 0, store.rows), np.float64) for site in ("mlp_in@1", "mlp_out@1"))
    error = ((y - np.asarray(spec.reconstruct(params, x.astype(np.float32)))) ** 2).sum()
    result = json.loads((folder / "results" / f"llada.{NAMES[-1]}.fidelity.json").read_text())
    assert result["sets"]["all"]["explained_variance"] == pytest.approx(1 - error / ((y - y.mean(0)) ** 2).sum(), abs=1e-5)
    assert result["sets"]["all"]["intervals"]["explained_variance"]["value"] == pytest.approx(
        result["sets"]["all"]["explained_variance"], abs=1e-5
    )


@pytest.mark.slow
def test_binary_codes_count_their_rarer_values_everywhere(several):
    run, folder, _ = several
    name = NAMES[5]
    spec, params, _ = load_dictionary(folder / "dictionaries" / "llada" / name)
    store = ActivationStore.open(folder / "harvest" / "llada" / "test")
    bits = np.asarray(spec.dense(spec.encode(params, store.read("mlp_out@1", 0, store.rows).astype(np.float32)))) > 0
    on = bits.mean(axis=0)
    rarer = np.minimum(on, 1 - on)
    assert (on > 0.5).any() and (on < 0.5).any()
    result = json.loads((folder / "results" / f"llada.{name}.fidelity.json").read_text())["sets"]["all"]
    assert result["intervals"]["l0"]["value"] == pytest.approx(rarer.sum(), rel=1e-6)
    assert result["l0"] == pytest.approx(rarer.sum(), rel=1e-5)
    assert result["dead_share"] == pytest.approx((rarer == 0).mean()) and result["dense_share_10pct"] == pytest.approx((rarer > 0.1).mean())
    records = json.loads((folder / "results" / f"llada.{name}.features.json").read_text())["records"]
    for record in records:
        assert record["density"] == pytest.approx(rarer[record["latent"]]) and record["max_activation"] == 1
        for window in record["windows"]:
            assert window["activations"][window["peak"]] == 1


@pytest.mark.slow
def test_the_report_compares_the_architectures(several):
    _, folder, _ = several
    page = (folder / "report.html").read_text()
    section = page.partition('<section id="pareto"')[2] or page.partition('id="pareto"')[2]
    for words in ("TopK transcoder", "skip TopK transcoder", "BatchTopK", "ReLU", "Binary", "On the front"):
        assert words in section
    assert 'id="recovery"' not in page


@pytest.fixture(scope="module")
def worlds(tmp_path_factory) -> tuple[Run, Path]:
    run = Run(
        name="worlds", root=str(tmp_path_factory.mktemp("worlds")),
        synthetic=(
            Synthetic("easy", dimension=16, features=24, l0=2.0, coherence=0.9),
            Synthetic("bits", "directions", 16, 4, coherence=0.9, signed=True),
        ),
        harvest=Harvest(train_rows=3000, test_rows=700),
        dictionaries=(
            Dictionary(width=48, k=(2, 4)), Dictionary("relu", width=48, sparsity=(0.1,)),
            Dictionary("binary", width=48, entropy=(1e-3,), covariance=(0.0,)),
        ),
    )  # fmt: skip
    run = dataclasses.replace(run, train=dataclasses.replace(run.train, steps=20, batch_size=128))
    quickstart(run)
    return run, Path(run.root) / run.name


@pytest.mark.slow
def test_a_world_stands_where_a_model_does(worlds):
    run, folder = worlds
    for world in ("easy", "bits"):
        train, test = (ActivationStore.open(folder / "harvest" / world / side) for side in ("train", "test"))
        assert (train.rows, test.rows, dict(train.sites)) == (3000, 700, {"rows@0": 16})
        seen, held_out = ({tuple(row) for row in np.asarray(store.read("rows@0", 0, store.rows))} for store in (train, test))
        if world == "easy":  # four bits make no more than sixteen rows
            assert len(seen & held_out) <= 1, "no row of the test side is learned from (but the one without any feature)"
        for name in ("rows@0_k2", "rows@0_k4", "rows@0_relu_s0.1"):
            kinds = {json.loads(p.read_text())["kind"] for p in (folder / "results").glob(f"{world}.{name}.*.json")}
            assert kinds == {"fidelity", "recovery"}
    binary = "rows@0_binary_e0.001_c0"
    result = json.loads((folder / "results" / f"bits.{binary}.entropy.json").read_text())
    assert (result["truth"], result["true_features"]) == (4.0, 4) and 0 <= result["bits"] <= 48 and result["untrained"]["bits"] > 0
    assert not (folder / "results" / f"easy.{binary}.entropy.json").exists(), "its magnitudes have no entropy in bits"
    recovered = json.loads((folder / "results" / "easy.rows@0_k2.recovery.json").read_text())
    spec, params, _ = load_dictionary(folder / "dictionaries" / "easy" / "rows@0_k2")
    truth = World("independent", 16, 24, 2.0, 0.9).directions(run.seed)
    cosines = truth @ (np.asarray(params["W_dec"]) / np.linalg.norm(params["W_dec"], axis=1, keepdims=True)).T
    assert 0 < recovered["mean_cosine"] <= cosines.max(axis=1).mean() + 1e-6
    page = (folder / "report.html").read_text()
    assert 'id="recovery"' in page and "24 features in 16 dimensions" in page and 'id="entropy"' in page


def test_a_world_is_harvested_once_and_another_one_is_refused(worlds):
    run, folder = worlds
    before = {p: p.stat().st_mtime_ns for p in folder.glob("harvest/**/*") if p.is_file()}
    pipeline.harvest(run)
    assert before == {p: p.stat().st_mtime_ns for p in folder.glob("harvest/**/*") if p.is_file()}
    with pytest.raises(UserError, match="another world"):
        pipeline.harvest(dataclasses.replace(run, synthetic=(Synthetic("easy", dimension=16, features=25, l0=2.0, coherence=0.9),)))


def test_a_killed_harvest_of_a_world_goes_on(worlds, tmp_path, monkeypatch):
    run, folder = worlds
    monkeypatch.setattr(at_worlds, "_SHARD", 1024)
    run = dataclasses.replace(run, root=str(tmp_path), synthetic=run.synthetic[:1])
    real, calls = ActivationStore.append, []

    def dying(self, *arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, *arguments)

    monkeypatch.setattr(ActivationStore, "append", dying)
    with pytest.raises(KeyboardInterrupt):
        pipeline.harvest(run)
    pipeline.harvest(run)
    one, two = (ActivationStore.open(f / "harvest" / "easy" / "train") for f in (folder, tmp_path / run.name))
    np.testing.assert_array_equal(np.asarray(one.read("rows@0", 0, 3000)), np.asarray(two.read("rows@0", 0, 3000)))
