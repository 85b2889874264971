"""Harvest and stream on meshes of virtual devices: the rows, the order and the columns of one device."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

SETUP = f"""
import sys, numpy as np, jax, jax.numpy as jnp
sys.path.insert(0, {str(ROOT / "tests")!r})
from itertools import islice
from activations.conftest import tiny_blocks, tiny_model
from kernels.programs import collectives
from dlmscope_jax.activations import ActivationStore, ActivationStream, Corruption, harvest, stream
from dlmscope_jax.distributed import make_mesh, row_axes, row_parts, row_sharding
from dlmscope_jax.errors import UserError
from dlmscope_jax.models import model_identity

HALF, SITES = Corruption("rate", .3, .7), ("resid_post@0", "mlp_act@1")
blocks = tiny_blocks(61)

def mesh_of(data, model=1, replica=1):
    return make_mesh(data, model, replica, jax.devices()[: data * model * replica])
"""


def test_harvest_on_meshes(run_with_devices, tmp_path):
    script = f"""
    FOLDER = {str(tmp_path)!r}

    def tree(folder):
        from pathlib import Path
        files = (p for p in sorted(Path(folder).rglob("*")) if p.is_file() and not p.name.endswith(".__lock"))
        return {{str(p.relative_to(folder)): p.read_bytes() for p in files}}

    for kind, corruption in (("shifted", HALF), ("ar", Corruption("clean"))):
        model, params = tiny_model(kind)
        settings = dict(seed=3, batch_size=8, dtype="float32", shard_blocks=16)
        one = harvest(model, params, blocks, f"{{FOLDER}}/{{kind}}", SITES, corruption, **settings)
        shapes = ((2, 2, 2), (4, 2, 1)) if kind == "shifted" else ((4, 1, 1),)
        for shape in shapes:
            seen = []
            mesh = mesh_of(*shape)
            place = f"{{FOLDER}}/{{kind}}-{{'x'.join(map(str, shape))}}"
            store = harvest(model, params, blocks, place, SITES, corruption, mesh=mesh, progress=seen.append, **settings)
            assert store.complete and store.shards and sum(seen) == store.rows == one.rows
            assert store.meta == one.meta and [s.rows for s in store.shards] == [s.rows for s in one.shards]
            for name in one.columns:
                np.testing.assert_array_equal(store.column(name), one.column(name), err_msg=name)
            for site in SITES:
                np.testing.assert_allclose(store.read(site), one.read(site), rtol=1e-4, atol=1e-5)
            assert not [key for key in tree(place) if key.startswith("manifest-")]

    # a killed harvest goes on: on the same mesh to the same bytes, on another to the same rows
    model, params = tiny_model("shifted")
    whole = tree(f"{{FOLDER}}/shifted-2x2x2")
    for name, mesh in (("same", mesh_of(2, 2, 2)), ("none", None)):
        place = f"{{FOLDER}}/{{name}}"
        harvest(model, params, blocks, place, SITES, HALF, mesh=mesh_of(2, 2, 2), **settings)
        assert tree(place) == whole
        ActivationStore.open(place).forget([0, 2])
        store = harvest(model, params, blocks, place, SITES, HALF, mesh=mesh, **settings)
        assert name != "same" or tree(place) == whole
        for site in SITES:
            np.testing.assert_allclose(store.read(site), ActivationStore.open(f"{{FOLDER}}/shifted").read(site),
                                       rtol=1e-4, atol=1e-5)

    # a model that was loaded to a mesh keeps it
    from dlmscope_jax.activations.forward import on_mesh
    placed, there = on_mesh(model, params, mesh_of(4, 2))
    assert placed.mesh.shape == {{"data": 4, "model": 2}} and model_identity(placed, there) == model_identity(model, params)
    assert tree(harvest(placed, there, blocks, f"{{FOLDER}}/kept", SITES, HALF, **settings).url) == tree(f"{{FOLDER}}/shifted-4x2x1")
    for arguments, message in ((dict(mesh=mesh_of(2)), "lies on a mesh"), (dict(batch_size=6), "6 cannot be divided over the 4 parts")):
        try:
            harvest(placed, there, blocks, f"{{FOLDER}}/wrong", SITES, HALF, **(settings | arguments))
        except UserError as error:
            assert message in str(error), error
        else:
            raise AssertionError(message)
    """
    run_with_devices(SETUP + _dedent(script))


def test_streams_on_meshes(run_with_devices):
    script = """
    model, params = tiny_model("dlm")
    settings = dict(seed=3, batch_size=8, buffer_rows=200, dtype="float32")
    one = ActivationStream(model, params, blocks, SITES, HALF, **settings)
    arguments = dict(batch_size=16, seed=5, select="masked")
    wanted = list(islice(one.batches(**arguments), 40))
    for shape in ((4,), (2, 2, 2)):
        mesh = mesh_of(*shape)
        there = ActivationStream(model, params, blocks, SITES, HALF, mesh=mesh, **settings)
        assert there.identity == one.identity
        batches = there.batches(**arguments)
        found = list(islice(batches, 40))
        for step, (a, b) in enumerate(zip(wanted, found, strict=True)):
            for site in SITES:
                assert b[site].sharding.is_equivalent_to(row_sharding(mesh), 2), b[site].sharding
                np.testing.assert_allclose(a[site], b[site], rtol=1e-4, atol=1e-5, err_msg=f"{shape} {step}")
        for start in (1, 26):
            for a, b in zip(found[start:], there.batches(start_step=start, **arguments)):
                for site in SITES:
                    assert np.asarray(a[site]).tobytes() == np.asarray(b[site]).tobytes()
        # a device holds its own lanes' rows and no others, and a batch moves none of them
        buffer = batches._buffers["mlp_act@1"]
        assert buffer.sharding.shard_shape(buffer.shape) == (batches.capacity // row_parts(mesh), 16)
        places = jax.device_put(np.zeros(16, np.int32), row_sharding(mesh))
        text = stream._taken.lower(batches._buffers, places, mesh).compile().as_text()
        assert not collectives(text), collectives(text)
    try:
        ActivationStream(model, params, blocks, SITES, HALF, mesh=mesh_of(8), **(settings | dict(batch_size=12))).batches(**arguments)
    except UserError as error:
        assert "the 8 parts of the mesh's rows do not divide the 4 lanes" in str(error)
    else:
        raise AssertionError
    """
    run_with_devices(SETUP + _dedent(script))


@pytest.mark.slow
def test_training_from_a_stream_on_a_mesh(run_with_devices, tmp_path):
    script = f"""
    from dlmscope_jax.dictionaries import TopK
    from dlmscope_jax.training import TrainSpec, train
    model, params = tiny_model("dlm")
    spec = TrainSpec(dictionary=TopK(8, 32, 2), site="resid_post@0", steps=20, batch_size=16, lr=3e-3, sample_rows=64, select="masked")
    found = []
    for shape in (None, (2, 2), (4, 1)):
        mesh = None if shape is None else mesh_of(*shape)
        source = ActivationStream(model, params, blocks, SITES, HALF, seed=3, batch_size=8, buffer_rows=200, mesh=mesh)
        [trained] = train(spec, source, f"{str(tmp_path)}/{{shape}}", mesh=mesh)
        found.append({{name: np.asarray(value) for name, value in trained.params.items()}})
    for other in found[1:]:
        for name, value in found[0].items():
            np.testing.assert_allclose(other[name], value, rtol=2e-3, atol=2e-4, err_msg=name)
    """
    run_with_devices(SETUP + _dedent(script), n_devices=4)


def _dedent(script: str) -> str:
    from textwrap import dedent

    return dedent(script)
