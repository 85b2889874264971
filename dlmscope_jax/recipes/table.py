"""The headline numbers of a run as lines of text; where each comes from is in METHODS.md's terms in the report."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dlmscope_jax.report import read_run
from dlmscope_jax.report.insertion import at_reference, reference_rate

_RECOVERED = ("dictionary", "recovered", "MCC", "EV", "L0", "dead", "bits", "true bits")
_TRAINED = ("dictionary", "steps", "loss", "EV", "L0", "dead")
_HEAD = ("dictionary", "rows", "EV", "L0", "dead", "dloss (nats)", "KL", "noise KL", "zero KL", "scored at")


def headline(folder: Path) -> str:
    """One line a dictionary, on test rows of the kind that it was trained on: explained variance, L0, dead share, cost of insertion.

    ``dloss`` and ``KL`` are for each scored token with the dictionary in place of the activations, at corruption rate .45 (the measured
    rate nearest to it) or on next tokens; ``noise KL`` and ``zero KL`` are what noise of the same size and zeros cost there.
    """
    lines = [_HEAD]
    for d in read_run(folder).dictionaries:
        if d.recovery:
            continue  # no model loses anything in a synthetic world
        rows_of, fidelity = d.own
        rate = reference_rate(d)
        spliced = at_reference(d, "spliced") or {}
        kl = {name: (at_reference(d, name) or {}).get("kl") for name in ("noise", "zero")}
        dead = fidelity.get("dead_share")
        lines.append(
            (
                d.name,
                f"{fidelity['rows']:,} {rows_of}" if fidelity.get("rows") else rows_of,
                _shown(fidelity.get("explained_variance"), ".4f"),
                _shown(fidelity.get("l0"), ".1f"),
                "-" if dead is None else f"{100 * dead:.1f} %",
                _interval(spliced.get("delta")),
                _interval(spliced.get("kl")),
                _shown((kl["noise"] or {}).get("value"), ".4f"),
                _shown((kl["zero"] or {}).get("value"), ".4f"),
                "-" if rate is None else "next token" if rate == 0 else f"rate {rate:g}",
            )
        )
    return "\n\n".join(aligned(table) for table in (lines, _recovered(folder)) if len(table) > 1)


def _recovered(folder: Path) -> list[tuple[str, ...]]:
    """Dictionaries of synthetic worlds: the share of true features that they found, the mean cosine, and entropies where there are some."""
    found = [d for d in read_run(folder).dictionaries if d.recovery]
    lines: list[tuple[str, ...]] = [_RECOVERED]
    for d in found:
        recovery, entropy, fidelity = d.recovery or {}, d.entropy or {}, d.own[1]
        share, dead = recovery["recovered"], fidelity.get("dead_share")
        lines.append(
            (
                d.name,
                f"{100 * share:.1f} %",
                _shown(recovery["mean_cosine"], ".4f"),
                _shown(fidelity.get("explained_variance"), ".4f"),
                _shown(fidelity.get("l0"), ".2f"),
                "-" if dead is None else f"{100 * dead:.1f} %",
                _shown(entropy.get("bits"), ".2f"),
                _shown(entropy.get("truth"), ".1f"),
            )
        )
    return lines


def trained(folder: Path) -> str:
    """One line a dictionary: where its training ended, over the rows of the last logged steps (not held-out ones)."""
    lines = [_TRAINED]
    for d in read_run(folder, measured=False).dictionaries:
        last = d.curve[-1] if d.curve else {}
        dead = last.get("dead")
        lines.append(
            (
                d.name,
                str(last.get("step", "-")),
                _shown(last.get("loss"), ".4g"),
                _shown(last.get("explained_variance"), ".4f"),
                _shown(last.get("l0"), ".1f"),
                "-" if dead is None else f"{100 * dead:.1f} %",
            )
        )
    return aligned(lines)


def aligned(lines: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines)


def _shown(value: Any, form: str) -> str:
    return "-" if value is None else format(value, form)


def _interval(measured: dict[str, Any] | None) -> str:
    if not measured or measured.get("value") is None:
        return "-"
    if measured.get("low") is None:
        return f"{measured['value']:.4f}"
    return f"{measured['value']:.4f} [{measured['low']:.4f}, {measured['high']:.4f}]"
