"""Bytes: what a safetensors file may say, which ranges are read, how often, and how much memory that takes."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts
from jax.sharding import SingleDeviceSharding
from safetensors.numpy import save_file
from tiny import TINY

from dlmscope_jax.errors import UserError
from dlmscope_jax.models import Transformer, load_model, save_model
from dlmscope_jax.models.families import Fused, Tensor
from dlmscope_jax.models.folders import LocalFolder, RemoteFolder, context, open_folder
from dlmscope_jax.models.loading import load_params, read_model
from dlmscope_jax.models.streaming import chunks, load_arrays, part_of, write_rows
from dlmscope_jax.models.weights import Weights

ROOT = Path(__file__).resolve().parents[2]


# What a file may say


def write_file(path: Path, header: object, data: bytes = b"", size: int | None = None) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if size is None else size).to_bytes(8, "little") + raw + data)


def entry(start: int, stop: int, shape: object = None, dtype: object = "F32") -> dict:
    return {"dtype": dtype, "shape": [(stop - start) // 4] if shape is None else shape, "data_offsets": [start, stop]}


def test_a_file_of_the_format(tmp_path):
    header = {
        "__metadata__": {"format": "pt"},
        "b": entry(8, 24, [2, 2]),
        "a": entry(0, 8),
        "none": entry(8, 8, [0, 7]),
        "one": entry(24, 28, []),
    }
    write_file(tmp_path / "model.safetensors", header, np.arange(7, dtype=np.float32).tobytes())
    weights = Weights(LocalFolder(tmp_path))
    assert {name: stored.shape for name, stored in weights.tensors.items()} == {"b": (2, 2), "a": (2,), "none": (0, 7), "one": ()}
    np.testing.assert_array_equal(weights.read("b", [(0, 2)], [(0, 2)]), [[2, 3], [4, 5]])
    np.testing.assert_array_equal(weights.read("a", [(1, 2), (0, 1)], [(0, 1)]), [[1], [0]])
    assert weights.header_bytes == weights.folder.bytes_read - 16 - 8


@pytest.mark.parametrize(
    ("header", "data", "size", "message"),
    [
        ({}, b"", 1 << 62, "claims 4611686018427387904 bytes"),
        ({}, b"", 99_999_999, "claims 99999999 bytes"),
        (b"", b"", None, "shorter than the shortest header"),
        (b"{" * 5000, b"", None, "does not make sense"),
        (b"[" * 90000, b"", None, "does not make sense"),
        ([1], b"", None, "does not make sense"),
        ({"a": 7}, b"", None, "does not make sense"),
        ({"a": {"dtype": "F32", "shape": [1]}}, b"1234", None, "data_offsets"),
        (b'{"a": ' + json.dumps(entry(0, 4)).encode() + b', "a": ' + json.dumps(entry(0, 4)).encode() + b"}", b"1234", None, "twice"),
        ({"a": entry(0, 4, dtype="F7")}, b"1234", None, "a has dtype 'F7'"),
        ({"a": entry(0, 4, dtype=["F32"])}, b"1234", None, "does not make sense"),
        ({"a": entry(0, 4, [-1])}, b"1234", None, r"a has shape \[-1\]"),
        ({"a": entry(0, 4, [True])}, b"1234", None, r"a has shape \[True\]"),
        ({"a": entry(0, 4, [1.0])}, b"1234", None, r"a has shape \[1.0\]"),
        ({"a": entry(0, 4, [1] * 9)}, b"1234", None, "a has shape"),
        ({"a": entry(0, 4, [2])}, b"1234", None, r"a has 4 bytes for a shape of \[2\] in F32"),
        ({"a": entry(0, 4, [1 << 40, 1 << 40])}, b"1234", None, "a has 4 bytes for a shape"),
        ({"a": entry(4, 0, [1])}, b"1234", None, "a has -4 bytes"),
        ({"a": entry(-4, 0, [1])}, b"1234", None, "a has shape"),
        ({"a": entry(4, 8)}, b"12345678", None, "a begins at byte"),
        ({"a": entry(0, 8), "b": entry(4, 12)}, b"1" * 12, None, "b begins at byte"),
        ({"a": entry(0, 4), "b": entry(8, 12)}, b"1" * 12, None, "b begins at byte"),
        ({"a": entry(0, 8)}, b"1" * 7, None, "ends before byte"),
    ],
)
@pytest.mark.parametrize("remote", [False, True])
def test_a_damaged_file_is_one_line_and_nothing_is_allocated(tmp_path, header, data, size, message, remote):
    write_file(tmp_path / "model.safetensors", header, data, size)
    folder = open_folder(f"file://{tmp_path}" if remote else tmp_path)
    with pytest.raises(UserError, match=message) as error:
        Weights(folder)
    assert "model.safetensors is damaged or not a safetensors file" in str(error.value) and "\n" not in str(error.value)
    assert folder.bytes_read <= (tmp_path / "model.safetensors").stat().st_size + 2


def test_files_that_disagree(tmp_path):
    for name in ("a", "b"):
        write_file(tmp_path / f"{name}.safetensors", {"x": entry(0, 4)}, b"1234")
    with pytest.raises(UserError, match="x is in both a.safetensors and b.safetensors"):
        Weights(LocalFolder(tmp_path))
    write_file(tmp_path / "model.safetensors", {"x": entry(0, 4)}, b"1234")
    assert Weights(LocalFolder(tmp_path)).tensors["x"].file == "model.safetensors"  # the one file that is named so is the model
    for index, message in [
        ({"weight_map": {"x": "../a.safetensors"}}, "is damaged"),
        ({"weight_map": {"x": "a.bin"}}, "is damaged"),
        ({"weight_map": {}}, "is damaged"),
        ({"weight_map": {"x": 3}}, "is damaged"),
        ({"weight_map": {"x": "c.safetensors"}}, "c.safetensors is named by model.safetensors.index.json but is not there"),
    ]:
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(UserError, match=message):
            Weights(LocalFolder(tmp_path))


# Which bytes are read


def stored_matrix(tmp_path: Path, shape: tuple[int, int], dtype=np.float32, remote: bool = False) -> tuple[Weights, np.ndarray]:
    value = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    save_file({"w": value}, tmp_path / "model.safetensors")
    weights = Weights(open_folder(f"file://{tmp_path}" if remote else tmp_path))
    weights.folder.bytes_read = 0
    return weights, value


@pytest.mark.parametrize(
    ("shape", "rows", "columns", "remote", "expected"),
    [
        # whole rows: exactly those, one range
        ((64, 4096), [(3, 9)], [(0, 4096)], False, 6 * 4096 * 4),
        ((64, 4096), [(40, 50), (3, 9)], [(0, 4096)], False, 16 * 4096 * 4),
        # a quarter of rows of 16 KB: 12 KB lie between two parts, more than a page, so each part is a read of its own
        ((64, 4096), [(0, 64)], [(1024, 2048)], False, 64 * 1024 * 4),
        ((64, 4096), [(8, 16)], [(0, 512), (3584, 4096)], False, 8 * 1024 * 4),
        # a quarter of rows of 2 KB: the 1.5 KB between are read along, but not what is before the first and after the last
        ((64, 512), [(0, 64)], [(128, 256)], False, 63 * 512 * 4 + 128 * 4),
        ((64, 512), [(8, 9), (20, 40)], [(128, 160), (192, 256)], False, (0 * 512 + 128) * 4 + (19 * 512 + 128) * 4),
        # a bucket: 12 KB between are cheaper than 64 requests
        ((64, 4096), [(0, 64)], [(1024, 2048)], True, 63 * 4096 * 4 + 1024 * 4),
        ((64, 4096), [(3, 9)], [(0, 4096)], True, 6 * 4096 * 4),
    ],
)
def test_exactly_these_bytes_are_read(tmp_path, shape, rows, columns, remote, expected):
    weights, value = stored_matrix(tmp_path, shape, remote=remote)
    found = weights.read("w", rows, columns)
    picked = np.concatenate([value[a:b] for a, b in rows])
    np.testing.assert_array_equal(found, np.concatenate([picked[:, a:b] for a, b in columns], axis=1))
    assert weights.folder.bytes_read == expected


def test_blocks_of_rows_read_along_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("dlmscope_jax.models.weights._BLOCK", 5 * 512 * 4)
    weights, value = stored_matrix(tmp_path, (64, 512))
    np.testing.assert_array_equal(weights.read("w", [(1, 64)], [(128, 256)]), value[1:, 128:256])
    assert weights.folder.bytes_read == (12 * (4 * 512 + 128) + (2 * 512 + 128)) * 4  # twelve blocks of five rows and one of three


def test_a_row_of_a_fused_tensor():
    for group, of, part in [(4, 3, 1), (1, 2, 0), (12, 3, 2)]:
        fused = Fused(part, of, group)
        lies = [(o // group) * of * group + part * group + o % group for o in range(12)]
        for start in range(12):
            for stop in range(start + 1, 13):
                assert [i for a, b in fused.runs(start, stop) for i in range(a, b)] == lies[start:stop]


@pytest.mark.parametrize("seed", range(30))
def test_chunks_are_equally_long_and_read_every_byte_once(tmp_path, seed):
    """Random groups of devices and of arrays, against indexing the whole tensor."""
    random = np.random.default_rng(seed)
    group, transposed, of = int(random.integers(1, 4)), bool(seed % 2), int(random.integers(1, 4))
    n_out, n_in, devices_out, devices_in = group * 4, 6, int(random.choice([1, 2])), int(random.choice([1, 2, 3]))
    shape = (n_out * of, n_in) if transposed else (n_in, n_out * of)
    weights, value = stored_matrix(tmp_path, shape)
    weights.folder.gap, weights.folder.chunk = 0, int(random.integers(1, 400))
    arrays = [int(random.integers(of))] if transposed else range(of)
    regions, parts = [], []
    for part in arrays:
        tensor = Tensor("w", transposed, Fused(part, of, group) if of > 1 else None)
        for o in range(devices_out):
            for i in range(devices_in):
                out, into = (
                    (o * n_out // devices_out, (o + 1) * n_out // devices_out),
                    (i * n_in // devices_in, (i + 1) * n_in // devices_in),
                )
                regions.append((part, out, into))
                parts.append(part_of(tensor, (into, out)))
    got = [[] for _ in parts]
    sizes = set()
    for start, read in chunks(weights, "w", parts):
        for rows, so_far in zip(read, got, strict=True):
            held = sum(map(len, so_far))
            np.testing.assert_array_equal(np.concatenate([*so_far, rows])[start:held], rows[: held - start])  # repeated, not other rows
            so_far.append(rows[held - start :])
            sizes.add(rows.shape)
    assert len({n for n, _ in sizes}) == 1
    ours = value.T if transposed else value
    for (part, out, into), rows in zip(regions, got, strict=True):
        lies = [(o // group) * of * group + part * group + o % group for o in range(*out)]
        part_of_ours = ours[into[0] : into[1]][:, lies]
        np.testing.assert_array_equal(np.concatenate(rows), part_of_ours.T if transposed else part_of_ours)
    assert weights.folder.bytes_read == len(list(arrays)) * n_out * n_in * 4


def test_three_arrays_of_one_tensor_are_one_read(tmp_path):
    """GPT-2's ``c_attn``: the columns of q, k and v lie side by side; together they are whole rows."""
    weights, value = stored_matrix(tmp_path, (64, 3 * 2048))
    reads = []
    weights.folder.read_into = lambda name, start, out, inner=weights.folder.read_into: (reads.append(out.size), inner(name, start, out))[1]
    tensors = [Tensor("w", fused=Fused(part, 3, 2048)) for part in range(3)]
    one = SingleDeviceSharding(jax.devices()[0])
    arrays = load_arrays(weights, tensors, [(64, 2048)] * 3, [one] * 3, False, np.dtype(np.float32))
    for part, array in enumerate(arrays):
        np.testing.assert_array_equal(array, value[:, part * 2048 : (part + 1) * 2048])
    assert reads == [value.nbytes] == [weights.folder.bytes_read]
    list(chunks(weights, "w", [part_of(tensors[1], ((0, 64), (0, 2048)))]))  # one of them alone: its third, row by row
    assert weights.folder.bytes_read == value.nbytes + value.nbytes // 3


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
def test_dtypes_of_files(tmp_path, dtype, wanted):
    value = (np.random.default_rng(0).standard_normal((3, 5)) * 10.0 ** np.arange(-6, 4, 2)).astype(
        dtype
    )  # some below float16's normal numbers
    save_file({"w": value}, tmp_path / "model.safetensors")
    weights = Weights(LocalFolder(tmp_path))
    (array,) = load_arrays(weights, [Tensor("w", True)], [(5, 3)], [SingleDeviceSharding(jax.devices()[0])], False, np.dtype(wanted))
    assert array.dtype == np.dtype(wanted)
    np.testing.assert_array_equal(array, value.T.astype(np.float32).astype(wanted))


# Devices

MESHES = """
    import sys; sys.path.insert(0, "tests/models")
    import dataclasses, jax, numpy as np
    from jax.sharding import Mesh, AxisType, NamedSharding
    from tiny import TINY
    from dlmscope_jax.models import Transformer, init_params, partition_specs, save_model, load_model
    from dlmscope_jax.models.families import family_of
    from dlmscope_jax.models.folders import open_folder
    from dlmscope_jax.models.loading import load_params, read_model
    from dlmscope_jax.models.streaming import chunks, part_of, write_rows
    from dlmscope_jax.models.weights import Weights

    def saved(name, folder):
        config, diffusion = TINY[name]
        diffusion = diffusion and dataclasses.replace(diffusion, mask_id=95)
        model = Transformer(dataclasses.replace(config, vocab_size=96), diffusion)
        random = np.random.default_rng(0)
        shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
        params = jax.tree.map(lambda x: random.standard_normal(x.shape, np.float32), shapes)
        save_model(folder, model, params, dtype="float32")
        return model, params, sum(x.nbytes for x in jax.tree.leaves(params))

    def mesh_of(data, model):
        return Mesh(np.array(jax.devices()).reshape(data, model), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
"""


def test_on_a_mesh_every_byte_is_read_once(run_with_devices, tmp_path):
    script = """
    for name in ("dream", "gpt2", "gpt_neox", "mdlm"):
        folder = f"{FOLDER}/{name}"
        model, params, size = saved(name, folder)
        for shape in ((2, 2), (1, 4), (4, 1)):
            mesh, files = mesh_of(*shape), open_folder(folder)
            weights = Weights(files)
            files.bytes_read = 0
            loaded = load_params(read_model(folder), weights, mesh)
            assert files.bytes_read == size, (name, shape, files.bytes_read, size)
            jax.tree.map(np.testing.assert_array_equal, loaded, params["params"])
            for leaf, spec in zip(jax.tree.leaves(loaded), jax.tree.leaves(partition_specs(loaded, mesh))):
                assert leaf.sharding == NamedSharding(mesh, spec)
    model, _ = load_model(folder, mesh=mesh)
    assert model.mesh is mesh and load_model(folder)[0].mesh is None
    """
    run_with_devices(textwrap.dedent(MESHES) + f"FOLDER = {str(tmp_path)!r}\n" + textwrap.dedent(script), n_devices=4)


def test_a_process_reads_the_parts_of_its_own_devices(run_with_devices, tmp_path):
    """Two processes of two devices: what each would read is asked of the plan with its devices alone."""
    script = """
    for name in ("dream", "gpt2", "gpt_neox", "mdlm"):
        folder = f"{FOLDER}/{name}"
        model, params, _ = saved(name, folder)
        table = family_of(model.config.family, "").tensors(model.config)
        for shape in ((2, 2), (4, 1), (1, 4)):
            mesh = mesh_of(*shape)
            specs = partition_specs(params["params"], mesh)
            files = open_folder(folder)
            files.gap = 0  # tiny rows would all be read along
            weights = Weights(files)
            for process in (jax.devices()[:2], jax.devices()[2:]):
                for (path, leaf), spec in zip(jax.tree.leaves_with_path(params["params"]), jax.tree.leaves(specs)):
                    path = tuple(key.key for key in path)
                    where = NamedSharding(mesh, spec).devices_indices_map(leaf.shape)
                    stacked = path[0] == "blocks"
                    regions = {tuple(s.indices(n)[:2] for s, n in zip(where[d], leaf.shape))[stacked:] for d in process}
                    own = sum(int(np.prod([b - a for a, b in region])) for region in regions) * 4
                    files.bytes_read = 0
                    list(chunks(weights, table[path].name.format(layer=1), [part_of(table[path], region) for region in regions]))
                    assert files.bytes_read == own, (name, shape, path, files.bytes_read, own)
    """
    run_with_devices(textwrap.dedent(MESHES) + f"FOLDER = {str(tmp_path)!r}\n" + textwrap.dedent(script), n_devices=4)


def test_one_compilation_for_a_shape(run_with_devices, tmp_path):
    """Four devices, three layers, several chunks a tensor: as many programs as there are shapes of buffers."""
    script = """
    from dlmscope_jax.models.folders import LocalFolder
    LocalFolder.chunk = 1000  # bytes, so that every matrix comes in several chunks
    saved("llama", FOLDER)
    before = write_rows._cache_size()
    _, params = load_model(FOLDER, mesh=mesh_of(2, 2))
    shapes = {x.sharding.shard_shape(x.shape) for x in jax.tree.leaves(params)}
    # embedding and head [48, 16]; norms [3, 16] and [16]; q [3, 16, 16]; k and v [3, 16, 8]; o [3, 16, 16]; gate and up; down
    assert write_rows._cache_size() - before == len(shapes) == 7, (write_rows._cache_size() - before, shapes)
    """
    run_with_devices(textwrap.dedent(MESHES) + f"FOLDER = {str(tmp_path)!r}\n" + textwrap.dedent(script), n_devices=4)


def test_a_buffer_is_written_in_place():
    buffer = jax.numpy.zeros((3, 8, 8), jax.numpy.bfloat16, device=(place := one_device()))
    rows = jax.device_put(jax.numpy.ones((8, 2), jax.numpy.bfloat16), place)
    address = buffer.unsafe_buffer_pointer()
    written = write_rows(buffer, rows, np.int32(1), np.int32(4), place.mesh, True, -1)
    assert buffer.is_deleted() and written.unsafe_buffer_pointer() == address
    expected = np.zeros((3, 8, 8))
    expected[1, :, 4:6] = 1
    np.testing.assert_array_equal(written.astype(jax.numpy.float32), expected)


def one_device() -> jax.sharding.NamedSharding:
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("device",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("device"))


# Buckets


def test_a_url_is_a_folder(tmp_path):
    model = Transformer(*TINY["gpt_neox"])
    params = random_params(model)
    save_model(tmp_path, model, params, dtype="float32")
    for url in (f"file://{tmp_path}", f"file://{tmp_path}/", in_memory(tmp_path)):
        again, loaded = load_model(url)
        assert (again.config, again.diffusion) == (model.config, model.diffusion)
        jax.tree.map(np.testing.assert_array_equal, loaded, params)
        assert read_model(url).config == model.config


def test_a_url_reads_ranges(tmp_path, monkeypatch):
    model = Transformer(*TINY["gpt2"])
    params = random_params(model)
    save_model(tmp_path, model, params, dtype="float32")
    monkeypatch.setattr("dlmscope_jax.models.folders._REQUEST", 1000)  # several at once
    folder = open_folder(f"file://{tmp_path}")
    weights = Weights(folder)
    assert isinstance(folder, RemoteFolder) and 8 < weights.header_bytes == folder.bytes_read < 10_000
    loaded = load_params(model, weights)
    jax.tree.map(np.testing.assert_array_equal, loaded, params["params"])
    assert folder.bytes_read - weights.header_bytes == sum(x.nbytes for x in jax.tree.leaves(params))


def test_mistakes_with_urls(tmp_path):
    model = Transformer(*TINY["llama"])
    save_model(tmp_path, model, random_params(model))
    (tmp_path / "config.json").rename(tmp_path / "aside")
    for url, message in [
        (f"file://{tmp_path}/nowhere", "nowhere holds no config.json: it is not a model folder"),
        ("ftp://host/model", "'ftp://host/model' is not a URL that can be opened"),
        (f"file://{tmp_path}", "holds no config.json"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            load_model(url)
        assert "\n" not in str(error.value)
    (tmp_path / "aside").rename(tmp_path / "config.json")
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:-1])
    with pytest.raises(UserError, match="ends before byte"):
        load_model(f"file://{tmp_path}")
    with pytest.raises(UserError, match="saved to a folder of this machine"):
        save_model(f"file://{tmp_path}", model, {})


@pytest.mark.parametrize("remote", [False, True])
def test_a_file_that_shrinks_while_it_is_read(tmp_path, remote):
    weights, _ = stored_matrix(tmp_path, (64, 64), remote=remote)
    os.truncate(tmp_path / "model.safetensors", 1000)
    with pytest.raises(UserError, match="model.safetensors .*(ends at byte 1000|cannot be read)"):
        weights.read("w", [(0, 64)], [(0, 64)])


def in_memory(folder: Path) -> str:
    store = ts.KvStore.open("memory://models/tiny/", context=context()).result()
    for file in folder.iterdir():
        store.write(file.name, file.read_bytes()).result()
    return "memory://models/tiny"


def random_params(model: Transformer) -> dict:
    from dlmscope_jax.models import init_params

    random = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    return jax.tree.map(lambda x: random.standard_normal(x.shape, np.float32), shapes)


# Memory

LOAD = """
import json, sys, threading, time
import jax, jax.numpy as jnp
from dlmscope_jax.models import load_model

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) * 1024

jax.block_until_ready(jax.jit(lambda x: x + 1)(jnp.zeros(8)))  # the backend and its compiler are there
baseline, peak, done = anonymous(), 0, threading.Event()

def watch():
    global peak
    while not done.wait(0.005):
        peak = max(peak, anonymous())

watcher = threading.Thread(target=watch)
watcher.start()
model, params = load_model(sys.argv[1], sys.argv[2])
done.set()
watcher.join()
arrays = params["params"]
mlp = arrays["blocks"]["up"]
print(json.dumps({
    "over": max(peak, anonymous()) - baseline - sum(x.nbytes for x in jax.tree.leaves(params)),
    "arrays": sum(x.nbytes for x in jax.tree.leaves(params)),
    "up": mlp[1, 5, -3:].astype(jnp.float32).tolist(), "head": arrays["head"][7, -3:].astype(jnp.float32).tolist(),
}))
"""


def synthetic(folder: Path, d_model: int, d_mlp: int, vocab: int, n_layers: int) -> dict:
    """A Llama of bfloat16 noise, written without holding it: its sizes in bytes, and some of its values."""
    from dlmscope_jax.models import ModelConfig, init_params
    from dlmscope_jax.models.families import llama

    config = ModelConfig(
        family="llama", vocab_size=vocab, d_model=d_model, n_layers=n_layers, n_heads=16, n_kv_heads=4, head_dim=d_model // 16, d_mlp=d_mlp,
        norm_eps=1e-5, rope_theta=1e4, max_positions=64, attention="causal",
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(llama.write(config, None)))
    shapes = jax.eval_shape(lambda: init_params(Transformer(config), jax.random.key(0)))["params"]
    header, at = {}, 0
    for path, leaf in jax.tree.leaves_with_path(shapes):
        path = tuple(key.key for key in path)
        tensor, stacked = llama.tensors(config)[path], path[0] == "blocks"
        for layer in range(n_layers if stacked else 1):
            shape = tensor.stored_shape(leaf.shape[stacked:])
            header[tensor.name.format(layer=layer)] = entry(at, at := at + 2 * int(np.prod(shape)), shape, "BF16")
    noise = np.random.default_rng(0).standard_normal(1_000_003, np.float32).astype(ml_dtypes.bfloat16)
    with open(folder / "model.safetensors", "wb") as file:
        raw = json.dumps(header).encode()
        file.write(len(raw).to_bytes(8, "little") + raw)
        for start in range(0, at, noise.nbytes):
            file.write(noise.tobytes()[: at - start])

    def values(name: str, where: slice) -> list[float]:
        return noise[np.arange(header[name]["data_offsets"][0] // 2, at // 2)[where] % len(noise)].astype(np.float32).tolist()

    return {
        "size": at,
        "largest": max(b - a for a, b in (e["data_offsets"] for e in header.values())),
        # up[1, 5, -3:] of ours is [-3:, 5] of the file
        "up": values("model.layers.1.mlp.up_proj.weight", slice((d_mlp - 3) * d_model + 5, d_mlp * d_model + 5, d_model)),
        "head": values("lm_head.weight", slice(8 * d_model - 3, 8 * d_model)),
    }


@pytest.mark.parametrize(
    ("sizes", "dtype", "beyond"),
    [
        # 208 MB; its largest tensor has 20 MB, the stack of one matrix of every layer 64 MB (128 MB in float32)
        pytest.param((1024, 4096, 10_000, 8), "float32", 64, id="small"),
        pytest.param((2048, 8192, 64_000, 24), "bfloat16", 256, id="3GB", marks=pytest.mark.slow),
    ],
)
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is Linux's")
def test_loading_takes_little_memory(tmp_path, sizes, dtype, beyond):
    """Peak anonymous memory over the baseline and the arrays: under the largest stored tensor and so many megabytes."""
    wanted = synthetic(tmp_path, *sizes)
    try:
        done = subprocess.run(
            [sys.executable, "-c", LOAD, str(tmp_path), dtype],
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
    finally:
        (tmp_path / "model.safetensors").unlink()
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["arrays"] == wanted["size"] * (2 if dtype == "float32" else 1)
    assert (found["up"], found["head"]) == (wanted["up"], wanted["head"])
    assert 0 < found["over"] < wanted["largest"] + (beyond << 20), (
        f"{found['over'] / 2**20:.0f} MB, {wanted['largest'] / 2**20:.0f} MB the largest"
    )


def test_a_bucket_that_does_not_answer_is_named(monkeypatch):
    from dlmscope_jax.models import folders

    promises = []

    class Silent:
        def read(self, name, **options):
            promise, future = ts.Promise.new()
            promises.append(promise)
            return future

    folder = folders.RemoteFolder("memory://silent/model")
    monkeypatch.setattr(folder, "_store", Silent())
    monkeypatch.setattr(folders, "_PATIENCE", 0.05)
    with pytest.raises(UserError, match=r"memory://silent/model/config.json cannot be read: no answer within 0.05 seconds"):
        folder.read("config.json")
