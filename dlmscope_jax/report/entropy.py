"""Entropy of binary codes beside the entropy of the features that the rows are made of."""

from .architectures import settings
from .charts import Axis, Point, Series, line_plot
from .markup import join
from .page import Section, lead
from .run import Run
from .tables import fixed, interval, number, table


def entropy(run: Run) -> Section | None:
    """Bits of the code against the true bits, over worlds of growing size; None in runs without such worlds."""
    measured = [(m, [d for d in run.of(m.name) if d.entropy]) for m in run.models]
    measured = [(m, found) for m, found in measured if found]
    if not measured:
        return None
    trained: dict[str, list[Point]] = {}
    truth: dict[float, float] = {}
    untrained: dict[float, float] = {}
    rows = []
    for m, found in measured:
        for s in settings(found):
            first = s.members[0].entropy or {}
            features, bits = first.get("true_features"), first["truth"]
            at = s.measured(lambda d: d.entropy["bits"])
            before = (first.get("untrained") or {}).get("bits")
            name = f"{s.name} {s.level}".strip()
            trained.setdefault(name, []).append(Point(bits, at["value"], at.get("low"), at.get("high")))
            truth[bits] = bits
            untrained[bits] = before
            live = s.measured(lambda d: d.entropy.get("live"))
            explained = s.measured(lambda d: d.entropy.get("explained_variance"))
            shown = [number(features), fixed(bits, 1), interval(at, lambda v: fixed(v, 2)), fixed(before, 1)]
            shown += [interval(live, lambda v: fixed(v, 0)), interval(explained, fixed), str(len(s.members))]
            rows.append([m.name, name, *shown])
    lines = [Series("truth", tuple(Point(x, y) for x, y in sorted(truth.items())), 7, 0, 2)]
    for i, (name, points) in enumerate(trained.items()):
        lines.append(Series(name, tuple(sorted(points, key=lambda p: p.x)), i % 5, i % 6, 0, strong=i == 0))
    if any(value is not None for value in untrained.values()):
        lines.append(Series("untrained", tuple(Point(x, y) for x, y in sorted(untrained.items())), 5, 5, 1))
    said = lead(
        "Rows are sums of fixed directions that are independently there or not, so that the entropy of what made a row is known. The "
        "code's is the sum of its latents' entropies over held-out rows, with the correction for few rows: an upper bound of its joint "
        "entropy, because copies of a latent count as often as they occur. Entropies at unequal explained variance do not compare."
    )
    x, y = (Axis(label, "log", form=lambda v: fixed(v, 1)) for label in ("true entropy, bits", "entropy of the code, bits"))
    plot = line_plot("Entropy of the code against the truth", lines, x, y, size=(560, 320))
    head = ["World", "Dictionary", "Features", "True bits", "Bits of the code", "Untrained", "Live latents", "Explained variance", "Seeds"]
    return Section("entropy", "Entropy", join([said, plot, table(head, rows, caption="Entropy of binary codes", words=2)]))
