"""A small language model without layers, so that samplers and losses are tested apart from the transformer."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlmscope_jax.models import DiffusionSpec, Head, ModelOutput
from dlmscope_jax.models.edits import apply_edits


class Stub:
    """Logits are a fixed smooth function of all visible tokens (of those before, when causal), so that no two tie.

    It speaks the language of ``Transformer``: one layer, the site ``resid_post@0``, a head, edits. ``traces`` counts how
    often it is traced.
    """

    def __init__(self, vocab: int = 23, length: int = 64, diffusion: DiffusionSpec | None = None, seed: int = 0):
        self.diffusion = diffusion
        self.config = SimpleNamespace(vocab_size=vocab, n_layers=1, pad_id=2)
        self.traces = 0
        keys = jax.random.split(jax.random.key(seed), 3)
        self.params = {
            "embed": jax.random.normal(keys[0], (vocab, 16)),
            "mix": jax.random.normal(keys[1], (2 * length,)),
            "head": 1.5 * jax.random.normal(keys[2], (vocab, 16)),
        }

    def read(self, tokens: np.ndarray, real: np.ndarray) -> np.ndarray:
        """Raw logits [T, V] of one row in NumPy, so that references need no JAX."""
        embed, mix, head = (np.asarray(self.params[name], np.float64) for name in ("embed", "mix", "head"))
        where = np.arange(len(tokens))
        weight = mix[where[:, None] - where[None] + len(mix) // 2]
        if self.diffusion is None:
            weight = np.tril(weight)
        return np.tanh(weight @ (embed[tokens] * real[:, None]) * len(tokens) ** -0.5) @ head.T

    def output_head(self, params):
        return Head(params["head"])

    def unembed(self, params, hidden):
        return hidden @ params["head"].T

    def apply(self, params, tokens, attention_mask=None, position_ids=None, logits=True, collect=(), edits=()):
        self.traces += 1
        rows, length = tokens.shape
        where = jnp.arange(length)
        weight = params["mix"][where[:, None] - where[None] + params["mix"].shape[0] // 2]
        if self.diffusion is None:
            weight = jnp.where(where[:, None] >= where[None], weight, 0.0)
        seen = params["embed"][tokens]
        if attention_mask is not None:
            seen = jnp.where(attention_mask[:, :, None], seen, 0.0)
        x = jnp.tanh(jnp.einsum("ts,bsd->btd", weight, seen) * length**-0.5)
        x = apply_edits(edits, "resid_post", jnp.int32(0), x, {})
        taps = {"resid_post": {0: x}} if "resid_post@0" in collect else {}
        if "final_norm" in collect:
            taps["final_norm"] = {1: x}
        if logits is not False and logits is not True:
            x = jnp.take_along_axis(x, logits[:, :, None], axis=1)
        return ModelOutput(logits=None if logits is False else self.unembed(params, x), taps=taps)


@dataclasses.dataclass
class Models:
    """One stub of each kind; mask id 3."""

    llada: Stub
    dream: Stub
    ar: Stub
    new: type[Stub] = Stub


@pytest.fixture(scope="session")
def stubs() -> Models:
    return Models(Stub(diffusion=DiffusionSpec(3, shift=False)), Stub(diffusion=DiffusionSpec(3, shift=True), seed=1), Stub(seed=2))
