"""HTML to the text that it shows."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any


class _Visible(HTMLParser):
    """The text a browser would show, with line breaks at block elements."""

    HIDDEN = frozenset({"script", "style", "head", "noscript", "template"})
    QUOTES = frozenset({"blockquote"})
    BLOCKS = frozenset(
        {
            "p",
            "div",
            "br",
            "li",
            "tr",
            "h1",
            "h2",
            "h3",
            "h4",
            "h5",
            "h6",
            "section",
            "article",
            "pre",
            "table",
            "ul",
            "ol",
        }
    )

    def __init__(self, quotes: bool) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.hidden = self.HIDDEN if quotes else self.HIDDEN | self.QUOTES
        self.inside: list[str] = []  # of what is hidden

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag in self.BLOCKS or tag == "body":
            self.inside = [t for t in self.inside if t != "head"]  # its end may be left out
            self.parts.append("\n\n" if tag == "p" or tag[0] == "h" else "\n")
        if tag in self.hidden:
            self.inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.inside:
            del self.inside[len(self.inside) - 1 - self.inside[::-1].index(tag) :]

    def handle_data(self, data: str) -> None:
        if not self.inside:
            self.parts.append(data)


def html_to_text(text: str, quotes: bool = True) -> str:
    """Args: quotes: what is quoted is shown too."""
    parser = _Visible(quotes)
    parser.feed(text)
    lines = (" ".join(line.split()) for line in "".join(parser.parts).split("\n"))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()
