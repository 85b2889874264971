"""The restricted reader of torch's files: reads what torch writes, runs nothing, believes no size."""

import os
import pickle
import zipfile
from collections import OrderedDict

import ml_dtypes
import numpy as np
import pytest

from dlmscope_jax.dictionaries.formats import torch_pickle
from dlmscope_jax.dictionaries.formats.torch_pickle import TorchFile
from dlmscope_jax.errors import UserError

CONTENTS = {
    "state": OrderedDict(
        w=np.arange(6, dtype=np.float32).reshape(2, 3),
        half=np.array([1.5, -2.0], ml_dtypes.bfloat16),
        k=np.array(5, np.int32),
        empty=np.zeros((0, 3), np.float64),
        flags=np.array([True, False]),
    ),
    "step": 7,
    "rate": 2.5,
    "name": "résidu",
    "big": 2**70,
    "list": [1, (2, None, False)],
}
PLAIN = ("step", "rate", "name", "big", "list")


def archive(path, pickled, storages=(), compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", pickled)
        for i, data in enumerate(storages):
            file.writestr(f"archive/data/{i}", data)
    return path


def tensor_pickle(kind="FloatStorage", key="0", size=6, offset=0, shape=(2, 3), stride=(3, 1)):
    """A pickle of one tensor that claims whatever it is told to."""
    writer = torch_pickle._Pickler()
    writer.out += b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\n" + kind.encode() + b"\n"
    for entry in (key, "cpu", size):
        writer.write(entry)
    writer.out += b"tQ"
    for entry in (offset, shape, stride, False, OrderedDict()):
        writer.write(entry)
    return b"\x80\x02" + bytes(writer.out) + b"tR."


def test_round_trip(tmp_path):
    torch_pickle.save(tmp_path / "a.pt", CONTENTS)
    with TorchFile(tmp_path / "a.pt") as file:
        got = file.contents
        assert [got[k] for k in PLAIN] == [CONTENTS[k] for k in PLAIN]
        assert type(got["state"]) is OrderedDict and list(got["state"]) == list(CONTENTS["state"])
        for name, want in CONTENTS["state"].items():
            array = file.read(got["state"][name])
            assert array.dtype == want.dtype and array.shape == want.shape
            np.testing.assert_array_equal(array, want)


def test_equal_contents_make_equal_files(tmp_path):
    for name in ("a.pt", "b.pt"):
        torch_pickle.save(tmp_path / name, CONTENTS)
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


def test_torch_reads_what_is_written(tmp_path):
    torch = pytest.importorskip("torch")
    torch_pickle.save(tmp_path / "a.pt", CONTENTS)
    got = torch.load(tmp_path / "a.pt", weights_only=True)
    assert got["name"] == CONTENTS["name"] and got["list"] == CONTENTS["list"]
    for name, want in CONTENTS["state"].items():
        assert tuple(got["state"][name].shape) == want.shape
        np.testing.assert_array_equal(got["state"][name].double().numpy(), want.astype(np.float64))


@pytest.mark.parametrize("protocol", [2, 4])
def test_reads_what_torch_writes(tmp_path, protocol):
    torch = pytest.importorskip("torch")
    layer = torch.nn.Linear(3, 2)
    base = torch.arange(24, dtype=torch.float32)
    tensors = {
        "transposed": base.reshape(4, 6).T,
        "view": base[5:11].reshape(2, 3),
        "strided": base[::5],
        "half": base.bfloat16()[2:7],
        "scalar": torch.tensor(3, dtype=torch.int),
        "shared": base,
        "parameter": layer.weight,
    }
    optimiser = torch.optim.Adam(layer.parameters())
    layer(torch.ones(3)).sum().backward()
    optimiser.step()
    others = {"ae": layer.state_dict(), "optimizer": optimiser.state_dict(), "device": torch.device("cpu"), "dtype": torch.bfloat16}
    torch.save({**tensors, **others}, tmp_path / "a.pt", pickle_protocol=protocol)
    with TorchFile(tmp_path / "a.pt") as file:
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(file.read(file.contents[name]).astype(np.float32), tensor.detach().float().numpy(), err_msg=name)
        np.testing.assert_array_equal(file.read(file.contents["ae"]["bias"]), layer.bias.detach().numpy())
        np.testing.assert_array_equal(file.read(file.contents["optimizer"]["state"][0]["step"]), 1.0)
        assert file.contents["dtype"] == "torch.bfloat16"


class _Runs:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 1, 2, 4, 5])
@pytest.mark.parametrize("function", [os.system, eval, getattr, __import__], ids=lambda f: f.__name__)
def test_code_is_refused_and_not_run(tmp_path, function, protocol):
    mark = tmp_path / "ran"
    commands = {"system": f"touch {mark}", "eval": f"open({str(mark)!r}, 'w')"}
    arguments = (os, "system") if function is getattr else (commands.get(function.__name__, "os"),)
    if function is getattr:
        arguments = ("text", "upper")
    pickled = pickle.dumps({"w": _Runs(function, *arguments)}, protocol=protocol)
    path = archive(tmp_path / "bad.pt", pickled)
    with pytest.raises(UserError, match="was not run|not a pickle"):
        TorchFile(path)
    assert not mark.exists()


@pytest.mark.parametrize("name", [("torch", "load"), ("torch.hub", "load"), ("collections", "OrderedDict.fromkeys"), ("builtins", "exec")])
def test_names_beside_the_allowed_ones_are_refused(tmp_path, name):
    module, attribute = (part.encode() for part in name)
    with pytest.raises(UserError, match=f"asks for {name[0]}.{name[1]}"):
        TorchFile(archive(tmp_path / "bad.pt", b"\x80\x02c" + module + b"\n" + attribute + b"\n."))


def test_building_upon_our_own_functions_changes_nothing(tmp_path):
    """BUILD sets attributes of whatever stands on the stack; what it gets must be a throw-away."""
    before = dict(vars(torch_pickle._rebuild_tensor))
    state = b"}(X\x01\x00\x00\x00aK\x01u"
    TorchFile(archive(tmp_path / "a.pt", b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n" + state + b"b."))
    assert vars(torch_pickle._rebuild_tensor) == before


@pytest.mark.parametrize(
    ("pickled", "says"),
    [
        (b"\x80\x02]r\xff\xff\xff\x7f.", "memo index"),
        (b"\x80\x02\x82\x01.", "instruction EXT1"),
        (b"\x80\x02(i os\nsystem\n.", "instruction INST"),
        (b"\x80\x02}", "not a pickle"),
        (b"", "not a pickle"),
        (b"\x80\x02X\xff\xff\xff\x7fabc.", "not a pickle"),
    ],
)
def test_hostile_pickles(tmp_path, pickled, says):
    with pytest.raises(UserError, match=says):
        TorchFile(archive(tmp_path / "bad.pt", pickled))


@pytest.mark.parametrize(
    ("claims", "says"),
    [
        ({"size": 7}, "its storage has 24 bytes, 7 entries of float32 are 28"),
        ({"size": 2**40}, "its storage has 24 bytes"),
        ({"kind": "DoubleStorage"}, "6 entries of float64 are 48"),
        ({"shape": (3, 3)}, "reaches past the 6 entries"),
        ({"shape": (2**30, 2**30), "stride": (0, 0)}, "reaches past the 6 entries"),
        ({"stride": (4, 1)}, "reaches past the 6 entries"),
        ({"offset": 1}, "reaches past the 6 entries"),
        ({"offset": -1}, "impossible"),
        ({"stride": (-3, 1)}, "impossible"),
        ({"stride": (3,)}, "impossible"),
        ({"shape": ("a", 3)}, "impossible"),
        ({"key": "9"}, "not in the file"),
    ],
)
def test_claims_that_do_not_fit_the_bytes(tmp_path, claims, says):
    path = archive(tmp_path / "bad.pt", tensor_pickle(**claims), [bytes(24)])
    with TorchFile(path) as file, pytest.raises(UserError, match=says):
        file.read(file.contents, "W")


def test_a_tensor_from_arguments_that_are_none_is_refused(tmp_path):
    path = archive(tmp_path / "bad.pt", b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(NNNNtR.")
    with TorchFile(path) as file, pytest.raises(UserError, match="is not a tensor"):
        file.read(file.contents)


def test_damaged_files(tmp_path):
    path = tmp_path / "a.pt"
    weights = {"w": np.arange(500, dtype=np.float32)}
    torch_pickle.save(path, weights)
    whole = path.read_bytes()
    for cut in (0, 3, 40, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError):
            TorchFile(path)
    at = whole.index(np.float32(250).tobytes() + np.float32(251).tobytes())
    path.write_bytes(whole[:at] + b"\x01" + whole[at + 1 :])
    with TorchFile(path) as file, pytest.raises(UserError, match="damaged: Bad CRC-32"):
        file.read(file.contents["w"], "w")


def test_other_files(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        TorchFile(tmp_path / "none.pt")
    (tmp_path / "old.pt").write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2))
    with pytest.raises(UserError, match="before torch 1.6"):
        TorchFile(tmp_path / "old.pt")
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as file:
        file.writestr("hello.txt", "hello")
    with pytest.raises(UserError, match="holds 0 data.pkl"):
        TorchFile(tmp_path / "other.pt")
    with pytest.raises(UserError, match="is compressed"):
        TorchFile(archive(tmp_path / "zipped.pt", tensor_pickle() + bytes(1000), compression=zipfile.ZIP_DEFLATED))


def test_an_old_format_file_of_torch_is_refused(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"a": torch.zeros(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match="before torch 1.6"):
        TorchFile(tmp_path / "old.pt")


def test_what_cannot_be_written(tmp_path):
    for value in (object(), {"a": {1, 2}}, np.zeros(2, np.complex64), np.array(["a"])):
        with pytest.raises(UserError, match="cannot write"):
            torch_pickle.save(tmp_path / "a.pt", {"x": value})
