"""The package's own format: a folder with ``config.json`` and ``weights.safetensors``.

``config.json`` names the kind of dictionary, its sizes, its card and the SHA-256 of the weights. It is written last, so
a folder without it holds no dictionary, and weights that do not match it are noticed.
"""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from dlmscope_jax.config import from_mapping, to_mapping
from dlmscope_jax.errors import UserError

from ..batch_topk import BatchTopK
from ..binary import Binary
from ..cross_layer import CrossLayer
from ..files import sha256, write_whole
from ..gated import Gated
from ..jumprelu import JumpReLU
from ..matryoshka import Matryoshka
from ..meta import DictionaryMeta, meta_from_mapping, meta_to_mapping
from ..relu import ReLU
from ..topk import TopK

FORMAT, VERSION = "dlmscope", 1
CONFIG, WEIGHTS = "config.json", "weights.safetensors"
FILES = (CONFIG, WEIGHTS)
KINDS = {kind.KIND: kind for kind in (TopK, BatchTopK, Matryoshka, JumpReLU, ReLU, Gated, Binary, CrossLayer)}
_KEYS = {"format", "version", "kind", "dictionary", "meta", "sha256"}


def recognises(folder: Path, files: frozenset[str], config: Any) -> bool:
    """Whether ``config`` (the parsed ``config.json`` of ``folder``) is of this format, and no other file beside it was named."""
    return isinstance(config, dict) and config.get("format") == FORMAT and not files.isdisjoint(FILES)


def save(folder: Path, spec: Any, params: dict, meta: DictionaryMeta) -> None:
    """Writes a dictionary; an older one in the same folder is replaced, other files are left alone.

    Raises:
      UserError: a kind that has no name in this format, parameters that do not fit the spec, a disk that is full.
    """
    import safetensors.numpy

    kind = next((name for name, cls in KINDS.items() if type(spec) is cls), None)
    if kind is None:
        raise UserError(f"cannot save a {type(spec).__name__}: kinds are {', '.join(KINDS)}")
    arrays = {name: np.asarray(value, np.float32, order="C") for name, value in params.items()}
    check_shapes(f"{folder}", spec, {name: array.shape for name, array in arrays.items()})
    write_whole(folder / WEIGHTS, lambda path: safetensors.numpy.save_file(arrays, str(path)))
    config = {
        "format": FORMAT,
        "version": VERSION,
        "kind": kind,
        "dictionary": to_mapping(spec),
        "meta": meta_to_mapping(meta),
        "sha256": {WEIGHTS: sha256(folder / WEIGHTS)},
    }
    write_whole(folder / CONFIG, lambda path: path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8"))


def load(folder: Path, files: frozenset[str], config: dict) -> tuple[Any, dict, DictionaryMeta]:
    """Reads what ``save`` wrote: ``(spec, params, meta)``, parameters float32.

    Raises:
      UserError: an unknown version, kind or key, damaged weights, tensors missing, extra or of another shape.
    """
    import safetensors

    where = folder / CONFIG
    for key in sorted(_KEYS ^ config.keys()):
        raise UserError(f"{where}: {'unknown' if key in config else 'missing'} key {key!r}: a dictionary has {', '.join(sorted(_KEYS))}")
    if config["version"] != VERSION:
        raise UserError(f"{where}: version {config['version']!r}, this package reads {VERSION}")
    if not isinstance(config["kind"], str) or config["kind"] not in KINDS:
        raise UserError(f"{where}: kind {config['kind']!r} is not known: one of {', '.join(KINDS)}")
    try:
        spec = from_mapping(KINDS[config["kind"]], config["dictionary"])
        meta = meta_from_mapping(config["meta"])
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise UserError(f"{weights}: missing beside {CONFIG}")
    if not isinstance(config["sha256"], dict) or sha256(weights) != config["sha256"].get(WEIGHTS):
        raise UserError(f"{weights}: its SHA-256 is not the one in {CONFIG}: damaged, or replaced without it")
    try:
        with safetensors.safe_open(str(weights), framework="numpy") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
            check_shapes(str(weights), spec, found)
            dtypes = {name: file.get_slice(name).get_dtype() for name in found}
            if wrong := [f"{name} is {dtype}" for name, dtype in dtypes.items() if dtype != "F32"]:
                raise UserError(f"{weights}: {', '.join(wrong)}, should be F32")
            params = {name: jnp.asarray(file.get_tensor(name)) for name in spec.shapes()}
    except safetensors.SafetensorError as error:
        raise UserError(f"{weights}: not a safetensors file: {error}") from None
    return spec, params, meta


def check_shapes(where: str, spec: Any, found: dict[str, tuple[int, ...]]) -> None:
    """One error that lists every tensor that is missing, unexpected or of another shape than ``spec`` says."""
    expected = spec.shapes()
    wrong = [f"{name} is missing" for name in expected if name not in found]
    # a stranger's file may call its tensors anything, and hold any number of them
    extra = [f"{' '.join(name.split()):.80} is unexpected" for name in found if name not in expected]
    wrong += extra[:8] + ([f"and {len(extra) - 8} more are"] if len(extra) > 8 else [])
    wrong += [
        f"{name} is {list(found[name])}, should be {list(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    if wrong:
        sizes = ", ".join(f"{f.name}={getattr(spec, f.name)}" for f in fields(spec))
        raise UserError(f"{where}: does not fit {type(spec).__name__}({sizes}): {'; '.join(wrong)}")
