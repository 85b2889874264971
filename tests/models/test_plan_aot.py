"""``dlmscope plan`` for TPUs that are not here, and what its programs send there beside the formulas. Run by ``scripts/test --aot``."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

slow = pytest.mark.slow
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: scripts/test --aot installs it and runs this"
)

SENT = """
import sys
sys.path[:0] = {paths!r}
import dataclasses, functools, json
import jax
import jax.numpy as jnp
jax.lax.scan = functools.partial(jax.lax.scan, unroll=True)  # this compiler does not say how often a loop runs
from published_configs import PUBLISHED
from programs import collectives
from dlmscope_jax import config, distributed
from dlmscope_jax.models import Transformer
from dlmscope_jax.recipes import plan
from dlmscope_jax.recipes.configs import Run
from dlmscope_jax.training import planning

published = PUBLISHED["Dream-v0-Base-7B"]
small = dataclasses.replace(published.config, n_layers=2, d_model=1024, n_heads=8, n_kv_heads=4, d_mlp=4096, vocab_size=8192)
model = Transformer(small, published.diffusion, dtype=jnp.bfloat16)
devices = plan.devices_of("v5e:4x4")
mesh = distributed.make_mesh(4, 4, devices=devices)
run = config.load(Run, None, ["--data.block_length=512", "--harvest.batch_size=16", "--harvest.sites=[resid_post@1]", "--dtype=bfloat16"])
text = plan._trace_forward(run, model, ("resid_post@1",), mesh).compile().as_text()
told = planning.forward_cost(model, 16, 512, 2, plan.parts_of(mesh), "tpu")
found = [(c.op, c.operand_bytes, c.trips) for c in collectives(text)]
print(json.dumps({{"found": found, "told": [dataclasses.asdict(c) for c in told.collectives]}}))
"""


@slow
@needs_libtpu
def test_what_a_forward_pass_sends_on_a_tpu():
    """Weights go around ``data``, block outputs are added up over ``model``: byte by byte as the formulas say; the embedding about so.

    The compiler gathers weights while it multiplies: a ring of permutes, in which each device sends its part as often as there are others.
    """
    script = SENT.format(paths=[str(ROOT / "tests" / "kernels"), str(ROOT / "tests" / "models")])
    environment = {key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"} | ENVIRONMENT
    done = subprocess.run([sys.executable, "-c", script], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    found = {op: sum(size * trips for o, size, trips in report["found"] if o == op) for op, _, _ in report["found"]}
    weights, table, outputs, tokens = report["told"]
    print(f"\nsent by a chip: {found}; told: {report['told']}")
    around = weights["bytes"] * weights["count"] * (weights["parts"] - 1)
    assert 0 <= found["collective-permute"] - around <= 0.01 * around
    assert 0 <= found["all-reduce"] - outputs["bytes"] * outputs["count"] <= 0.01 * found["all-reduce"]
    rest = sum(found.values()) - found["collective-permute"] - found["all-reduce"]
    assert table["bytes"] <= rest <= 1.5 * (table["bytes"] + tokens["bytes"])
