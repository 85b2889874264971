"""One prompt continued with and without a steered latent, step by step."""

from typing import Any

from .charts import Axis, Point, Series, heat_plot, line_plot, side_by_side
from .markup import Html, el, island, join, visible
from .page import Section, lead, missing
from .run import Run
from .tables import MISSING, facts, fixed, number, table

_SIDES = (("plain", "Without steering"), ("steered", "With the latent steered"))
_CELLS = 4000  # a larger grid is not drawn: nobody could read it


def generation(run: Run) -> Section:
    """Both sides of every steered generation: a scrubber over steps, the order of commitment, the latent's activation."""
    if not run.generations:
        return Section("generation", "Generation", missing("No steered generation in this run (no results of kind “steered_generation”)."))
    said = lead(
        "The same prompt, the same random numbers; on the right the latent's decoder direction is added at every step. Tokens that a step "
        "has just committed are set off, positions still masked are drawn as ▢. The latent's activation is what each step found before its "
        "own edit."
    )
    blocks, islands = [], []
    for i, result in enumerate(run.generations):
        blocks.append(_one(run, result, i))
        islands.append(island(f"generation-{i}", _data(result)))
    return Section("generation", "Generation", join([said, el("div", *blocks, class_="generations")]), tuple(islands))


def _pieces(result: dict[str, Any]) -> dict[str, str]:
    """Drawn texts by id; lines are broken where the text breaks them, because whole texts are shown here."""
    return {str(key): visible(str(piece)).replace("↵", "↵\n") for key, piece in (result.get("pieces") or {}).items()}


def _written(result: dict[str, Any], key: str, step: int) -> list[bool]:
    """Where a token stands when a step reads: in a diffusion model everywhere; what an autoregressive one has not written is padding."""
    return [result.get("mask_id") is not None or commit < step for commit in result[key]["commit_step"]]


def _steps_run(result: dict[str, Any]) -> int:
    """Steps until both sides were done; what comes after repeats the result."""
    return max(len(result[key].get("activation") or ()) for key, _ in _SIDES) or result["steps"]


def _data(result: dict[str, Any]) -> dict[str, Any]:
    return {
        "pieces": _pieces(result), "mask": result.get("mask_id"), "prompt": result["prompt_length"], "steps": result["steps"],
        "ran": _steps_run(result),
        "sides": [
            {"name": title, "history": result[key]["history"], "commit": result[key]["commit_step"],
             "activation": [[float(f"{v:.3g}") if v else 0 for v in line] for line in result[key].get("activation") or ()]}
            for key, title in _SIDES
        ],
    }  # fmt: skip


def _one(run: Run, result: dict[str, Any], i: int) -> Html:
    name = result["dictionary"]
    dictionary = next((d for d in run.dictionaries if d.name == name), None)
    title = join([dictionary.model, " ", el("span", dictionary.label, class_="site")]) if dictionary else name
    shown = facts(
        [
            ("Latent", number(result.get("latent"))),
            ("Written at", el("code", result["site"]) if result.get("site") else None),
            ("Strength α", join([number(result.get("strength")), f" ({result['scale']})" if result.get("scale") else ""])),
            (
                "Total dose",
                f"{number(result['dose'])} (sum over steps of the median ‖Δh‖ / ‖h‖)" if result.get("dose") is not None else None,
            ),
            ("Prompt", el("code", visible(str(result["prompt"]))) if result.get("prompt") else None),
            ("Sampler", el("code", str(result["sampler"])) if result.get("sampler") else None),
        ]
    )
    parts = [el("h3", title), shown, el("div", class_="scrubber", data_generation=f"generation-{i}"), _results(result), _plots(result)]
    colour = f" c{run.column(dictionary.model)}" if dictionary else ""
    return el("section", *parts, class_=f"generation{colour}", id=f"g{i}", aria_label=f"{name}, latent {result.get('latent')}")


def _results(result: dict[str, Any]) -> Html:
    """The final texts, and for every generated position its token and its step on both sides."""
    pieces, prompt, steps = _pieces(result), result["prompt_length"], result["steps"]
    finals = []
    for key, title in _SIDES:
        tokens = result[key]["history"][-1]
        given = el("span", "".join(_text(pieces, t) for t in tokens[:prompt]), class_="given")
        ends = [t for t, there in zip(tokens, _written(result, key, steps), strict=True) if there]
        text = el("p", given, "".join(_text(pieces, t) for t in ends[prompt:]), class_="window")
        finals.append(el("div", el("h4", title), text))
    rows = []
    for position in range(prompt, len(result["plain"]["history"][-1])):
        row: list[Any] = [str(position)]
        there = [_written(result, key, steps)[position] for key, _ in _SIDES]
        for (key, _), stands in zip(_SIDES, there, strict=True):
            side = result[key]
            step = side["commit_step"][position]
            confidence = (side.get("confidence") or [None] * (position + 1))[position] if step < steps else None
            committed = number(step) if step < steps else "never" if stands else MISSING
            row += [el("code", _text(pieces, side["history"][-1][position])) if stands else MISSING, committed, fixed(confidence, 2)]
        if any(there):
            rows.append(row)
    head = ["Position", *(f"{side}: {what}" for side in ("plain", "steered") for what in ("token", "step", "confidence"))]
    order = el(
        "details", el("summary", "Tokens in order of position, with the step that committed them"), table(head, rows, class_="striped")
    )
    return join([el("div", *finals, class_="finals"), order])


def _text(pieces: dict[str, str], token: int) -> str:
    return pieces.get(str(token), f"#{token}")


def _plots(result: dict[str, Any]) -> Html | None:
    sides = [(key, title, result[key].get("activation") or []) for key, title in _SIDES]
    if not all(grid for _, _, grid in sides):
        return missing("The latent's activation was not followed in this generation.")
    means = [
        Series(key, tuple(Point(s, _mean(result, key, s, line)) for s, line in enumerate(grid)), colour=i, mark=i, dash=i)
        for i, (key, _, grid) in enumerate(sides)
    ]
    last = max(_steps_run(result) - 1, 1)
    steps = Axis("step", low=0, high=last, whole=True, form=lambda v: number(round(v)))
    plots = [line_plot("The latent over steps", means, steps, Axis("mean activation, response", low=0.0))]
    if result.get("relative_size"):
        dose = Series("steered", tuple(Point(s, v) for s, v in enumerate(result["relative_size"])), colour=1, mark=1, dash=1)
        plots.append(line_plot("Size of the edit", [dose], steps, Axis("median ‖Δh‖ / ‖h‖", low=0.0), "of the steered run"))
    heats = []
    largest = max((v for _, _, grid in sides for line in grid for v in line), default=0.0)
    for key, title, grid in sides:
        if len(grid) * len(grid[0]) > _CELLS:
            heats.append(missing(f"{title}: {len(grid)} steps by {len(grid[0])} positions are too many for a plot."))
            continue
        commits = frozenset((step, p) for p, step in enumerate(result[key]["commit_step"]) if 0 <= step < len(grid))
        labels = [str(s) for s in range(len(grid))], [str(p) for p in range(len(grid[0]))]
        heats.append(heat_plot(title, grid, *labels, "position", "step", commits, "outlined: committed by that step", top_value=largest))
    return join([side_by_side(plots, large=True), side_by_side(heats, large=True)])


def _mean(result: dict[str, Any], key: str, step: int, line: list[float]) -> float | None:
    """Mean activation over the response as a step read it; None before an autoregressive model's first token."""
    prompt = result["prompt_length"]
    values = [v for v, there in zip(line[prompt:], _written(result, key, step)[prompt:], strict=True) if there]
    return sum(values) / len(values) if values else None
