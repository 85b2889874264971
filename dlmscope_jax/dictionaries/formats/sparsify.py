"""EleutherAI's sparsify: a hookpoint's folder with ``cfg.json`` and ``sae.safetensors``, below the ``config.json`` of its run.

Semantics as measured on the library (reference/sae_libraries.md 2.2, 8): linear encoder, ReLU, top-k (or the largest of each of k runs of
neighbours, "groupmax"); ``b_dec`` is subtracted before encoding exactly where ``transcode`` is false; the skip sees the raw row either way.
``signed`` of old configurations keeps the k largest in size with their sign; the library of today ignores it.
"""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from dlmscope_jax.errors import UserError

from ..files import write_whole
from ..meta import DictionaryMeta
from ..topk import TopK
from . import cards, folding, hooks
from .native import check_shapes
from .tensors import open_safetensors, to_jax

CONFIG, WEIGHTS, RUN = "cfg.json", "sae.safetensors", "config.json"
FILES = (CONFIG, WEIGHTS, f"../{RUN}", f"../../{RUN}")
_NAMES = {"W_enc": "encoder.weight", "b_enc": "encoder.bias"}


def recognises(folder: Path, files: frozenset[str], config: Any) -> bool:
    """Whether ``files`` has sparsify's weights and ``config`` is that of a sparse coder."""
    return WEIGHTS in files and isinstance(config, dict) and "d_in" in config and "format" not in config


def load(folder: Path, files: frozenset[str], config: dict) -> tuple[TopK, dict, DictionaryMeta]:
    """Reads one hookpoint's folder: ``(spec, params, meta)``, parameters float32 that act on raw activations.

    An autoencoder with a skip becomes a transcoder of equal widths whose ``b_in`` is ``b_dec``.

    Raises:
      UserError: sizes that contradict each other, an activation that is not known, tensors missing, unexpected or misshapen.
    """
    where = folder / CONFIG
    with open_safetensors(folder / WEIGHTS) as tensors:
        spec = _spec(where, config, *tensors.matrix(_NAMES["W_enc"]))
        params = tensors.params(replace(spec, input_bias=False), _NAMES)
    if spec.input_bias:
        params["b_in"] = params["b_dec"]
    return spec, to_jax(params), _meta(folder, where, config, spec)


def save(folder: Path, spec: Any, params: dict, meta: DictionaryMeta) -> None:
    """Writes ``sae.safetensors`` and ``cfg.json`` that ``sparsify.SparseCoder.load_from_disk`` reads.

    An autoencoder's ``b_dec`` that is not subtracted, and a transcoder's ``b_in``, go into ``encoder.bias``. ``multi_topk`` is written as
    false: with it the library's ``forward`` returns what 4 k latents reconstruct.

    Raises:
      UserError: anything but TopK with the rule "positive" or "groups", a transcoder between rows of different widths, per-row
        normalisation; an input scale that is not folded; parameters that do not fit.
    """
    import safetensors.numpy

    wrong = None
    if type(spec) is not TopK:
        wrong = f"a {type(spec).__name__} dictionary, TopK only"
    elif spec.rule not in ("positive", "groups"):
        wrong = f"a TopK of rule {spec.rule!r}"
    elif spec.out != spec.d_in:
        wrong = f"a transcoder from {spec.d_in} to {spec.out}: both must be equal"
    elif spec.row_norm != "none":
        wrong = f"row_norm={spec.row_norm!r}"
    if wrong:
        raise UserError(f"the sparsify format cannot say {wrong}: save it as 'dlmscope'")
    arrays = folding.checked(spec, params, meta, "sparsify")
    check_shapes(str(folder), spec, {name: array.shape for name, array in arrays.items()})
    spec, arrays = folding.without_input_bias(spec, arrays)
    if not spec.transcoder:
        spec, arrays = folding.subtracting(spec, arrays, True)
    config = {
        "activation": "groupmax" if spec.rule == "groups" else "topk",
        "expansion_factor": max(1, spec.width // spec.d_in),
        "normalize_decoder": True,
        "num_latents": spec.width,
        "k": spec.k,
        "multi_topk": False,
        "skip_connection": spec.skip,
        "transcode": spec.transcoder,
        "d_in": spec.d_in,
    }
    state = {_NAMES.get(name, name): array for name, array in arrays.items()}
    card = {cards.KEY: json.dumps(cards.to_write(meta, ("config", "run", "hookpoint")))}
    write_whole(folder / WEIGHTS, lambda path: safetensors.numpy.save_file(state, str(path), metadata=card))
    write_whole(folder / CONFIG, lambda path: path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8"))


def _spec(where: Path, config: dict, width: int, d: int) -> TopK:
    """The configuration's dictionary, for an encoder of ``width`` times ``d``."""
    given = {"d_in": None, "num_latents": 0, "expansion_factor": 32, "k": 32} | config
    for name in ("d_in", "num_latents", "expansion_factor", "k"):
        if type(given[name]) is not int:
            raise UserError(f"{where}: {name} is {given[name]!r}, should be a whole number")
    if given["d_in"] != d:
        raise UserError(f"{where}: d_in is {given['d_in']}, but {WEIGHTS} has {d}")
    stated = given["num_latents"] or d * given["expansion_factor"]
    if stated != width:
        raise UserError(f"{where}: says {stated} latents, but {WEIGHTS} has {width}")
    transcode, skip, signed = (bool(config.get(name, False)) for name in ("transcode", "skip_connection", "signed"))
    activation = config.get("activation", "topk")
    if activation not in ("topk", "groupmax") or (signed and activation == "groupmax"):
        raise UserError(f"{where}: activation {activation!r}{' with signed' if signed else ''} is not read: topk or groupmax")
    rule: Any = "groups" if activation == "groupmax" else "magnitude" if signed else "positive"
    try:
        return TopK(
            d_in=d,
            width=width,
            k=given["k"],
            d_out=d if transcode or skip else None,
            skip=skip,
            input_bias=skip and not transcode,
            rule=rule,
            multi_topk=bool(config.get("multi_topk", False)) and rule == "positive",
        )
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _meta(folder: Path, where: Path, config: dict, spec: TopK) -> DictionaryMeta:
    """The card: the folder is named after the hookpoint (a seed's folder lies in it), the run's configuration lies above."""
    at = folder.resolve()
    at = at.parent if re.fullmatch(r"seed\d+", at.name) else at
    run = _run(at.parent / RUN)
    extra: dict[str, Any] = {"format": "sparsify", "config": config} | ({"run": run} if run else {})
    card = cards.of_safetensors(folder / WEIGHTS)
    if card is not None:  # written here: it knows its site, and its folder may have any name
        return cards.of(folder / WEIGHTS, card, extra)
    read, written, layer = hooks.from_module(at.name)
    transcode = bool(config.get("transcode", False))
    extra |= {"hookpoint": at.name} | ({"target": written} if transcode else {})
    return cards.of(where, None, extra, run.get("model"), read if transcode else written, layer)


def _run(path: Path) -> dict[str, Any]:
    """The configuration of the run, where one lies above; a file that is something else is left alone."""
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return run if isinstance(run, dict) and "sae" in run else {}
