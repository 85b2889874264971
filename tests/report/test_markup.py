"""Escaping: whatever text goes in, a parser gets the same text out, and no element or attribute that was not meant."""

import json
from html.parser import HTMLParser

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dlmscope_jax.report.markup import Html, el, island, join, text, visible

ANY_TEXT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0\r"))  # \r is a line end to a parser


class Events(HTMLParser):
    """Start tags with attributes, and the text between them."""

    def __init__(self, document: str):
        super().__init__(convert_charrefs=True)
        self.tags, self.said = [], ""
        self.feed(document)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.said += data


@given(ANY_TEXT, ANY_TEXT)
@example('</p><img src="x">', '"><img onerror="')
@example("&amp;&#39;'", "' onclick='&quot;")
def test_text_and_attributes_come_out_as_they_went_in(content, attribute):
    parsed = Events(el("p", content, title=attribute))
    assert parsed.tags == [("p", {"title": attribute})] and parsed.said == content


@given(ANY_TEXT)
@example("</script><script>&lt;<!--")
@example("\u2028\u2029")
def test_an_island_holds_its_data_and_cannot_be_left(value):
    data = {"value": value, value: [1, 2.5, None]}
    parsed = Events(island("i", data))
    assert parsed.tags == [("script", {"type": "application/json", "id": "i"})]
    assert json.loads(parsed.said) == data
    assert "<" not in parsed.said


def test_an_island_refuses_what_is_not_json():
    with pytest.raises(ValueError, match="JSON"):
        island("i", float("nan"))


def test_markup_is_not_escaped_twice_and_text_is():
    assert join([el("b", "<"), "&", Html("<i>")]) == "<b>&lt;</b>&amp;<i>"
    assert text(None) == "" and text(0) == "0"


def test_characters_that_no_file_can_hold_are_replaced():
    assert text("a\0b\ud800c") == "a\ufffdb\ufffdc"


def test_attributes_without_a_value_are_left_out():
    assert el("input", hidden=True, title=None, class_="a", data_x_y=1, lang=False) == '<input hidden class="a" data-x-y="1">'


@pytest.mark.parametrize(
    ("piece", "drawn"),
    [
        (" def", "·def"),
        ("\n\t", "↵→"),
        ("", "∅"),
        ("\x00\x1b", "␀␛"),
        ("a\u200bb\u202e", "a⟨200B⟩b⟨202E⟩"),
        ("\u00a0", "⟨00A0⟩"),
        ("\ud800", "\ufffd"),
        ("é漢🙂", "é漢🙂"),
    ],
)
def test_what_the_eye_would_miss_is_drawn(piece, drawn):
    assert visible(piece) == drawn
