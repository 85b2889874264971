"""The page around the sections: one file, no outside link, readable without its script."""

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .markup import Html, el, join
from .script import EARLY, SCRIPT
from .style import STYLE


@dataclass(frozen=True)
class Section:
    """A part of the page: its anchor, its title in the navigation, its content, and JSON blocks that its script reads."""

    identity: str
    title: str
    body: Html
    islands: tuple[Html, ...] = ()


def missing(sentence: str) -> Html:
    """Says that a part of the run is not there."""
    return el("p", sentence, class_="missing")


def lead(sentence: Any) -> Html:
    """The paragraph under a section's title: what is shown and how to read it."""
    return el("p", sentence, class_="lead")


def page(title: str, subtitle: Any, sections: Sequence[Section]) -> str:
    """The whole document. Its policy allows nothing from outside and no script but its own two, by their hashes."""
    allowed = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()}'" for code in (EARLY, SCRIPT))
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src {allowed}; base-uri 'none'; form-action 'none'"
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=policy),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("title", title),
        el("style", Html(STYLE)),
        el("script", Html(EARLY)),
    )
    links = [el("li", el("a", s.title, href=f"#{s.identity}")) for s in sections]
    theme = el("button", "Light or dark", type="button", id="theme", class_="quiet needs-script")
    navigation = el("nav", el("p", "dlmscope", class_="brand"), el("ul", *links), theme, aria_label="Sections")
    body = el(
        "body",
        el("a", "Skip to the content", href="#content", class_="skip"),
        navigation,
        el(
            "main",
            el("header", el("p", "Run", class_="over"), el("h1", title), el("p", subtitle, class_="lead")),
            *(el("section", el("h2", s.title), s.body, id=s.identity) for s in sections),
            id="content",
        ),
        join(block for s in sections for block in s.islands),
        el("script", Html(SCRIPT)),
    )
    return "<!doctype html>\n" + el("html", head, body, lang="en") + "\n"
