"""How well dictionaries reconstruct: one table with the models beside each other, and explained variance by corruption rate."""

from typing import Any

from .charts import Axis, Point, Series, line_plot, side_by_side
from .markup import Html, el, join, text
from .overview import described
from .page import Section, lead, missing
from .run import Dictionary, Run
from .tables import fixed, number, percent, stacked, tick

_OPEN = 8  # more tables than this are folded away
_SETS = {"all": "all rows", "masked": "masked", "visible": "visible", "predicting": "predicting"}


def _quartiles(values: dict[str, Any] | None) -> Html:
    if not values or values.get("median") is None:
        return text("–")
    return stacked({"value": values["median"], "low": values.get("q25"), "high": values.get("q75")}, fixed)


# name, how its row is set ("own": only the rows that a dictionary was trained on count), how it is read from a set
_QUANTITIES = (
    ("Explained variance", None, lambda s: _measured(s, "explained_variance", fixed)),
    ("without position 0 and outliers", "sub", lambda s: fixed((s.get("filtered") or {}).get("explained_variance"))),
    ("Cosine of x and x̂", None, lambda s: _measured(s, "cosine", fixed)),
    ("‖x − x̂‖ / ‖x‖, median [quartiles]", None, lambda s: _quartiles(s.get("relative_error"))),
    ("L0", None, lambda s: _measured(s, "l0", lambda v: fixed(v, 1))),
    ("Dead", "own", lambda s: percent(s.get("dead_share"))),
    ("Dense, fires on > 1 %", None, lambda s: percent(s.get("dense_share_1pct"))),
    ("Dense, fires on > 10 %", None, lambda s: percent(s.get("dense_share_10pct"))),
    ("n, rows", None, lambda s: number(s.get("rows"))),
)


def fidelity(run: Run) -> Section:
    """The fidelity table of every place, models side by side, then explained variance by rate."""
    measured = [d for d in run.dictionaries if d.sets]
    if not measured:
        return Section("fidelity", "Fidelity", missing("Fidelity was not measured in this run (no results of kind “fidelity”)."))
    places = list(dict.fromkeys(d.label for d in measured))
    tables = [_table(run, place, [d for d in measured if d.label == place]) for place in places]
    if len(tables) > _OPEN:
        tables = [el("details", el("summary", f"Tables of {len(tables)} places and dictionaries"), *tables)]
    absent = [m.name for m in run.models if not any(d.model == m.name for d in measured)]
    notes = [missing("Not measured for " + ", ".join(absent) + ".")] if absent else []
    few = [d for d in measured if d.fidelity.get("enough_rows") is False]
    if few:
        needed = number(few[0].fidelity.get("rows_needed_for_dead"))
        notes.append(missing(f"Fewer than {needed} rows, too few to call a latent dead: {', '.join(d.name for d in few)}."))
    notes += [
        missing(f"{d.name}: measured in spite of a mismatch: {'; '.join(d.fidelity['forced'])}.")
        for d in measured
        if d.fidelity.get("forced")
    ]
    said = lead(
        "Reconstruction of held-out rows. Masked and visible rows are those whose own input is, or is not, a mask. Dead latents fired on "
        "none of the n rows of the dictionary's own kind. Brackets are 95 % intervals over documents. Explained variance depends on the "
        "spread of the rows that it is taken over: compare it across columns only together with the relative error. Of a transcoder x is "
        "the row that it should produce; of a binary code, a latent is active where it has its rarer value."
    )
    return Section("fidelity", "Fidelity", join([said, *tables, *notes, _by_rate(run, measured)]))


def _measured(values: dict[str, Any], key: str, form: Any) -> Html:
    found = (values.get("intervals") or {}).get(key)
    return stacked(found or values.get(key), form)


def _table(run: Run, place: str, dictionaries: list[Dictionary]) -> Html:
    columns: list[tuple[Dictionary, str]] = []
    first = [el("th", place, scope="col", rowspan=2)]
    for m in run.models:
        for d in dictionaries:
            if d.model == m.name:
                sets = _distinct(d.sets)
                columns += [(d, name) for name in sets]
                first.append(el("th", described(m), scope="colgroup", colspan=len(sets), class_=f"over c{run.column(m.name)}"))
    second = [el("th", _SETS.get(name, name), scope="col", class_="n") for _, name in columns]
    rows = []
    for title, style, read in _QUANTITIES:
        shown = [read(d.sets[name]) if style != "own" or d.fidelity.get("own", name) == name else "" for d, name in columns]
        rows.append(el("tr", el("th", title, scope="row", class_=style), *(el("td", cell, class_="n") for cell in shown)))
    body = el("table", el("thead", el("tr", *first), el("tr", *second)), el("tbody", *rows), class_="fidelity")
    return el("div", body, class_="scroll", tabindex="0", role="group", aria_label=f"Fidelity at {place}")


def _distinct(sets: dict[str, dict[str, Any]]) -> list[str]:
    """The sets without those that are all rows under another name (an autoregressive model reads no masks)."""
    everything = sets.get("all", {}).get("rows")
    return [name for name, values in sets.items() if name == "all" or values.get("rows") != everything]


def _by_rate(run: Run, measured: list[Dictionary]) -> Html | None:
    body = []
    for place in dict.fromkeys(d.label for d in measured):
        plots = []
        for key, title in (
            ("explained_variance", "About each bin's own mean"),
            ("explained_variance_global_mean", "About the mean of all rows"),
        ):
            series = []
            for d in (d for d in measured if d.label == place):
                bins = (d.sets.get("all") or next(iter(d.sets.values()))).get("by_rate") or []
                points = tuple(Point((b["low"] + b["high"]) / 2, b.get(key)) for b in bins)
                if sum(p.y is not None for p in points) > 1:  # clean text is one bin, which the table holds
                    column = run.column(d.model)
                    series.append(Series(d.model, points, colour=column, mark=column))
            if series:
                x, y = Axis("corruption rate (middle of its bin)", low=0.0, high=1.0, form=tick), Axis("explained variance", form=fixed)
                plots.append(line_plot(title, series, x, y))
        if plots:
            body += [el("h4", place), side_by_side(plots, large=True)]
    return join([el("h3", "Explained variance by corruption rate"), *body]) if body else None
