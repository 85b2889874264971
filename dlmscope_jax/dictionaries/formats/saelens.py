"""SAELens: a folder with ``cfg.json`` and ``sae_weights.safetensors``, version 6 and the flat configurations before it.

Semantics as measured on the library (reference/sae_libraries.md 2.1, 8). ``W_enc`` is (d, N); an autoencoder subtracts ``b_dec`` where
``apply_b_dec_to_input`` says so (the default), a transcoder never does. Read are inference files and training checkpoints:

- ``rescale_acts_by_decoder_norm``: decoder norms go into the encoder, which is what such a dictionary returns;
- ``topk_threshold`` of a BatchTopK or Matryoshka checkpoint is the threshold that the library exports;
- ``log_threshold`` of an old JumpReLU checkpoint is exponentiated;
- ``finetuning_scaling_factor`` goes into the decoder rows;
- ``expected_average_only_in`` is folded from ``activation_scaler.json`` where that lies beside the weights; exported files have it folded.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dlmscope_jax.errors import UserError

from ..batch_topk import BatchTopK
from ..files import write_whole
from ..gated import Gated
from ..jumprelu import JumpReLU
from ..matryoshka import Matryoshka
from ..meta import DictionaryMeta
from ..relu import ReLU
from ..topk import TopK
from . import cards, folding, hooks
from .native import check_shapes
from .tensors import Tensors, open_safetensors, to_jax

CONFIG, WEIGHTS, SCALER = "cfg.json", "sae_weights.safetensors", "activation_scaler.json"
FILES = (CONFIG, WEIGHTS, SCALER)
VERSION = "6.54.12"  # of SAELens, whose layout is written

_AUTOENCODERS: dict[str, Any] = {
    "standard": ReLU,
    "topk": TopK,
    "abstopk": TopK,
    "batchtopk": BatchTopK,
    "matryoshka_batchtopk": Matryoshka,
    "jumprelu": JumpReLU,
    "gated": Gated,
}
_TRANSCODERS: dict[str, Any] = {
    "transcoder": ReLU,
    "skip_transcoder": ReLU,
    "jumprelu_transcoder": JumpReLU,
    "jumprelu_skip_transcoder": JumpReLU,
}
_ROW_NORMS: dict[str, Any] = {"none": "none", "expected_average_only_in": "none", "layer_norm": "layer_norm"}
_ROW_NORMS["constant_norm_rescale"] = "unit_rms"
_OLD_NAMES = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index", "activation_fn_str": "activation_fn"}
_SCALES = ("finetuning_scaling_factor", "scaling_factor")


def recognises(folder: Path, files: frozenset[str], config: Any) -> bool:
    """Whether ``files`` has SAELens' weights and ``config`` its two sizes."""
    return WEIGHTS in files and isinstance(config, dict) and "d_in" in config and "d_sae" in config


def load(folder: Path, files: frozenset[str], config: dict) -> tuple[Any, dict, DictionaryMeta]:
    """Reads one dictionary: ``(spec, params, meta)``, parameters float32 that act on raw activations.

    Raises:
      UserError: an architecture or a normalisation that is not read, sizes that contradict each other, tensors missing,
        unexpected or misshapen, damaged files.
    """
    where, flat = folder / CONFIG, _flat(config)
    with open_safetensors(folder / WEIGHTS) as tensors:
        spec = _spec(where, flat, tensors)
        names = {"threshold": "topk_threshold"} if isinstance(spec, BatchTopK) else {}
        if "log_threshold" in tensors.shapes:
            names["threshold"] = "log_threshold"
        params = tensors.params(spec, names, transposed=("W_enc",), ignored=_SCALES)
        if "log_threshold" in tensors.shapes:
            params["threshold"] = np.exp(params["threshold"])
        params = _finetuned(flat, tensors, params)
    rescaled = isinstance(spec, TopK | BatchTopK) and bool(flat.get("rescale_acts_by_decoder_norm", False))
    if rescaled:
        params = folding.unit_decoder(params)
    scale = _scale(folder, flat)
    if scale is not None:
        params = _scaled(spec, params, scale, rescaled)
    return spec, to_jax(params), _meta(where, config, flat, scale)


def save(folder: Path, spec: Any, params: dict, meta: DictionaryMeta) -> None:
    """Writes ``sae_weights.safetensors`` and a version 6 ``cfg.json`` that ``sae_lens.SAE.load_from_disk`` reads.

    BatchTopK and Matryoshka are written as jumprelu with a constant threshold, as SAELens exports them. A transcoder's ``b_in`` goes
    into ``b_enc``.

    Raises:
      UserError: what SAELens has no architecture for: TopK transcoders, raw or grouped selection, binary latents, transcoders that
        normalise rows; an input scale that is not folded; parameters that do not fit.
    """
    import safetensors.numpy

    architecture = _architecture(spec)
    arrays = folding.checked(spec, params, meta, "saelens")
    check_shapes(str(folder), spec, {name: array.shape for name, array in arrays.items()})
    given = spec
    spec, arrays = folding.without_input_bias(spec, arrays)
    if isinstance(spec, BatchTopK):
        arrays["threshold"] = np.full(spec.width, arrays["threshold"], np.float32)
    arrays["W_enc"] = np.ascontiguousarray(arrays["W_enc"].T)
    norms = {ours: theirs for theirs, ours in _ROW_NORMS.items() if theirs != "expected_average_only_in"}
    config = {
        "architecture": architecture,
        "d_in": spec.d_in,
        "d_sae": spec.width,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": spec.subtract and not spec.transcoder,
        "normalize_activations": norms[spec.row_norm],
        "reshape_activations": "hook_z" if meta.site.startswith("z@") else "none",
    }
    if isinstance(spec, TopK):
        config["k"] = spec.k
    if architecture == "topk":
        config["rescale_acts_by_decoder_norm"] = False
    if spec.transcoder:
        config["d_out"] = spec.d_out
    config["metadata"] = _metadata(given, meta)
    write_whole(folder / WEIGHTS, lambda path: safetensors.numpy.save_file(arrays, str(path)))
    write_whole(folder / CONFIG, lambda path: path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8"))


def _flat(config: Mapping) -> dict[str, Any]:
    """A configuration of any version as one level, under the names and with the defaults of version 6."""
    metadata = config.get("metadata")
    flat = (metadata if isinstance(metadata, dict) else {}) | {_OLD_NAMES.get(key, key): value for key, value in config.items()}
    keywords = flat.get("activation_fn_kwargs")
    if flat.get("activation_fn") == "topk" and isinstance(keywords, dict) and keywords.get("k") is not None:
        flat |= {"architecture": "topk", "k": keywords["k"]}
    flat.setdefault("architecture", "standard")
    norm = flat.get("normalize_activations")
    if norm is None or isinstance(norm, bool):
        flat["normalize_activations"] = "expected_average_only_in" if norm else "none"
    return flat


def _spec(where: Path, flat: dict, tensors: Tensors) -> Any:
    kind, norm = flat["architecture"], flat["normalize_activations"]
    transcoder = isinstance(kind, str) and kind in _TRANSCODERS
    architecture = (_AUTOENCODERS | _TRANSCODERS).get(kind) if isinstance(kind, str) else None
    if architecture is None:
        known = ", ".join((*_AUTOENCODERS, *_TRANSCODERS))
        raise UserError(f"{where}: architecture {kind!r} is not read, its encoder has no counterpart here; those are {known}")
    if kind == "standard" and flat.get("activation_fn", "relu") != "relu":
        raise UserError(f"{where}: activation_fn {flat['activation_fn']!r} is not read: relu or topk")
    known_norm = isinstance(norm, str) and norm in _ROW_NORMS
    if not known_norm or (transcoder and _ROW_NORMS[norm] != "none"):
        of = "of a transcoder " if known_norm else ""
        raise UserError(f"{where}: normalize_activations {norm!r} {of}is not read: fold it in SAELens and save it there again")
    (d, width), (_, out) = tensors.matrix("W_enc"), tensors.matrix("W_dec")
    sizes = {"d_in": d, "d_sae": width} | ({"d_out": out} if transcoder else {})
    for name, size in sizes.items():
        if flat.get(name, size) != size:
            raise UserError(f"{where}: {name} is {flat[name]!r}, but {WEIGHTS} has {size}")
    fields: dict[str, Any] = {"d_in": d, "width": width}
    if transcoder:
        fields |= {"d_out": out, "skip": "skip" in kind}
    else:
        fields |= {"subtract": bool(flat.get("apply_b_dec_to_input", True)), "row_norm": _ROW_NORMS[norm]}
    if architecture in (TopK, BatchTopK, Matryoshka):
        fields["k"] = _k(where, flat)
    if kind == "abstopk":
        fields["rule"] = "magnitude"
    if architecture is Matryoshka and (widths := flat.get("matryoshka_widths")):
        if not isinstance(widths, list) or not all(type(n) is int for n in widths):
            raise UserError(f"{where}: matryoshka_widths {widths!r} should be a list of whole numbers")
        fields["prefixes"] = tuple(widths) if widths[-1] == width else (*widths, width)
    try:
        return architecture(**fields)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _k(where: Path, flat: dict) -> int:
    k, mean = flat.get("k"), flat["architecture"] in ("batchtopk", "matryoshka_batchtopk")
    if isinstance(k, bool) or not isinstance(k, int | float) or not 0 < k < float("inf") or (not mean and k != int(k)):
        raise UserError(f"{where}: k is {k!r}, should be a positive {'number' if mean else 'whole number'}")
    return max(1, round(k))


def _finetuned(flat: dict, tensors: Tensors, params: folding.Params) -> folding.Params:
    """Decoder rows times the factors of old files; factors that are all one, or absent, change nothing."""
    for name in _SCALES:
        if name not in tensors.shapes:
            continue
        if tensors.shapes[name] != (len(params["W_dec"]),):
            raise UserError(f"{tensors.where}: {name} is {list(tensors.shapes[name])}, should be [{len(params['W_dec'])}]")
        factor = tensors.read(name)
        if np.allclose(factor, 1.0):
            continue
        if not flat.get("finetuning_scaling_factor"):
            raise UserError(f"{tensors.where}: holds a {name}, but {CONFIG} says that there is none (finetuning_scaling_factor)")
        params = params | {"W_dec": params["W_dec"] * factor[:, None]}
    return params


def _scale(folder: Path, flat: dict) -> float | None:
    """What a checkpoint's rows were multiplied by and its parameters have not folded."""
    path = folder / SCALER
    if flat["normalize_activations"] != "expected_average_only_in" or not path.is_file():
        return None
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        scale = said["scaling_factor"]
    except (ValueError, RecursionError, KeyError, TypeError):
        raise UserError(f"{path}: should be JSON with a scaling_factor") from None
    if said.get("has_whitening"):
        raise UserError(f"{path}: rows were whitened, which is not read")
    if scale is None:
        return None
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 1e-30 < scale < 1e30:
        raise UserError(f"{path}: scaling_factor is {scale!r}, should be a positive number")
    return float(scale)


def _scaled(spec: Any, params: folding.Params, scale: float, rescaled: bool) -> folding.Params:
    """Parameters for ``x * scale`` as parameters for ``x``, in the units of the activations that SAELens exports.

    Its fold leaves activations alone, except where they are measured in decoder norms.
    """
    factor = np.float32(scale)
    if rescaled:
        return {name: array / factor if name in ("b_enc", "b_dec", "threshold") else array for name, array in params.items()}
    return params | {"W_enc": params["W_enc"] * factor, "W_dec": params["W_dec"] / factor, "b_dec": params["b_dec"] / factor}


def _meta(where: Path, config: dict, flat: dict, scale: float | None) -> DictionaryMeta:
    hook, written = flat.get("hook_name"), flat.get("hook_name_out")
    site, layer = hooks.from_hook(hook) if isinstance(hook, str) else (None, None)
    extra: dict[str, Any] = {"format": "saelens", "config": {key: value for key, value in config.items() if key != "metadata"}}
    if isinstance(config.get("metadata"), dict):
        extra["config"]["metadata"] = {key: value for key, value in config["metadata"].items() if key != cards.KEY}
    if isinstance(written, str):
        extra["target"] = hooks.from_hook(written)[0]
    if flat["normalize_activations"] == "expected_average_only_in" and scale is None:
        extra["reading"] = f"expected_average_only_in without {SCALER}: taken as folded already, as SAELens does"
    known = {"input_scale": None if scale is None else 1.0 / scale}
    return cards.of(where, flat.get(cards.KEY), extra, flat.get("model_name"), site, layer, **known)


def _architecture(spec: Any) -> str:
    """SAELens' name for a kind of dictionary."""
    wrong = None
    if isinstance(spec, TopK) and spec.rule not in ("positive", "magnitude"):
        wrong = f"a TopK of rule {spec.rule!r}"
    elif isinstance(spec, TopK) and spec.transcoder:
        wrong = "a TopK transcoder (sparsify and circuit_tracer do)"
    elif spec.transcoder and spec.row_norm != "none":
        wrong = f"a transcoder with row_norm={spec.row_norm!r}"
    elif spec.transcoder and isinstance(spec, Gated):
        wrong = "a gated transcoder"
    elif not isinstance(spec, TopK | BatchTopK | JumpReLU | ReLU | Gated):
        wrong = f"a {type(spec).__name__} dictionary"
    if wrong:
        raise UserError(f"the saelens format cannot say {wrong}: save it as 'dlmscope'")
    if isinstance(spec, TopK):
        return "topk" if spec.rule == "positive" else "abstopk"
    jump = isinstance(spec, BatchTopK | JumpReLU)
    if spec.transcoder:
        return ("jumprelu_" if jump else "") + ("skip_" if spec.skip else "") + "transcoder"
    return "gated" if isinstance(spec, Gated) else "jumprelu" if jump else "standard"


def _metadata(spec: Any, meta: DictionaryMeta) -> dict[str, Any]:
    """The block that says what the dictionary belongs to, with all keys that SAELens' own tools ask for."""
    before = meta.extra.get("config", {}).get("metadata", {}) if meta.extra.get("format") == "saelens" else {}
    out = {"hook_name_out": hooks.to_hook(meta.target)} if meta.target else {}
    trained: dict[str, Any] = {"training_architecture": {"batch_topk": "batchtopk", "matryoshka": "matryoshka_batchtopk"}.get(spec.KIND)}
    if trained["training_architecture"]:
        trained["training_k"] = spec.k
    return {
        "context_size": None,
        "prepend_bos": False,
        "exclude_special_tokens": False,
        "seqpos_slice": [None],
        "model_class_name": "HookedTransformer",
        "model_from_pretrained_kwargs": {},
        "dataset_path": None,
        "hook_head_index": None,
        "neuronpedia_id": None,
        "sae_lens_training_version": None,
        **(trained if trained["training_architecture"] else {}),
        **before,
        "sae_lens_version": VERSION,
        "model_name": meta.model,
        "hook_name": hooks.to_hook(meta.site),
        **out,
        cards.KEY: cards.to_write(meta, ("config", "target", "reading")),
    }
