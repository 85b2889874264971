"""Training metrics on disk: one JSON line for each interval, without times, so that a resumed run writes the same file."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from dlmscope_jax.errors import UserError

_LINES = 1_000  # about so many in a whole run


class MetricsFile:
    """Adds up (sum, count) pairs of steps and writes their quotients.

    An interval ends at every ``steps // 1000``-th step and at every checkpoint; its line tells the step that it ends with.
    ``skipped`` is written as a number of batches, everything else as a mean, or null where no batch counted.

    Attributes:
      sums: of the interval that has not ended, name -> [sum, count].
    """

    def __init__(self, path: Path | None, steps: int, batch_size: int, start_step: int, sums: Mapping[str, list[float]] | None = None):
        """Opens the file for a run that begins at ``start_step``: lines of later steps, and half a line, are cut off.

        Without a path nothing is written: means are those of a process that leaves writing to another. ``sums`` are what an earlier
        run had added up when it stopped within an interval.

        Raises:
          UserError: the file cannot be read or written.
        """
        self._every, self._batch_size, self._path = max(1, steps // _LINES), batch_size, path
        self.sums: dict[str, list[float]] = {name: list(pair) for name, pair in (sums or {}).items()}
        self._last = start_step
        self._file: IO[bytes] | None = None
        if path is None:
            return
        kept = _lines_until(path, start_step)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "r+b" if path.exists() else "w+b")
            self._file.truncate(kept)
            self._file.seek(kept)
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror}") from None

    def add(self, step: int, metrics: dict[str, tuple[float, float]]) -> dict[str, float | None] | None:
        """Adds one step (1-based: how many are done with it); returns the line's means if an interval ended."""
        self._last = step
        for name, (total, count) in metrics.items():
            sums = self.sums.setdefault(name, [0.0, 0.0])
            sums[0] += total
            sums[1] += count
        return self._write() if step % self._every == 0 else None

    def sync(self, ends: bool = True) -> None:
        """Ends the interval, if wanted, and makes all lines durable, before a checkpoint vouches for them."""
        if self.sums and ends:
            self._write()
        if self._file is None:
            return
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise UserError(f"{self._path}: cannot be written: {error.strerror}") from None

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()

    def _write(self) -> dict[str, float | None]:
        means = {name: total / count if count else None for name, (total, count) in self.sums.items()}
        means["skipped"] = int(self.sums["skipped"][0])
        self.sums = {}
        line = {"step": self._last, "rows": self._last * self._batch_size, **means}
        if self._file is None:
            return means
        try:
            self._file.write(json.dumps(line).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise UserError(f"{self._path}: cannot be written: {error.strerror}") from None
        return means


def read_metrics(path: str | Path) -> list[dict[str, float | None]]:
    """The lines of a ``metrics.jsonl``: ``step``, ``rows`` and means over the interval that ends there.

    Raises:
      UserError: there is no such file, or a line is not JSON.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file of training metrics")
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            lines.append(json.loads(text))
        except ValueError:
            raise UserError(f"{path}: line {number} is not JSON: the file is damaged, or its training was killed and not resumed") from None
    return lines


def _lines_until(path: Path, step: int) -> int:
    """How many bytes of the file are whole lines of steps up to ``step``."""
    kept = 0
    if step and path.is_file():
        for line in path.read_bytes().splitlines(keepends=True):
            try:
                if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                    break
            except (ValueError, TypeError, KeyError):
                break
            kept += len(line)
    return kept
