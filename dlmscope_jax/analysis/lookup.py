"""From a text to its latents, and from a word to latents."""

import collections
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dlmscope_jax.data import Tokenizer, load_tokenizer
from dlmscope_jax.dictionaries import RowSparse
from dlmscope_jax.diffusion import corrupt
from dlmscope_jax.errors import UserError
from dlmscope_jax.models import canonical_site, model_identity, parse_site, site_rows

from .match import Dictionary, check_match, raw
from .records import FeatureRecord

VERSION = 1


def latents_for(
    model: Any,
    params: dict,
    dictionary: Dictionary,
    text: str,
    rate: float = 0.0,
    seed: int = 0,
    top: int = 20,
    *,
    tokenizer: Tokenizer | None = None,
    force: bool = False,
) -> dict:
    """The latents of a text, token by token, as the model reads it at a corruption rate.

    Args:
      model, params: the language model.
      dictionary: ``(spec, params, meta)`` of that model.
      text: the text; the tokenizer's own special tokens are put around it, and a mask spelled out in it is a mask.
      rate: corruption rate; an exact share of the tokens is masked. 0 for an autoregressive model.
      seed: of the masks.
      top: latents given for each token (at most those that fire), and for the whole text; the largest in size, with their sign.
      tokenizer: default the one of ``meta.model``, if the dictionary's card names one that can be loaded.
      force: go on in spite of a mismatch.

    Returns:
      A dict for ``json``: ``tokens`` [T] as read, ``original`` [T], ``is_masked`` [T], ``pieces`` and ``original_pieces`` [T],
      ``active`` [T] lists of ``[latent, activation]``, largest first, and ``latents``: ``{latent, max, position, tokens}``
      over the text.

    Raises:
      UserError: an empty text, a rate outside [0, 1] or for an autoregressive model, a mismatch, no tokenizer.
    """
    if not 0 <= rate <= 1 or (rate and model.diffusion is None):
        raise UserError(f"latents_for: rate {rate}: it must lie in [0, 1], and be 0 for an autoregressive model")
    tokenizer = _tokenizer_of(dictionary[2]) if tokenizer is None else tokenizer
    check_match(dictionary, model=model, identity=model_identity(model, params), tokenizer=tokenizer, force=force)
    spec, weights, meta = raw(dictionary)
    (ids,) = tokenizer.encode([text], special=True)
    if not ids:
        raise UserError("latents_for: the text is empty")
    original = jnp.asarray([ids], jnp.int32)
    tokens, is_masked = original, jnp.zeros(original.shape, bool)
    if rate:
        tokens, _ = corrupt(jax.random.key(seed), original, rate, model.diffusion, exact=True)
    if model.diffusion is not None:
        is_masked = tokens == model.diffusion.mask_id
    site = canonical_site(meta.site, model.config)
    name, layer = parse_site(site, model.config)
    x = site_rows(model.apply(params, tokens, logits=False, collect=(site,)).taps[name][layer])
    values, indices = (np.asarray(a) for a in _largest(spec, weights, x[0].astype(jnp.float32), min(top, spec.width)))
    active = [[[int(i), round(float(v), 5)] for v, i in zip(*row, strict=True) if v != 0] for row in zip(values, indices, strict=True)]
    fired = sorted((-abs(value), position, int(latent), value) for position, row in enumerate(active) for latent, value in row)
    tokens_of = collections.Counter(latent for _, _, latent, _ in fired)
    strongest: dict[int, dict[str, Any]] = {}
    for _, position, latent, value in fired:
        strongest.setdefault(latent, {"latent": latent, "max": value, "position": position, "tokens": tokens_of[latent]})
    read = np.asarray(tokens)[0].tolist()
    return {
        "kind": "latents_for", "version": VERSION, "model": meta.model, "site": site, "rate": float(rate), "seed": seed,
        "tokens": read, "original": list(ids), "is_masked": np.asarray(is_masked)[0].astype(int).tolist(),
        "pieces": tokenizer.pieces(read), "original_pieces": tokenizer.pieces(ids), "active": active,
        "latents": list(strongest.values())[:top],
    }  # fmt: skip


@functools.partial(jax.jit, static_argnames=("spec", "top"))
def _largest(spec: Any, params: Any, x: Float[Array, "T D"], top: int) -> tuple[Float[Array, "T top"], Int[Array, "T top"]]:
    codes = spec.encode(params, x)
    if isinstance(codes, RowSparse):
        _, order = jax.lax.top_k(jnp.abs(codes.values), min(top, codes.values.shape[-1]))
        return tuple(jnp.take_along_axis(part, order, axis=-1) for part in (codes.values, codes.indices))
    values = spec.dense(codes).astype(jnp.float32)
    _, order = jax.lax.top_k(jnp.abs(values), top)
    return jnp.take_along_axis(values, order, axis=-1), order


def _tokenizer_of(meta: Any) -> Tokenizer:
    try:
        return load_tokenizer(meta.model)
    except (UserError, OSError) as error:
        raise UserError(f"latents_for: no tokenizer for {meta.model!r} ({error}); give tokenizer=") from None


def find_latents(records: list[FeatureRecord], query: str, top: int = 20) -> list[dict]:
    """Latents that have to do with a word: in their descriptions, enriched tokens, windows or logit lens. Works without descriptions.

    A token matches if, without surrounding spaces and case, it equals a word of the query (1), or one of the two contains the other and the
    shorter has at least 3 letters (0.5). Evidence adds up: a description 4; the best enriched token 3, less for later ones;
    the share of top windows that peak on a match 2; the share that contains one anywhere 0.5; the logit lens 1, less for later ones.

    Args:
      records: as ``collect_records`` or ``read_records`` give them; their ``pieces`` must be there.
      query: one or more words.
      top: how many to return.

    Returns:
      ``{model, site, latent, score, why}``, best first; ``why`` says in words what matched. Latents without a match are left out.

    Raises:
      UserError: an empty query, or records without the text of their tokens.
    """
    words = query.lower().split()
    if not words:
        raise UserError("find_latents: the query is empty; give a word")
    if any(record.windows and not record.pieces for record in records):
        raise UserError("find_latents: these records hold token ids only; collect them with a tokenizer")
    found: list[dict[str, Any]] = []
    for record in records:
        evidence = _evidence(record, words)
        if evidence:
            score = round(sum(weight for weight, _ in evidence), 4)
            why = [text for _, text in sorted(evidence, reverse=True)]
            found.append({"model": record.model, "site": record.site, "latent": record.latent, "score": score, "why": why})
    return sorted(found, key=lambda f: (-f["score"], f["site"], f["latent"]))[:top]


def _evidence(record: FeatureRecord, words: list[str]) -> list[tuple[float, str]]:
    match = {token: max(_likeness(text, word) for word in words) for token, text in record.pieces.items()}
    text = lambda token: repr(record.pieces[token])  # noqa: E731
    found = []
    if record.description and any(word in record.description.lower() for word in words):
        found.append((4.0, f"description: {record.description}"))
    listed = {
        "enriched where it fires": (3.0, [int(entry[0]) for entry in record.enriched]),
        "raised by the logit lens": (1.0, [int(token) for token, _ in record.logit_lens.get("top", ())]),
    }
    for what, (weight, tokens) in listed.items():
        scores = [(weight * match.get(token, 0) / (1 + 0.2 * rank), token) for rank, token in enumerate(tokens)]
        best = max(scores, default=(0.0, -1))
        if best[0] > 0:
            found.append((best[0], f"{what}: {text(best[1])}"))
    tops = [w for w in record.windows if w.group == "top"] or list(record.windows)
    if tops:
        peak = np.mean([match.get(w.original[w.peak], 0) for w in tops])
        anywhere = np.mean([max(match.get(token, 0) for token in w.original) for w in tops])
        if peak > 0:
            found.append((2.0 * float(peak), f"peaks on it in {peak:.0%} of the top windows"))
        if anywhere > 0:
            found.append((0.5 * float(anywhere), f"in {anywhere:.0%} of the top windows"))
    return found


def _likeness(piece: str, word: str) -> float:
    piece = piece.strip().lower()
    if piece == word:
        return 1.0
    short, long = sorted((piece, word), key=len)
    return 0.5 if len(short) >= 3 and short in long else 0.0
