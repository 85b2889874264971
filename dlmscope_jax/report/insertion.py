"""What the models lose with a dictionary in place of their activations, beside what the controls cost."""

from collections.abc import Iterable
from typing import Any

from .charts import Axis, Point, Row, Series, dot_plot, legend, line_plot, side_by_side
from .markup import Html, el, join
from .page import Section, lead, missing
from .run import Dictionary, Run
from .tables import fixed, interval, number, table, tick

REFERENCE = 0.45  # METHODS.md's rates hold it, and it is where the diffusion models are compared

# condition -> what it is called here, and its colour, mark and line pattern (the dictionary is drawn in ink, above all)
_CONDITIONS = {
    "spliced": ("dictionary", 7, 0, 0),
    "noise": ("matched noise", 3, 1, 1),
    "untrained": ("untrained dictionary", 4, 2, 2),
    "mean": ("mean by mask state", 5, 3, 3),
    "zero": ("zero", 6, 4, 4),
}
_LINEAR_WITHIN = 0.1
# title, axis, its scale, and what the scale is called
_QUANTITIES = {
    "delta": ("Δloss", "Δloss, nats a scored token", "signed_log", f"axis linear within ±{_LINEAR_WITHIN}, logarithmic beyond"),
    "kl": ("KL(clean ∥ replaced)", "KL, nats a scored token", "log", "logarithmic axis"),
    "top1": ("Top-1 agreement", "share of scored tokens", "linear", "the same most likely token as the clean model"),
}


def reference_rate(d: Dictionary) -> float | None:
    """The measured rate nearest to .45; 0 for an autoregressive model; None where nothing was measured."""
    rates = [rate for rate in (d.insertion or {}).get("rates") or () if isinstance(rate, int | float)]
    return min(rates, key=lambda rate: abs(rate - REFERENCE)) if rates else None


def at_reference(d: Dictionary, condition: str) -> dict[str, Any] | None:
    """The row of a condition at the reference rate."""
    return _row(d, condition, reference_rate(d))


def insertion(run: Run) -> Section:
    """Δloss, KL and top-1 agreement: all dictionaries at one rate, then every diffusion dictionary by rate, then the numbers."""
    measured = [d for d in run.dictionaries if d.insertion]
    if not measured:
        return Section("insertion", "Insertion", missing("Insertion was not measured in this run (no results of kind “delta_loss”)."))
    said = lead(
        join(
            [
                "The model runs on with other values in the place of its activations: the dictionary's reconstruction, or a control. ",
                el("em", "Matched noise"),
                " has, row by row, the norm of the dictionary's own error; the ",
                el("em", "untrained dictionary"),
                " has the same shape and its first weights. All conditions see the same masks; bars are 95 % intervals over documents. "
                "Faithful is judged on KL: the loss alone can fall for reasons that have nothing to do with the reconstruction.",
            ]
        )
    )
    body = [said, el("h3", "All dictionaries"), legend_of_conditions(measured, lines=False), *_overview(run, measured)]
    swept = [d for d in measured if len(d.insertion["rates"]) > 1]
    if swept:
        body += [el("h3", "By corruption rate"), legend_of_conditions(swept)]
        for d in swept:
            body += [
                el("h4", join([d.model, " ", el("span", d.label, class_="site")])),
                side_by_side([_by_rate(d, q) for q in _QUANTITIES]),
            ]
    body += [el("h3", "Loss recovered"), _recovered(measured), _provenance(measured)]
    absent = [d.name for d in run.dictionaries if not d.insertion]
    if absent:
        body.append(missing("Not measured for " + ", ".join(absent) + "."))
    return Section("insertion", "Insertion", join(body))


def _conditions(dictionaries: list[Dictionary]) -> list[str]:
    found = [c for d in dictionaries for c in d.insertion.get("conditions") or () if c != "clean"]
    return list(dict.fromkeys([c for c in _CONDITIONS if c in found] + found))


def _named(condition: str, points: tuple[Point, ...] = ()) -> Series:
    name, colour, mark, dash = _CONDITIONS.get(condition, (condition, 8, 5, 5))
    return Series(name, points, colour, mark, dash, strong=condition == "spliced")


def _row(d: Dictionary, condition: str, rate: float | None) -> dict[str, Any] | None:
    for row in (d.insertion or {}).get("rows") or ():
        if row.get("condition") == condition and row.get("rate") == rate:
            return row
    return None


def _point(x: float, measured: dict[str, Any] | None, scale: str = "linear") -> Point | None:
    if not measured or measured.get("value") is None or (scale == "log" and measured["value"] <= 0):
        return None
    return Point(x, measured["value"], measured.get("low"), measured.get("high"))


def _overview(run: Run, measured: list[Dictionary]) -> list[Html]:
    conditions = _conditions(measured)
    series = [_named(c) for c in conditions]
    rates = {reference_rate(d) for d in measured} - {0}
    at = " and ".join(tick(r) for r in sorted(r for r in rates if r is not None))
    said = (
        f"Diffusion models at corruption rate {at}; autoregressive models on next tokens of clean text."
        if at
        else "Next tokens of clean text."
    )
    plots = []
    for key, (title, _, scale, _) in _QUANTITIES.items():
        rows = []
        for d in measured:
            rate = reference_rate(d)
            found = {i: _point(0, (_row(d, c, rate) or {}).get(key), scale) for i, c in enumerate(conditions)}
            rows.append(Row(d.label, {i: p for i, p in found.items() if p is not None}, group=d.model))
        axis, note = _axis(key, [p for row in rows for p in row.points.values()])
        plots.append(dot_plot(title, rows, series, axis, note=note, keys=False))
    return [el("p", said, class_="said"), side_by_side(plots, large=True)]


def _axis(key: str, points: Iterable[Point]) -> tuple[Axis, str]:
    """The axis of a quantity and what its scale is called; Δloss is drawn linearly where all of it is small."""
    _, label, scale, note = _QUANTITIES[key]
    if scale == "signed_log" and all(abs(p.y or 0) <= _LINEAR_WITHIN for p in points):
        return Axis(label), "linear axis"
    ends = (0.0, 1.0) if key == "top1" else (None, None)
    return Axis(label, scale, *ends, linear_within=_LINEAR_WITHIN), note


def legend_of_conditions(dictionaries: list[Dictionary], lines: bool = True) -> Html:
    """One legend for all plots that follow it."""
    return legend([_named(c) for c in _conditions(dictionaries)], lines)


def _by_rate(d: Dictionary, key: str) -> Html:
    title, _, scale, _ = _QUANTITIES[key]
    series = []
    for condition in _conditions([d]):
        points = [_point(rate, (_row(d, condition, rate) or {}).get(key), scale) for rate in d.insertion["rates"]]
        series.append(_named(condition, tuple(p for p in points if p is not None)))
    x = Axis("corruption rate", low=0.0, high=1.0, form=tick)
    axis, note = _axis(key, [p for s in series for p in s.points])
    return line_plot(title, series, x, axis, note=note, keys=False, size=(340, 230))


def _recovered(measured: list[Dictionary]) -> Html:
    baselines = list(dict.fromkeys(r["baseline"] for d in measured for r in d.insertion.get("loss_recovered") or ()))
    if not baselines:
        return missing("Loss recovered is not in these results.")
    rows = []
    for d in measured:
        found = {(r["rate"], r["baseline"]): r for r in d.insertion.get("loss_recovered") or ()}
        row = _row(d, "clean", None) or {}
        rows.append(
            [
                f"{d.model} {d.label}",
                interval(row.get("loss"), fixed),
                *(interval(found.get((None, b)), fixed) for b in baselines),
                number(row.get("tokens")),
                number(row.get("documents")),
            ]
        )
    head = ["All rates together", "clean loss, nats", *(f"recovered, against {b}" for b in baselines), "scored tokens", "documents"]
    return table(head, rows, class_="striped")


def _provenance(measured: list[Dictionary]) -> Html:
    lines = []
    for d in measured:
        i = d.insertion or {}
        parts = [
            i.get("objective") or "objective not stated",
            f"{number(i.get('blocks'))} blocks of {number(i.get('block_length'))} tokens of the {i.get('side')} side",
            f"replaced at {i.get('positions')} positions",
            f"seed {i.get('seed')}",
        ]
        parts += [f"mean and untrained dictionary fitted on {i['calibration']}"] if i.get("calibration") else []
        parts += ["in spite of: " + "; ".join(i["forced"])] if i.get("forced") else []
        parts += sorted({r[q]["note"] for r in i["rows"] for q in _QUANTITIES if isinstance(r.get(q), dict) and r[q].get("note")})
        lines.append(el("li", f"{d.name}: {', '.join(parts)}."))
    return el("details", el("summary", "What was scored"), el("ul", *lines))
