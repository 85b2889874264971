"""The kernels for TPU through the compiler of TPUs that are not here: they compile at the sizes that they are made for."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: scripts/test --aot installs it and runs this"
    ),
]
PROGRAMS = 3 + 5 + 3 * 4 + 2


@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
def test_compiles_for_a_tpu(topology):
    environment = {key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"}
    environment |= {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path]),
    }
    command = [sys.executable, HERE / "aot_compile_tpu.py", topology]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    print(f"\n{topology}:")
    for report in reports:
        print(f"  {report['name']}: compiled in {report['seconds']:.1f} s, {report['temporary'] / 1e6:.1f} MB temporary")
        assert report["kernels"] == 1 and not report["sorts"], report["name"]
    assert len(reports) == PROGRAMS
