"""Losses of language models: which logits score which token, masked and next-token cross-entropy, the diffusion bound.

All losses are in nats. Logits are formed from the hidden state that the head reads, in float32, and for a large
vocabulary a slice of the head at a time, so that [B, T, V] never exists.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from dlmscope_jax.errors import UserError
from dlmscope_jax.models import Head

from .corruption import corrupt, stratified_times, training_rates

DENSE_VOCABULARY = 8192  # up to here one matrix product is faster than a loop over slices, and its result is small


def predicts_next(model: Any) -> bool:
    """Whether the output at position i is about token i + 1: autoregressive models and shifted diffusion models."""
    return model.diffusion is None or model.diffusion.shift


def align_logits(logits: Float[Array, "B T V"], model: Any) -> tuple[Float[Array, "B T V"], Bool[Array, " T"]]:
    """Moves logits (or any per-position output) so that position i scores token i.

    Args:
      logits: raw output of ``model``.
      model: an object with ``diffusion``, a ``DiffusionSpec`` or None for an autoregressive model.

    Returns:
      The aligned logits, and where they mean something: everywhere, except at position 0 of a model that predicts the
      next token, which holds a copy of its neighbour (as Dream's own code has it) and must not be scored.
    """
    valid = jnp.ones(logits.shape[1], bool)
    if predicts_next(model):
        logits = jnp.concatenate([logits[:, :1], logits[:, :-1]], axis=1)
        valid = valid.at[0].set(False)
    return logits, valid


def token_loss(
    model: Any,
    params: Any,
    tokens: Int[Array, "B T"],
    targets: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    attention_mask: Bool[Array, "B T"] | None = None,
    edits: tuple = (),
    chunk: int | None = None,
) -> Float[Array, "B T"]:
    """Cross-entropy of the target tokens in nats, aligned: entry i is about token i whatever the model's convention.

    Args:
      model: the language model.
      params: its parameters.
      tokens: what the model reads.
      targets: the tokens to score.
      mask: where to score.
      attention_mask: True at real tokens.
      edits: changes to the model's activations.
      chunk: rows of the head at a time; default all of them for a vocabulary up to 8,192, else 8,192.

    Returns:
      Nats a token; 0 outside ``mask``, and at position 0 of a model that predicts the next token.
    """
    out = model.apply(params, tokens, attention_mask=attention_mask, logits=False, collect=("final_norm",), edits=edits)
    (hidden,) = out.taps["final_norm"].values()
    hidden, valid = align_logits(hidden, model)
    loss = head_loss(model.output_head(params), hidden, targets, chunk)
    return jnp.where(mask & valid, loss, 0.0)


def head_loss(
    head: Head,
    hidden: Float[Array, "*n D"],
    targets: Int[Array, "*n"],
    chunk: int | None = None,
) -> Float[Array, "*n"]:
    """``logsumexp(logits) - logits[target]`` in float32, a slice of the vocabulary at a time.

    The logits of a slice are computed again in the backward pass, so a gradient does not keep them either.
    """
    vocabulary = head.size
    chunk = chunk or (vocabulary if vocabulary <= DENSE_VOCABULARY else DENSE_VOCABULARY)
    if chunk >= vocabulary:
        logits = head.logits(hidden)
        return jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]

    @jax.checkpoint
    def add_slice(carry: tuple, first: Array) -> tuple:
        total, of_target = carry
        # the last slice is moved back to fit; the columns that it repeats do not count again
        start = jnp.minimum(first, vocabulary - chunk)
        column = start + jnp.arange(chunk)
        logits = head.part(start, chunk).logits(hidden)
        logits = jnp.where(column >= first, logits, -jnp.inf)
        total = jnp.logaddexp(total, jax.nn.logsumexp(logits, axis=-1))
        inside = (targets >= first) & (targets < start + chunk)
        picked = jnp.take_along_axis(logits, jnp.clip(targets - start, 0, chunk - 1)[..., None], axis=-1)[..., 0]
        return (total, jnp.where(inside, picked, of_target)), None

    empty = (jnp.full(targets.shape, -jnp.inf, jnp.float32), jnp.zeros(targets.shape, jnp.float32))
    (total, of_target), _ = jax.lax.scan(add_slice, empty, jnp.arange(0, vocabulary, chunk))
    return total - of_target


def diffusion_loss(
    model: Any,
    params: Any,
    tokens: Int[Array, "B T"],
    key: Key[Array, ""],
    attention_mask: Bool[Array, "B T"] | None = None,
    protect: Bool[Array, "B T"] | None = None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Training loss of a masked diffusion model: masked cross-entropy weighted by 1 / p, a bound on the likelihood.

    LLaDA's (Nie et al. 2025): one rate p a row, tokens masked independently, ``sum(CE / p) / tokens``; the rates of a
    batch are stratified. Shifted models are scored with their own alignment.

    Args:
      model: a diffusion language model.
      params: its parameters.
      tokens: clean tokens.
      key: random key of this step.
      attention_mask: True at real tokens; padding is neither masked nor counted.
      protect: True where a token is never masked (a prompt); it still counts in the denominator, as position 0 does.

    Returns:
      The loss in nats a token, and ``{"masked_ce": mean cross-entropy of masked tokens, "scored": their number}``.

    Raises:
      UserError: for a model without a ``DiffusionSpec``.
    """
    spec = _diffusion_of(model, "diffusion_loss")
    rate_key, mask_key = jax.random.split(key)
    rate = training_rates(rate_key, tokens.shape[0], spec)
    corrupted, is_masked = corrupt(mask_key, tokens, rate, spec, protect=_protected(attention_mask, protect))
    loss = token_loss(model, params, corrupted, tokens, is_masked, attention_mask=attention_mask)
    scored = is_masked.sum()
    count = jnp.float32(tokens.size) if attention_mask is None else attention_mask.sum().astype(jnp.float32)
    weighted = (loss.sum(axis=1) / rate).sum() / count
    return weighted, {"masked_ce": loss.sum() / jnp.maximum(scored, 1).astype(jnp.float32), "scored": scored}


def next_token_loss(
    model: Any,
    params: Any,
    tokens: Int[Array, "B T"],
    attention_mask: Bool[Array, "B T"] | None = None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Training loss of an autoregressive model: mean cross-entropy of each token given those before it.

    A token is scored where it and the token before it are real.

    Returns:
      The loss in nats per scored token, and ``{"scored": their number}``.

    Raises:
      UserError: for a diffusion model, whose positions see the token that they would predict.
    """
    if model.diffusion is not None:
        raise UserError("next_token_loss: this is a diffusion model; use diffusion_loss or elbo")
    mask = jnp.broadcast_to(jnp.arange(tokens.shape[1]) > 0, tokens.shape)
    if attention_mask is not None:
        mask = mask & attention_mask & jnp.roll(attention_mask, 1, axis=1)
    loss = token_loss(model, params, tokens, tokens, mask, attention_mask=attention_mask)
    scored = mask.sum()
    return loss.sum() / jnp.maximum(scored, 1).astype(jnp.float32), {"scored": scored}


def elbo(
    model: Any,
    params: Any,
    tokens: Int[Array, "B T"],
    key: Key[Array, ""],
    attention_mask: Bool[Array, "B T"] | None = None,
    protect: Bool[Array, "B T"] | None = None,
    samples: int = 8,
    edits: tuple = (),
) -> Float[Array, " B"]:
    """Estimate of the diffusion bound in nats per eligible token; its expectation is an upper bound on the row's NLL.

    Exact counts (LLaDA's likelihood, backbones 2.1): with ``l`` eligible tokens, a count k uniform on 1..l is masked and
    ``sum(CE) * l / k`` estimates the bound of the row, so ``sum(CE) / k`` the bound per token. The counts of a row's
    samples are stratified. The same key gives the same masks, so two conditions can be compared on equal noise.

    Args:
      model: a diffusion language model.
      params: its parameters.
      tokens: clean tokens.
      key: random key.
      attention_mask: True at real tokens; padding and the first real token are conditioned on, not scored.
      protect: True where a token is conditioned on (a prompt).
      samples: corrupted copies of each row.
      edits: changes to the model's activations.

    Raises:
      UserError: for a model without a ``DiffusionSpec``.
    """
    spec = _diffusion_of(model, "elbo")
    protect = _protected(attention_mask, protect)
    eligible = jnp.broadcast_to(jnp.arange(tokens.shape[1]) > 0, tokens.shape)
    eligible = (eligible if protect is None else eligible & ~protect).sum(axis=1).astype(jnp.float32)
    time_key, mask_key = jax.random.split(key)
    times = jax.vmap(stratified_times, (0, None), 1)(jax.random.split(time_key, tokens.shape[0]), samples)  # [S, B]

    def one(step: tuple[Array, Array]) -> Array:
        time, key = step
        count = jnp.minimum(jnp.floor(time * eligible) + 1, eligible)
        corrupted, is_masked = corrupt(key, tokens, count / jnp.maximum(eligible, 1.0), spec, protect=protect, exact=True)
        loss = token_loss(model, params, corrupted, tokens, is_masked, attention_mask=attention_mask, edits=edits)
        return loss.sum(axis=1) / jnp.maximum(count, 1.0)

    return jax.lax.map(one, (times, jax.random.split(mask_key, samples))).mean(axis=0)


def _diffusion_of(model: Any, who: str) -> Any:
    if model.diffusion is None:
        raise UserError(f"{who}: this model is autoregressive (model.diffusion is None); use next_token_loss")
    return model.diffusion


def _protected(attention_mask: Array | None, protect: Array | None) -> Array | None:
    """Positions that are never masked: padding, the first real token (a shifted model cannot predict it), ``protect``."""
    if attention_mask is None:
        return protect
    padding = ~attention_mask | (jnp.cumsum(attention_mask, axis=1) == 1)
    return padding if protect is None else padding | protect
