"""Training curves of all dictionaries."""

from collections.abc import Sequence

from .architectures import settings
from .charts import Axis, Point, Series, legend, line_plot, side_by_side
from .markup import Html, el, join
from .page import Section, lead, missing
from .run import Dictionary, Run
from .tables import fixed, number, percent, percent_tick, tick

_TOLD_APART = 6  # dictionaries of a model that line patterns tell apart
_SHOWN = 60  # points a line: more cannot be told apart, and all of them stand in the table
# what is plotted: title, the names that it may have in the metrics file, its axis, how its numbers and its ticks are written
_CURVES = (
    ("Loss", ("loss",), "training loss", "log", number, tick),
    ("Dead share", ("dead_share", "dead"), "share of latents", "linear", percent, percent_tick),
    ("L0", ("l0",), "active latents a row", "linear", lambda v: fixed(v, 1), tick),
    ("Explained variance", ("explained_variance",), "of the batch", "linear", fixed, tick),
)


def training(run: Run) -> Section:
    """Loss, L0, dead share (and explained variance where it was logged) by step."""
    trained = [d for d in run.dictionaries if d.curve]
    if not trained:
        return Section("training", "Training", missing("No training curves: no dictionary in this folder has a metrics.jsonl."))
    looks = {d.name: s.look for s in settings(trained) for d in s.members}
    if max(len(run.of(m.name)) for m in run.models) > _TOLD_APART:
        body = [_of_model(m.name, [d for d in trained if d.model == m.name], looks) for m in run.models]
        return Section("training", "Training", join([lead("Colour is the architecture; the line of a transcoder is broken."), *body]))
    plots = []
    for title, names, label, scale, form, ticks in _CURVES:
        series = [_series(run, d, names) for d in trained]
        series = [s for s in series if any(p.y is not None for p in s.points)]
        if not series:
            plots.append(missing(f"{title}: not in the metrics of this run."))
            continue
        low = None if scale == "log" else 0.0
        y = Axis(label, scale if _positive(series) else "linear", low=low, form=form, tick=ticks)
        plots.append(line_plot(title, series, Axis("optimiser step", whole=True, form=lambda v: number(round(v))), y, keys=False))
    thinned = max(len(d.curve) for d in trained) > _SHOWN
    said = "Colour is the model, line pattern the place in it. " + (
        f"Of the logged steps, {_SHOWN} evenly spaced ones are drawn and tabulated." if thinned else "Every logged step is drawn."
    )
    absent = [d.name for d in run.dictionaries if not d.curve]
    note = missing("Not trained here, or without curves: " + ", ".join(absent) + ".") if absent else None
    return Section(
        "training", "Training", join([lead(said), legend([_series(run, d, ()) for d in trained]), side_by_side(plots, large=True), note])
    )


def _of_model(name: str, trained: list[Dictionary], looks: dict[str, tuple[int, int, int]]) -> Html:
    """The curves of many dictionaries of one model, by architecture."""
    plots, keys = [], {}
    for s in settings(trained):
        keys.setdefault(s.name, Series(s.name, (), *s.look))
    for title, names, label, scale, form, ticks in _CURVES:
        series = [Series(d.label, _points(d, names), *looks[d.name]) for d in trained]
        series = [s for s in series if any(p.y is not None for p in s.points)]
        if series:
            y = Axis(label, scale if _positive(series) else "linear", low=None if scale == "log" else 0.0, form=form, tick=ticks)
            plots.append(line_plot(title, series, Axis("optimiser step", whole=True, form=lambda v: number(round(v))), y, keys=False))
    return join([el("h3", name), legend(list(keys.values())), side_by_side(plots, large=True)]) if plots else join([])


def _points(d: Dictionary, names: Sequence[str]) -> tuple[Point, ...]:
    shown = thin(d.curve, _SHOWN)
    return tuple(Point(e["step"], next((e[name] for name in names if isinstance(e.get(name), int | float)), None)) for e in shown)


def _series(run: Run, d: Dictionary, names: Sequence[str]) -> Series:
    place = [other.name for other in run.of(d.model)].index(d.name)
    column = run.column(d.model)
    return Series(f"{d.model} {d.label}", _points(d, names), colour=column, mark=column, dash=place)


def thin(entries: Sequence, most: int) -> list:
    """At most so many of them, evenly spaced, the first and the last among them."""
    if len(entries) <= most:
        return list(entries)
    return [entries[round(i * (len(entries) - 1) / (most - 1))] for i in range(most)]


def _positive(series: Sequence[Series]) -> bool:
    return all(p.y is None or p.y > 0 for s in series for p in s.points)
