"""Qwen-Scope's files against a forward pass written from their semantics; k and width stand in the folder's name."""

import numpy as np
import pytest

from dlmscope_jax.dictionaries import TopK, load_dictionary
from dlmscope_jax.errors import UserError

from . import written
from .written import D, X

N, K = 1024, 50
FOLDER = f"SAE-Res-Qwen3-8B-Base-W1K-L0_{K}"


def state(width=N):
    w = written.random(W_enc=(width, D), b_enc=(width,), W_dec=(D, width), b_dec=(D,))
    return w | {"b_enc": w["b_enc"] - 12.0}  # so that some of the k are negative


def forward(given):
    w = written.float64(given)
    f = written.largest(X.astype(np.float64) @ w["W_enc"].T + w["b_enc"], K)
    return f, f @ w["W_dec"].T + w["b_dec"]


def test_forward(tmp_path):
    given = state()
    path = written.pt(tmp_path / "models--Qwen" / FOLDER / "layer30.sae.pt", given)
    for at in (path, path.parent):
        loaded = load_dictionary(at)
        assert loaded[0] == TopK(D, N, K, rule="raw", subtract=False)
        assert (loaded[2].model, loaded[2].site, loaded[2].layer) == ("Qwen/Qwen3-8B-Base", "resid_post@30", 30)
    activations, output = forward(given)
    assert (activations < 0).any() and ((activations != 0).sum(axis=1) == K).all()
    written.agree(loaded, activations, output)
    written.survives(loaded, tmp_path / "ours", activations, output)
    written.pt(path.parent / "layer4.sae.pt", given)
    with pytest.raises(UserError, match="holds 2 dictionaries; give one of its files: layer4.sae.pt, layer30.sae.pt"):
        load_dictionary(path.parent)


def test_refused(tmp_path):
    with pytest.raises(UserError, match="does not say what k is; keep it in its folder"):
        load_dictionary(written.pt(tmp_path / "layer3.sae.pt", state()))
    with pytest.raises(UserError, match="has 900 latents, but its folder .* names 1024"):
        load_dictionary(written.pt(tmp_path / FOLDER / "layer3.sae.pt", state(900)))
