"""Plots as SVG written here: they exist without a script, print, follow the page's colours, and carry their numbers as a table.

Every mark has a title (shown on hover) with its exact numbers, every plot a one-sentence description for those who do not see it.
Series differ in colour, in the shape of their marks and in the pattern of their lines; the colours are Okabe and Ito's.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from .markup import Html, el, join
from .tables import number, table, tick

_MARKS = ("circle", "square", "diamond", "triangle", "cross", "ring")
_DASHES = (None, "7 3", "2 3", "9 3 2 3", "4 2", "1 2")
_DOTS_UP_TO = 24  # marks on a line of more points would be a thicker line


@dataclass(frozen=True)
class Point:
    """A measured value, with its interval where there is one; y None leaves a gap."""

    x: float
    y: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Series:
    """Points of one name; ``colour``, ``mark`` and ``dash`` are indices that mean the same in all plots of a page."""

    name: str
    points: tuple[Point, ...]
    colour: int = 0
    mark: int = 0
    dash: int = 0
    strong: bool = False


@dataclass(frozen=True)
class Axis:
    """What an axis shows. ``linear_within`` makes it linear around 0 and logarithmic beyond (for signed values of all sizes)."""

    label: str
    scale: str = "linear"  # linear, log, signed_log
    low: float | None = None
    high: float | None = None
    linear_within: float = 1.0
    whole: bool = False  # only whole numbers make sense as ticks
    form: Callable[[float], str] = field(default=number)  # of measured values
    tick: Callable[[float], str] = field(default=tick)


class _Scale:
    """From values to pixels, with round ticks."""

    def __init__(self, axis: Axis, values: Sequence[float], start: float, end: float):
        self.axis, self.start, self.end = axis, start, end
        values = [v for v in values if v is not None and (axis.scale != "log" or v > 0)]
        low = axis.low if axis.low is not None else min(values, default=0.0)
        high = axis.high if axis.high is not None else max(values, default=1.0)
        if axis.scale == "log":
            self.ticks = _log_ticks(max(low, 1e-12), max(high, 1e-12))
            self.low, self.high = self.ticks[0], self.ticks[-1]
        elif axis.scale == "signed_log":
            self.low, self.high = min(low, 0.0), max(high, axis.linear_within)
            self.ticks = self._signed_ticks()
        else:
            if high - low < 1e-12:
                room = 0.5 * (abs(low) or 1)
                low, high = (low, high + 2 * room) if axis.low is not None else (low - room, high + room)
            step = _round_step((high - low) / 5, axis.whole)
            self.low = low if axis.low is not None else math.floor(low / step + 1e-9) * step
            self.high = high if axis.high is not None else math.ceil(high / step - 1e-9) * step
            first = math.ceil(self.low / step - 1e-9)
            self.ticks = [round(step * i, 12) for i in range(first, math.floor(self.high / step + 1e-9) + 1)]

    def _signed_ticks(self) -> list[float]:
        unit = self.axis.linear_within
        magnitudes = [unit * 10.0**e for e in range(0, 12)]
        above = [m for m in magnitudes if m <= self.high * 1.0001]
        below = [-m for m in magnitudes if -m >= self.low * 1.0001]
        if self.high > above[-1]:  # the end of the axis is not at a power of ten: leave a little room past the last value
            self.high *= 1.25
        if self.low < 0:
            self.low = min(self.low * 1.25, -unit * 0.25)
        return sorted([*below, 0.0, *above])

    def _warp(self, value: float) -> float:
        if self.axis.scale == "log":
            return math.log10(max(value, self.low))
        if self.axis.scale == "signed_log":
            size = abs(value) / self.axis.linear_within
            return math.copysign(size if size <= 1 else 1 + math.log10(size), value)
        return value

    def __call__(self, value: float) -> float:
        low, high = self._warp(self.low), self._warp(self.high)
        return self.start + (min(max(self._warp(value), low), high) - low) / (high - low) * (self.end - self.start)


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten around the values; within two decades also 2 and 5, so that the values fill the plot."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    if last - first <= 2:
        ticks = [m * 10.0**e for e in range(first, last + 1) for m in (1, 2, 5)]
        below = max((i for i, t in enumerate(ticks) if t <= low * 1.0001), default=0)
        above = min((i for i, t in enumerate(ticks) if t >= high * 0.9999), default=len(ticks) - 1)
        return ticks[below : max(above, below + 1) + 1]
    step = max(1, math.ceil((last - first) / 6))
    return [10.0**e for e in range(first, last + step, step)]


def _round_step(rough: float, whole: bool = False) -> float:
    power = 10.0 ** math.floor(math.log10(max(rough, 1.0) if whole else rough))
    return next(m * power for m in ((1, 2, 5, 10) if whole else (1, 2, 2.5, 5, 10)) if m * power >= rough * 0.999)


def figure(title: str, drawing: Html, numbers: Html, keys: Html | None = None, note: str | None = None) -> Html:
    """A plot with its title, its legend, and the numbers behind it."""
    return el(
        "figure",
        el("figcaption", el("strong", title), el("span", note, class_="note") if note else None),
        keys,
        drawing,
        el("details", el("summary", "Numbers"), numbers, class_="numbers"),
    )


def legend(series: Sequence[Series], lines: bool = True) -> Html:
    """What each series looks like."""
    items = []
    for s in series:
        line = el("line", x1=1, y1=6, x2=27, y2=6, class_="s", stroke_dasharray=_DASHES[s.dash % len(_DASHES)]) if lines else None
        key = el("svg", line, _mark(s.mark, 14, 6, 4), viewBox="0 0 28 12", width=28, height=12, aria_hidden="true", class_=_class(s))
        items.append(el("li", key, s.name))
    return el("ul", *items, class_="legend")


def line_plot(
    title: str, series: Sequence[Series], x: Axis, y: Axis, note: str | None = None, keys: bool = True, size: tuple[int, int] = (420, 250)
) -> Html:
    """Lines over a common x, with an interval bar at every point that has one."""
    width, height = size
    left, right, top, bottom = 58, 12, 10, 42
    xs = [p.x for s in series for p in s.points]
    ys = [v for s in series for p in s.points for v in (p.y, p.low, p.high) if v is not None]
    across, up = _Scale(x, xs, left, width - right), _Scale(y, ys, height - bottom, top)
    drawn = [_frame(across, up, (left, width - right, top, height - bottom))]
    for s in sorted(series, key=lambda s: s.strong):  # what matters most lies on top
        drawn.append(el("g", *_line(s, across, up, y.form, x), class_=_class(s)))
    described = f"{title}: {y.label} by {x.label}; " + "; ".join(_range(s, y.form) for s in series)
    return figure(title, _svg(described, size, drawn), _by_x(series, x, y), legend(series) if keys and len(series) > 1 else None, note)


def _line(s: Series, across: _Scale, up: _Scale, form: Callable, x: Axis) -> list[Html]:
    runs, run = [], []
    for p in s.points:
        if p.y is None:
            runs, run = [*runs, run], []
        else:
            run.append(f"{across(p.x):.1f},{up(p.y):.1f}")
    drawn = [
        el("polyline", points=" ".join(r), class_="s", stroke_dasharray=_DASHES[s.dash % len(_DASHES)]) for r in [*runs, run] if len(r) > 1
    ]
    present = [p for p in s.points if p.y is not None]
    for p in present:
        if p.low is not None and p.high is not None:
            drawn.append(
                el("line", x1=f"{across(p.x):.1f}", x2=f"{across(p.x):.1f}", y1=f"{up(p.low):.1f}", y2=f"{up(p.high):.1f}", class_="i")
            )
    if len(present) <= _DOTS_UP_TO:
        for p in present:
            said = el("title", f"{s.name}, {x.label} {x.form(p.x)}: {_with_interval(p, form)}")
            drawn.append(el("g", said, _mark(s.mark, across(p.x), up(p.y), 3.6)))
    return drawn


@dataclass(frozen=True)
class Row:
    """A line of a dot plot: a name and one value for each series that has one."""

    name: str
    points: dict[int, Point]
    group: str = ""


def dot_plot(title: str, rows: Sequence[Row], series: Sequence[Series], x: Axis, note: str | None = None, keys: bool = True) -> Html:
    """One line a thing, one mark a series: for values of unlike things beside each other. ``Point.y`` is the value, its x is not used."""
    width, right, top, bottom, step = 480, 14, 6, 42, 22
    left = min(max(124, 6 * max((len(row.name) for row in rows), default=0) + 16), 230)
    tops, groups, place = [], [], top
    for i, row in enumerate(rows):
        if row.group and (i == 0 or rows[i - 1].group != row.group):
            groups.append((place + 17, row.group))
            place += 24
        tops.append(place + step / 2)
        place += step
    height = place + bottom
    values = [v for row in rows for p in row.points.values() for v in (p.y, p.low, p.high) if v is not None]
    across = _Scale(x, values, left, width - right)
    drawn = [
        el("line", x1=f"{across(t):.1f}", x2=f"{across(t):.1f}", y1=top, y2=place, class_="g" if t or x.scale == "log" else "z")
        for t in across.ticks
    ]
    drawn += [el("text", x.tick(t), x=f"{across(t):.1f}", y=place + 16, text_anchor="middle") for t in _uncrowded(across)]
    drawn.append(el("text", x.label, x=(left + width - right) / 2, y=height - 6, text_anchor="middle", class_="l"))
    drawn += [el("text", group, x=2, y=y, class_="h") for y, group in groups]
    for row, y in zip(rows, tops, strict=True):
        drawn.append(el("text", row.name, x=left - 10, y=y + 4, text_anchor="end"))
        drawn.append(el("line", x1=left, x2=width - right, y1=y, y2=y, class_="g"))
        for i, p in sorted(row.points.items(), key=lambda item: series[item[0]].strong):
            if p.y is None:
                continue
            s = series[i]
            bar = None
            if p.low is not None and p.high is not None:
                bar = el("line", x1=f"{across(p.low):.1f}", x2=f"{across(p.high):.1f}", y1=y, y2=y, class_="i")
            said = el("title", f"{row.group} {row.name}, {s.name}: {_with_interval(p, x.form)}".strip())
            drawn.append(el("g", bar, said, _mark(s.mark, across(p.y), y, 4.5 if s.strong else 3.8), class_=_class(s)))
    body = [
        [
            f"{row.group} {row.name}".strip(),
            *(_with_interval(row.points[i], x.form) if i in row.points else "–" for i in range(len(series))),
        ]
        for row in rows
    ]
    numbers = table(["", *(s.name for s in series)], body, caption=f"{title} ({x.label})")
    return figure(
        title,
        _svg(f"{title}: {x.label} of {len(rows)} rows", (width, height), drawn),
        numbers,
        legend(series, lines=False) if keys else None,
        note,
    )


def bar_plot(
    title: str, bars: Sequence[tuple[str, float | None]], x: str, y: Axis, colour: int = 0, size: tuple[int, int] = (300, 130)
) -> Html:
    """Bars from zero; a None is an empty place, not a zero."""
    width, height = size
    left, right, top, bottom = 50, 6, 8, 36
    up = _Scale(Axis(y.label, low=0.0, form=y.form, tick=y.tick), [v for _, v in bars if v is not None] or [1.0], height - bottom, top)
    pitch = (width - left - right) / max(len(bars), 1)
    drawn = []
    for t in up.ticks[:: max(1, len(up.ticks) // 4)]:
        drawn.append(el("line", x1=left, x2=width - right, y1=f"{up(t):.1f}", y2=f"{up(t):.1f}", class_="z" if t == 0 else "g"))
        drawn.append(el("text", y.tick(t), x=left - 5, y=f"{up(t) + 3.5:.1f}", text_anchor="end"))
    every = max(1, math.ceil(len(bars) / 6))
    for i, (name, value) in enumerate(bars):
        if value is not None:
            bar = el(
                "rect",
                x=f"{left + pitch * (i + 0.12):.1f}",
                width=f"{pitch * 0.76:.1f}",
                y=f"{up(value):.1f}",
                height=f"{up(0) - up(value):.1f}",
            )
            drawn.append(el("g", el("title", f"{name}: {y.form(value)}"), bar))
        if i % every == 0:
            drawn.append(el("text", name, x=f"{left + pitch * (i + 0.5):.1f}", y=height - bottom + 14, text_anchor="middle"))
    drawn.append(el("text", x, x=(left + width - right) / 2, y=height - 4, text_anchor="middle", class_="l"))
    numbers = table([x, y.label], [[name, y.form(value) if value is not None else "–"] for name, value in bars], caption=title)
    return figure(title, _svg(f"{title}: {y.label} by {x}", size, [el("g", *drawn, class_=f"c{colour} bars")]), numbers)


def heat_plot(
    title: str,
    values: Sequence[Sequence[float | None]],
    rows: Sequence[str],
    columns: Sequence[str],
    x: str,
    y: str,
    outlined: frozenset[tuple[int, int]] = frozenset(),
    note: str | None = None,
    top_value: float | None = None,
    width: int = 620,
    form: Callable[[float], str] = number,
) -> Html:
    """A grid shaded from 0 to ``top_value`` (the largest value by default); ``outlined`` cells (row, column) get a border."""
    left, right, top, bottom = 44, 8, 8, 40
    cell = min(22.0, (width - left - right) / max(len(columns), 1))
    tall = min(cell, 14.0)
    width, height = round(left + right + cell * len(columns)), round(top + bottom + tall * len(rows))
    largest = top_value if top_value is not None else max((v for line in values for v in line if v is not None), default=0.0)
    drawn = [el("rect", x=left, y=top, width=f"{cell * len(columns):.1f}", height=f"{tall * len(rows):.1f}", class_="ground")]
    for r, line in enumerate(values):
        for c, value in enumerate(line):
            border = (r, c) in outlined
            if not border and not (value and largest):
                continue  # an empty cell is the ground
            share = min(1.0, value / largest) if value and largest and value > 0 else 0.0
            said = el("title", f"{y} {rows[r]}, {x} {columns[c]}: {form(value) if value is not None else '–'}")
            drawn.append(
                el(
                    "rect", said, x=f"{left + cell * c:.1f}", y=f"{top + tall * r:.1f}", width=f"{cell:.1f}", height=f"{tall:.1f}",
                    class_="cell outlined" if border else "cell", fill_opacity=f"{share:.3f}",
                )
            )  # fmt: skip
    for labels, extent in ((rows, tall), (columns, cell)):
        every = max(1, math.ceil((14 if extent == tall else 22) / extent))
        for i in range(0, len(labels), every):
            if extent == tall:
                drawn.append(el("text", labels[i], x=left - 5, y=f"{top + tall * (i + 0.5) + 4:.1f}", text_anchor="end"))
            else:
                drawn.append(el("text", labels[i], x=f"{left + cell * (i + 0.5):.1f}", y=height - bottom + 14, text_anchor="middle"))
    drawn.append(el("text", x, x=(left + width - right) / 2, y=height - 6, text_anchor="middle", class_="l"))
    middle = top + tall * len(rows) / 2
    drawn.append(el("text", y, x=11, y=f"{middle:.1f}", text_anchor="middle", class_="l", transform=f"rotate(-90 11 {middle:.1f})"))
    body = [[name, *(form(v) if v is not None else "–" for v in line)] for name, line in zip(rows, values, strict=True)]
    numbers = table([f"{y} \\ {x}", *columns], body, caption=title)
    return figure(
        title, _svg(f"{title}: {len(rows)} by {len(columns)} cells, at most {form(largest)}", (width, height), drawn), numbers, None, note
    )


def _svg(described: str, size: tuple[int, int], drawn: Sequence[Html]) -> Html:
    return el(
        "svg", el("title", described), *drawn, viewBox=f"0 0 {size[0]} {size[1]}", role="img", class_="plot",
        style=f"max-width:{size[0] * 1.15:.0f}px",
    )  # fmt: skip


def _class(s: Series) -> str:
    return f"c{s.colour}" + (" strong" if s.strong else "")


def _frame(across: _Scale, up: _Scale, box: tuple[float, float, float, float]) -> Html:
    left, right, top, bottom = box
    drawn = []
    for t in up.ticks:
        zero = t == 0 and up.low <= 0
        drawn.append(el("line", x1=left, x2=right, y1=f"{up(t):.1f}", y2=f"{up(t):.1f}", class_="z" if zero else "g"))
    for t in _uncrowded(up):
        drawn.append(el("text", up.axis.tick(t), x=left - 6, y=f"{up(t) + 4:.1f}", text_anchor="end"))
    for t in across.ticks:
        drawn.append(el("line", x1=f"{across(t):.1f}", x2=f"{across(t):.1f}", y1=bottom, y2=bottom + 4, class_="t"))
        drawn.append(el("text", across.axis.tick(t), x=f"{across(t):.1f}", y=bottom + 17, text_anchor="middle"))
    drawn.append(el("line", x1=left, x2=right, y1=bottom, y2=bottom, class_="t"))
    drawn.append(el("text", across.axis.label, x=(left + right) / 2, y=bottom + 36, text_anchor="middle", class_="l"))
    middle = (top + bottom) / 2
    drawn.append(el("text", up.axis.label, x=12, y=middle, text_anchor="middle", transform=f"rotate(-90 12 {middle})", class_="l"))
    return el("g", *drawn)


def _uncrowded(scale: _Scale) -> list[float]:
    """The ticks whose labels have room: those around the bend of a signed axis can come too close."""
    room = 30 if scale.start < scale.end else 12
    kept: list[float] = []
    for value in sorted(scale.ticks, key=abs):
        if all(abs(scale(value) - scale(other)) >= room for other in kept):
            kept.append(value)
    return sorted(kept)


def _mark(kind: int, x: float, y: float, size: float) -> Html:
    at = f"{x:.1f}", f"{y:.1f}"
    match _MARKS[kind % len(_MARKS)]:
        case "circle":
            return el("circle", cx=at[0], cy=at[1], r=size, class_="m")
        case "ring":
            return el("circle", cx=at[0], cy=at[1], r=size, class_="m open")
        case "square":
            side = 1.8 * size
            return el("rect", x=f"{x - side / 2:.1f}", y=f"{y - side / 2:.1f}", width=f"{side:.1f}", height=f"{side:.1f}", class_="m")
        case "cross":
            a = size * 0.9
            return el("path", d=f"M{x - a:.1f} {y - a:.1f}l{2 * a:.1f} {2 * a:.1f}m0 {-2 * a:.1f}l{-2 * a:.1f} {2 * a:.1f}", class_="s")
        case "diamond":
            a = size * 1.3
            return el("path", d=f"M{x:.1f} {y - a:.1f}l{a:.1f} {a:.1f}l{-a:.1f} {a:.1f}l{-a:.1f} {-a:.1f}z", class_="m")
        case _:
            a = size * 1.2
            return el("path", d=f"M{x:.1f} {y - a:.1f}l{a:.1f} {1.8 * a:.1f}h{-2 * a:.1f}z", class_="m")


def _with_interval(p: Point, form: Callable[[float], str]) -> str:
    if p.y is None:
        return "–"
    return form(p.y) if p.low is None or p.high is None else f"{form(p.y)} [{form(p.low)}, {form(p.high)}]"


def _range(s: Series, form: Callable[[float], str]) -> str:
    values = [p.y for p in s.points if p.y is not None]
    return f"{s.name} from {form(values[0])} to {form(values[-1])}" if values else f"{s.name} without values"


def _by_x(series: Sequence[Series], x: Axis, y: Axis) -> Html:
    at: list[dict[float, Point]] = [{p.x: p for p in s.points} for s in series]
    rows = [
        [x.form(value), *(_with_interval(points[value], y.form) if value in points else "–" for points in at)]
        for value in sorted({p.x for s in series for p in s.points})
    ]
    return table([x.label, *(s.name for s in series)], rows, caption=f"{y.label} by {x.label}")


def side_by_side(plots: Sequence[Html], large: bool = False) -> Html:
    """Plots in a row that wraps: three small ones or two large ones to a line."""
    return el("div", join(plots), class_="plots large" if large else "plots")
