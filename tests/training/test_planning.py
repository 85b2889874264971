"""The formulas of a plan beside what compilers count, where they count rightly: one device for arithmetic, eight for what is sent."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from dlmscope_jax.dictionaries import Gated, JumpReLU, LossSettings, ReLU, TopK
from dlmscope_jax.models import DiffusionSpec, ModelConfig, Transformer, init_params
from dlmscope_jax.training import TrainSpec, init_state, make_step, planning
from dlmscope_jax.training.chips import CHIPS, chip_of
from dlmscope_jax.training.planning import Collective, Cost, Parts

CONFIG = ModelConfig(
    family="dream", vocab_size=64, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, d_mlp=192, norm_eps=1e-5,
    rope_theta=10000.0, max_positions=64, attention="bidirectional", qkv_bias=True, pad_id=2,
)  # fmt: skip

SENT = """
import sys
sys.path.insert(0, {programs!r})
import jax
from programs import collectives
from dlmscope_jax import distributed
from dlmscope_jax.dictionaries import BatchTopK, LossSettings, Matryoshka, ReLU, TopK
from dlmscope_jax.recipes.plan import _trace_step
from dlmscope_jax.training import TrainSpec, planning
from dlmscope_jax.training.planning import Parts

none = LossSettings(aux=0.0)
for dictionary, settings, data, model, micro in (
    (TopK(24, 64, 4), none, 4, 2, 1), (TopK(24, 64, 4), LossSettings(aux=1.0), 2, 2, 1), (ReLU(24, 64, d_out=40), None, 2, 4, 1),
    (BatchTopK(24, 64, 4), none, 2, 2, 2), (Matryoshka(24, 64, 4, prefixes=(16, 64)), none, 1, 4, 1),
):
    target = "y" if dictionary.transcoder else None
    spec = TrainSpec(dictionary, steps=10, batch_size=64, settings=settings, micro_batches=micro, site="x", target=target)
    mesh = distributed.make_mesh(data, model, devices=jax.devices()[: data * model])
    found = [(c.op, c.operand_bytes, c.trips) for c in collectives(_trace_step(spec, mesh, None).compile().as_text())]
    aux = settings is not None and settings.aux > 0
    parts = Parts(data, model)
    told = planning.step_cost(spec, parts, "cpu").collectives
    sent = sum(size * times for _, size, times in found)
    expected = planning.step_cost(spec, parts, "cpu").sent
    if aux:  # the program holds the step without AuxK and, of the step with it, every case
        told = planning.step_cost(spec, parts, "cpu", aux=True).collectives
        assert len(told) == 8 and sent > expected
        assert all(any(op == c.op and 0 <= size - c.bytes <= 128 for op, size, _ in found) for c in told), (dictionary, told, found)
    else:
        assert expected <= sent <= expected + 128 * micro + 4 * 64 * micro, (dictionary, sent, expected, found)
        for c in told:  # some are sent together
            assert any(op == c.op and c.bytes <= size for op, size, _ in found), (dictionary, c, found)
print("agreed")
"""


def test_what_a_step_sends_is_what_the_formulas_say(run_with_devices, request):
    out = run_with_devices(SENT.format(programs=str(request.config.rootpath / "tests" / "kernels")), 8)
    assert out.strip().endswith("agreed")


def flops(compiled) -> float:
    return compiled.cost_analysis()["flops"]


def test_the_arithmetic_of_a_forward_pass(monkeypatch):
    """Two layers, unrolled, and one sequence: of a loop, over sequences in the attention of a CPU too, the compiler counts one turn."""
    monkeypatch.setattr(jax.lax, "scan", functools.partial(jax.lax.scan, unroll=True))
    model = Transformer(CONFIG, DiffusionSpec(3, shift=True))
    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    for layers, length in ((2, 64), (1, 32)):

        def tap(params, tokens, site):
            return model.apply(params, tokens, logits=False, collect=(site,)).taps["resid_post"]

        tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
        counted = flops(jax.jit(tap, static_argnums=2).lower(params, tokens, f"resid_post@{layers - 1}").compile())
        formula = planning.forward_cost(model, 1, length, layers, Parts(), "cpu")
        assert formula.bfloat16 == 0 and formula.flops <= counted <= 1.15 * formula.flops, (layers, length, counted, formula.flops)


@pytest.mark.parametrize("dictionary", [ReLU(64, 256), JumpReLU(64, 256), Gated(64, 256), TopK(64, 256, 64)], ids=lambda d: d.KIND)
def test_the_arithmetic_of_a_step(dictionary):
    spec = TrainSpec(dictionary, steps=10, batch_size=2048, settings=LossSettings(aux=0.0, sparsity=0.1))
    state = jax.eval_shape(lambda: init_state(spec))
    counted = flops(make_step(spec).lower(state, jax.ShapeDtypeStruct((2048, 64), jnp.float32)).compile())
    formula = planning.step_cost(spec, Parts(), "cpu").flops
    assert 0.9 * formula <= counted <= 1.3 * formula, counted / formula


def test_states_are_as_large_as_they_are():
    for optimizer in ("adam", "adam_bf16", "signum", "lion", "muon"):
        for ema in (None, 0.99):
            spec = TrainSpec(TopK(16, 32, 4), steps=10, optimizer=optimizer, ema=ema)
            state = jax.eval_shape(lambda spec=spec: init_state(spec))
            size = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))  # noqa: E731
            params, more = planning.state_bytes(spec, Parts())
            assert params == size(state.params)
            assert abs(more - size((state.opt_state, state.average, state.rows_since_fired))) <= 512, (optimizer, ema)


def test_dividing_divides():
    """Twice the devices along an axis halve what is divided over it, and micro-batches change no arithmetic."""
    spec = TrainSpec(TopK(64, 1024, 16), steps=10, batch_size=512)
    one, rows, latents = (planning.step_cost(spec, parts, "tpu") for parts in (Parts(), Parts(data=2), Parts(model=2)))
    assert one.flops == 2 * rows.flops == 2 * latents.flops and one.sent == 0
    assert rows.sent > 4 * 1024 * 128 > latents.sent > 0
    assert planning.step_cost(dataclasses.replace(spec, micro_batches=4), Parts(), "tpu").flops == one.flops
    assert planning.state_bytes(spec, Parts(model=4))[0] < 0.26 * planning.state_bytes(spec, Parts())[0]
    assert planning.step_cost(spec, Parts(replica=2), "tpu").sent == rows.sent
    model = Transformer(CONFIG, DiffusionSpec(3, shift=True), dtype=jnp.bfloat16)
    one, rows, heads = (planning.forward_cost(model, 8, 64, 2, parts, "tpu") for parts in (Parts(), Parts(data=2), Parts(model=2)))
    assert one.flops == one.bfloat16 == 2 * rows.flops == 2 * heads.flops
    assert {c.op for c in rows.collectives} == {"all-gather"} and {c.op for c in heads.collectives} == {"all-reduce"}


def test_time_is_the_roofline():
    chip = chip_of("TPU v5 lite")
    assert Cost(chip.bfloat16, 0, chip.bandwidth / 2).seconds(chip) == 1
    assert Cost(chip.bfloat16, chip.float32, chip.bandwidth * 3).seconds(chip) == 3
    ring = Cost(0, 0, 0, (Collective("x", "all-reduce", "data", 4, 2, int(chip.ring)),))
    assert ring.seconds(chip) == 2 * 2 * 3 / 4
    gather = Cost(0, 0, 0, (Collective("x", "all-gather", "data", 4, 1, int(chip.ring)),))
    assert gather.seconds(chip) == 3


def test_every_chip_is_found_by_its_own_names():
    for chip in CHIPS:
        for kind in chip.kinds:
            assert chip_of(kind) == chip, kind
    assert chip_of("TPU v5p").name == "TPU v5p" and chip_of("NVIDIA H100 80GB HBM3").name == "H100" and chip_of("cpu") is None
