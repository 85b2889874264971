"""Small random models, blocks and dictionaries that the tests of this room share."""

import dataclasses
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlmscope_jax.data import Blocks
from dlmscope_jax.dictionaries.topk import TopK
from dlmscope_jax.models import DiffusionSpec, ModelConfig, Transformer, init_params

VOCAB, WIDTH, LENGTH, MASK = 23, 16, 12, 3


@dataclasses.dataclass(frozen=True)
class Card:
    """The fields of a dictionary's meta that this room reads."""

    site: str
    model: str = "tiny"
    model_identity: str = ""
    tokenizer: str = ""
    weight_processing: str | None = None
    select: str = "all"
    extra: Any = None


@dataclasses.dataclass(frozen=True)
class Perfect:
    """A dictionary that reconstructs exactly: the edge case of every insertion."""

    d_in: int
    width: int = 4
    d_out: int | None = None
    row_norm: str = "none"
    STATISTICS = ()

    def init(self, key, sample=None):
        return {"shift": jnp.zeros(())}

    def fold(self, params, scale, out_scale=None):
        return params

    def reconstruct(self, params, x):
        return x + params["shift"] * 0


def tiny_config(n_layers=3, attention="bidirectional"):
    return ModelConfig(
        family="llada", vocab_size=VOCAB, d_model=WIDTH, n_layers=n_layers, n_heads=2, n_kv_heads=1, head_dim=8, d_mlp=24,
        norm_eps=1e-5, rope_theta=1e4, max_positions=64, attention=attention, bos_id=0, eos_id=1, pad_id=2,
    )  # fmt: skip


def tiny_model(kind="dlm", n_layers=3, seed=0, wide=1.0):
    """("dlm" | "dream" | "ar") -> (model, params); ``wide`` spreads the embedding so that tokens differ."""
    diffusion = None if kind == "ar" else DiffusionSpec(mask_id=MASK, shift=kind == "dream")
    model = Transformer(tiny_config(n_layers, "causal" if kind == "ar" else "bidirectional"), diffusion)
    params = init_params(model, jax.random.key(seed))
    tree = dict(params["params"])
    tree["embed"], tree["head"] = tree["embed"] * 50 * wide, tree["head"] * 50
    return model, {"params": tree}


def passthrough(model, params):
    """The same model with blocks that add nothing: its logits are a function of each position's own token."""
    tree = dict(params["params"])
    blocks = dict(tree["blocks"])
    for name in ("o", "down"):
        blocks[name] = jnp.zeros_like(blocks[name])
    return {"params": {**tree, "blocks": blocks}}


def tiny_blocks(n=6, length=LENGTH, documents_per_block=1, pad=0, seed=0, side="test"):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(4, VOCAB, size=(n, length)).astype(np.int32)
    tokens[:, 0] = 0
    owner = np.arange(length) * documents_per_block // length
    documents = (np.arange(n)[:, None] * documents_per_block + owner[None]).astype(np.int32)
    if pad:
        tokens[-1, -pad:], documents[-1, -pad:] = 2, -1
    return Blocks(tokens, documents, tuple(f"doc{i}" for i in range(n * documents_per_block)), side)


def tiny_topk(site="resid_post@1", width=32, k=4, seed=5, **card):
    spec = TopK(WIDTH, width, k)
    params = spec.init(jax.random.key(seed))
    params = {**params, "b_dec": jax.random.normal(jax.random.key(seed + 1), (WIDTH,)) * 0.1}
    return spec, params, Card(site=site, **card)


@pytest.fixture(scope="session")
def tiny():
    """The helpers above, for tests of any import mode."""
    return types.SimpleNamespace(
        model=tiny_model, blocks=tiny_blocks, topk=tiny_topk, passthrough=passthrough, Perfect=Perfect, Card=Card,
        vocab=VOCAB, width=WIDTH, length=LENGTH, mask=MASK,
    )  # fmt: skip
