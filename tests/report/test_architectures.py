"""Sections that only some runs have: Pareto fronts, recovery of synthetic features, entropy of binary codes. Numbers are made up."""

import json
import shutil
from pathlib import Path

import pytest

from dlmscope_jax.errors import UserError
from dlmscope_jax.report import read_run, report
from dlmscope_jax.report.architectures import settings
from dlmscope_jax.report.pareto import _front

SITE = "mlp_out@3"
# folder, architecture, variant, level, seed, L0, explained variance, KL
MADE_UP = [
    ("mlp_out@3_k8", "topk", "topk", {"k": 8}, 0, 8.0, 0.60, 0.20),
    ("mlp_out@3_k32", "topk", "topk", {"k": 32}, 0, 32.0, 0.80, 0.06),
    ("mlp_out@3_batch_topk_k8", "batch_topk", "batch_topk", {"k": 8}, 0, 8.4, 0.62, 0.19),
    ("mlp_out@3_matryoshka_k8", "matryoshka", "matryoshka", {"k": 8}, 0, 8.1, 0.55, 0.25),
    ("mlp_out@3_relu_s0.1_seed0", "relu", "relu", {"sparsity": 0.1}, 0, 40.0, 0.70, 0.10),
    ("mlp_out@3_relu_s0.1_seed1", "relu", "relu", {"sparsity": 0.1}, 1, 44.0, 0.72, 0.12),
    ("mlp_out@3_jumprelu_s0.01", "jumprelu", "jumprelu", {"sparsity": 0.01}, 0, 12.0, 0.66, 0.13),
    ("mlp_out@3_gated_s0.3", "gated", "gated", {"sparsity": 0.3}, 0, 15.0, 0.68, 0.12),
    ("mlp_out@3_binary_e1e-06_c1e-08", "binary", "binary", {"entropy": 1e-6, "covariance": 1e-8}, 0, 180.0, 0.3, 0.6),
    ("mlp_in@3_to_mlp_out_topk_k8", "topk", "topk", {"k": 8}, 0, 8.0, 0.50, 0.30),
    ("mlp_in@3_to_mlp_out_skip_topk_k8", "topk", "skip_topk", {"k": 8}, 0, 8.0, 0.64, 0.18),
]


def interval(value: float, width: float) -> dict:
    return {"value": value, "low": value - width, "high": value + width, "units": 60, "draws": 2000, "note": ""}


def write_several(folder: Path) -> Path:
    """A run of one model with all architectures."""
    results = folder / "results"
    results.mkdir(parents=True)
    models = [{"name": "pocket-ar", "objective": "autoregressive"}]
    (results / "run.json").write_text(json.dumps({"kind": "run", "version": 1, "name": "several", "models": models}))
    for name, architecture, variant, level, seed, l0, ev, kl in MADE_UP:
        key = f"pocket-ar/{name}"
        about = {"version": 1, "dictionary": key, "architecture": architecture, "variant": variant, "level": level, "init_seed": seed}
        about |= {"site": name.partition("_to_")[0] if "_to_" in name else SITE, "target": SITE}
        sets = {"all": {"rows": 25000, "l0": l0, "explained_variance": ev, "dead_share": 0.01,
                        "intervals": {"l0": interval(l0, 0.1), "explained_variance": interval(ev, 0.01)}}}  # fmt: skip
        (results / f"{name}.fidelity.json").write_text(json.dumps({"kind": "fidelity", **about, "own": "all", "sets": sets}))
        rows = [
            {"rate": rate, "condition": condition, "tokens": 9, "documents": 60, "loss": interval(2.0, 0.1), "delta": interval(x, 0.02),
             "kl": interval(x, 0.02), "top1": interval(0.9, 0.01)}
            for rate in (0.0, None) for condition, x in (("clean", 0.0), ("spliced", kl), ("zero", 3.0))
        ]  # fmt: skip
        scored = {"rates": [0.0], "rows": rows, "conditions": ["clean", "spliced", "zero"], "loss_recovered": []}
        (results / f"{name}.delta_loss.json").write_text(json.dumps({"kind": "delta_loss", **about, **scored}))
        curve = folder / "dictionaries" / key / "metrics.jsonl"
        curve.parent.mkdir(parents=True)
        curve.write_text("".join(json.dumps({"step": s, "loss": 1 / s, "l0": l0, "dead": 0.01}) + "\n" for s in range(1, 30)))
    return folder


def write_worlds(folder: Path) -> Path:
    """A run of three synthetic worlds, two of which are made of bits."""
    results = folder / "results"
    results.mkdir(parents=True)
    worlds = {"easy": ("independent", 256), "r4": ("directions", 4), "r16": ("directions", 16)}
    models = [
        {"name": name, "objective": "synthetic", "world": {"kind": kind, "features": features, "dimension": 64, "l0": 4.0}}
        for name, (kind, features) in worlds.items()
    ]
    (results / "run.json").write_text(json.dumps({"kind": "run", "version": 1, "name": "worlds", "models": models}))
    for world, (kind, features) in worlds.items():
        kinds = [("rows@0_k4", "topk", {"k": 4}, 0, 0.97), ("rows@0_relu_s0.1", "relu", {"sparsity": 0.1}, 0, 0.4)]
        kinds += [(f"rows@0_binary_e1e-06_seed{seed}", "binary", {"entropy": 1e-6}, seed, 0.9 - 0.1 * seed) for seed in (0, 1)]
        for name, architecture, level, seed, recovered in kinds:
            about = {"version": 1, "dictionary": f"{world}/{name}", "architecture": architecture, "variant": architecture, "level": level}
            about |= {"init_seed": seed, "site": "rows@0", "target": "rows@0"}
            found = {"recovered": recovered, "mean_cosine": recovered - 0.02, "mean_f1": 0.9, "threshold": 0.9, "l0": 4.1, "dead": 0.2}
            (results / f"{world}.{name}.recovery.json").write_text(json.dumps({"kind": "recovery", **about, **found}))
            if architecture == "binary" and kind == "directions":
                bits = {"bits": features + 0.25 + 0.5 * seed, "truth": float(features), "true_features": features, "live": features + 1}
                bits |= {"explained_variance": 0.99, "untrained": {"bits": 900.0}}
                (results / f"{world}.{name}.entropy.json").write_text(json.dumps({"kind": "entropy", **about, **bits}))
    return folder


@pytest.fixture(scope="module")
def several(tmp_path_factory) -> Path:
    return write_several(tmp_path_factory.mktemp("several") / "several")


@pytest.fixture(scope="module")
def worlds(tmp_path_factory) -> Path:
    return write_worlds(tmp_path_factory.mktemp("worlds") / "worlds")


def test_what_a_folder_says_is_read(several):
    run = read_run(several)
    found = {d.name.rpartition("/")[2]: d for d in run.dictionaries}
    assert set(found) == {name for name, *_ in MADE_UP} and {d.model for d in run.dictionaries} == {"pocket-ar"}
    assert found["mlp_out@3_k8"].label == "mlp_out@3, k 8"
    assert found["mlp_out@3_relu_s0.1_seed0"].label == "mlp_out@3, relu s0.1 seed0"
    assert found["mlp_in@3_to_mlp_out_skip_topk_k8"].label == "mlp_in@3 → mlp_out, skip topk k8"
    assert found["mlp_in@3_to_mlp_out_skip_topk_k8"].written == SITE


def test_seeds_are_taken_together_and_say_their_range(several):
    (relu,) = (s for s in settings(read_run(several).dictionaries) if s.name == "ReLU")
    assert len(relu.members) == 2
    assert relu.measured(lambda d: d.own[1]["intervals"]["l0"]) == {"value": 42.0, "low": 40.0, "high": 44.0}


def test_widths_are_no_seeds(several, tmp_path):
    shutil.copytree(several, tmp_path / "run")
    for name, width in (("mlp_out@3_relu_s0.1_seed0", 64), ("mlp_out@3_relu_s0.1_seed1", 128)):
        file = tmp_path / "run" / "results" / f"{name}.fidelity.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "width": width}))
    found = [s for s in settings(read_run(tmp_path / "run").dictionaries) if s.name == "ReLU"]
    assert [(s.level, len(s.members)) for s in found] == [("λ 0.1, 64 latents", 1), ("λ 0.1, 128 latents", 1)]


def test_settings_stand_in_the_order_of_architectures_and_levels(several):
    found = settings(read_run(several).dictionaries)
    names = [f"{s.name} {s.level}" for s in found]
    assert names[:3] == ["TopK k 8", "TopK k 32", "BatchTopK k 8"] and names[-1] == "skip TopK transcoder k 8"
    looks = {s.name: s.look for s in found}
    assert len({look[:2] for name, look in looks.items() if "transcoder" not in name}) == 7, "architectures can be told apart"
    assert looks["TopK"][:2] == looks["TopK transcoder"][:2] and len({looks[n][2] for n in looks if "TopK" in n and "B" not in n}) == 3


def test_the_front_is_what_nothing_beats():
    l0 = [{"value": v} for v in (8, 8, 16, 32, None)]
    ev = [{"value": v} for v in (0.5, 0.6, 0.55, 0.9, 0.99)]
    assert _front(l0, ev, more_is_better=True) == {1, 3}
    assert _front(l0, ev, more_is_better=False) == {0}


def test_the_pareto_section_has_every_setting_and_its_fronts(several):
    page = report(several).read_text()
    text = page[page.index(">Pareto</h2>") :]
    text = text[: text.index("</section>")]
    rows = [row for row in text.split("<tr>") if '<th scope="row">' in row]
    skip = next(row for row in rows if "skip TopK transcoder</th>" in row)
    assert "EV, Δloss, KL" in skip and "0.640 [0.630, 0.650]" in skip
    relu = next(row for row in rows if ">ReLU</th>" in row)
    assert "42.0 [40.0, 44.0]" in relu and ">2</td>" in relu
    assert text.count("<figure>") == 3


def test_a_run_of_one_architecture_has_no_pareto_section(make_run):
    page = report(make_run()).read_text()
    assert ">Pareto</h2>" not in page and ">Recovery</h2>" not in page and ">Entropy</h2>" not in page


def test_recovery_and_entropy_of_worlds(worlds):
    page = report(worlds).read_text()
    recovery = page[page.index(">Recovery</h2>") : page.index(">Entropy</h2>")]
    assert "easy: independent, 256 features in 64 dimensions, 4 on in a row" in recovery and "97.0 %" in recovery
    assert "85.0 % [80.0 %, 90.0 %]" in recovery
    entropy = page[page.index(">Entropy</h2>") :]
    entropy = entropy[: entropy.index("</section>")]
    assert "16.50 [16.25, 16.75]" in entropy and "900.0" in entropy and ">truth<" in entropy
    for words in (">Pareto</h2>", ">Insertion</h2>", ">Latents</h2>", ">Generation</h2>", "Δloss"):
        assert words not in page, "no model reads these rows"


def test_a_result_that_lacks_its_numbers_is_named(tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "a.json").write_text(json.dumps({"kind": "recovery", "dictionary": "w/rows@0_k4"}))
    with pytest.raises(UserError, match="recovered"):
        read_run(tmp_path)
