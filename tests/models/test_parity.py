"""Logits and sites equal those of independent torch implementations, read from the folders that those wrote.

Dream is checked against Qwen2, LLaDA against Llama under LLaDA's tensor names, both with every key visible.
"""

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dlmscope_jax.models import load_model
from dlmscope_jax.models.families import family_of

TOLERANCE = 5e-5  # float32; torch itself is about 1.2e-5 from a float64 reference


@pytest.fixture
def case(family, tmp_path, tokens, torch_twin):
    twin, additive = torch_twin(family, tmp_path)
    return load_model(tmp_path), twin, additive, np.asarray(tokens)


def run_twin(twin, additive, tokens, keep=None):
    """The twin's logits and the activations at our sites, by forward hooks."""
    seen = {}
    base = twin.model
    for i, layer in enumerate(base.layers):
        first = lambda out: out[0] if isinstance(out, tuple) else out  # noqa: E731
        layer.input_layernorm.register_forward_pre_hook(lambda m, a, i=i: seen.__setitem__(("resid_pre", i), a[0]))
        layer.register_forward_hook(lambda m, a, out, i=i, f=first: seen.__setitem__(("resid_post", i), f(out)))
        layer.self_attn.register_forward_hook(lambda m, a, out, i=i, f=first: seen.__setitem__(("attn_out", i), f(out)))
        layer.post_attention_layernorm.register_forward_hook(
            lambda m, a, out, i=i: (seen.__setitem__(("resid_mid", i), a[0]), seen.__setitem__(("mlp_in", i), out))[0]
        )
        layer.mlp.down_proj.register_forward_hook(lambda m, a, out, i=i: seen.__setitem__(("mlp_act", i), a[0]))
        layer.mlp.register_forward_hook(lambda m, a, out, i=i: seen.__setitem__(("mlp_out", i), out))
    base.norm.register_forward_hook(lambda m, a, out: seen.__setitem__(("final_norm", len(base.layers)), out))
    batch, length = tokens.shape
    mask = None
    if additive:
        mask = torch.zeros(batch, 1, length, length, dtype=next(twin.parameters()).dtype)
        if keep is not None:
            mask = mask.masked_fill(~torch.tensor(keep)[:, None, None, :], torch.finfo(torch.float32).min)
    elif keep is not None:
        mask = torch.tensor(keep).long()
    with torch.no_grad():
        logits = twin(torch.tensor(tokens).long(), attention_mask=mask, use_cache=False).logits
    return logits.numpy(), {k: v.numpy() for k, v in seen.items()}


def test_logits_and_every_site(case):
    (model, params), twin, additive, tokens = case
    exact, _ = run_twin(copy.deepcopy(twin).double(), additive, tokens)
    logits, seen = run_twin(twin, additive, tokens)
    collect = tuple(f"{name}@{layer}" for name, layer in seen if name != "final_norm") + ("final_norm",)
    out = jax.jit(lambda p, t: model.apply(p, t, collect=collect))(params, jnp.asarray(tokens))
    np.testing.assert_allclose(out.logits, logits, atol=TOLERANCE)
    assert np.abs(out.logits - exact).max() <= 2 * np.abs(logits - exact).max()
    for (name, layer), value in seen.items():
        np.testing.assert_allclose(out.taps[name][layer], value, atol=TOLERANCE, err_msg=f"{name}@{layer}")


def test_gradients_of_all_parameters(case, family):
    """The hand-written rules of the linear maps and the rematerialised attention, against torch's autograd."""
    (model, params), twin, additive, tokens = case
    batch, length = tokens.shape
    mask = torch.zeros(batch, 1, length, length) if additive else None
    torch.logsumexp(twin(torch.tensor(tokens).long(), attention_mask=mask, use_cache=False).logits, -1).mean().backward()
    wanted = {name: p.grad.numpy() for name, p in twin.named_parameters()}
    loss = lambda p: jax.nn.logsumexp(model.apply(p, jnp.asarray(tokens)).logits, axis=-1).mean()  # noqa: E731
    grads = jax.jit(jax.grad(loss))(params)["params"]
    llama = family_of("llama" if family == "llada" else family, "").tensors(model.config)
    for path, tensor in llama.items():
        ours = grads[path[0]] if len(path) == 1 else grads[path[0]][path[1]]
        for i in range(3 if path[0] == "blocks" else 1):
            ours_i = np.asarray(ours[i] if path[0] == "blocks" else ours)
            theirs = wanted[tensor.name.format(layer=i)]
            np.testing.assert_allclose(ours_i.T if tensor.transposed else ours_i, theirs, atol=TOLERANCE, err_msg=tensor.name)


def test_padding_is_not_attended_to(case):
    (model, params), twin, additive, tokens = case
    keep = np.ones(tokens.shape, bool)
    keep[0, :3] = False
    logits, _ = run_twin(twin, additive, tokens, keep)
    ours = model.apply(params, jnp.asarray(tokens), attention_mask=jnp.asarray(keep)).logits
    np.testing.assert_allclose(np.asarray(ours)[keep], logits[keep], atol=TOLERANCE)


def test_bfloat16_agrees_within_its_rounding(case, tmp_path):
    (_, params), twin, additive, tokens = case
    logits, _ = run_twin(twin.to(torch.bfloat16).float(), additive, tokens)
    model, params = load_model(tmp_path, dtype="bfloat16")
    ours = np.asarray(model.apply(params, jnp.asarray(tokens)).logits.astype(jnp.float32))
    assert np.linalg.norm(ours - logits) / np.linalg.norm(logits) < 2e-2


def test_hub_and_transformers_spelling_read_alike(family, tmp_path, torch_twin):
    if family == "llada":
        pytest.skip("transformers does not write LLaDA")
    torch_twin(family, tmp_path)
    nested = json.loads((tmp_path / "config.json").read_text())
    model, _ = load_model(tmp_path)
    flat = {k: v for k, v in nested.items() if k not in ("rope_parameters", "dtype")}
    flat |= {"rope_theta": nested["rope_parameters"]["rope_theta"], "torch_dtype": "float32", "rope_scaling": None}
    (tmp_path / "config.json").write_text(json.dumps(flat))
    assert load_model(tmp_path)[0].config == model.config


def test_llama3_rope_scaling(tmp_path, tokens, torch_twin):
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    twin, additive = torch_twin("llama", tmp_path, rope_parameters={"rope_type": "llama3", "rope_theta": 500.0} | scaling)
    logits, _ = run_twin(twin, additive, np.asarray(tokens))
    model, params = load_model(tmp_path)
    np.testing.assert_allclose(model.apply(params, tokens).logits, logits, atol=TOLERANCE)


def test_sharded_files(tmp_path, torch_twin):
    twin, _ = torch_twin("qwen2", tmp_path / "one")
    twin.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one, many = load_model(tmp_path / "one"), load_model(tmp_path / "many")
    jax.tree.map(np.testing.assert_array_equal, one[1], many[1])


def test_llada_rotates_in_float32_under_bfloat16():
    """One rounding, after the rotation (LLaDA), against rounding of tables and products (Dream): written out in numpy."""
    import ml_dtypes

    from dlmscope_jax.models.layers import rotate

    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 5, 2, 8)).astype(ml_dtypes.bfloat16)
    angle = rng.normal(size=(1, 5, 8)).astype(np.float32)
    angle[..., 4:] = angle[..., :4]
    cos, sin = np.cos(angle), np.sin(angle)
    turned = lambda v: np.concatenate([-v[..., 4:], v[..., :4]], -1)  # noqa: E731
    wide = x.astype(np.float32)
    once = (wide * cos[:, :, None] + turned(wide) * sin[:, :, None]).astype(ml_dtypes.bfloat16)
    c, s = cos.astype(ml_dtypes.bfloat16)[:, :, None], sin.astype(ml_dtypes.bfloat16)[:, :, None]
    often = (x * c).astype(np.float32) + (turned(x) * s).astype(np.float32)
    ours = lambda full: np.asarray(jax.jit(rotate, static_argnums=3)(jnp.asarray(x), cos, sin, full)).astype(np.float32)  # noqa: E731
    np.testing.assert_array_equal(ours(True), once.astype(np.float32))
    assert np.abs(ours(False) - often).max() <= np.abs(often).max() * 2**-7
    assert (ours(True) != ours(False)).any()
