"""Folders in, folders out; every mistake in one line that names the thing."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dlmscope_jax.errors import UserError
from dlmscope_jax.models import load_model, model_identity, partition_specs, save_model
from dlmscope_jax.models.families import FAMILIES


@pytest.fixture
def folder(family, tiny_model, tmp_path):
    model, params = tiny_model(family)
    save_model(tmp_path, model, params, dtype="float32")
    return tmp_path


def test_round_trip(family, folder, tiny_model):
    model, params = tiny_model(family)
    again, loaded = load_model(folder)
    assert (again.config, again.diffusion) == (model.config, model.diffusion)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_every_family_is_tested(family):
    assert sorted(f.lower() for f in FAMILIES) == ["dream", "llada", "llama", "qwen2"]


def test_bfloat16(folder):
    model, params = load_model(folder, dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    assert model.dtype == jnp.bfloat16
    with pytest.raises(UserError, match="float16"):
        load_model(folder, dtype="float16")


def test_all_wrong_tensors_are_named_at_once(folder):
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    gone, cut = names[0], next(n for n in names if tensors[n].ndim == 2 and n != names[0])
    del tensors[gone]
    tensors[cut] = tensors[cut][:-1].copy()
    tensors["model.surprise"] = np.zeros(3, np.float32)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError) as error:
        load_model(folder)
    message = str(error.value)
    assert f"missing {gone}" in message and "unexpected model.surprise" in message and f"{cut} has shape" in message
    assert "\n" not in message


def test_the_two_ff_out_of_llada(tiny_model, tmp_path):
    model, params = tiny_model("llada")
    save_model(tmp_path, model, params, dtype="float32")
    tensors = load_file(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(tensors["model.transformer.ff_out.weight"], params["params"]["head"])
    np.testing.assert_array_equal(tensors["model.transformer.blocks.1.ff_out.weight"], params["params"]["blocks"]["down"][1].T)


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_config_mistakes(folder):
    original = (folder / "config.json").read_text()
    for changes, word in [
        ({"clip_qkv": 3.0}, "clip_qkv"),
        ({"model_type": "mamba"}, "mamba"),
        ({"hidden_act": "gelu", "activation_type": "gelu"}, "gelu"),
        ({"use_sliding_window": True, "alibi": True, "mlp_bias": True}, "True"),
        ({"vocab_size": None}, "vocab_size"),
        ({"vocab_size": "97"}, "vocab_size is '97', which is not a whole number"),
        ({"rms_norm_eps": True}, "rms_norm_eps is True"),
    ]:
        edit_config(folder, **changes)
        with pytest.raises(UserError, match=word):
            load_model(folder)
        (folder / "config.json").write_text(original)
    (folder / "config.json").write_text("[1]")
    with pytest.raises(UserError, match="holds a list"):
        load_model(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        load_model(folder)


def test_an_incomplete_rope_scaling_is_named(tiny_model, tmp_path):
    save_model(tmp_path, *tiny_model("llama"))
    edit_config(tmp_path, rope_scaling={"rope_type": "llama3", "low_freq_factor": 1.0})
    with pytest.raises(UserError, match="rope_scaling: key 'factor' is missing"):
        load_model(tmp_path)
    edit_config(tmp_path, rope_scaling={"rope_type": "yarn"})
    with pytest.raises(UserError, match="yarn"):
        load_model(tmp_path)


def test_a_damaged_index_is_named(folder):
    for text in ("{", "[]", '{"weights": {}}'):
        (folder / "model.safetensors.index.json").write_text(text)
        with pytest.raises(UserError, match="index.json is damaged"):
            load_model(folder)


def test_files_mistakes(folder, tmp_path_factory):
    with pytest.raises(UserError, match="no such folder"):
        load_model(folder / "nowhere" / "at" / "all")
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(UserError, match="no config.json"):
        load_model(empty)
    shutil.copy(folder / "config.json", empty)
    with pytest.raises(UserError, match="no .safetensors"):
        load_model(empty)
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:100])
    with pytest.raises(UserError, match="damaged"):
        load_model(folder)
    (folder / "model.safetensors").write_bytes(data[:-64])
    with pytest.raises(UserError, match="damaged"):
        load_model(folder)


def test_a_hub_id_without_network_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="nobody/nothing.*hub"):
        load_model("nobody/nothing")


def test_identity(family, folder, tiny_model):
    model, params = load_model(folder)
    same = model_identity(model, params)
    assert same == model_identity(*load_model(folder)) and len(same) == 16
    leaf = params["params"]["blocks"]["up"]
    params["params"]["blocks"]["up"] = leaf.at[1, 3, 4].set(leaf[1, 3, 4] * 1.5)
    assert model_identity(model, params) != same
    swapped = params | {"params": params["params"] | {"embed": params["params"]["embed"][::-1]}}
    assert model_identity(model, swapped) != model_identity(model, params)


def test_identity_does_not_depend_on_the_dtype(tiny_model, tmp_path):
    model, params = tiny_model("llama")
    save_model(tmp_path, model, params)  # bfloat16 on disk, as models are published
    assert model_identity(*load_model(tmp_path)) == model_identity(*load_model(tmp_path, dtype="bfloat16"))


def test_directly_to_a_mesh(run_with_devices, tiny_model, tmp_path):
    model, params = tiny_model("dream")
    save_model(tmp_path, model, params, dtype="float32")
    tokens = np.arange(22).reshape(2, 11) + 4
    np.save(tmp_path / "logits.npy", model.apply(params, jnp.asarray(tokens)).logits)
    # 97 is prime: the vocabulary cannot be split, so it is padded away here by a mesh of one along "model"
    run_with_devices(
        f"""
        import jax, numpy as np
        from jax.sharding import Mesh, AxisType
        from dlmscope_jax.models import load_model
        mesh = Mesh(np.array(jax.devices()).reshape(4, 1), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
        model, params = load_model({str(tmp_path)!r}, mesh=mesh)
        q = params["params"]["blocks"]["q"]
        assert q.sharding.shard_shape(q.shape) == (3, 8, 32), q.sharding
        tokens = np.arange(22).reshape(2, 11) + 4
        ours = jax.jit(lambda p, t: model.apply(p, t).logits)(params, tokens)
        np.testing.assert_allclose(ours, np.load({str(tmp_path / "logits.npy")!r}), atol=2e-5)
        """,
        n_devices=4,
    )


def test_sharding_mistakes(tiny_model):
    from jax.sharding import AbstractMesh

    _, params = tiny_model("llama")
    with pytest.raises(UserError, match="97 is not divisible"):
        partition_specs(params["params"], AbstractMesh((1, 2), ("data", "model")))
    with pytest.raises(UserError, match="no declared axes"):
        partition_specs({"stranger": np.zeros(3)}, AbstractMesh((1, 1), ("data", "model")))
