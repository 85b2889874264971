"""Folders in, folders out; every mistake in one line that names the thing."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import TINY

from dlmscope_jax.errors import UserError
from dlmscope_jax.models import Transformer, init_params, load_model, model_identity, partition_specs, save_model, saving
from dlmscope_jax.models.families import FAMILIES


def random_params(model):
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    return jax.tree.map(lambda x: random.standard_normal(x.shape, np.float32), shapes)


@pytest.fixture(params=["llada", "gpt_neox"])
def folder(request, tmp_path):
    """A model with a tensor for each array, and one whose arrays share tensors."""
    model = Transformer(*TINY[request.param])
    save_model(tmp_path, model, random_params(model), dtype="float32")
    return tmp_path


@pytest.mark.parametrize("name", sorted(TINY))
def test_every_family_is_written_and_read(name, tmp_path):
    """Also the shared tensors: what was put into one comes out of it, from files of one's own and from other people's."""
    model = Transformer(*TINY[name])
    params = random_params(model)
    save_model(tmp_path, model, params, dtype="float32")
    again, loaded = load_model(tmp_path)
    assert (again.config, again.diffusion) == (model.config, model.diffusion)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    stored = load_file(tmp_path / "model.safetensors")  # the library agrees with our header
    assert sum(x.size for x in stored.values()) == sum(x.size for x in jax.tree.leaves(params))
    (tmp_path / "model.safetensors").unlink()
    names = sorted(stored)
    for i in range(3):
        save_file({n: stored[n] for n in names[i::3]}, tmp_path / f"part-{i}.safetensors")
    index = {"weight_map": {n: f"part-{i}.safetensors" for i in range(3) for n in names[i::3]}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    jax.tree.map(np.testing.assert_array_equal, load_model(tmp_path)[1], params)


def test_every_family_has_a_tiny_model():
    assert sorted(f.lower() for f in FAMILIES) == sorted(TINY)


def test_where_shared_tensors_lie(tmp_path):
    """GPT-2 [in, q|k|v]; NeoX [head, q|k|v, dim; in]; MDLM [q|k|v; in], written out here once more."""
    for name, tensor, arrange in [
        ("gpt2", "h.{}.attn.c_attn.weight", lambda q, k, v: np.concatenate([q, k, v], 1)),
        ("gpt2", "h.{}.attn.c_attn.bias", lambda q, k, v: np.concatenate([q, k, v])),
        ("gpt_neox", "gpt_neox.layers.{}.attention.query_key_value.weight", lambda *m: np.stack([x.T.reshape(4, 8, 32) for x in m], 1)),
        ("gpt_neox", "gpt_neox.layers.{}.attention.query_key_value.bias", lambda *m: np.stack([x.reshape(4, 8) for x in m], 1)),
        ("mdlm", "backbone.blocks.{}.attn_qkv.weight", lambda q, k, v: np.concatenate([q.T, k.T, v.T])),
    ]:
        model = Transformer(*TINY[name])
        params = random_params(model)
        save_model(tmp_path, model, params, dtype="float32")
        stored = load_file(tmp_path / "model.safetensors")
        ending = "_bias" if tensor.endswith("bias") else ""
        parts = [params["params"]["blocks"][p + ending][2] for p in "qkv"]
        found = next(stored[n] for n in stored if n.endswith(tensor.format(2)))
        np.testing.assert_array_equal(found.reshape(-1), arrange(*parts).reshape(-1))


def test_what_a_file_holds_besides_weights(tmp_path):
    """Buffers of published files, of any dtype, are passed over; a tensor of that name elsewhere is not."""
    model = Transformer(*TINY["gpt2"])
    params = random_params(model)
    save_model(tmp_path, model, params, dtype="float32")
    stored = {name.removeprefix("transformer."): value for name, value in load_file(tmp_path / "model.safetensors").items()}
    stored |= {f"h.{i}.attn.bias": np.ones((1, 1, 64, 64), bool) for i in range(3)}
    save_file(stored, tmp_path / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, load_model(tmp_path)[1], params)
    save_file(stored | {"h.0.cattn.bias": np.ones(3, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="do not fit config.json: unexpected h.0.cattn.bias$"):
        load_model(tmp_path)


def test_whole_numbers_are_no_weights(tmp_path):
    model = Transformer(*TINY["llama"])
    save_model(tmp_path, model, random_params(model), dtype="float32")
    stored = load_file(tmp_path / "model.safetensors")
    save_file(stored | {"model.norm.weight": np.ones(32, np.int32)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="model.norm.weight has dtype I32, wanted one of F32, F16, BF16, F64$"):
        load_model(tmp_path)


def test_what_fails_halfway_leaves_nothing_behind(tmp_path, monkeypatch):
    model = Transformer(*TINY["gpt2"])
    params = random_params(model)
    save_model(tmp_path / "old", model, params, dtype="float32")
    before = {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()}
    assembled, calls = saving._assembled, []

    def full(*args):
        calls.append(1)
        if len(calls) % 5 == 0:
            raise OSError(28, "No space left on device")
        return assembled(*args)

    monkeypatch.setattr(saving, "_assembled", full)
    for name, left in [("old", before), ("new", {})]:
        with pytest.raises(UserError, match=f"{name} cannot be written: No space left on device"):
            save_model(tmp_path / name, model, jax.tree.map(np.zeros_like, params))
        assert {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} == left


def test_saving_mistakes(tmp_path):
    model = Transformer(*TINY["llama"])
    params = random_params(model)
    with pytest.raises(UserError, match="dtype 'int8' is not supported: 'float32', 'bfloat16', 'float16'"):
        save_model(tmp_path, model, params, dtype="int8")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match="holds a model in several files"):
        save_model(tmp_path, model, params)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file cannot be written"):
        save_model(tmp_path / "file", model, params)


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
        ({"clip_qkv": 3.0}, "unknown keys clip_qkv"),
        ({"model_type": "mamba"}, "model_type 'mamba' is not supported"),
        ({"model_type": None}, "model_type None is not supported"),
        ({"vocab_size": None}, "key 'vocab_size' is missing"),
        ({"vocab_size": "97"}, "vocab_size is '97', which is not a whole number"),
    ]:
        edit_config(folder, **changes)
        with pytest.raises(UserError, match=word):
            load_model(folder)
        (folder / "config.json").write_text(original)
    (folder / "config.json").write_text("[1]")
    with pytest.raises(UserError, match="holds a list"):
        load_model(folder)
    for text in ("{", "[" * 90_000, b"\xff"):
        (folder / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
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


def test_identity(folder):
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
    tokens = np.arange(44).reshape(4, 11) + 4
    np.save(tmp_path / "logits.npy", model.apply(params, jnp.asarray(tokens)).logits)
    run_with_devices(
        f"""
        import jax, numpy as np
        from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
        from dlmscope_jax.models import load_model
        for shape in ((4, 1), (2, 2)):
            mesh = Mesh(np.array(jax.devices()).reshape(shape), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
            model, params = load_model({str(tmp_path)!r}, mesh=mesh)
            q = params["params"]["blocks"]["q"]
            assert q.sharding.shard_shape(q.shape) == (3, 32 // shape[0], 32 // shape[1]), q.sharding
            # 97 is prime: the vocabulary stays whole
            assert params["params"]["embed"].sharding.shard_shape((97, 32)) == (97, 32 // shape[0])
            tokens = np.arange(44).reshape(4, 11) + 4
            tokens = jax.device_put(tokens, NamedSharding(mesh, PartitionSpec("data")))
            out = jax.jit(lambda p, t: model.apply(p, t, collect=("resid_post@1", "mlp_act@0")))(params, tokens)
            np.testing.assert_allclose(out.logits, np.load({str(tmp_path / "logits.npy")!r}), atol=2e-5)
            # every device keeps its own sequences, all the way
            for value in (out.logits, out.taps["resid_post"][1], out.taps["mlp_act"][0]):
                assert value.sharding.shard_shape(value.shape)[0] == 4 // shape[0], value.sharding
        """,
        n_devices=4,
    )


def test_sharding_mistakes(tiny_model):
    from jax.sharding import AbstractMesh

    _, params = tiny_model("llama")
    with pytest.raises(UserError, match=r"16 \(kv_heads\) is not divisible"):
        partition_specs(params["params"], AbstractMesh((1, 3), ("data", "model")))
    with pytest.raises(UserError, match="no declared axes"):
        partition_specs({"stranger": np.zeros(3)}, AbstractMesh((1, 1), ("data", "model")))
