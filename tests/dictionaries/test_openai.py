"""OpenAI's files against a forward pass written from their semantics, and what is refused."""

import numpy as np
import pytest

from dlmscope_jax.dictionaries import ReLU, TopK, load_dictionary
from dlmscope_jax.errors import UserError

from . import written
from .written import D, N, X

K = 4


def state(activation="TopK", tied=False, **more):
    """A state dict with everything that the released files hold."""
    w = written.random(pre_bias=(D,), encoder=(N, D), latent_bias=(N,), decoder=(D, N))
    out = {"pre_bias": w["pre_bias"], "latent_bias": w["latent_bias"], "encoder.weight": w["encoder"]}
    out |= {} if tied else {"decoder.weight": w["decoder"]}
    out |= {"stats_last_nonzero": np.zeros(N, np.int64), "latents_activation_frequency": np.zeros(N, np.float32)}
    out |= {"latents_mean_square": np.zeros(N, np.float32), "activation": activation}
    if activation == "TopK":
        out |= {"activation.k": np.array(K), "activation.postact_fn": "ReLU", "activation_state_dict": {"k": K, "postact_fn": "ReLU"}}
    else:
        out |= {"activation_state_dict": {}}
    return out | more


def forward(given):
    w = {name: np.asarray(value, np.float64) for name, value in given.items() if isinstance(value, np.ndarray)}
    x, mean, deviation = X.astype(np.float64), 0.0, 1.0
    if given["activation"] == "TopK":
        mean, deviation = x.mean(axis=1, keepdims=True), x.std(axis=1, ddof=1, keepdims=True)
        x = (x - mean) / (deviation + 1e-5)
    pre = (x - w["pre_bias"]) @ w["encoder.weight"].T + w["latent_bias"]
    if given["activation"] == "TopK":
        pre = written.largest(pre, K)
    if given.get("activation_state_dict", {}).get("postact_fn", "ReLU") == "ReLU":
        pre = np.maximum(pre, 0.0)
    decoder = w["decoder.weight"] if "decoder.weight" in w else w["encoder.weight"].T
    return pre, (pre @ decoder.T + w["pre_bias"]) * deviation + mean


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("activation", ["TopK", "ReLU"])
def test_forward(tmp_path, activation, tied):
    given = state(activation, tied)
    path = written.pt(tmp_path / "gpt2-small" / "resid_post_mlp_v5_32k" / "autoencoders" / "8.pt", given)
    loaded = load_dictionary(path)
    spec, _, meta = loaded
    assert type(spec) is (TopK if activation == "TopK" else ReLU)
    assert spec.row_norm == ("layer_norm" if activation == "TopK" else "none")
    assert (meta.model, meta.site, meta.layer) == ("gpt2", "resid_post@8", 8)
    assert meta.extra == {"format": "openai", "tied": tied}
    written.agree(loaded, *forward(given))
    written.survives(loaded, tmp_path / "ours", *forward(given))


def test_negative_activations_without_a_relu_after(tmp_path):
    given = state() | {"activation_state_dict": {"k": K, "postact_fn": "Identity"}}
    given["latent_bias"] -= 5.0
    loaded = load_dictionary(written.pt(tmp_path / "8.pt", given))
    activations, output = forward(given)
    assert (activations < 0).any()
    written.agree(loaded, activations, output)
    assert (loaded[2].site, loaded[2].layer) == ("unknown", -1)


def test_half_precision(tmp_path):
    given = state()
    for name in ("encoder.weight", "decoder.weight"):
        given[name] = given[name].astype(np.float16)
    written.agree(load_dictionary(written.pt(tmp_path / "8.pt", given)), *forward(given))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"activation": "JumpReLU"}, "activation 'JumpReLU'"),
        ({"activation_state_dict": {}}, "k None"),
        ({"activation_state_dict": {"k": 2.0}}, "k 2.0"),
        ({"activation_state_dict": {"k": N + 1}}, "more than the 20 latents"),
        ({"activation_state_dict": {"k": K, "postact_fn": "Tanh"}}, "'Tanh'"),
        ({"latent_bias": np.zeros(N + 1, np.float32)}, r"b_enc is \[21\], should be \[20\]"),
        ({"decoder.weight": np.zeros((N, D), np.float32)}, "W_dec is"),
        ({"extra": np.zeros(3, np.float32)}, "extra is unexpected"),
        ({"pre_bias": np.array([np.nan] * D, np.float32)}, "b_dec holds NaN|pre_bias holds NaN"),
        ({"pre_bias": np.zeros(D, np.int32)}, "should hold floating-point"),
    ],
)
def test_refused(tmp_path, change, says):
    with pytest.raises(UserError, match=says):
        load_dictionary(written.pt(tmp_path / "8.pt", state(**change)))


def test_what_torch_saves(tmp_path):
    torch = pytest.importorskip("torch")
    given = state()
    path = tmp_path / "8.pt"
    torch.save({name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for name, value in given.items()}, path)
    written.agree(load_dictionary(path), *forward(given))
