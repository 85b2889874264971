"""Goodfire's files against a forward pass written from their semantics."""

import numpy as np
import pytest

from dlmscope_jax.dictionaries import ReLU, load_dictionary
from dlmscope_jax.errors import UserError

from . import written
from .written import D, N, X

LLAMA, DEEPSEEK = "Llama-3.1-8B-Instruct-SAE-l19.pth", "DeepSeek-R1-SAE-l37.pt"


def state(linear="_linear"):
    w = written.random(e=(N, D), be=(N,), d=(D, N), bd=(D,))
    names = (f"encoder{linear}.weight", f"encoder{linear}.bias", f"decoder{linear}.weight", f"decoder{linear}.bias")
    return dict(zip(names, w.values(), strict=True))


def forward(given):
    """Nothing is subtracted."""
    e, be, d, bd = (array.astype(np.float64) for array in given.values())
    f = np.maximum(X.astype(np.float64) @ e.T + be, 0.0)
    return f, f @ d.T + bd


@pytest.mark.parametrize(
    ("name", "linear", "model", "site"),
    [
        (LLAMA, "_linear", "meta-llama/Llama-3.1-8B-Instruct", "resid_post@19"),
        (DEEPSEEK, "", "deepseek-ai/DeepSeek-R1", "resid_post@37"),
        ("mine.pt", "_linear", "unknown", "unknown"),
    ],
)
def test_forward(tmp_path, name, linear, model, site):
    given = state(linear)
    loaded = load_dictionary(written.pt(tmp_path / name, given))
    assert loaded[0] == ReLU(D, N, subtract=False)
    assert (loaded[2].model, loaded[2].site) == (model, site)
    written.agree(loaded, *forward(given))
    written.survives(loaded, tmp_path / "ours", *forward(given))


def test_refused(tmp_path):
    given = state()
    del given["decoder_linear.bias"]
    with pytest.raises(UserError, match="b_dec is missing"):
        load_dictionary(written.pt(tmp_path / LLAMA, given))
