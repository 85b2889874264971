"""``load_dictionary`` and ``save_dictionary``: one door for every file format.

A format is a module of ``formats``:

    FILES                                          names and patterns of its files, relative to the folder: what is asked of the hub
    recognises(folder, files, config) -> bool      whether it can read what is offered
    load(folder, files, config) -> (spec, params, meta)
    save(folder, spec, params, meta)               only where the format is written

``files`` are the names of the files that are offered: those in ``folder``, or the only one that the user named. ``config`` is the parsed
JSON of ``config.json``, ``cfg.json`` or ``hyperparams.json`` in the folder (of each in turn, where there are several), else None.
Parameters come out float32 and act on raw rows.
"""

import json
import posixpath
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from dlmscope_jax.errors import UserError

from .formats import (
    binary_pt,
    circuit_tracer,
    circuit_tracer_clt,
    dictionary_learning,
    gemma_scope,
    goodfire,
    llama_scope,
    native,
    openai,
    qwen_scope,
    saelens,
    sparsify,
    transcoder_paper,
)
from .meta import DictionaryMeta

# Asked in this order; formats that a configuration names come first, those known by their tensors alone last.
FORMATS: dict[str, Any] = {
    "dlmscope": native,
    "dictionary_learning": dictionary_learning,
    "saelens": saelens,
    "sparsify": sparsify,
    "gemma_scope": gemma_scope,
    "llama_scope": llama_scope,
    "circuit_tracer_clt": circuit_tracer_clt,
    "circuit_tracer": circuit_tracer,
    "transcoder_paper": transcoder_paper,
    "qwen_scope": qwen_scope,
    "openai": openai,
    "goodfire": goodfire,
    "binary": binary_pt,
}
CONFIGS = ("config.json", "cfg.json", "hyperparams.json")
_LONGEST = 1150  # of an error's letters
_WEIGHTS = (".safetensors", ".npz", ".pt", ".pth", ".pkl", ".pkl.gz")


def load_dictionary(path: str | Path, subfolder: str | None = None) -> tuple[Any, dict, DictionaryMeta]:
    """Reads a dictionary; the format is recognised by the files that are there.

    Args:
      path: a folder, a file of weights, or the id of a repository on the Hugging Face hub (``owner/name``), the only case that uses
        the network.
      subfolder: where in it the dictionary lies, ``"resid_post_layer_10/trainer_1"``; may end in the name of a file of weights.

    Returns:
      ``(spec, params, meta)``; parameters are float32 and act on raw activations.

    Raises:
      UserError: nothing there, a format that is not known, files that contradict each other or are damaged.
    """
    folder, files = _offered(path, subfolder)
    found = _recognise(folder, files)
    if found is not None:
        try:
            spec, params, meta = FORMATS[found[0]].load(folder, files, found[1])
        except UserError as error:  # a stranger's file may say anything, at any length
            raise error if len(str(error)) < _LONGEST else UserError(f"{str(error)[:_LONGEST]} ...") from None
        _check_finite(folder, params)
        return spec, params, meta
    what = folder if len(files) != 1 else folder / next(iter(files))
    if not any((folder / name).is_file() for name in CONFIGS) and not any(name.endswith(_WEIGHTS) for name in files):
        raise UserError(f"{what}: holds no dictionary (no {', '.join(CONFIGS)} and no weights){_suggest(folder)}")
    raise UserError(f"{what}: not a dictionary format that is read; those are {', '.join(FORMATS)}{_suggest(folder)}")


def save_dictionary(path: str | Path, spec: Any, params: dict, meta: DictionaryMeta, format: str = "dlmscope") -> None:
    """Writes a dictionary into a folder, which is made; each file appears whole or not at all.

    Args:
      path: the folder; a dictionary that is already there is replaced.
      format: ``"dlmscope"``, ``"dictionary_learning"``, ... (``formats/README.md`` lists what each can say).

    Raises:
      UserError: an unknown format, parameters that do not fit the spec or cannot be said in the format, a folder that holds a
        dictionary of another format, a full disk.
    """
    writers = {name: module for name, module in FORMATS.items() if hasattr(module, "save")}
    if format not in writers:
        raise UserError(f"save_dictionary: format {format!r} is not known: one of {', '.join(writers)}")
    folder = Path(path)
    if (other := _held(folder)) not in (None, format):
        raise UserError(f"{folder}: holds a dictionary of the {other} format, which would still be found: choose another folder")
    writers[format].save(folder, spec, params, meta)


def _check_finite(folder: Path, params: dict) -> None:
    """Raises for NaN, and for infinity anywhere but in a threshold, where it is a latent that never fires."""
    for name, value in params.items():
        if bool(jnp.isnan(value).any() if name == "threshold" else ~jnp.isfinite(value).all()):
            raise UserError(f"{folder}: {name} holds NaN or infinity: the dictionary is damaged, or its training diverged")


def _recognise(folder: Path, files: frozenset[str]) -> tuple[str, Any] | None:
    """The name of the format of what is offered, and the configuration that says so."""
    configs = [_json(folder / name) for name in CONFIGS if (folder / name).is_file()]
    return next(((name, c) for c in configs or [None] for name, reader in FORMATS.items() if reader.recognises(folder, files, c)), None)


def _held(folder: Path) -> str | None:
    """The format that the configuration in a folder belongs to; None: there is none, or a damaged one."""
    if not any((folder / name).is_file() for name in CONFIGS):
        return None
    try:
        found = _recognise(*_offered(folder, None))
    except UserError:
        return None
    return found and found[0]


def _offered(path: str | Path, subfolder: str | None) -> tuple[Path, frozenset[str]]:
    """The folder and the names of the files in it that may be read."""
    at = Path(path) / (subfolder or "") if Path(path).exists() else _from_hub(str(path), (subfolder or "").strip("/"))
    if at.is_file():
        return at.parent, frozenset((at.name,))
    if not at.is_dir():
        raise UserError(f"{at}: no such folder{_suggest(Path(path))}")
    return at, frozenset(entry.name for entry in at.iterdir() if entry.is_file())


def _from_hub(name: str, subfolder: str) -> Path:
    """Where the files of known formats in one folder of a repository lie, after they have been fetched."""
    owner, slash, rest = name.partition("/")
    if not slash or not owner or not rest or "/" in rest or name.startswith((".", "~")):
        raise UserError(f"{name}: no such folder (and no hub id, which has the form owner/name)")
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    patterns = {*CONFIGS, *(pattern for reader in FORMATS.values() for pattern in reader.FILES)}
    folder, wanted = subfolder, []
    if subfolder.endswith(_WEIGHTS):  # that file, and what describes it
        folder, wanted = posixpath.dirname(subfolder), [subfolder]
        patterns = {pattern for pattern in patterns if pattern.endswith((".json", ".yaml"))}
    wanted += sorted(posixpath.normpath(posixpath.join(folder, pattern)) for pattern in patterns)
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=[w for w in wanted if not w.startswith("..")])) / subfolder
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()
        raise UserError(f"{name}: no such folder, and the hub did not give it: {reason[0] if reason else type(error).__name__}") from None


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error}") from None


def _suggest(folder: Path) -> str:
    """The dictionaries below a folder, for somebody who named the folder above them."""
    if not folder.is_dir():
        return ""
    patterns = [f"{depth}{name}" for depth in ("*/", "*/*/") for name in CONFIGS]
    found = sorted({str(p.parent.relative_to(folder)) for pattern in patterns for p in folder.glob(pattern)})
    shown = ", ".join(found[:6]) + (f" and {len(found) - 6} more" if len(found) > 6 else "")
    return f"; give one of its subfolders: {shown}" if found else ""
