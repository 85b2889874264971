"""Whether dictionaries of synthetic worlds found the features that the rows are made of."""

from collections.abc import Callable
from typing import Any

from .architectures import settings
from .charts import Axis, Point, Row, Series, dot_plot
from .markup import Html, el, join
from .page import Section, lead
from .run import Dictionary, Run
from .tables import fixed, interval, percent, table, tick

# name, how it is read from a dictionary, how it is written
_QUANTITIES: tuple[tuple[str, Callable[[Dictionary], Any], Callable[[Any], str]], ...] = (
    ("Recovered", lambda d: d.recovery["recovered"], percent),
    ("MCC", lambda d: d.recovery["mean_cosine"], fixed),
    ("F1 of matched latents", lambda d: d.recovery.get("mean_f1"), fixed),
    ("Explained variance", lambda d: d.own[1].get("explained_variance", d.recovery.get("explained_variance")), fixed),
    ("L0", lambda d: d.own[1].get("l0", d.recovery.get("l0")), lambda v: fixed(v, 1)),
    ("Dead", lambda d: d.own[1].get("dead_share", d.recovery.get("dead")), percent),
)


def recovery(run: Run) -> Section | None:
    """A plot and a table of the share of true features that each dictionary found, by world; None without worlds."""
    worlds = [(m, [d for d in run.of(m.name) if d.recovery]) for m in run.models]
    worlds = [(m, found) for m, found in worlds if found]
    if not worlds:
        return None
    first = worlds[0][1][0].recovery or {}
    said = lead(
        f"A true feature counts as recovered where the latent that it is matched with (one to one, so that the summed cosines are largest) "
        f"points its way with a cosine of at least {fixed(first.get('threshold', 0.9), 2)}. MCC is the mean of these cosines over all "
        "features. Explained variance, L0 and dead latents are over held-out rows. Where there are several seeds, brackets hold the least "
        "and the most of them."
    )
    lines: list[Row] = []
    tables: list[Html] = []
    for m, found in worlds:
        there = settings(found)
        rows = []
        for s in there:
            values = [s.measured(read) for _, read, _ in _QUANTITIES]
            name = s.name if [other.name for other in there].count(s.name) == 1 else f"{s.name} {s.level}"
            point = Point(0, values[0]["value"], values[0].get("low"), values[0].get("high"))
            lines.append(Row(name, {0: point}, group=m.name))
            shown = [interval(value, form) for value, (_, _, form) in zip(values, _QUANTITIES, strict=True)]
            rows.append([s.name, el("span", s.level, class_="inline"), *shown, str(len(s.members))])
        tables.append(table(["Architecture", "", *(name for name, *_ in _QUANTITIES), "Seeds"], rows, caption=_world(m), words=2))
    axis = Axis("share of true features recovered", low=0.0, high=1.0, form=percent, tick=lambda v: tick(round(v, 3)))
    plot = dot_plot("Features recovered", lines, [Series("dictionary", (), strong=True)], axis, keys=False)
    return Section("recovery", "Recovery", join([said, plot, *tables]))


def _world(m: Any) -> str:
    world = m.facts.get("world") or {}
    if not world:
        return str(m.name)
    size = f"{world['features']} features in {world['dimension']} dimensions"
    return f"{m.name}: {world['kind']}, {size}" + (f", {world['l0']:g} on in a row" if world["kind"] != "directions" else "")
