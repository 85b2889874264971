"""A tiny model of each kind and token blocks with padding, for the harvest's tests."""

from typing import Any

import jax
import numpy as np
import pytest

from dlmscope_jax.data import Blocks
from dlmscope_jax.models import DiffusionSpec, ModelConfig, Transformer, init_params

VOCABULARY, LENGTH, MASK = 50, 8, 3


def tiny_blocks(n: int = 21, seed: int = 0) -> Blocks:
    """``n`` blocks of two documents each; every fifth ends in padding."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(4, VOCABULARY, (n, LENGTH)).astype(np.int32)
    tokens[:, 0] = 0
    documents = (np.arange(n)[:, None] * 2 + (np.arange(LENGTH) >= 5)).astype(np.int32)
    documents[::5, 6:] = -1
    tokens[::5, 6:] = 2
    return Blocks(tokens, documents, tuple(f"document {i}" for i in range(2 * n)), "train")


def tiny_model(kind: str, seed: int = 0) -> tuple[Transformer, dict[str, Any]]:
    """``"dlm"``, ``"shifted"`` or ``"ar"``, with two layers of width 8 and random weights."""
    attention = "causal" if kind == "ar" else "bidirectional"
    config = ModelConfig(
        "llama", VOCABULARY, 8, 2, 2, 2, 4, 16, 1e-5, 10_000.0, LENGTH, attention, bos_id=0, eos_id=1, pad_id=2
    )  # fmt: skip
    model = Transformer(config, None if kind == "ar" else DiffusionSpec(MASK, kind == "shifted"))
    return model, init_params(model, jax.random.key(seed))


@pytest.fixture(scope="session")
def blocks() -> Blocks:
    return tiny_blocks()


@pytest.fixture(scope="session")
def dlm() -> tuple[Transformer, dict[str, Any]]:
    return tiny_model("dlm")
