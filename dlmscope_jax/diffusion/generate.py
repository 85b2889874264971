"""Generation as one compiled loop that keeps everything a study of it needs: what was read, when and how surely each
token was committed, and the activations at chosen steps.

A new prompt, key, edit value, strength, layer or schedule runs the program that is already compiled; another shape,
sampler or set of collected sites compiles a new one.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Key

from dlmscope_jax.errors import UserError
from dlmscope_jax.models.edits import Edit, InDictionary, check_edits
from dlmscope_jax.models.sites import parse_site

from .objectives import predicts_next
from .readers import reader_of
from .samplers import ARSampler, ParallelSampler, Sampler
from .text import Text, entries
from .trace import Collect, Progress, Trace


def generate(
    model: Any,
    params: Any,
    prompt: Int[Array, "B P"],
    sampler: Sampler,
    key: Key[Array, ""] | None = None,
    attention_mask: Bool[Array, "B P"] | None = None,
    edits: tuple[Edit, ...] = (),
    collect: tuple[str, ...] | Collect = (),
) -> Trace:
    """Continues (or fills in) a prompt, step by step, until every row is done.

    Step s draws from ``fold_in(key, s)``. The same key gives other draws to a batch of another shape; and under ``jit``,
    where a prompt that is traced may hold masks and the whole text takes part in the draws. Caches leave masks inside such
    a prompt alone (a block cache all but those of the block in which the prompt ends).

    Edits are resolved at every step: their schedule is over the S steps, ``"prompt"`` and ``"response"`` are the given and
    the generated tokens, ``"masked"`` those still unknown in what the model reads, ``"just_committed"`` those written at
    the step before (none at step 0).

    Args:
      model: the language model.
      params: its parameters.
      prompt: token ids; masks in it are filled too. Prompts of unequal length are padded on the left.
      sampler: ``LLaDASampler``, ``DreamSampler``, ``MDLMSampler``, ``DiffuGPTSampler`` or ``ParallelSampler`` for a
        diffusion model, ``ARSampler`` for an autoregressive one.
      key: random key; needed by samplers that draw.
      attention_mask: True at the prompt's real tokens.
      edits: changes to activations; an array of positions covers prompt and response, [B, P + N], and so does a value
        that differs from token to token.
      collect: sites to keep at all steps and positions, or a ``Collect``.

    Raises:
      UserError: when sampler and model do not fit, a key is missing, the prompt is malformed, padded on the right or
        empty where the model needs a first token, a site, layer, step or position does not exist, or an edit's positions,
        value or strength are for another number of tokens or rows.
    """
    _check_sampler(model, sampler, key)
    prompt = jnp.asarray(prompt)
    if prompt.ndim != 2 or not jnp.issubdtype(prompt.dtype, jnp.integer):
        raise UserError(f"generate: the prompt is {prompt.dtype}{list(prompt.shape)}: give token ids [rows, positions]")
    if attention_mask is not None:
        attention_mask = jnp.asarray(attention_mask, bool)
        if attention_mask.shape != prompt.shape:
            raise UserError(f"generate: attention_mask is {list(attention_mask.shape)}, the prompt {list(prompt.shape)}")
    rows, given = prompt.shape
    if given == 0 and predicts_next(model):
        raise UserError("generate: the prompt is empty, and this model predicts a token from the one before it: begin with one")
    collect = _checked(collect, model, sampler, given + sampler.length)
    edits = tuple(edits)
    check_edits(edits, model.config)
    for edit in edits:
        _check_shapes(edit, model, rows, given + sampler.length)
    fills_prompt = _check_values(model, prompt, attention_mask)
    if fills_prompt and getattr(sampler, "cache", "none") != "none" and not isinstance(prompt, jax.core.Tracer):
        raise UserError(f"generate: the prompt holds masks, which {type(sampler).__name__} fills only with cache='none'")

    blank = model.diffusion.mask_id if sampler.needs_diffusion else (model.config.pad_id or 0)
    tokens = jnp.concatenate([prompt.astype(jnp.int32), jnp.full((rows, sampler.length), blank, jnp.int32)], axis=1)
    key = jax.random.key(0) if key is None else key
    return _loop(model, sampler, collect, given, fills_prompt, params, tokens, key, attention_mask, edits)


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _loop(
    model: Any,
    sampler: Sampler,
    collect: Collect,
    given: int,
    fills_prompt: bool,
    params: Any,
    tokens: Array,
    key: Array,
    attention_mask: Array | None,
    edits: tuple[Edit, ...],
) -> Trace:
    """The compiled part of ``generate``: a scan over the steps, each of which runs only while there is something to do."""
    rows, total = tokens.shape
    n_steps = sampler.n_steps
    mask_id = model.diffusion.mask_id if sampler.needs_diffusion else None
    unknown = tokens == mask_id if sampler.needs_diffusion else jnp.broadcast_to(jnp.arange(total) >= given, tokens.shape)
    text = Text.of(model, params, sampler, (rows, given), attention_mask, collect.sites)
    columns = jnp.arange(0 if fills_prompt else given, total)
    stops = sampler.stops(model.config)
    kept_steps = jnp.asarray(collect.slots(n_steps) >= 0 if collect.sites else np.zeros(n_steps, bool))
    reader = reader_of(text, sampler, edits, columns, kept_steps)

    def work(progress: Progress, state: Any, step: Array) -> tuple:
        read = reader.read(state, step, progress, progress.edits(edits, step, n_steps))
        masked = jnp.take_along_axis(progress.masked, jnp.minimum(read.columns, total - 1), axis=1) & read.open
        proposal = sampler.propose(step, read.logits, masked, read.columns - text.origin, jax.random.fold_in(key, step))
        return proposal, read.columns, collect.pick(read.taps), read.forwards, read.state

    def one_step(carry: tuple, step: Array) -> tuple[tuple, Array]:
        progress, buffers, forwards, state = carry
        busy = sampler.pending(progress.masked[:, columns], columns - text.origin).any()
        now = partial(work, progress, state, step)
        empty = lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(now)[:-1])  # noqa: E731
        proposal, where, taps, ran, state = jax.lax.cond(busy, now, lambda: (*empty(), state))
        buffers = collect.keep(buffers, taps, step, n_steps)
        return (progress.write(step, where, proposal, mask_id, stops), buffers, forwards + ran, state), progress.tokens

    progress = Progress.begin(tokens, unknown, n_steps)
    state = reader.start(progress, progress.edits(edits, jnp.int32(0), n_steps))
    shapes = jax.eval_shape(lambda: work(progress, state, jnp.int32(0))[2])
    carry = (progress, collect.buffers(shapes, n_steps), jnp.int32(0), state)
    (progress, buffers, forwards, _), history = jax.lax.scan(one_step, carry, jnp.arange(n_steps, dtype=jnp.int32))
    return progress.trace(history, buffers, forwards, approximate=reader.approximate)


def _check_sampler(model: Any, sampler: Sampler, key: Array | None) -> None:
    """Raises when a sampler cannot run on a model."""
    who = type(sampler).__name__
    if sampler.needs_diffusion and model.diffusion is None:
        raise UserError(f"{who} needs a diffusion model; this one is autoregressive: use ARSampler")
    if not sampler.needs_diffusion and model.diffusion is not None:
        raise UserError(f"{who} needs an autoregressive model; this one diffuses: use LLaDASampler or DreamSampler")
    if key is None and sampler.needs_key:
        raise UserError(f"{who} with these settings draws random numbers: give generate a key")
    if isinstance(sampler, ARSampler):
        for stop in sampler.stop_ids or ():
            if not 0 <= stop < model.config.vocab_size:
                raise UserError(f"{who}: stop_ids has token {stop}; ids are 0 to {model.config.vocab_size - 1}")
    if isinstance(sampler, ParallelSampler):
        attention = model.config.attention
        if sampler.cache != "none" and (sampler.cache == "blocks") != (attention == "block_causal"):
            other = "'blocks'" if attention == "block_causal" else "'dual'"
            raise UserError(f"{who}: cache {sampler.cache!r} is not for {attention} attention: use {other} or 'none'")
        if attention == "block_causal" and model.config.block_length % sampler.block_length:
            whole = model.config.block_length
            raise UserError(f"{who}: block_length {sampler.block_length} must divide this block-causal model's {whole}")


def _check_shapes(edit: Edit, model: Any, rows: int, total: int) -> None:
    """Raises when an edit's positions or values are for another number of tokens, or its strengths for another of rows."""
    both = f"prompt and response have {total} tokens"
    if edit.mask is not None and (covered := jnp.shape(edit.mask)[-1]) not in (1, total):
        raise UserError(f"edit at {edit.site}: its positions are {covered}, {both}")
    value = edit.value.target if isinstance(edit.value, InDictionary) else edit.value
    shape, behind = getattr(value, "shape", ()), entries(edit, model.config)
    if len(shape) > behind and (covered := shape[-behind - 1]) not in (1, total):
        raise UserError(f"edit at {edit.site}: its value is {list(shape)}, for {covered} tokens; {both}")
    if (strengths := jnp.shape(edit.strength)) not in ((), (rows,)):
        raise UserError(f"edit at {edit.site}: its strength is {list(strengths)}: one number, or one for each of {rows} rows")


def _checked(collect: tuple[str, ...] | Collect, model: Any, sampler: Sampler, total: int) -> Collect:
    """``collect`` as a ``Collect`` whose sites, steps and positions exist."""
    if isinstance(collect, str):
        raise UserError(f"generate: collect is the text {collect!r}: give a tuple of sites, ({collect!r},)")
    if not isinstance(collect, Collect):
        collect = Collect(tuple(collect))
    for site in collect.sites:
        parse_site(site, model.config)
    steps = collect.steps
    if steps is not None and (list(steps) != sorted(set(steps)) or not all(0 <= s < sampler.n_steps for s in steps)):
        raise UserError(f"Collect: steps {steps} must increase and lie in 0..{sampler.n_steps - 1}")
    if collect.positions is not None and not all(0 <= p < total for p in collect.positions):
        raise UserError(f"Collect: positions must lie in 0..{total - 1}")
    return collect


def _check_values(model: Any, prompt: Array, attention_mask: Array | None) -> bool:
    """Checks what can be read on the host; returns whether the prompt holds masks (True where it cannot be known)."""
    if isinstance(prompt, jax.core.Tracer) or isinstance(attention_mask, jax.core.Tracer):
        return True
    values = np.asarray(prompt)
    if (wrong := values[(values < 0) | (values >= model.config.vocab_size)]).size:
        raise UserError(f"generate: the prompt holds token {wrong[0]}; ids are 0 to {model.config.vocab_size - 1}")
    if attention_mask is not None and attention_mask.size:
        real = np.asarray(attention_mask)
        if (real[:, 1:] < real[:, :-1]).any() or not real[:, -1].all():
            raise UserError(
                "generate: prompts are padded on the left: each row of attention_mask must be False first, then True "
                "(encode does so after dataclasses.replace(tokenizer, padding_side='left'))"
            )
    if model.diffusion is None:
        return False
    masks = values == model.diffusion.mask_id
    if model.diffusion.shift:
        first = 0 if attention_mask is None else np.asarray(attention_mask).argmax(axis=1)
        if masks[np.arange(len(masks)), first].any():
            raise UserError("generate: the prompt begins with the mask, and this model predicts a token from the one before it")
    return bool(masks.any())
