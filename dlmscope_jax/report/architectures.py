"""Dictionaries of several architectures beside each other: what each is called and looks like, and seeds taken together."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .run import Dictionary

_NAMES = {
    "topk": "TopK", "batch_topk": "BatchTopK", "matryoshka": "Matryoshka", "relu": "ReLU", "jumprelu": "JumpReLU", "gated": "Gated",
    "binary": "Binary",
}  # fmt: skip
# colour and mark of an architecture, the same in every plot
_LOOKS = {
    "topk": (0, 0), "batch_topk": (1, 1), "matryoshka": (2, 2), "relu": (3, 3), "jumprelu": (4, 4), "gated": (8, 5), "binary": (6, 1),
}  # fmt: skip
_LEVELS = {"k": "k", "sparsity": "λ", "target_l0": "L0*", "entropy": "αe", "covariance": "αc"}


@dataclass(frozen=True)
class Setting:
    """Dictionaries that differ only in the seed of their first weights.

    Attributes:
      name: the architecture in words, with what tells it from others.
      level: how sparse it was made, in words.
      members: the dictionaries.
    """

    name: str
    level: str
    members: tuple[Dictionary, ...]

    @property
    def look(self) -> tuple[int, int, int]:
        """Colour, mark and line pattern: the architecture's, and of a transcoder another pattern."""
        first = self.members[0]
        colour, mark = _LOOKS.get(str(first.fact("architecture")), (5, 0))
        return colour, mark, (2 if "skip" in first.variant else 1) if first.written != first.site else 0

    def measured(self, read: Callable[[Dictionary], Any]) -> dict[str, Any]:
        """A quantity: of one member with its own interval; of several their mean, with the least and the most as bounds."""
        found = [value if isinstance(value, dict) else {"value": value} for value in map(read, self.members)]
        values = [value["value"] for value in found if value.get("value") is not None]
        if len(self.members) == 1 or not values:
            return found[0]
        return {"value": sum(values) / len(values), "low": min(values), "high": max(values)}


def settings(dictionaries: Sequence[Dictionary]) -> list[Setting]:
    """The settings among some dictionaries, in the order of architectures and levels in which they stand in the run's configuration."""
    groups: dict[tuple[str, str], list[Dictionary]] = {}
    several_widths = len({d.fact("width") or d.fact("latents") for d in dictionaries}) > 1
    for d in dictionaries:
        groups.setdefault((_named(d), _level(d, several_widths)), []).append(d)
    order = list(_NAMES)

    def place(group: tuple[tuple[str, str], list[Dictionary]]) -> tuple:
        (name, _), (first, *_) = group
        kind = str(first.fact("architecture"))
        levels = tuple((first.fact("level") or {"k": first.k or 0}).values())
        return (first.written != first.site, order.index(kind) if kind in order else 99, name, levels)

    return [Setting(name, level, tuple(found)) for (name, level), found in sorted(groups.items(), key=place)]


def _named(d: Dictionary) -> str:
    skip = "skip " if d.variant.startswith("skip_") else ""
    name = _NAMES.get(d.variant.removeprefix("skip_"), d.variant)
    return f"{skip}{name} transcoder" if d.written != d.site else name


def _level(d: Dictionary, several_widths: bool) -> str:
    level = d.fact("level") or ({"k": d.k} if d.k is not None else {})
    width = (d.fact("width") or d.fact("latents")) if several_widths else None
    words = [f"{_LEVELS.get(name, name)} {_short(value)}" for name, value in level.items()]
    return ", ".join(words + ([f"{width} latents"] if width else []))


def _short(value: float) -> str:
    """A weight without padding: 1e-6, not 1e-06."""
    return f"{value:g}".replace("e-0", "e-")
