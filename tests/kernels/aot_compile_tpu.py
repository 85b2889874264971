"""Compiles the kernels for a TPU that is not here, and prints what came out. Run by test_aot_tpu.py.

python aot_compile_tpu.py TOPOLOGY      prints one line of JSON a program
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, PartitionSpec
from programs import sorts

from dlmscope_jax.compat import lower_for
from dlmscope_jax.kernels.row_update import pallas_tpu as update
from dlmscope_jax.kernels.sparse_matmul import pallas_tpu as sparse
from dlmscope_jax.kernels.sparse_matmul.segments import Segments
from dlmscope_jax.kernels.topk import pallas_tpu as selection

# B, D, N, k, dtype; the second N is a prime
SIZES = [(2048, 768, 16384, 32, "float32"), (2048, 3584, 16411, 80, "float32"), (2048, 4096, 131072, 64, "bfloat16")]
# k and N at the ends of the range
ROWS = [
    (64, 2**20, 64, "float32"),
    (64, 2**20, 1024, "bfloat16"),
    (64, 131072, 1024, "float32"),
    (16, 1024, 1024, "bfloat16"),
    (3, 50, 1, "float32"),
]


def programs(topology: str) -> Iterator[tuple]:
    """Name, function and the shapes and dtypes of its arguments."""
    chips = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    one = jax.sharding.SingleDeviceSharding(chips[0])

    def array(*shape: int, dtype: str, sharding: jax.sharding.Sharding = one) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    for b, n, k, dtype in [(b, n, k, dtype) for b, _, n, k, dtype in SIZES] + ROWS:
        yield f"topk {b} {n} {k} {dtype}", partial(selection.topk, k=k), array(b, n, dtype=dtype)
    for b, d, n, k, dtype in SIZES:
        size, m = f"{b} {d} {n} {k} {dtype}", b * k
        values, indices = array(b, k, dtype="float32"), array(b, k, dtype="int32")
        weight, x = array(n, d, dtype=dtype), array(b, d, dtype=dtype)
        pair = array(m, dtype="int32")
        segments = Segments(array(m, dtype="float32"), pair, pair, array(n + 1, dtype="int32"))
        yield f"combine {size}", sparse.combine, values, indices, weight
        yield f"dots {size}", sparse.dots, x, indices, weight
        yield f"segment_sum {size}", partial(sparse.segment_sum, width=n), segments, x
        matrix, moment = array(n, d, dtype="float32"), array(n, d, dtype=dtype)
        scalars = [array(dtype=kind) for kind in ("float32", "int32", "float32", "bool")]
        yield (
            f"row_update {size}",
            partial(update.row_update, b1=0.9, b2=0.999, eps=1e-8, unit=True),
            matrix,
            moment,
            moment,
            matrix,
            *scalars,
        )

    # over two axes: rows of the batch on one, latents on the other
    mesh = Mesh(np.array(chips).reshape(2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    b, d, n, k, dtype = SIZES[0]
    both, rows = PartitionSpec("data", "model"), PartitionSpec("data")
    spread = partial(jax.shard_map, mesh=mesh, check_vma=False)
    over = partial(jax.sharding.NamedSharding, mesh)
    yield (
        "topk in shard_map",
        spread(partial(selection.topk, k=k), in_specs=both, out_specs=both),
        array(b, n, dtype=dtype, sharding=over(both)),
    )
    arguments = array(b, k, dtype="float32", sharding=over(rows)), array(b, k, dtype="int32", sharding=over(rows))
    weight = array(n, d, dtype=dtype, sharding=over(PartitionSpec()))
    yield "combine in shard_map", spread(sparse.combine, in_specs=(rows, rows, PartitionSpec()), out_specs=rows), *arguments, weight


def main(topology: str) -> None:
    for name, fn, *args in programs(topology):
        started = time.perf_counter()
        compiled = lower_for("tpu", fn, *args).compile()
        text, memory = compiled.as_text(), compiled.memory_analysis()
        report: dict[str, Callable | object] = {"name": name, "seconds": time.perf_counter() - started, "sorts": sorts(text)}
        report |= {"temporary": memory.temp_size_in_bytes, "kernels": text.count('custom_call_target="tpu_custom_call"')}
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
