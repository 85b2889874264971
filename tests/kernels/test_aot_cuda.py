"""The kernels for NVIDIA GPUs through the compiler of an H200 that is not here: they compile, and no sort of a whole row is left."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_aot_step import B, N, no_row_is_sorted

HERE = Path(__file__).parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("jax_cuda13_plugin") is None,
        reason="CUDA's compiler is not installed: scripts/test --aot installs it and runs this",
    ),
]
SIZES = [(2048, 768, 16384, 32, "float32"), (8192, 4096, 131072, 64, "bfloat16")]
KERNELS = {"topk": 4, "combine": 1, "dots": 1, "outer": 2, "combine_flat": 2, "dots_flat": 1, "row_update": 1}


def compiled(*arguments) -> dict[str, dict]:
    """What aot_compile_cuda.py says of its programs, by name; printed too."""
    environment = {key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"}
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    command = [sys.executable, HERE / "aot_compile_cuda.py", *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    print(f"\n{arguments}, for an NVIDIA H200:")
    for report in reports:
        print(
            f"  {report['name']}: {report['seconds']:.1f} s, {report['kernels']} kernels of ours, "
            f"sorts of {sorted({length for length, _ in report['sorts']}) or 'nothing'}, {report['temporary'] / 1e6:.1f} MB temporary"
            + (f"; {', '.join(report['ran'])}" if report["ran"] else "")
        )
    return {report["name"]: report for report in reports}


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_kernels_compile_for_an_h200(size):
    b, d, n, k, _ = size
    reports = compiled("kernels", *size)
    assert [length for length, _ in reports["lax.top_k"]["sorts"]] == [n]  # what all of this is for
    assert not reports["topk"]["sorts"]
    for name, kernels in KERNELS.items():
        assert reports[name]["kernels"] == kernels, name
    assert reports["row_update"]["temporary"] < 1000  # in place
    for name in ("combine", "dots", "dots_flat", "outer"):
        assert reports[name]["temporary"] < b * k * d * 4 / 8, name  # no [B, k, D]


def test_a_training_step_compiles_for_an_h200_and_sorts_no_row():
    """Forward, AuxK, backward, projection, Adam and renormalisation."""
    reports = compiled("step", "topk", "batch_topk")
    assert len(reports) == 2
    for report in reports.values():
        no_row_is_sorted(report["sorts"], B, N)
