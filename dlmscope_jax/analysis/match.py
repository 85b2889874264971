"""Whether a dictionary belongs to the model, site, tokenizer and store that it is about to be used on."""

import dataclasses
from typing import Any

from dlmscope_jax.errors import UserError
from dlmscope_jax.models import canonical_site, site_width

Dictionary = tuple[Any, Any, Any]  # (spec, params, meta), as load_dictionary returns


def raw(dictionary: Dictionary) -> Dictionary:
    """The dictionary with parameters that act on raw activations: what was trained on scaled rows is folded here, once."""
    spec, params, meta = dictionary
    if getattr(meta, "scale_folded", True):
        return spec, params, meta
    out_scale = (_extra(meta).get("transcoder") or {}).get("output_scale")
    return spec, spec.fold(params, meta.input_scale, out_scale), dataclasses.replace(meta, scale_folded=True)


def place(site: str, config: Any = None) -> str:
    """The one spelling of a site. Without a model at hand, rows that no model made (``"rows@0"``) keep the name that they have.

    Raises:
      UserError: a site that the model ``config`` does not have.
    """
    try:
        return canonical_site(site, config)
    except UserError:
        if config is not None:
            raise
        return site


def is_transcoder(spec: Any) -> bool:
    """Whether a dictionary writes something else than what it reads."""
    return getattr(spec, "d_out", None) is not None


def written_site(dictionary: Dictionary, config: Any = None) -> str:
    """Where a dictionary writes: the site that it reads, or a transcoder's target as its card states it.

    Raises:
      UserError: a transcoder whose card does not say.
    """
    spec, _, meta = dictionary
    if not is_transcoder(spec):
        return place(meta.site, config)
    target = getattr(meta, "target", None) or _extra(meta).get("target") or (_extra(meta).get("training") or {}).get("target")
    if not target:
        raise UserError(f"dictionary for {meta.site}: a transcoder whose card does not say what it writes: set meta.extra['target']")
    return place(target, config)


def output_width(spec: Any) -> int:
    """Width of the rows that a dictionary writes."""
    return spec.d_out if is_transcoder(spec) else spec.d_in


def stored_as(store: Any, site: str) -> str:
    """The name under which a store holds a site."""
    return next(name for name in store.sites if place(name) == place(site))


def _extra(meta: Any) -> dict[str, Any]:
    return getattr(meta, "extra", None) or {}


def check_match(
    dictionary: Dictionary,
    *,
    model: Any = None,
    identity: str | None = None,
    store: Any = None,
    tokenizer: Any = None,
    site: str | None = None,
    force: bool = False,
) -> tuple[str, ...]:
    """Compares a dictionary's card with what it is used on.

    What either side does not state (a released dictionary knows no model hash) is not compared.

    Args:
      dictionary: ``(spec, params, meta)``.
      model: the language model, for the width of the site and whether its weights are raw or folded.
      identity: ``model_identity(model, params)`` of the model at hand.
      store: an activation store; its ``sites`` and ``meta`` are compared.
      tokenizer: a tokenizer with ``digest``.
      site: the site of use; default the dictionary's own.
      force: return the mismatches instead of raising; a wrong width raises all the same.

    Returns:
      The mismatches that were forced, as sentences; empty where everything agrees.

    Raises:
      UserError: on a mismatch without ``force``, or a width that cannot work.
    """
    spec, _, meta = dictionary
    config = None if model is None else model.config
    site, trained = place(site or meta.site, config), place(meta.site, config)
    ends = {site: spec.d_in} | ({written_site(dictionary, config): spec.d_out} if is_transcoder(spec) else {})
    found = []
    if site != trained:
        found.append(f"it was trained at {meta.site}, not {site}")
    for end, width in ends.items() if model is not None else ():
        if site_width(end, model.config) != width:
            raise UserError(f"dictionary for {meta.site}: width {width}, but {end} of this model has {site_width(end, model.config)}")
    if model is not None and meta.weight_processing and model.config.weight_processing != meta.weight_processing:
        found.append(f"it was trained on {meta.weight_processing} weights, this model has {model.config.weight_processing} ones")
    if identity and meta.model_identity and identity != meta.model_identity:
        found.append(f"it was trained on the model {meta.model} ({meta.model_identity}), not on this one ({identity})")
    if store is not None:
        widths = {place(name): width for name, width in dict(store.sites).items()}
        for end, width in ends.items():
            if end not in widths:
                raise UserError(f"dictionary for {meta.site}: the store has no site {end}; it has {', '.join(widths)}")
            if widths[end] != width:
                raise UserError(f"dictionary for {meta.site}: width {width}, but {end} in the store has {widths[end]}")
        theirs = store.meta.get("model_identity")
        if theirs and meta.model_identity and theirs != meta.model_identity:
            found.append(f"it was trained on the model {meta.model} ({meta.model_identity}), the store was written by {theirs}")
        theirs = store.meta.get("weight_processing")
        if theirs and meta.weight_processing and theirs != meta.weight_processing:
            found.append(f"it was trained on {meta.weight_processing} weights, the store holds activations of {theirs} ones")
        theirs = store.meta.get("tokenizer")
        if theirs and meta.tokenizer and theirs != meta.tokenizer:
            found.append(f"its tokenizer {meta.tokenizer[:12]} is not the store's {theirs[:12]}")
    if tokenizer is not None and meta.tokenizer and tokenizer.digest != meta.tokenizer:
        found.append(f"its tokenizer {meta.tokenizer[:12]} is not the given one {tokenizer.digest[:12]}")
    if found and not force:
        raise UserError(f"dictionary for {meta.site}: " + "; ".join(found) + " (force=True uses it all the same)")
    return tuple(found)
