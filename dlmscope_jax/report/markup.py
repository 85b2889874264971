"""HTML as values: everything that is not already markup is escaped, so that no token of a corpus can become a tag."""

import json
import re
import unicodedata
from collections.abc import Iterable
from typing import Any

_VOID = frozenset({"meta", "input", "br", "hr", "col"})


class Html(str):
    """A string that is markup already; any other string is text and is escaped when it becomes part of the page."""

    __slots__ = ()


def text(value: Any) -> Html:
    """Markup for any value: markup stays, None is nothing, the rest is escaped (also for use inside quotes)."""
    if isinstance(value, Html):
        return value
    if value is None:
        return Html("")
    plain = str(value)
    return Html(_TO_ESCAPE.sub(_escaped, plain) if _TO_ESCAPE.search(plain) else plain)


# beside markup's own characters: NUL, which no page may hold, and lone surrogates, which no file can
_TO_ESCAPE = re.compile("[&<>\"'\0\ud800-\udfff]")
_ESCAPES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;"}


def _escaped(match: re.Match[str]) -> str:
    return _ESCAPES.get(match[0], "\N{REPLACEMENT CHARACTER}")


def join(parts: Iterable[Any], separator: str = "") -> Html:
    """Markup of several values, one after another."""
    return Html(text(separator).join(text(part) for part in parts))


def el(name: str, /, *children: Any, **attributes: Any) -> Html:
    """An element. ``class_`` and ``for_`` stand for class and for, ``data_x`` for data-x; None or False leaves an attribute out, True
    gives one without a value."""
    written = []
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-")
        if value is True:
            written.append(f" {key}")
        elif value is not None and value is not False:
            written.append(f' {key}="{text(value)}"')
    start = f"<{name}{''.join(written)}>"
    return Html(start if name in _VOID else f"{start}{join(children)}</{name}>")


def island(identity: str, data: Any) -> Html:
    """A JSON block that a script reads. ``<``, ``>`` and ``&`` are written as escapes, so that no value can end the element.

    Raises:
      ValueError: data holds NaN or infinity, which JSON has no words for.
    """
    plain = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for raw in "<>&":
        plain = plain.replace(raw, f"\\u{ord(raw):04x}")
    return Html(f'<script type="application/json" id="{text(identity)}">{plain}</script>')


def visible(piece: str) -> str:
    """A token's text with everything that the eye would miss drawn: spaces, tabs, line ends, control and format characters."""
    if not piece:
        return "∅"
    return "".join(_drawn(character) for character in piece)


def _drawn(character: str) -> str:
    if character in _GLYPHS:
        return _GLYPHS[character]
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)
    if 0xD800 <= code < 0xE000:
        return "\N{REPLACEMENT CHARACTER}"
    # format characters (zero width, direction overrides), separators and private ones change or hide their neighbours
    if unicodedata.category(character) in ("Cc", "Cf", "Zs", "Zl", "Zp", "Co", "Cn"):
        return f"⟨{code:04X}⟩"
    return character


_GLYPHS = {" ": "·", "\n": "↵", "\r": "␍", "\t": "→", "\x7f": "␡"}
