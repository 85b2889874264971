"""The reader of compiled programs, on programs whose collectives and sorts are known."""

import json
import re

import pytest
from programs import Collective, collectives, moved, sorts

B, N = 4, 1021  # on each of 4 devices, [B, N] float32
ARRAY = 4 * B * N

COMPILE = """
import jax, jax.numpy as jnp, json
from jax.sharding import AxisType, Mesh, PartitionSpec as P
import numpy as np

mesh = Mesh(np.array(jax.devices()).reshape(1, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
B, N = 4, 1021
ring = [(i, (i + 1) % 4) for i in range(4)]

def loop(times, body):
    return lambda x: jax.lax.fori_loop(0, times, lambda i, c: body(c), x)

def until(f):  # a trip count that no compiler can know
    return lambda x: jax.lax.while_loop(lambda c: c.sum() < 100.0, f, x)

sum_up = lambda x: jax.lax.psum(x, "model")
PROGRAMS = {
    "sum": sum_up,
    "sum in a loop": loop(7, lambda x: jnp.tanh(sum_up(x))),
    "permute": lambda x: jax.lax.ppermute(x, "model", ring),
    "gather": lambda x: jax.lax.all_gather(x, "model", axis=1, tiled=True),
    "gather of bytes": lambda x: jax.lax.all_gather((x > 0).astype(jnp.int8), "model", axis=1, tiled=True),
    "gather hidden in a sum": lambda x: sum_up(
        jax.lax.dynamic_update_slice(jnp.zeros((B, 4 * N)), x, (0, jax.lax.axis_index("model") * N))
    ),
    "scatter and exchange": lambda x: jax.lax.all_to_all(
        jax.lax.psum_scatter(x, "model", scatter_dimension=0, tiled=True)[:, :200].reshape(4, 50), "model", 0, 0
    ),
    "sum of two": lambda x: sum_up((x, x[:, :3] * 2)),
    "loop in a loop": loop(5, lambda x: jax.lax.ppermute(loop(3, lambda x: jnp.tanh(sum_up(x)))(x), "model", ring)),
    "in a branch": lambda x: jax.lax.cond(x.shape[0] < jax.lax.axis_index("data") + x[0, 0], sum_up, lambda x: x * 2, x),
    "alone": lambda x: jax.lax.ppermute(jax.lax.psum(jax.lax.all_gather(x, "data", axis=0, tiled=True), "data"), "data", [(0, 0)]),
    "unknown": until(sum_up),
    "unknown without": until(lambda x: x * 2),
    "condition": lambda x: jax.lax.while_loop(lambda c: c[0] < 6 + 0 * sum_up(c[1]).sum(), lambda c: (c[0] + 1, c[1] * 2), (0.0, x))[1],
    "top-k": lambda x: jax.lax.top_k(x, 5),
    "top-k of bfloat16": lambda x: jax.lax.top_k(x.astype(jnp.bfloat16), 5),
    "sort of columns": lambda x: jnp.sort(x, axis=0),
    "sort of pairs in a loop": loop(2, lambda x: jnp.take_along_axis(x, jnp.argsort(x, axis=1), axis=1)),
}
texts = {}
for name, f in PROGRAMS.items():
    f = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=P("data", "model"), out_specs=P("data"), check_vma=False))
    texts[name] = f.lower(jax.ShapeDtypeStruct((B, 4 * N), jnp.float32)).compile().as_text()
print(json.dumps(texts))
"""


@pytest.fixture(scope="module")
def texts(run_with_devices):
    return json.loads(run_with_devices(COMPILE, n_devices=4))


@pytest.mark.parametrize(
    "name,expected",
    [
        ("sum", [("all-reduce", ARRAY, 1)]),
        ("sum in a loop", [("all-reduce", ARRAY, 7)]),
        ("permute", [("collective-permute", ARRAY, 1)]),
        ("gather", [("all-gather", ARRAY, 1)]),
        ("gather of bytes", [("all-gather", ARRAY // 4, 1)]),
        ("gather hidden in a sum", [("all-reduce", 4 * ARRAY, 1)]),
        ("scatter and exchange", [("all-to-all", 4 * 200, 1), ("reduce-scatter", ARRAY, 1)]),
        ("sum of two", [("all-reduce", ARRAY + 4 * B * 3, 1)]),
        ("loop in a loop", [("all-reduce", ARRAY, 15), ("collective-permute", ARRAY, 5)]),
        ("in a branch", [("all-reduce", ARRAY, 1)]),
        ("alone", []),
        ("unknown without", []),
    ],
)
def test_collectives(texts, name, expected):
    assert sorted(collectives(texts[name])) == [Collective(*c) for c in expected]
    assert moved(texts[name]) == sum(size * trips for _, size, trips in expected)


@pytest.mark.parametrize("name", ["unknown", "condition"])
def test_a_collective_in_a_loop_of_unknown_length_is_an_error(texts, name):
    with pytest.raises(ValueError, match="unknown trip count"):
        collectives(texts[name])


# as libtpu writes it, which says nothing of trips
COUNTED = """
%condition (p: (s32[], f32[3])) -> pred[] {
  %p = (s32[], f32[3]) parameter(0)
  %end = s32[] constant(7)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %end), direction=LT
}
%body (q: (s32[], f32[3])) -> (s32[], f32[3]) {
  %q = (s32[], f32[3]) parameter(0)
  %one = s32[] constant(1)
  %j = s32[] get-tuple-element(%q), index=0
  %next = s32[] add(%j, %one)
  %x = f32[3] get-tuple-element(%q), index=1
  %sum = f32[3] all-reduce(%x), replica_groups={{0,1}}
  ROOT %out = (s32[], f32[3]) tuple(%next, %sum)
}
ENTRY %main (x: f32[3]) -> (s32[], f32[3]) {
  %x.1 = f32[3] parameter(0)
  %begin = s32[] constant(2)
  %copy = s32[] copy(%begin)
  %in = (s32[], f32[3]) tuple(%copy, %x.1)
  ROOT %loop = (s32[], f32[3]) while(%in), condition=%condition, body=%body
}
"""


def test_loops_that_count_by_ones_are_counted():
    assert collectives(COUNTED) == [Collective("all-reduce", 12, 5)]
    for changed in (("constant(1)", "constant(2)"), ("direction=LT", "direction=LE"), ("constant(7)", "parameter(1)")):
        with pytest.raises(ValueError, match="unknown trip count"):
            collectives(COUNTED.replace(*changed))


def test_the_condition_of_a_loop_runs_once_more_than_its_body(texts):
    known = re.sub(r"(condition=%[\w.\-]+, body=%[\w.\-]+)", r'\1, backend_config={"known_trip_count":{"n":"6"}}', texts["condition"])
    assert [c.trips for c in collectives(known)] == [7]


@pytest.mark.parametrize(
    "name,expected",
    [
        ("top-k", [(N, B * N)]),
        ("top-k of bfloat16", [(N, B * N)]),
        ("sort of columns", [(B, B * N)]),
        ("sort of pairs in a loop", [(N, B * N)]),
        ("sum", []),
    ],
)
def test_sorts(texts, name, expected):
    assert sorts(texts[name]) == expected


# Forms that programs for CPUs do not take: halves of an asynchronous pair, tiled layouts, types beside operands, what a fusion holds.
OTHER = """HloModule jit_f, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %add.1 = f32[]{:T(128)} add(%a, %b)
}

%inside (p: bf16[8,1021]) -> bf16[8,511] {
  %p = bf16[8,1021]{1,0:T(8,128)(2,1)} parameter(0)
  %sum = bf16[8,1021]{1,0:T(8,128)(2,1)} all-reduce(%p), channel_id=2, replica_groups=[2,2]<=[4], to_apply=%add
  ROOT %half = bf16[8,511]{1,0:T(8,128)(2,1)} slice(%sum), slice={[0:8], [0:511]}
}

%wrapped (w: f32[16]) -> f32[64] {
  %w = f32[16]{0:T(128)} parameter(0)
  ROOT %every = f32[64]{0:T(128)} all-gather(%w), channel_id=3, replica_groups={{0,1,2,3}}, dimensions={0}
}

%never (n: f32[16]) -> f32[16] {
  %n = f32[16]{0:T(128)} parameter(0)
  ROOT %unused = f32[16]{0:T(128)} all-reduce(%n), replica_groups={}, to_apply=%add
}

ENTRY %main (x: bf16[8,1021], y: f32[16]) -> (bf16[8,511], f32[64]) {
  %x = bf16[8,1021]{1,0:T(8,128)(2,1)} parameter(0), metadata={op_name="a name (with calls=%never in it"}
  %y = f32[16]{0:T(128)S(1)} parameter(1)
  %never = pred[16]{0:T(128)} compare(%y, %y), direction=GT
  %ever = pred[16]{0:T(128)} collective-broadcast(%never), replica_groups={{0,1,2,3}}
  %fused = bf16[8,511]{1,0:T(8,128)(2,1)} fusion(%x), kind=kCustom, calls=%inside, control-predecessors={%never}
  %begin = ((f32[16]{0:T(128)}), f32[64]{0:T(128)}, /*index=2*/u32[]{:S(2)}) async-start(%y), calls=%wrapped
  %more = ((f32[16]{0:T(128)}), f32[64]{0:T(128)}, /*index=2*/u32[]{:S(2)}) async-update(%begin), calls=%wrapped
  %end = f32[64]{0:T(128)} async-done(%more), calls=%wrapped
  %two = ((f32[16]{0}, f32[16]{0}), (f32[64]{0:T(128)}, f32[64]{0})) all-gather-start(%y, %y), replica_groups={{0,1,2,3}}, dimensions={0}
  %twice = (f32[64]{0:T(128)}, f32[64]{0:T(128)}) all-gather-done(%two)
  %sent = (f32[16]{0}, f32[16]{0}, u32[]{:S(2)}) collective-permute-start(f32[16]{0:T(128)S(1)} %y), source_target_pairs={{0,1},{1,0}}
  %got = f32[16]{0:T(128)} collective-permute-done((f32[16]{0:T(128)}, f32[16]{0:T(128)}, u32[]{:S(2)}) %sent)
  %self = f32[16]{0:T(128)} all-reduce(%y), replica_groups=[4,1]<=[4], to_apply=%add
  %one = f32[16]{0:T(128)} all-reduce(%y), replica_groups=mesh['a'=1,'b'=4] {'a'}, to_apply=%add
  %four = f32[16]{0:T(128)} reduce-scatter(%y), replica_groups=mesh['a'=1,'b'=4] {'a','b'}, dimensions={0}, to_apply=%add
  %best = (bf16[8,5]{1,0:T(8,128)}, s32[8,5]{1,0:T(8,128)}) topk(%x), k=5, largest=true
  %lib = (f32[16]{0}, s8[99]{0}) custom-call(%y), custom_call_target="__cub$DeviceRadixSort"
  ROOT %out = (bf16[8,511]{1,0:T(8,128)(2,1)}, f32[64]{0:T(128)}) tuple(%fused, %end)
}
"""


def test_forms_of_other_compilers():
    assert sorted(collectives(OTHER)) == [
        ("all-gather", 64, 1),
        ("all-gather", 128, 1),
        ("all-reduce", 2 * 8 * 1021, 1),
        ("collective-broadcast", 16, 1),
        ("collective-permute", 64, 1),
        ("reduce-scatter", 64, 1),
    ]
    assert sorts(OTHER) == [(1021, 8 * 1021), (16, 16)]


def test_a_type_of_unknown_size_is_an_error():
    with pytest.raises(ValueError, match="unknown size: weird"):
        collectives(OTHER.replace("bf16[", "weird["))


def test_other_text_is_an_error():
    with pytest.raises(ValueError, match="no entry"):
        collectives("module @jit_f {}")
