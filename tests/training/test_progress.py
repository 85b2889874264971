"""Progress with an invented clock."""

import io

import pytest

from dlmscope_jax.training import Progress


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_plain_lines_every_few_seconds():
    stream, clock = io.StringIO(), Clock()
    with Progress("harvest", total=1_000, unit="rows", stream=stream, seconds=5, clock=clock) as bar:
        for _ in range(10):
            clock.now += 2
            bar.advance(50)
        bar.note("nearly")
        clock.now += 2
        bar.advance(500)
    assert stream.getvalue().splitlines() == [
        "harvest: 150 of 1,000 rows (15 %), 25 rows/s, 34 s left",
        "harvest: 300 of 1,000 rows (30 %), 25 rows/s, 28 s left",
        "harvest: 450 of 1,000 rows (45 %), 25 rows/s, 22 s left",
        "harvest: 1,000 rows in 22 s, nearly",
    ]


def test_the_rate_is_recent_and_without_what_was_there_before():
    stream, clock = io.StringIO(), Clock()
    with Progress("train", total=20_000, unit="steps", stream=stream, seconds=5, clock=clock) as bar:
        bar.skip(10_000)
        clock.now += 1_000  # compiling
        bar.advance(1)
        for _ in range(6):
            clock.now += 10
            bar.advance(100)
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("train: 10,001 of 20,000 steps (50 %), 0.001 steps/s")
    assert lines[-2] == "train: 10,601 of 20,000 steps (53 %), 10 steps/s, 16 min left"
    assert lines[-1] == "train: 10,601 steps in 18 min"


def test_an_error_is_not_called_done():
    stream, clock = io.StringIO(), Clock()
    with pytest.raises(RuntimeError), Progress("train", total=10, unit="steps", stream=stream, clock=clock) as bar:
        bar.advance(3)
        raise RuntimeError
    assert stream.getvalue() == "train: stopped at 3 of 10 steps after 0 s\n"
    with pytest.raises(RuntimeError), Progress("train", total=10, unit="steps", stream=stream, clock=clock):
        raise RuntimeError  # refused before it began: the message is all that there is to say
    assert stream.getvalue().count("\n") == 1


def test_a_terminal_gets_a_bar():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    with Progress("train", total=10, unit="steps", stream=stream) as bar:
        bar.skip(4)
        bar.advance(6)
        bar.note("EV 0.9")
    shown = stream.getvalue()
    assert "10/10 steps" in shown and "EV 0.9" in shown and "train" in shown
