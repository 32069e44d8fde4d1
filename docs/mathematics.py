"""Formulas of docstrings, written as Sphinx reads them, as the site's Markdown reads them."""

import re
from typing import Any

import griffe

BLOCK = re.compile(
    r"^(?P<indent> *)\.\. math::(?P<text>(?: .*)?\n(?:(?:(?P=indent) +.*)?\n)*)", re.M
)
ROLE = re.compile(r":math:`([^`]*)`")


class Mathematics(griffe.Extension):
    """Turn ``.. math::`` and ``:math:`` into dollars."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of whatever was read."""
        if obj.docstring is not None:
            obj.docstring.value = dollars(obj.docstring.value)


def dollars(text: str) -> str:
    """Formulas between dollars."""
    text = BLOCK.sub(lambda m: f"{m['indent']}$$ {' '.join(m['text'].split())} $$\n\n", text + "\n")
    return ROLE.sub(r"$\1$", text).rstrip()
