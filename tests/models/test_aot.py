"""What compiling costs: programs as large for many layers as for few, and published models on TPUs that are not here."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from tiny import TINY

from dlmscope_jax.models import Transformer, init_params

HERE = Path(__file__).parent
MEMORY = {"TPU v5 lite": 16e9, "TPU v5": 95e9}  # bytes of a chip
SECONDS, HOST_MEMORY = 60, 4e9  # limits for one program, the start of its process included

slow = pytest.mark.slow
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: scripts/test --aot installs it and runs this"
)


@slow
@needs_libtpu
@pytest.mark.parametrize("topology,data,heads,sequences", [("v5e:4x4", 4, 4, 16), ("v5e:16x16", 64, 4, 16), ("v5p:2x2x1", 2, 2, 16)])
@pytest.mark.parametrize("name", ["Dream-v0-Base-7B", "LLaDA-8B-Instruct"])
@pytest.mark.parametrize("program", ["forward", "harvest"])
def test_compiles_for_a_tpu_and_fits(program, name, topology, data, heads, sequences):
    """The forward with logits at 256 positions, or the harvest of two layers, of sequences of 2,048 tokens."""
    environment = {key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"}
    environment |= {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [sys.executable, HERE / "aot_compile.py", program, name, topology, str(data), str(heads), str(sequences)]
    started = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    seconds = time.perf_counter() - started
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    sizes, room = {part: report[part] / 1e9 for part in ("arguments", "outputs", "temporary")}, MEMORY[report["kind"]] / 1e9
    print(
        f"\n{name} {program} {topology}, mesh {data} x {heads}, {data * sequences} sequences: "
        + ", ".join(f"{part} {size:.2f}" for part, size in sizes.items())
        + f" GB on a chip of {room:.0f}; {seconds:.0f} s ({report['processor']:.0f} of processor, compiling {report['compiling']:.0f}), "
        f"{report['host'] / 1e9:.2f} GB of host memory"
    )
    assert sum(sizes.values()) <= room
    assert sizes["arguments"] >= 0.8 * 2 * report["parameters"] / (data * heads) / 1e9  # it is the whole model, divided
    assert report["splash"] and not report["patterns"]
    # others on the machine lengthen the one and not the other, helping threads the other and not the one
    assert min(seconds, report["processor"]) <= SECONDS
    assert report["host"] <= HOST_MEMORY


def text_of(family: str, layers: int) -> tuple[int, int]:
    """Characters of the lowered forward of a network of so many layers, and operations in it after compiling."""
    config, diffusion = TINY[family]
    windowed = tuple(bool(on) for on in (config.windowed * layers)[:layers])
    model = Transformer(replace(config, n_layers=layers, windowed=windowed), diffusion)
    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    lowered = jax.jit(model.apply, static_argnames=("logits",)).lower(params, jax.ShapeDtypeStruct((2, 16), jnp.int32))
    return len(lowered.as_text()), len(re.findall(r"^\s+(?:ROOT )?%\S+ = ", lowered.compile().as_text(), re.MULTILINE))


@pytest.mark.parametrize("family", ["llada", "gemma2", "mdlm"])
def test_a_deep_network_compiles_to_as_much_as_a_shallow_one(family):
    assert (few := text_of(family, 4)) > (1000, 100)
    for shallow, deep in zip(few, text_of(family, 32), strict=True):
        assert abs(deep - shallow) <= 0.02 * shallow
