"""dictionary_learning's ``AutoEncoderTopK``: a folder with ``ae.pt`` and ``config.json``, the layout of the released DLM-Scope SAEs.

Semantics are those of its training code: ``topk(ReLU(W_enc (x - b_dec) + b_enc))``, tensors ``encoder.weight (n, d)``,
``encoder.bias``, ``decoder.weight (d, n)``, ``b_dec`` and, in most files, ``k`` and ``threshold`` (reference/sae_libraries.md
2.3, 2.7, 8). The inference loader of the DLM-Scope repository leaves ``b_dec`` out and is not followed.

A finished file acts on raw activations, because biases were multiplied by the input scale when it was written, and the
scale itself is lost. A file saved during training is ``{step, ae, optimizer, config, norm_factor}`` with biases that were
not yet multiplied; that is done here.
"""

import json
import math
import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from dlmscope_jax.errors import UserError

from ..files import write_whole
from ..meta import DictionaryMeta
from ..topk import TopK
from . import torch_pickle
from .native import check_shapes
from .torch_pickle import LazyTensor, TorchFile

CONFIG, WEIGHTS = "config.json", "ae.pt"
FILES = (CONFIG, WEIGHTS)
_TENSORS = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec", "b_dec": "b_dec"}
_SCALARS = ("k", "threshold")
_SITE = re.compile(r"(resid_pre|resid_mid|resid_post|mlp_in|mlp_out|attn_out)_layer_(\d+)")
_SELECT: dict[str, Any] = {"mask": "masked", "unmask": "visible", "all": "all", "clean": "all"}


def recognises(folder: Path, files: frozenset[str], config: Any) -> bool:
    """Whether ``folder`` has ``ae.pt`` and ``config`` the section ``trainer``."""
    return WEIGHTS in files and isinstance(config, dict) and isinstance(config.get("trainer"), dict)


def load(folder: Path, files: frozenset[str], config: dict) -> tuple[TopK, dict, DictionaryMeta]:
    """Reads one trainer's folder: ``(spec, params, meta)``, parameters float32 that act on raw activations.

    Raises:
      UserError: another class than AutoEncoderTopK, sizes or k that contradict each other, tensors missing, unexpected
        or misshapen, a file that asks for code or is damaged.
    """
    where, trainer = folder / WEIGHTS, config["trainer"]
    kind = trainer.get("dict_class")
    if kind != "AutoEncoderTopK":
        raise UserError(f"{folder / CONFIG}: dict_class {kind!r} is not read: only AutoEncoderTopK is")
    with TorchFile(where) as file:
        state, mid_run = file.contents, False
        if isinstance(state, Mapping) and isinstance(state.get("ae"), Mapping):
            mid_run, outer, state = True, state, state["ae"]
        if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
            raise UserError(f"{where}: holds no state dict")
        # compiled modules and wrappers prefix every name
        names = {name.removeprefix("_orig_mod."): name for name in state}
        found = {_TENSORS.get(name, name): state[given] for name, given in names.items() if name not in _SCALARS}
        shapes = {name: file.shape(value, name) for name, value in found.items()}
        scalars = {name: _number(file, state[names[name]], name) for name in _SCALARS if name in names}
        factor = _number(file, outer.get("norm_factor"), "norm_factor") if mid_run else 1.0
        if len(shapes.get("W_enc", ())) != 2:
            raise UserError(f"{where}: encoder.weight is missing or is not a matrix")
        width, d = shapes["W_enc"]
        spec = TopK(d_in=d, width=width, k=_k(trainer, scalars, mid_run, folder))
        for key, size in (("activation_dim", d), ("dict_size", width)):
            if trainer.get(key) not in (None, size):
                raise UserError(f"{folder / CONFIG}: {key} is {trainer[key]!r}, but {WEIGHTS} has {size}")
        if "W_dec" in shapes:
            shapes["W_dec"] = shapes["W_dec"][::-1]
        check_shapes(str(where), spec, shapes)
        params = {}
        for name in spec.shapes():
            array = file.read(found[name], name)
            if not np.issubdtype(array.dtype, np.floating) and array.dtype.name != "bfloat16":
                raise UserError(f"{where}: {name} holds {array.dtype}, should hold floating-point numbers")
            params[name] = jnp.asarray(np.ascontiguousarray(array.T if name == "W_dec" else array, np.float32))
    if mid_run:
        if not (isinstance(factor, float) and math.isfinite(factor) and factor > 0):
            raise UserError(f"{where}: a file saved during training needs its norm_factor to act on raw activations, found {factor!r}")
        params = spec.fold(params, factor)
    return spec, params, _meta(folder, config, scalars, factor if mid_run else None, outer.get("step") if mid_run else None)


def save(folder: Path, spec: Any, params: dict, meta: DictionaryMeta) -> None:
    """Writes ``ae.pt`` and ``config.json`` that dictionary_learning's ``AutoEncoderTopK.from_pretrained`` reads.

    Raises:
      UserError: a transcoder, or parameters that do not act on raw activations yet.
    """
    if type(spec) is not TopK or spec.d_out is not None:
        raise UserError("the dictionary_learning format holds TopK autoencoders only: save this one as 'dlmscope'")
    if not meta.scale_folded:
        raise UserError("the dictionary_learning format holds no input scale: fold it first, spec.fold(params, meta.input_scale)")
    arrays = {name: np.asarray(value, np.float32) for name, value in params.items()}
    check_shapes(str(folder), spec, {name: array.shape for name, array in arrays.items()})
    state = OrderedDict(
        [
            ("b_dec", arrays["b_dec"]),
            ("k", np.array(spec.k, np.int32)),
            ("threshold", np.array(meta.extra.get("threshold", -1.0), np.float32)),
            ("decoder.weight", np.ascontiguousarray(arrays["W_dec"].T)),
            ("encoder.weight", arrays["W_enc"]),
            ("encoder.bias", arrays["b_enc"]),
        ]
    )
    trainer = {
        **meta.extra.get("trainer", {}),
        "trainer_class": "TopKTrainer",
        "dict_class": "AutoEncoderTopK",
        "activation_dim": spec.d_in,
        "dict_size": spec.width,
        "k": spec.k,
        "steps": meta.steps,
        "seed": meta.seed,
        "layer": meta.layer,
        "lm_name": meta.model,
        "submodule_name": meta.site.replace("@", "_layer_"),
    }
    config = {"trainer": trainer, "buffer": meta.extra.get("buffer", {})}
    write_whole(folder / WEIGHTS, lambda path: torch_pickle.save(path, state))
    write_whole(folder / CONFIG, lambda path: path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8"))


def _number(file: TorchFile, value: Any, name: str) -> float | None:
    """A scalar that was saved as a number or as a tensor of one entry."""
    if isinstance(value, LazyTensor):
        array = file.read(value, name)
        if array.size != 1:
            raise UserError(f"{file.path}: {name} should be one number, is {list(array.shape)}")
        return float(array.reshape(()))
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _k(trainer: Mapping, scalars: dict, mid_run: bool, folder: Path) -> int:
    """k of the file, else of the configuration. They may differ only during training, where k can still be annealed."""
    stated, stored = trainer.get("k"), scalars.get("k")
    if stored is None and stated is None:
        raise UserError(f"{folder}: neither {CONFIG} nor {WEIGHTS} says what k is")
    if stored is None:
        return stated
    if stored != int(stored) or (stated is not None and stated != stored and not mid_run):
        raise UserError(f"{folder}: k is {stated!r} in {CONFIG} and {stored:g} in {WEIGHTS}: one of them belongs to another dictionary")
    return int(stored)


def _meta(folder: Path, config: dict, scalars: dict, factor: float | None, step: Any) -> DictionaryMeta:
    trainer, buffer = config["trainer"], config.get("buffer")
    buffer = buffer if isinstance(buffer, dict) else {}

    def integer(value: Any) -> int | None:
        return value if type(value) is int else None

    # the DLM-Scope fork names the folder after the site; the library itself may name a submodule, or nothing
    for name in (trainer.get("submodule_name"), folder.parent.name):
        if match := _SITE.fullmatch(name if isinstance(name, str) else ""):
            site, layer = match[1], int(match[2])
            break
    else:
        site, layer = "resid_post", integer(trainer.get("layer"))
        if layer is None or layer < 0:
            raise UserError(f"{folder / CONFIG}: says neither layer nor submodule_name, so nobody can know what the dictionary reads")
    policy = buffer.get("dlm_mask_policy")
    if policy in (None, "clean"):
        corruption = policy
    else:
        low, high, rows = (buffer.get(key) for key in ("dlm_t_min", "dlm_t_max", "refresh_batch_size"))
        corruption = f"batch_rate U[{low}, {high}], one rate a batch of {rows}"
    extra = {"format": "dictionary_learning", "trainer": trainer, "buffer": buffer}
    if scalars.get("threshold") is not None:
        # in the units of the activations, so folding scales it too; -1 means "never set"
        extra["threshold"] = scalars["threshold"] * (factor if factor and scalars["threshold"] >= 0 else 1.0)
    steps = integer(step)
    return DictionaryMeta(
        model=trainer["lm_name"] if isinstance(trainer.get("lm_name"), str) else "unknown",
        site=f"{site}@{layer}",
        layer=layer,
        corruption=corruption,
        select=_SELECT.get(policy) if isinstance(policy, str) else None,
        input_scale=factor,
        seed=integer(trainer.get("seed")),
        steps=integer(trainer.get("steps")) if steps is None else steps,
        extra=extra,
    )
