"""circuit-tracer's cross-layer transcoders: ``config.yaml``, and ``W_enc_{i}.safetensors`` and ``W_dec_{i}.safetensors`` of every layer i.

    a^i = act(W_enc_i x^i + b_enc_i),   y^m = sum_{i <= m} W_dec_i[:, m - i]^T a^i + b_dec_m,   act: ReLU, or z [z > threshold_i]

``W_enc_i`` is ``(n, d)`` and lies with biases and thresholds, ``W_dec_i`` is ``(n, layers - i, d)``. Thresholds make a JumpReLU.
A skip connection is refused (``W_skip_i``, applied as ``x @ W_skip_i`` and not transposed as it is in a set of per-layer transcoders).
"""

import json
from pathlib import Path
from reprlib import repr as short
from typing import Any, Literal

import numpy as np
import yaml

from dlmscope_jax.errors import UserError

from ..cross_layer import CrossLayer
from ..files import write_whole
from ..meta import DictionaryMeta
from . import cards, folding
from .circuit_tracer import CONFIG, READ, output_site, read_config
from .native import check_shapes
from .tensors import Tensors, open_safetensors, to_jax

KIND = "cross_layer_transcoder"
FILES = (CONFIG, "W_enc_*.safetensors", "W_dec_*.safetensors")


def recognises(folder: Path, files: frozenset[str], config: Any) -> bool:
    """Whether there is a ``config.yaml`` that says so; a single file of weights stands for all."""
    offered = CONFIG in files or any(name.startswith(("W_enc_", "W_dec_")) for name in files)
    return offered and (folder / CONFIG).is_file() and read_config(folder).get("model_kind") == KIND


def load(folder: Path, files: frozenset[str], config: Any) -> tuple[CrossLayer, dict, DictionaryMeta]:
    """Reads all layers.

    Raises:
      UserError: layers missing, skip connections, negative thresholds, tensors missing, unexpected or misshapen.
    """
    settings = read_config(folder)
    names = {path.name for path in folder.glob("W_enc_*.safetensors")}
    layers = len(names)
    if not names or names != {f"W_enc_{i}.safetensors" for i in range(layers)}:
        raise UserError(f"{folder}: should hold W_enc_0.safetensors and those of all layers above it, has {short(sorted(names))}")
    with open_safetensors(folder / "W_enc_0.safetensors") as tensors:
        n, d = tensors.matrix("W_enc_0")
        activation: Literal["jumprelu", "relu"] = "jumprelu" if "threshold_0" in tensors.shapes else "relu"
    spec = CrossLayer(layers * d, layers * n, layers, layers * d, activation)
    ours = {"W_enc": (n, d), "b_enc": (n,), "b_dec": (d,)} | ({"threshold": (n,)} if activation == "jumprelu" else {})
    parts: dict[str, list[np.ndarray]] = {name: [] for name in ours}
    params: dict[str, np.ndarray] = {}
    for i in range(layers):
        with open_safetensors(folder / f"W_enc_{i}.safetensors") as tensors:
            _check(tensors, {f"{name}_{i}": shape for name, shape in ours.items()})
            for name, part in parts.items():
                part.append(tensors.read(f"{name}_{i}"))
        with open_safetensors(folder / f"W_dec_{i}.safetensors") as tensors:
            _check(tensors, {f"W_dec_{i}": (n, layers - i, d)})
            params[f"W_dec_{i}"] = tensors.read(f"W_dec_{i}")
    params |= {name: np.concatenate(part) for name, part in parts.items()}
    if activation == "jumprelu" and (params["threshold"] < 0).any():
        raise UserError(
            f"{folder}: has negative thresholds, below which circuit-tracer keeps negative activations; no dictionary here does"
        )
    return spec, to_jax(params), _meta(folder, settings, layers)


def save(folder: Path, spec: Any, params: dict, meta: DictionaryMeta) -> None:
    """Writes all layers; a cross-layer transcoder that is already there is replaced.

    Raises:
      UserError: another kind of dictionary, widths of input and output that differ, sites or layers that the format cannot say, a folder
        with a set of per-layer transcoders.
    """
    if not isinstance(spec, CrossLayer) or spec.d_in != spec.d_out:
        sizes = f"{type(spec).__name__} with d_in={spec.d_in}, d_out={spec.d_out}"
        raise UserError(f"the circuit_tracer_clt format holds cross-layer transcoders (CrossLayer) from d to d, not this {sizes}")
    arrays = folding.checked(spec, params, meta, "circuit_tracer_clt")
    check_shapes(str(folder), spec, {name: array.shape for name, array in arrays.items()})
    settings = _settings(spec, meta)
    if any(folder.glob("layer_*.safetensors")):
        raise UserError(
            f"{folder}: holds circuit-tracer's per-layer transcoders, which have a {CONFIG} of their own: choose another folder"
        )
    if "threshold" in arrays:  # negative ones act like 0 here, and would let negative activations through there
        arrays["threshold"] = np.maximum(arrays["threshold"], 0.0)
    card = {cards.KEY: json.dumps(cards.to_write(meta, ("target",)))}
    layered = [name for name in arrays if not name.startswith("W_dec_")]
    for i in range(spec.layers):
        encoder = {f"{name}_{i}": np.split(arrays[name], spec.layers)[i].copy() for name in layered}
        _write(folder / f"W_enc_{i}.safetensors", encoder, card)
        _write(folder / f"W_dec_{i}.safetensors", {f"W_dec_{i}": arrays[f"W_dec_{i}"]}, card)
    for path in [*folder.glob("W_enc_*.safetensors"), *folder.glob("W_dec_*.safetensors")]:
        number = path.name[len("W_enc_") : -len(".safetensors")]
        if number.isdigit() and int(number) >= spec.layers:  # of a taller one that was here
            path.unlink()
    write_whole(folder / CONFIG, lambda at: at.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8"))


def _write(path: Path, arrays: dict[str, np.ndarray], card: dict[str, str]) -> None:
    import safetensors.numpy

    write_whole(path, lambda at: safetensors.numpy.save_file(arrays, str(at), metadata=card))


def _check(tensors: Tensors, expected: dict[str, tuple[int, ...]]) -> None:
    """One error for tensors that are missing, unexpected or of another shape."""
    found = tensors.shapes
    if any(name.startswith("W_skip") for name in found):
        raise UserError(f"{tensors.where}: has a skip connection, which cross-layer transcoders here have not got")
    wrong = [f"{name} is {list(found[name]) if name in found else 'missing'}" for name in expected if found.get(name) != expected[name]]
    wrong += [f"{' '.join(name.split()):.80} is unexpected" for name in list(found.keys() - expected.keys())[:8]]
    if wrong:
        should = ", ".join(f"{name} {list(shape)}" for name, shape in expected.items())
        raise UserError(f"{tensors.where}: {', '.join(wrong)}; should hold {should}")


def _settings(spec: CrossLayer, meta: DictionaryMeta) -> dict[str, Any]:
    """What ``config.yaml`` says."""
    reads, writes = (_common(sites, spec.layers) for sites in (meta.site, meta.target))
    hooks = [hook for hook, place in READ.items() if place == (reads, meta.weight_processing or "raw")]
    output = {"mlp_out": "hook_mlp_out", "mlp_raw": "mlp.hook_out"}.get(writes)
    if not hooks or output is None:
        raise UserError(
            "the circuit_tracer_clt format reads mlp_in@0+mlp_in@1+... or resid_mid@0+... of raw weights, or mlp_in of folded ones, and"
            f" writes mlp_out@0+... (meta.extra['target']), {spec.layers} layers from 0 on; this one reads {meta.site}"
            f" ({meta.weight_processing or 'raw'}) and writes {meta.target}"
        )
    return {"model_name": meta.model, "model_kind": KIND, "feature_input_hook": hooks[0], "feature_output_hook": output}


def _common(sites: str | None, layers: int) -> str | None:
    """``"mlp_in"`` of ``"mlp_in@0+mlp_in@1"`` with two layers; None where it is not so."""
    name = (sites or "").partition("@")[0]
    return name if sites == _all(name, layers) else None


def _all(name: str, layers: int) -> str:
    return "+".join(f"{name}@{i}" for i in range(layers))


def _meta(folder: Path, settings: dict[str, Any], layers: int) -> DictionaryMeta:
    card = cards.of_safetensors(folder / "W_enc_0.safetensors")
    model, read, output = (settings.get(key) for key in ("model_name", "feature_input_hook", "feature_output_hook"))
    name, form = READ.get(read, (None, None)) if isinstance(read, str) else (None, None)
    site = _all(name, layers) if name else f"blocks.0-{layers - 1}.{read}"
    target = _all(there, layers) if (there := output_site(output, model)) else f"blocks.0-{layers - 1}.{output}"
    extra = {"format": "circuit_tracer_clt", "target": target}
    return cards.of(folder, card, extra, model=model, site=site, layer=0, weight_processing=form)
