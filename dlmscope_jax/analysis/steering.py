"""Steering: adding a latent's decoder direction while a model runs, and what a generation looks like with and without it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from dlmscope_jax.diffusion import generate
from dlmscope_jax.errors import UserError
from dlmscope_jax.models import Edit, canonical_site, site_rows
from dlmscope_jax.models.sites import FINAL_SITES

from .match import is_transcoder, raw

SCALES = ("row_max", "corpus_max", "unit", "resid_norm")
VERSION = 1


@struct.dataclass
class RowMax:
    """DLM-Scope's step (arXiv 2602.05859, Eq. 13): ``m v_f``, with ``m`` read off the activation at hand.

    ``m`` at a position is the largest activation of all latents there, not the steered latent's own. It is computed from
    the current activation each time the model passes, so a second denoising step reads its own steered input.
    Adding ``alpha m v_f`` is the same as raising the latent's code by ``alpha m``, decoding, and adding back the error.
    """

    spec: Any = struct.field(pytree_node=False)
    params: Any
    latent: Any

    def at(self, x: Float[Array, "*n D"]) -> Float[Array, "*n D"]:
        codes = self.spec.encode(self.params, x)
        largest = codes.largest()
        return largest[..., None] * self.spec.direction(self.params, self.latent).astype(jnp.float32)


@struct.dataclass
class ResidualShare:
    """A unit direction times the norm of the activation at hand: strength is then ``||dh|| / ||h||``."""

    direction: Any

    def at(self, x: Float[Array, "*n D"]) -> Float[Array, "*n D"]:
        return jnp.linalg.norm(x.astype(jnp.float32), axis=-1, keepdims=True) * self.direction


def steer(
    spec: Any,
    params: Any,
    latent: int,
    site: str,
    strength: float,
    scale: str = "row_max",
    *,
    maximum: float | None = None,
    positions: Any = "all",
    schedule: Any = "constant",
) -> Edit:
    """An edit that adds a latent's decoder row ``v``; strength, latent and dictionary values never retrace.

    Args:
      spec, params: the dictionary.
      latent: its latent.
      site: where to write, ``"resid_post@3"``; for a transcoder what it writes, ``"mlp_out@3"``.
      strength: alpha; negative steers away.
      scale: what alpha multiplies. ``"row_max"``: ``m v`` with ``m`` the largest activation of all latents at that
        position (the paper's rule); ``"corpus_max"``: ``maximum * v``; ``"unit"``: ``v / ||v||``;
        ``"resid_norm"``: ``||h|| v / ||v||``.
      maximum: the latent's largest activation over a named corpus (``FeatureRecord.max_activation``), for ``corpus_max``.
      positions, schedule: as in ``Edit``. In a shifted model the token at i is predicted at i - 1, so ``"masked_prev"``
        is what ``"masked"`` is elsewhere.

    Raises:
      UserError: for an unknown scale, a latent outside the dictionary, ``corpus_max`` without a maximum, or ``row_max`` with a
        transcoder, whose activations cannot be read off what it writes.
    """
    if scale not in SCALES:
        raise UserError(f"steer: scale {scale!r} is not known: one of {', '.join(SCALES)}")
    if not 0 <= int(latent) < spec.width:
        raise UserError(f"steer: latent {latent} is not in this dictionary (0 to {spec.width - 1})")
    if scale == "row_max" and is_transcoder(spec):
        raise UserError("steer: scale 'row_max' reads activations where it writes, a transcoder reads elsewhere: use corpus_max or unit")
    latent = jnp.int32(latent)
    direction = spec.direction(params, latent).astype(jnp.float32)
    unit = direction / jnp.linalg.norm(direction)
    if scale == "corpus_max" and maximum is None:
        raise UserError("steer: scale 'corpus_max' needs maximum=, the latent's largest activation (FeatureRecord.max_activation)")
    value = {
        "row_max": RowMax(spec, params, latent),
        "corpus_max": direction * (1.0 if maximum is None else maximum),
        "unit": unit,
        "resid_norm": ResidualShare(unit),
    }[scale]
    return Edit("add", site, value, strength=strength, positions=positions, schedule=schedule)


def steered_generation(
    model: Any,
    params: dict,
    prompt: Int[Array, "1 P"],
    sampler: Any,
    edit: Edit,
    dictionary: Any,
    latent: int,
    *,
    key: Array | None = None,
    tokenizer: Any = None,
) -> dict:
    """Generates the same prompt with and without an edit, under the same random numbers, step by step.

    Args:
      model, params: the language model.
      prompt: one row of prompt ids.
      sampler: any sampler of ``generate``, without a cache that makes its run ``approximate`` (see ``Trace``).
      edit: as ``steer`` makes it.
      dictionary: ``(spec, params, meta)``, in which the latent's activation is followed.
      latent: the latent that is followed.
      key: of the sampler, the same for both runs.
      tokenizer: gives the pieces to show; without it only ids are returned.

    Returns:
      A dict for ``json``. ``plain`` and ``steered`` each hold ``history`` [S+1][L] (entry s is what step s read, entry S the
      result), ``commit_step`` [L] (-1 prompt, S never, or after the row's end), ``confidence`` [L] at commit and
      ``activation`` [R][L] (the latent as each step found it, before that step's own edit; 0 where an autoregressive model
      has no token yet). R <= S is the number of steps that this side ran until it was done; from entry R on its history
      is the result. ``relative_size`` [R of the steered side] is the median ``||dh|| / ||h||`` over the positions that the
      edit changed, ``dose`` its sum over steps. ``pieces`` maps ids to text.

    Raises:
      UserError: when the prompt is not one row, or a run is approximate, so that its activations are not those of
        passes over the texts that it read; what the sampler and the model raise.
    """
    if prompt.ndim != 2 or prompt.shape[0] != 1:
        raise UserError(f"steered_generation: the prompt has shape {tuple(prompt.shape)}; give one row, [1, P]")
    spec, weights, meta = raw(dictionary)
    read, written = canonical_site(meta.site, model.config), edit.place
    seen: set[int] = set()
    out: dict[str, Any] = {}
    for name, edits in (("plain", ()), ("steered", (edit,))):
        trace = generate(model, params, prompt, sampler, key=key, edits=edits)
        if trace.approximate:
            who = type(sampler).__name__
            raise UserError(f"steered_generation: {who} reads other activations than the text's with this cache: use cache='none'")
        history, commit, ran = jnp.asarray(trace.history)[:, 0], jnp.asarray(trace.commit_step)[0], _steps_run(trace, sampler)
        taps = _replay(model, params, history[:-1], tuple({read, written}))
        there = jnp.ones(history[:-1].shape, bool) if sampler.needs_diffusion else commit < jnp.arange(sampler.n_steps)[:, None]
        activation = jnp.where(there, _follow(spec, weights, taps[read], jnp.int32(latent)), 0.0)
        out[name] = {
            "history": history.tolist(),
            "commit_step": commit.tolist(),
            "confidence": [float(c) if np.isfinite(c) else None for c in np.asarray(trace.confidence, np.float32)[0]],
            "activation": np.asarray(activation[:ran], np.float64).round(5).tolist(),
        }
        if edits:
            sizes = _relative_sizes(edit, taps[written], commit, there)[:ran]
            out["relative_size"], out["dose"] = sizes, float(np.sum(sizes))
        seen |= set(np.asarray(history).reshape(-1).tolist())
    ids = sorted(seen)
    return {
        "kind": "steered_generation",
        "version": VERSION,
        "latent": int(latent),
        "site": written,
        "strength": float(jnp.max(edit.strength)),
        "prompt_length": int(prompt.shape[1]),
        "steps": len(out["plain"]["history"]) - 1,
        "mask_id": None if model.diffusion is None else model.diffusion.mask_id,
        "pieces": {} if tokenizer is None else dict(zip(map(str, ids), tokenizer.pieces(ids), strict=True)),
        **out,
    }


def _steps_run(trace: Any, sampler: Any) -> int:
    """Steps until the row was done. One that used the last logits again counts: the pass it left out gives the same."""
    if not sampler.reuses_logits:
        return int(trace.forwards) // (1 + (sampler.cfg_scale > 0))
    last = int(np.asarray(trace.commit_step).max())  # such samplers go on until nothing is unknown, S where something stays so
    return min(last + 1, sampler.n_steps)


@functools.partial(jax.jit, static_argnames=("model", "collect"))
def _replay(model: Any, params: dict, states: Int[Array, "S L"], collect: tuple[str, ...]) -> dict[str, Float[Array, "S L D"]]:
    """Activations that each step had before its edit: the states run again, all at once, without edits."""
    taps = model.apply(params, states, logits=False, collect=collect).taps
    place = lambda name, layer: name if name in FINAL_SITES else f"{name}@{layer}"  # noqa: E731
    return {place(name, layer): site_rows(x).astype(jnp.float32) for name, layers in taps.items() for layer, x in layers.items()}


@functools.partial(jax.jit, static_argnames="spec")
def _follow(spec: Any, weights: Any, x: Float[Array, "S L D"], latent: Int[Array, ""]) -> Float[Array, "S L"]:
    return spec.encode(weights, x).latent(latent)


@jax.jit
def _changes(edit: Edit, x: Float[Array, "S L D"], commit: Int[Array, " L"]) -> Float[Array, "S L"]:
    """``||dh|| / ||h||`` at every step and position, with the positions that the edit had at that step."""
    given = commit[None] == -1

    def one(step: Array, x: Array) -> Array:
        unknown, fresh = (commit >= step)[None], (commit == step - 1)[None] & ~given
        now = edit.at_step(step, n_steps, prompt=given, masked=unknown, just_committed=fresh)
        change = now.apply(x[None], x[None])[0] - x
        return jnp.linalg.norm(change, axis=-1) / jnp.maximum(jnp.linalg.norm(x, axis=-1), 1e-12)

    n_steps = x.shape[0]
    return jax.vmap(one)(jnp.arange(n_steps), x)


def _relative_sizes(edit: Edit, x: Array, commit: Array, there: Array) -> list[float]:
    changes = np.where(there, _changes(edit, x, commit), 0.0)
    return [float(np.median(row[row > 0])) if (row > 0).any() else 0.0 for row in changes]
