"""Our card inside another library's files: what that library has no field for survives a round trip."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from dlmscope_jax.errors import UserError

from ..meta import DictionaryMeta, meta_from_mapping, meta_to_mapping

KEY = "dlmscope"


def of(
    where: Path, given: Any, extra: dict[str, Any], model: Any = None, site: str | None = None, layer: int | None = None, **known: Any
) -> DictionaryMeta:
    """The card of a file: what its own fields say, and from the card that was put into it (``given``, or None) what they do not.

    Args:
      where: the file, for messages.
      extra: entries of ``DictionaryMeta.extra`` of this format.
      model, site, layer, known: what the file's own fields say; None: nothing. Where nobody says it, model and site are "unknown".

    Raises:
      UserError: a card that is not one.
    """
    try:
        card = DictionaryMeta(model="unknown", site="unknown", layer=-1) if given is None else meta_from_mapping(given)
    except UserError as error:
        raise UserError(f"{where}: {KEY}: {error}") from None
    known |= {"model": model if isinstance(model, str) and model else None, "site": site, "layer": layer}
    said = {name: value for name, value in known.items() if value is not None}
    return replace(card, scale_folded=True, extra={**card.extra, **extra}, **said)


def to_write(meta: DictionaryMeta, own: tuple[str, ...]) -> dict[str, Any]:
    """The card as JSON values, without the entries of ``extra`` that the format writes itself (``own``)."""
    return meta_to_mapping(replace(meta, extra={key: value for key, value in meta.extra.items() if key not in (*own, "format")}))


def of_safetensors(path: Path) -> Any:
    """The card in the header of a safetensors file, where it lies for libraries that look at every key of their configuration.

    Raises:
      UserError: not a safetensors file, a card that is not JSON.
    """
    import safetensors

    try:
        with safetensors.safe_open(str(path), framework="numpy") as file:
            text = (file.metadata() or {}).get(KEY)
        return None if text is None else json.loads(text)
    except safetensors.SafetensorError as error:
        raise UserError(f"{path}: not a safetensors file: {error}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: its {KEY} card is not JSON") from None
