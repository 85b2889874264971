"""The binary autoencoder's files against a forward pass written from the released code's semantics."""

import numpy as np
import pytest

from dlmscope_jax.dictionaries import Binary, load_dictionary
from dlmscope_jax.errors import UserError

from . import written
from .written import D, N, X

NAME = "model_20251207_101112_123456.pt"


def state(bias=True):
    w = written.random(W_in=(N, D), b_in=(N,), W_out=(D, N), b=(D,))
    w["W_in"][0], w["b_in"][0] = 0.0, 0.0  # a pre-activation of exactly 0 gives the bit 0
    out = {"encoder.weight": w["W_in"], "encoder.bias": w["b_in"], "decoder.weight": w["W_out"]}
    return out | ({"decoder.bias": w["b"]} if bias else {})


def forward(given):
    w = written.float64(given)
    bits = ((X.astype(np.float64) @ w["encoder.weight"].T + w["encoder.bias"]) > 0).astype(np.float64)
    return bits, bits @ w["decoder.weight"].T + w.get("decoder.bias", 0.0)


@pytest.mark.parametrize("bias", [True, False])
def test_forward(tmp_path, bias):
    given = state(bias)
    folder = tmp_path / "report_20251207_101112_123456"
    path = written.pt(folder / NAME, given)
    (folder / "experiment_params.txt").write_text("bias: True")
    (folder / "log_20251207_101112_123456.pkl").write_bytes(b"not read")
    for at in (path, folder):
        loaded = load_dictionary(at)
        assert loaded[0] == Binary(D, N)
        assert (loaded[2].model, loaded[2].site, loaded[2].layer, loaded[2].extra) == ("unknown", "unknown", -1, {"format": "binary"})
        written.agree(loaded, *forward(given))
    assert (np.asarray(forward(given)[0])[:, 0] == 0).all()
    written.survives(loaded, tmp_path / "ours", *forward(given))


def test_another_name_is_ambiguous(tmp_path):
    with pytest.raises(UserError, match="two linear layers can be many kinds of dictionary"):
        load_dictionary(written.pt(tmp_path / "sae.pt", state()))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"encoder.bias": np.zeros(N + 1, np.float32)}, r"b_enc is \[21\]"),
        ({"decoder.weight": np.zeros((N, D), np.float32)}, "W_dec is"),
        ({"encoder.weight": np.zeros(N, np.float32)}, "encoder.weight is missing or is not a matrix"),
        ({"encoder.weight": np.full((N, D), np.nan, np.float32)}, "holds NaN"),
        ({"encoder.weight": 3.0}, "encoder.weight is missing or is not a matrix"),
        ({"encoder.weight": "text"}, "is not a tensor"),
        ({"third": np.zeros(N, np.float32)}, "not a dictionary format"),
    ],
)
def test_refused(tmp_path, change, says):
    with pytest.raises(UserError, match=says):
        load_dictionary(written.pt(tmp_path / NAME, state() | change))


def test_what_torch_saves(tmp_path):
    torch = pytest.importorskip("torch")
    given = state()
    model = torch.nn.ModuleDict({"encoder": torch.nn.Linear(D, N), "decoder": torch.nn.Linear(N, D)})
    model.load_state_dict({name: torch.from_numpy(array) for name, array in given.items()})
    torch.save(model.state_dict(), tmp_path / NAME)
    written.agree(load_dictionary(tmp_path / NAME), *forward(given))
