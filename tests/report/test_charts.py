"""Plots: values land where they belong, and every mark's numbers stand in the table."""

import re
from xml.etree import ElementTree

import pytest

from dlmscope_jax.report.charts import Axis, Point, Row, Series, _Scale, bar_plot, dot_plot, heat_plot, line_plot


def svg_of(figure: str) -> ElementTree.Element:
    return ElementTree.fromstring(re.search(r'<svg viewBox="[^"]*" role="img".*?</svg>', figure, re.DOTALL)[0])


def cells_of(figure: str) -> list[list[str]]:
    rows = re.findall(r"<tr>(.*?)</tr>", figure, re.DOTALL)
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in rows]


def test_linear_axis_ends_at_round_numbers_around_the_values():
    scale = _Scale(Axis("x"), [0.13, 0.87], 0, 100)
    assert (scale.low, scale.high) == pytest.approx((0, 1))
    assert scale(0.25) == pytest.approx(25) and scale.ticks == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])


def test_a_whole_axis_has_no_ticks_between_numbers():
    assert all(tick == int(tick) for tick in _Scale(Axis("step", whole=True), [0, 11], 0, 1).ticks)
    assert _Scale(Axis("step", whole=True), [0, 2], 0, 1).ticks == [0, 1, 2]


def test_logarithmic_axis_gives_equal_room_to_equal_ratios():
    scale = _Scale(Axis("x", "log"), [0.001, 10.0], 0, 100)
    assert (scale.low, scale.high) == pytest.approx((0.001, 10))
    assert scale(0.1) == pytest.approx(50) and scale(1) - scale(0.1) == pytest.approx(25)


def test_signed_axis_is_odd_linear_inside_and_logarithmic_outside():
    scale = _Scale(Axis("x", "signed_log", linear_within=0.1), [-10.0, 10.0], 0, 100)
    zero = scale(0)
    for value in (0.03, 0.1, 2.0):
        assert scale(value) - zero == pytest.approx(zero - scale(-value))
    assert scale(0.05) - zero == pytest.approx((scale(0.1) - zero) / 2)
    assert scale(10) - scale(1) == pytest.approx(scale(1) - scale(0.1))
    assert 0.0 in scale.ticks and scale.low < -9.9 and scale.high > 9.9


def test_a_flat_line_keeps_the_end_that_was_asked_for():
    scale = _Scale(Axis("x", low=0.0), [0.0, 0.0], 0, 100)
    assert scale.low == 0 and scale(0) == 0 and scale.high > 0


@pytest.mark.parametrize("values", [[], [0.0], [3.0, 3.0], [-2.0], [1e-9, 1e9]])
@pytest.mark.parametrize("kind", ["linear", "log", "signed_log"])
def test_every_axis_survives_few_and_extreme_values(kind, values):
    scale = _Scale(Axis("x", kind), values, 0, 100)
    assert all(0 <= scale(v) <= 100 for v in values) and len(scale.ticks) < 20


def test_points_and_interval_bars_stand_at_their_values():
    series = Series("a", (Point(0, 0.0), Point(1, 0.5, 0.25, 1.0)))
    root = svg_of(line_plot("t", [series], Axis("x", low=0, high=1), Axis("y", low=0, high=1), size=(420, 250)))
    top, bottom = 10.0, 250 - 42.0
    circles = [(float(c.get("cx")), float(c.get("cy"))) for c in root.iter("circle")]
    assert circles == [(58, pytest.approx(bottom)), (408, pytest.approx((top + bottom) / 2))]
    (bar,) = (line for line in root.iter("line") if line.get("class") == "i")
    assert float(bar.get("y1")) == pytest.approx(bottom + 0.25 * (top - bottom)) and float(bar.get("y2")) == pytest.approx(top)


def test_a_missing_value_breaks_the_line_and_is_a_dash_in_the_table():
    series = Series("a", tuple(Point(x, y) for x, y in enumerate([1.0, 2.0, None, 3.0, 4.0])))
    figure = line_plot("t", [series], Axis("x"), Axis("y"))
    assert len(list(svg_of(figure).iter("polyline"))) == 2
    assert [row[1] for row in cells_of(figure)[1:]] == ["1.00", "2.00", "–", "3.00", "4.00"]


def test_table_of_a_line_plot_joins_series_by_x():
    figure = line_plot("t", [Series("a", (Point(0, 1.0), Point(2, 3.0, 2.5, 3.5))), Series("b", (Point(2, 9.0),))], Axis("x"), Axis("y"))
    assert cells_of(figure) == [["x", "a", "b"], ["0", "1.00", "–"], ["2", "3.00 [2.50, 3.50]", "9.00"]]


def test_dot_plot_marks_say_what_the_table_says():
    rows = [Row("r1", {0: Point(0, 0.5, 0.4, 0.6), 1: Point(0, 2.0)}, "g"), Row("r2", {1: Point(0, -1.0)}, "g")]
    figure = dot_plot("t", rows, [Series("a", ()), Series("b", ())], Axis("x", "signed_log"))
    titles = [g.find("title").text for g in svg_of(figure).iter("g") if g.find("title") is not None]
    assert titles == ["g r1, a: 0.500 [0.400, 0.600]", "g r1, b: 2.00", "g r2, b: −1.00"]
    assert cells_of(figure)[1:] == [["g r1", "0.500 [0.400, 0.600]", "2.00"], ["g r2", "–", "−1.00"]]


def test_bars_are_as_high_as_their_values():
    figure = bar_plot("t", [("a", 1.0), ("b", 0.5), ("c", None), ("d", 0.0)], "x", Axis("y"))
    bars = [(float(r.get("y")), float(r.get("height"))) for r in svg_of(figure).iter("rect")]
    top, bottom = 8.0, 130 - 36.0  # the axis goes from 0 to 1
    assert bars == [(top, bottom - top), (pytest.approx((top + bottom) / 2), pytest.approx((bottom - top) / 2)), (bottom, 0)]
    assert cells_of(figure)[1:] == [["a", "1.00"], ["b", "0.500"], ["c", "–"], ["d", "0"]]


def test_heat_shades_by_value_and_outlines_what_it_is_told_to():
    figure = heat_plot("t", [[0.0, 1.0], [2.0, None]], ["0", "1"], ["p", "q"], "position", "step", frozenset({(0, 0), (1, 0)}))
    cells = {c.find("title").text: c for c in svg_of(figure).iter("rect") if c.find("title") is not None}
    assert {name: float(c.get("fill-opacity")) for name, c in cells.items()} == {
        "step 0, position p: 0": 0.0,
        "step 0, position q: 1.00": 0.5,
        "step 1, position p: 2.00": 1.0,
    }
    assert [name for name, c in cells.items() if "outlined" in c.get("class")] == ["step 0, position p: 0", "step 1, position p: 2.00"]
    assert cells_of(figure)[1:] == [["0", "0", "1.00"], ["1", "2.00", "–"]]
