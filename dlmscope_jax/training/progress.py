"""Progress with rate and remaining time: a live bar on a terminal, a plain line every few seconds elsewhere."""

import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any, TextIO

# plain lines over which the rate is taken: the first minutes of a job, which compile, say little about the rest
_WINDOW = 6


class Progress:
    """Shows how far a long job is; a context manager.

    ``with Progress("harvest", total=n, unit="rows") as bar: bar.advance(k)``
    """

    def __init__(
        self,
        label: str,
        total: int,
        unit: str = "rows",
        stream: TextIO | None = None,
        seconds: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Args:
        label: what is going on.
        total: how much there is to do.
        unit: of what.
        stream: where to write; None: standard error.
        seconds: between plain lines.
        clock: seconds since any fixed moment.
        """
        self._label, self._total, self._unit, self._seconds, self._clock = label, total, unit, seconds, clock
        self._stream = sys.stderr if stream is None else stream
        self._done = 0
        self._note = ""
        self._live: Any = None
        self._task: Any = None
        self._start = clock()
        self._marks: deque[tuple[float, int]] = deque([(self._start, 0)], maxlen=_WINDOW)

    @property
    def done(self) -> int:
        """How much is done, what earlier runs did included."""
        return self._done

    def __enter__(self) -> "Progress":
        self._start = self._clock()
        self._marks.clear()
        self._marks.append((self._start, self._done))
        if self._stream.isatty():
            self._live, self._task = _live_bar(self._stream, self._label, self._total, self._unit)
            self._live.start()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if self._live is not None:
            self._live.stop()
            return
        took = _duration(self._clock() - self._start)
        if kind is None:
            self._write(f"{self._label}: {self._done:,} {self._unit} in {took}{self._noted()}")
        elif self._done:  # a refusal at the start speaks for itself
            self._write(f"{self._label}: stopped at {self._done:,} of {self._total:,} {self._unit} after {took}{self._noted()}")

    def advance(self, count: int = 1) -> None:
        """``count`` more units are done."""
        self._done += count
        if self._live is not None:
            self._live.update(self._task, advance=count)
            return
        now = self._clock()
        if now - self._marks[-1][0] >= self._seconds:
            self._write(self._line(now))
            self._marks.append((now, self._done))

    def skip(self, count: int) -> None:
        """``count`` units were done by an earlier run: they count as done, but not for the rate."""
        self._done += count
        self._marks = deque(((at, done + count) for at, done in self._marks), maxlen=_WINDOW)
        if self._live is not None:
            # rich measures the rate from the steps after a reset
            self._live.reset(self._task, total=self._total, completed=self._done, note=self._note)

    def note(self, text: str) -> None:
        """A few words to show beside the numbers, from the next line on."""
        self._note = text
        if self._live is not None:
            self._live.update(self._task, note=text)

    def _line(self, now: float) -> str:
        at, done = self._marks[0]
        rate = (self._done - done) / max(now - at, 1e-9)
        share = f" ({100 * self._done / self._total:.0f} %)" if self._total else ""
        left = f", {_duration((self._total - self._done) / rate)} left" if rate and self._done < self._total else ""
        return f"{self._label}: {self._done:,} of {self._total:,} {self._unit}{share}, {_rate(rate)} {self._unit}/s{left}{self._noted()}"

    def _noted(self) -> str:
        return f", {self._note}" if self._note else ""

    def _write(self, line: str) -> None:
        self._stream.write(line + "\n")
        self._stream.flush()


def _live_bar(stream: TextIO, label: str, total: int, unit: str) -> tuple[Any, Any]:
    from rich.console import Console
    from rich.progress import BarColumn, ProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Live
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Any) -> Text:
            speed = task.finished_speed or task.speed
            return Text(f"{_rate(speed)} {unit}/s" if speed else "")

    live = Live(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f} " + unit),
        Rate(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(file=stream),
    )
    return live, live.add_task(label, total=total, note="")


def _rate(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


def _duration(seconds: float) -> str:
    seconds = round(seconds)
    if seconds < 90:
        return f"{seconds} s"
    minutes, hours = round(seconds / 60), seconds // 3600
    return f"{minutes} min" if minutes < 90 else f"{hours} h {(seconds % 3600) // 60} min"
