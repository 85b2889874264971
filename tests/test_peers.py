"""Comparisons with the peers themselves: scripts/compare_peers.py (training) and, slow, scripts/check_formats.py (files)."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "compare_peers.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("compare_peers", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def runs(scores: dict[str, dict[float, list[tuple[float, float]]]]) -> list[dict]:
    """{side: {rate: [(on the rows that choose, on those that score), one a seed]}}"""
    return [
        {"side": side, "kind": "topk", "lr": lr, "seed": seed, "choose": choose, "score": score, "score_l0": 4.0, "choose_l0": 4.0}
        for side, rates in scores.items()
        for lr, pairs in rates.items()
        for seed, (choose, score) in enumerate(pairs)
    ]


def test_each_side_has_the_rate_that_was_best_on_other_rows(script):
    """Ours scores best at 0.1 but chose 0.2; differences are paired by seed: -.02, 0, .05."""
    ours = {0.1: [(0.5, 0.99)] * 3, 0.2: [(0.6, 0.70), (0.6, 0.72), (0.6, 0.79)]}
    peer = {0.1: [(0.6, 0.72), (0.6, 0.72), (0.6, 0.74)], 0.2: [(0.5, 0.2)] * 3}
    table = script.compare(runs({"peer": peer, "ours": ours}), "topk")
    assert (table["ours"]["lr"], table["peer"]["lr"]) == (0.2, 0.1)
    assert table["difference"] == pytest.approx(0.01)
    assert table["standard_error"] == pytest.approx(np.std([-0.02, 0, 0.05], ddof=1) / np.sqrt(3))
    assert table["holds"]


@pytest.mark.parametrize("lag, holds", [(0.019, True), (0.021, False)])
def test_two_standard_errors_below_is_too_much(script, lag, holds):
    """Differences of -lag - .01 sqrt(3), -lag and -lag + .01 sqrt(3) have a standard error of .01."""
    steps = np.array([-1, 0, 1]) * 0.01 * np.sqrt(3)
    found = runs({"ours": {1.0: [(0, 0.9 - lag + s) for s in steps]}, "peer": {1.0: [(0, 0.9)] * 3}})
    table = script.compare(found, "topk")
    assert table["standard_error"] == pytest.approx(0.01) and table["holds"] == holds


def test_both_sides_read_the_same_rows(script, tmp_path):
    """Batches in order; held-out rows of their own; one scale."""
    rows = np.random.default_rng(0).standard_normal((2 * script.HELD_OUT + 700, 5)).astype(np.float32)
    np.save(tmp_path / "rows.npy", rows)
    settings = {"steps": 4, "batch_size": 100, "seeds": [0, 1], "rows": str(tmp_path / "rows.npy")}
    script.write_rows(tmp_path, settings)
    train, choose, score = (np.load(tmp_path / f"{name}_0.npy") for name in ("train", "choose", "score"))
    np.testing.assert_array_equal(np.concatenate(list(script.batches(tmp_path, 0, settings))), train)
    assert np.square(train).sum(axis=1).mean() == pytest.approx(1.0, abs=1e-5)
    sides = [set(map(bytes, part)) for part in (train, choose, score)]
    assert [len(side) for side in sides] == [400, script.HELD_OUT, script.HELD_OUT] and len(set.union(*sides)) == sum(map(len, sides))
    assert not np.array_equal(train, np.load(tmp_path / "train_1.npy"))


@pytest.mark.slow
@pytest.mark.torch
def test_explained_variance_is_not_below_dictionary_learnings(tmp_path):
    """The comparison itself; where its environment is not there, scripts/compare_peers.py makes it."""
    if not (ROOT / ".venv-peers" / "bin" / "python").exists():
        pytest.skip("scripts/compare_peers.py was not run here: it makes the environment of its peer")
    figures = tmp_path / "figures.json"
    done = subprocess.run([sys.executable, SCRIPT, "--steps", "1000", "--json", figures], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(table["holds"] for table in json.loads(figures.read_text())["tables"])


@pytest.mark.slow
@pytest.mark.torch
def test_files_mean_the_same_to_the_libraries_whose_formats_they_are():
    """Both ways, activations and outputs to 1e-5; where its environment is not there, scripts/check_formats.py makes it."""
    if not (ROOT / ".venv-peers" / "bin" / "python").exists():
        pytest.skip("scripts/check_formats.py was not run here: it makes the environment of its peers")
    done = subprocess.run([sys.executable, ROOT / "scripts" / "check_formats.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
