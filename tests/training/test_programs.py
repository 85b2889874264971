"""What the compiled step gives to other devices: how many collectives, and that none of their bytes come from the width.

A device holds 1,021 latents, a prime, and next to nothing else: any array with one number for each of them stands out.
"""

import json

import pytest

SCRIPT = """
import json, sys
import jax, jax.numpy as jnp
sys.path.insert(0, "tests/kernels")
from programs import collectives
from dlmscope_jax.dictionaries import BatchTopK, Binary, JumpReLU, LossSettings, Matryoshka, TopK
from dlmscope_jax.distributed import make_mesh, row_sharding
from dlmscope_jax.training import TrainSpec, init_state, make_step, state_shardings

D, K, AUX, HERE, ROWS = 6, 3, 5, 1021, 4
MAKE = {
    "topk": lambda n: TrainSpec(TopK(D, n, K, k_aux=AUX), steps=100),
    "batch_topk": lambda n: TrainSpec(BatchTopK(D, n, K, k_aux=AUX), steps=100),
    "matryoshka": lambda n: TrainSpec(Matryoshka(D, n, K, k_aux=AUX), steps=100),
    "jumprelu": lambda n: TrainSpec(JumpReLU(D, n), steps=100),
    "binary": lambda n: TrainSpec(Binary(D, n), steps=100, settings=LossSettings(entropy=1e-3, covariance=1e-3)),
    "transcoder": lambda n: TrainSpec(TopK(D, n, K, k_aux=AUX, d_out=D, skip=True, input_bias=True), steps=100, target="out"),
}

def program(name, data, model):
    import dataclasses
    mesh = make_mesh(data, model, devices=jax.devices()[: data * model])
    spec = dataclasses.replace(MAKE[name](HERE * model), batch_size=ROWS * data)
    there = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    state = jax.tree.map(there, jax.eval_shape(lambda: init_state(spec)), state_shardings(spec, mesh))
    rows = jax.ShapeDtypeStruct((ROWS * data, D), jnp.float32, sharding=row_sharding(mesh))
    lowered = make_step(spec, mesh).lower(state, (rows, rows) if spec.dictionary.transcoder else rows)
    # the collectives are settled before machine code is made, which takes most of the time
    return lowered.compile(compiler_options={"xla_backend_optimization_level": 0}).as_text()

for name, data, model in json.loads(sys.argv[1] if len(sys.argv) > 1 else CASES):
    print(json.dumps([name, data, model, [[c.op, c.operand_bytes, c.trips] for c in collectives(program(name, data, model))]]))
"""
D, K, AUX, HERE, ROWS = 6, 3, 5, 1021, 4
FLOAT = 4
VECTORS = {"jumprelu": 2}  # parameters of one number a latent; else b_enc alone
# collectives in a step where latents are divided, where both are, where rows are; branches (AuxK in steps with and without dead
# latents) are all counted. Binary's ring is not: it has model - 1 more.
COUNTS = {
    "topk": (15, 22, 10),
    "transcoder": (15, 22, 10),
    "batch_topk": (33, 44, 32),  # 16 and 16 of them, in either branch, are the counts of a threshold
    "matryoshka": (33, 44, 32),
    "jumprelu": (3, 6, 3),
    "binary": (2, 7, 5),
}
NAMES = ("topk", "batch_topk", "jumprelu", "binary", "transcoder")


def check(found):
    for name, data, model, moved in found:
        count, given = sum(trips for *_, trips in moved), sum(size * trips for _, size, trips in moved)
        over_rows = bits = 0
        if data > 1:
            # the gradients of what the device holds, once; in how many rows each latent fired, in either branch; bits: how often each is 1
            arrays = 2 * D + VECTORS.get(name, 1) + (1 if name == "jumprelu" else 2)
            over_rows = FLOAT * HERE * arrays
        if name == "binary":
            a_row_of_bytes = HERE * -(-ROWS // 8)
            bits = a_row_of_bytes * ((data > 1) + (model - 1) * data)
        # candidates, sums over the latents, their means over rows, ties, counts of a threshold; with AuxK and without
        rest = FLOAT * (2 * ROWS * (K + AUX) + 6 * ROWS * D + 8 * D + 3 * D * D + 2 * 8 * 15 + 64)
        assert rest < FLOAT * HERE  # a single vector of the width would be seen
        assert over_rows + bits <= given <= over_rows + bits + rest, (name, data, model, moved)
        ring = model - 1 if name == "binary" else 0
        assert count - ring == COUNTS[name][0 if data == 1 else 1 if model > 1 else 2], (name, data, model, count, moved)


def steps(run_with_devices, cases):
    out = run_with_devices(f"CASES = {json.dumps(json.dumps(cases))}\n" + SCRIPT, timeout=900)
    return [json.loads(line) for line in out.splitlines()]


def test_no_width_moves_but_gradients_over_rows_and_packed_bits(run_with_devices):
    check(steps(run_with_devices, [(name, 2, 4) for name in ("topk", "batch_topk", "jumprelu", "binary")]))


@pytest.mark.slow
def test_the_same_on_other_meshes(run_with_devices):
    cases = [(name, *mesh) for name in (*NAMES, "matryoshka") for mesh in ((2, 4), (4, 2), (1, 8), (8, 1))]
    check(steps(run_with_devices, cases))
