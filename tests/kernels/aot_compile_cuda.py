"""Compiles the kernels for an NVIDIA H200 that is not here, and prints what came out. Run by test_aot_cuda.py.

python aot_compile_cuda.py kernels B D N K DTYPE      prints one line of JSON a program
python aot_compile_cuda.py step topk|batch_topk|matryoshka ...
"""

import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial

import jax
from jax.experimental import topologies
from programs import sorts
from test_aot_step import traced_step

from dlmscope_jax.compat import lower_for
from dlmscope_jax.kernels.row_update import pallas_gpu as update
from dlmscope_jax.kernels.row_update import reference as update_reference
from dlmscope_jax.kernels.sparse_matmul import pallas_gpu as sparse
from dlmscope_jax.kernels.topk import grouped
from dlmscope_jax.kernels.topk import pallas_gpu as selection

H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 4800000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 150000000000 shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 } device_description_str: "NVIDIA H200"
"""


def device() -> jax.Device:
    return topologies.get_topology_desc("", "cuda", target_config=H200, topology="1x1x1").devices[0]


def programs(b: int, d: int, n: int, k: int, dtype: str) -> dict[str, tuple[Callable, ...]]:
    """Functions and the shapes and dtypes of their arguments, by name."""
    sharding = jax.sharding.SingleDeviceSharding(device())

    def array(*shape: int, dtype: str = dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    values, indices = array(b, k, dtype="float32"), array(b, k, dtype="int32")
    flat = array(b * k, dtype="float32"), array(b * k, dtype="int32"), array(b * k, dtype="int32")
    number = array(dtype="float32")
    state = array(n, d, dtype="float32"), array(n, d), array(n, d), array(n, d, dtype="float32")
    scalars = number, array(dtype="int32"), number, array(dtype="bool")

    def donated(row_update: Callable) -> Callable:
        return jax.jit(partial(row_update, b1=0.9, b2=0.999, eps=1e-8, unit=True), donate_argnums=(0, 1, 2))

    return {
        "row_update reference": (donated(update_reference.row_update), *state, *scalars),
        "row_update": (donated(update.row_update), *state, *scalars),
        "lax.top_k": (lambda x: jax.lax.top_k(x, k), array(b, n)),
        "topk grouped": (lambda x: grouped.topk(x, k), array(b, n)),
        "topk": (lambda x: selection.topk(x, k), array(b, n)),
        "combine": (sparse.combine, values, indices, array(n, d)),
        "dots": (sparse.dots, array(b, d), indices, array(n, d)),
        "outer": (lambda *a: sparse.outer(*a, n), values, indices, array(b, d)),
        "combine_flat": (lambda *a: sparse.combine_flat(*a, b), *flat, array(n, d)),
        "dots_flat": (sparse.dots_flat, array(b, d), *flat[1:], array(n, d)),
    }


def lowered(what: str, arguments: list[str]) -> Iterator[tuple[str, jax.stages.Lowered]]:
    if what == "step":
        for name in arguments:
            yield f"step of {name}", traced_step(name, device()).lower(lowering_platforms=("cuda",))
    else:
        for name, (fn, *args) in programs(*map(int, arguments[:4]), arguments[4]).items():
            yield name, lower_for("cuda", fn, *args)


def main(what: str, *arguments: str) -> None:
    started = time.perf_counter()
    for name, program in lowered(what, list(arguments)):
        compiled = program.compile()
        text = compiled.as_text()
        report = {
            "name": name,
            "seconds": time.perf_counter() - started,
            "sorts": sorts(text),
            "temporary": compiled.memory_analysis().temp_size_in_bytes,
            "kernels": text.count('custom_call_target="__gpu$xla.gpu.triton"'),
            "ran": sorted(set(re.findall(r"dlmscope\.(\w+\.\w+)", text))),
        }
        print(json.dumps(report), flush=True)
        started = time.perf_counter()


if __name__ == "__main__":
    main(*sys.argv[1:])
