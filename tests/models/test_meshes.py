"""The forward pass on meshes, with replicas and without: what one device computes, each device for its own sequences."""

import textwrap
from pathlib import Path

import pytest

HERE = Path(__file__).parent

SCRIPT = f"""
import sys, dataclasses, numpy as np, jax, jax.numpy as jnp
sys.path.insert(0, {str(HERE)!r})
from jax.sharding import NamedSharding
from tiny import TINY
from dlmscope_jax import distributed
from dlmscope_jax.distributed import make_mesh, row_parts, row_sharding
from dlmscope_jax.models import Transformer, init_params, load_model, model_identity, partition_specs, save_model

SITES = ("resid_post@1", "mlp_act@0")
tokens = np.random.default_rng(0).integers(4, 90, (8, 11)).astype(np.int32)
real = np.arange(11) < np.arange(4, 12)[:, None]
"""


SOME = (("dream", ((2, 2, 2),)),)
OTHERS = (("dream", ((8, 1, 1), (1, 2, 1))), ("gpt2", ((2, 1, 4), (4, 2, 1))))


@pytest.mark.parametrize("meshes", [SOME, pytest.param(OTHERS, marks=pytest.mark.slow)], ids=["some", "others"])
def test_every_mesh_computes_what_one_device_does(run_with_devices, tmp_path, meshes):
    script = f"""
    for name, shapes in {meshes}:
        model = Transformer(*TINY[name])
        params = init_params(model, jax.random.key(1))
        one = jax.jit(lambda p, t, m, model=model: model.apply(p, t, attention_mask=m, collect=SITES))(params, tokens, real)
        if name == "dream":
            save_model({str(tmp_path)!r}, model, params, dtype="float32")
        for data, heads, replica in shapes:
            mesh = make_mesh(data, heads, replica, jax.devices()[: data * heads * replica])
            if name == "dream" and replica > 1:  # from files, each device its own part
                there, placed = load_model({str(tmp_path)!r}, mesh=mesh)
                jax.tree.map(np.testing.assert_array_equal, placed, params)
            else:
                specs = partition_specs(params["params"], mesh)
                placed = {{"params": jax.device_put(params["params"], jax.tree.map(lambda s: NamedSharding(mesh, s), specs))}}
                there = model.clone(mesh=mesh)
            assert model_identity(there, placed) == model_identity(model, params)
            for leaf, spec in zip(jax.tree.leaves(placed), jax.tree.leaves(partition_specs(params["params"], mesh)), strict=True):
                assert "replica" not in spec and leaf.sharding.is_equivalent_to(NamedSharding(mesh, spec), leaf.ndim)
            q = placed["params"]["blocks"]["q"]
            assert q.sharding.shard_shape(q.shape)[1:] == (q.shape[1] // data, q.shape[2] // heads)
            run = jax.jit(lambda p, t, m, model=there: model.apply(p, t, attention_mask=m, collect=SITES))
            out = run(placed, *jax.device_put((tokens, real), row_sharding(mesh)))
            pairs = [(one.logits, out.logits), (one.taps["resid_post"][1], out.taps["resid_post"][1])]
            for wanted, found in (*pairs, (one.taps["mlp_act"][0], out.taps["mlp_act"][0])):
                np.testing.assert_allclose(np.asarray(found)[real], np.asarray(wanted)[real], atol=2e-5, rtol=2e-5, err_msg=str(mesh))
                # every device keeps its own sequences, all the way
                assert found.sharding.shard_shape(found.shape)[0] == 8 // row_parts(mesh), found.sharding
    """
    run_with_devices(SCRIPT + textwrap.dedent(script))
