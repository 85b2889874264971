"""Files made to do harm: each is refused with one line, nothing in it runs, and no size is believed."""

import builtins
import gzip
import io
import os
import pickle
import struct
import tracemalloc
import zipfile
from collections import OrderedDict

import numpy as np
import pytest

from dlmscope_jax.dictionaries import load_dictionary
from dlmscope_jax.errors import UserError

from . import pickles, written
from .pickles import Config, Raw

PAPER = "final_sparse_autoencoder_x.pt"
# every name under which a pickle would be opened, and by which reader
BARE = ["final_sparse_autoencoder_x.pkl", "final_sparse_autoencoder_x.pkl.gz"]
NAMES = ["8.pt", PAPER, *BARE, "layer3.sae.pt", "model_1.pt", "a-SAE-l1.pth"]


class _Runs:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def put(path, data):
    """A pickle in whatever the path's ending wants."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.name.endswith((".pkl", ".pkl.gz")):
        path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)
        return path
    return pickles.archive(path, data)


def refused(path, says=None):
    with pytest.raises(UserError, match=says) as caught:
        load_dictionary(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1200


@pytest.fixture
def canary(tmp_path):
    """A file that must not appear."""
    mark = tmp_path / "canary"
    yield mark
    assert not mark.exists()


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("kind", ["system", "eval", "exec", "import", "getattr", "open", "partial"])
@pytest.mark.parametrize("name", NAMES)
def test_code_does_not_run(tmp_path, canary, name, kind, protocol):
    import functools

    evil = {
        "system": _Runs(os.system, f"touch {canary}"),
        "eval": _Runs(eval, f"open({str(canary)!r}, 'w')"),
        "exec": _Runs(exec, f"open({str(canary)!r}, 'w')"),
        "import": _Runs(builtins.__import__, "os"),
        "getattr": _Runs(getattr, "text", "upper"),
        "open": _Runs(io.open, str(canary), "w"),
        "partial": _Runs(functools.partial, os.system, f"touch {canary}"),
    }[kind]
    refused(put(tmp_path / name, pickle.dumps({"cfg": evil, "state_dict": {}}, protocol=protocol)), "was not run|not a pickle")


GLOBALS = [
    *("torch load", "torch.hub load", "torch.serialization load", "torch.jit load", "os system", "posix system", "subprocess Popen"),
    *("builtins eval", "builtins getattr", "builtins type", "collections OrderedDict.fromkeys"),
    *("sae_training.config os", "sae_training os.system", "sae_training.config LanguageModelSAERunnerConfig.__init__"),
    *("torch._utils _rebuild_tensor", "torch.storage _load_from_bytes", "numpy.core.multiarray _reconstruct", "copyreg _reconstructor"),
    *("dlmscope_jax.dictionaries.load load_dictionary", "__main__ X"),
]


@pytest.mark.parametrize("asked", GLOBALS)
@pytest.mark.parametrize("name", [PAPER, "x.pkl"])
def test_only_the_allowed_names(tmp_path, name, asked):
    module, attribute = asked.split()
    if asked == "torch.storage _load_from_bytes" and name == "x.pkl":
        return  # there it builds a storage, see below
    refused(put(tmp_path / name, f"\x80\x02c{module}\n{attribute}\n.".encode("latin-1")), f"asks for {module}.{attribute}, .* was not run")


def call(function, *arguments):
    """REDUCE of an allowed name with the given instructions as arguments."""
    return b"c" + function + b"\n(" + b"".join(arguments) + b"tR"


ONE, TEXT = b"K\x01", b"X\x01\x00\x00\x00a"
WRONG = {
    "a tensor of nothing": call(b"torch._utils\n_rebuild_tensor_v2"),
    "a tensor of numbers": call(b"torch._utils\n_rebuild_tensor_v2", ONE, ONE, ONE, ONE),
    "a tensor of itself": call(b"torch._utils\n_rebuild_tensor_v2", b"ctorch._utils\n_rebuild_tensor_v2\n", ONE, b")", b")"),
    "a parameter of nothing": call(b"torch._utils\n_rebuild_parameter"),
    "a size of a number": call(b"torch\nSize", ONE),
    "an ordered dict of a number": call(b"collections\nOrderedDict", ONE),
    "a configuration with arguments": call(b"sae_training.config\nLanguageModelSAERunnerConfig", ONE),
    "a dtype that is called": call(b"torch\nfloat32", ONE),
    "a device of a list": call(b"torch\ndevice", b"]"),
    "an object of text": TEXT + b")\x81",
    "an object of a function": b"ctorch\nSize\n)\x81",
    "a state of a number": b"csae_training.config\nLanguageModelSAERunnerConfig\n)\x81" + ONE + b"b",
    "a state of a list": b"]" + b"}b",
    "a persistent id of text": TEXT + b"Q",
    "a persistent id that is short": b"(" + TEXT + b"tQ",
    "a persistent id of another kind": b"(X\x06\x00\x00\x00modulectorch\nFloatStorage\n" + TEXT + TEXT + ONE + b"tQ",
    "a storage of text": call(b"torch.storage\n_load_from_bytes", TEXT),
    "an extension": b"\x82\x01",
    "an instance": b"(ios\nsystem\n",
    "a stack that is empty": b"0",
    "a memo that is empty": b"h\x05",
    "a number that no float can hold": b"\x8a\xff" + 254 * b"\xff" + b"\x7f",
    "a memo that is huge": b"]r\xff\xff\xff\x7f",
    "a set": b"\x8f",
    "a bytearray": b"\x96" + struct.pack("<Q", 2**40),
    "text of any length": b"X\xff\xff\xff\x7fabc",
    "bytes of any length": b"\x8e" + struct.pack("<Q", 2**60),
    "a frame of any length": b"\x95" + struct.pack("<Q", 2**60),
}


@pytest.mark.parametrize("what", list(WRONG))
@pytest.mark.parametrize("name", [PAPER, "x.pkl.gz", "8.pt"])
def test_allowed_names_used_wrongly(tmp_path, name, what):
    """As the whole file, and in the place of configuration, state and tensor."""
    evil = WRONG[what]
    refused(put(tmp_path / name, b"\x80\x02" + evil + b"."))
    for i, contents in enumerate(
        (
            {"cfg": Raw(evil), "state_dict": {}},
            {"cfg": Config(d_in=Raw(evil)), "state_dict": {"W_enc": Raw(evil)}},
            {"cfg": Config(), "state_dict": Raw(evil)},
            {"encoder.weight": Raw(evil), "latent_bias": Raw(evil), "pre_bias": Raw(evil), "activation": Raw(evil)},
        )
    ):
        refused(put(tmp_path / str(i) / name, pickles.pickled(contents)[0]))


def test_a_state_that_reaches_for_the_class_changes_nothing_here(tmp_path):
    """BUILD with slots sets attributes by name; what it reaches must be thrown away with the file."""
    from dlmscope_jax.dictionaries.formats import torch_pickle

    before = dict(vars(torch_pickle.Inert))
    slots = b"N}X\x05\x00\x00\x00lurks" + ONE + b"s\x86b"
    for made in (b"csae_training.config\nLanguageModelSAERunnerConfig\n", b"csae_training.config\nLanguageModelSAERunnerConfig\n)\x81"):
        refused(put(tmp_path / PAPER, b"\x80\x02" + made + slots + b"."))
    assert dict(vars(torch_pickle.Inert)) == before and not hasattr(OrderedDict, "lurks")


def test_lists_that_hold_each_other_are_never_written_out(tmp_path):
    """Sixty lines stand for 2^60 entries: whoever makes text of them, for a message too, does not come back."""
    bomb = b"]" + b"".join(b"q%c0](h%ch%ce" % (i, i, i) for i in range(60))
    weights = written.random(W_enc=(6, 20), b_enc=(20,), W_dec=(20, 4), b_dec=(6,), b_dec_out=(4,))
    for key in ("d_in", "is_transcoder", "model_name", "hook_point", "seed", "lr"):
        cfg = Config({"is_transcoder": True, "d_in": 6, "d_sae": 20, "d_out": 4, key: Raw(bomb)})
        path = pickles.save(tmp_path / PAPER, {"cfg": cfg, "state_dict": weights})
        try:
            load_dictionary(path)
        except UserError as error:
            assert len(str(error)) < 500
    sae = {"encoder.weight": weights["b_enc"][:, None], "latent_bias": weights["b_enc"], "pre_bias": weights["b_dec"][:1]}
    for key in ("activation", "activation_state_dict"):
        contents = sae | {"activation": "TopK", "activation_state_dict": {"k": Raw(bomb), "postact_fn": Raw(bomb)}} | {key: Raw(bomb)}
        refused(pickles.save(tmp_path / "8.pt", contents), "is not read")
    refused(put(tmp_path / "d.pt", b"\x80\x02" + call(b"torch\ndevice", bomb) + b"."), "device")


def test_results_that_are_handed_in_again(tmp_path):
    """A few bytes a step that double a text, or copy a long one once more: nothing may grow without the file."""
    megabyte = b"X" + struct.pack("<I", 2**20) + b"a" * 2**20
    text = b"X\x10\x00\x00\x00" + b"a" * 16
    doubled = text + b"q\x000ctorch\ndevice\nq\x010" + 40 * b"h\x01(h\x00h\x00tRq\x000" + b"N"
    device = megabyte + b"q\x000ctorch\ndevice\nq\x010](" + 100 * b"h\x01h\x00\x85R" + b"e"
    size = megabyte + b"q\x000ctorch\nSize\nq\x010](" + 100 * b"h\x01h\x00\x85R" + b"e"
    rows = b"](" + 2**15 * b"K\x01" + b"eq\x000ctorch\nSize\nq\x010](" + 400 * b"h\x01h\x00\x85R" + b"e"
    tracemalloc.start()
    for evil, says in ((doubled, "a device"), (device, "a device"), (size, "a size"), (rows, "a size")):
        for name in (PAPER, "x.pkl"):
            refused(put(tmp_path / name, b"\x80\x02" + evil + b"."), says)
    assert tracemalloc.get_traced_memory()[1] < 2**26
    tracemalloc.stop()


@pytest.mark.parametrize("name", [PAPER, "x.pkl.gz"])
def test_instructions_without_end(tmp_path, name):
    """Each letter is a list of 56 bytes."""
    refused(put(tmp_path / name, b"\x80\x02" + 2**19 * b"]" + b"."), "has more than 262144 instructions")


def test_a_storage_that_is_asked_for_many_times(tmp_path):
    storage = pickles.old_storage(bytes(2**22), 2**20)
    again = b"B" + struct.pack("<I", len(storage)) + storage + b"q\x000ctorch.storage\n_load_from_bytes\nq\x010"
    path = put(tmp_path / "x.pkl", b"\x80\x02" + again + b"](" + 200 * b"h\x01h\x00\x85R" + b"e.")
    tracemalloc.start()
    refused(path)
    assert tracemalloc.get_traced_memory()[1] < 2**26
    tracemalloc.stop()


def test_keys_whose_hash_takes_for_ever(tmp_path):
    """Sixty tuples, each of which holds the one before it twice, have a hash that asks 2^60 of them."""
    tuples = b")q\x00" + b"".join(b"0h%ch%c\x86q%c" % (i, i, i + 1) for i in range(60))
    says = "neither text nor a number"
    for evil, why in (
        (b"}" + tuples + b"K\x01s", says),
        (b"}(" + tuples + b"K\x01u", says),
        (b"}(ctorch\nSize\n(]" + tuples + b"atRK\x01u", says),
        (call(b"collections\nOrderedDict", b"](" + tuples + b"K\x01\x86e"), "TypeError"),
    ):
        refused(put(tmp_path / PAPER, b"\x80\x02" + evil + b"."), why)
        refused(put(tmp_path / "x.pkl", b"\x80\x02" + evil + b"."), why)


# --- storages in torch's old format, inside of bare pickles


@pytest.mark.parametrize(
    "change",
    [
        {"size": 7},
        {"size": -1},
        {"size": 2**31 - 1},
        {"head": 2**60},
        {"head": -1},
        {"magic": 3},
        {"keys": b"1"},
        {"little": False},
        {"name": "QUInt8Storage"},
        {"name": "load"},
        {"data": bytes(23)},
        {"data": bytes(25)},
        {"data": b""},
    ],
    ids=str,
)
def test_storages_that_lie(tmp_path, change):
    storage = pickles.old_storage(**({"data": bytes(24), "size": 6} | change))
    tensor = call(b"torch._utils\n_rebuild_tensor_v2", pickles.loaded_from(storage), b"K\x00", b"K\x06\x85", b"K\x01\x85", b"\x89", b")")
    weights = written.random(W_enc=(6, 20), b_enc=(20,), W_dec=(20, 4), b_dec_out=(4,)) | {"b_dec": Raw(tensor)}
    contents = {"cfg": Config(is_transcoder=True), "state_dict": weights}
    refused(pickles.save(tmp_path / "x.pkl", contents))
    good = pickles.old_storage(bytes(24), 6)
    weights["b_dec"] = Raw(tensor.replace(struct.pack("<I", len(storage)) + storage, struct.pack("<I", len(good)) + good))
    load_dictionary(pickles.save(tmp_path / "x.pkl", contents))


def test_a_storage_that_runs_code(tmp_path, canary):
    for part in range(5):
        data = pickles.old_storage(bytes(24), 6)
        ends = [i for i in range(len(data) - 24) if data[i : i + 1] == b"." and (data[i + 1 : i + 3] == b"\x80\x02" or i > 100)]
        start = 0 if part == 0 else ends[part - 1] + 1
        evil = data[:start] + pickle.dumps(_Runs(os.system, f"touch {canary}"), protocol=2) + data[ends[part] + 1 :]
        refused(put(tmp_path / "x.pkl", b"\x80\x02" + pickles.loaded_from(evil) + b"."), "was not run|not a pickle")


# --- archives


def test_bombs(tmp_path):
    """A small file that would unfold to 256 MB is refused without unfolding it."""
    zeros = bytes(2**20)
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", compresslevel=1) as file:
        for _ in range(256):
            file.write(zeros)
    (tmp_path / "x.pkl.gz").write_bytes(packed.getvalue())
    with zipfile.ZipFile(tmp_path / "8.pt", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        with file.open("archive/data.pkl", "w") as entry:
            for _ in range(256):
                entry.write(zeros)
    tracemalloc.start()
    refused(tmp_path / "x.pkl.gz", "unfolds to more than 8 times")
    refused(tmp_path / "8.pt", "is compressed")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 * 2**20


@pytest.mark.parametrize("prefix", ["../", "../../etc/", "/tmp/", "a/../../", "/"])
def test_entries_that_climb_out(tmp_path, canary, prefix):
    data, arrays = pickles.pickled({"cfg": Config(), "state_dict": {"W_enc": np.zeros((2, 3), np.float32)}})
    refused(pickles.archive(tmp_path / "in" / PAPER, data, arrays, prefix=prefix), "which torch.save never writes")
    more = [(f"{prefix}canary", b"here"), (str(canary), b"here")]
    refused(pickles.archive(tmp_path / "in" / PAPER, data, arrays, more=more))
    assert {path.name for path in tmp_path.iterdir()} == {"in"}


def test_a_key_that_climbs_out(tmp_path):
    """A storage's key is part of an entry's name and of no path."""
    (tmp_path / "secret").write_bytes(bytes(24))
    data, arrays = pickles.pickled({"encoder.weight": np.zeros((2, 3), np.float32), "encoder.bias": 1, "decoder.weight": 1})
    evil = data.replace(b"X\x01\x00\x00\x000", b"X\x0c\x00\x00\x00../../secret")
    assert evil != data
    refused(pickles.archive(tmp_path / "model_1.pt", evil, arrays))


def test_entries_that_are_encrypted(tmp_path):
    data, arrays = pickles.pickled({"cfg": Config(), "state_dict": {}})
    path = pickles.archive(tmp_path / PAPER, data, arrays)
    whole = bytearray(path.read_bytes())
    for bit in (0x01, 0x41):
        for magic, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
            whole[whole.index(magic) + at] = bit
        path.write_bytes(whole)
        refused(path, "damaged or cut short")


def test_names_without_end(tmp_path):
    """What a stranger put into a file does not fill the screen."""
    state = {f"{i}" + "x\\n" * 5000: np.zeros(1, np.float32) for i in range(30)}
    state |= written.random(W_enc=(6, 20), b_dec_out=(4,), W_dec=(20, 4))
    refused(pickles.save(tmp_path / PAPER, {"cfg": Config(is_transcoder=True), "state_dict": state}), "and 22 more are")
    refused(put(tmp_path / PAPER, b"\x80\x02c" + b"m" * 9000 + b"\nn\n."), "was not run")


def test_two_pickles(tmp_path):
    data, arrays = pickles.pickled({"cfg": Config(), "state_dict": {}})
    refused(pickles.archive(tmp_path / PAPER, data, arrays, more=[("other/data.pkl", data)]), "holds 2 data.pkl")


@pytest.mark.parametrize("name", [PAPER, "x.pkl", "x.pkl.gz"])
def test_files_that_are_cut_or_changed(tmp_path, name):
    """Every cut is refused; a changed byte is refused or stays a number, and never runs."""
    weights = written.random(W_enc=(6, 20), b_enc=(20,), W_dec=(20, 4), b_dec=(6,), b_dec_out=(4,))
    path = pickles.save(tmp_path / name, {"cfg": Config(is_transcoder=True), "state_dict": weights})
    load_dictionary(path)
    whole = path.read_bytes()
    for cut in np.linspace(0, len(whole) - 1, 25).astype(int):
        path.write_bytes(whole[:cut])
        refused(path)
    rng = np.random.default_rng(0)
    for _ in range(60):
        changed = bytearray(whole)
        changed[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        path.write_bytes(changed)
        try:
            load_dictionary(path)
        except UserError:
            continue
