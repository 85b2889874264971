"""What to change where a plan does not fit: changes that were tried by formula, smallest first, and that would make it fit."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

from dlmscope_jax.models import Transformer
from dlmscope_jax.training import planning
from dlmscope_jax.training.planning import Parts

from .configs import Run
from .dictionaries import planned

_MOST = 3  # ways that are named


@dataclasses.dataclass(frozen=True)
class Change:
    """One change of a run: in words, as they stand on a command line, and the run and mesh that it makes."""

    words: str
    run: Run
    parts: Parts


@dataclasses.dataclass(frozen=True)
class Bytes:
    """What a program takes of a device: the state (twice while it is saved), what goes in and out, the rest."""

    state: float
    saving: float
    activations: float
    temporary: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.state + self.saving + self.activations + self.temporary


def changes(
    run: Run, model: Transformer | None, widths: dict[str, int], measured: Bytes, parts: Parts, limit: float, kind: str
) -> list[str]:
    """Changes of a run's configuration with which a program fits.

    What the compiler measured is scaled as the formulas of ``training.planning`` grow and shrink; states are exact.

    Args:
      run, parts: as they were planned.
      model: the network, None for a world.
      widths: of the sites.
      measured: what the program takes.
      limit: bytes that it may take.
      kind: ``"harvest"``, ``"train"`` or ``"both"``, of training straight from the model.

    Returns:
      In words, each with the gigabytes that it would come to; single changes, or where none is enough, pairs. Empty: none was found.
    """

    def size(change: Change) -> float:
        return scaled(run, change.run, model, widths, measured, parts, change.parts, kind).total

    start = Change("", run, parts)
    single = {
        words: list(of) for words, of in itertools.groupby(_single(start, model, kind), key=lambda change: change.words.partition("=")[0])
    }
    found = [next((c for c in of if size(c) <= limit), None) for of in single.values()]
    if not any(found):
        pairs = (
            dataclasses.replace(second, words=f"{first.words} and {second.words}")
            for name, of in single.items()
            for first in of
            for second in _single(first, model, kind)
            if second.words.partition("=")[0] != name
        )
        found = [next((pair for pair in pairs if size(pair) <= limit), None)]
    return [f"{change.words} ({size(change) / 1e9:.1f} GB)" for change in found if change is not None][:_MOST]


def scaled(
    run: Run, changed: Run, model: Transformer | None, widths: dict[str, int], measured: Bytes, parts: Parts, new: Parts, kind: str
) -> Bytes:
    """What a program would take after a change."""
    before, after = (_formula(r, model, widths, p, kind) for r, p in ((run, parts), (changed, new)))
    ratio = lambda name: getattr(after, name) / max(1.0, getattr(before, name))  # noqa: E731
    return Bytes(
        measured.state * ratio("state"), measured.saving * ratio("saving"), measured.activations * ratio("activations"),
        measured.temporary * ratio("temporary"),
    )  # fmt: skip


def _formula(run: Run, model: Transformer | None, widths: dict[str, int], parts: Parts, kind: str) -> Bytes:
    state = saving = activations = temporary = 0.0
    if kind != "harvest":
        specs = [one.spec for one in planned(run, widths)]
        saving = float(sum(sum(planning.state_bytes(spec, parts)) for spec in specs))
        state += saving
        activations += run.train.batch_size / parts.rows * sum(widths.values()) * 4.0
        temporary = max(planning.step_memory(spec, parts) for spec in specs)
    if kind != "train" and model is not None:
        batch, length = run.harvest.batch_size, run.data.block_length
        state += model_bytes(model, parts)
        activations += batch / parts.rows * length * sum(widths.values()) * 4.0
        activations += run.train.buffer_rows / parts.rows * sum(widths.values()) * 2.0 if kind == "both" else 0.0
        temporary = max(temporary, planning.forward_memory(model, batch, length, len(widths), parts))
    return Bytes(state, saving, activations, temporary)


def model_bytes(model: Transformer, parts: Parts) -> float:
    """Of the language model's parameters on one device, about."""
    config = model.config
    whole = config.n_layers * planning.block_parameters(config) + (1 if config.tied_head else 2) * config.vocab_size * config.d_model
    return whole * planning.item_size(model) / (parts.data * parts.model)


def _single(start: Change, model: Transformer | None, kind: str) -> Iterator[Change]:
    """Single changes of one kind after the other, each kind from little to much."""
    run, parts = start.run, start.parts

    def change(words: str, section: str, **fields: Any) -> Change:
        changed = dataclasses.replace(run, **{section: dataclasses.replace(getattr(run, section), **fields)})
        return Change(words, changed, parts)

    if kind == "both":
        for rows in _halves(run.train.buffer_rows, 1 << 12):
            yield change(f"--train.buffer_rows={rows}", "train", buffer_rows=rows)
    if kind != "train":
        for blocks in _halves(run.harvest.batch_size, parts.rows):
            if blocks % parts.rows == 0:
                yield change(f"--harvest.batch_size={blocks}", "harvest", batch_size=blocks)
    if kind != "harvest":
        for n in (run.train.micro_batches << i for i in range(1, 12)):
            if run.train.batch_size % (n * parts.rows) == 0:
                yield change(f"--train.micro_batches={n}", "train", micro_batches=n)
        if run.train.optimizer == "adam":
            yield change("--train.optimizer=adam_bf16", "train", optimizer="adam_bf16")
    for n in (parts.model << i for i in range(1, 12)):
        if parts.data % (n // parts.model) == 0 and _divides(n, run, model if kind != "train" else None, kind):
            data = parts.data * parts.model // n
            words = f"--mesh.model={n} --mesh.data={data}"
            yield dataclasses.replace(change(words, "mesh", model=n, data=data), parts=dataclasses.replace(parts, data=data, model=n))
    if kind != "harvest" and not run.dictionaries:
        ks = run.dictionary.k
        for n in range(2, len(ks) + 1):
            few = ks[-(-len(ks) // n) * -1 :]  # the largest, which take most
            yield change(
                f"--dictionary.k=[{', '.join(map(str, few))}] and the others in {n - 1} more {'call' if n == 2 else 'calls'}",
                "dictionary",
                k=few,
            )
    if kind != "train":
        for length in _halves(run.data.block_length, 256):
            yield change(f"--data.block_length={length}", "data", block_length=length)


def _halves(number: int, least: int) -> Iterator[int]:
    while number % 2 == 0 and (number := number // 2) >= least:
        yield number


def _divides(n: int, run: Run, model: Transformer | None, kind: str) -> bool:
    """Whether so many parts divide the latents and the network."""
    sections = run.dictionaries or (run.dictionary,)
    if kind != "harvest" and any(section.width % n for section in sections):
        return False
    if model is None:
        return True
    return not any(size % n for size in (model.config.n_heads, model.config.n_kv_heads, model.config.d_mlp))
