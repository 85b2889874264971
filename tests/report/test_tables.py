"""Numbers as text."""

import pytest

from dlmscope_jax.report.tables import duration, fixed, interval, number, percent, percent_tick, table, tick


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.12345, "0.123"),
        (12.345, "12.3"),
        (1234.5, "1,234"),
        (9.999, "10.0"),
        (-0.5, "−0.500"),
        (0.0, "0"),
        (512000, "512,000"),
        (3.2e-7, "3.20e−7"),
        (4.5e9, "4.50e9"),
        (None, "–"),
        (float("nan"), "–"),
        (True, "–"),
        ("12", "–"),
    ],
)
def test_numbers_keep_three_digits(value, shown):
    assert number(value) == shown


def test_fixed_places_have_no_minus_zero():
    assert [fixed(v) for v in (-0.0001, -0.0012, 1234.5, None)] == ["0.000", "−0.001", "1,234.500", "–"]


def test_shares():
    assert [percent(v) for v in (0, 0.00012, 0.0181, 0.31, 1.0, None)] == ["0 %", "0.012 %", "1.8 %", "31.0 %", "100.0 %", "–"]
    assert [percent_tick(v) for v in (0.0, 0.025, 0.3)] == ["0 %", "2.5 %", "30 %"]


def test_ticks_are_short():
    assert [tick(v) for v in (0.2, 1.0, -0.1, 1e-4, 250.0, 0.0)] == ["0.2", "1", "−0.1", "1e−4", "250", "0"]


def test_intervals_without_bounds_are_a_value():
    assert interval({"value": 0.5, "low": 0.25, "high": 1.0}, fixed) == "0.500 [0.250, 1.000]"
    assert interval({"value": 0.5, "low": None, "high": None}) == "0.500"
    assert interval(None) == "–"


def test_durations():
    assert [duration(v) for v in (3.21, 109, 3725, None)] == ["3.2 s", "1 min 49 s", "1 h 02 min", "–"]


def test_tables_name_their_rows_and_escape_their_cells():
    shown = table(["a", "b"], [["<r>", "1"]], caption="<c>")
    assert '<th scope="row">&lt;r&gt;</th><td class="n">1</td>' in shown and "<caption>&lt;c&gt;</caption>" in shown
