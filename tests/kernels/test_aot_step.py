"""A whole training step and a dictionary divided over devices, compiled for TPUs that are not here: no sort of length N in them, and
nothing of width N moves. `scripts/test --aot` runs this; started as a script it compiles one program and prints a line of JSON:

    python test_aot_step.py topk|batch_topk|matryoshka|forward|gradient TOPOLOGY
"""

import importlib.util
import json
import os
import subprocess
import sys
import time

import pytest

B, D, N, K = 2048, 768, 16381, 32  # N is a prime: nothing else is as long
DATA, MODEL, SHARD = 2, 4, 4093  # the mesh, and the latents of a device: a prime too
ROWS = B // DATA

slow = pytest.mark.slow
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: scripts/test --aot installs it and runs this"
)


def compiled(program: str, topology: str) -> dict:
    """What a program compiled for a topology sorts and moves."""
    environment = {key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"}
    environment |= {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run([sys.executable, __file__, program, topology], env=environment, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    lengths = sorted({length for length, _ in report["sorts"]})
    print(
        f"\n{program} {topology}: {report['seconds']:.0f} s, {report['temporary'] / 1e9:.2f} GB temporary, "
        f"{', '.join(report['kernels'])}; sorts of {lengths}; moves {report['moved']} bytes"
    )
    return report


@slow
@needs_libtpu
@pytest.mark.parametrize(
    "program,topology", [("topk", "v5e:2x2"), ("topk", "v6e:2x2"), ("batch_topk", "v5e:2x2"), ("matryoshka", "v6e:2x2")]
)
def test_a_training_step_sorts_no_row(program, topology):
    """Forward, AuxK, backward, projection, Adam and renormalisation on one chip."""
    no_row_is_sorted(compiled(program, topology)["sorts"], B, N)


def no_row_is_sorted(sorts, rows, width):
    """No sort of the length of a row, nor one of all its entries in pieces, as the compiler cuts a long top-k.

    A row may be padded, to less than twice its length.
    """
    assert not [length for length, entries in sorts if width <= length < 2 * width or entries >= rows * width]


@slow
@needs_libtpu
@pytest.mark.parametrize("topology", ["v5e:2x4", "v6e:2x4"])
def test_divided_latents_move_candidates_and_one_sum(topology):
    """Forward: at most twice the bytes of the candidates' values and one [B, D] sum, of the rows of a device.

    With gradients moreover the [D] of the pre-encoder bias over the latents' devices, and over the rows' devices the gradients of
    the weights that a device holds, which data parallelism is made of, and the loss.
    """
    forward = compiled("forward", topology)
    candidates, out = 4 * ROWS * K, 4 * ROWS * D
    assert out < forward["moved"] <= 2 * candidates + out
    both = compiled("gradient", topology)
    assert both["moved"] <= 2 * candidates + out + 4 * D + 4 * (SHARD * (2 * D + 1) + D + 1)
    for report in (forward, both):
        no_row_is_sorted(report["sorts"], ROWS, SHARD)
        no_row_is_sorted(report["sorts"], ROWS, SHARD * MODEL)


def traced_step(program: str, device):
    """The step of a dictionary's training for one chip, with nothing allocated."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import SingleDeviceSharding

    from dlmscope_jax.dictionaries import BatchTopK, Matryoshka, TopK
    from dlmscope_jax.training import TrainSpec, init_state, make_step

    make = {
        "topk": lambda: TopK(D, N, K),
        "batch_topk": lambda: BatchTopK(D, N, K),
        "matryoshka": lambda: Matryoshka(D, N, K, prefixes=(1021, 4093, N)),
    }
    spec = TrainSpec(make[program](), steps=10_000, batch_size=B)
    state = jax.eval_shape(lambda: init_state(spec))
    arguments = state, jax.ShapeDtypeStruct((B, D), jnp.float32)
    there = SingleDeviceSharding(device)
    return make_step(spec).trace(*jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=there), arguments))


def traced_shards(program: str, devices):
    """A TopK autoencoder's reconstruction of a batch, or the value and gradient of its loss, over a mesh of rows and latents."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    from dlmscope_jax.kernels.sparse_matmul.sharded import decode, encode_topk, shared, summed

    mesh = Mesh(np.array(devices).reshape(DATA, MODEL), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    rows, latents, same = PartitionSpec("data"), PartitionSpec("model"), PartitionSpec()
    specs = {"W_enc": latents, "b_enc": latents, "W_dec": latents, "b_dec": same}
    shapes = {"W_enc": (SHARD * MODEL, D), "b_enc": (SHARD * MODEL,), "W_dec": (SHARD * MODEL, D), "b_dec": (D,)}

    def forward(params, x):
        params = {name: shared(leaf, "data") for name, leaf in params.items()}
        values, indices = encode_topk(x, params["W_enc"], params["b_enc"], params["b_dec"], K, "model")
        return decode(jax.nn.relu(values), indices, params["W_dec"], "model") + params["b_dec"]

    def loss(params, x):
        return summed(jnp.square(forward(params, x) - x).sum(), "data")

    def array(shape, spec):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))

    f, outs = (forward, rows) if program == "forward" else (jax.value_and_grad(loss), (same, specs))
    mapped = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=(specs, rows), out_specs=outs, check_vma=False))
    return mapped.trace({name: array(shapes[name], specs[name]) for name in specs}, array((B, D), rows))


def main(program: str, topology: str) -> None:
    import re

    from jax.experimental import topologies
    from programs import moved, sorts

    started = time.perf_counter()
    chips = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    traced = traced_shards(program, chips) if program in ("forward", "gradient") else traced_step(program, chips[0])
    lowered = traced.lower(lowering_platforms=("tpu",))
    done = lowered.compile()
    text = done.as_text()
    report = {
        "sorts": sorts(text),
        "moved": moved(text),
        "kernels": sorted(set(re.findall(r"dlmscope\.(\w+\.\w+)", text))),
        "temporary": done.memory_analysis().temp_size_in_bytes,
        "seconds": time.perf_counter() - started,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
