"""Every family equals an independent torch implementation, read from the folder that this one wrote.

One check a property. ``CASES`` is what is tested, family by family, and what the table in ``models/README.md`` shows: it is
made from this list by ``test_parity_table``. Dream is checked against Qwen2 and LLaDA against Llama, both with every key
visible; how each twin is made stands in ``twins_*.py``.
"""

import copy
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
import twins_block
import twins_gemma2
import twins_gpt2
import twins_llama
import twins_mdlm
import twins_neox
import twins_qwen3
from safetensors.numpy import load_file
from twins import Twin

from dlmscope_jax.models import Transformer, load_model, save_model
from dlmscope_jax.models.families import family_of
from dlmscope_jax.models.layers import rotate
from dlmscope_jax.models.sites import FINAL_SITES, sites_of

TOLERANCE = 5e-5  # float32; torch itself is about 1.2e-5 from a float64 reference
RELATIVE = 2e-2  # bfloat16
TWINS = (twins_llama, twins_qwen3, twins_block, twins_gemma2, twins_gpt2, twins_neox, twins_mdlm)
FAMILIES: dict[str, Callable[..., Twin]] = {name: make for twins in TWINS for name, make in twins.FAMILIES.items()}
ONE_SPELLING = {"llada", "diffugpt"}  # not families of transformers
# switches of a family that none of its published models has, or not all of them
VARIANTS: dict[str, Callable[..., Twin]] = {
    "llama with biases": functools.partial(twins_llama.llama, attention_bias=True, mlp_bias=True),
    "llama with stretched rotation": functools.partial(twins_llama.llama, rope_parameters=twins_llama.STRETCHED),
    "llama with a tied head": functools.partial(twins_llama.llama, tie_word_embeddings=True),
    "gpt2 without a scale": functools.partial(twins_gpt2.gpt2, scale_attn_weights=False),
    "gpt2 with a head": functools.partial(twins_gpt2.gpt2, tie_word_embeddings=False, activation_function="gelu"),
    "gpt_neox in series": functools.partial(twins_neox.gpt_neox, use_parallel_residual=False, hidden_act="gelu_fast"),
    "gpt_neox without biases": functools.partial(twins_neox.gpt_neox, attention_bias=False, tie_word_embeddings=True),
}
BLOCK = 4  # of the tiny block-causal models
TOKENS = np.random.default_rng(7).integers(4, 97, (2, 11)).astype(np.int32)


class Made(NamedTuple):
    """A family's twin, the folder in which it lies, and what we read from there."""

    twin: Twin
    folder: Path
    model: Transformer
    params: dict[str, Any]


@functools.cache
def _kept() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory()


@functools.cache
def made(family: str) -> Made:
    """One twin a family, made once; no check changes it."""
    folder = Path(_kept().name) / family
    folder.mkdir()
    twin = (FAMILIES | VARIANTS)[family](folder)
    assert family in VARIANTS or (twin.respell is None) == (family in ONE_SPELLING)
    return Made(twin, folder, *load_model(folder))


def assert_close(ours: Any, theirs: Any, what: str) -> None:
    np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=0, atol=TOLERANCE, err_msg=what)


def check_logits(family: str, tmp_path: Path) -> None:
    """float32 logits; they are as near to the twin in float64 as those of the twin in float32, within a factor of 2."""
    twin, _, model, params = made(family)
    exact, _ = twin.run(copy.deepcopy(twin.module).double(), TOKENS)
    theirs, _ = twin.run(twin.module, TOKENS)
    ours = jax.jit(lambda p, t: model.apply(p, t).logits)(params, TOKENS)
    assert_close(ours, theirs, "logits")
    rounding = 2 * np.spacing(np.float32(np.abs(exact).max()))
    assert np.abs(ours - exact).max() <= 2 * np.abs(theirs - exact).max() + rounding


def check_sites(family: str, tmp_path: Path) -> None:
    """Every site that the model has, in every layer, and no other."""
    twin, _, model, params = made(family)
    _, theirs = twin.run(twin.module, TOKENS)
    cfg = model.config
    wanted = {(name, layer) for name in sites_of(cfg) for layer in range(cfg.n_layers)} | {(name, cfg.n_layers) for name in FINAL_SITES}
    assert set(theirs) == wanted
    collect = tuple(name if name in FINAL_SITES else f"{name}@{layer}" for name, layer in sorted(wanted))
    taps = jax.jit(lambda p, t: model.apply(p, t, logits=False, collect=collect).taps)(params, TOKENS)
    for (name, layer), value in theirs.items():
        assert_close(taps[name][layer], value, f"{name}@{layer}")
        if name.endswith("_scale"):  # small numbers, in which an epsilon would be lost
            np.testing.assert_allclose(taps[name][layer], value, rtol=2e-5, err_msg=f"{name}@{layer}")


def check_gradients(family: str, tmp_path: Path) -> None:
    """Gradients of all parameters; torch's are written to a folder as if they were weights, and read as those are.

    Each array's differences are measured by its largest entry, because gradients of a mean are small. Some are 0 exactly: the
    bias of keys that are not rotated moves all scores of a query alike.
    """
    twin, _, model, params = made(family)
    module = copy.deepcopy(twin.module)
    torch.logsumexp(twin.forward(module, TOKENS), -1).mean().backward()
    for parameter in module.parameters():
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    twin.save(module, tmp_path)
    theirs = load_model(tmp_path)[1]
    loss = lambda p: jax.nn.logsumexp(model.apply(p, TOKENS).logits, axis=-1).mean()  # noqa: E731
    ours = jax.jit(jax.grad(loss))(params)
    for (path, a), b in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        size = max(np.abs(b).max(), 1e-4)
        assert_close(a / size, b / size, jax.tree_util.keystr(path))


def check_padding(family: str, tmp_path: Path) -> None:
    """Padding on the left and inside is not attended to: the real rows."""
    twin, _, model, params = made(family)
    keep = np.ones(TOKENS.shape, bool)
    keep[0, :3] = keep[1, 5] = False
    theirs, _ = twin.run(twin.module, TOKENS, keep)
    ours = np.asarray(jax.jit(lambda p, t, k: model.apply(p, t, attention_mask=k).logits)(params, TOKENS, keep))
    assert_close(ours[keep], theirs[keep], "logits of real rows")
    assert np.abs(theirs[keep] - twin.run(twin.module, TOKENS)[0][keep]).max() > 100 * TOLERANCE


def check_bfloat16(family: str, tmp_path: Path) -> None:
    """bfloat16 logits are no further from the exact ones than the twin's in bfloat16; the first norm rounds where its does.

    MDLM's own code computes norm and modulation in float32, which its twin in bfloat16 does not: there the values are those
    in float64, rounded once.
    """
    twin, folder, _, _ = made(family)
    rounded = copy.deepcopy(twin.module)
    for parameter in rounded.parameters():  # not the buffers: torch too keeps rotary frequencies in float32
        parameter.data = parameter.data.to(torch.bfloat16)
    theirs, sites = twin.run(rounded, TOKENS)
    for parameter in rounded.parameters():
        parameter.data = parameter.data.double()
    exact, exact_sites = twin.run(rounded.double(), TOKENS)
    model, params = load_model(folder, dtype="bfloat16")
    if model.config.cond_dim is not None:
        sites = {key: value.astype(ml_dtypes.bfloat16).astype(np.float32) for key, value in exact_sites.items()}
    out = jax.jit(lambda p, t: model.apply(p, t, collect=("attn_in@0", "resid_pre@0")))(params, TOKENS)
    error = lambda logits: np.linalg.norm(np.asarray(logits, np.float32) - exact) / np.linalg.norm(exact)  # noqa: E731
    assert out.logits.dtype == jnp.bfloat16
    assert error(out.logits) <= 1.5 * error(theirs)
    assert error(out.logits) <= RELATIVE
    for name in ("resid_pre", "attn_in"):
        same = np.asarray(out.taps[name][0], np.float32) == sites[name, 0]
        assert same.mean() > 0.995, f"{name}@0: {1 - same.mean():.1%} of the entries differ"


def check_spelling(family: str, tmp_path: Path) -> None:
    """Folders as the hub and as transformers 5 spell them give the same model."""
    twin, _, model, params = made(family)
    twin.save(twin.module, tmp_path)
    twin.respell(tmp_path)
    again, loaded = load_model(tmp_path)
    assert (again.config, again.diffusion) == (model.config, model.diffusion)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def check_round_trip(family: str, tmp_path: Path) -> None:
    """What we write has the published names and values, but for buffers, and reads back the same."""
    _, folder, model, params = made(family)
    save_model(tmp_path, model, params, dtype="float32")
    ignored = tuple(f".{name}" for name in getattr(family_of(model.config.family, family), "IGNORED", ()))
    published = {k: v for k, v in load_file(folder / "model.safetensors").items() if not k.endswith(ignored)}
    written = load_file(tmp_path / "model.safetensors")
    assert sorted(written) == sorted(published)
    for name, value in published.items():
        np.testing.assert_array_equal(written[name], value, err_msg=name)
    again, loaded = load_model(tmp_path)
    assert (again.config, again.diffusion) == (model.config, model.diffusion)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def check_shards(family: str, tmp_path: Path) -> None:
    """A folder of many files holds the same model."""
    twin, _, _, params = made(family)
    twin.save(twin.module, tmp_path, "20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    jax.tree.map(np.testing.assert_array_equal, load_model(tmp_path)[1], params)


def check_cache(family: str, tmp_path: Path) -> None:
    """Through a cache the logits are those of one forward pass, also behind padding on the left.

    Causal models read token by token after a prompt, block-causal ones block by block. A bidirectional model's cache is filled
    by a pass over everything; a window of unchanged tokens against it then gives what that pass gave.
    """
    _, _, model, params = made(family)
    cfg, (batch, length) = model.config, TOKENS.shape
    keep = np.ones(TOKENS.shape, bool)
    keep[0, :BLOCK] = False  # one block, so that the blocks of both rows end at the same columns
    position = np.maximum(np.cumsum(keep, 1) - 1, 0)
    whole = model.apply(params, TOKENS, attention_mask=keep, position_ids=position).logits

    @functools.partial(jax.jit, static_argnames="width")
    def read(cache: Any, start: Any, width: int) -> tuple[Any, Any]:
        part = lambda a: jax.lax.dynamic_slice_in_dim(jnp.asarray(a), start, width, axis=1)  # noqa: E731
        out = model.apply(
            params, part(TOKENS), attention_mask=part(keep), position_ids=part(position), cache=cache, start=jnp.full(batch, start)
        )
        return out.cache, out.logits

    assert cfg.block_length in (None, BLOCK)
    widths = {"causal": [5] + [1] * (length - 5), "block_causal": [BLOCK, BLOCK, length - 2 * BLOCK], "bidirectional": [length, 4]}
    cache, start, logits = model.init_cache(batch, length + 2), 0, []
    for width in widths[cfg.attention]:
        start = 6 if start == length else start  # the window
        cache, part = read(cache, start, width)
        logits.append((start, part))
        start += width
    for start, part in logits:
        rows = slice(start, start + part.shape[1])
        assert_close(np.asarray(part)[keep[:, rows]], np.asarray(whole)[:, rows][keep[:, rows]], f"tokens {start} and up")


class Property(NamedTuple):
    """One column of the table: how it is checked, and what the check promises."""

    check: Callable[[str, Path], None]
    promise: str


def within(bound: float) -> str:
    return f"≤ {bound:.0e}".replace("e-0", "e-")


PROPERTIES = {
    "logits": Property(check_logits, within(TOLERANCE)),
    "sites": Property(check_sites, within(TOLERANCE)),
    "gradients": Property(check_gradients, f"{within(TOLERANCE)} of the largest"),
    "padding": Property(check_padding, within(TOLERANCE)),
    "bfloat16": Property(check_bfloat16, within(RELATIVE)),
    "both spellings": Property(check_spelling, "equal"),
    "round trip": Property(check_round_trip, "equal"),
    "shards": Property(check_shards, "equal"),
    "cache": Property(check_cache, within(TOLERANCE)),
}
CASES = [(family, name) for family in FAMILIES for name in PROPERTIES if name != "both spellings" or family not in ONE_SPELLING]


# every part of a network is differentiated in one of these; the other families are made of the same parts
DIFFERENTIATED = ("llama", "gpt2", "gemma2", "mdlm")
# rounding is that of the parts, caches that of the kinds of attention
ROUNDED = (*DIFFERENTIATED, "neox", "dream", "sdar")
DEFAULT = {"gradients": DIFFERENTIATED, "bfloat16": ROUNDED, "cache": ROUNDED}
SLOW = [(family, name) for family, name in CASES if family not in DEFAULT.get(name, (family,))]
MARKED = [pytest.param(*case, marks=pytest.mark.slow) if case in SLOW else case for case in CASES]


@pytest.mark.some(32)
@pytest.mark.parametrize(("family", "name"), MARKED)
def test_parity(family: str, name: str, tmp_path: Path) -> None:
    PROPERTIES[name].check(family, tmp_path)


@pytest.mark.some(3)
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant: str, tmp_path: Path) -> None:
    for name in ("logits", "sites", "round trip"):
        PROPERTIES[name].check(variant, tmp_path)


def test_learned_positions_are_those_that_are_given() -> None:
    twin, _, model, params = made("gpt2")
    position = np.arange(TOKENS.shape[1])[None] + np.array([[0], [9]])
    with torch.no_grad():
        theirs = twin.module(torch.tensor(TOKENS).long(), position_ids=torch.tensor(position)).logits
    assert_close(model.apply(params, TOKENS, position_ids=position).logits, theirs.numpy(), "logits")


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_where_the_rotation_inside_the_model_rounds(family: str) -> None:
    """In bfloat16 the weights of layer 0, from its own q and k: LLaDA rotates in float32, Dream with rounded tables and products."""
    model, params = load_model(made(family).folder, dtype="bfloat16")
    cfg = model.config
    taps = jax.jit(lambda p, t: model.apply(p, t, logits=False, collect=("q@0", "k@0", "attn_pattern@0")).taps)(params, TOKENS)
    q, k, ours = (np.asarray(taps[name][0]) for name in ("q", "k", "attn_pattern"))
    half = cfg.head_dim // 2
    angle = np.arange(TOKENS.shape[1], dtype=np.float32)[:, None, None] / cfg.rope_theta ** (np.arange(half, dtype=np.float32) / half)

    def rotated(x: np.ndarray, dtype: Any) -> np.ndarray:
        cos, sin, (first, second) = np.cos(angle).astype(dtype), np.sin(angle).astype(dtype), np.split(x.astype(dtype), 2, axis=-1)
        turned = np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
        return turned.astype(ml_dtypes.bfloat16).astype(np.float32)

    def pattern(dtype: Any) -> np.ndarray:
        keys = np.repeat(rotated(k, dtype), cfg.n_heads // cfg.n_kv_heads, axis=2)
        scores = np.exp(np.einsum("btnh,bsnh->bnts", rotated(q, dtype), keys) * cfg.head_dim**-0.5)
        return (scores / scores.sum(-1, keepdims=True)).astype(ml_dtypes.bfloat16)

    once, often = ((ours == pattern(dtype)).mean() for dtype in (np.float32, ml_dtypes.bfloat16))
    own, other = (once, often) if family == "llada" else (often, once)
    assert own > 0.99 and other < 0.8


def test_llada_rotates_in_float32_under_bfloat16() -> None:
    """One rounding, after the rotation (LLaDA), against rounding of tables and products (Dream): written out in NumPy."""
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
