"""``load_dictionary`` and ``save_dictionary``: one door for every file format."""

import json
from pathlib import Path
from typing import Any

from dlmscope_jax.errors import UserError

from .formats import dictionary_learning, native
from .meta import DictionaryMeta

FORMATS = {"dlmscope": native, "dictionary_learning": dictionary_learning}


def load_dictionary(path: str | Path, subfolder: str | None = None) -> tuple[Any, dict, DictionaryMeta]:
    """Reads a dictionary; the format is recognised by the files that are there.

    Args:
      path: a folder, or the id of a repository on the Hugging Face hub (``owner/name``), the only case that uses the network.
      subfolder: where in it the dictionary lies, ``"resid_post_layer_10/trainer_1"``.

    Returns:
      ``(spec, params, meta)``; parameters are float32 and act on raw activations.

    Raises:
      UserError: nothing there, a format that is not known, files that contradict each other or are damaged.
    """
    folder = _folder(path, subfolder)
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise UserError(f"{folder}: holds no dictionary (no config.json){_suggest(folder)}")
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{config_path}: not JSON: {error}") from None
    for reader in FORMATS.values():
        if reader.recognises(folder, config):
            return reader.load(folder, config)
    raise UserError(f"{folder}: not a dictionary format that is read; those are {', '.join(FORMATS)}{_suggest(folder)}")


def save_dictionary(path: str | Path, spec: Any, params: dict, meta: DictionaryMeta, format: str = "dlmscope") -> None:
    """Writes a dictionary into a folder, which is made; each file appears whole or not at all.

    Args:
      path: the folder; a dictionary that is already there is replaced.
      format: ``"dlmscope"`` or ``"dictionary_learning"``.

    Raises:
      UserError: an unknown format, parameters that do not fit the spec or cannot be said in the format, a full disk.
    """
    if format not in FORMATS:
        raise UserError(f"save_dictionary: format {format!r} is not known: one of {', '.join(FORMATS)}")
    FORMATS[format].save(Path(path), spec, params, meta)


def _folder(path: str | Path, subfolder: str | None) -> Path:
    if Path(path).exists():
        folder = Path(path) / (subfolder or "")
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder{_suggest(Path(path))}")
        return folder
    owner, slash, name = str(path).partition("/")
    if not slash or not owner or not name or "/" in name or str(path).startswith((".", "~")):
        raise UserError(f"{path}: no such folder (and no hub id, which has the form owner/name)")
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    prefix = f"{subfolder.strip('/')}/" if subfolder else ""
    wanted = [prefix + file for file in ("config.json", native.WEIGHTS, dictionary_learning.WEIGHTS)]
    try:
        return Path(huggingface_hub.snapshot_download(str(path), allow_patterns=wanted)) / prefix
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()
        raise UserError(f"{path}: no such folder, and the hub did not give it: {reason[0] if reason else type(error).__name__}") from None


def _suggest(folder: Path) -> str:
    """The dictionaries below a folder, for somebody who named the folder above them."""
    if not folder.is_dir():
        return ""
    found = sorted(str(p.parent.relative_to(folder)) for pattern in ("*/config.json", "*/*/config.json") for p in folder.glob(pattern))
    shown = ", ".join(found[:6]) + (f" and {len(found) - 6} more" if len(found) > 6 else "")
    return f"; give one of its subfolders: {shown}" if found else ""
