"""dictionary_learning: a folder with ``ae.pt`` and ``config.json``, also the layout of the released DLM-Scope SAEs.

Semantics are those that each class computes by default (reference/sae_libraries.md 2.3, 2.7, 8):

- AutoEncoder, GatedAutoEncoder, AutoEncoderTopK, BatchTopKSAE, MatryoshkaBatchTopKSAE subtract the decoder's bias before encoding;
  AutoEncoderNew and JumpReluAutoEncoder do not. The inference loader of the DLM-Scope repository, which never does, is not followed.
- AutoEncoderTopK keeps the k largest whatever its ``threshold`` is; BatchTopKSAE and MatryoshkaBatchTopKSAE keep what exceeds it.
  A threshold of -1 was never measured and lets every positive activation pass.
- ``AutoEncoder.from_pretrained`` divides decoder rows by their norms while loading. Here the file's own numbers are kept: the
  reconstructions are the same, and each activation is smaller by the factor of its row's norm.

A finished file acts on raw activations, because biases were multiplied by the input scale when it was written, and the
scale itself is lost. A file of the DLM-Scope fork saved during training is ``{step, ae, optimizer, config, norm_factor}`` with
biases that were not yet multiplied; that is done here.
"""

import json
import math
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
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
from . import cards, folding, hooks, torch_pickle
from .native import check_shapes
from .tensors import Tensors, is_number, state_dict, to_jax
from .torch_pickle import TorchFile

CONFIG, WEIGHTS = "config.json", "ae.pt"
FILES = (CONFIG, WEIGHTS, f"../{CONFIG}")
_SITE = re.compile(r"([a-z_]+)_layer_(\d+)")
_SELECT: dict[str, Any] = {"mask": "masked", "unmask": "visible", "all": "all", "clean": "all"}


@dataclass(frozen=True)
class _Class:
    """A ``dict_class``: our architecture, its tensors in the order of the library's state dict, what is transposed."""

    kind: Any
    trainer: str
    names: dict[str, str]
    transposed: tuple[str, ...]
    subtract: bool = True


_LINEAR = {"decoder.weight": "W_dec", "encoder.weight": "W_enc", "encoder.bias": "b_enc"}
_PLAIN = {"W_enc": "W_enc", "b_enc": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
_GATED = {"decoder_bias": "b_dec", "r_mag": "r_mag", "gate_bias": "b_gate", "mag_bias": "b_mag", "encoder.weight": "W_enc"}
_CLASSES = {
    "AutoEncoder": _Class(ReLU, "StandardTrainer", {"bias": "b_dec", **_LINEAR}, ("W_dec",)),
    "AutoEncoderNew": _Class(ReLU, "StandardTrainerNew", {"decoder.bias": "b_dec", **_LINEAR}, ("W_dec",), subtract=False),
    "GatedAutoEncoder": _Class(Gated, "GatedSAETrainer", {**_GATED, "decoder.weight": "W_dec"}, ("W_dec",)),
    "AutoEncoderTopK": _Class(TopK, "TopKTrainer", {"b_dec": "b_dec", **_LINEAR}, ("W_dec",)),
    "BatchTopKSAE": _Class(BatchTopK, "BatchTopKTrainer", {"b_dec": "b_dec", **_LINEAR, "threshold": "threshold"}, ("W_dec",)),
    "JumpReluAutoEncoder": _Class(JumpReLU, "JumpReluTrainer", {**_PLAIN, "threshold": "threshold"}, ("W_enc",), subtract=False),
    "MatryoshkaBatchTopKSAE": _Class(Matryoshka, "MatryoshkaBatchTopKTrainer", {**_PLAIN, "threshold": "threshold"}, ("W_enc",)),
}


def recognises(folder: Path, files: frozenset[str], config: Any) -> bool:
    """Whether there is an ``ae.pt`` (or a checkpoint was named) and a configuration with the section ``trainer``."""
    return _weights(files) is not None and _config(folder, config) is not None


def load(folder: Path, files: frozenset[str], config: Any) -> tuple[Any, dict, DictionaryMeta]:
    """Reads one trainer's folder: ``(spec, params, meta)``, parameters float32 that act on raw activations.

    Raises:
      UserError: a class that is not read, sizes or k that contradict each other, tensors missing, unexpected or misshapen, a
        file that asks for code or is damaged.
    """
    where, config = folder / _weights(files), _config(folder, config)
    trainer = config["trainer"]
    name = trainer.get("dict_class")
    layout = _CLASSES.get(name) if isinstance(name, str) else None
    if layout is None:
        raise UserError(f"{folder / CONFIG}: dict_class {name!r} is not read: those are {', '.join(_CLASSES)}")
    with TorchFile(where) as file:
        state, outer = file.contents, None
        if isinstance(state, Mapping) and isinstance(state.get("ae"), Mapping):
            outer, state = state, state["ae"]
        tensors = state_dict(file, state)
        spec, params, threshold = _read(folder, name, layout, trainer, tensors, mid_run=outer is not None)
        factor = _factor(file, outer) if outer is not None else None
    if factor is not None:
        params = spec.fold(params, factor)
    return spec, to_jax(params), _meta(folder, config, spec, threshold, factor, None if outer is None else outer.get("step"))


def save(folder: Path, spec: Any, params: dict, meta: DictionaryMeta) -> None:
    """Writes ``ae.pt`` and ``config.json`` that dictionary_learning's ``load_dictionary`` reads.

    Where the class subtracts the decoder's bias before encoding and the dictionary does not, or the other way round, the difference
    goes into the encoder's biases. ReLU has a class for either.

    Raises:
      UserError: transcoders, selection rules other than "positive", binary latents, per-row normalisation; parameters that do not
        act on raw activations yet, or do not fit.
    """
    wrong = None
    if spec.transcoder:
        wrong = "a transcoder, it holds autoencoders only"
    elif type(spec) not in [layout.kind for layout in _CLASSES.values()]:
        wrong = f"a {type(spec).__name__} dictionary"
    elif isinstance(spec, TopK) and spec.rule != "positive":
        wrong = f"a TopK of rule {spec.rule!r}"
    elif spec.row_norm != "none":
        wrong = f"row_norm={spec.row_norm!r}"
    if wrong:
        raise UserError(f"the dictionary_learning format cannot say {wrong}: save it as 'dlmscope'")
    arrays = folding.checked(spec, params, meta, "dictionary_learning")
    check_shapes(str(folder), spec, {name: array.shape for name, array in arrays.items()})
    name = next(n for n, c in _CLASSES.items() if type(spec) is c.kind and (c.subtract == spec.subtract or c.kind is not ReLU))
    layout = _CLASSES[name]
    spec, arrays = folding.subtracting(spec, arrays, layout.subtract)
    state = OrderedDict(
        (theirs, np.ascontiguousarray(arrays[ours].T) if ours in layout.transposed else arrays[ours])
        for theirs, ours in layout.names.items()
    )
    state |= _buffers(spec, arrays, meta)
    free_norms = name == "AutoEncoder" and spec.norm_weighted
    trainer = {
        **_mapping(meta.extra.get("trainer")),
        "trainer_class": "StandardTrainerAprilUpdate" if free_norms else layout.trainer,
        "dict_class": name,
        "activation_dim": spec.d_in,
        "dict_size": spec.width,
        **({"k": spec.k} if isinstance(spec, TopK | BatchTopK) else {}),
        "steps": meta.steps,
        "seed": meta.seed,
        "layer": meta.layer,
        "lm_name": meta.model,
        "submodule_name": meta.site.replace("@", "_layer_"),
    }
    config = {"trainer": trainer, "buffer": _mapping(meta.extra.get("buffer"))}
    config[cards.KEY] = cards.to_write(meta, ("trainer", "buffer", "threshold", "reading"))
    write_whole(folder / WEIGHTS, lambda path: torch_pickle.save(path, state))
    write_whole(folder / CONFIG, lambda path: path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8"))


def _weights(files: frozenset[str]) -> str | None:
    """``ae.pt``, or the checkpoint ``ae_1000.pt`` that was named."""
    named = next(iter(files)) if len(files) == 1 else ""
    return WEIGHTS if WEIGHTS in files else named if named.endswith(".pt") else None


def _config(folder: Path, config: Any) -> dict | None:
    """The configuration in the folder, or above it: checkpoints lie in a folder of their own."""
    if config is None:
        try:
            config = json.loads((folder.resolve().parent / CONFIG).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
    return config if isinstance(config, dict) and isinstance(config.get("trainer"), dict) else None


def _read(
    folder: Path, name: str, layout: _Class, trainer: Mapping, tensors: Tensors, mid_run: bool
) -> tuple[Any, folding.Params, float | None]:
    """Spec, parameters and the threshold as the file has it, of a state dict."""
    given = {ours: theirs for theirs, ours in layout.names.items()}
    rows, columns = tensors.matrix(given["W_enc"])
    width, d = (columns, rows) if "W_enc" in layout.transposed else (rows, columns)
    fields: dict[str, Any] = {"d_in": d, "width": width, "subtract": layout.subtract}
    threshold = tensors.number("threshold") if "threshold" in tensors.shapes and layout.kind is not JumpReLU else None
    selects = layout.kind in (TopK, BatchTopK, Matryoshka)
    if selects:
        fields["k"] = _k(folder, trainer, tensors, mid_run)
    if layout.kind is ReLU:
        fields["norm_weighted"] = name == "AutoEncoderNew" or trainer.get("trainer_class") == "StandardTrainerAprilUpdate"
    if layout.kind is Matryoshka:
        fields["prefixes"] = tuple(accumulate(tensors.integers("group_sizes")))
    try:
        spec = layout.kind(**fields)
    except UserError as error:
        raise UserError(f"{tensors.where}: {error}") from None
    for key, size in (("activation_dim", d), ("dict_size", width)):
        if trainer.get(key) not in (None, size):
            raise UserError(f"{folder / CONFIG}: {key} is {trainer[key]!r}, but {tensors.where.name} has {size}")
    buffers = ("k", "group_sizes", *(("threshold",) if layout.kind is TopK else ())) if selects else ()
    params = tensors.params(spec, given, layout.transposed, ignored=buffers)
    if isinstance(spec, BatchTopK):  # never measured is 0 here: the same function, whatever the units
        params["threshold"] = np.maximum(params["threshold"], 0.0)
    return spec, params, threshold


def _k(folder: Path, trainer: Mapping, tensors: Tensors, mid_run: bool) -> int:
    """k of the file, else of the configuration. They may differ only during training, where k can still be annealed."""
    stated, stored = trainer.get("k"), tensors.number("k") if "k" in tensors.shapes else None
    if stored is None and stated is None:
        raise UserError(f"{folder}: neither {CONFIG} nor {tensors.where.name} says what k is")
    if stored is None:
        return stated
    if not stored.is_integer() or (stated is not None and stated != stored and not mid_run):
        where = tensors.where.name
        raise UserError(f"{folder}: k is {stated!r} in {CONFIG} and {stored:g} in {where}: one of them belongs to another dictionary")
    return int(stored)


def _factor(file: TorchFile, outer: Mapping) -> float:
    """What the rows of a run under way are divided by."""
    value = outer.get("norm_factor")
    factor = state_dict(file, {"norm_factor": value}).number("norm_factor") if is_number(value) else value
    if not (isinstance(factor, float) and math.isfinite(factor) and factor > 0):
        raise UserError(f"{file.path}: a file saved during training needs its norm_factor to act on raw activations, found {factor!r}")
    return factor


def _buffers(spec: Any, arrays: folding.Params, meta: DictionaryMeta) -> dict[str, np.ndarray]:
    """What the library keeps beside parameters."""
    out: dict[str, np.ndarray] = {}
    if isinstance(spec, TopK | BatchTopK):
        out["k"] = np.array(spec.k, np.int32)
    if isinstance(spec, TopK):
        out["threshold"] = np.array(meta.extra.get("threshold", -1.0), np.float32)
    if isinstance(spec, BatchTopK):
        measured = arrays["threshold"] > 0
        out["threshold"] = np.array(arrays["threshold"] if measured else -1.0, np.float32)
    if isinstance(spec, Matryoshka):
        out["group_sizes"] = np.array([b - a for a, b in pairwise((0, *spec.nested))], np.int64)
    return out


def _mapping(value: Any) -> dict:
    return value if isinstance(value, dict) else {}


def _meta(folder: Path, config: dict, spec: Any, threshold: float | None, factor: float | None, step: Any) -> DictionaryMeta:
    trainer, buffer = config["trainer"], _mapping(config.get("buffer"))

    def integer(value: Any) -> int | None:
        return value if type(value) is int else None

    site, layer = _site(folder, trainer)
    policy = buffer.get("dlm_mask_policy")
    corruption = policy if policy == "clean" else None
    if policy not in (None, "clean"):
        low, high, rows = (buffer.get(key) for key in ("dlm_t_min", "dlm_t_max", "refresh_batch_size"))
        corruption = f"batch_rate U[{low}, {high}], one rate a batch of {rows}"
    extra = {"format": "dictionary_learning", "trainer": trainer, "buffer": buffer}
    if threshold is not None:
        # in the units of the activations, so folding scales it too; -1 means "never set"
        extra["threshold"] = threshold * (factor if factor and threshold >= 0 else 1.0)
        if threshold < 0 and isinstance(spec, BatchTopK):
            extra["reading"] = "no threshold was ever measured: every positive activation passes, as in the library"
    steps = integer(step)
    return cards.of(
        folder / CONFIG,
        config.get(cards.KEY),
        extra,
        trainer.get("lm_name"),
        site,
        layer,
        corruption=corruption,
        select=_SELECT.get(policy) if isinstance(policy, str) else None,
        input_scale=factor,
        seed=integer(trainer.get("seed")),
        steps=integer(trainer.get("steps")) if steps is None else steps,
    )


def _site(folder: Path, trainer: Mapping) -> tuple[str, int]:
    """Site and layer. The DLM-Scope fork names the folder after the site; the library itself may name a submodule, or nothing."""
    for name in (trainer.get("submodule_name"), folder.parent.name):
        if match := _SITE.fullmatch(name if isinstance(name, str) else ""):
            return f"{match[1]}@{match[2]}", int(match[2])
        if isinstance(name, str) and "@" in (module := hooks.from_module(name))[1]:
            return module[1:]
    layer = trainer.get("layer")
    if type(layer) is not int or layer < 0:
        raise UserError(f"{folder / CONFIG}: says neither layer nor submodule_name, so nobody can know what the dictionary reads")
    return f"resid_post@{layer}", layer
