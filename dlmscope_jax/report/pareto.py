"""How much is explained, and what the model loses, at each number of active latents: all architectures on the same rows."""

from collections.abc import Callable
from typing import Any

from .architectures import Setting, settings
from .charts import Axis, Point, Series, legend, line_plot, side_by_side
from .insertion import at_reference, reference_rate
from .markup import Html, el, join
from .page import Section, lead
from .run import Dictionary, Run
from .tables import fixed, interval, percent, table, tick

# name, how it is read from a dictionary, its places in the table, and whether more of it is better
_QUANTITIES: dict[str, tuple[str, Callable[[Dictionary], Any], int, bool]] = {
    "ev": ("Explained variance", lambda d: _own(d, "explained_variance"), 3, True),
    "delta": ("Δloss, nats", lambda d: (at_reference(d, "spliced") or {}).get("delta"), 4, False),
    "kl": ("KL, nats", lambda d: (at_reference(d, "spliced") or {}).get("kl"), 4, False),
}


def pareto(run: Run) -> Section | None:
    """For every model and place where several architectures write: plots against L0 and a table. None where there is no such place."""
    body: list[Html] = []
    for m in run.models:
        found = [d for d in run.of(m.name) if _own(d, "l0") is not None and m.objective != "synthetic"]
        for written in dict.fromkeys(d.written for d in found):
            there = settings([d for d in found if d.written == written])
            if len({s.name for s in there}) > 1:
                body += [el("h3", join([m.name, " ", el("span", written, class_="site")])), *_place(there)]
    if not body:
        return None
    said = lead(
        "Dictionaries that write the same activations of a model, by the mean number of latents that are active in a row (of binary codes: "
        "that have their rarer value). Held-out rows; Δloss and KL with the reconstruction in place of the activations. Colour is the "
        "architecture, line pattern tells transcoders (which read the layer's MLP input) from autoencoders. Brackets are 95 % intervals "
        "over documents, or, where there are several seeds, the least and the most of them. A dictionary is on the front where no other "
        "one here does better with as few active latents."
    )
    return Section("pareto", "Pareto", join([said, *body]))


def _own(d: Dictionary, key: str) -> Any:
    own = d.own[1]
    return (own.get("intervals") or {}).get(key) or own.get(key)


def _place(there: list[Setting]) -> list[Html]:
    l0 = [s.measured(lambda d: _own(d, "l0")) for s in there]
    values = {key: [s.measured(read) for s in there] for key, (_, read, _, _) in _QUANTITIES.items()}
    first = there[0].members[0]
    rate = reference_rate(first)
    at = "" if rate is None else f"corruption rate {tick(rate)}" if rate else "next tokens"
    plots, keys = [], []
    for key, (label, _, places, _) in _QUANTITIES.items():
        series = _series(there, l0, values[key])
        if not series:
            continue
        keys = keys or series
        low = [p.y for s in series for p in s.points if p.y is not None]
        scale = "log" if key == "kl" and min(low) > 0 else "linear"
        x, y = Axis("active latents a row, L0", "log", form=lambda v: fixed(v, 1)), Axis(label, scale, form=_form(places))
        plots.append(line_plot(label.partition(",")[0], series, x, y, note=at if key != "ev" else "held-out rows", keys=False))
    fronts = {key: _front(l0, found, _QUANTITIES[key][3]) for key, found in values.items()}
    rows = []
    for i, s in enumerate(there):
        on = [name for key, name in (("ev", "EV"), ("delta", "Δloss"), ("kl", "KL")) if i in fronts[key]]
        measured = [interval(values[key][i], _form(places)) for key, (_, _, places, _) in _QUANTITIES.items()]
        dead = s.measured(lambda d: d.own[1].get("dead_share")).get("value")
        cells = [
            s.name,
            el("span", s.level, class_="inline"),
            interval(l0[i], _form(1)),
            *measured,
            percent(dead),
            ", ".join(on),
            str(len(s.members)),
        ]
        rows.append(cells)
    head = ["Architecture", "", "L0", *(label for label, *_ in _QUANTITIES.values()), "Dead", "On the front", "Seeds"]
    caption = f"Active latents against what is explained and lost{f' ({at})' if at else ''}"
    return [legend(keys), side_by_side(plots, large=True), table(head, rows, caption=caption, class_="striped", words=2)]


def _series(there: list[Setting], l0: list[dict], values: list[dict]) -> list[Series]:
    points: dict[str, list[Point]] = {}
    looks = {s.name: s.look for s in there}
    for s, x, y in zip(there, l0, values, strict=True):
        if x.get("value") and y.get("value") is not None:
            points.setdefault(s.name, []).append(Point(x["value"], y["value"], y.get("low"), y.get("high")))
    return [Series(name, tuple(sorted(found, key=lambda p: p.x)), *looks[name]) for name, found in points.items()]


def _front(l0: list[dict], values: list[dict], more_is_better: bool) -> set[int]:
    """Which of them no other one beats in both."""
    known = [
        (i, x["value"], y["value"] if more_is_better else -y["value"])
        for i, (x, y) in enumerate(zip(l0, values, strict=True))
        if x.get("value") is not None and y.get("value") is not None
    ]
    return {i for i, x, y in known if not any((a <= x and b >= y) and (a < x or b > y) for _, a, b in known)}


def _form(places: int) -> Callable[[Any], str]:
    return lambda value: fixed(value, places)
