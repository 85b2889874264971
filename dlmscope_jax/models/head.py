"""The output head, and what it says about a vector of the residual stream."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from dlmscope_jax.errors import UserError

from .config import ModelConfig
from .layers import norm, precision_of, softcap


@struct.dataclass
class Head:
    """From what the head reads (the site ``final_norm``) to logits.

    Attributes:
      rows: [V, D] one row a token; the embedding where they are tied.
      bias: [V], or None.
      cap: Gemma-2's ``cap tanh(logit / cap)``, or None.
    """

    rows: Float[Array, "V D"]
    bias: Float[Array, " V"] | None = None
    cap: float | None = struct.field(pytree_node=False, default=None)

    @property
    def size(self) -> int:
        """Number of tokens, V."""
        return self.rows.shape[0]

    def logits(self, hidden: Float[Array, "*n D"], dtype: jnp.dtype | None = None) -> Float[Array, "*n V"]:
        """Logits in ``dtype``, as the original implementations return them; None: float32 products at the highest precision."""
        if dtype is None:
            out = jnp.einsum(
                "...d,vd->...v",
                hidden,
                self.rows.astype(hidden.dtype),
                precision=jax.lax.Precision.HIGHEST,
                preferred_element_type=jnp.float32,
            )
        else:
            out = jnp.einsum("...d,vd->...v", hidden.astype(dtype), self.rows.astype(dtype), precision=precision_of(dtype))
        return softcap(out if self.bias is None else out + self.bias.astype(out.dtype), self.cap)

    def part(self, start: Array, length: int) -> "Head":
        """The head of ``length`` tokens from ``start``, which may be traced."""
        cut = lambda a: jax.lax.dynamic_slice_in_dim(a, start, length, axis=0)  # noqa: E731
        return replace(self, rows=cut(self.rows), bias=None if self.bias is None else cut(self.bias))


def head_of(tree: dict, config: ModelConfig) -> Head:
    """The head of a tree of parameters (what is inside ``{"params": ...}``)."""
    return Head(tree["embed" if config.tied_head else "head"], tree.get("head_bias"), config.logit_softcap)


def sigma_condition(tree: dict) -> Float[Array, " C"]:
    """MDLM's condition vector: ``silu(W2 silu(W1 e + b1) + b2)`` with e the embedding of noise level 0, for it has no time."""
    half = tree["sigma_in"].shape[0] // 2
    embedding = jnp.concatenate([jnp.ones(half), jnp.zeros(half)])  # cosines of 0, then sines
    product = lambda x, name: (  # noqa: E731
        jnp.matmul(x, tree[name].astype(jnp.float32), precision=jax.lax.Precision.HIGHEST) + tree[f"{name}_bias"].astype(jnp.float32)
    )
    return jax.nn.silu(product(jax.nn.silu(product(embedding, "sigma_in")), "sigma_out"))


def final_modulation(tree: dict, config: ModelConfig) -> tuple[Array, Array] | None:
    """Shift and scale of adaLN's last norm, [D] each; None where the model has none."""
    if config.cond_dim is None:
        return None
    weight, bias = tree["final_adaln"].astype(jnp.float32), tree["final_adaln_bias"].astype(jnp.float32)
    flat = jnp.matmul(sigma_condition(tree), weight, precision=jax.lax.Precision.HIGHEST) + bias
    return flat[: config.d_model], flat[config.d_model :]


def final_norm(tree: dict, config: ModelConfig, x: Float[Array, "*n D"], at_scale: Any = lambda scale: scale) -> Float[Array, "*n D"]:
    """What the head reads, from the last residual stream."""
    return norm(x, tree["final_norm"], tree.get("final_norm_bias"), config, at_scale, final_modulation(tree, config))


def logit_lens(model: Any, params: dict, resid: Float[Array, "*n D"], norm: str = "final") -> Float[Array, "*n V"]:
    """What the output head says about a residual vector (nostalgebraist 2020).

    Args:
      model: the language model.
      params: its parameters.
      resid: residual activations, or a direction such as a decoder row.
      norm: ``"final"`` applies the last norm; ``"frozen"`` what it does to a direction at a fixed scale of 1: it removes
        the mean where the norm does and multiplies by the weight, and nothing constant (norm's and head's biases) is
        added; ``"none"`` nothing but the head's matrix.

    Raises:
      UserError: for another ``norm``.
    """
    if norm not in ("final", "frozen", "none"):
        raise UserError(f"logit_lens: norm {norm!r} is not known: 'final', 'frozen' or 'none'")
    config, tree, resid = model.config, params["params"], resid.astype(jnp.float32)
    head = head_of(tree, config)
    if norm == "final":
        return head.logits(final_norm(tree, config, resid), model.dtype)
    if norm == "frozen":
        if config.norm == "layer":
            resid = resid - resid.mean(axis=-1, keepdims=True)
        modulation = final_modulation(tree, config)
        gain = tree["final_norm"].astype(jnp.float32) + (1.0 if config.norm_offset else 0.0)
        resid = resid * (gain if modulation is None else gain * (1.0 + modulation[1]))
    return replace(head, bias=None, cap=None).logits(resid, model.dtype)
