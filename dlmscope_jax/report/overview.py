"""The first page: what was run, on what, for how long, and the headline numbers."""

from typing import Any

from .insertion import at_reference, reference_rate
from .markup import Html, el, join
from .page import Section, lead, missing
from .run import Model, Run
from .tables import duration, facts, fixed, interval, number, percent, table, tick

_SIDES = ("train", "dev", "test")


def overview(run: Run) -> Section:
    """Run summary: headline numbers, models, corpus, versions, configuration, times."""
    about = [("Models", _models(run)), ("Corpus", _corpus(run)), ("Environment and configuration", _environment(run))]
    left, right = (join(join([el("h3", title), body]) for title, body in parts) for parts in (about, [("Times", _times(run))]))
    grid = el("div", el("div", left), el("div", right), class_="halves")
    left_out = [el("h3", "Left out"), el("ul", *(el("li", line) for line in run.left_out))] if run.left_out else []
    return Section("summary", "Summary", join([_headline(run), grid, *left_out]))


def _four(value: Any) -> str:
    return fixed(value, 4)


def described(model: Model) -> Html:
    """A model's name with what kind it is."""
    return join([model.name, el("small", model.objective, class_="kind") if model.objective else None])


def _headline(run: Run) -> Html:
    if not run.dictionaries:
        return missing("No dictionary was examined in this run.")
    rows = []
    for d in run.dictionaries:
        rows_of, fidelity = d.own
        counted = f"{number(fidelity['rows'])} rows ({rows_of})" if fidelity.get("rows") else ""
        spliced = at_reference(d, "spliced") or {}
        rate = reference_rate(d)
        rows.append(
            [
                join([d.model, " ", el("span", d.label, class_="site"), el("small", counted, class_="kind")]),
                fixed(fidelity.get("explained_variance")),
                fixed(fidelity.get("l0"), 1),
                percent(fidelity.get("dead_share")),
                interval(spliced.get("delta"), _four),
                interval(spliced.get("kl"), _four),
                "next token" if rate == 0 else "–" if rate is None else f"rate {tick(rate)}",
            ]
        )
    head = ["Dictionary", "Explained variance", "L0", "Dead", "Δloss (nats)", "KL (nats)", "Δloss, KL at"]
    if run.synthetic:
        said = lead("On held-out rows. Whether the features that these are made of were found stands under Recovery.")
        return join([said, table(head[:4], [row[:4] for row in rows], caption="Headline numbers", class_="striped")])
    note = lead(
        "On the test side, over rows of the kind that a dictionary was trained on. Δloss is the change of the loss for each scored token "
        "when the dictionary's reconstruction takes the place of "
        "the activations; KL is that of the model's predictions before and after. Brackets are 95 % intervals over documents."
    )
    return join([note, table(head, rows, caption="Headline numbers", class_="striped")])


def _models(run: Run) -> Html:
    if not any(model.facts for model in run.models):
        return missing("This run holds no description of its models (results of kind “run”).")
    rows = []
    for model in run.models:
        f = model.facts
        weights = f"weights {str(f['identity'])[:8]}" if f.get("identity") else None
        kind = ", ".join(str(part) for part in (f.get("family"), model.objective, weights) if part)
        cells = [number(f.get(key)) for key in ("parameters", "n_layers", "d_model", "vocab_size")]
        rows.append([join([model.name, el("small", kind, class_="kind")]), *cells])
    return table(["Model", "Parameters", "Layers", "Width", "Vocabulary"], rows)


def _corpus(run: Run) -> Html:
    corpus = run.summary.get("corpus")
    if not isinstance(corpus, dict):
        return missing("This run does not say which text was read.")
    sides = corpus.get("sides") or {}
    known = [side for side in _SIDES if side in sides] + [side for side in sides if side not in _SIDES]
    said = facts(
        [
            ("Text", corpus.get("name")),
            ("Block length", f"{number(corpus.get('block_length'))} tokens" if corpus.get("block_length") else None),
            ("Tokenizer", el("code", str(corpus["tokenizer"])[:16]) if corpus.get("tokenizer") else None),
        ]
    )
    keys = [key for key in ("documents", "blocks", "tokens", "rows") if any(isinstance(v, dict) and key in v for v in sides.values())]
    rows = [[side, *(number(sides[side].get(key)) for key in keys)] for side in known if isinstance(sides[side], dict)]
    return join([said, table(["Side", *(key.capitalize() for key in keys)], rows) if rows else None])


def _times(run: Run) -> Html:
    times = [entry for entry in run.summary.get("times") or () if isinstance(entry, dict)]
    if not times:
        return missing("This run recorded no times.")
    rows = []
    for entry in times:
        seconds, count = entry.get("seconds"), entry.get("rows")
        speed = f"{number(round(count / seconds))} /s" if isinstance(count, int) and seconds and not entry.get("reused") else "–"
        rows.append([str(entry.get("stage", "")), "reused" if entry.get("reused") else duration(seconds), number(count), speed])
    total = sum(entry["seconds"] for entry in times if isinstance(entry.get("seconds"), int | float) and not entry.get("reused"))
    rows.append([el("b", "All"), el("b", duration(total)), "", ""])
    return table(["Stage", "Time", "Rows", "Speed"], rows)


def _environment(run: Run) -> Html:
    s = run.summary
    versions = s.get("versions") if isinstance(s.get("versions"), dict) else {}
    pairs: list[tuple[Any, Any]] = [
        ("Seed", number(s.get("seed")) if s.get("seed") is not None else None),
        ("Command", el("code", s["command"]) if s.get("command") else None),
        ("Device", s.get("device")),
        ("Versions", join((join([name, " ", version]) for name, version in versions.items()), ", ") or None),
    ]
    config = missing("The folder holds no config.yaml.")
    if run.config is not None:
        config = el("details", el("summary", "config.yaml"), el("pre", el("code", run.config), tabindex="0"))
    return join([facts(pairs) if any(value for _, value in pairs) else None, config])
