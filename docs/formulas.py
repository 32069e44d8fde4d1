"""Formulas of the site as MathML, which browsers draw without a script or a network."""

import html
import re
from typing import Any

from latex2mathml.converter import convert

FORMULA = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', re.S)

# Functions that a space parts from what follows.
NAMED, SPACE = re.compile("<mi>(?:log|exp|det|max|min)</mi>"), '<mspace width="0.17em"/>'


def on_page_content(content: str, **kwargs: Any) -> str:
    """Called by mkdocs for the HTML of every page."""
    return FORMULA.sub(lambda m: mathml(m[2], m[1] == "div"), content)


def mathml(text: str, block: bool) -> str:
    """A formula between the delimiters of arithmatex as MathML."""
    formula = html.unescape(text).strip()
    for left, right in ((r"\(", r"\)"), (r"\[", r"\]")):
        formula = formula.removeprefix(left).removesuffix(right).strip()
    display = "block" if block else "inline"
    tag = "div" if block else "span"
    found = NAMED.sub(r"\g<0>" + SPACE, convert(formula, display=display))
    return f'<{tag} class="arithmatex">{found}</{tag}>'
