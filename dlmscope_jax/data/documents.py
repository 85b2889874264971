"""Documents: a named text that belongs to one side (train, dev or test)."""

from dataclasses import dataclass
from typing import Literal

Side = Literal["train", "dev", "test"]
SIDES: tuple[Side, ...] = ("train", "dev", "test")


@dataclass(frozen=True)
class Document:
    """One text. ``name`` is unique within its collection; ``side`` says what the text may be used for (METHODS.md, Data)."""

    name: str
    text: str
    side: Side
