"""What is special in a family, beyond its equality with a twin: windows, caps, constant conditions, blocks, orders of rounding."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import random_network
from tiny import TINY

import dlmscope_jax.models
from dlmscope_jax.models import Transformer, load_model
from dlmscope_jax.models.head import final_modulation, sigma_condition

TOKENS = np.random.default_rng(11).integers(4, 96, (2, 11)).astype(np.int32)
SMALL = dict(rtol=0, atol=1e-5)


def model_of(family, dtype=jnp.float32, **changes):
    config, _ = TINY[family]
    return random_network(dataclasses.replace(config, **changes), dtype)


def run(model, params, *collect, tokens=TOKENS):
    out = jax.jit(lambda p, t: model.apply(p, t, collect=collect))(params, tokens)
    return np.asarray(out.logits), {name: np.asarray(layers[max(layers)]) for name, layers in out.taps.items()}


def moved(model, params, position):
    """Largest change of the logits at each position when the token at one position is another, [T]."""
    other = TOKENS.copy()
    other[:, position] = (other[:, position] + 1) % 90
    logits = jax.jit(lambda p, t: model.apply(p, t).logits)
    return np.abs(np.asarray(logits(params, TOKENS)) - np.asarray(logits(params, other))).max((0, 2))


@pytest.mark.some(4)
@pytest.mark.parametrize("family", ["sdar", "fast_dllm_qwen"])
@pytest.mark.parametrize(("position", "block"), [(0, 0), (3, 0), (4, 4), (7, 4), (10, 8)])
def test_a_token_is_heard_in_its_own_block_and_later_ones(family, position, block):
    change = moved(*model_of(family), position)
    assert (change[:block] == 0).all() and (change[block:] > 1e-4).all()


@pytest.mark.some(2)
@pytest.mark.parametrize("family", ["dream", "a2d-qwen3", "a2d-qwen2", "illada", "mdlm", "llada"])
def test_every_token_is_heard_everywhere(family):
    assert (moved(*model_of(family), 10) > 1e-4).all()


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_a_causal_token_is_heard_from_its_own_position_on(family):
    change = moved(*model_of(family), 6)
    assert (change[:6] == 0).all() and (change[6:] > 1e-4).all()


def test_gemma2_sees_the_last_keys_of_its_window_in_every_other_layer():
    model, params = model_of("gemma2")
    distance = np.arange(11)[:, None] - np.arange(11)[None, :]
    for layer, reach in [(0, 4), (1, 11), (2, 4)]:
        _, taps = run(model, params, f"attn_pattern@{layer}")
        seen = (taps["attn_pattern"] > 0).all((0, 1))
        np.testing.assert_array_equal(seen, (distance >= 0) & (distance < reach))


def test_gemma2_caps_scores_and_logits():
    model, params = model_of("gemma2", logit_softcap=2.0)
    wide, _ = model_of("gemma2", logit_softcap=None)
    logits, taps = run(model, params, "attn_pattern@1")
    raw, _ = run(wide, params)
    assert np.abs(raw).max() > 2 > np.abs(logits).max()
    np.testing.assert_allclose(logits, 2 * np.tanh(raw / 2), **SMALL)
    # scores between -2 and 2 cannot make weights that differ by more than e^4
    last = taps["attn_pattern"][:, :, -1]
    assert np.log(last.max(-1) / last.min(-1)).max() <= 4.0 + 1e-5
    free, _ = model_of("gemma2", attention_softcap=None)
    last = run(free, params, "attn_pattern@1")[1]["attn_pattern"][:, :, -1]
    assert np.log(last.max(-1) / last.min(-1)).max() > 4.0


def test_gemma2_adds_what_it_has_normed():
    model, params = model_of("gemma2")
    _, taps = run(model, params, *(f"{name}@1" for name in ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "mlp_raw")))
    np.testing.assert_allclose(taps["resid_mid"] - taps["resid_pre"], taps["attn_out"], **SMALL)
    np.testing.assert_allclose(taps["resid_post"] - taps["resid_mid"], taps["mlp_out"], **SMALL)
    raw, weight = taps["mlp_raw"], np.asarray(params["params"]["blocks"]["mlp_post_norm"][1])
    np.testing.assert_allclose(taps["mlp_out"], raw / np.sqrt((raw**2).mean(-1, keepdims=True) + 1e-5) * (1 + weight), **SMALL)


def test_qwen3_norms_queries_after_their_site():
    """``q`` is the projection's output; doubling the projection leaves the scores alone, and doubles the site and its scale."""
    model, params = model_of("qwen3")
    blocks = params["params"]["blocks"]
    doubled = {"params": params["params"] | {"blocks": blocks | {"q": 2 * blocks["q"]}}}
    once, twice = (run(model, p, "q@0", "q_norm_scale@0", "attn_pattern@0")[1] for p in (params, doubled))
    np.testing.assert_allclose(twice["q"], 2 * once["q"], **SMALL)
    np.testing.assert_allclose(twice["attn_pattern"], once["attn_pattern"], atol=2e-4)  # but for the epsilon
    np.testing.assert_allclose(once["q_norm_scale"], np.sqrt((once["q"] ** 2).mean(-1, keepdims=True) + 1e-5), **SMALL)
    assert once["q"].shape == (2, 11, 4, 16) and once["q_norm_scale"].shape == (2, 11, 4, 1)


def test_mdlm_folded_by_hand_is_a_plain_transformer():
    """Its condition is one constant: shifts and scales belong to the norms' affine parts, gates to the projections."""
    model, params = model_of("mdlm")
    plain = Transformer(dataclasses.replace(model.config, cond_dim=None, norm_bias=True))
    tree, blocks = params["params"], params["params"]["blocks"]
    condition = sigma_condition(tree)
    flat = jnp.einsum("c,lcd->ld", condition, blocks["adaln"], precision="highest") + blocks["adaln_bias"]
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = jnp.split(flat, 6, axis=1)
    folded = {name: blocks[name] for name in ("q", "k", "v", "up", "up_bias")} | {
        "attn_norm": blocks["attn_norm"] * (1 + scale_a), "attn_norm_bias": shift_a, "o": blocks["o"] * gate_a[:, None],
        "mlp_norm": blocks["mlp_norm"] * (1 + scale_m), "mlp_norm_bias": shift_m, "down": blocks["down"] * gate_m[:, None],
        "down_bias": blocks["down_bias"] * gate_m,
    }  # fmt: skip
    shift, scale = final_modulation(tree, model.config)
    last = {"final_norm": tree["final_norm"] * (1 + scale), "final_norm_bias": shift, "blocks": folded}
    logits, taps = run(model, params, "resid_post@1", "mlp_in@1", "mlp_out@1")
    again, same = run(plain, {"params": {name: tree[name] for name in ("embed", "head", "head_bias")} | last}, *(f"{n}@1" for n in taps))
    np.testing.assert_allclose(again, logits, rtol=0, atol=5e-5)
    for name in taps:
        np.testing.assert_allclose(same[name], taps[name], rtol=0, atol=5e-5, err_msg=name)
    assert min(float(jnp.abs(a).max()) for a in (shift_a, scale_a, gate_a, shift_m, scale_m, gate_m, shift, scale)) > 0.3


def test_mdlm_gates_what_it_adds():
    model, params = model_of("mdlm")
    _, taps = run(model, params, "attn_raw@1", "attn_out@1", "resid_pre@1", "resid_mid@1")
    gates = taps["attn_out"] / taps["attn_raw"]
    np.testing.assert_allclose(gates, np.broadcast_to(np.median(gates, (0, 1)), gates.shape), rtol=1e-2)
    np.testing.assert_allclose(taps["resid_mid"] - taps["resid_pre"], taps["attn_out"], **SMALL)


def test_gemma2_rounds_as_the_original_does_in_bfloat16(tmp_path):
    """The embedding's factor is rounded first, the norm last: bit for bit, and in another order other bits."""
    torch = pytest.importorskip("torch")
    import twins_gemma2

    twin = twins_gemma2.gemma2(tmp_path)
    model, params = load_model(tmp_path, dtype="bfloat16")
    _, theirs = twin.run(twin.module.to(torch.bfloat16), TOKENS)
    ours = model.apply(params, TOKENS, logits=False, collect=("resid_pre@0", "attn_in@0")).taps
    for name in ("resid_pre", "attn_in"):
        np.testing.assert_array_equal(np.asarray(ours[name][0].astype(jnp.float32)), theirs[name, 0], err_msg=name)
    wide = np.asarray(params["params"]["embed"].astype(jnp.float32))[TOKENS]
    assert (np.asarray((wide * np.float32(32**0.5)).astype(jnp.bfloat16)).astype(np.float32) != theirs["resid_pre", 0]).any()


def test_mdlm_in_float32_is_nearest_to_what_its_code_computes(tmp_path):
    """The released code runs products in bfloat16 and keeps the stream in float32, where our bfloat16 rounds the stream too."""
    torch = pytest.importorskip("torch")
    import twins_mdlm

    twin = twins_mdlm.mdlm(tmp_path)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs, _ = twin.run(twin.module, TOKENS)
    model, params = load_model(tmp_path)
    far, near = (
        np.linalg.norm(np.asarray(m.apply(p, TOKENS).logits.astype(jnp.float32)) - theirs)
        for m, p in (load_model(tmp_path, dtype="bfloat16"), (model, params))
    )
    assert near < 0.02 * np.linalg.norm(theirs) and near < far


def test_the_readme_says_what_each_file_is_for():
    folder = Path(dlmscope_jax.models.__file__).parent
    rows = [line for line in (folder / "README.md").read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    missing = [path.name for path in folder.glob("*.py") if path.name != "__init__.py" and f"`{path.name}`" not in "".join(rows)]
    assert missing == []
