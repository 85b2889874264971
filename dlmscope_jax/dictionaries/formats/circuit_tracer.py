"""circuit-tracer's sets of per-layer transcoders: ``config.yaml`` and ``layer_{i}.safetensors``.

    f = act(W_enc x + b_enc),   y = W_dec f + b_dec [+ W_skip x],   act: ReLU, x [x > threshold], or the k largest with their sign

``W_enc`` and ``W_dec`` are ``(n, d)``, decoder rows contiguous because the library reads them one by one. Nothing is subtracted. The
activation and k stand in ``config.yaml``; a threshold in the weights makes a JumpReLU. The library writes ``k`` into the weights as well
and then refuses to read them; here it is read there and written to the configuration alone (reference/sae_libraries.md, defect 11).

Writing adds one layer to a set, or replaces it. What the format cannot say is put into the weights (``b_in`` goes into ``b_enc``, a
BatchTopK's one threshold into all) or refused.
"""

import json
import re
from pathlib import Path
from reprlib import repr as short
from typing import Any

import numpy as np
import yaml

from dlmscope_jax.errors import UserError

from ..batch_topk import BatchTopK
from ..files import write_whole
from ..jumprelu import JumpReLU
from ..meta import DictionaryMeta
from ..relu import ReLU
from ..topk import TopK
from . import cards, folding
from .native import check_shapes
from .state_files import choose
from .tensors import open_safetensors, to_jax

CONFIG = "config.yaml"
FILES = (CONFIG,)  # a layer of a set on the hub is named: subfolder="layer_3.safetensors"
_LAYER = re.compile(r"layer_(\d+)\.safetensors")
_THRESHOLD = "activation_function.threshold"
# (site, form of the weights) of the hooks that a set reads; the norm's output without its gain is mlp_in of a folded model
READ = {
    "hook_resid_mid": ("resid_mid", "raw"),
    "hook_mlp_in": ("resid_mid", "raw"),  # a copy, before the norm
    "mlp.hook_in": ("mlp_in", "raw"),
    "ln2.hook_normalized": ("mlp_in", "folded"),
}
_MAX_CONFIG = 2**18


def recognises(folder: Path, files: frozenset[str], config: Any) -> bool:
    """Whether there is a ``config.yaml`` beside a ``layer_{i}.safetensors``, or one that names the kind of a set."""
    if CONFIG not in files and not (folder / CONFIG).is_file():
        return False
    return any(_LAYER.fullmatch(name) for name in files) or (CONFIG in files and "model_kind" in read_config(folder))


def load(folder: Path, files: frozenset[str], config: Any) -> tuple[ReLU | JumpReLU | TopK, dict, DictionaryMeta]:
    """Reads one layer: the file that was named, or the only one there is.

    Raises:
      UserError: several layers and none named, weights that lie elsewhere (``hf://``), another kind of set, an activation that is not
        read, negative thresholds, tensors missing, unexpected or misshapen.
    """
    settings = read_config(folder)
    if settings.get("model_kind", "transcoder_set") != "transcoder_set":
        kind = short(settings["model_kind"])
        raise UserError(f"{folder / CONFIG}: model_kind {kind} is not read: transcoder_set, one transcoder a layer, is")
    if not any(_LAYER.fullmatch(name) for name in files):
        elsewhere = settings.get("transcoders")
        named = isinstance(elsewhere, list) and elsewhere and isinstance(elsewhere[0], str)
        hint = f"; its weights lie at {elsewhere[0]:.120}, ..." if named else ""
        raise UserError(f"{folder}: {CONFIG} without any layer_0.safetensors beside it{hint}")
    path = choose(folder, files, _LAYER)
    layer = int(re.findall(r"\d+", path.name)[0])
    activation = settings.get("activation")
    if activation not in (None, "relu", "topk", "jump_relu", "jumprelu"):
        raise UserError(f"{folder / CONFIG}: activation {short(activation):.60} is not read: relu, topk and jump_relu are")
    with open_safetensors(path) as tensors:
        width, d = tensors.matrix("W_enc")
        common: dict[str, Any] = {"d_in": d, "width": width, "d_out": d, "skip": "W_skip" in tensors.shapes}
        k = tensors.number("k") if "k" in tensors.shapes else settings.get("k")
        if activation == "topk" or (activation is None and "k" in tensors.shapes):
            if isinstance(k, bool) or not isinstance(k, int | float) or k != k // 1 or settings.get("k", k) != k:
                stated = short(settings.get("k"))
                raise UserError(f"{folder / CONFIG}: k is {stated} here and {short(k):.60} in {path.name}: topk needs one whole number")
            spec: ReLU | JumpReLU | TopK = TopK(**common, k=int(k), rule="raw")
        elif activation != "relu" and _THRESHOLD in tensors.shapes:
            spec = JumpReLU(**common)
        elif activation in (None, "relu"):
            spec = ReLU(**common)
        else:
            raise UserError(f"{path}: {_THRESHOLD} is missing, which activation {activation!r} needs")
        params = tensors.params(spec, {"threshold": _THRESHOLD} if isinstance(spec, JumpReLU) else {}, ignored=("k",))
    if isinstance(spec, JumpReLU) and (params["threshold"] < 0).any():
        raise UserError(f"{path}: has negative thresholds, below which circuit-tracer keeps negative activations; no dictionary here does")
    return spec, to_jax(params), _meta(path, settings, layer)


def save(folder: Path, spec: Any, params: dict, meta: DictionaryMeta) -> None:
    """Writes one layer into a set, whose other layers stay as they are.

    Raises:
      UserError: an autoencoder, another width than the set's, a site, model or activation that is not the set's, a kind or rule that
        circuit-tracer has not got.
    """
    import safetensors.numpy

    arrays = folding.checked(spec, params, meta, "circuit_tracer")
    check_shapes(str(folder), spec, {name: array.shape for name, array in arrays.items()})
    settings = _settings(spec, meta)
    if (folder / "W_enc_0.safetensors").exists():
        raise UserError(f"{folder}: holds a cross-layer transcoder, which has a {CONFIG} of its own: choose another folder")
    spec, arrays = folding.without_input_bias(spec, arrays)
    if "threshold" in arrays:  # negative ones act like 0 here, and would let negative activations through there
        arrays[_THRESHOLD] = np.broadcast_to(np.maximum(arrays.pop("threshold"), 0.0), (spec.width,))
    whole = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    card = {cards.KEY: json.dumps(cards.to_write(meta, ("target",)))}
    path = folder / f"layer_{meta.layer}.safetensors"
    settings = _joined(folder, settings, spec, meta)
    text = yaml.safe_dump(settings, sort_keys=False)
    write_whole(path, lambda at: safetensors.numpy.save_file(whole, str(at), metadata=card))
    write_whole(folder / CONFIG, lambda at: at.write_text(text, encoding="utf-8"))


def _settings(spec: Any, meta: DictionaryMeta) -> dict[str, Any]:
    """What ``config.yaml`` says of a set with this layer in it."""

    def wrong(what: str) -> UserError:
        return UserError(f"the circuit_tracer format {what}")

    if spec.d_out != spec.d_in or spec.row_norm != "none":
        raise wrong(f"holds transcoders from d to d without row_norm: this {type(spec).__name__} has d_in={spec.d_in}, d_out={spec.d_out}")
    if type(spec) is TopK and spec.rule == "raw":
        activation = {"activation": "topk", "k": spec.k}
    elif type(spec) is ReLU:
        activation = {"activation": "relu"}
    elif isinstance(spec, BatchTopK | JumpReLU):
        activation = {"activation": "jump_relu"}
    else:
        rule = f" with rule={spec.rule!r}" if type(spec) is TopK else ""
        known = "ReLU, JumpReLU, BatchTopK (as JumpReLU) and TopK with rule='raw' (negative ones kept)"
        raise wrong(f"has {known}, no {type(spec).__name__}{rule}")
    name, _, layer = meta.site.partition("@")
    hooks = [hook for hook, place in READ.items() if place == (name, meta.weight_processing or "raw")]
    written = {f"mlp_out@{layer}": "hook_mlp_out", f"mlp_raw@{layer}": "mlp.hook_out"}.get(meta.target)
    if not hooks or written is None or layer != str(meta.layer) or not layer.isdigit():
        raise wrong(
            "reads mlp_in@L or resid_mid@L of raw weights, or mlp_in@L of folded ones, and writes mlp_out@L (meta.extra['target']); this"
            f" one reads {meta.site} ({meta.weight_processing or 'raw'}) and writes {meta.extra.get('target')}"
        )
    model = {"model_name": meta.model, "model_kind": "transcoder_set"}
    return model | {"feature_input_hook": hooks[0], "feature_output_hook": written} | activation


def _joined(folder: Path, settings: dict[str, Any], spec: Any, meta: DictionaryMeta) -> dict[str, Any]:
    """The configuration of the set after this layer has joined it; a set without other layers takes the new one's."""
    own = f"layer_{meta.layer}.safetensors"
    others = sorted(path for path in folder.glob("layer_*.safetensors") if _LAYER.fullmatch(path.name) and path.name != own)
    if not others or not (folder / CONFIG).is_file():
        return settings
    before = read_config(folder)
    if "activation" not in before and settings["activation"] != "topk":
        settings = {key: value for key, value in settings.items() if key != "activation"}  # each layer's weights say which of the two it is
    for key, value in settings.items():
        there = before.get(key)
        if (key in before or key == "activation") and _meaning(key, there, meta.model) != _meaning(key, value, meta.model):
            raise UserError(f"{folder / CONFIG}: its layers have {key} {short(there):.60}, this one has {value!r}")
    for other in others:
        with open_safetensors(other) as tensors:
            width, d = tensors.matrix("W_enc")
            if (width, d) != (spec.width, spec.d_in):
                raise UserError(f"{other}: has {width} latents of width {d}, this layer {spec.width} of {spec.d_in}; a set has one size")
    return settings | before


def _meaning(key: str, value: Any, model: str) -> Any:
    """Hooks of two names that hold the same numbers are one."""
    if key == "feature_input_hook" and isinstance(value, str):
        return READ.get(value, value)
    return output_site(value, model) if key == "feature_output_hook" else value


def output_site(hook: Any, model: Any) -> str | None:
    """The site that a set writes. Where outputs are normed before they are added (Gemma), the MLP's own output is another one."""
    if hook == "mlp.hook_out" and isinstance(model, str) and "gemma" in model.lower():
        return "mlp_raw"
    return "mlp_out" if hook in ("hook_mlp_out", "mlp.hook_out") else None


def read_config(folder: Path) -> dict[str, Any]:
    """What ``config.yaml`` says.

    Raises:
      UserError: not YAML, not a mapping, too long.
    """
    path = folder / CONFIG
    try:
        if path.stat().st_size > _MAX_CONFIG:
            raise UserError(f"{path}: longer than any configuration of a set")
        text = path.read_text(encoding="utf-8")
        # a few lines of aliases can stand for more than any memory holds; no configuration of a set has one
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)):
            raise UserError(f"{path}: uses YAML aliases, which no configuration of a set does")
        settings = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())[:120]}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path}: should be a mapping")
    return settings


def _meta(path: Path, settings: dict[str, Any], layer: int) -> DictionaryMeta:
    card = cards.of_safetensors(path)
    model, read, written = (settings.get(key) for key in ("model_name", "feature_input_hook", "feature_output_hook"))
    name, form = READ.get(read, (None, None)) if isinstance(read, str) else (None, None)
    target = f"{output_site(written, model)}@{layer}" if output_site(written, model) else f"blocks.{layer}.{written}"
    extra = {"format": "circuit_tracer", "target": target}
    site = f"{name}@{layer}" if name else f"blocks.{layer}.{read}"
    return cards.of(path, card, extra, model=model, site=site, layer=layer, weight_processing=form)
