"""Formats that are one ``.pt`` file each: which file is meant, and what it holds."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dlmscope_jax.errors import UserError

from .torch_pickle import TorchFile

_ENDINGS = (".pt", ".pth")


def only_file(files: frozenset[str]) -> str | None:
    """The ``.pt`` file that is offered, where there is exactly one."""
    found = [name for name in files if name.endswith(_ENDINGS)]
    return found[0] if len(found) == 1 else None


def choose(folder: Path, files: frozenset[str], pattern: re.Pattern[str]) -> Path:
    """The one file whose name fits ``pattern``.

    Raises:
      UserError: there are several; it lists them.
    """
    found = sorted((name for name in files if pattern.fullmatch(name)), key=_by_number)
    if len(found) != 1:
        shown = ", ".join(found[:6]) + (f" and {len(found) - 6} more" if len(found) > 6 else "")
        raise UserError(f"{folder}: holds {len(found)} dictionaries; give one of its files: {shown}")
    return folder / found[0]


def keys(folder: Path, files: frozenset[str]) -> frozenset[str]:
    """The names in the state dict of the only ``.pt`` file; empty where there is none.

    Raises:
      UserError: the file is damaged or asks for code.
    """
    name = only_file(files)
    if name is None:
        return frozenset()
    with TorchFile(folder / name) as file:
        return names_of(file.contents)


def names_of(state: Any) -> frozenset[str]:
    """The names in a state dict; empty for anything else."""
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
        return frozenset()
    return frozenset(name.removeprefix("_orig_mod.") for name in state)


def _by_number(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]
