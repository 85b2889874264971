"""Numbers as text, and tables of them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .markup import Html, el, join, text

MISSING = "–"


def number(value: Any, digits: int = 3) -> str:
    """A number with so many significant digits; counts in full; a dash for None."""
    if value is None or isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return MISSING
    if isinstance(value, int):
        shown = f"{value:,}"
    elif value == 0:
        shown = "0"
    else:
        exponent = math.floor(math.log10(abs(float(f"{value:.{digits - 1}e}"))))
        shown = f"{value:.{digits - 1}e}" if exponent < -4 or exponent > 6 else f"{value:,.{max(digits - 1 - exponent, 0)}f}"
        if "e" in shown:
            mantissa, power = shown.split("e")
            shown = f"{mantissa}e{int(power)}"
    return shown.replace("-", "−")


def fixed(value: Any, places: int = 3) -> str:
    """A number with so many places, so that a column of them lines up."""
    if value is None or isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return MISSING
    shown = f"{value:,.{places}f}"
    return (shown.lstrip("-") if float(shown.replace(",", "")) == 0 else shown).replace("-", "−")


def percent(value: Any, digits: int = 2) -> str:
    """A share as a percentage."""
    if value is None or isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return MISSING
    if value == 0:
        return "0 %"
    return f"{number(100 * value, digits) if value < 0.1 else fixed(100 * value, 1)} %"


def tick(value: float) -> str:
    """A round number, as short as it can be."""
    if value and not 1e-3 <= abs(value) < 1e7:
        mantissa, power = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(power)}".replace("-", "−")
    return f"{value:,.10g}".replace("-", "−")


def percent_tick(value: float) -> str:
    """A round share as a percentage."""
    return f"{tick(round(100 * value, 10))} %"


def stacked(measured: Any, form: Any = number) -> Html:
    """An estimate with its interval below it, for tables with many columns."""
    if not isinstance(measured, Mapping):
        return text(form(measured))
    low, high = measured.get("low"), measured.get("high")
    return join(
        [form(measured.get("value")), el("small", f"[{form(low)}, {form(high)}]") if low is not None and high is not None else None]
    )


def interval(measured: Any, form: Any = number) -> str:
    """An estimate as ``value [low, high]``; without bounds just the value. Takes a plain number or an interval's mapping."""
    if not isinstance(measured, Mapping):
        return form(measured)
    low, high = measured.get("low"), measured.get("high")
    shown = form(measured.get("value"))
    return shown if low is None or high is None else f"{shown} [{form(low)}, {form(high)}]"


def duration(seconds: Any) -> str:
    """Seconds as people say them."""
    if not isinstance(seconds, int | float) or not math.isfinite(seconds):
        return MISSING
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def table(
    head: Sequence[Any] | Html, rows: Sequence[Sequence[Any]], caption: Any = None, class_: str | None = None, words: int = 1
) -> Html:
    """A table whose first column names the rows; the first ``words`` columns are words, the others numbers. It scrolls inside its box."""
    if not isinstance(head, Html):
        head = el("tr", *(el("th", cell, scope="col", class_=None if i < words else "n") for i, cell in enumerate(head)))
    body = []
    for row in rows:
        cells = [el("th", row[0], scope="row")]
        cells += [el("td", cell, class_=None if i < words else "n") for i, cell in enumerate(row[1:], start=1)]
        body.append(el("tr", *cells))
    shown = el("table", el("caption", caption) if caption else None, el("thead", head), el("tbody", *body), class_=class_)
    return el("div", shown, class_="scroll", tabindex="0", role="group", aria_label=caption or "table")


def facts(pairs: Sequence[tuple[Any, Any]]) -> Html:
    """Names and values, one a line."""
    return el("dl", join(join((el("dt", name), el("dd", value))) for name, value in pairs if value not in (None, "")), class_="facts")
