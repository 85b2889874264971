"""Files of the transcoder paper's code against a forward pass written from its semantics, and what is refused."""

import gzip
import pickle
import sys
import types

import numpy as np
import pytest

from dlmscope_jax.dictionaries import ReLU, load_dictionary
from dlmscope_jax.errors import UserError

from . import pickles, written
from .pickles import Config, Raw
from .written import D, N, X

OUT = 4
NAME = "final_sparse_autoencoder_gpt2-small_blocks.8.ln2.hook_normalized_24576"
ENDINGS = [".pt", ".pkl", ".pkl.gz"]


def weights(out=OUT):
    w = written.random(W_enc=(D, N), b_enc=(N,), W_dec=(N, out or D), b_dec=(D,))
    return w | (written.random(1, b_dec_out=(out,)) if out else {})


def config(out=OUT, **more):
    plain = {"model_name": "gpt2-small", "hook_point": "blocks.8.ln2.hook_normalized", "hook_point_layer": 8, "d_in": D, "d_sae": N}
    plain |= {"is_transcoder": out is not None, "out_hook_point": "blocks.8.hook_mlp_out", "d_out": out, "out_hook_point_layer": 8}
    plain |= {"l1_coefficient": 1.4e-4, "lr": 4e-4, "seed": 42, "use_ghost_grads": True, "dead_feature_window": 5000}
    plain |= {"dtype": Raw(b"ctorch\nfloat32\n"), "device": Raw(b"ctorch\ndevice\nX\x04\x00\x00\x00cuda\x85R"), "b_dec_init_method": "mean"}
    return Config(plain | more)


def forward(w):
    w, x = written.float64(w), X.astype(np.float64)
    f = np.maximum((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"], 0.0)
    return f, f @ w["W_dec"] + w.get("b_dec_out", w["b_dec"])


@pytest.mark.parametrize("ending", ENDINGS)
def test_transcoder(tmp_path, ending):
    w = weights()
    path = pickles.save(tmp_path / f"{NAME}{ending}", {"cfg": config(), "state_dict": w})
    loaded = load_dictionary(path)
    spec, params, meta = loaded
    assert spec == ReLU(D, N, d_out=OUT, input_bias=True, error="over_norm")
    np.testing.assert_array_equal(params["b_in"], w["b_dec"])
    np.testing.assert_array_equal(params["b_dec"], w["b_dec_out"])
    assert (meta.model, meta.site, meta.layer, meta.seed, meta.weight_processing) == ("gpt2-small", "mlp_in@8", 8, 42, "folded")
    kept = {"l1_coefficient": 1.4e-4, "lr": 4e-4, "use_ghost_grads": True, "dead_feature_window": 5000}
    assert meta.extra == {"format": "transcoder_paper", "target": "mlp_out@8"} | kept
    written.agree(loaded, *forward(w))
    written.survives(loaded, tmp_path / "ours", *forward(w))


def test_into_a_set_of_circuit_tracer(tmp_path):
    """The published transcoders as circuit-tracer reads them: the norm's output without its gain, no bias subtracted."""
    w = weights(D)
    loaded = load_dictionary(pickles.save(tmp_path / f"{NAME}.pt", {"cfg": config(D), "state_dict": w}))
    again = written.survives(loaded, tmp_path / "set", *forward(w), format="circuit_tracer")
    assert again[0] == ReLU(D, N, d_out=D)
    assert (again[2].site, again[2].weight_processing) == ("mlp_in@8", "folded")
    assert "feature_input_hook: ln2.hook_normalized" in (tmp_path / "set" / "config.yaml").read_text()


@pytest.mark.parametrize("ending", ENDINGS)
def test_autoencoder(tmp_path, ending):
    w, cfg = weights(None), config(None, hook_point="blocks.8.hook_resid_pre")
    loaded = load_dictionary(pickles.save(tmp_path / f"{NAME}{ending}", {"cfg": cfg, "state_dict": w}))
    assert loaded[0] == ReLU(D, N, error="over_norm") and loaded[2].site == "resid_pre@8" and "target" not in loaded[2].extra
    written.agree(loaded, *forward(w))
    written.survives(loaded, tmp_path / "ours", *forward(w))


@pytest.mark.parametrize("ending", [".pt", ".pkl.gz"])
def test_frequencies_beside(tmp_path, ending):
    frequencies = np.linspace(-10, -1, N).astype(np.float32)
    path = pickles.save(tmp_path / f"{NAME}{ending}", {"cfg": config(), "state_dict": weights()})
    beside = pickles.save(tmp_path / f"{NAME}_log_feature_sparsity{ending}", frequencies)
    for at in (path, tmp_path):  # the file, or the folder with the two
        np.testing.assert_allclose(load_dictionary(at)[2].extra["log_feature_sparsity"], frequencies, atol=1e-4)
    pickles.save(beside, frequencies[:5])
    with pytest.raises(UserError, match="should hold 20 frequencies"):
        load_dictionary(path)
    pickles.save(beside, np.full(N, -np.inf, np.float32))
    with pytest.raises(UserError, match="not finite"):
        load_dictionary(path)


def test_a_folder_of_several(tmp_path):
    for layer in (2, 10):
        pickles.save(tmp_path / f"{NAME.replace('8', str(layer), 1)}.pt", {"cfg": config(), "state_dict": weights()})
    with pytest.raises(UserError, match=r"holds 2 dictionaries; give one of its files: final_.*blocks.2.*, final_.*blocks.10"):
        load_dictionary(tmp_path)


@pytest.mark.parametrize(
    ("cfg", "change", "says"),
    [
        (config(is_transcoder=False), {}, "b_dec_out is there"),
        (config(), {"b_dec_out": None}, "b_dec_out is missing"),
        (config(), {"b_enc": None}, "b_enc is missing"),
        (config(), {"W_extra": np.zeros(3, np.float32)}, "W_extra is unexpected"),
        (config(d_sae=24576), {}, "d_sae is 24576 in its configuration, the weights have 20"),
        (config(d_out=768), {}, "d_out is 768"),
        ({"is_transcoder": True}, {}, "no configuration beside the weights"),
        (config(), {"b_enc": np.full(N, np.nan, np.float32)}, "b_enc holds NaN"),
        (config(), {"b_enc": np.zeros(N, np.int64)}, "should hold floating-point"),
        (config(), {"b_dec": np.zeros(D + 1, np.float32)}, r"b_in is \[7\], should be \[6\]"),
    ],
)
def test_contradictions(tmp_path, cfg, change, says):
    w = {name: value for name, value in (weights() | change).items() if value is not None}
    with pytest.raises(UserError, match=says):
        load_dictionary(pickles.save(tmp_path / f"{NAME}.pt", {"cfg": cfg, "state_dict": w}))


@pytest.fixture
def config_class(monkeypatch):
    """A class as the paper's code has it, importable under its name so that it can be pickled."""
    module, name = pickles.CONFIG
    package, inner = types.ModuleType("sae_training"), types.ModuleType(module)
    cls = type(name, (), {"__module__": module})
    setattr(inner, name, cls)
    monkeypatch.setitem(sys.modules, "sae_training", package)
    monkeypatch.setitem(sys.modules, module, inner)
    return cls


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_torch_and_pickle_write(tmp_path, config_class, ending, dtype):
    torch = pytest.importorskip("torch")
    cfg = config_class()
    vars(cfg).update({name: value for name, value in config().items() if not isinstance(value, Raw)})
    cfg.dtype, cfg.device = torch.float32, torch.device("cuda")
    w = {name: array.astype(dtype) for name, array in weights().items()}
    # as its save_model has it: tensors of a state dict, one of them a transposed view
    state = torch.nn.ParameterDict({name: torch.nn.Parameter(torch.from_numpy(array)) for name, array in w.items()}).state_dict()
    state["W_enc"] = torch.from_numpy(np.ascontiguousarray(w["W_enc"].T)).T
    path = tmp_path / f"{NAME}{ending}"
    contents = {"cfg": cfg, "state_dict": state}
    if ending == ".pt":
        torch.save(contents, path)
    else:
        with gzip.open(path, "wb") if ending.endswith(".gz") else open(path, "wb") as file:
            pickle.dump(contents, file)
    loaded = load_dictionary(path)
    written.agree(loaded, *forward(w))
    assert loaded[2].extra["target"] == "mlp_out@8"
