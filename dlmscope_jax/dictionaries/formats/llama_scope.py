"""Llama Scope and its successors (OpenMOSS, Language-Model-SAEs): three layouts of one library.

    z = W_enc (s x [- b_dec]) + b_enc,   f = act(z |W_dec,i|) / |W_dec,i|,   y = (W_dec f + b_dec) / s_out,   s = sqrt(d) / mean norm

- Llama Scope: ``hyperparams.json``, ``checkpoints/final.safetensors``, one threshold for all latents;
- Llama Scope R1-Distill: ``config.json``, ``sae_weights.safetensors`` with ``log_jumprelu_threshold``;
- today's: the same files with ``W_E (d, n)``, ``W_D (n, d)``, ``activation_function.log_jumprelu_threshold``.

The library's own inference is what comes out: ``s`` and ``s_out`` are folded, so that rows are raw; where the choice of latents counts
decoder norms (``sparsity_include_decoder_norm``), latents are rescaled to decoder rows of norm 1. The one threshold of Llama Scope already
belongs to that form; thresholds that were learned belong to training and are folded like a bias.
"""

import json
import math
import posixpath
from pathlib import Path
from reprlib import repr as short
from typing import Any

import numpy as np

from dlmscope_jax.errors import UserError

from ..jumprelu import JumpReLU
from ..meta import DictionaryMeta
from ..relu import ReLU
from ..topk import TopK
from . import cards, folding
from .hooks import from_hook
from .tensors import Tensors, open_safetensors, to_jax

OLD_CONFIG, OLD_WEIGHTS, CONFIG, WEIGHTS = "hyperparams.json", "checkpoints/final.safetensors", "config.json", "sae_weights.safetensors"
FILES = (OLD_CONFIG, OLD_WEIGHTS, CONFIG, WEIGHTS)
_LINEAR = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight", "b_dec": "decoder.bias"}
_PLAIN = {"W_enc": "W_E", "b_enc": "b_E", "W_dec": "W_D", "b_dec": "b_D"}
_THRESHOLDS = ("log_jumprelu_threshold", "activation_function.log_jumprelu_threshold")
_NORMS = "dataset_average_activation_norm"


def recognises(folder: Path, files: frozenset[str], config: Any) -> bool:
    """Whether ``config`` names the points that the library hooks; that of ``checkpoints/final.safetensors`` lies one folder up."""
    if config is None and posixpath.basename(OLD_WEIGHTS) in files:
        return (folder.parent / OLD_CONFIG).is_file()
    return isinstance(config, dict) and "hook_point_in" in config and "d_model" in config


def load(folder: Path, files: frozenset[str], config: Any) -> tuple[ReLU | JumpReLU | TopK, dict, DictionaryMeta]:
    """Reads any of the three; parameters act on raw rows.

    Raises:
      UserError: weights in another form than safetensors, another kind than one sparse autoencoder or transcoder, an activation or
        normalisation that is not read, no norm to scale by, tensors missing, unexpected or misshapen.
    """
    if config is None:
        folder, config = folder.parent, _old_config(folder.parent / OLD_CONFIG)
    old = not (folder / WEIGHTS).is_file() and (folder / OLD_CONFIG).is_file()
    where, path = folder / (OLD_CONFIG if old else CONFIG), folder / (OLD_WEIGHTS if old else WEIGHTS)
    if not path.is_file():
        hint = "; a .dcp checkpoint is not read: save it as safetensors first" if any(folder.glob("*.dcp")) else ""
        raise UserError(f"{path}: missing beside {where.name}{hint}")
    hooks = _hooks(where, config)
    transcoder = hooks[0] != hooks[1]
    with open_safetensors(path) as tensors:
        names = _LINEAR if "encoder.weight" in tensors.shapes else _PLAIN
        learned = next((name for name in _THRESHOLDS if name in tensors.shapes), None)
        shape = tensors.matrix(names["W_enc"])
        width, d = shape if names is _LINEAR else shape[::-1]
        if config["d_model"] != d or config.get("d_sae", width) != width:
            raise UserError(f"{where}: d_model and d_sae are not the {d} and {width} of {path.name}")
        spec = _spec(where, config, d, width, d if transcoder else None)
        given = {} if config.get("use_decoder_bias", True) else {"b_dec": np.zeros(d, np.float32)}
        jumps = isinstance(spec, JumpReLU)
        if jumps and learned is None:
            given["threshold"] = np.full(width, _number(where, config, "jump_relu_threshold"), np.float32)
        turned = ("W_dec",) if names is _LINEAR else ("W_enc",)
        ignored = [name for name in tensors.shapes if name.startswith(f"{_NORMS}.")]
        params = tensors.params(spec, names | ({"threshold": learned} if jumps and learned else {}), turned, ignored, given)
        scale, out_scale = _scales(where, config, tensors, hooks, d)
    by_norm = config.get("sparsity_include_decoder_norm", True)
    threshold = params["threshold"] if jumps else None
    params = {name: np.asarray(array) for name, array in spec.fold(params, scale, out_scale).items()}
    if by_norm:
        params = folding.unit_decoder(params)
    if threshold is not None and learned:
        params["threshold"] = np.exp(threshold) * out_scale
    elif threshold is not None:  # already in units of raw rows: of the input's, unless decoder norms turn them into the output's
        params["threshold"] = threshold * (np.float32(1.0) if by_norm else out_scale / scale)
    (site, layer), (target, _) = (from_hook(hook) for hook in hooks)
    meta = cards.of(
        where,
        None,
        {"format": "llama_scope", "config": config} | ({"target": target} if transcoder else {}),
        model=config.get("model_name"),
        site=site,
        layer=layer,
        weight_processing="folded" if any(hook.endswith("hook_normalized") for hook in hooks) else None,
        input_scale=float(scale) if spec.row_norm == "none" else None,
    )
    return spec, to_jax(params), meta


def _old_config(path: Path) -> dict:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    if not recognises(path.parent, frozenset(), config):
        raise UserError(f"{path}: has no hook_point_in and d_model")
    return config


def _hooks(where: Path, config: dict) -> tuple[str, str]:
    read = config["hook_point_in"]
    written = config.get("hook_point_out") or read
    kind = config.get("sae_type", "sae")
    if kind not in ("sae", "transcoder") or not isinstance(read, str) or not isinstance(written, str):
        raise UserError(f"{where}: a {short(kind):.60} is not read: sparse autoencoders and transcoders of one layer are")
    return read, written


def _spec(where: Path, config: dict, d: int, width: int, d_out: int | None) -> ReLU | JumpReLU | TopK:
    activation, norm = config.get("act_fn"), config.get("norm_activation", "dataset-wise")
    if config.get("use_glu_encoder"):
        raise UserError(f"{where}: use_glu_encoder is not read")
    if norm not in ("dataset-wise", "inference", "none", "token-wise") or (norm == "token-wise" and d_out is not None):
        raise UserError(f"{where}: norm_activation {short(norm):.60} is not read: dataset-wise, none and an autoencoder's token-wise are")
    subtract = bool(config.get("apply_decoder_bias_to_pre_encoder", False))
    if subtract and d_out is not None:
        raise UserError(f"{where}: a transcoder that subtracts its output's bias from its input is not read")
    common: dict[str, Any] = {"d_in": d, "width": width, "d_out": d_out, "subtract": subtract}
    common["row_norm"] = "unit_rms" if norm == "token-wise" else "none"
    if activation == "jumprelu" or (activation == "topk" and config.get("jump_relu_threshold", 0) > 0):
        return JumpReLU(**common)
    if activation == "topk" and type(config.get("top_k")) is int:
        return TopK(**common, k=config["top_k"])
    if activation == "relu":
        return ReLU(**common)
    raise UserError(f"{where}: act_fn {short(activation):.60} is not read: relu, jumprelu and topk with top_k are")


def _scales(where: Path, config: dict, tensors: Tensors, hooks: tuple[str, str], d: int) -> tuple[np.float32, np.float32]:
    """What rows of the input and of the output were divided by in training."""
    if config.get("norm_activation", "dataset-wise") != "dataset-wise":
        return np.float32(1.0), np.float32(1.0)
    stated = config.get(_NORMS) if isinstance(config.get(_NORMS), dict) else {}
    out = []
    for side, hook in zip(("in", "out"), hooks, strict=True):
        name = next((name for name in (f"{_NORMS}.{hook}", f"{_NORMS}.{side}") if name in tensors.shapes), None)
        norm = tensors.number(name) if name else stated.get(hook, stated.get(side))
        if isinstance(norm, bool) or not isinstance(norm, int | float) or not 1e-30 < norm < 1e30:
            raise UserError(f"{where}: rows were divided by their mean norm, and {_NORMS} for {hook} is {short(norm):.60}")
        out.append(np.float32(norm / math.sqrt(d)))
    if hooks[0] == hooks[1] and out[0] != out[1]:
        raise UserError(f"{where}: an autoencoder has one mean norm, {_NORMS} gives two for {short(hooks[0]):.60}")
    return out[0], out[1]


def _number(where: Path, config: dict, key: str) -> float:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e30:
        raise UserError(f"{where}: {key} is {short(value):.60}, should be a number that is not negative")
    return float(value)
