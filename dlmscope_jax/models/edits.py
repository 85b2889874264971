"""Edits: changes to activations as values that travel through ``jit``.

Every kind is written as ``x + mask * strength * delta(x)``, so that strength 0 or an empty mask leaves the model's
computation as it was, and strengths, values, layers and masks never cause a new compilation; only the kind and the
site do. ``clamp_code`` and ``ablate_code`` move ``x`` along one decoder row and thereby keep the reconstruction error;
``replace_by_dictionary`` drops it.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float

from dlmscope_jax.errors import UserError

from .config import ModelConfig
from .sites import BLOCK_SITES, FINAL_SITES, ambiguous, parse_site, site_rows, sites_of

KINDS = ("add", "set", "scale", "project_out", "clamp_code", "ablate_code", "replace_by_dictionary")
DICTIONARY_KINDS = KINDS[4:]
POSITIONS = ("all", "prompt", "response", "masked", "just_committed", "masked_prev")


def _is_rule(value: Any) -> bool:
    """Whether an ``add`` value computes itself from the activation; arrays have an ``at`` of another meaning."""
    return callable(getattr(value, "at", None)) and not isinstance(value, jax.Array)


@struct.dataclass
class InDictionary:
    """The value of a dictionary edit: a dictionary and, for the code edits, which latent to set to what.

    Attributes:
      spec: the dictionary's static description (``encode``, ``decode``, ``direction``).
      params: its parameters.
      latent: index of the latent, a scalar; None for ``replace_by_dictionary``.
      target: the activation that ``clamp_code`` sets, a scalar in units of the codes.
    """

    spec: Any = struct.field(pytree_node=False)
    params: Any
    latent: Any = None
    target: Any = 0.0


@struct.dataclass
class Edit:
    """One change to one site of a model, as a pytree.

    Attributes:
      kind: one of ``KINDS`` (static).
      site: where it writes, ``"mlp_out@3"``; the layer is split off into ``layer``, which is data.
      value: ``add``: a vector [D], an array [B, T, D] or an object with ``at(x)``; ``set``, ``scale``: an array that
        broadcasts against the site's activations (``set`` holds an ``attn_pattern`` or a norm's scale fixed);
        ``project_out``: a direction [D]; dictionary kinds: an ``InDictionary``. For dictionaries, rules and values that are
        as wide as all heads together, the heads of a per-head site stand one after the other.
      strength: multiplies the change; scalar or [B].
      positions: one of ``POSITIONS`` (static), or a boolean array [B, T]; of ``attn_pattern`` they are the queries.
      schedule: ``"constant"`` or a float array [S], one factor a denoising step.
      read_site: what a dictionary edit encodes, where it differs from ``site`` (a transcoder reads ``mlp_in`` and
        writes ``mlp_out`` of the same layer).
    """

    kind: str = struct.field(pytree_node=False)
    site: str = struct.field(pytree_node=False)
    value: Any
    strength: Any = 1.0
    positions: str = struct.field(pytree_node=False, default="all")
    schedule: Any = None
    read_site: str | None = struct.field(pytree_node=False, default=None)
    layer: Any = None
    mask: Any = None

    def __post_init__(self):
        put = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731
        # a site without its layer has been through here before: jax rebuilds pytrees from their parts
        if "@" in self.site or "." in self.site or self.site not in BLOCK_SITES and self.layer is None and self.value is not None:
            if (meanings := ambiguous(self.site)) is not None:
                raise UserError(f"edit: site {self.site!r} means {meanings} depending on the model: write the one that is meant")
            name, layer = parse_site(self.site)
            put("site", name)
            put("layer", jnp.int32(layer))
            if self.kind not in KINDS:
                raise UserError(f"edit: kind {self.kind!r} is not known: one of {', '.join(KINDS)}")
            if (self.kind in DICTIONARY_KINDS) != isinstance(self.value, InDictionary):
                wanted = "an InDictionary" if self.kind in DICTIONARY_KINDS else "an array"
                raise UserError(f"edit: kind {self.kind!r} takes {wanted} as value")
            if self.kind in DICTIONARY_KINDS and "attn_pattern" in (name, self.read_site and parse_site(self.read_site)[0]):
                raise UserError(f"edit: {self.kind!r} at attn_pattern: its rows are as long as the text, a dictionary's are not")
            if self.read_site is not None:
                read, read_layer = parse_site(self.read_site)
                order = [*BLOCK_SITES, *FINAL_SITES]
                if read_layer != layer or order.index(read) > order.index(name) or (name in FINAL_SITES and read != name):
                    raise UserError(f"edit: cannot read {self.read_site!r} when writing {name}@{layer}: read earlier in the same block")
                put("read_site", read)
            if not isinstance(self.value, InDictionary) and not _is_rule(self.value):
                put("value", jnp.asarray(self.value))
            put("strength", jnp.asarray(self.strength, jnp.float32))
        if not isinstance(self.positions, str):
            put("mask", jnp.asarray(self.positions))
            put("positions", "mask")
        elif self.positions not in (*POSITIONS, "mask"):
            raise UserError(f"edit: positions {self.positions!r} is not known: one of {', '.join(POSITIONS)}, or a boolean array")
        if isinstance(self.schedule, str):
            if self.schedule != "constant":
                raise UserError(f"edit: schedule {self.schedule!r} is not known: 'constant', or one factor a step")
            put("schedule", None)

    def at_step(
        self,
        step: Any,
        n_steps: int,
        *,
        prompt: Bool[Array, "B T"],
        masked: Bool[Array, "B T"],
        just_committed: Bool[Array, "B T"],
    ) -> "Edit":
        """The edit as it stands at one denoising step: an array of positions and the scheduled strength.

        Args:
          step: 0-based denoising step, may be traced.
          n_steps: number of steps, S.
          prompt: positions of the prompt.
          masked: positions that are masked in what the model reads at this step.
          just_committed: positions that were written at the step before.

        Raises:
          UserError: when the schedule has another length than ``n_steps``.
        """
        strength = self.strength
        if self.schedule is not None:
            if jnp.shape(self.schedule)[0] != n_steps:
                raise UserError(f"edit: the schedule has {jnp.shape(self.schedule)[0]} entries, the sampler takes {n_steps} steps")
            strength = strength * jnp.asarray(self.schedule, jnp.float32)[step]
        chosen = {
            "all": jnp.ones_like(masked),
            "prompt": prompt,
            "response": ~prompt,
            "masked": masked,
            "just_committed": just_committed,
            # a shifted model predicts masked token i at i - 1
            "masked_prev": jnp.concatenate([masked[:, 1:], jnp.zeros_like(masked[:, :1])], axis=1),
            "mask": self.mask,
        }[self.positions]
        return replace(self, strength=strength, positions="mask", mask=jnp.broadcast_to(chosen, masked.shape), schedule=None)

    def apply(self, x: Float[Array, "B T *_"], read: Float[Array, "B T *_"]) -> Float[Array, "B T *_"]:
        """``x + mask * strength * delta(x)``, with ``read`` for what a dictionary encodes."""
        if self.positions not in ("all", "mask"):
            raise UserError(f"edit: positions {self.positions!r} is resolved during generation; here give 'all' or a boolean array")
        if self._of_rows(x, read):
            return self.apply(site_rows(x), site_rows(read)).reshape(x.shape)
        factor = jnp.asarray(self.strength, jnp.float32)
        factor = factor.reshape(-1, *[1] * (x.ndim - 1)) if factor.ndim == 1 else factor
        if self.positions == "mask":
            mask = self.mask.astype(jnp.float32)
            rest = [1] * (x.ndim - 2)
            factor = factor * (mask[:, None, :, None] if self.site == "attn_pattern" else mask.reshape(*mask.shape, *rest))
        return (x.astype(jnp.float32) + factor * self._delta(x.astype(jnp.float32), read.astype(jnp.float32))).astype(x.dtype)

    def _of_rows(self, x: Array, read: Array) -> bool:
        """Whether the heads of a per-head site are to be laid side by side first."""
        if 4 not in (x.ndim, read.ndim) or self.site == "attn_pattern":
            return False
        whole = x.shape[2] * x.shape[3] if x.ndim == 4 else None
        return isinstance(self.value, InDictionary) or _is_rule(self.value) or jnp.shape(self.value)[-1:] == (whole,) != x.shape[3:]

    @property
    def place(self) -> str:
        """Where it writes, as a site: ``"mlp_out@3"``. The layer must be known, not traced."""
        return self.site if self.site in FINAL_SITES else f"{self.site}@{int(self.layer)}"

    def _delta(self, x: Array, read: Array) -> Array:
        value = self.value
        if self.kind == "add":
            return value.at(x).astype(jnp.float32) if _is_rule(value) else jnp.asarray(value, jnp.float32)
        if self.kind == "set":
            return jnp.asarray(value, jnp.float32) - x
        if self.kind == "scale":
            return (jnp.asarray(value, jnp.float32) - 1.0) * x
        if self.kind == "project_out":
            unit = jnp.asarray(value, jnp.float32)
            unit = unit / jnp.linalg.norm(unit)
            return -jnp.einsum("...d,d->...", x, unit, precision=jax.lax.Precision.HIGHEST)[..., None] * unit
        spec, params = value.spec, value.params
        codes = spec.encode(params, read)
        if self.kind == "replace_by_dictionary":
            return spec.decode(params, codes, x=read) - x
        target = value.target if self.kind == "clamp_code" else 0.0
        change = jnp.asarray(target, jnp.float32) - codes.latent(value.latent)
        return change[..., None] * spec.direction(params, value.latent).astype(jnp.float32)


def check_edits(edits: tuple[Edit, ...], config: ModelConfig) -> None:
    """Raises ``UserError`` for an edit that would never be reached: of a site that the model lacks, or past its layers."""
    for edit in edits:
        for name in (edit.site, edit.read_site or edit.site):
            if name not in (*sites_of(config), *FINAL_SITES):
                raise UserError(f"edit: this model ({config.family}) has no {name}; it has {', '.join(sites_of(config))}")
        if edit.site not in FINAL_SITES and not isinstance(edit.layer, jax.core.Tracer):
            if (np.asarray(edit.layer) >= config.n_layers).any():
                raise UserError(f"edit at {edit.place}: this model has layers 0 to {config.n_layers - 1}")


def apply_edits(edits: tuple[Edit, ...], name: str, layer: Array, x: Array, seen: dict[str, Array]) -> Array:
    """Applies the edits of one site inside the layer loop.

    A ``cond`` on the layer, not a ``where``: the dictionary of an edit runs once, not once a layer.

    Args:
      edits: all edits of the call.
      name: the site that ``x`` is at.
      layer: the layer of the loop, traced.
      x: [B, T, D].
      seen: the values of the sites that this block has passed, for edits that read elsewhere.
    """
    for edit in edits:
        if edit.site == name:
            read = seen[edit.read_site] if edit.read_site else x
            x = jax.lax.cond(layer == edit.layer, edit.apply, lambda x, read: x, x, read)
    return x
