"""What ``dlmscope plan`` found, as JSON and as tables."""

import dataclasses
from typing import Any

from dlmscope_jax.training.chips import Chip
from dlmscope_jax.training.planning import Cost, Parts

from .table import aligned


@dataclasses.dataclass
class Program:
    """One program of a run on one device: bytes that it holds, and what a step costs.

    Attributes:
      kind: harvest, train, or both: training straight from the model.
      name: what it is, in words.
      parameters, optimiser, activations, temporary: bytes. Activations are what goes in and out apart from the state.
      saving: bytes of the copy of the state from which a checkpoint is written while the next steps run.
      cost: of a step.
      rows: of a step, on all devices.
      steps: of the run.
    """

    kind: str
    name: str
    parameters: int
    optimiser: int
    activations: int
    temporary: int
    saving: int
    cost: Cost
    rows: float
    steps: float

    @property
    def total(self) -> int:
        """Bytes at most, while a checkpoint is written."""
        return self.parameters + self.optimiser + self.activations + self.temporary + self.saving


def heading(run: str, device: str, chip: Chip | None, parts: Parts) -> str:
    """One line: the run's name, the devices with their peaks, the mesh."""
    shape = " x ".join(f"{name} {getattr(parts, name)}" for name in ("replica", "data", "model") if name != "replica" or parts.replica > 1)
    if chip is None:
        return f"plan of {run}: {parts.devices} x {device} (peaks not known: no times), mesh {shape}"
    return (
        f"plan of {run}: {parts.devices} x {chip.name} ({chip.memory / 1e9:.0f} GB, {chip.bfloat16 / 1e12:.0f} TFLOP/s bfloat16, "
        f"{chip.float32 / 1e12:.0f} float32, {chip.bandwidth / 1e9:.0f} GB/s, rings of {chip.ring / 1e9:.0f} GB/s), mesh {shape}"
    )


def tables(programs: list[Program], entry: dict[str, Any]) -> str:
    """What ``results/plan.json`` says of one model, for people."""
    gigabytes = lambda size: f"{size / 1e9:.3g}"  # noqa: E731
    lines: list[tuple[str, ...]] = [("GB on one device", "parameters", "optimiser", "activations", "temporary", "saving", "total", "fits")]
    for program, told in zip(programs, entry["programs"], strict=True):
        sizes = (program.parameters, program.optimiser, program.activations, program.temporary, program.saving, program.total)
        lines.append((program.name, *map(gigabytes, sizes), {None: "-", True: "yes", False: "NO"}[told["fits"]]))
    blocks = [aligned(lines)]
    sent: list[tuple[str, ...]] = [("sent by one device in a step", "as", "over", "times", "MB each")]
    for program in programs[:2]:
        for c in program.cost.collectives:
            sent.append((f"{program.name}: {c.what}", c.op, f"{c.axis} ({c.parts})", f"{c.count:g}", f"{c.bytes / 1e6:.3f}"))
    blocks += [aligned(sent)] if len(sent) > 1 else []
    times: list[tuple[str, ...]] = [("time at the makers' peaks", "TFLOP a step", "step", "rows/s", "steps", "in all")]
    for program, told in zip(programs, entry["programs"], strict=True):
        step, whole = told["step_seconds"], told["seconds"]
        times.append(
            (
                program.name,
                f"{program.cost.flops / 1e12:.3g}",
                "-" if step is None else _duration(step),
                "-" if step is None else f"{program.rows / step:,.0f}",
                f"{program.steps:,.0f}",
                "-" if whole is None else _duration(whole),
            )
        )
    blocks.append(aligned(times))
    stored = entry["store_bytes"] / 1e9
    size = f"{stored:,.1f} GB" if stored >= 1 else f"{1e3 * stored:.3g} MB"
    store = f"store of {entry['name']}: {size}; reading and writing it is not in these times"
    blocks.append(store)
    blocks += entry["advice"]
    return "\n" + "\n\n".join(blocks)


def as_json(program: Program, chip: Chip | None, limit: float | None) -> dict[str, Any]:
    """What ``results/plan.json`` says of one program; ``limit``: bytes of a chip that may be taken."""
    step = None if chip is None else program.cost.seconds(chip)
    return {
        "program": program.name,
        "bytes": {name: getattr(program, name) for name in ("parameters", "optimiser", "activations", "temporary", "saving", "total")},
        "fits": None if limit is None else program.total <= limit,
        "flops": program.cost.flops, "traffic_bytes": program.cost.bytes, "sent_bytes": program.cost.sent,
        "collectives": [dataclasses.asdict(c) for c in program.cost.collectives], "rows": program.rows, "steps": program.steps,
        "step_seconds": step, "seconds": None if step is None else step * program.steps,
    }  # fmt: skip


def _duration(seconds: float) -> str:
    if seconds < 1:
        return f"{1e3 * seconds:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"
