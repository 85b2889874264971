"""Generation as one compiled loop that keeps everything a study of it needs: what was read, when and how surely each
token was committed, and the activations at chosen steps.

A new prompt, key, edit value, strength, layer or schedule runs the program that is already compiled; another shape,
sampler or set of collected sites compiles a new one.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from dlmscope_jax.errors import UserError
from dlmscope_jax.models.edits import Edit
from dlmscope_jax.models.sites import parse_site

from .objectives import predicts_next
from .samplers import LLaDASampler, Sampler


@dataclasses.dataclass(frozen=True)
class Collect:
    """Which activations to keep: sites, and, to save memory, some of the steps and positions.

    Attributes:
      sites: ``("resid_post@5", ...)``.
      steps: 0-based steps in increasing order, None for all.
      positions: positions in prompt plus response, None for all.
    """

    sites: tuple[str, ...]
    steps: tuple[int, ...] | None = None
    positions: tuple[int, ...] | None = None


@struct.dataclass
class Trace:
    """What happened during a generation; S steps, a prompt of P tokens, N new ones.

    A token is *given* when it stands in the prompt and is not the mask; every other one is *generated*.

    Attributes:
      tokens: [B, P + N] the result.
      history: [S + 1, B, P + N]; entry s is what the model read at step s, entry S is the result. An autoregressive
        model's tokens that are not written yet are shown as the padding token (0 where it has none).
      commit_step: [B, P + N] the step that wrote a token: -1 for a given one, 0..S-1, and S where nothing was written
        (or only the mask itself, which a model may predict).
      confidence: [B, P + N] float32, the sampler's confidence in a token when it wrote it; 0 where it wrote none.
      taps: ``{"resid_post": {5: [S, B, P + N, D]}}``, entry s from the forward pass that read ``history[s]`` (with
        guidance the conditional one); S and P + N are the chosen steps and positions where ``Collect`` names them.
    """

    tokens: Int[Array, "B T"]
    history: Int[Array, "S1 B T"]
    commit_step: Int[Array, "B T"]
    confidence: Float[Array, "B T"]
    taps: dict[str, dict[int, Array]]


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
    """Continues (or fills in) a prompt, step by step.

    Step s draws from ``fold_in(key, s)``. Edits are resolved at every step: their schedule is over the S steps,
    ``"prompt"`` and ``"response"`` are the given and the generated tokens, ``"masked"`` those still unknown in what the
    model reads, ``"just_committed"`` those written at the step before (none at step 0).

    Args:
      model: the language model.
      params: its parameters.
      prompt: token ids; masks in it are filled too. Prompts of unequal length are padded on the left.
      sampler: ``LLaDASampler``, ``DreamSampler`` or ``ARSampler``.
      key: random key; needed by samplers that draw.
      attention_mask: True at the prompt's real tokens.
      edits: changes to activations; an array of positions covers prompt and response, [B, P + N].
      collect: sites to keep at all steps and positions, or a ``Collect``.

    Raises:
      UserError: when sampler and model do not fit, a key is missing, the prompt is malformed, padded on the right or
        empty where the model needs a first token, or a site, step, position or edit mask does not exist.
    """
    if sampler.needs_diffusion and model.diffusion is None:
        raise UserError(f"{type(sampler).__name__} needs a diffusion model; this one is autoregressive: use ARSampler")
    if not sampler.needs_diffusion and model.diffusion is not None:
        raise UserError(f"{type(sampler).__name__} needs an autoregressive model; this one diffuses: use LLaDASampler or DreamSampler")
    if key is None and sampler.needs_key:
        raise UserError(f"{type(sampler).__name__} with these settings draws random numbers: give generate a key")
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
    for edit in edits:
        covered = None if edit.mask is None else jnp.shape(edit.mask)[-1]
        if covered not in (None, 1, given + sampler.length):
            raise UserError(f"edit at {edit.site}: its positions are {covered}, prompt and response have {given + sampler.length} tokens")
    fills_prompt = _check_values(model, prompt, attention_mask)

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
    """The compiled part of ``generate``: a scan over the steps."""
    rows, total = tokens.shape
    n_steps = sampler.n_steps
    mask_id = model.diffusion.mask_id if sampler.needs_diffusion else None
    unknown = tokens == mask_id if sampler.needs_diffusion else jnp.broadcast_to(jnp.arange(total) >= given, tokens.shape)
    if attention_mask is not None:
        attention_mask = jnp.concatenate([attention_mask, jnp.ones((rows, total - given), bool)], axis=1)
    position_ids = None
    if attention_mask is not None and not isinstance(sampler, LLaDASampler):  # LLaDA counts padding, the others do not
        position_ids = jnp.maximum(jnp.cumsum(attention_mask, axis=1) - 1, 0)

    steps = range(n_steps) if collect.steps is None else collect.steps
    slot = np.full(n_steps, len(steps), np.int32)
    slot[list(steps)] = np.arange(len(steps))

    def forward(x: Array, window: Array, edits: tuple[Edit, ...], sites: tuple[str, ...]) -> tuple[Array, dict]:
        source = jnp.maximum(window - 1, 0) if predicts_next(model) else window  # as align_logits has it
        out = model.apply(
            params,
            x,
            attention_mask=attention_mask,
            position_ids=position_ids,
            logits=jnp.broadcast_to(source, (rows, source.shape[0])),
            collect=sites,
            edits=edits,
        )
        return out.logits.astype(jnp.float32), out.taps

    def pick(tap: Array) -> Array:
        return tap if collect.positions is None else tap[:, np.array(collect.positions)]

    def one_step(carry: dict, step: Array) -> tuple[dict, Array]:
        x, masked = carry["tokens"], carry["masked"]
        window = jnp.arange(0 if fills_prompt else given, total) if sampler.needs_diffusion else given + step[None]
        now = tuple(edit.at_step(step, n_steps, prompt=~unknown, masked=masked, just_committed=carry["just_committed"]) for edit in edits)
        logits, taps = forward(x, window, now, collect.sites)
        if sampler.cfg_scale > 0:
            without, _ = forward(jnp.where(unknown, x, mask_id), window, now, ())
            logits = without + (sampler.cfg_scale + 1.0) * (logits - without)

        chosen, write, confidence = sampler.propose(step, logits, masked[:, window], window - given, jax.random.fold_in(key, step))
        chosen = chosen.astype(x.dtype)
        committed = write & (chosen != mask_id) if sampler.needs_diffusion else write
        place = lambda whole, part, where: whole.at[:, window].set(jnp.where(where, part, whole[:, window]))  # noqa: E731
        tokens = place(x, chosen, write)
        just_committed = place(jnp.zeros_like(masked), True, committed)
        keep = lambda buffer, tap: jax.lax.dynamic_update_index_in_dim(buffer, pick(tap), jnp.asarray(slot)[step], 0)  # noqa: E731
        return {
            "tokens": tokens,
            "masked": masked & ~just_committed,
            "just_committed": just_committed,
            "commit_step": place(carry["commit_step"], step, committed),
            "confidence": place(carry["confidence"], confidence, committed),
            "taps": jax.tree.map(keep, carry["taps"], taps),
        }, x

    shapes = jax.eval_shape(lambda: jax.tree.map(pick, forward(tokens, jnp.arange(1), (), collect.sites)[1]))
    carry = {
        "tokens": tokens,
        "masked": unknown,
        "just_committed": jnp.zeros_like(unknown),
        "commit_step": jnp.where(unknown, jnp.int32(n_steps), jnp.int32(-1)),
        "confidence": jnp.zeros(tokens.shape, jnp.float32),
        "taps": jax.tree.map(lambda tap: jnp.zeros((len(steps) + 1, *tap.shape), tap.dtype), shapes),
    }
    carry, history = jax.lax.scan(one_step, carry, jnp.arange(n_steps, dtype=jnp.int32))
    return Trace(
        tokens=carry["tokens"],
        history=jnp.concatenate([history, carry["tokens"][None]]),
        commit_step=carry["commit_step"],
        confidence=carry["confidence"],
        taps=jax.tree.map(lambda buffer: buffer[:-1], carry["taps"]),
    )


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
            raise UserError("generate: prompts are padded on the left: each row of attention_mask must be False first, then True")
    if model.diffusion is None:
        return False
    masks = values == model.diffusion.mask_id
    if model.diffusion.shift:
        first = 0 if attention_mask is None else np.asarray(attention_mask).argmax(axis=1)
        if masks[np.arange(len(masks)), first].any():
            raise UserError("generate: the prompt begins with the mask, and this model predicts a token from the one before it")
    return bool(masks.any())
