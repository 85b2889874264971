"""Gemma Scope 1 (``params.npz``) and 2 (``config.json`` and ``params.safetensors``): JumpReLU autoencoders and transcoders.

    f = z * (z > threshold),   z = ReLU(W_enc x + b_enc),   y = W_dec f + b_dec [+ x A]

Nothing is subtracted and nothing normalised. Matrices are ``(d, n)`` and ``(n, d)``, the skip connection ``A`` is ``(d_in, d_out)``, our
``W_skip`` transposed. Sizes come from the arrays (reference/sae_libraries.md 2.5, 8).

Version 1 has no configuration: what a file is stands in its path, ``.../gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71``. Its
transcoders read the norm's output without the gain and write what is added to the residual stream: ``mlp_in`` and ``mlp_out`` of a model
with folded weights. Its autoencoders of embeddings were trained on the bare table, which Gemma multiplies by ``sqrt(d)`` before the first
block; parameters are rescaled to act on ``resid_pre@0``.
"""

import math
import re
from pathlib import Path
from reprlib import repr as short
from typing import Any

from dlmscope_jax.errors import UserError

from ..jumprelu import JumpReLU
from ..meta import DictionaryMeta
from .hooks import from_hook
from .npz import open_npz
from .tensors import open_safetensors, to_jax

NPZ, CONFIG, WEIGHTS = "params.npz", "config.json", "params.safetensors"
FILES = (NPZ, CONFIG, WEIGHTS)
_RELEASE = re.compile(r"gemma-scope-(2b|9b|27b)-(pt|it)-(res|mlp|att|transcoders)\b")
_LAYER = re.compile(r"/layer_(\d+)(?=/|_|$)")
_SITES = {"res": "resid_post", "mlp": "mlp_out", "att": "z", "transcoders": "mlp_in"}
_SEVERAL = "reads or writes several layers at once; cross-layer transcoders and crosscoders are not read, those of one layer are"
_NAMES_2 = {"W_enc": "w_enc", "W_dec": "w_dec", "W_skip": "affine_skip_connection"}
_MODULE = re.compile(r"(?:\w+\.)*layers\.(\d+)((?:\.\w+)*)\.(input|output)")
_MODULES = {
    ("", "output"): "resid_post",
    ("", "input"): "resid_pre",
    (".pre_feedforward_layernorm", "output"): "mlp_in",
    (".post_feedforward_layernorm", "output"): "mlp_out",
    (".mlp", "input"): "mlp_in",
    (".mlp", "output"): "mlp_raw",
    (".post_attention_layernorm", "output"): "attn_out",
    (".self_attn.o_proj", "input"): "z",
    (".self_attn.o_proj", "output"): "attn_raw",
    (".self_attn", "output"): "attn_raw",
}


def recognises(folder: Path, files: frozenset[str], config: Any) -> bool:
    """Whether there is ``params.npz``, or ``params.safetensors`` with a configuration that names the points it hooks."""
    return NPZ in files or (WEIGHTS in files and isinstance(config, dict) and "hf_hook_point_in" in config)


def load(folder: Path, files: frozenset[str], config: Any) -> tuple[JumpReLU, dict, DictionaryMeta]:
    """Reads either version.

    Raises:
      UserError: a path that does not say what a file of version 1 is; a cross-layer transcoder; tensors missing, unexpected or misshapen.
    """
    return _first(folder) if NPZ in files else _second(folder, config)


def _first(folder: Path) -> tuple[JumpReLU, dict, DictionaryMeta]:
    place = folder.absolute().as_posix()
    release, layer, embedding = _RELEASE.search(place), _LAYER.search(place), "/embedding/" in place
    if not release or not (layer or embedding):
        raise UserError(
            f"{folder / NPZ}: does not say whether it is an autoencoder or a transcoder, nor of which layer; keep the release's folders:"
            " gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71"
        )
    size, variant, kind = release.groups()
    site, number = ("resid_pre@0", 0) if embedding else (f"{_SITES[kind]}@{layer[1]}", int(layer[1]))
    transcoder = kind == "transcoders"
    with open_npz(folder / NPZ) as tensors:
        d, width = tensors.matrix("W_enc")
        spec = JumpReLU(d_in=d, width=width, d_out=tensors.matrix("W_dec")[1] if transcoder else None, subtract=False)
        params = tensors.params(spec, transposed=("W_enc",))
    if embedding:
        root = math.sqrt(d)
        params |= {"W_enc": params["W_enc"] / root, "W_dec": params["W_dec"] * root, "b_dec": params["b_dec"] * root}
    meta = DictionaryMeta(
        model=f"google/gemma-2-{size}" + ("-it" if variant == "it" else ""),
        site=site,
        layer=number,
        weight_processing="folded" if transcoder else None,
        extra={"format": "gemma_scope", "release": release[0]} | ({"target": f"mlp_out@{number}"} if transcoder else {}),
    )
    return spec, to_jax(params), meta


def _second(folder: Path, config: dict) -> tuple[JumpReLU, dict, DictionaryMeta]:
    where = folder / CONFIG
    if config.get("architecture", "jump_relu") != "jump_relu":
        raise UserError(f"{where}: architecture {short(config['architecture']):.60} is not read: jump_relu is")
    hooks = [config.get(f"hf_hook_point_{side}", config["hf_hook_point_in"]) for side in ("in", "out")]
    if config.get("type") in ("clt", "crosscoder", "cross_layer_transcoder") or not all(isinstance(hook, str) for hook in hooks):
        raise UserError(f"{where}: {_SEVERAL}")
    (site, layer), (target, _) = (_site(hook) for hook in hooks)
    transcoder = site != target
    with open_safetensors(folder / WEIGHTS) as tensors:
        if len(tensors.shapes.get("w_dec", ())) == 3 or len(tensors.shapes.get("w_enc", ())) == 3:
            raise UserError(f"{folder / WEIGHTS}: {_SEVERAL}")
        d, width = tensors.matrix("w_enc")
        d_out = tensors.matrix("w_dec")[1] if transcoder else None
        spec = JumpReLU(d_in=d, width=width, d_out=d_out, skip="affine_skip_connection" in tensors.shapes, subtract=False)
        params = tensors.params(spec, _NAMES_2, transposed=("W_enc", "W_skip"))
    if config.get("width") not in (None, width):
        raise UserError(f"{where}: width is {short(config['width']):.60}, but {WEIGHTS} has {width}")
    meta = DictionaryMeta(
        model=config["model_name"] if isinstance(config.get("model_name"), str) else "unknown",
        site=site,
        layer=layer,
        weight_processing="raw",
        extra={"format": "gemma_scope"} | ({"target": target} if transcoder else {}),
    )
    return spec, to_jax(params), meta


def _site(hook: str) -> tuple[str, int]:
    """``("mlp_in@5", 5)`` for ``"model.layers.5.pre_feedforward_layernorm.output"``; an unknown name stays as it is."""
    match = _MODULE.fullmatch(hook)
    name = _MODULES.get((match[2], match[3])) if match else None
    return (f"{name}@{match[1]}", int(match[1])) if match and name else from_hook(hook)
