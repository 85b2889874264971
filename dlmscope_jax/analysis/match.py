"""Whether a dictionary belongs to the model, site, tokenizer and store that it is about to be used on."""

import dataclasses
from typing import Any

from dlmscope_jax.errors import UserError
from dlmscope_jax.models import canonical_site, site_width

Dictionary = tuple[Any, Any, Any]  # (spec, params, meta), as load_dictionary returns


def raw(dictionary: Dictionary) -> Dictionary:
    """The dictionary with parameters that act on raw activations: what was trained on scaled rows is folded here, once.

    Raises:
      UserError: for a transcoder, which does not reconstruct what it reads.
    """
    spec, params, meta = dictionary
    if getattr(spec, "d_out", None) not in (None, spec.d_in):
        raise UserError(f"dictionary for {meta.site}: it is a transcoder ({spec.d_in} to {spec.d_out}); this needs an autoencoder")
    if getattr(meta, "scale_folded", True):
        return spec, params, meta
    return spec, spec.fold(params, meta.input_scale), dataclasses.replace(meta, scale_folded=True)


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
    site, trained = canonical_site(site or meta.site, config), canonical_site(meta.site, config)
    found = []
    if site != trained:
        found.append(f"it was trained at {meta.site}, not {site}")
    if model is not None and site_width(site, model.config) != spec.d_in:
        raise UserError(f"dictionary for {meta.site}: width {spec.d_in}, but {site} of this model has {site_width(site, model.config)}")
    if model is not None and meta.weight_processing and model.config.weight_processing != meta.weight_processing:
        found.append(f"it was trained on {meta.weight_processing} weights, this model has {model.config.weight_processing} ones")
    if identity and meta.model_identity and identity != meta.model_identity:
        found.append(f"it was trained on the model {meta.model} ({meta.model_identity}), not on this one ({identity})")
    if store is not None:
        widths = {canonical_site(name): width for name, width in dict(store.sites).items()}
        if site not in widths:
            raise UserError(f"dictionary for {meta.site}: the store has no site {site}; it has {', '.join(widths)}")
        if widths[site] != spec.d_in:
            raise UserError(f"dictionary for {meta.site}: width {spec.d_in}, but {site} in the store has {widths[site]}")
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
