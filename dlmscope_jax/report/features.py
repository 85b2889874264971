"""The latents of every dictionary, from their feature records.

Everything is on the page without a script: density by rate, logit lens and a few windows. The script adds a list to
choose from, and draws all windows token by token from a JSON block.
"""

from collections.abc import Sequence
from typing import Any

from .charts import Axis, bar_plot
from .markup import Html, el, island, join, visible
from .page import Section, lead, missing
from .run import Dictionary, Run
from .tables import fixed, number, percent, percent_tick, table

_STATIC = {"top": 2, "sampled": 1}  # windows of each group that are there without the script
_LENS = 10
_GROUPS = {"top": "highest activation", "sampled": "sampled over tenths of its activations"}


def features(run: Run) -> Section:
    """Fifty latents a dictionary, or as many as were recorded."""
    recorded = [d for d in run.dictionaries if d.features and d.features.get("records")]
    if not recorded:
        return Section("latents", "Latents", missing("No feature records in this run (no results of kind “features”)."))
    said = lead(
        join(
            [
                "A sample of latents, not the best ones. Shading and underline show a token's activation, the pointer or the arrow keys "
                "its value. ",
                el("span", _mask("token"), class_="window inline"),
                " is a position that the model read as a mask; the small struck word is what stood there. Spaces are drawn as ·, line "
                "ends as ↵. The logit lens is the latent's direct effect on the output only. These are statistics, not explanations.",
            ]
        )
    )
    blocks, islands = [], []
    for i, d in enumerate(recorded):
        pieces = {str(key): visible(str(piece)) for key, piece in (d.features.get("pieces") or {}).items()}
        blocks.append(_dictionary(run, d, i, pieces))
        islands.append(island(f"features-{i}", _data(d, pieces)))
    absent = [d.name for d in run.dictionaries if d not in recorded]
    note = missing("No feature records for " + ", ".join(absent) + ".") if absent else None
    keys = el(
        "p",
        "Keys: / search, j and k or the arrows next and previous latent; inside a window ← and → go from token to token.",
        class_="keys needs-script",
    )
    return Section("latents", "Latents", join([said, keys, el("div", *blocks, class_="dictionaries"), note]), tuple(islands))


def _dictionary(run: Run, d: Dictionary, i: int, pieces: dict[str, str]) -> Html:
    f = d.features
    rows = f.get("rows") or next((s.get("rows") for s in d.sets.values()), None)
    dead = f.get("dead_share")
    if dead is None:
        dead = d.own[1].get("dead_share")
    said = [f"{len(f['records'])} latents" + (f" ({f['selection']})" if f.get("selection") else "")]
    said += [f"{number(rows)} rows of the {f.get('side', 'test')} side"] if rows else []
    said += [f"dead: {percent(dead)}"] if dead is not None else []
    said += [f"read: {f['select']} rows"] if f.get("select") else []
    colour = run.column(d.model)
    recorded = {record["latent"] for record in f["records"]}
    latents = [_latent(record, i, pieces, colour, recorded) for record in f["records"]]
    return el(
        "section",
        el("h3", join([d.model, " ", el("span", d.label, class_="site")])),
        el("p", " · ".join(said), class_="said"),
        el("div", *latents, class_="latents"),
        class_=f"dictionary c{colour}",
        id=f"d{i}",
        data_features=f"features-{i}",
        aria_label=d.name,
    )


def _latent(record: dict[str, Any], i: int, pieces: dict[str, str], colour: int, recorded: set[int]) -> Html:
    latent = record["latent"]
    stats = [
        ("density", percent(record.get("density"))),
        ("largest", number(record.get("max_activation"))),
        ("mean where it fires", number(record["mean_activation"]) if record.get("mean_activation") is not None else None),
        ("density on masked rows", percent(record["density_masked"]) if record.get("density_masked") is not None else None),
        ("on visible rows", percent(record["density_visible"]) if record.get("density_visible") is not None else None),
        ("density decile, 0 rarest", number(record["decile"]) if record.get("decile") is not None else None),
    ]
    chips = el("dl", *(el("div", el("dt", name), el("dd", value)) for name, value in stats if value is not None), class_="stats")
    return el(
        "article",
        el("h4", f"Latent {latent}"),
        chips,
        el("p", record["description"], class_="description") if record.get("description") else None,
        el("div", _by_rate(record, colour), _tokens_of(record, pieces), class_="panels"),
        _neighbours(record, i, recorded),
        el("div", _static_windows(record, pieces), class_="windows"),
        id=f"d{i}-{latent}",
        tabindex="-1",
    )


def _by_rate(record: dict[str, Any], colour: int) -> Html:
    bins = record.get("density_by_rate") or []
    if not bins:
        return el("p", "Read from clean text: no corruption rates.", class_="missing")
    bars = [(fixed((b["low"] + b["high"]) / 2, 2), b.get("density")) for b in bins]
    return bar_plot("Density by corruption rate", bars, "corruption rate", Axis("share of rows", form=percent, tick=percent_tick), colour)


def _tokens_of(record: dict[str, Any], pieces: dict[str, str]) -> Html:
    """Tokens that the latent raises and lowers, and those that it fires on."""
    lens = record.get("logit_lens") or {}
    lists = [
        ("Logit lens, raises", lens.get("top") or (), 2),
        ("Logit lens, lowers", lens.get("bottom") or (), 2),
        ("Fires on more than elsewhere, z", [entry[:2] for entry in record.get("enriched") or ()], 1),
    ]
    shown = []
    for title, entries, places in lists:
        items = [
            el("li", el("code", text_of(pieces, token)), " ", el("span", fixed(value, places), class_="n"))
            for token, value in entries[:_LENS]
        ]
        if items:
            shown.append(el("div", el("h5", title), el("ol", *items, class_="lens")))
    return el("div", *shown, class_="lenses") if shown else missing("No logit lens and no enriched tokens in this record.")


def _neighbours(record: dict[str, Any], i: int, recorded: set[int]) -> Html | None:
    found = record.get("neighbours") or ()
    if not found:
        return None
    named = (el("a", latent, href=f"#d{i}-{latent}") if latent in recorded else latent for latent, _ in found)
    said = join((join([name, f" ({fixed(cosine, 2)})"]) for name, (_, cosine) in zip(named, found, strict=True)), ", ")
    return el("p", "Nearest decoder rows (cosine): ", said, class_="said")


def _static_windows(record: dict[str, Any], pieces: dict[str, str]) -> Html:
    rows = []
    for group, most in _STATIC.items():
        for window in [w for w in record.get("windows") or () if w.get("group", "top") == group][:most]:
            rate = window.get("rate")
            where = [
                "top" if group == "top" else "sampled",
                str(window.get("document", "")),
                number(window.get("position")),
                "–" if rate is None else number(rate, 2) if rate else "clean",
            ]
            rows.append([*where, number(max(window["activations"], default=None)), el("span", _tokens(window, pieces), class_="window")])
    if not rows:
        return missing("This latent fired in no window.")
    return table(["Window", "Document", "Position", "Rate", "Largest", "Text"], rows, words=6)


def _tokens(window: dict[str, Any], pieces: dict[str, str]) -> Html:
    largest = max(window["activations"], default=0) or 1
    shown = []
    masked = window.get("is_masked") or [0] * len(window["tokens"])
    for token, original, is_masked, value in zip(window["tokens"], window["original"], masked, window["activations"], strict=True):
        piece = _mask(text_of(pieces, original)) if is_masked else text_of(pieces, token)
        if value > 0:
            piece = el("b", piece, title=number(value), style=f"--a:{value / largest:.2f}")
        shown.append(piece)
    return join(shown)


def text_of(pieces: dict[str, str], token: int) -> str:
    """The drawn text of an id, the id itself where its text is not known."""
    return pieces.get(str(token), f"#{token}")


def _mask(original: str) -> Html:
    return el("i", "▢", el("s", original))


def _data(d: Dictionary, pieces: dict[str, str]) -> dict[str, Any]:
    """What the script draws windows from: short keys, rounded values, originals only where they differ from what was read."""
    documents: dict[str, int] = {}
    latents = []
    for record in d.features["records"]:
        windows = []
        for w in record.get("windows") or ():
            document = documents.setdefault(str(w.get("document", "")), len(documents))
            originals = {str(i): o for i, (t, o) in enumerate(zip(w["tokens"], w["original"], strict=True)) if t != o}
            windows.append(
                {
                    "g": w.get("group", "top"), "d": document, "p": w.get("position"), "r": w.get("rate"), "t": w["tokens"], "o": originals,
                    "a": [_short(v) for v in w["activations"]], "m": [i for i, m in enumerate(w.get("is_masked") or ()) if m],
                    "k": w.get("peak", _peak(w["activations"])), "q": w.get("decile"),
                }
            )  # fmt: skip
        searched = [*((record.get("logit_lens") or {}).get("top") or ())[:_LENS], *(record.get("enriched") or ())[:_LENS]]
        latents.append(
            {
                "id": record["latent"], "density": record.get("density"), "max": record.get("max_activation"),
                "words": [entry[0] for entry in searched], "said": record.get("description"), "windows": windows,
            }
        )  # fmt: skip
    return {"name": d.name, "pieces": pieces, "documents": list(documents), "groups": _GROUPS, "latents": latents}


def _short(value: float) -> float | int:
    return float(f"{value:.3g}") if value else 0


def _peak(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__) if values else 0
