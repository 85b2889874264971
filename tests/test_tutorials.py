"""The tutorials run from beginning to end, offline, and open as notebooks."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).resolve().parent.parent / "scripts" / "tutorials").glob("*.py"))


LONG = ("read_features", "steer_denoising")


def test_there_are_four():
    assert [p.stem for p in SCRIPTS] == ["own_activations", "read_features", "released_dictionary", "steer_denoising"]


@pytest.mark.parametrize("path", [pytest.param(p, marks=[pytest.mark.slow] * (p.stem in LONG), id=p.stem) for p in SCRIPTS])
def test_a_tutorial_runs(path, tmp_path):
    done = subprocess.run([sys.executable, str(path)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) > 4


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_a_tutorial_is_in_percent_format(path):
    text = path.read_text()
    assert text.startswith("# %% [markdown]\n# # ")
    assert text.count("# %%\n") >= 4
    for cell in text.split("# %% [markdown]\n")[1:]:
        assert cell.startswith("# ")
