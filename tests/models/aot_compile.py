"""Compiles a published model's forward or harvest for TPUs that are not here, and prints what that took. Run by test_aot.py.

python aot_compile.py forward|harvest MODEL TOPOLOGY DATA HEADS SEQUENCES      (SEQUENCES of 2,048 tokens on each row of the mesh)
"""

import json
import math
import re
import resource
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from published_configs import PUBLISHED

from dlmscope_jax.activations.forward import forward as harvest_forward
from dlmscope_jax.models import Transformer, init_params
from dlmscope_jax.models.sharding import partition_specs

LENGTH, SCORED = 2048, 256
LAYERS = (14, 23)


def largest(text: str) -> int:
    """Elements of the largest array in a compiled program."""
    return max(math.prod(int(n) for n in dims.split(",")) for dims in re.findall(r"[a-z]\d+\[([\d,]+)\]", text))


def main(program: str, name: str, topology: str, data: int, heads: int, sequences: int) -> None:
    """Prints one line of JSON: bytes on a chip, seconds of the compilation, processor seconds and peak memory of the process."""
    published = PUBLISHED[name]
    chips = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = Mesh(np.array(chips).reshape(data, heads), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    model = Transformer(published.config, published.diffusion, dtype=jnp.bfloat16, mesh=mesh)
    batch = data * sequences

    def array(shape: tuple[int, ...], dtype: jnp.dtype, *axes: str) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))

    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    specs = {"params": partition_specs(params["params"], mesh)}
    params = jax.tree.map(lambda leaf, spec: array(leaf.shape, jnp.bfloat16, *spec), params, specs)
    tokens, real = array((batch, LENGTH), jnp.int32, "data"), array((batch, LENGTH), jnp.bool_, "data")
    key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    key = array(key.shape, key.dtype)

    def forward(params: dict, tokens: jax.Array, real: jax.Array, positions: jax.Array) -> jax.Array:
        return model.apply(params, tokens, attention_mask=real, logits=positions).logits

    started = time.perf_counter()
    if program == "forward":
        positions = array((batch, SCORED), jnp.int32, "data")
        traced = jax.jit(forward).trace(params, tokens, real, positions)
    else:
        traced = harvest_forward.trace(
            model, params, key, tokens, real, array((batch,), jnp.int32, "data"), low=0.1, high=0.9,
            sites=tuple(f"resid_post@{layer}" for layer in LAYERS), policy="rate", padded=True, dtype="bfloat16",
        )  # fmt: skip
    compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    seconds, memory, text = time.perf_counter() - started, compiled.memory_analysis(), compiled.as_text()
    report = {
        "kind": chips[0].device_kind,
        "parameters": published.parameters,
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "splash": "tpu_custom_call" in text,
        "patterns": largest(text) >= sequences * published.config.n_heads // heads * LENGTH**2,
        "compiling": seconds,
        "processor": time.process_time(),
        "host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:4], *(int(a) for a in sys.argv[4:]))
