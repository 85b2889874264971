"""Gemma Scope 1 and 2 against a forward pass written from their semantics, and what is refused."""

import io
import json
import zipfile

import numpy as np
import pytest
import safetensors.numpy

from dlmscope_jax.dictionaries import JumpReLU, load_dictionary
from dlmscope_jax.errors import UserError

from . import written
from .written import D, N, X

OUT = 4
ONE = {"W_enc": "W_enc", "W_dec": "W_dec"}


def weights(out=D, skip=False):
    found = written.random(W_enc=(D, N), W_dec=(N, out), b_enc=(N,), b_dec=(out,), threshold=(N,))
    found["threshold"] = np.abs(found["threshold"])
    return found | (written.random(1, W_skip=(D, out)) if skip else {})


def forward(w, x=X, scale=1.0):
    """``scale``: what rows were divided by before they were read, and multiplied by after."""
    w, x = written.float64(w), x.astype(np.float64) / scale
    pre = x @ w["W_enc"] + w["b_enc"]
    f = np.where(pre > w["threshold"], np.maximum(pre, 0.0), 0.0)
    return f, scale * (f @ w["W_dec"] + w["b_dec"] + (x @ w["W_skip"] if "W_skip" in w else 0.0))


def first(folder, w, **options):
    folder.mkdir(parents=True)
    (np.savez_compressed if options.get("compressed") else np.savez)(folder / "params.npz", **w)
    return folder


def second(folder, w, hook="model.layers.9.output", out=None, **more):
    folder.mkdir(parents=True)
    names = {"W_enc": "w_enc", "W_dec": "w_dec", "W_skip": "affine_skip_connection"}
    safetensors.numpy.save_file({names.get(name, name): array for name, array in w.items()}, str(folder / "params.safetensors"))
    config = {"architecture": "jump_relu", "hf_hook_point_in": hook, "hf_hook_point_out": out or hook, "width": N, "l0": 7}
    config |= {"model_name": "google/gemma-3-1b-pt", "affine_connection": "W_skip" in w, "type": "sae" if out is None else "transcoder"}
    (folder / "config.json").write_text(json.dumps(config | more))
    return folder


@pytest.mark.parametrize("compressed", [False, True], ids=["stored", "deflated"])
@pytest.mark.parametrize(
    ("release", "site", "model"),
    [
        ("gemma-scope-2b-pt-res", "resid_post@20", "google/gemma-2-2b"),
        ("models--google--gemma-scope-9b-it-mlp/snapshots/0123", "mlp_out@20", "google/gemma-2-9b-it"),
        ("gemma-scope-27b-pt-att", "z@20", "google/gemma-2-27b"),
    ],
)
def test_first_version(tmp_path, release, site, model, compressed):
    w = weights()
    loaded = load_dictionary(first(tmp_path / release / "layer_20" / "width_16k" / "average_l0_71", w, compressed=compressed))
    spec, _, meta = loaded
    assert spec == JumpReLU(D, N, subtract=False)
    assert (meta.model, meta.site, meta.layer) == (model, site, 20)
    written.agree(loaded, *forward(w))
    written.survives(loaded, tmp_path / "ours", *forward(w))


def test_first_version_transcoder(tmp_path):
    w = weights(OUT)
    loaded = load_dictionary(first(tmp_path / "gemma-scope-2b-pt-transcoders" / "layer_3" / "width_16k" / "average_l0_20", w))
    spec, _, meta = loaded
    assert spec == JumpReLU(D, N, d_out=OUT, subtract=False)
    assert (meta.site, meta.extra["target"], meta.weight_processing) == ("mlp_in@3", "mlp_out@3", "folded")
    written.agree(loaded, *forward(w))
    written.survives(loaded, tmp_path / "ours", *forward(w))


def test_first_version_of_embeddings(tmp_path):
    """Trained on the bare table; Gemma multiplies it by sqrt(d), and so is the first block's input."""
    w = weights()
    loaded = load_dictionary(first(tmp_path / "gemma-scope-2b-pt-res" / "embedding" / "width_4k" / "average_l0_21", w))
    assert (loaded[2].site, loaded[2].layer) == ("resid_pre@0", 0)
    activations, output = forward(w, scale=D**0.5)
    written.agree(loaded, activations, output)


def test_fortran_order(tmp_path):
    w = weights()
    w["W_enc"] = np.asfortranarray(w["W_enc"])
    loaded = load_dictionary(first(tmp_path / "gemma-scope-2b-pt-res" / "layer_0" / "a", w))
    written.agree(loaded, *forward(w))


@pytest.mark.parametrize(
    ("hook", "site"),
    [
        ("model.layers.9.output", "resid_post@9"),
        ("model.language_model.layers.9.output", "resid_post@9"),
        ("model.layers.9.post_feedforward_layernorm.output", "mlp_out@9"),
        ("model.layers.9.self_attn.o_proj.input", "z@9"),
    ],
)
def test_second_version(tmp_path, hook, site):
    w = weights()
    loaded = load_dictionary(second(tmp_path / "layer_9_width_16k_l0_small", w, hook))
    assert loaded[0] == JumpReLU(D, N, subtract=False)
    assert (loaded[2].model, loaded[2].site, loaded[2].layer) == ("google/gemma-3-1b-pt", site, 9)
    written.agree(loaded, *forward(w))
    written.survives(loaded, tmp_path / "ours", *forward(w))


@pytest.mark.parametrize("skip", [False, True], ids=["plain", "affine"])
@pytest.mark.parametrize("out", [D, OUT])
def test_second_version_transcoder(tmp_path, skip, out):
    """The skip connection is (d_in, d_out): x @ A, also where it is square and nothing would notice."""
    w = weights(out, skip)
    names = [f"model.layers.5.{which}_feedforward_layernorm.output" for which in ("pre", "post")]
    loaded = load_dictionary(second(tmp_path / "layer_5", w, *names))
    assert loaded[0] == JumpReLU(D, N, d_out=out, skip=skip, subtract=False)
    assert (loaded[2].site, loaded[2].extra["target"], loaded[2].weight_processing) == ("mlp_in@5", "mlp_out@5", "raw")
    written.agree(loaded, *forward(w))
    written.survives(loaded, tmp_path / "ours", *forward(w))
    if out == D:
        folded = written.survives(loaded, tmp_path / "set", *forward(w), format="circuit_tracer")
        assert folded[2].site == "mlp_in@5"


def test_a_path_that_does_not_say_what_the_file_is(tmp_path):
    with pytest.raises(UserError, match="keep the release's folders"):
        load_dictionary(first(tmp_path / "layer_20", weights()))
    with pytest.raises(UserError, match="keep the release's folders"):
        load_dictionary(first(tmp_path / "gemma-scope-2b-pt-res" / "width_16k", weights()))


def test_cross_layer_transcoders_are_refused(tmp_path):
    w = weights()
    with pytest.raises(UserError, match="cross-layer transcoders and crosscoders are not read"):
        load_dictionary(second(tmp_path / "a", w, type="clt"))
    with pytest.raises(UserError, match="cross-layer transcoders and crosscoders are not read"):
        load_dictionary(second(tmp_path / "b", w, hf_hook_point_in=["model.layers.0.output", "model.layers.1.output"]))
    w["W_dec"] = np.zeros((N, 3, D), np.float32)
    with pytest.raises(UserError, match="cross-layer transcoders and crosscoders are not read"):
        load_dictionary(second(tmp_path / "c", w))


def test_contradictions(tmp_path):
    with pytest.raises(UserError, match="architecture 'topk' is not read"):
        load_dictionary(second(tmp_path / "a", weights(), architecture="topk"))
    with pytest.raises(UserError, match="width is 21, but params.safetensors has 20"):
        load_dictionary(second(tmp_path / "b", weights(), width=21))
    w = weights()
    del w["threshold"]
    with pytest.raises(UserError, match="threshold is missing"):
        load_dictionary(second(tmp_path / "c", w))
    w = weights()
    w["threshold"][3] = np.nan  # a comparison with NaN is false, so the latent would be silently dead
    with pytest.raises(UserError, match="threshold holds NaN"):
        load_dictionary(second(tmp_path / "d", w))


# --- the .npz reader believes nothing


def archive(folder, entries, compression=zipfile.ZIP_STORED):
    folder = folder / "gemma-scope-2b-pt-res" / "layer_0"
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / "params.npz", "w", compression) as file:
        for name, data in entries.items():
            file.writestr(name, data)
    return folder


def npy(array, **options):
    out = io.BytesIO()
    np.lib.format.write_array(out, array, **options)
    return out.getvalue()


def header(shape, descr="<f4", version=b"\x01\x00"):
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * (64 - (10 + len(text) + 1) % 64) + b"\n"
    return b"\x93NUMPY" + version + len(text).to_bytes(2, "little") + text


class _Runs:
    def __init__(self, call):
        self.call = call

    def __reduce__(self):
        return self.call


def test_arrays_of_objects_are_refused_and_nothing_runs(tmp_path):
    mark = tmp_path / "ran"
    evil = np.array([_Runs((open, (str(mark), "w")))], dtype=object)
    entries = {f"{name}.npy": npy(array) for name, array in weights().items()}
    with pytest.raises(UserError, match="holds Python objects"):
        load_dictionary(archive(tmp_path, entries | {"W_enc.npy": npy(evil, allow_pickle=True)}))
    assert not mark.exists()


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        (header("(1099511627776, 1099511627776)"), r"should hold \[1099511627776"),
        (header("(-1, 4)") + bytes(16), "impossible shape"),
        (header("(2, 4)") + bytes(16), "has 16 bytes"),
        (header("(True, 4)") + bytes(16), "impossible shape"),
        (header("(2, 2)", "<U4") + bytes(64), "holds <U4"),
        (header("(2, 2)", [("a", "<f4")]) + bytes(16), "holds"),
        (header("(2, 2)", version=b"\x09\x00") + bytes(16), "not an array of NumPy"),
        (header("__import__('os').system('true')") + bytes(16), "not an array of NumPy"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\xff{", "not an array of NumPy"),
        (b"", "not an array of NumPy"),
        (b"hello", "not an array of NumPy"),
    ],
)
def test_entries_that_are_no_arrays(tmp_path, entry, says):
    with pytest.raises(UserError, match=says):
        load_dictionary(archive(tmp_path, {"W_enc.npy": entry}))


def test_a_bomb_is_refused(tmp_path):
    data = header(f"({40 * 2**20},)", "|u1") + bytes(40 * 2**20)
    folder = archive(tmp_path, {"W_enc.npy": data}, zipfile.ZIP_DEFLATED)
    assert (folder / "params.npz").stat().st_size < 2**17
    with pytest.raises(UserError, match="which weights never do"):
        load_dictionary(folder)


def test_damaged_and_strange_archives(tmp_path):
    folder = first(tmp_path / "gemma-scope-2b-pt-res" / "layer_0", weights())
    whole = (folder / "params.npz").read_bytes()
    for cut in (0, 3, 40, len(whole) // 2, len(whole) - 1):
        (folder / "params.npz").write_bytes(whole[:cut])
        with pytest.raises(UserError):
            load_dictionary(folder)
    at = whole.index(weights()["b_dec"].tobytes())
    (folder / "params.npz").write_bytes(whole[:at] + b"\x01\x02" + whole[at + 2 :])
    with pytest.raises(UserError, match="Bad CRC-32"):
        load_dictionary(folder)
    entries = {f"{name}.npy": npy(array) for name, array in weights().items()}
    with pytest.raises(UserError, match="is unexpected"):
        load_dictionary(archive(tmp_path / "b", entries | {"../../W_enc.npy": npy(np.zeros(3, np.float32))}))
