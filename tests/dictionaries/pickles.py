"""Pickles made by hand, for the tests of readers that must not run them."""

import gzip
import pickle
import struct
import zipfile
from collections import OrderedDict

import numpy as np

from dlmscope_jax.dictionaries.formats.torch_pickle import _Pickler

CONFIG = "sae_training.config", "LanguageModelSAERunnerConfig"


class Config(dict):
    """The attributes of the transcoder paper's configuration."""


class Raw(bytes):
    """Instructions that are put in as they are."""


class Writer(_Pickler):
    """Writes ``Config`` as the object that it stands for, and instructions as they are."""

    def write(self, value):
        if isinstance(value, Config):
            module, name = CONFIG
            self.out += f"c{module}\n{name}\n".encode() + b")\x81"
            self.write(dict(value))
            self.out += b"b"
        elif isinstance(value, Raw):
            self.out += value
        else:
            super().write(value)


class BareWriter(Writer):
    """Writes tensors as Python pickles them: the storage as bytes in torch's old format."""

    def _tensor(self, array):
        name = {"float32": "FloatStorage", "float16": "HalfStorage", "int64": "LongStorage"}[array.dtype.name]
        data = old_storage(np.ascontiguousarray(array).tobytes(), array.size, name)
        self.out += b"ctorch._utils\n_rebuild_tensor_v2\n(" + loaded_from(data)
        stride = tuple(s // array.itemsize for s in np.ascontiguousarray(array).strides)
        for argument in (0, array.shape, stride, False, OrderedDict()):
            self.write(argument)
        self.out += b"tR"


def loaded_from(data):
    return b"ctorch.storage\n_load_from_bytes\nB" + struct.pack("<I", len(data)) + data + b"\x85R"


def old_storage(data, size, name="FloatStorage", key=b"94861215454544", magic=0x1950A86A20F9469CFC6C, keys=None, head=None, little=True):
    def text(value):
        return b"X" + struct.pack("<I", len(value)) + value

    machine = b"}(" + text(b"protocol_version") + b"M\xe9\x03" + text(b"little_endian") + (b"\x88" if little else b"\x89") + b"u."
    storage = b"(" + text(b"storage") + f"ctorch\n{name}\n".encode() + text(key) + text(b"cpu") + b"J" + struct.pack("<i", size) + b"NtQ."
    number = pickle.encode_long(magic)
    parts = [b"\x8a" + bytes([len(number)]) + number + b".", b"M\xe9\x03.", machine, storage, b"]" + text(keys or key) + b"a."]
    return b"".join(b"\x80\x02" + part for part in parts) + struct.pack("<q", size if head is None else head) + data


def pickled(contents, writer=Writer):
    """``contents`` as a pickle, and the arrays that lie outside of it."""
    pickler = writer()
    pickler.write(contents)
    return b"\x80\x02" + bytes(pickler.out) + b".", pickler.arrays


def archive(path, data, storages=(), compression=zipfile.ZIP_STORED, prefix="archive/", more=()):
    """A ``.pt`` file around a pickle."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr(f"{prefix}data.pkl", data)
        for i, array in enumerate(storages):
            file.writestr(f"{prefix}data/{i}", np.ascontiguousarray(array).tobytes())
        for name, entry in more:
            file.writestr(name, entry)
    return path


def save(path, contents):
    """A ``.pt``, ``.pkl`` or ``.pkl.gz`` file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.name.endswith(".pt"):
        return archive(path, *pickled(contents))
    data = pickled(contents, BareWriter)[0]
    path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)
    return path
